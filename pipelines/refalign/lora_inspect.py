"""What a LoRA file holds, in some lines: `refalign lora inspect`."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from refalign.files import open_safetensors
from refalign.keys import LORA_BLOCK_LAYERS, LORA_TOP_LAYERS, split_layer
from refalign.lora import WIDTHS, Lora, lora_widths, passed_over, read_lora
from refalign.lora_defaults import read_file_defaults, told


def describe(file: str | Path) -> str:
    """What a LoRA file holds, in some lines: style, size, rank, scale, base, and how strong each kind of layer is."""
    lora = read_lora(file)
    with open_safetensors(Path(file)) as opened:
        dtypes = Counter(opened.get_slice(key).get_dtype() for key in opened.keys())
    ranks, widths = {a.shape[0] for a, _ in lora.pairs.values()}, lora_widths(lora)
    base = WIDTHS.get(min(widths), "unknown base") if len(widths) == 1 else "unknown base"
    stored = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    lines = [
        f"{file}: {lora.style} style, {Path(file).stat().st_size / 1e6:.1f} MB, tensors: {stored}",
        f"rank: {_listed(ranks)}, scale (alpha / rank): {_listed(set(lora.scales.values()))}",
        f"fits: {base} (width {_listed(widths)})",
        f"{'layer':<20}{'blocks':<16}{'change: mean norm':>18}{'largest':>12}",
        *_kinds(lora),
    ]
    if wanted := read_file_defaults(Path(file)):
        lines.append(f"distilled for {told(wanted)}")
    if lora.differences:
        lines.append(f"changes of whole weights and biases (diff, diff_b): {len(lora.differences)}")
    if lora.passed_over:
        lines.append(passed_over(lora))
    return "\n".join(lines)


def _listed(numbers: Iterable[float]) -> str:
    shown = [f"{number:g}" for number in sorted(numbers)]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")


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
