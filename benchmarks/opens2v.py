"""How fast an OpenS2V-5M annotation file is read, and the memory it takes, in a fresh process.

    python -m benchmarks.opens2v --folder /tmp              # 1 GB, removed afterwards
    python -m benchmarks.opens2v --folder /tmp --size 0.05  # does it run

The dataset's own files have 32 to 66 GB, for some 400,000 clips each. That memory does not grow with a file's size is
what a second, ten times smaller file shows.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import tyro

from benchmarks.machine import in_fresh_process, machine_line, markdown_table, process_memory, reset_peak_memory
from tests.training.opens2v_files import Drawn, cross_pair, opens2v_record


HEIGHT, WIDTH, SUBJECTS = 720, 1280, 20


@dataclass(frozen=True)
class Options:
    """Measures how an annotation file is read."""

    folder: Path
    """Where the files are written meanwhile."""
    size: float = 1.0
    """The size of the larger file in GB."""


def draw_mask(seed: int) -> np.ndarray:
    """A blob with a ragged outline, as segmentation gives, of any size: bool `(height, width)`."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    center = generator.uniform(0.3, 0.7, 2) * (HEIGHT, WIDTH)
    angle = np.arctan2(y - center[0], x - center[1])
    waves = sum(np.sin(angle * k + generator.uniform(0, 6)) / k for k in range(1, 30))
    radius = generator.uniform(20, 300) * (1 + 0.15 * waves) + generator.normal(0, 3, (HEIGHT, WIDTH))
    return np.hypot(y - center[0], x - center[1]) < radius


def write_annotations(path: Path, size: float) -> int:
    """Writes records that differ in their keys until the file has `size` GB; returns how many."""
    masks = [[draw_mask(SUBJECTS * seed + i) for i in range(SUBJECTS)] for seed in range(8)]
    drawn = [[Drawn(f"subject {i}", mask) for i, mask in enumerate(subjects)] for subjects in masks]
    bodies = [json.dumps(opens2v_record(subjects, path=f"{i}.mp4")) for i, subjects in enumerate(drawn)]
    count = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size * 1e9:
            file.write(f'{"," if count else "{"}"gm{count}_part2_step1-0-95": {bodies[count % len(bodies)]}')
            count += 1
        file.write("}")
    return count


def write_pairs(path: Path, part: str, records: int) -> None:
    """Every clip is paired with the next one."""
    keys = [f"{part}/gm{i}_part2_step1-0-95" for i in range(records)]
    with path.open("w", encoding="utf-8") as file:
        for count, (current, after) in enumerate(pairwise(keys)):
            file.write("," if count else "[")
            file.write(json.dumps(cross_pair(current, after, str(count % SUBJECTS + 1), "subject")))
        file.write("]")


def read(annotations: Path, pairs: Path | None) -> tuple[int, float, int]:
    """Samples read, seconds, and the process's peak memory in bytes; to run in a fresh process."""
    from refalign_training.data.sample import Sample
    from refalign_training.data.source import Source, read_source

    source = Source("opens2v", (annotations,), annotations.parent, (pairs,) if pairs else ())
    reset_peak_memory()
    start = time.perf_counter()
    samples = sum(isinstance(item, Sample) for item in read_source(source))
    return samples, time.perf_counter() - start, process_memory()["VmHWM"]


def measure(folder: Path, size: float) -> list[tuple[str, ...]]:
    """The rows of the table for a file of that size, without and with cross pairs."""
    annotations, pairs = folder / "total_part1.json", folder / "pairs.json"
    records = write_annotations(annotations, size)
    write_pairs(pairs, annotations.stem, records)
    rows = []
    for name, given in (("", None), (f", {records - 1} cross pairs", pairs)):
        samples, seconds, memory = in_fresh_process(read, annotations, given)
        megabytes = annotations.stat().st_size / 1e6
        figures = (records, samples, seconds, records / seconds, megabytes / seconds, memory / 1e6)
        rows.append((f"{megabytes:.0f} MB{name}", *(f"{figure:.0f}" for figure in figures)))
    return rows


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [*measure(Path(folder), options.size / 10), *measure(Path(folder), options.size)]
    header = ("File", "records", "samples", "s", "records/s", "MB/s", "peak memory, MB")
    print(f"{machine_line()}\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
