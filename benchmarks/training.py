"""`refalign-train run`: samples a second, memory and checkpoints, each side by side with what it is judged by.

    python -m benchmarks.training                                       # on a CPU: a quarter of an hour
    python -m benchmarks.training --size tiny --steps 3 --repeats 1     # does it run: a minute
    python -m benchmarks.training --device cuda --size 1.3b --precision bfloat16 --workers 4 --steps 20

The last needs a GPU of 80 GB and as much disk. Workers read ahead while the first step, which is not counted, runs:
take more steps with them.

A pipeline, a teacher and clips are made of noise, real classes with random weights, and cached by `refalign-train
cache`. All weights are trained, with the paper's alignment and gradient checkpointing, by the trainer itself: all it
does within a step is counted, reading the cache in its own process (unless there are `--workers`) and a line of log.
A gap between the ends of two steps is a step; the first one, which warms up, is left out. Sides take turns, and the
one that begins alternates; a turn sets everything up anew. Ratios are medians over turns of ours to theirs.

Loop: against a loop of nothing but forward, losses, backward and optimiser, on the same batches, prepared beforehand.
No clipping, no metrics, no check for what is not finite. On a CPU both are checked to end with the same weights.
Encoders: a cache against `data.source`, where decoding and all encoders run along.
Processes: one and two, at the same samples a step; on a CPU each of one thread.
Memory: a process for each side. Weights and optimiser are counted; to them comes the peak of a step above what is held
before it: on CUDA what PyTorch allocates, on a CPU resident memory (VmHWM) with an allocator that gives freed blocks
back at once. The clips are larger than for the other tables, so that activations weigh something.
Checkpoints: weights and both moments of Adam. Saved and loaded by the trainer, against the same bytes in one plain
file, also synced to the disk. What is read was just written, so it comes from memory.
"""

import ctypes
import dataclasses
import gc
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from diffusers import WanTransformer3DModel
from tqdm.auto import tqdm

from benchmarks.machine import in_fresh_process, machine_line, markdown_table, process_memory, reset_peak_memory
from benchmarks.training_inputs import REFERENCES, SIZES, write_cache, write_models
from refalign.pipeline_refalign_wan import FRAMES_PER_LATENT, TOKEN_PIXELS
from refalign_training.data.recipe import Recipe
from refalign_training.data.source import Dataset
from refalign_training.run.config import RunCommand
from refalign_training.run.trainer import Trainer


M_MMAP_THRESHOLD = -3  # glibc's malloc.h: larger blocks are given back to the system when they are freed
CLIPS = 8
Part = Literal["loop", "encoders", "batches", "processes", "memory", "checkpoints"]
SPEEDS: tuple[Part, ...] = ("loop", "encoders", "batches", "processes")


@dataclass(frozen=True)
class Options:
    """Measures the training loop, its memory and its checkpoints."""

    size: Literal["tiny", "mid", "1.3b"] = "mid"
    """tiny to try; mid for a CPU; 1.3b is the released model at 480x832 and 81 frames, for a GPU."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What is computed in."""
    workers: int = 0
    """Processes that read and decode."""
    batch_size: int = 4
    """Samples per step."""
    steps: int = 5
    """Steps of a turn; the first is not counted."""
    repeats: int = 3
    """Turns of each side."""
    parts: tuple[Part, ...] = (*SPEEDS, "memory", "checkpoints")
    """What to measure."""
    folder: Path | None = None
    """Where a temporary folder is made; by default where the system has its own."""


# -- A turn -----------------------------------------------------------------------------------------------------------


def make_command(folder: Path, options: Options, **changes: Any) -> RunCommand:
    """A run on the cache `clips-cache`. Changes are by dotted names, such as `batch.micro`."""
    values = {
        "training": "full",
        "steps": options.steps,
        "device": options.device,
        "model.base": str(folder / "model"),
        "model.precision": options.precision,
        "data.cache": folder / "clips-cache",
        "data.workers": options.workers,
        "batch.size": options.batch_size,
        "alignment.layers": tuple(range(SIZES[options.size].aligned_blocks)),
        "optimizer.max_grad_norm": 1e9,  # gradients are clipped, but stay what they are: for `check_equality`
        "log.gradients_every": 0,
        "validation.every": 0,
    }
    command = RunCommand(folder / "run")
    for name, value in (values | changes).items():
        section, _, key = name.rpartition(".")
        if section:
            key, value = section, dataclasses.replace(getattr(command, section), **{key: value})
        command = dataclasses.replace(command, **{key: value})
    return command


def online(folder: Path, options: Options) -> RunCommand:
    """The run on what the cache was made of."""
    frames, height, width = SIZES[options.size].clips
    source = {
        "data.cache": None,
        "data.source": Dataset("folder", videos=folder / "clips"),
        "data.recipe": Recipe(height, width, frames),
        "data.teacher": str(folder / "teacher"),
    }
    return make_command(folder, options, **source)


class WatchedTrainer(Trainer):
    """The trainer, which notes when steps end and what they take of memory, and saves no checkpoint."""

    def __init__(self, command: RunCommand) -> None:
        super().__init__(command)
        self.ends: list[float] = []

    def _log(self, *arguments: Any) -> None:
        super()._log(*arguments)
        self.note_end()

    def _save(self) -> None:
        """Measured apart."""

    def train_bare(self) -> None:
        """The same steps on batches that are there before, and nothing else."""
        optimizer, device, step = self.state.optimizer, self.parallel.device, 0
        batches = [batch.to(device) for batch in self.batches]
        for number, batch in enumerate(batches, 1):
            (self.objective(batch, step).total.mean() / self.accumulation).backward()
            if number % self.accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                self.note_end()
        self.log.finish()

    def note_end(self) -> None:
        is_cuda = self.parallel.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize()
        if not self.ends and is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif not self.ends:
            reset_peak_memory()
            self._before = process_memory()["VmRSS"]
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """The seconds of a step, without the first."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    def peak(self) -> int:
        """The bytes that steps but the first took above what was held before them."""
        is_cuda = self.parallel.device.type == "cuda"
        highest = torch.cuda.max_memory_allocated() if is_cuda else process_memory()["VmHWM"]
        return highest - self._before

    def held(self) -> int:
        """The bytes of weights and optimiser."""
        modules = (self.transformer, self.objective.alignment)
        weights = [parameter for module in modules if module is not None for parameter in module.parameters()]
        moments = [t for state in self.state.optimizer.state.values() for t in state.values()]
        return sum(tensor.nbytes for tensor in (*weights, *moments))


def train(command: RunCommand, is_bare: bool = False) -> WatchedTrainer:
    """A trainer that has done its steps, in a folder that is gone again."""
    with tempfile.TemporaryDirectory(dir=command.output.parent) as folder:
        trainer = WatchedTrainer(dataclasses.replace(command, output=Path(folder) / "run"))
        trainer.train_bare() if is_bare else trainer.train()
    return trainer


def step_seconds(command: RunCommand, is_bare: bool = False) -> float:
    free_memory()
    return train(command, is_bare).seconds()


def free_memory() -> None:
    """Frees what turns before this one left, on the GPU too."""
    gc.collect()
    torch.cuda.empty_cache()


def check_equality(command: RunCommand) -> None:
    """Raises AssertionError if the trainer and the bare loop do not end with the same weights."""
    ours, bare = (train(dataclasses.replace(command, steps=2), is_bare) for is_bare in (False, True))
    torch.testing.assert_close(dict(ours.state.parameters), dict(bare.state.parameters), rtol=0, atol=0)


def rank_seconds(rank: int, processes: int, port: int, command: RunCommand) -> float:
    """One of the processes that train together. To be run in a fresh process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    if processes > 1:
        os.environ |= {n: str(v) for n, v in names.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if command.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # accelerate reads it
        torch.set_num_threads(1)
    trainer = train(command)
    if processes > 1:
        torch.distributed.destroy_process_group()
    return trainer.seconds()


def parallel_seconds(processes: int, command: RunCommand) -> float:
    """The seconds of a step that so many processes do together."""
    free_memory()
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    if command.device != "cpu":
        command = dataclasses.replace(command, device="auto")  # each its own
    with ProcessPoolExecutor(processes, get_context("spawn")) as executor:
        running = [executor.submit(rank_seconds, rank, processes, port, command) for rank in range(processes)]
        return max(future.result() for future in running)


# -- Tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A row of the table of speeds: each side's seconds a step."""

    ours: str
    theirs: str
    our_turn: Callable[[], float]
    their_turn: Callable[[], float]


def comparisons(folder: Path, options: Options) -> Iterator[Comparison]:
    """The rows that were asked for."""
    command = make_command(folder, options)
    if "loop" in options.parts:
        if options.device == "cpu":
            check_equality(command)
        yield Comparison(
            "the trainer", "a bare loop", lambda: step_seconds(command), lambda: step_seconds(command, True)
        )
    if "encoders" in options.parts:
        along = online(folder, options)
        yield Comparison("cache", "online encoders", lambda: step_seconds(command), lambda: step_seconds(along))
    if "batches" in options.parts:
        size = options.batch_size
        whole = make_command(folder, options, **{"batch.micro": size})
        names = (f"batches of {size}", f"{size} batches of 1")
        yield Comparison(*names, lambda: step_seconds(whole), lambda: step_seconds(command))
    if "processes" in options.parts and (options.device == "cpu" or torch.cuda.device_count() > 1):
        for mode in ("ddp", "fsdp2"):
            shared = make_command(folder, options, parallel=mode)
            turns = [lambda n=n, shared=shared: parallel_seconds(n, shared) for n in (2, 1)]
            yield Comparison(f"2 processes, {mode}", "1 process", *turns)


def speed_row(comparison: Comparison, options: Options) -> list[str]:
    """Measures and writes a row: samples a second of both sides, ours to theirs."""
    seconds: list[tuple[float, float]] = []
    for turn in tqdm(range(options.repeats), desc=comparison.ours):
        if turn % 2 == 0:
            ours, theirs = comparison.our_turn(), comparison.their_turn()
        else:
            theirs, ours = comparison.their_turn(), comparison.our_turn()
        seconds.append((ours, theirs))
    speeds = [f"{options.batch_size / statistics.median(side):.3g}" for side in zip(*seconds, strict=True)]
    ratios = [theirs / ours for ours, theirs in seconds]
    median, extremes = f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}"
    return [comparison.ours, comparison.theirs, *speeds, median, extremes]


def memory_of(command: RunCommand) -> tuple[int, int]:
    """Bytes of weights and optimiser, and what a step takes above them. To be run in a fresh process."""
    if command.device == "cpu":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    trainer = train(command)
    return trainer.held(), trainer.peak()


def memory_table(folder: Path, options: Options) -> str:
    size = SIZES[options.size]
    write_cache(folder, "large", 2, size.memory_clips, options.device)
    changes = {"data.cache": folder / "large-cache", "batch.size": 1, "steps": 3}
    changes |= {"objective.no_references": 0.0, "objective.neither": 0.0}  # dropped ones would not be aligned
    free_memory()
    sides = []
    for weight in (1.0, 0.0):
        command = make_command(folder, options, **changes, **{"alignment.weight": weight})
        held, step = in_fresh_process(memory_of, command)
        sides.append((held, step, held + step))
    rows = [[name, *(f"{b / 1e6:,.0f}" for b in side)] for name, side in zip(("with", "without"), sides, strict=True)]
    rows.append(["ratio", *(f"{ours / theirs:.3f}" for ours, theirs in zip(*sides, strict=True))])
    return markdown_table(["Alignment", "weights and optimiser, MB", "a step above, MB", "together, MB"], rows)


def write_plain(file: Path, arrays: list[np.ndarray]) -> None:
    file.unlink(missing_ok=True)
    with file.open("wb") as opened:
        for array in arrays:
            opened.write(array)
        opened.flush()
        os.fsync(opened.fileno())


def read_plain(file: Path, arrays: list[np.ndarray]) -> None:
    with file.open("rb") as opened:
        for array in arrays:
            opened.readinto(array)


def checkpoint_table(folder: Path, options: Options) -> str:
    """Seconds a GB; the ways take turns. And what a save takes of the main memory beside what is saved."""
    free_memory()
    changes = {"model.base": str(folder / ("larger" if SIZES[options.size].checkpoint else "model"))}
    trainer = Trainer(make_command(folder, options, **changes))
    trainer.state._make_optimizer_state()
    arrays = [tensor.detach().cpu().flatten().numpy() for tensor in trainer.state.tensors().values()]
    arrays = [array.copy().view(np.uint8) for array in arrays]
    gigabytes, plain = sum(array.nbytes for array in arrays) / 1e9, folder / "plain"
    checkpoints = trainer.command.output / "checkpoints"

    def save() -> None:
        trainer.step += 1  # another one, as in a run
        trainer._save()

    def load() -> None:
        trainer.state.load(checkpoints / f"step-{trainer.step:08d}", False)

    ways = {
        "plain write": lambda: write_plain(plain, arrays),
        "save": save,
        "plain read": lambda: read_plain(plain, arrays),
        "load": load,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = []
    for _ in tqdm(range(options.repeats), desc="checkpoints"):
        for way, do in ways.items():
            reset_peak_memory()
            before, start = process_memory()["VmRSS"], time.perf_counter()
            do()
            seconds[way].append((time.perf_counter() - start) / gigabytes)
            if way == "save":
                peaks.append(process_memory()["VmHWM"] - before)
    rows = []
    for way, values in seconds.items():
        plain_values = seconds[{"save": "plain write", "load": "plain read"}.get(way, way)]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, plain_values, strict=True))
        rows.append([way, f"{statistics.median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}", f"{ratio:.2f}"])
    table = markdown_table([f"Checkpoint of {gigabytes:.2f} GB", "s a GB", "range", "to plain"], rows)
    return f"{table}\n\nMemory that a save takes: {max(peaks) / 1e9:.2f} GB."


def what_ran(options: Options) -> str:
    size = SIZES[options.size]
    (frames, height, width), (of_memory, rows, columns) = size.clips, size.memory_clips
    with torch.device("meta"):
        parameters = sum(p.numel() for p in WanTransformer3DModel(**size.transformer).parameters())
    return (
        f"Size {options.size}: {parameters / 1e6:,.3g} M parameters; {frames}x{height}x{width}, {REFERENCES} "
        f"references, {tokens(size.clips):,} tokens (memory: {of_memory}x{rows}x{columns}, "
        f"{tokens(size.memory_clips):,}); {options.batch_size} samples a step, {options.precision}, "
        f"{options.workers} workers; {options.repeats} turns of {options.steps} steps each."
    )


def tokens(clip: tuple[int, int, int]) -> int:
    frames, height, width = clip
    latents = (frames - 1) // FRAMES_PER_LATENT + 1
    return (latents + REFERENCES) * (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)


def main(options: Options) -> None:
    """Raises ValueError where there would be no step to count."""
    if options.steps < 2 or options.repeats < 1:
        raise ValueError(f"`steps` is {options.steps} and `repeats` {options.repeats}; pass 2 and 1, or more.")
    print(f"{machine_line(options.device)} {what_ran(options)}\n", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_models(folder, SIZES[options.size])
        write_cache(folder, "clips", CLIPS, SIZES[options.size].clips, options.device)
        rows = [speed_row(comparison, options) for comparison in comparisons(folder, options)]
        if rows:
            header = ["Ours", "against", "ours, samples/s", "theirs, samples/s", "ratio", "its range"]
            print(f"{markdown_table(header, rows)}\n", flush=True)
        if "memory" in options.parts:
            print(f"{memory_table(folder, options)}\n", flush=True)
        if "checkpoints" in options.parts:
            print(checkpoint_table(folder, options), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
