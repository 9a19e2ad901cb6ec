"""One owner of an output at a time, by a lock that ends with its process: whoever comes second is told who it is."""

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


PATIENCE = 0.5  # seconds for an owner that is just ending


@contextmanager
def owned(*outputs: str | Path) -> Iterator[None]:
    """
    Within it, the outputs are this process's alone, and what processes that were killed have left of them is gone.

    Raises:
        ValueError: if one is another process's, or would lie in a file.
    """
    with ExitStack() as stack:
        for output in map(Path, outputs):
            stack.enter_context(_made(output.parent))
            if stack.enter_context(held(_lock_of(output), output)):
                remove_leftovers(output.parent, short(output.name))
        yield


def remove_dead_lock(output: Path) -> None:
    """Removes the lock of a finished output whose owner was killed then; one that is held stays."""
    if _lock_of(output).exists():
        with suppress(ValueError), owned(output):
            pass


def _lock_of(output: Path) -> Path:
    return output.with_name(f".{short(output.name)}.lock")


@contextmanager
def owned_folder(folder: Path) -> Iterator[None]:
    """Within it, a folder that grows, and is made if need be, is this process's alone, as in [`owned`]."""
    with _made(folder), held(folder / ".lock", folder):
        remove_leftovers(folder)
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; those that are still empty at the end are removed."""
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise ValueError(f"{file} is a file, so nothing can be written in it. Name another output.")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes have left in a folder, of all outputs or of one. The caller owns them."""
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[a-z0-9_]{{8}}\.partial")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


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


def short(name: str) -> str:
    """A name with which longer ones can be made that file systems still take."""
    return name if len(name) <= 40 else f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
