"""How long imports and `--help` take, each in fresh processes, against `from diffusers import WanPipeline`.

    python -m benchmarks.startup                # some minutes
    python -m benchmarks.startup --repeats 2    # does it run

A time is that of a whole process, from its start to its end: what a user waits. The commands take turns, after one
uncounted round that fills the page cache and writes the bytecode.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.machine import machine_line, markdown_table


REFALIGN = str(Path(sys.executable).with_name("refalign"))
FLOOR = "python -c pass"
COMMANDS = {
    FLOOR: [sys.executable, "-c", "pass"],
    "import refalign": [sys.executable, "-c", "import refalign"],
    "refalign --help": [REFALIGN, "--help"],
    "refalign generate --help": [REFALIGN, "generate", "--help"],
    "from refalign import RefAlignWanPipeline": [sys.executable, "-c", "from refalign import RefAlignWanPipeline"],
    "from diffusers import WanPipeline": [sys.executable, "-c", "from diffusers import WanPipeline"],
}


@dataclass(frozen=True)
class Options:
    """Measures how long imports and --help take."""

    repeats: int = 15
    """Processes a command."""


def seconds(command: list[str]) -> float:
    """The wall-clock time of one process; CalledProcessError if it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(repeats: int) -> dict[str, list[float]]:
    """The seconds of each command, in turns."""
    for command in COMMANDS.values():
        seconds(command)
    rounds = [{name: seconds(command) for name, command in COMMANDS.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in COMMANDS}


def report(times: dict[str, list[float]]) -> str:
    """The table: medians, spread, and what comes on top of an empty Python."""
    medians = {name: statistics.median(s) for name, s in times.items()}
    rows = [
        (f"`{name}`", f"{medians[name]:.3f}", f"{min(s):.3f}-{max(s):.3f}", f"{medians[name] - medians[FLOOR]:.3f}")
        for name, s in times.items()
    ]
    return markdown_table(("Process", "median, s", "range, s", "above an empty Python, s"), rows)


def main(options: Options) -> None:
    times = measure(options.repeats)
    print(f"{machine_line()} {options.repeats} processes each.\n\n{report(times)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
