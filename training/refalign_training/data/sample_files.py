"""Samples as lines of JSON, as `refalign-train check --write` writes them and `--data samples` reads them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import TypeAdapter

from refalign_training.data.records import Record, decode, read_lines
from refalign_training.data.sample import Fault, Place, Sample, Unusable, checked, complete


_SAMPLE = TypeAdapter(Annotated[Sample, complete(Sample)])


def write_sample(sample: Sample, root: Path) -> str:
    """A sample as one line of JSON, its paths relative to `root`."""
    return json.dumps(
        dataclasses.asdict(sample), default=lambda path: path.relative_to(root).as_posix(), ensure_ascii=False
    )


def read_sample(line: str, root: Path) -> Sample:
    """
    The inverse of [`write_sample`].

    Raises:
        Unusable: if the line is not such a sample.
    """
    return checked(_SAMPLE, decode(line), root)


def read_samples_file(files: Sequence[Path], root: Path | None = None) -> Iterator[Sample | Fault]:
    """
    Files of lines that [`write_sample`] wrote.

    Args:
        files (`Sequence[Path]`): the files.
        root (`Path`, *optional*): the folder that paths start from; by default each file's own.

    Raises:
        ValueError: if a file does not exist.
    """
    for path in files:
        if not path.is_file():
            raise ValueError(f"The file of samples {path} does not exist.")
    return _read(files, root)


def _read(files: Sequence[Path], root: Path | None) -> Iterator[Sample | Fault]:
    for path in files:
        for line in read_lines(path):
            yield _read_line(line, path, root or path.parent)


def _read_line(line: Record, path: Path, root: Path) -> Sample | Fault:
    try:
        return read_sample(line.checked(), root)
    except Unusable as error:
        return Place(str(path), line.row).fault(error)
