"""The options of [`SpeedOptions`] as diffusers' own ways: checked before weights are read, then put on a pipeline."""

import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

from refalign.calibration import read_ratios
from refalign.files import without_breaks
from refalign.pipeline_refalign_wan import RefAlignWanPipeline
from refalign.quantization import check_quantize
from refalign.transformer_refalign_wan import RefAlignMagCacheConfig
from refalign.video_options import SpeedOptions


# What a :VALUE behind the name of a cache is by default. In a threshold's unit, or in steps
CACHES = {"first-block": 0.05, "mag": 0.06, "taylorseer": 5.0}
TRIAL = (1, 32, 1)  # batch, tokens and heads of the attention that is tried


def check_levers(
    options: SpeedOptions, model: str, base: str | None, device: torch.device, dtype: torch.dtype
) -> None:
    """
    Checks them without any weights.

    Raises:
        ValueError: for what is not known, or this machine, this model or the installed libraries cannot do.
    """
    check_quantize(options.quantize, model, base, device)
    if options.cache is not None:
        kind, _ = parse_cache(options.cache)
        if kind == "mag":
            read_ratios(model, base)
    if options.attention is not None:
        _check_attention(options.attention, options.trust_kernels, device, dtype)
    if options.compile:
        _check_compiler(device)


def apply_levers(pipeline: RefAlignWanPipeline, options: SpeedOptions) -> None:
    """Puts attention, compilation and tiling on a pipeline. The cache follows with each call ([`set_cache`])."""
    if options.attention is not None:
        # diffusers warns that its API may change, and changes all other models of the process too, unless it is undone
        name: Any = options.attention
        with quiet("diffusers.models.modeling_utils"), attention_backend(name):
            pipeline.transformer.set_attention_backend(name)
    if options.compile:
        # Not `compile_repeated_blocks`: it compiles from outside the hooks of caches, which break the graph to pieces
        for block in pipeline.transformer.blocks:
            block.forward = torch.compile(block.forward)
    if options.vae_tiling:
        pipeline.vae.enable_tiling()


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Within it, a logger tells errors alone."""
    known = logging.getLogger(logger)
    level = known.level
    known.setLevel(logging.ERROR)
    try:
        yield
    finally:
        known.setLevel(level)


# -- Caches -----------------------------------------------------------------------------------------------------------


def parse_cache(text: str) -> tuple[str, float]:
    """The kind of a cache and its value, from `KIND[:VALUE]`; ValueError if either is wrong."""
    kind, colon, value = text.partition(":")
    if kind not in CACHES:
        raise ValueError(f"--cache {text}: known are {', '.join(CACHES)}, each with a :VALUE if you like.")
    if not colon:
        return kind, CACHES[kind]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if kind == "taylorseer":
        if number not in range(2, 1000):
            raise ValueError(f"--cache {text}: the value is every how many steps one is computed, from 2 on.")
    elif not 0 < number < math.inf:
        raise ValueError(f"--cache {text}: the value is the largest error, a number above 0 such as {CACHES[kind]}.")
    return kind, number


def set_cache(pipeline: RefAlignWanPipeline, cache: str | None, model: str, steps: int) -> None:
    """Makes a pipeline of a model use a cache (`KIND[:VALUE]`), or none, in calls of so many steps."""
    transformer = pipeline.transformer
    if transformer.is_cache_enabled:
        transformer.disable_cache()
    if cache is not None:
        kind, value = parse_cache(cache)
        transformer.enable_cache(_cache_config(kind, value, model, steps))


def _cache_config(kind: str, value: float, model: str, steps: int) -> Any:
    if kind == "first-block":
        return FirstBlockCacheConfig(threshold=value)
    if kind == "taylorseer":
        return TaylorSeerCacheConfig(cache_interval=int(value))
    return RefAlignMagCacheConfig(threshold=value, num_inference_steps=steps, pass_ratios=read_ratios(model))


# -- What this machine can do -----------------------------------------------------------------------------------------


def _check_attention(name: str, is_trusted: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Tries the kernel on a few tokens."""
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise ValueError(f"--attention {name} is not a kernel that diffusers knows. Known are: {', '.join(known)}.")
    if name.endswith("_hub") and not is_trusted:
        raise ValueError(
            f"--attention {name} downloads a kernel from the Hub and runs it. Pass --trust-kernels to allow it, or "
            "take another kernel."
        )
    query = torch.zeros(*TRIAL, 128, device=device, dtype=dtype)
    try:
        with attention_backend(name):  # pyright: ignore[reportArgumentType] (it takes names too)
            dispatch_attention_fn(query, query, query).sum().item()
    except Exception as error:  # whatever a foreign kernel raises
        reason = without_breaks(error)[:300]
        raise ValueError(f"--attention {name} does not run here (device {device}, {dtype}): {reason}") from error


def _check_compiler(device: torch.device) -> None:
    """Raises ValueError unless there is what `torch.compile` needs."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile needs Triton on a GPU: `pip install triton`, or leave it out.")
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # its class is private
            raise ValueError("--compile needs a C++ compiler on a CPU: install g++, or leave it out.") from error
