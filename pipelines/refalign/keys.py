"""Names of weights: Wan's native keys <-> diffusers' keys, and the keys of the training's projectors.

*Native* is the format of the authors' release and of ComfyUI: `blocks.0.self_attn.q.weight`, `head.modulation`, ...
"""

import re
from collections.abc import Mapping

import torch


# native name -> diffusers name; each also has `.weight` and mostly `.bias` behind it
_TOP_PARTS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_BLOCK_PARTS = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"}
for _native, _diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    _BLOCK_PARTS |= {f"{_native}.{part}": f"{_diffusers}.to_{part}" for part in "qkv"}
    _BLOCK_PARTS |= {f"{_native}.norm_{part}": f"{_diffusers}.norm_{part}" for part in "qk"}
    _BLOCK_PARTS[f"{_native}.o"] = f"{_diffusers}.to_out.0"


def _with_parameters(parts: dict[str, str], modulation: str) -> dict[str, str]:
    names = {f"{a}.{p}": f"{b}.{p}" for a, b in parts.items() for p in ("weight", "bias")}
    names = {a: b for a, b in names.items() if not a.endswith(("norm_q.bias", "norm_k.bias"))}  # RMS norms have none
    return {**names, modulation: "scale_shift_table"}


_NATIVE_TO_DIFFUSERS = _with_parameters(_TOP_PARTS, "head.modulation")
_NATIVE_BLOCK_TO_DIFFUSERS = _with_parameters(_BLOCK_PARTS, "modulation")
_DIFFUSERS_TO_NATIVE = {b: a for a, b in _NATIVE_TO_DIFFUSERS.items()}
_DIFFUSERS_BLOCK_TO_NATIVE = {b: a for a, b in _NATIVE_BLOCK_TO_DIFFUSERS.items()}
_BLOCK_KEY = re.compile(r"(blocks\.\d+\.)(.+)")
_PROJECTOR_KEY = re.compile(r"blocks\.\d+\.input_mlp\..+")
_COMFYUI_PREFIX = "model.diffusion_model."


def native_to_diffusers(
    state_dict: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    A native state dict as diffusers' one, and the projectors of a training checkpoint, apart.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): native keys, with or without the prefix `model.diffusion_model.`.

    Returns:
        `tuple[dict, dict]`: the transformer's tensors under diffusers' keys, and the projectors under their native
        keys `blocks.{i}.input_mlp.*` (empty for a released checkpoint). No tensor is copied.

    Raises:
        ValueError: for a key that Wan's text-to-video transformer does not have, or that comes twice.
    """
    transformer, projectors = {}, {}
    for key, tensor in state_dict.items():
        key = key.removeprefix(_COMFYUI_PREFIX)
        part, name = (projectors, key) if is_projector_key(key) else (transformer, diffusers_key(key))
        if name in part:
            raise ValueError(f"Key {key!r} comes twice, with and without the prefix {_COMFYUI_PREFIX!r}.")
        part[name] = tensor
    return transformer, projectors


def diffusers_to_native(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A diffusers state dict as a native one: the inverse of [`native_to_diffusers`]. Projector keys stay as they are.

    Raises:
        ValueError: for a key that [`RefAlignWanTransformer3DModel`] does not have.
    """
    return {key if is_projector_key(key) else native_key(key): tensor for key, tensor in state_dict.items()}


def is_projector_key(key: str) -> bool:
    """Whether a native key is one of the training projectors' (`blocks.{i}.input_mlp.*`)."""
    return _PROJECTOR_KEY.fullmatch(key) is not None


def diffusers_key(native: str) -> str:
    """The diffusers key of a native one, or ValueError."""
    return _rename(native, _NATIVE_TO_DIFFUSERS, _NATIVE_BLOCK_TO_DIFFUSERS, "a native Wan 2.1 text-to-video")


def native_key(diffusers: str) -> str:
    """The native key of a diffusers one, or ValueError."""
    return _rename(diffusers, _DIFFUSERS_TO_NATIVE, _DIFFUSERS_BLOCK_TO_NATIVE, "a diffusers Wan 2.1 text-to-video")


def _rename(key: str, names: dict[str, str], block_names: dict[str, str], kind: str) -> str:
    match = _BLOCK_KEY.fullmatch(key)
    prefix, name = match.groups() if match else ("", key)
    try:
        return prefix + (block_names if match else names)[name]
    except KeyError:
        raise ValueError(
            f"Key {key!r} is not one of {kind} checkpoint. Check that the file is that, and not a LoRA, an "
            "image-to-video model or another format."
        ) from None
