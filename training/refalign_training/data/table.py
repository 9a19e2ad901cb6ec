"""Your own data: tables (JSON lines, CSV, parquet), and a plain folder.

A table has the columns `video`, `prompt` and `references` (the images' paths), and may have `id`, `subjects` (a text
for each reference), `start` and `end` (frames of the video; the end is one behind the last). Other columns of numbers
become scores. In CSV, `references` and `subjects` are written with `|` between their items, or as a JSON list.

A folder has `clip.mp4` with `clip.txt` and `clip.ref0.png`, `clip.ref1.jpg`, ... beside it.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refalign_training.data.recipe import DEFAULT_RULE, SelectionRule
from refalign_training.data.records import Record, decode, parquet_columns, read_lines, read_rows
from refalign_training.data.sample import (
    Clip,
    Fault,
    Place,
    Reference,
    Report,
    Sample,
    Unusable,
    View,
    check_id,
    integer,
    is_number,
    is_unicode,
    mapping,
    member,
    number,
    path_inside,
    prompts,
    sequence,
    shorten,
    text,
)


_COLUMNS = ("video", "prompt", "references")
_LISTS = ("references", "subjects")
_TEXTS = ("video", "prompt", "id")
_FRAMES = ("start", "end")
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_IMAGE_STEM = re.compile(r"(.+)\.ref(\d{1,9})", re.DOTALL)
_LONGEST_PROMPT = 1 << 16  # bytes


def read_table(
    annotations: Sequence[Path],
    root: Path | None = None,
    rule: SelectionRule = DEFAULT_RULE,
) -> Iterator[Sample | Fault]:
    """
    The rows of tables. A sample's id is its `id`, or its video's path without suffix; a reference's subject is what
    `subjects` says, or its place from "1".

    Args:
        annotations (`Sequence[Path]`): `.jsonl`, `.csv` or `.parquet` files.
        root (`Path`, *optional*): the folder that paths start from; by default each table's own.
        rule (`SelectionRule`, *optional*): only its `max_references` matters; the first ones are taken.

    Raises:
        ValueError: if a file does not exist, is of another kind, or lacks a column.
    """
    for path in annotations:
        _check_table(path)
    return _read_tables(annotations, root, rule)


def _read_tables(annotations: Sequence[Path], root: Path | None, rule: SelectionRule) -> Iterator[Sample | Fault]:
    for path in annotations:
        for record in _READERS[path.suffix.lower()](path):
            yield from _read_record(record, path, root or path.parent, rule)


def read_folder(
    root: Path,
    rule: SelectionRule = DEFAULT_RULE,
) -> Iterator[Sample | Fault]:
    """
    The videos of a folder and the folders in it, in the order of their names; hidden ones are left out. A sample's id
    is its video's path without suffix, its caption all of `clip.txt`, and its references `clip.ref<number>.<suffix>`
    in the order of their numbers.

    Args:
        root (`Path`): the folder.
        rule (`SelectionRule`, *optional*): only its `max_references` matters; the first ones are taken.

    Raises:
        ValueError: if it is not a folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    return _read_videos(root, rule)


def _read_videos(root: Path, rule: SelectionRule) -> Iterator[Sample | Fault]:
    for row, value in enumerate(_folder_rows(root, root, frozenset())):
        yield from _read_record(Record(row, None, value), root, root, rule)


def _read_record(record: Record, source: Path, root: Path, rule: SelectionRule) -> Iterator[Sample | Fault]:
    faults: list[Fault] = []
    place = Place(str(source), record.row)
    try:
        value = record.checked()
        row = mapping(decode(value) if isinstance(value, str) else value, "a row")
        video = path_inside(root, text(member(row, "video"), "video"))
        place = Place(place.source, place.row, _id(row, video.relative_to(root)))
        item = _sample(row, video, place, root, rule, lambda *what: faults.append(place.fault(*what)))
    except Unusable as error:
        item = place.fault(error)
    yield from faults
    yield item


def _id(row: Mapping[str, Any], video: Path) -> str:
    if row.get("id") is None:
        return check_id(video.with_suffix("").as_posix())
    return check_id(str(integer(row["id"], "id")) if is_number(row["id"]) else row["id"])


def _sample(
    row: Mapping[str, Any], video: Path, place: Place, root: Path, rule: SelectionRule, report: Report
) -> Sample:
    start = 0 if row.get("start") is None else integer(row["start"], "start")
    end = None if row.get("end") is None else integer(row["end"], "end")
    if end is not None and start >= end:
        raise Unusable("no frames", f"start is {start}, and end, one behind the last frame, is {end}")
    captions = _prompts(member(row, "prompt"))
    references = _references(row, root, rule, report)
    scores = _scores(row, report) | {"references": float(len(references))}
    return Sample(place.sample_id, captions, Clip(video, start, end), references, place.source, place.row, scores)


def _prompts(value: Any) -> tuple[str, ...]:
    if isinstance(value, Unusable):  # of a folder's text file
        raise value
    if value is None:
        raise Unusable("no prompt", "there is none")
    return prompts(value, "prompt")


def _references(row: Mapping[str, Any], root: Path, rule: SelectionRule, report: Report) -> tuple[Reference, ...]:
    images = _list(member(row, "references"), "references")
    subjects = _list(row.get("subjects"), "subjects")
    if subjects and len(subjects) != len(images):
        raise Unusable("field", f"there are {len(images)} references, but subjects are {shorten(subjects)}")
    references = []
    for index, image in enumerate(images):
        try:
            label = text(subjects[index], "a subject") if subjects else ""
            view = View(path_inside(root, text(image, "a reference")))
            if len(references) == rule.max_references:
                raise Unusable("field", f"reference {index}, {shorten(image)}, is beyond {rule.max_references}")
            references.append(Reference(label or str(index + 1), view, label=label))
        except Unusable as error:
            report(error, "reference")
    if not references:
        raise Unusable("no references", f"references is {shorten(images)}")
    return tuple(references)


def _list(value: Any, name: str) -> list[Any]:
    if value is None or isinstance(value, str):
        return [value] if value else []
    return sequence(value, name)


def _scores(row: Mapping[str, Any], report: Report) -> dict[str, float]:
    scores = {}
    for name, value in row.items():
        if name in (*_LISTS, *_TEXTS, *_FRAMES) or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        try:
            scores[text(name, "a column's name")] = number(value, shorten(name))
        except Unusable as error:
            report(error, "nothing")
    return scores


def _check_table(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"The table {path} does not exist.")
    suffix, columns = path.suffix.lower(), None
    if suffix not in _READERS:
        raise ValueError(f"{path} is not a table: its name must end in {' or '.join(_READERS)} (.jsonl: JSON lines).")
    if suffix == ".csv":
        columns = _csv_header(path)
    elif suffix == ".parquet":
        columns = parquet_columns(path)  # None: a Fault when it is read
    if columns is not None and not set(_COLUMNS) <= set(columns):
        raise ValueError(f"{path} has the columns {shorten(columns)}; it must have {', '.join(_COLUMNS)}.")


def _csv_header(path: Path) -> list[str]:
    for line in _csv_cells(path):
        if isinstance(line.value, list):
            return line.value
    return []


def _read_csv(path: Path) -> Iterator[Record]:
    header = None
    for line in _csv_cells(path):
        if header is None:
            header = line.value if isinstance(line.value, list) else None
        else:
            cells = line.value
            value = cells if isinstance(cells, Unusable) else _csv_row(header, cells)
            yield Record(line.row - 1, None, value)


def _csv_cells(path: Path) -> Iterator[Record]:
    """The lines of a CSV file as lists of cells, the header first."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, row = csv.reader(file, strict=True), 0
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:  # an open quote takes lines with it; the reader goes on behind them
                cells = Unusable("not readable", f"lines {start} to {reader.line_num}: {error}")
            if cells is None:
                return
            if cells:  # else a blank line
                yield Record(row, None, cells)
                row += 1


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | Unusable:
    if len(cells) != len(header):
        return Unusable("not readable", f"{len(cells)} cells under a header of {len(header)}: {shorten(cells)}")
    if not all(map(is_unicode, cells)):
        return Unusable("not readable", f"not UTF-8: {shorten(cells)}")
    try:
        return {name: _csv_value(name, cell.strip()) for name, cell in zip(header, cells, strict=True)}
    except Unusable as error:
        return error


def _csv_value(name: str, cell: str) -> Any:
    if not cell:
        return None
    if name in _LISTS:
        if cell.startswith("["):
            return decode(cell)
        return list(filter(None, map(str.strip, cell.split("|"))))
    if name in _TEXTS:
        return cell
    try:
        return float(cell)
    except ValueError:
        return cell


def _folder_rows(folder: Path, root: Path, above: frozenset[Path]) -> Iterator[dict[str, Any] | Unusable]:
    """A row for each video of a folder and those in it, as of a table; links that lead back to `above` are passed."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        yield Unusable("not readable", f"{shorten(str(folder))}: {error}")
        return
    images = _images_by_stem(entries)
    for entry in entries:
        if entry.is_dir() and (real := entry.resolve()) not in above:
            yield from _folder_rows(entry, root, above | {real})
        elif entry.suffix.lower() in _VIDEOS:
            yield _folder_row(entry, [image for _, image in sorted(images.get(entry.stem, ()))], root)
    videos = {entry.stem for entry in entries if entry.suffix.lower() in _VIDEOS}
    for stem in sorted(images.keys() - videos):
        image = images[stem][0][1].relative_to(root)
        yield Unusable("missing file", f"{shorten(str(image))} is a reference, but there is no video {shorten(stem)}")


def _images_by_stem(entries: Sequence[Path]) -> dict[str, list[tuple[int, Path]]]:
    images: dict[str, list[tuple[int, Path]]] = {}
    for entry in entries:
        if entry.suffix.lower() in _IMAGES and (match := _IMAGE_STEM.fullmatch(entry.stem)):
            images.setdefault(match[1], []).append((int(match[2]), entry))
    return images


def _folder_row(video: Path, images: Sequence[Path], root: Path) -> dict[str, Any]:
    return {
        "video": video.relative_to(root).as_posix(),
        "prompt": _prompt_beside(video),
        "references": [image.relative_to(root).as_posix() for image in images],
    }


def _prompt_beside(video: Path) -> str | Unusable | None:
    path = video.with_suffix(".txt")
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(_LONGEST_PROMPT)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return Unusable("not readable", f"{path.name}: {error}")


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_lines,
    ".csv": _read_csv,
    ".parquet": read_rows,
}
