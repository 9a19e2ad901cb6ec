"""Weights in fewer bits: int8 and fp8 by torchao, and GGUF files, through diffusers' own quantisers.

Quantised are the matrices of the blocks' attention and feed-forward, which are nearly all of the weights. In full
precision stay patch embedding, condition embedder (text and timestep), norms, modulation, biases and the head: they
are small, and each of them touches every token.
"""

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refalign.convert import check_not_half, check_shapes, find_config
from refalign.files import StoredTensor, without_breaks
from refalign.keys import native_to_diffusers
from refalign.transformer_refalign_wan import (
    RefAlignWanTransformer3DModel,
    check_finite,
    check_is_wan21,
    other_model,
)


if TYPE_CHECKING:
    from gguf import ReaderTensor


KINDS = ("int8", "fp8")
NOT_QUANTIZED = ["patch_embedding", "condition_embedder", "proj_out"]
QUANTIZED = re.compile(r"blocks\.\d+\.(attn[12]\.to_|ffn\.).+\.weight")
LANGUAGE_MODELS = re.compile("llama|qwen|gemma|mistral|phi|gpt|t5|bert|falcon|mamba|deepseek|olmo|granite|glm")


def is_gguf(name: str | None) -> bool:
    return name is not None and name.endswith(".gguf")


def check_quantize(quantize: str | None, model: str, base: str | None, device: torch.device) -> None:
    """
    Checks `--quantize`, and a GGUF file as `--model`, without reading weights.

    Raises:
        ValueError: if it is not known, its library is missing, or this device cannot compute with it.
    """
    if is_gguf(model) and quantize is not None:
        raise ValueError(f"{model} is quantised as it is. Leave --quantize {quantize} out.")
    if is_gguf(quantize) and base is not None:
        raise ValueError(f"--quantize {quantize} has the weights that --model {model} has too. Pass it as --model.")
    file = quantize if quantize is not None and is_gguf(quantize) else model
    if is_gguf(file):
        _check_package("gguf", file)
        if not Path(file).is_file():
            raise ValueError(f"{file} does not exist. Of a Hub repo, download it: hf download ORG/NAME FILE.gguf")
    elif quantize is not None:
        if quantize not in KINDS:
            raise ValueError(f"--quantize {quantize} is not known. Pass int8, fp8 or a .gguf file.")
        _check_package("torchao", f"--quantize {quantize}")
        if quantize == "fp8" and device.type == "mps":
            raise ValueError("--quantize fp8 needs numbers that mps does not have. Take int8 or a GGUF file.")


def _check_package(name: str, what: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise ValueError(f'{what} needs the package {name}, which is not installed: `pip install ".[quantize]"`.')


# -- torchao ----------------------------------------------------------------------------------------------------------


def torchao_config(kind: str) -> Any:
    """diffusers' configuration of `int8` or `fp8`, for `from_pretrained` and `from_single_file`."""
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kinds: dict[str, Any] = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}
    return TorchAoConfig(kinds[kind](), modules_to_not_convert=list(NOT_QUANTIZED))


def weight_bytes(model: torch.nn.Module) -> int:
    """The bytes of a model's parameters, as they are kept. torchao's tensors themselves say what they once were."""
    return sum(map(_bytes, model.parameters()))


def _bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        subclass: Any = tensor  # torch's protocol of subclasses
        names, _ = subclass.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def as_plain(weight: torch.Tensor) -> torch.Tensor:
    """A weight that any function of torch takes: torchao's as numbers, GGUF's as the bytes of its file."""
    if hasattr(weight, "__tensor_flatten__"):
        return weight.dequantize()
    return weight.as_tensor() if hasattr(weight, "as_tensor") else weight  # pyright: ignore[reportAttributeAccessIssue]


# -- GGUF -------------------------------------------------------------------------------------------------------------


def load_gguf(file: str, base: str, dtype: torch.dtype) -> RefAlignWanTransformer3DModel:
    """
    The transformer of a GGUF file, under native or diffusers' keys, as it is quantised there.

    Args:
        file (`str`): the file.
        base (`str`): the pipeline, a folder or Hub id, whose configuration the transformer has.
        dtype (`torch.dtype`): of the computation, and of what is not quantised.

    Raises:
        ValueError: if the file is damaged, or of another model than Wan 2.1's text-to-video one of the base's size.
    """
    from diffusers import GGUFQuantizationConfig

    check_not_half(file)
    tensors = _read_headers(file)
    check_shapes({name: _stored(tensor, file) for name, tensor in tensors.items()}, find_config(base), file)
    weights = {name: _weight(name, tensor, file) for name, tensor in tensors.items()}
    check_finite(weights.items(), file)
    config = GGUFQuantizationConfig(compute_dtype=dtype)
    return RefAlignWanTransformer3DModel.from_single_file(
        weights, config=base, subfolder="transformer", dtype=dtype, quantization_config=config
    )


def _read_headers(file: str) -> "dict[str, ReaderTensor]":
    """The tensors by diffusers' keys; their data is not read yet."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # the reader's own are of many kinds: it trusts what the file says
        raise ValueError(f"{file} is not a whole GGUF file: {without_breaks(error)}. Download it again.") from error
    field = reader.fields.get("general.architecture")
    architecture = "" if field is None else str(field.contents())
    if LANGUAGE_MODELS.match(architecture):
        raise other_model(file, f"a language model ({architecture})")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if not any(name.startswith("condition_embedder.") for name in tensors):
        try:
            tensors, _ = native_to_diffusers(tensors)
        except ValueError as error:
            kind = f" (architecture {architecture})" if architecture else ""
            raise ValueError(f"{file}{kind}: {error}") from error
    if patches := tensors.get("patch_embedding.weight"):
        check_is_wan21({"in_channels": _shape(patches)[1]}, file)
    return tensors


def _shape(tensor: "ReaderTensor") -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts from the innermost one


def _stored(tensor: "ReaderTensor", file: str) -> StoredTensor:
    return StoredTensor(Path(file), tensor.name, _shape(tensor), torch.float16)


def _weight(name: str, tensor: "ReaderTensor", file: str) -> torch.Tensor:
    """A tensor as diffusers' quantiser takes it: quantised for a matrix of the blocks, else plain numbers."""
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter, dequantize_gguf_tensor

    kind = tensor.tensor_type
    data = torch.from_numpy(tensor.data.copy())
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return data
    if kind not in SUPPORTED_GGUF_QUANT_TYPES:
        known = ", ".join(sorted(known.name for known in SUPPORTED_GGUF_QUANT_TYPES))
        raise ValueError(f"{file}: {tensor.name} is of type {kind.name}, which diffusers does not read. Take {known}.")
    quantized: Any = GGUFParameter(data, quant_type=kind)  # pyright: ignore[reportCallIssue]
    return quantized if QUANTIZED.fullmatch(name) else dequantize_gguf_tensor(quantized)
