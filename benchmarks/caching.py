"""How fast `refalign-train cache` fills a cache on this machine's CPU, with one and with two processes.

    python -m benchmarks.caching                                # some minutes
    python -m benchmarks.caching --samples 8 --repeats 1        # does it run

The models are of real classes but small, and the clips are noise: the numbers say what a second process brings and
what a second run costs, not how long a real cache takes. Processes decode in themselves (`--workers 0`) and are
single-threaded; a time is that of whole processes, from the start of the first to the end of the last, less what one
takes that finds everything done. The settings take turns.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from benchmarks.machine import machine_line, markdown_table


PROCESSES = (1, 2)
RUN = "import sys, tyro; from refalign_training.cache import *; sys.exit(run(tyro.cli(CacheCommand)))"


@dataclass(frozen=True)
class Options:
    """Measures how fast a cache is filled."""

    samples: int = 64
    """Clips of the dataset, each with a caption and a reference."""
    height: int = 96
    """The height of the clips in pixels, a multiple of 16."""
    width: int = 160
    """The width of the clips in pixels, a multiple of 16."""
    num_frames: int = 17
    """The number of frames of the clips."""
    repeats: int = 3
    """How many caches are made per setting."""


def write_dataset(folder: Path, options: Options) -> None:
    """Clips of noise in the format `folder`."""
    from refalign.video import write_video

    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(options.samples):
        shape = (options.num_frames, options.height, options.width, 3)
        write_video(list(generator.integers(0, 256, shape, dtype=np.uint8)), folder / f"{number:04d}.mp4")
        (folder / f"{number:04d}.txt").write_text(f"clip {number}", "utf-8")
        Image.fromarray(generator.integers(0, 256, shape[1:], dtype=np.uint8)).save(folder / f"{number:04d}.ref1.png")


def write_model(folder: Path) -> None:
    """A Wan pipeline with a VAE of a sixth of the real one's width and a text encoder of random weights."""
    import torch
    from diffusers import AutoencoderKLWan

    from tests.tiny_pipeline import tiny_wan_pipeline

    pipeline = tiny_wan_pipeline()
    torch.manual_seed(0)
    pipeline.register_modules(vae=AutoencoderKLWan(base_dim=16, z_dim=16))
    pipeline.save_pretrained(folder)


def fill(folder: Path, output: Path, processes: int, options: Options) -> float:
    """The seconds that so many processes take to fill a cache; CalledProcessError if one fails."""
    words = {
        "--data": "folder",
        "--videos": folder / "clips",
        "--model": folder / "model",
        "--output": output,
        "--height": options.height,
        "--width": options.width,
        "--num-frames": options.num_frames,
        "--workers": 0,
        "--device": "cpu",
    }
    arguments = [str(word) for pair in words.items() for word in pair]
    command = [sys.executable, "-c", RUN, *arguments, "--families", "video", "references", "text"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    start = time.perf_counter()
    running = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for rank in range(processes)
    ]
    for process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start


def measure(folder: Path, options: Options) -> tuple[dict[int, list[float]], list[float]]:
    """The seconds of each number of processes, and of a second run that finds all done, in turns."""
    write_dataset(folder / "clips", options)
    write_model(folder / "model")
    times: dict[int, list[float]] = {processes: [] for processes in PROCESSES}
    again = []
    for number in range(options.repeats):
        for processes in PROCESSES:
            times[processes].append(fill(folder, folder / f"cache{number}-{processes}", processes, options))
        again.append(fill(folder, folder / f"cache{number}-1", 1, options))
    return times, again


def report(times: dict[int, list[float]], again: list[float], samples: int) -> str:
    """The table: samples a second without the start of Python, and as a ratio to one process."""
    floor = statistics.median(again)
    speeds = {processes: [samples / (s - floor) for s in seconds] for processes, seconds in times.items()}
    one = statistics.median(speeds[PROCESSES[0]])
    rows = [
        (f"{n}", f"{statistics.median(s):.2f}", f"{min(s):.2f}-{max(s):.2f}", f"{statistics.median(s) / one:.2f}")
        for n, s in speeds.items()
    ]
    table = markdown_table(("processes", "samples/s, median", "range", "to one process"), rows)
    second = f"{floor:.2f} s ({min(again):.2f}-{max(again):.2f}), Python's start included"
    return f"{table}\n\nA second run, which finds all done: {second}."


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        times, again = measure(Path(folder), options)
    size = f"{options.samples} clips of {options.num_frames}x{options.height}x{options.width}, one reference each"
    print(f"{machine_line()} {size}; {options.repeats} caches each.\n\n{report(times, again, options.samples)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
