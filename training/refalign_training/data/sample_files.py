"""Samples as lines of JSON, as `refalign-train check --write` writes them and `--data samples` reads them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from refalign_training.data.fields import Place, integer, mapping, member, number, prompts, sequence, text
from refalign_training.data.json_stream import Record, decode, read_lines
from refalign_training.data.sample import (
    Box,
    Clip,
    Fault,
    Reference,
    Sample,
    Unusable,
    View,
    check_id,
    is_number,
    path_inside,
)


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
    record = decode(line)
    scores = mapping(member(record, "scores"), "scores")
    return Sample(
        id=check_id(member(record, "id")),
        prompts=prompts(member(record, "prompts"), "prompts"),
        clip=_clip(member(record, "clip"), root),
        references=tuple(_reference(item, root) for item in _items(record, "references")),
        source=text(member(record, "source"), "source"),
        row=integer(member(record, "row"), "row"),
        scores={text(name, "a score's name"): number(value, name) for name, value in scores.items()},
    )


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
    return (_read_line(line, path, root or path.parent) for path in files for line in read_lines(path))


def _read_line(line: Record, path: Path, root: Path) -> Sample | Fault:
    try:
        return read_sample(line.checked(), root)
    except Unusable as error:
        return Place(str(path), line.row).fault(error)


def _items(record: Any, name: str) -> list[Any]:
    return sequence(member(record, name), name)


def _clip(record: Any, root: Path) -> Clip:
    end = member(record, "end")
    return Clip(
        path=path_inside(root, member(record, "path")),
        start=integer(member(record, "start"), "start"),
        end=None if end is None else integer(end, "end"),
        crop=_crop(member(record, "crop")),
    )


def _reference(record: Any, root: Path) -> Reference:
    view = member(record, "view")
    return Reference(
        subject=text(member(record, "subject"), "subject"),
        view=None if view is None else _view(view, root),
        cross=tuple(_view(item, root) for item in _items(record, "cross")),
        label=text(member(record, "label"), "label"),
    )


def _view(record: Any, root: Path) -> View:
    frame, long_side, mask = (member(record, name) for name in ("frame", "box_long_side", "mask"))
    if isinstance(frame, float) and not (is_number(frame) and 0 <= frame <= 1):
        raise Unusable("field", f"frame is {frame}, which as a share has to be from 0 to 1")
    if long_side is not None and integer(long_side, "box_long_side") == 0:
        raise Unusable("field", "box_long_side is 0")
    return View(
        path=path_inside(root, member(record, "path")),
        frame=frame if frame is None or isinstance(frame, float) else integer(frame, "frame"),
        crop=_crop(member(record, "crop")),
        box=_box(member(record, "box")),
        box_long_side=long_side,
        mask=None if mask is None else mapping(mask, "mask"),
    )


def _crop(value: Any) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    left, top, right, bottom = (integer(side, "crop") for side in _four(value, "crop"))
    return left, top, right, bottom


def _box(value: Any) -> Box | None:
    if value is None:
        return None
    left, top, right, bottom = (number(side, "box") for side in _four(value, "box"))
    return left, top, right, bottom


def _four(value: Any, name: str) -> list[Any]:
    if len(sequence(value, name)) != 4:
        raise Unusable("field", f"{name} has {len(value)} numbers instead of 4")
    return value
