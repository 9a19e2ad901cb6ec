"""What makes a run fit into less memory: a frozen base in fewer bits or in the CPU's memory, activations there too.

All but the bits is exact. diffusers' group offloading is not used: it takes a block's weights away right after its
forward pass, and the backward pass, for which the block is computed again, still needs them.
"""

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import nn

from refalign import RefAlignWanTransformer3DModel
from refalign.files import without_breaks
from refalign_training.run.config import ModelOptions


LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
STAYS_ON_HOST = "stays_on_host"  # an attribute of weights that are not moved to the device


def check_lean(options: ModelOptions, config: Mapping[str, Any], device: torch.device) -> None:
    """Raises ValueError, before weights are read, for what this model, machine or its libraries cannot do."""
    if options.offload_blocks > config["num_layers"]:
        raise ValueError(
            f"model.offload_blocks is {options.offload_blocks}, but the model has {config['num_layers']} blocks."
        )
    if options.quantization is not None:
        library = LIBRARIES[options.quantization]
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"model.quantization {options.quantization} needs {library}: pip install {library}")
    if options.attention is not None:
        _check_attention(options.attention, device, getattr(torch, options.precision))


def _check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Tries a kernel on a few tokens, forwards and backwards."""
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise ValueError(f"model.attention is {name}, which diffusers does not know. Known are: {', '.join(known)}.")
    if name.endswith("_hub"):
        raise ValueError(
            f"model.attention {name} runs code from the Hub, which a training does not. Take another one."
        )
    query = torch.zeros(1, 32, 1, 128, device=device, dtype=dtype, requires_grad=True)
    try:
        with attention_backend(name):  # pyright: ignore[reportArgumentType] (it takes names too)
            dispatch_attention_fn(query, query, query).sum().backward()
    except Exception as error:  # whatever a foreign kernel raises
        reason = without_breaks(error)[:300]
        raise ValueError(f"model.attention {name} cannot train here ({device}, {dtype}): {reason}") from error


def make_lean(transformer: RefAlignWanTransformer3DModel, options: ModelOptions, device: torch.device) -> None:
    """Puts the options on a transformer that has its adapters, before it is moved to the device."""
    if options.attention is not None:
        take_attention(transformer, AttentionBackendName(options.attention))
    elif device.type == "cpu":
        # torch's flash attention takes eight times as long backwards as forwards
        take_attention(transformer, AttentionBackendName._NATIVE_MATH)
    if options.quantization is not None:
        for block in transformer.blocks:
            quantize(block, options.quantization, device, getattr(torch, options.precision))
    for block in list(transformer.blocks)[: options.offload_blocks]:
        offload_weights(block, device)
    if options.offload_activations:
        offload_activations(transformer, device)


def take_attention(transformer: RefAlignWanTransformer3DModel, backend: AttentionBackendName) -> None:
    """Lets a transformer compute attention by a kernel."""
    # Not by `set_attention_backend`, which would change all other models of the process too
    for block in transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.processor._attention_backend = backend


# -- Fewer bits -------------------------------------------------------------------------------------------------------


def quantize(block: nn.Module, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Puts the frozen matrices of a block in fewer bits, on the device, one block after the other: a device never
    holds all of them as they were. They are computed with in `dtype`."""
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear) and not layer.weight.requires_grad]
    for layer in layers:
        layer.weight.data = layer.weight.data.to(device)
    if kind == "nf4":
        _quantize_to_nf4(block, dtype)
        return
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig())
    quantize_(block, config.quant_type, filter_fn=lambda layer, _: layer in layers)


def _quantize_to_nf4(block: nn.Module, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]  # only for these bits

    for module in list(block.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                has_bias = layer.bias is not None
                four = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
                )
                weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                four.weight, four.bias = weight.to(layer.weight.device), layer.bias
                setattr(module, name, four)


# -- The CPU's memory -------------------------------------------------------------------------------------------------


def offload_weights(block: nn.Module, device: torch.device) -> None:
    """
    Keeps the frozen weights of a block in the CPU's memory. Whenever the block computes, it does so with copies on the
    device. What is saved for its backward pass holds them until then; nothing is copied back.

    The block must be computed again in the backward pass (gradient checkpointing), or all copies would be held.
    """
    places = []
    for module in block.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                places.append((module, name))
                host = weight.data.to("cpu")
                if device.type == "cuda" and type(host) is torch.Tensor:  # a quantised one may not know how
                    host = host.pin_memory()
                kept = nn.Parameter(host, requires_grad=False)
                setattr(kept, STAYS_ON_HOST, True)
                module._parameters[name] = kept
    compute = block.forward

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _copied(places, device):
            return compute(*args, **kwargs)

    block.forward = forward


@contextmanager
def _copied(places: list[tuple[nn.Module, str]], device: torch.device) -> Iterator[None]:
    """Inside this context, these parameters of modules are copies of themselves on a device."""
    kept = [module._parameters[name] for module, name in places]
    try:
        for (module, name), weight in zip(places, kept, strict=True):
            copy = weight.detach().to(device, non_blocking=True, copy=True)  # pyright: ignore[reportOptionalMemberAccess]
            module._parameters[name] = nn.Parameter(copy, requires_grad=False)
        yield
    finally:
        for (module, name), weight in zip(places, kept, strict=True):
            module._parameters[name] = weight


def offload_activations(transformer: nn.Module, device: torch.device) -> None:
    """Keeps what the blocks are computed again from in the CPU's memory between forward and backward pass."""
    compute = transformer.forward

    @functools.wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"):
            return compute(*args, **kwargs)

    transformer.forward = forward
