"""Output that is there as a whole or not at all: written beside its place, then renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to fill, beside `output`, that becomes `output` when the block ends well and vanishes when it does not.

    Raises:
        ValueError: if `output` exists and is not an empty folder.
    """
    output = Path(output)
    check_free(output)
    with _beside(output) as folder:
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            _open_to_others(file)
        folder.rename(output)


@contextmanager
def new_file(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write, beside `output`, that becomes `output` when the block ends well and vanishes when it does not.

    Raises:
        ValueError: if `output` is a folder, or exists and `overwrite` is false.
    """
    output = Path(output)
    if output.is_dir() or (output.exists() and not overwrite):
        raise ValueError(f"{output} exists already. Name another output, or move it away.")
    with _beside(output) as file:
        yield file
        _open_to_others(file)
        file.replace(output)


def check_free(output: str | Path) -> None:
    """Raises ValueError if `output` exists and is not an empty folder."""
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists already. Name another output, or move it away.")


def _open_to_others(path: Path) -> None:
    """Gives a file the mode that new files have: safetensors makes its own readable by nobody else."""
    umask = os.umask(0o077)
    os.umask(umask)
    if path.is_file() and not path.is_symlink():
        path.chmod(0o666 & ~umask)


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name[:40]}.", dir=output.parent) as folder:
        yield Path(folder) / output.name
