"""Names, all of them: of weights (native keys <-> diffusers' keys), of LoRAs, and of the training's projectors.

*Native* is the format of the authors' release and of ComfyUI: `blocks.0.self_attn.q.weight`, `head.modulation`, ...
A *layer* is a native name without `.weight` behind it: `blocks.0.self_attn.q`.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar


# -- Weights ----------------------------------------------------------------------------------------------------------

# Native layer -> diffusers' layer
_TOP_LAYERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_BLOCK_LAYERS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
}


def _with_parameters(layers: dict[str, str], modulation: str) -> dict[str, str]:
    keys = {modulation: "scale_shift_table"}
    for native, diffusers in layers.items():
        keys[f"{native}.weight"] = f"{diffusers}.weight"
        if not native.endswith(("norm_q", "norm_k")):  # RMS norms have no bias
            keys[f"{native}.bias"] = f"{diffusers}.bias"
    return keys


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {value: name for name, value in names.items()}


_TOP_KEYS = _with_parameters(_TOP_LAYERS, "head.modulation")
_BLOCK_KEYS = _with_parameters(_BLOCK_LAYERS, "modulation")
_NATIVE_TOP_KEYS = _inverse(_TOP_KEYS)
_NATIVE_BLOCK_KEYS = _inverse(_BLOCK_KEYS)
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
_COMFYUI_PREFIX = "model.diffusion_model."


Tensor = TypeVar("Tensor")  # a tensor, or where one is stored


def native_to_diffusers(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    A native state dict as diffusers' one, and the projectors of a training checkpoint, apart.

    Args:
        state_dict (`Mapping`): tensors, or where they are stored, under native keys, with or without the prefix
            `model.diffusion_model.`.

    Returns:
        `tuple[dict, dict]`: the transformer's tensors under diffusers' keys, and the projectors under their native
        keys ([`projector_key`]; empty for a released checkpoint). No tensor is copied.

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


def diffusers_to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    A diffusers state dict as a native one: the inverse of [`native_to_diffusers`]. Projector keys stay as they are.

    Raises:
        ValueError: for a key that [`RefAlignWanTransformer3DModel`] does not have.
    """
    native = {}
    for key, tensor in state_dict.items():
        native[key if is_projector_key(key) else native_key(key)] = tensor
    return native


def diffusers_key(native: str) -> str:
    """The diffusers key of a native one, or ValueError."""
    return _rename(native, _TOP_KEYS, _BLOCK_KEYS, "a native Wan 2.1 text-to-video")


def native_key(diffusers: str) -> str:
    """The native key of a diffusers one, or ValueError."""
    return _rename(diffusers, _NATIVE_TOP_KEYS, _NATIVE_BLOCK_KEYS, "a diffusers Wan 2.1 text-to-video")


def _rename(key: str, top_keys: dict[str, str], block_keys: dict[str, str], kind: str) -> str:
    match = _IN_BLOCK.fullmatch(key)
    prefix, name = match.groups() if match else ("", key)
    try:
        return prefix + (block_keys if match else top_keys)[name]
    except KeyError:
        raise ValueError(f"Key {key!r} is not one of {kind} checkpoint. {_guess(key)}") from None


# What a key tells of a checkpoint that is not Wan 2.1's text-to-video transformer
_FOREIGN = {
    "lora_|lokr_|hada_|diff(_b|_m)?$|dora_scale": "It is of a LoRA. Pass that as --lora, beside a model.",
    "img_emb|k_img|v_img|add_[kv]_proj|image_embedder": "It is of an image-to-video model.",
    "vace": "It is of VACE.",
    "motion_encoder|face_|pose_": "It is of Wan-Animate.",
    "audio": "It is of Wan's speech-to-video model.",
    "control_adapter|ref_conv": "It is of Wan-Fun's control models.",
    "first_stage_model|^(encoder|decoder)[.]": "It is of a VAE.",
}


def _guess(key: str) -> str:
    for pattern, guess in _FOREIGN.items():
        if re.search(pattern, key):
            return f"{guess} RefAlign's own is Wan 2.1's text-to-video transformer."
    return "Check that the file is that, and not a LoRA, an image-to-video model or another format."


# -- Projectors of the training ---------------------------------------------------------------------------------------

_PROJECTOR_KEY = re.compile(r"blocks\.(\d+)\.input_mlp\.(.+)")


def projector_key(name: str) -> str:
    """The native key of a projector's tensor: `blocks.3.input_mlp.proj.0.weight` of `3.proj.0.weight`, which names the
    block and then the tensor."""
    block, _, tensor = name.partition(".")
    return f"blocks.{block}.input_mlp.{tensor}"


def projector_name(key: str) -> str:
    """The inverse of [`projector_key`], or ValueError."""
    match = _PROJECTOR_KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"Key {key!r} is not one of a projector (blocks.NUMBER.input_mlp.NAME).")
    return f"{match[1]}.{match[2]}"


def is_projector_key(key: str) -> bool:
    """Whether a native key is one of [`projector_key`]."""
    return _PROJECTOR_KEY.fullmatch(key) is not None


# -- LoRAs: which layers can have one, and how each style names them --------------------------------------------------

LORA_STYLES = ("native", "diffusers", "kohya")  # in which LoRAs are written; peft's and unprefixed ones are only read
LORA_TOP_LAYERS = tuple(_TOP_LAYERS)
LORA_BLOCK_LAYERS = tuple(layer for layer in _BLOCK_LAYERS if "norm" not in layer)  # norms have no matrix
_LORA_PREFIXES = {  # the first that fits is taken
    "diffusion_model.": "native",
    "model.diffusion_model.": "native",
    "pipe.dit.": "native",  # DiffSynth-Studio's
    "transformer.": "diffusers",
    "unet.": "unprefixed",
    "base_model.model.": "peft",
    "lora_unet__": "kohya",  # VideoX-Fun's, told from kohya's own by ComfyUI too
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",  # OneTrainer's
}
_WRITTEN_PREFIX = {"native": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"}
_BLOCK_NUMBER = re.compile(r"(?<=^blocks[._])[0-9]+(?=[._])")


class LoraName(NamedTuple):
    """What the name of a module in a LoRA file says: the file's style, the name without prefix, the layer."""

    style: str
    name: str
    layer: str


def lora_name(layer: str, style: str) -> str:
    """A layer's name in a LoRA file of a style of [`LORA_STYLES`], with its prefix."""
    return _WRITTEN_PREFIX[style] + _styled(layer, style)


def parse_lora_name(module: str) -> LoraName | None:
    """What the name of a module in a LoRA file says, in any style; `None` if it is not a layer that can have one."""
    prefix = next((prefix for prefix in _LORA_PREFIXES if module.startswith(prefix)), "")
    style = _LORA_PREFIXES.get(prefix, "unprefixed")
    name = module.removeprefix(prefix)
    number = _BLOCK_NUMBER.search(name)
    in_first_block = _BLOCK_NUMBER.sub("0", name)
    # Trainers put any prefix before any names
    for names in sorted(_STYLED_LAYERS, key=lambda names: names != style):
        layer = _STYLED_LAYERS[names].get(in_first_block)
        if layer and style == "diffusers" and names != style:
            style = "unprefixed"  # diffusers itself does not read it
        if layer and number:
            return LoraName(style, name, layer.replace(".0.", f".{number[0]}.", 1))
        if layer:
            return LoraName(style, name, layer)
    return None


def split_layer(layer: str) -> tuple[int | None, str]:
    """The number of a layer's block and the rest: `(3, "ffn.0")` of `blocks.3.ffn.0`, `(None, "head.head")`."""
    match = _IN_BLOCK.fullmatch(layer)
    return (int(match[1].split(".")[1]), match[2]) if match else (None, layer)


def _styled(layer: str, style: str) -> str:
    if style == "diffusers":
        return diffusers_key(f"{layer}.weight").removesuffix(".weight")
    return layer.replace(".", "_") if style == "kohya" else layer


def _styled_layers(style: str, separator: str = ".") -> dict[str, str]:
    """The layers by their names in a style. Kohya's underscores cannot be split again, only looked up."""
    in_first_block = [f"blocks.0.{layer}" for layer in LORA_BLOCK_LAYERS]
    layers = (*LORA_TOP_LAYERS, *in_first_block)
    return {_styled(layer, style).replace(".", separator): layer for layer in layers}


_STYLED_LAYERS = {style: _styled_layers(style) for style in LORA_STYLES}
_STYLED_LAYERS["kohya of diffusers"] = _styled_layers("diffusers", "_")
