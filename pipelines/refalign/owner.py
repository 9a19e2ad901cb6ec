"""One owner of an output at a time, by a lock that ends with its process: whoever comes second is told who it is."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


PATIENCE = 0.5  # seconds for an owner that is just ending


@contextmanager
def held(lock: Path, output: Path) -> Iterator[bool]:
    """
    Within it, `output` is this process's alone; the file `lock` says so to others, and is gone afterwards. Gives
    whether it was not this thread's already.

    Raises:
        ValueError: if another process, or another thread, has it.
    """
    from filelock import FileLock, Timeout

    owner = FileLock(lock, is_singleton=True)
    try:
        owner.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(
            f"{output} is in use by {_told(lock)}. Wait for it, end it, or name another output."
        ) from None
    is_first = owner.lock_counter == 1
    try:
        if is_first:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n", "utf-8")
        yield is_first
    finally:
        if is_first:
            lock.unlink(missing_ok=True)  # before the release: who waits for this file then sees that it is gone
        owner.release()


def _told(lock: Path) -> str:
    """What an owner wrote about itself."""
    try:
        text = lock.read_text("utf-8", errors="replace").strip()
    except OSError:
        text = ""
    return text if text.isprintable() and 0 < len(text) < 200 else "another process"
