"""The reference alignment loss against its plain formula: seconds and peak memory, forward and backward.

    python -m benchmarks.alignment                                               # on a CPU: a minute
    python -m benchmarks.alignment --tokens 100 --dim 64 --repeats 2             # does it run
    python -m benchmarks.alignment --device cuda --repeats 50

Both sides get the same projected tokens and teacher features, and give the gradient of the former. The plain formula
is `plain_loss` below: it computes all pairs of tokens at once, masks those of one subject, and autograd keeps what it
needs of them. Both are checked to give the same loss and gradient.

Seconds: all in one process; the sides take turns, after one uncounted turn each. The ratio is the median over turns of
ours divided by theirs.
Memory: a fresh process for each side; the peak above what is held before, which are the tokens and the features. The
gradient counts. On CUDA it is what PyTorch allocates. On a CPU it is resident memory (VmHWM), after a call so small
that it only loads code, with an allocator that gives freed blocks back at once: the peak is that of live tensors.
With more layers, all their losses are added up before one backward pass, as in training.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from tqdm.auto import tqdm

from benchmarks.machine import in_fresh_process, machine_line, markdown_table, process_memory, reset_peak_memory
from refalign_training.method.losses import reference_alignment_loss


Side = Literal["plain", "refalign"]
SIDES: tuple[Side, Side] = ("plain", "refalign")
M_MMAP_THRESHOLD = -3  # glibc's malloc.h: larger blocks are given back to the system when they are freed


@dataclass(frozen=True)
class Options:
    """Compares the reference alignment loss with its plain formula."""

    references: tuple[int, ...] = (1, 2, 3)
    """Numbers of references, one per row."""
    tokens: int = 1560
    """How many tokens a reference has; 1560 at 480x832."""
    dim: int = 1024
    """Width of the teacher; 1024 is DINOv3 ViT-L."""
    layers: int = 1
    """Layers whose losses are added up before one backward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of tokens and features; both sides compute in float32."""
    device: str = "cpu"
    """cpu or cuda."""
    repeats: int = 10
    """Turns of each side."""


def plain_loss(student: torch.Tensor, teacher: torch.Tensor, tokens_per_reference: int) -> torch.Tensor:
    """The formula as it is written (RefAlign, arXiv 2603.25743), with its margins 0 and 1: all pairs at once."""
    student = torch.nn.functional.normalize(student.float(), dim=-1)
    teacher = torch.nn.functional.normalize(teacher.float(), dim=-1)
    subjects = torch.arange(student.shape[1], device=student.device) // tokens_per_reference
    is_negative = (subjects[:, None] != subjects).float()
    distances = 1 - student @ teacher.mT
    positive = distances.diagonal(dim1=1, dim2=2).relu().mean(1)
    negative = ((1 - distances).relu() * is_negative).sum((1, 2)) / is_negative.sum().clamp(min=1)
    return positive + negative


def refalign_loss(student: torch.Tensor, teacher: torch.Tensor, tokens_per_reference: int) -> torch.Tensor:
    return reference_alignment_loss(student, teacher, tokens_per_reference).total


LOSSES: dict[Side, Callable] = {"plain": plain_loss, "refalign": refalign_loss}


def make_tokens(options: Options, references: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random projected tokens of each layer, that take a gradient, and teacher features."""
    torch.manual_seed(0)
    shape, dtype = (1, references * options.tokens, options.dim), getattr(torch, options.dtype)
    *students, teacher = torch.randn(options.layers + 1, *shape, device=options.device, dtype=dtype).unbind()
    return [student.requires_grad_() for student in students], teacher


def loss_and_gradients(side: Side, students: list[torch.Tensor], teacher: torch.Tensor, tokens: int) -> tuple:
    """The loss, and its gradient for each layer."""
    loss = sum(LOSSES[side](student, teacher, tokens) for student in students)
    return loss.detach(), torch.autograd.grad(loss.sum(), students)


def check_equality(options: Options, references: int) -> None:
    """Raises AssertionError if the sides do not give the same."""
    arguments = (*make_tokens(options, references), options.tokens)
    plain, refalign = (loss_and_gradients(side, *arguments) for side in SIDES)
    torch.testing.assert_close(refalign, plain)


def turn_seconds(side: Side, options: Options, students: list[torch.Tensor], teacher: torch.Tensor) -> float:
    """The seconds of one forward and backward pass."""
    start = time.perf_counter()
    loss_and_gradients(side, students, teacher, options.tokens)
    if options.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_seconds(options: Options, references: int) -> dict[Side, list[float]]:
    """The seconds of each turn; the side that begins alternates. The first turn, which warms up, is left out."""
    tokens, seconds = make_tokens(options, references), {side: [] for side in SIDES}
    for turn in tqdm(range(options.repeats + 1), desc=f"{references} references"):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            seconds[side].append(turn_seconds(side, options, *tokens))
    return {side: values[1:] for side, values in seconds.items()}


def peak_memory(side: Side, options: Options, references: int) -> int:
    """The bytes that a turn takes at its peak above what is held before it. To be run in a fresh process."""
    if options.device == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    students, teacher = make_tokens(options, references)
    small = [torch.randn(1, 4, 8, device=options.device, requires_grad=True)]
    loss_and_gradients(side, small, torch.randn(1, 4, 8, device=options.device), 2)
    if options.device == "cpu":
        reset_peak_memory()
        before = process_memory()["VmRSS"]
        loss_and_gradients(side, students, teacher, options.tokens)
        return process_memory()["VmHWM"] - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_and_gradients(side, students, teacher, options.tokens)
    return torch.cuda.max_memory_allocated() - before


def measure(options: Options, references: int) -> list[str]:
    """A row of the table."""
    check_equality(options, references)
    peak = {side: in_fresh_process(peak_memory, side, options, references) for side in SIDES}
    seconds = measure_seconds(options, references)
    ratios = [ours / theirs for theirs, ours in zip(seconds["plain"], seconds["refalign"], strict=True)]
    row = [str(references), *(f"{statistics.median(seconds[side]):.4f}" for side in SIDES)]
    row += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"]
    return [*row, *(f"{peak[side] / 1e6:,.1f}" for side in SIDES), f"{peak['refalign'] / peak['plain']:.3f}"]


def main(options: Options) -> None:
    header = ["References", "plain, s", "refalign, s", "ratio", "its range"]
    header += ["plain, peak MB", "refalign, peak MB", "ratio"]
    rows = [measure(options, references) for references in options.references]
    what = f"{options.tokens} tokens a reference, dim {options.dim}, {options.layers} layers, {options.dtype}"
    print(f"{machine_line(options.device)} {what}; {options.repeats} turns.\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
