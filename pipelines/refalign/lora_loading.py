"""LoRAs of any style as diffusers loads them into our transformer, after a look at whether they fit it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import _fetch_state_dict
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from refalign.files import OTHER_FORMATS, tell_of_hub, without_breaks
from refalign.hub import LORA_WEIGHTS
from refalign.keys import diffusers_key, native_key, split_layer
from refalign.lora import WIDTHS, Lora, lora_widths, parse_lora, passed_over, read_lora
from refalign.lora_defaults import read_file_defaults, told
from refalign.transformer_refalign_wan import RefAlignWanTransformer3DModel


logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


def prepare_lora(source: str | Path | Mapping, config: Mapping[str, Any], **options: Any) -> Any:
    """
    What diffusers has to load for a LoRA: the source itself where diffusers reads all of it as it is meant, else
    tensors under diffusers' keys. What is not applied is logged in a line.

    Args:
        source (`str`, `Path` or `Mapping`): a file, a folder, a Hub id, or tensors.
        config (`Mapping`): the transformer's configuration.
        options: those of diffusers' `load_lora_weights` that say where the file is, such as `weight_name`.

    Raises:
        ValueError: if there is no such file, or it is of another kind, damaged, or of a transformer of another width.
    """
    name = "The LoRA" if isinstance(source, Mapping) else str(source)
    lora = _read(source, options)
    shapes = _layer_shapes(config)
    _check_fits(lora, shapes, name)
    missing = sorted({layer for layer in _layers(lora) if layer not in shapes})
    if missing:
        blocks = sorted({number for number, _ in map(split_layer, missing) if number is not None})
        logger.warning(
            "%s: %d of its layers are not in this model, and are not applied (of %d blocks, from %s on).",
            *(name, len(missing), len(blocks), missing[0]),
        )
    if sentence := passed_over(lora):
        logger.warning("%s: %s", name, sentence)
    if wanted := _stated_defaults(source, options):
        logger.warning("%s is distilled: call the pipeline with %s.", name, told(wanted))
    if lora.is_plain and not (missing or lora.passed_over):
        return source  # with its metadata, so that it can be saved again
    return _as_diffusers(lora, shapes)


def _local_path(source: str | Path, options: Mapping[str, Any]) -> Path:
    path = Path(source) / (options.get("subfolder") or "") if Path(source).is_dir() else Path(source)
    return path / (options.get("weight_name") or _only_file(path)) if path.is_dir() else path


def _stated_defaults(source: str | Path | Mapping, options: Mapping[str, Any]) -> dict[str, float]:
    """What the file that was read says of how it is called."""
    if isinstance(source, Mapping):
        return {}
    path = _local_path(source, options)
    if not path.is_file():
        name = f"{options.get('subfolder') or ''}/{options.get('weight_name') or LORA_WEIGHTS}".lstrip("/")
        where: dict[str, Any] = {key: options.get(key) for key in ("cache_dir", "revision")}
        cached = try_to_load_from_cache(str(source), name, **where)  # the Hub has just given it
        path = Path(cached if isinstance(cached, str) else "")
    return read_file_defaults(path) if path.is_file() else {}


def _read(source: str | Path | Mapping, options: Mapping[str, Any]) -> Lora:
    if isinstance(source, Mapping):
        return parse_lora(source)
    path = _local_path(source, options)
    if path.suffix in OTHER_FORMATS or path.is_file():
        return read_lora(path)
    wanted = ("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision")
    where: dict[str, Any] = {name: options.get(name) for name in (*wanted, "subfolder")}
    name = str(options.get("weight_name") or "")
    if name and not name.endswith(".safetensors"):
        raise ValueError(f"{source}: weight_name is {name}, but a LoRA is read from a .safetensors file alone.")
    where |= {"use_safetensors": True, "allow_pickle": False}
    where["user_agent"] = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    tell_of_hub(str(source))
    try:
        tensors, stated = _fetch_state_dict(str(source), **where)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"LoRA {source} is not a file or folder here, and the Hub does not give it: {without_breaks(error)}"
        ) from error
    return parse_lora(tensors, stated, str(source))


def _only_file(folder: Path) -> str:
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if LORA_WEIGHTS in names:
        return LORA_WEIGHTS
    if len(names) != 1:
        raise ValueError(f"{folder} has {len(names)} safetensors files: {names}. Name the LoRA's file.")
    return names[0]


def _layers(lora: Lora) -> set[str]:
    """The layers that it changes, by their native names."""
    changed = {key.removeprefix("diffusion_model.").rpartition(".")[0] for key in lora.differences}
    return changed | lora.pairs.keys()


def _layer_shapes(config: Mapping[str, Any]) -> Shapes:
    """The shapes of the weights of a transformer's layers, by their native names."""
    with torch.device("meta"):
        model = RefAlignWanTransformer3DModel.from_config(dict(config))
    shapes = {}
    for name, tensor in model.state_dict().items():  # pyright: ignore[reportAttributeAccessIssue] (typed as a tuple)
        layer, _, kind = native_key(name).rpartition(".")
        if kind == "weight":
            shapes[layer] = tuple(tensor.shape)
    return shapes


def _check_fits(lora: Lora, shapes: Shapes, name: str) -> None:
    """Raises ValueError unless its matrices have the sizes of the layers, and one of the layers is there."""
    width = shapes["time_embedding.2"][0]
    found = lora_widths(lora)
    if found and found != {width}:
        theirs = " and ".join(_model_name(other) for other in sorted(found))
        raise ValueError(f"{name} is for {theirs}, but this model is {_model_name(width)}. Pass a LoRA for it.")
    if not any(layer in shapes for layer in _layers(lora)):
        raise ValueError(f"{name} changes no layer of this model: all of them are of blocks that it does not have.")
    for layer, (a, b) in lora.pairs.items():
        if layer in shapes and (b.shape[0], *a.shape[1:]) != shapes[layer]:
            sizes = f"{tuple(b.shape)} x {tuple(a.shape)}"
            raise ValueError(f"{name}: {layer} has matrices of {sizes}, which do not make {shapes[layer]}.")
    for key, tensor in lora.differences.items():
        layer, _, kind = key.removeprefix("diffusion_model.").rpartition(".")
        if layer in shapes and tuple(tensor.shape) != shapes[layer][: None if kind == "diff" else 1]:
            raise ValueError(f"{name}: {key} has shape {tuple(tensor.shape)}, but the layer's is {shapes[layer]}.")


def _model_name(width: int) -> str:
    return WIDTHS.get(width, f"a model of width {width}")


def _as_diffusers(lora: Lora, shapes: Shapes) -> dict[str, torch.Tensor]:
    """peft adds matrices and biases of them, so that the scale, switching off and unloading reach all of a LoRA."""
    has_biases = any(key.endswith(".diff_b") for key in lora.differences)
    tensors = {}
    for layer in sorted(_layers(lora) & shapes.keys()):
        shape = shapes[layer]
        pairs = [lora.pairs[layer]] if layer in lora.pairs else []
        difference = lora.differences.get(f"diffusion_model.{layer}.diff")
        if difference is not None:
            pairs.append(_whole_pair(difference))
        if not pairs:
            pairs.append((torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *[1] * (len(shape) - 2))))
        name = "transformer." + diffusers_key(f"{layer}.weight").removesuffix(".weight")
        first, *others = pairs
        dtype = torch.float32 if others else first[0].dtype
        tensors[f"{name}.lora_A.weight"] = torch.cat([a.to(dtype) for a, _ in pairs])
        tensors[f"{name}.lora_B.weight"] = torch.cat([b.to(dtype) for _, b in pairs], dim=1)
        if has_biases:  # peft wants one for each layer, or none
            bias = lora.differences.get(f"diffusion_model.{layer}.diff_b")
            tensors[f"{name}.lora_B.bias"] = torch.zeros(shape[0]) if bias is None else bias
    return tensors


def _whole_pair(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole weight's difference as a pair: itself and an identity, on the side where that is smaller."""
    rows, columns = difference.flatten(1).shape
    ones = [1] * (difference.ndim - 2)  # of a convolution
    if rows <= columns:
        return difference, torch.eye(rows, dtype=difference.dtype).view(rows, rows, *ones)
    identity = torch.eye(columns, dtype=difference.dtype)
    return identity.view(columns, *difference.shape[1:]), difference.reshape(rows, columns, *ones)
