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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from refalign.files import find_safetensors, new_file, open_safetensors, read_json
from refalign.keys import (
    LORA_BLOCK_LAYERS,
    LORA_STYLES,
    LORA_TOP_LAYERS,
    lora_name,
    native_key,
    parse_lora_name,
    split_layer,
)


logger = logging.getLogger(__name__)

WIDTHS = {1536: "Wan 2.1 1.3B", 5120: "Wan 2.1 14B"}

_READS_WIDTH = re.compile(r"self_attn|cross_attn|ffn\.0|time_projection|head")  # the other layers write it
_PART = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.([^.]+))?\.weight|(alpha))")
_SLOTS = {"A": "A", "down": "A", "B": "B", "up": "B"}
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
    """

    style: str
    layers: dict[str, torch.Tensor]
    scales: dict[str, float]

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
        if match is None or match[4]:
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
        ValueError: if the file is not whole or not safetensors, of no known style, or holds more than pairs of
            LoRA matrices of Wan's text-to-video transformer: nothing is dropped silently.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a file. Name the LoRA's .safetensors file.")
    find_safetensors(file)  # refuses pickles
    with open_safetensors(file) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        metadata = opened.metadata() or {}
    try:
        style, pairs = _gather(tensors)
        config = _adapter_config(file, style, metadata)
        scales, baked = {}, {}
        for layer, pair in pairs.items():
            scales[layer] = _scale(pair, config)
            baked[layer] = _baked(pair["A"], pair["B"], scales[layer])
    except (ValueError, re.error) as error:  # metadata holds patterns
        raise ValueError(f"{file}: {error}") from error
    return Lora(style, _joined(baked), scales)


def _gather(tensors: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The style, and by layer its A, B, alpha if any, and its name in the file."""
    pairs, styles, extra = defaultdict(dict), set(), []
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        found = parse_lora_name(match[1]) if match else None
        if match is None or found is None:
            extra.append(key)
            continue
        styles.add(found.style)
        pair = pairs[found.layer]
        pair["name"] = found.name
        _put(pair, "alpha" if match[4] else _SLOTS[match[2]], tensor, key)
    if not pairs:
        raise ValueError(f"No known style of Wan LoRA. First keys: {', '.join(sorted(extra)[:5]) or 'none'}.")
    if extra:
        raise ValueError(_not_convertible(extra))
    if len(styles) > 1:
        raise ValueError(f"Keys of several styles: {', '.join(sorted(styles))}. Is this two LoRAs in one file?")
    for layer, pair in pairs.items():
        _check_pair(layer, pair)
    return styles.pop(), dict(pairs)


def _not_convertible(keys: Iterable[str]) -> str:
    kinds = Counter(re.sub(r"(blocks[._])[0-9]+", r"\1*", key) for key in keys)
    named = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items())[:8])
    return (
        f"{sum(kinds.values())} tensors are not LoRA matrices of Wan's text-to-video transformer and cannot be "
        f"converted: {named}{', ...' if len(kinds) > 8 else ''}. Differences of whole weights (diff, diff_b), biases, "
        "norms, DoRA, LyCORIS and image-to-video layers (k_img, v_img) are such; ask for a plain text-to-video LoRA."
    )


def _adapter_config(file: Path, style: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What states a scale beside the tensors: r, lora_alpha, their patterns and use_rslora; empty if nothing does."""
    if style in ("native", "kohya"):
        if _METADATA in metadata:
            logger.warning("%s: its %s is ignored, as in ComfyUI; diffusers would scale by it.", file, _METADATA)
        return {}
    beside = file.parent / "adapter_config.json"
    if _METADATA in metadata:
        config = json.loads(metadata[_METADATA])
    elif style == "peft" and beside.is_file():
        config = read_json(beside)
    else:
        if style == "peft":
            logger.warning("%s: there is no adapter_config.json beside it; the scale is taken as 1.", file)
        return {}
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


def write_lora(layers: Mapping[str, torch.Tensor], output: str | Path, style: str) -> Path:
    """
    Writes a native LoRA ([`native_lora`], [`read_lora`]) in a style; each so that every reader's scale is 1.

    Args:
        layers (`Mapping[str, torch.Tensor]`): native keys, alpha baked in.
        output (`str` or `Path`): a .safetensors file that does not exist yet.
        style (`str`): `native` (ComfyUI and diffusers), `diffusers`, or `kohya` (musubi-tuner, ComfyUI).

    Raises:
        ValueError: if `output` exists or does not end in .safetensors, or the style is unknown.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"`output` is {output}, but must end in .safetensors.")
    if style not in LORA_STYLES:
        raise ValueError(f"`style` is {style!r}, but must be one of {', '.join(LORA_STYLES)}.")
    if foreign := [key for key in layers if not key.startswith(_PREFIX)] or not layers:
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
    with new_file(output) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
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


def describe(file: str | Path) -> str:
    """What a LoRA file holds, in some lines: style, size, rank, scale, base, and how strong each kind of layer is."""
    lora = read_lora(file)
    with open_safetensors(Path(file)) as opened:
        dtypes = Counter(opened.get_slice(key).get_dtype() for key in opened.keys())
    ranks, widths = set(), set()
    for layer, (a, b) in lora.pairs.items():
        ranks.add(a.shape[0])
        widths.add(_width(layer, a, b))
    base = WIDTHS.get(min(widths), "unknown base") if len(widths) == 1 else "unknown base"
    stored = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    lines = [
        f"{file}: {lora.style} style, {Path(file).stat().st_size / 1e6:.1f} MB, tensors: {stored}",
        f"rank: {_listed(ranks)}, scale (alpha / rank): {_listed(set(lora.scales.values()))}",
        f"fits: {base} (width {_listed(widths)})",
        f"{'layer':<20}{'blocks':<16}{'change: mean norm':>18}{'largest':>12}",
        *_kinds(lora),
    ]
    return "\n".join(lines)


def _listed(numbers: Iterable[float]) -> str:
    shown = [f"{number:g}" for number in sorted(numbers)]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")


def _width(layer: str, a: torch.Tensor, b: torch.Tensor) -> int:
    """The transformer's width, from the side of the layer that has it."""
    return a.shape[1] if _READS_WIDTH.search(layer) else b.shape[0]


def _kinds(lora: Lora) -> list[str]:
    """A line for each kind of layer: its blocks, and how strongly the LoRA changes it."""
    norms, blocks = defaultdict(list), defaultdict(list)
    for layer, (a, b) in lora.pairs.items():
        number, kind = split_layer(layer)
        norms[kind].append(_norm(a, b))
        if number is not None:
            blocks[kind].append(number)
    lines = []
    for kind in (*LORA_BLOCK_LAYERS, *LORA_TOP_LAYERS):
        if values := norms[kind]:
            mean = sum(values) / len(values)
            lines.append(f"{kind:<20}{_range(blocks[kind]):<16}{mean:>18.4g}{max(values):>12.4g}")
    return lines


def _range(blocks: Sequence[int]) -> str:
    return f"{len(blocks)} ({min(blocks)}-{max(blocks)})" if blocks else "-"


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frobenius norm of B @ A, from two rank x rank products: the whole matrix is never made."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()
