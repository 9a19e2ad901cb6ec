"""Samples as lines of JSON, as `refalign-train check --write` writes them and `--data samples` reads them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from refalign_training.data.fields import check_given
from refalign_training.data.records import Record, decode, read_lines, read_samples
from refalign_training.data.sample import Fault, Place, Sample, check_sample


def write_sample(sample: Sample, root: Path) -> str:
    """A sample as one line of JSON, its paths relative to `root`."""
    values = dataclasses.asdict(sample)
    return json.dumps(values, default=lambda path: path.relative_to(root).as_posix(), ensure_ascii=False)


def read_sample(line: str, root: Path) -> Sample:
    """The inverse of [`write_sample`]. Raises [`Unusable`] if the line is not such a sample."""
    return check_sample(decode(line), root)


def read_samples_file(files: Sequence[Path], root: Path | None = None) -> Iterator[Sample | Fault]:
    """
    The samples of files that `refalign-train check --write` wrote. Paths start from `root`, by default from each
    file's own folder. Raises ValueError if a file does not exist.
    """
    for path in files:
        check_given(path, "The file of samples")
    return read_samples(files, read_lines, _read_sample, root)


def _read_sample(line: Record, place: Place, root: Path | None) -> Sample:
    return read_sample(line.checked(), root or Path(place.source).parent)
