"""
Which processes read or write a cache, by locks that end with them: `--prune` waits for them, and what killed writers
have left goes with the next `cache` command.
"""

import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

READERS, WRITERS = ".readers", ".writers"  # folders in a cache's, with a file for each process
LEFTOVERS = (".*.partial", "*/.*.partial", "*/*/.*.partial")  # of files of the cache, of a family, and of its items


def root_lock(root: Path) -> FileLock:
    """What one process at a time has, for as long as others must not come or go."""
    return FileLock(root / ".lock")


def hold(root: Path, role: str) -> FileLock:
    """A lock that says to others what this process does with the cache. It ends with the process, if not before."""
    name = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(4)}.lock"
    lock = FileLock(root / role / name)
    try:
        with root_lock(root):
            (root / role).mkdir(exist_ok=True)
            lock.acquire()
    except OSError as error:
        logger.warning("%s cannot be written (%s): `cache --prune` elsewhere would not know of this run.", root, error)
    return lock


def find_holders(root: Path, role: str) -> tuple[list[str], list[Path]]:
    """The processes that [`hold`] the cache, and the files of those that were killed. The caller has [`root_lock`]."""
    alive, killed = [], []
    for path in sorted((root / role).glob("*.lock")):
        try:
            with FileLock(path, blocking=False):
                killed.append(path)
        except Timeout:
            alive.append(_process(path))
    return alive, killed


def _process(path: Path) -> str:
    """`process NUMBER on MACHINE`."""
    return path.stem.rpartition(",")[0]


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Within it, this process writes into the cache, and others know."""
    lock = hold(root, WRITERS)
    try:
        yield
    finally:
        with root_lock(root):
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            with suppress(OSError):  # others write
                (root / WRITERS).rmdir()


def remove_leftovers(root: Path) -> None:
    """Removes what killed processes have left, if it cannot be another's: others write now, or wrote on another
    machine, whose locks may not be seen from here. A folder without killed processes is not searched: there may be
    millions of files."""
    with root_lock(root):
        alive, killed = find_holders(root, WRITERS)
        here = f" on {socket.gethostname()}"
        if alive or not killed or not all(_process(path).endswith(here) for path in killed):
            return
        for pattern in LEFTOVERS:
            for path in root.glob(pattern):
                shutil.rmtree(path)
        for path in killed:
            path.unlink()
