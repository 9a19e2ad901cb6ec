"""What the benchmarks share: the machine they ran on, fresh processes, memory as Linux counts it, Markdown tables."""

import datetime
import multiprocessing
import os
import platform
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine_line(device: str = "cpu") -> str:
    """The machine, the versions and the date, in one line of Markdown."""
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parts = [f"{cpu[1].strip() if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores"]
    parts += [f"{memory / 1e9:.0f} GB RAM", *_gpu(device), f"Python {platform.python_version()}"]
    parts += [f"{name} {version(name)}" for name in ("torch", "diffusers", "refalign")]
    return f"Measured on: {'; '.join(parts)}; {datetime.date.today().isoformat()}."


def _gpu(device: str) -> list[str]:
    if device == "cpu":
        return []
    import torch

    return [f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"]


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What `function` returns in a new Python process that shares no memory, modules or allocator with this one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def process_memory() -> dict[str, int]:
    """
    This process's memory in bytes, of which: `VmRSS` resident, `RssAnon` its anonymous part (allocated, as opposed to
    mapped files), `VmHWM` the highest `VmRSS` so far. Not `ru_maxrss`: a child takes over its parent's.
    """
    status = Path("/proc/self/status").read_text("utf-8")
    return {name: int(size) * 1024 for name, size in re.findall(r"^(VmRSS|VmHWM|RssAnon):\s+(\d+)", status, re.M)}


def reset_peak_memory() -> None:
    """Sets `VmHWM` of [`process_memory`] back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns but the first are right-aligned."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_between_marks(page: Path, name: str, text: str) -> None:
    """Puts a text between the lines `<!-- NAME -->` and `<!-- end of NAME -->` of a page; ValueError without them."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text("utf-8").partition(f"{begin}\n")
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} has no lines {begin} and {end}.")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")


def between_marks(page: Path, name: str) -> str:
    """The text that [`write_between_marks`] put there."""
    return page.read_text("utf-8").partition(f"<!-- {name} -->\n\n")[2].partition(f"\n\n<!-- end of {name} -->")[0]
