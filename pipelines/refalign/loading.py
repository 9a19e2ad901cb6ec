"""The pipeline that a command line asks for: of a folder, the Hub or a native checkpoint, with LoRAs, on a device."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from refalign.convert import CONFIGS, check_shapes, check_weights, find_config, read_native
from refalign.devices import find_device
from refalign.files import (
    HUB_ID,
    OTHER_FORMATS,
    fetch,
    find_safetensors,
    list_files,
    open_safetensors,
    plain_weights,
    read,
    read_json,
)
from refalign.levers import apply_levers, check_levers, quiet
from refalign.lora_defaults import read_lora_defaults
from refalign.lora_loading import prepare_lora
from refalign.pipeline_refalign_wan import CALL_DEFAULTS, RefAlignWanPipeline, paper_scheduler
from refalign.quantization import KINDS, is_gguf, load_gguf, torchao_config
from refalign.transformer_refalign_wan import RefAlignWanTransformer3DModel, check_finite
from refalign.variants import find_variant
from refalign.video_options import SpeedOptions


logger = logging.getLogger(__name__)


def read_defaults(pipeline: str, loras: Sequence[str] = ()) -> dict[str, Any]:
    """
    What a pipeline's folder or repo, or else the published models, take for settings that are not given; and before
    that the LoRAs, each `FILE[:SCALE]`, that are loaded into it: a distilled one wants both scales at 1.

    Raises:
        ValueError: if there is no such pipeline or LoRA, or it is of another kind than Wan 2.1's text-to-video model.
    """
    defaults = CALL_DEFAULTS | (_read_index(pipeline).get("call_defaults") or {})
    for source, _ in map(parse_lora, loras):
        defaults |= read_lora_defaults(source)
    return defaults


def load_pipeline(
    model: str,
    *,
    base: str | None,
    loras: Sequence[tuple[str, float]],
    dtype: str,
    device: str,
    offload: str,
    speed: SpeedOptions = SpeedOptions(),  # noqa: B008 (frozen)
) -> RefAlignWanPipeline:
    """
    Loads what the options of `refalign generate` with these names ask for; LoRAs come from [`parse_lora`]. A cache is
    set with each call ([`refalign.levers.set_cache`]).

    Raises:
        ValueError: for an option that is wrong, or does not fit the others.
    """
    where = find_device(device)
    if offload == "model" and where.type == "cpu":
        raise ValueError("--offload model moves parts to a GPU, but the device is cpu. Use --offload none.")
    weights = torch.float32 if where.type == "cpu" else torch.bfloat16
    if dtype != "auto":
        weights = getattr(torch, dtype)
    config = find_config(model if base is None else base)
    check_levers(speed, model, base, where, weights)
    prepared = [(source, prepare_lora(source, config), scale) for source, scale in loras]  # before weights are read
    if speed.quantize in KINDS:
        _check_no_biases(prepared)
    pipeline = _load_parts(model, base, weights, speed.quantize)
    _load_loras(pipeline, prepared)
    apply_levers(pipeline, speed)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=where)
    elif offload == "group":
        pipeline.enable_group_offload(where, offload_type="leaf_level", use_stream=where.type == "cuda")
    else:
        pipeline.to(where)
    return pipeline


def _load_parts(model: str, base: str | None, dtype: torch.dtype, quantize: str | None) -> RefAlignWanPipeline:
    """The pipeline, with text encoder and transformer in `dtype`, and the blocks quantised."""
    name = model if base is None else base
    index = _read_index(name)
    gguf = next(filter(is_gguf, (model, quantize)), None)
    if Path(name).is_dir():
        has_transformer = base is None and gguf is None
        check_weights(Path(name), ("vae", "text_encoder", *(("transformer",) if has_transformer else ())))
        _check_files(Path(name))
    parts: dict[str, Any] = {"dtype": {"default": dtype, "vae": torch.float32}}
    if gguf is not None:
        parts["transformer"] = load_gguf(gguf, name, dtype)
    elif base is not None:
        parts["transformer"] = _load_native(model, base, dtype, quantize)
    elif quantize is not None:
        config = torchao_config(quantize)
        with quiet("diffusers.quantizers.torchao.torchao_quantizer"):  # which doubts int8 beside float32
            parts["transformer"] = RefAlignWanTransformer3DModel.from_pretrained(
                name,
                subfolder="transformer",
                variant=_find_variant(name, ["transformer"]),
                dtype=dtype,
                quantization_config=config,
            )
    if base is not None and not index.get("call_defaults"):
        parts["scheduler"] = paper_scheduler()  # as `convert` writes it
    elif index.get("_class_name") == "WanPipeline":
        # Plain Wan, which with a LoRA is a RefAlign model: it takes the schedule that LoRAs are trained with
        parts["scheduler"] = paper_scheduler()
    variant = _find_variant(name, index.keys() - parts.keys())
    return RefAlignWanPipeline.from_pretrained(name, variant=variant, **parts)


def _find_variant(name: str, components: Iterable[str]) -> str | None:
    """The variant that diffusers must be told, if some of a pipeline's components have weights of it alone."""
    files: dict[str, list[str]] = {component: [] for component in components}
    for file in list_files(name, fetch(name, CONFIGS)):
        folder, _, file_name = file.rpartition("/")
        if folder in files:
            files[folder].append(file_name)
    found = {find_variant(Path(name, component), names) for component, names in files.items()}
    variants = sorted(filter(None, found))
    if len(variants) > 1:
        raise ValueError(f"{name} has weights of the variants {', '.join(variants)} alone. Keep those of one.")
    if variants:
        logger.warning("%s has weights of the variant %s alone: they are taken.", name, variants[0])
    return variants[0] if variants else None


def _check_files(folder: Path) -> None:
    """Raises ValueError, naming the file, for one of a pipeline's components that is not whole: what diffusers and
    transformers say of it names none."""
    for component in ("vae", "text_encoder", "transformer"):
        if (folder / component).is_dir():
            plain_weights(folder / component)
    for file in sorted(folder.glob("*/*.safetensors")):
        with open_safetensors(file):
            pass
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        read_json(file, object)


def _read_index(name: str) -> dict[str, Any]:
    """What the `model_index.json` of a pipeline says that can be loaded."""
    path = Path(name)
    if path.is_file():
        if not is_gguf(name):
            find_safetensors(path)  # tells other formats
        raise ValueError(
            f"{name} is a native checkpoint: only the transformer. Pass it as --model, and as --base the Wan 2.1 "
            "pipeline for the rest, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    find_config(name)
    folder = fetch(name, CONFIGS)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{name} is not a whole pipeline: it has no model_index.json.")
    return read_json(folder / "model_index.json")


def _load_native(
    checkpoint: str, base: str, dtype: torch.dtype, quantize: str | None
) -> RefAlignWanTransformer3DModel:
    tensors, _ = read_native(checkpoint)
    check_shapes(tensors, find_config(base), checkpoint)
    weights = read(tensors)
    check_finite(weights.items(), checkpoint)
    config = None if quantize is None else torchao_config(quantize)
    with quiet("diffusers.quantizers.torchao.torchao_quantizer"):
        return RefAlignWanTransformer3DModel.from_single_file(
            weights, config=base, subfolder="transformer", dtype=dtype, quantization_config=config
        )


def parse_lora(lora: str) -> tuple[str, float]:
    """
    The file or Hub id of a LoRA, and its scale, from `FILE[:SCALE]`.

    Raises:
        ValueError: if the scale is not a number, or there is no such LoRA.
    """
    source, scale = lora, 1.0
    before, colon, after = lora.rpartition(":")
    if colon:
        with suppress(ValueError):  # what is behind the colon belongs to the name
            source, scale = before, float(after)
    path = Path(source)
    if not math.isfinite(scale) or ".safetensors:" in path.name:
        raise ValueError(f"--lora {lora}: the scale behind the colon is not a number.")
    if path.suffix in OTHER_FORMATS or (path.is_file() and path.suffix != ".safetensors"):
        raise ValueError(f"LoRA {source} is not a .safetensors file.")
    may_be_on_hub = HUB_ID.fullmatch(source) and path.suffix != ".safetensors"
    if not path.exists() and not may_be_on_hub:
        raise ValueError(f"LoRA {source} does not exist.")
    return source, scale


def _check_no_biases(loras: Sequence[tuple[str, Any, float]]) -> None:
    """Raises ValueError for a LoRA that changes biases, which peft cannot beside torchao's weights."""
    for source, prepared, _ in loras:
        if isinstance(prepared, Mapping) and any(key.endswith(".lora_B.bias") for key in prepared):
            raise ValueError(
                f"LoRA {source} changes biases, which cannot be with --quantize int8 or fp8. Leave one out."
            )


def _load_loras(pipeline: RefAlignWanPipeline, loras: Sequence[tuple[str, Any, float]]) -> None:
    """Loads LoRAs: their names, what [`prepare_lora`] made of each, and their scales."""
    scales = {}
    for number, (source, prepared, scale) in enumerate(loras):
        name = f"lora_{number}"
        pipeline.load_lora_weights(prepared, adapter_name=name)
        if name not in pipeline.get_list_adapters().get("transformer", ()):
            raise ValueError(f"LoRA {source} holds no weights for Wan's transformer.")
        scales[name] = scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))
