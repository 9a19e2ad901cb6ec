"""LoRA files in every style in use for Wan, and one form between them. The names of layers are in `keys.py`.

*Native* here is what ComfyUI and Wan's community read: `diffusion_model.blocks.0.self_attn.q.lora_A.weight` and
`...lora_B.weight`, with alpha / rank multiplied into lora_B, and neither `.alpha` tensors nor adapter metadata beside
it: diffusers applies metadata to whatever keys it finds, so a scale that is both baked in and stated counts twice.
"""

import json
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from refalign.files import find_safetensors, new_file, open_safetensors, read_json
from refalign.keys import (
    LORA_BLOCK_LAYERS,
    LORA_STYLES,
    lora_name,
    native_key,
    parse_lora_name,
    split_layer,
)
from refalign.transformer_refalign_wan import check_finite


logger = logging.getLogger(__name__)

WIDTHS = {1536: "Wan 2.1 1.3B", 5120: "Wan 2.1 14B", 3072: "Wan 2.2 5B"}

_READS_WIDTH = re.compile(r"self_attn|cross_attn|ffn\.0|time_projection|head")  # the other layers write it
_PART = re.compile(
    r"(.+)\.(?:lora_(A|B|down|up)(?:\.([^.]+))?\.weight|(alpha|diff|diff_b)|lora_B(?:\.[^.]+)?\.(bias))"
)
_SLOTS = {"A": "A", "down": "A", "B": "B", "up": "B"}
_DIFFERENCES = ("diff", "diff_b")  # of a layer's whole weight, and of its bias
# What no program but its own applies to Wan, by what its keys hold
_OTHER_KINDS = {
    "dora_scale|lora_magnitude_vector": "a DoRA",
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "oft_|boft_": "an OFT",
    "lora_mid": "a LoCon with three matrices",
    r"(^|[._])(te\d?|text_encoder\w*|t5\w*|umt5\w*)[._]": "one of a text encoder too",
}
# What belongs to Wan's LoRAs and is not applied, by what its keys hold
_PASSED_OVER = {
    "(k|v)_img|img_emb|add_[kv]_proj|image_embedder": "of image-to-video layers",
    "diff_m|modulation|scale_shift_table": "of modulation",
    "norm": "of norms",
}
_METADATA = "lora_adapter_metadata"
_PREFIX = "diffusion_model."

Pair = tuple[torch.Tensor, torch.Tensor]  # lora_A and lora_B


@dataclass(frozen=True)
class Lora:
    """A LoRA as read from a file.

    Args:
        style (`str`): the style of the file's keys: `native`, `diffusers`, `peft`, `kohya` or `unprefixed`.
        layers (`dict[str, torch.Tensor]`): the pairs under native keys, alpha baked in.
        scales (`dict[str, float]`): what was baked in, by layer, such as `blocks.0.self_attn.q`.
        differences (`dict[str, torch.Tensor]`): changes of whole weights (`diff`) and biases (`diff_b`), under native
            keys, as distilled LoRAs have them. No scale applies to them.
        passed_over (`dict[str, int]`): what the file holds beside that and no layer takes, each with its count.
        is_plain (`bool`): whether all keys are those that diffusers itself writes.
    """

    style: str
    layers: dict[str, torch.Tensor]
    scales: dict[str, float]
    differences: dict[str, torch.Tensor] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    is_plain: bool = False

    @property
    def pairs(self) -> dict[str, Pair]:
        """lora_A and lora_B by layer."""
        return _pairs(self.layers)


def native_lora(layers: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """
    A peft adapter of our transformer as a native LoRA.

    Args:
        layers (`Mapping[str, torch.Tensor]`): peft's names on diffusers' transformer, with or without the adapter's
            name: `blocks.0.attn1.to_q.lora_A.weight`, `blocks.0.attn1.to_q.lora_A.default.weight`, ...
        scale (`float`): alpha / rank.

    Returns:
        `dict[str, torch.Tensor]`: native keys; `scale` is multiplied into lora_B in float32. A pair keeps its dtype
        where that loses nothing, and is float32 otherwise.

    Raises:
        ValueError: for a key that is not a LoRA matrix or has no native name, and for an incomplete pair.
    """
    pairs = defaultdict(dict)
    for key, tensor in layers.items():
        match = _PART.fullmatch(key)
        if match is None or not match[2]:
            raise ValueError(f"{key!r} is not one of peft's LoRA matrices (NAME.lora_A.weight, NAME.lora_B.weight).")
        layer = native_key(f"{match[1]}.weight").removesuffix(".weight")
        _put(pairs[layer], _SLOTS[match[2]], tensor.detach(), key)
    baked = {}
    for layer, pair in pairs.items():
        _check_pair(layer, pair)
        baked[layer] = _baked(pair["A"], pair["B"], scale)
    return _joined(baked)


def _put(pair: dict[str, Any], slot: str, tensor: torch.Tensor, key: str) -> None:
    if slot in pair:
        raise ValueError(f"{key!r} is there twice, under two names: is there more than one adapter? Keep one.")
    pair[slot] = tensor


def _check_pair(layer: str, pair: Mapping[str, torch.Tensor]) -> None:
    if "A" not in pair:
        raise ValueError(f"{layer} has no lora_A (down): is the file whole?")
    if "B" not in pair:
        raise ValueError(f"{layer} has no lora_B (up): is the file whole?")
    a, b = pair["A"], pair["B"]
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"{layer} has matrices of {a.dtype} and {b.dtype}; a LoRA's are floating point.")
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise ValueError(f"{layer} has lora_A of {tuple(a.shape)} and lora_B of {tuple(b.shape)}: no common rank.")


def _baked(a: torch.Tensor, b: torch.Tensor, scale: float) -> Pair:
    if not math.isfinite(scale):
        raise ValueError(f"The scale (alpha / rank) is {scale}, but must be a finite number.")
    scaled = b.float() * scale
    is_exact = a.dtype == b.dtype and torch.equal(scaled.to(b.dtype).float(), scaled)
    # Both, not lora_B alone: a reader may multiply the two as they lie
    return (a, scaled.to(b.dtype)) if is_exact else (a.float(), scaled)


def _joined(pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    layers = {}
    for layer, (a, b) in pairs.items():
        layers[f"{_PREFIX}{layer}.lora_A.weight"] = a
        layers[f"{_PREFIX}{layer}.lora_B.weight"] = b
    return layers


def _pairs(layers: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
    pairs = {}
    for key in layers:
        layer = key.removeprefix(_PREFIX).rpartition(".lora_")[0]
        pairs[layer] = (layers[f"{_PREFIX}{layer}.lora_A.weight"], layers[f"{_PREFIX}{layer}.lora_B.weight"])
    return pairs


def read_lora(file: str | Path) -> Lora:
    """
    Reads a Wan LoRA of any style in use: ComfyUI's native one, diffusers', peft's, kohya's (musubi-tuner's).

    The scale of a layer is taken from its `.alpha` tensor, else from diffusers' metadata or peft's
    `adapter_config.json` beside the file, else it is 1.

    Raises:
        ValueError: if the file is not whole or not safetensors, of no known style, damaged, or of another kind (DoRA,
            LoKr, LoHa, a text encoder's). What is passed over is in `passed_over`: nothing is dropped silently.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a file. Name the LoRA's .safetensors file.")
    find_safetensors(file)  # refuses pickles
    with open_safetensors(file) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        metadata = opened.metadata() or {}
    try:
        stated = json.loads(metadata[_METADATA]) if _METADATA in metadata else None
    except ValueError as error:
        raise ValueError(f"{file}: its {_METADATA} is not JSON: {error}") from error
    return parse_lora(tensors, stated, str(file), file.parent / "adapter_config.json")


def parse_lora(
    tensors: Mapping[str, torch.Tensor], stated: Any = None, source: str = "The LoRA", beside: Path | None = None
) -> Lora:
    """
    A LoRA of tensors under the keys of any style; errors as in [`read_lora`].

    Args:
        stated (`Mapping`, *optional*): diffusers' metadata, with r, lora_alpha and what else scales it.
        source (`str`): what errors name.
        beside (`Path`, *optional*): where peft's `adapter_config.json` may be.
    """
    try:
        style, layers, passed_over = _gather(tensors)
        check_finite(tensors.items(), "It")
        config = _adapter_config(source, style, stated, beside)
        scales, baked, differences = {}, {}, {}
        for layer, parts in layers.items():
            if "A" in parts:
                scales[layer] = _scale(parts, config)
                baked[layer] = _baked(parts["A"], parts["B"], scales[layer])
            for kind in _DIFFERENCES:
                if kind in parts:
                    differences[f"{_PREFIX}{layer}.{kind}"] = parts[kind]
            if "bias" in parts:  # of lora_B, which its scale reaches too
                differences[f"{_PREFIX}{layer}.diff_b"] = parts["bias"].float() * scales.get(layer, 1.0)
    except (ValueError, re.error) as error:  # metadata holds patterns
        raise ValueError(f"{source}: {error}") from error
    is_plain = style == "diffusers" and all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    if stated is not None and not any(key.endswith("target_modules") for key in stated):
        is_plain = False  # peft asks for them
    return Lora(style, _joined(baked), scales, differences, passed_over, is_plain)


def _gather(tensors: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, dict[str, Any]], dict[str, int]]:
    """The style; by layer its A, B, alpha, differences and its name in the file; and what is passed over."""
    layers, styles, extra = defaultdict(dict), set(), []
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        found = parse_lora_name(match[1]) if match else None
        if match is None or found is None:
            extra.append(key)
            continue
        styles.add(found.style)
        parts = layers[found.layer]
        parts["name"] = found.name
        is_of_8_bits = tensor.is_floating_point() and tensor.element_size() == 1
        value = tensor.bfloat16() if is_of_8_bits else tensor  # which nothing computes in
        _put(parts, match[4] or match[5] or _SLOTS[match[2]], value, key)
    passed_over = _passed_over(extra)
    if not layers:
        raise ValueError(f"No known style of Wan LoRA. First keys: {', '.join(sorted(tensors)[:5]) or 'none'}.")
    if len(styles) > 1:
        raise ValueError(f"Keys of several styles: {', '.join(sorted(styles))}. Is this two LoRAs in one file?")
    for layer, parts in layers.items():
        if parts.keys() & {"A", "B", "alpha"} or not parts.keys() & {*_DIFFERENCES, "bias"}:
            _check_pair(layer, parts)
    return styles.pop(), dict(layers), passed_over


def _passed_over(keys: Iterable[str]) -> dict[str, int]:
    """How many of these keys, which are not a layer's, are of what; ValueError for keys of other kinds of files."""
    counts, unknown = Counter(), []
    for key in keys:
        for pattern, kind in _OTHER_KINDS.items():
            if re.search(pattern, key):
                raise ValueError(f"It is {kind} ({key}), which is not applied to Wan. Ask for a plain LoRA.")
        kinds = (kind for pattern, kind in _PASSED_OVER.items() if re.search(pattern, key))
        if kind := next(kinds, None):
            counts[kind] += 1
        else:
            unknown.append(re.sub(r"(blocks[._])[0-9]+", r"\1*", key))
    if unknown:
        named = ", ".join(f"{kind} ({count})" for kind, count in sorted(Counter(unknown).items())[:8])
        raise ValueError(
            f"{len(unknown)} tensors are not of layers of Wan's text-to-video transformer: {named}. Is this a LoRA of "
            "another model? Ask for one of Wan 2.1."
        )
    return dict(counts)


def passed_over(lora: Lora) -> str:
    """What of a LoRA is not applied, as a sentence; empty if all of it is."""
    counts = [f"{count} {kind}" for kind, count in lora.passed_over.items()]
    return f"Not applied: tensors {', '.join(counts)}." if counts else ""


def _adapter_config(source: str, style: str, stated: Any, beside: Path | None) -> dict[str, Any]:
    """What states a scale beside the tensors: r, lora_alpha, their patterns and use_rslora; empty if nothing does."""
    if style in ("native", "kohya"):
        if stated is not None:
            logger.warning("%s: its %s is ignored, as in ComfyUI; diffusers would scale by it.", source, _METADATA)
        return {}
    if stated is not None:
        config = stated
    elif style == "peft" and beside is not None and beside.is_file():
        config = read_json(beside)
    else:
        if style == "peft":
            logger.warning("%s: there is no adapter_config.json beside it; the scale is taken as 1.", source)
        return {}
    if not isinstance(config, Mapping):
        raise ValueError(f"Its metadata is {config!r:.40}, but must be an object.")
    config = {key.removeprefix("transformer."): value for key, value in dict(config).items()}
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise ValueError(f"The adapter's metadata states {key} as {config.get(key)!r}, but it must be a number.")
    return config


def _scale(pair: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    rank = pair["A"].shape[0]
    if "alpha" in pair and config:
        raise ValueError(f"{pair['name']} has an alpha tensor, and metadata states an alpha too. Remove one.")
    if "alpha" in pair:
        if pair["alpha"].numel() != 1:
            raise ValueError(f"{pair['name']}.alpha has shape {tuple(pair['alpha'].shape)}, but must be one number.")
        return pair["alpha"].item() / rank
    if not config:
        return 1.0
    stated = _by_pattern(config.get("rank_pattern"), pair["name"], config["r"])
    if stated != rank:
        raise ValueError(f"{pair['name']} has rank {rank}, but the metadata states {stated}.")
    alpha = _by_pattern(config.get("alpha_pattern"), pair["name"], config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first pattern that fits the end of the name, as in peft."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def write_lora(
    layers: Mapping[str, torch.Tensor],
    output: str | Path,
    style: str,
    differences: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """
    Writes a native LoRA ([`native_lora`], [`read_lora`]) in a style; each so that every reader's scale is 1.

    Args:
        layers (`Mapping[str, torch.Tensor]`): native keys, alpha baked in.
        output (`str` or `Path`): a .safetensors file that does not exist yet.
        style (`str`): `native` (ComfyUI and diffusers), `diffusers`, or `kohya` (musubi-tuner, ComfyUI).
        differences (`Mapping[str, torch.Tensor]`, *optional*): [`Lora.differences`]; native and kohya's style can hold
            them.
        metadata (`Mapping[str, str]`, *optional*): what the file says besides ([`refalign.lora_defaults`]).

    Raises:
        ValueError: if `output` exists or does not end in .safetensors, or the style is unknown or cannot hold it.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"`output` is {output}, but must end in .safetensors.")
    if style not in LORA_STYLES:
        raise ValueError(f"`style` is {style!r}, but must be one of {', '.join(LORA_STYLES)}.")
    differences = differences or {}
    if differences and style == "diffusers":
        raise ValueError("diffusers style cannot hold changes of whole weights and biases (diff). Write native style.")
    if foreign := [key for key in layers if not key.startswith(_PREFIX)] or not (layers or differences):
        raise ValueError(f"`layers` must be a native LoRA, as native_lora makes it, but has the keys {foreign}.")
    pairs = _pairs(layers)
    if not _diffusers_reads(pairs.keys(), style):
        logger.warning("diffusers cannot load this selection of layers in %s style; in diffusers style it can.", style)
    down, up = ("lora_down", "lora_up") if style == "kohya" else ("lora_A", "lora_B")
    tensors = {}
    for layer, (a, b) in pairs.items():
        name = lora_name(layer, style)
        tensors[f"{name}.{down}.weight"] = a.contiguous()
        tensors[f"{name}.{up}.weight"] = b.contiguous()
        if style == "kohya":
            tensors[f"{name}.alpha"] = torch.tensor(float(a.shape[0]))
    for key, tensor in differences.items():
        layer, _, kind = key.removeprefix(_PREFIX).rpartition(".")
        tensors[f"{lora_name(layer, style)}.{kind}"] = tensor.contiguous()
    with new_file(output) as partial:
        save_file(tensors, partial, metadata={"format": "pt", **(metadata or {})})
    return output


def _diffusers_reads(layers: Iterable[str], style: str) -> bool:
    """diffusers 0.42 looks for native keys by block, and for kohya's in whole blocks only, counted from 0."""
    blocks = defaultdict(set)
    for layer in layers:
        number, name = split_layer(layer)
        blocks[number].add(name)
    top = blocks.pop(None, set())
    if style == "native":
        return bool(blocks) and "patch_embedding" not in top
    if style == "diffusers":
        return True
    are_whole = all(names == set(LORA_BLOCK_LAYERS) for names in blocks.values())
    return are_whole and not top and sorted(blocks) == list(range(len(blocks))) != []


def lora_widths(lora: Lora) -> set[int]:
    """The widths of the transformers that its layers fit: one, unless it is damaged."""
    return {_width(layer, a, b) for layer, (a, b) in lora.pairs.items()}


def _width(layer: str, a: torch.Tensor, b: torch.Tensor) -> int:
    """The transformer's width, from the side of the layer that has it."""
    return a.shape[1] if _READS_WIDTH.search(layer) else b.shape[0]
