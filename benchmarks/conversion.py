"""How long `refalign convert` takes, and how much memory, on a random native checkpoint of the real keys and shapes.

    python -m benchmarks.conversion --folder /tmp                             # needs 6 GB of disk; some minutes
    python -m benchmarks.conversion --folder /tmp --layers 1 --repeats 1      # does it run

The checkpoint has random bits in bfloat16; its base has the real transformer's configuration, and a tiny VAE and text
encoder, whose copies would only measure the disk. Each conversion runs in a fresh process, which imports everything
before its clock starts. A plain copy of the checkpoint (`shutil.copyfile`) is the floor; the ways take turns.

Seconds are told twice: until the call returned, and until the system had also written its pages to the disk (`sync`).
The checkpoint is in the page cache if memory allows. Peak RSS includes the checkpoint's mapped pages, which the
system takes back when it needs them; the anonymous part (sampled every 2 ms) is what the process itself allocated.
All files are deleted at the end.
"""

import contextlib
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.machine import in_fresh_process, machine_line, markdown_table, process_memory, reset_peak_memory


SHAPES = Path(__file__).parents[1] / "tests/fixtures/native_checkpoint_shapes.json"
CHUNK = 1 << 26  # bytes written at a time
COPY = "plain copy of the file"


@dataclass(frozen=True)
class Options:
    """Measures `refalign convert` against a plain copy."""

    folder: Path
    """Where a temporary folder is made, of twice the checkpoint's size."""
    model: Literal["1.3b", "14b"] = "1.3b"
    """Whose keys and shapes."""
    layers: int | None = None
    """Only so many blocks, to try."""
    shard_sizes: tuple[str, ...] = ("5GB", "500MB")
    """Values of --max-shard-size; the first is the command's default."""
    repeats: int = 3
    """Runs of each way."""


@dataclass(frozen=True)
class Run:
    """One conversion or copy: seconds, and bytes of memory where they say something."""

    seconds: float
    synced: float
    peak: int | None = None
    anonymous: int | None = None
    anonymous_before: int | None = None


def checkpoint_shapes(model: str, layers: int | None) -> dict[str, list[int]]:
    """The native keys and shapes of a released checkpoint: no projectors, and only the first `layers` blocks."""
    from refalign.keys import is_projector_key

    def is_wanted(key: str) -> bool:
        part, _, rest = key.partition(".")
        return not is_projector_key(key) and (part != "blocks" or layers is None or int(rest.split(".")[0]) < layers)

    shapes = json.loads(SHAPES.read_text("utf-8"))[model]
    return {key: shape for key, shape in shapes.items() if is_wanted(key)}


def write_checkpoint(shapes: dict[str, list[int]], file: Path) -> None:
    """A safetensors file with random bits in bfloat16, written chunk by chunk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, CHUNK):
            opened.write(random.bytes(min(CHUNK, end - start)))


def write_base(shapes: dict[str, list[int]], folder: Path) -> None:
    """A tiny pipeline folder whose transformer/config.json is that of a transformer of `shapes`."""
    from tests.tiny_pipeline import tiny_wan_pipeline

    tiny_wan_pipeline().save_pretrained(folder)
    file = folder / "transformer/config.json"
    config = json.loads(file.read_text("utf-8"))
    dim, text_dim = shapes["text_embedding.0.weight"]
    config |= {
        "attention_head_dim": 128,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "num_attention_heads": dim // 128,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        "text_dim": text_dim,
    }
    file.write_text(json.dumps(config, indent=2), "utf-8")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """The seconds until `work` has returned, and until what it wrote is on the disk."""
    os.sync()
    start = time.perf_counter()
    work()
    returned = time.perf_counter()
    os.sync()
    return returned - start, time.perf_counter() - start


@contextlib.contextmanager
def sampled_anonymous_memory(samples: list[int], interval: float = 0.002) -> Iterator[None]:
    """Fills `samples` with this process's anonymous memory in bytes, now and every `interval` seconds."""
    samples.append(process_memory()["RssAnon"])
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            samples.append(process_memory()["RssAnon"])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run_conversion(checkpoint: Path, base: Path, output: Path, shard_size: str) -> Run:
    """One conversion, measured. To be run in a fresh process."""
    import refalign.hub
    import refalign.transformer_refalign_wan  # noqa: F401 (so that no import is measured)
    from refalign.convert import convert

    samples: list[int] = []
    reset_peak_memory()
    with sampled_anonymous_memory(samples):
        seconds, synced = timed(lambda: convert(checkpoint, base, output, max_shard_size=shard_size))
    peak = process_memory()["VmHWM"]
    written = sum(file.stat().st_size for file in (output / "transformer").glob("*.safetensors"))
    assert abs(written - checkpoint.stat().st_size) < 1e6, f"{written:,} bytes were written"
    return Run(seconds, synced, peak, max(samples), samples[0])


def run_copy(checkpoint: Path, output: Path) -> Run:
    """One plain copy, measured."""
    return Run(*timed(lambda: shutil.copyfile(checkpoint, output)))


def measure(options: Options, folder: Path) -> dict[str, list[Run]]:
    """The runs of each way, in turns."""
    checkpoint, base, output = folder / "native.safetensors", folder / "base", folder / "output"
    shapes = checkpoint_shapes(options.model, options.layers)
    write_checkpoint(shapes, checkpoint)
    in_fresh_process(write_base, shapes, base)
    runs = {COPY: [], **{f"--max-shard-size {size}": [] for size in options.shard_sizes}}
    for _ in range(options.repeats):
        runs[COPY].append(run_copy(checkpoint, output))
        output.unlink()
        for size in options.shard_sizes:
            runs[f"--max-shard-size {size}"].append(in_fresh_process(run_conversion, checkpoint, base, output, size))
            shutil.rmtree(output)
    return runs


def table_row(way: str, runs: list[Run]) -> list[str]:
    """A row: medians of the seconds with their range, and the highest memory of any run."""
    row = [f"`{way}`" if way.startswith("-") else way]
    for times in ([run.seconds for run in runs], [run.synced for run in runs]):
        row.append(f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})")
    for name in ("peak", "anonymous", "anonymous_before"):
        sizes = [getattr(run, name) for run in runs]
        row.append("" if None in sizes else f"{max(sizes) / 1e6:,.0f}")
    return row


def report(options: Options, runs: dict[str, list[Run]], size: int) -> str:
    """What was converted, where, and the table."""
    header = ["Way", "s", "s until on disk", "peak RSS, MB", "anonymous, MB", "of it before, MB"]
    layers = "" if options.layers is None else f", {options.layers} layers only"
    what = f"Checkpoint {options.model}{layers}: {size / 1e9:.2f} GB; {options.repeats} runs each."
    return f"{machine_line()} {what}\n\n{markdown_table(header, [table_row(*item) for item in runs.items()])}"


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory(prefix="refalign-conversion-", dir=options.folder) as temporary:
        runs = measure(options, Path(temporary))
        size = (Path(temporary) / "native.safetensors").stat().st_size
    print(report(options, runs, size))


if __name__ == "__main__":
    main(tyro.cli(Options))
