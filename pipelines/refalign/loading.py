"""The pipeline that a command line asks for: of a folder, the Hub or a native checkpoint, with LoRAs, on a device."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch

from refalign.convert import check_shapes
from refalign.devices import find_device
from refalign.files import HUB_ID, PICKLES, find_safetensors, read, read_headers
from refalign.keys import native_to_diffusers
from refalign.pipeline_refalign_wan import CALL_DEFAULTS, RefAlignWanPipeline, paper_scheduler
from refalign.transformer_refalign_wan import RefAlignWanTransformer3DModel


def read_defaults(pipeline: str) -> dict[str, Any]:
    """What a pipeline's folder or repo, or else the published models, take for settings that are not given."""
    if not _is_folder_or_hub_id(pipeline):
        return CALL_DEFAULTS  # that it is not a model is told when it is loaded
    return CALL_DEFAULTS | (_read_index(pipeline).get("call_defaults") or {})


def load_pipeline(
    model: str, *, base: str | None, loras: Sequence[tuple[str, float]], dtype: str, device: str, offload: str
) -> RefAlignWanPipeline:
    """
    Loads what the options of `refalign generate` with these names ask for; LoRAs come from [`parse_lora`].

    Raises:
        ValueError: for an option that is wrong, or does not fit the others.
    """
    where = find_device(device)
    if offload == "model" and where.type == "cpu":
        raise ValueError("--offload model moves parts to a GPU, but the device is cpu. Use --offload none.")
    weights = torch.float32 if where.type == "cpu" else torch.bfloat16
    if dtype != "auto":
        weights = getattr(torch, dtype)
    pipeline = _load_parts(model, base, weights)
    _load_loras(pipeline, loras)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=where)
    elif offload == "group":
        pipeline.enable_group_offload(where, offload_type="leaf_level", use_stream=where.type == "cuda")
    else:
        pipeline.to(where)
    return pipeline


def _load_parts(model: str, base: str | None, dtype: torch.dtype) -> RefAlignWanPipeline:
    """The pipeline, with text encoder and transformer in `dtype`."""
    if base is None and Path(model).suffix in (".safetensors", *PICKLES):
        raise ValueError(
            f"{model} is a native checkpoint: only the transformer. Pass --base with the Wan 2.1 pipeline for the "
            "rest, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    name = model if base is None else base
    if not _is_folder_or_hub_id(name):
        raise ValueError(f"{name} is neither a folder here nor a Hub id (ORG/NAME).")
    parts: dict[str, Any] = {"dtype": {"default": dtype, "vae": torch.float32}}
    if base is not None:
        parts["transformer"] = _load_native(model, base, dtype)
        parts["scheduler"] = paper_scheduler()  # as `convert` writes it
    elif _read_index(name)["_class_name"] == "WanPipeline":
        # Plain Wan, which with a LoRA is a RefAlign model: it takes the schedule that LoRAs are trained with
        parts["scheduler"] = paper_scheduler()
    return RefAlignWanPipeline.from_pretrained(name, **parts)


def _is_folder_or_hub_id(name: str) -> bool:
    return Path(name).is_dir() or HUB_ID.fullmatch(name) is not None


def _read_index(name: str) -> dict[str, Any]:
    """What a pipeline's `model_index.json` says."""
    return cast(dict[str, Any], RefAlignWanPipeline.load_config(name))  # diffusers types it as a tuple


def _load_native(checkpoint: str, base: str, dtype: torch.dtype) -> RefAlignWanTransformer3DModel:
    tensors, _ = native_to_diffusers(read_headers(find_safetensors(checkpoint)))
    config = RefAlignWanTransformer3DModel.load_config(base, subfolder="transformer")
    check_shapes(tensors, cast(dict[str, Any], config), checkpoint)
    return RefAlignWanTransformer3DModel.from_single_file(
        read(tensors), config=base, subfolder="transformer", dtype=dtype
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
    if path.suffix in PICKLES or (path.is_file() and path.suffix != ".safetensors"):
        raise ValueError(f"LoRA {source} is not a .safetensors file.")
    may_be_on_hub = HUB_ID.fullmatch(source) and path.suffix != ".safetensors"
    if not path.exists() and not may_be_on_hub:
        raise ValueError(f"LoRA {source} does not exist.")
    return source, scale


def _load_loras(pipeline: RefAlignWanPipeline, loras: Sequence[tuple[str, float]]) -> None:
    scales = {}
    for number, (source, scale) in enumerate(loras):
        name = f"lora_{number}"
        pipeline.load_lora_weights(source, adapter_name=name, use_safetensors=True)
        if name not in pipeline.get_list_adapters().get("transformer", ()):
            raise ValueError(f"LoRA {source} holds no weights for Wan's transformer.")
        scales[name] = scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))
