"""Your own data: tables (JSON lines, CSV, parquet), and a plain folder.

A table has the columns `video`, `prompt` and `references` (or `reference`: the images' paths), and may have `id`,
`subjects` (a text for each reference), `start` and `end` (frames of the video; the end is one behind the last). Other
columns of numbers become scores. In CSV, `references` and `subjects` are written with `|` between their items, or as a
JSON list.

A folder has `clip.mp4` with `clip.txt` and `clip.ref0.png`, `clip.ref1.jpg`, ... beside it.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refalign_training.data import fields
from refalign_training.data.fields import Unusable, is_number, is_unicode, shorten
from refalign_training.data.recipe import DEFAULT_RULE, REAL_TIME, SelectionRule
from refalign_training.data.records import Record, decode, parquet_columns, read_lines, read_rows, read_samples
from refalign_training.data.sample import Clip, Fault, Place, Reference, Sample, View


_COLUMNS = ("video", "prompt", "references")
_LISTS = ("references", "reference", "subjects")
_TEXTS = ("video", "prompt", "id")
_OWN = (*_LISTS, *_TEXTS, "start", "end")
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_IMAGE_STEM = re.compile(r"(.+)\.ref(\d{1,9})", re.DOTALL)
_LONGEST_PROMPT = 1 << 16  # bytes


def read_table(
    annotations: Sequence[Path], root: Path | None = None, rule: SelectionRule = DEFAULT_RULE
) -> Iterator[Sample | Fault]:
    """
    The rows of tables. A sample's id is its `id`, or its video's path without suffix; a reference's subject is what
    `subjects` says, or its place from "1". Paths start from `root`, by default from each table's own folder. Of the
    rule only `max_references` matters; the first ones are taken.

    Raises:
        ValueError: if a file does not exist, is of another kind, or lacks a column.
    """
    for path in annotations:
        _check_table(path)
    return read_samples(annotations, lambda path: _READERS[path.suffix.lower()](path), _sample, root, rule)


def read_folder(root: Path, rule: SelectionRule = DEFAULT_RULE) -> Iterator[Sample | Fault]:
    """
    The videos of a folder and the folders in it, in the order of their names; hidden ones are left out. A sample's id
    is its video's path without suffix, its caption all of `clip.txt`, and its references `clip.ref<number>.<suffix>`
    in the order of their numbers. Of the rule only `max_references` matters.

    Raises:
        ValueError: if it is not a folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    return read_samples([root], _read_folder, _sample, root, rule)


def _sample(record: Record, place: Place, root: Path | None, rule: SelectionRule) -> Sample:
    root = root or Path(place.source).parent
    value = record.checked()
    row = fields.mapping(decode(value) if isinstance(value, str) else value, "a row")
    video = fields.path_inside(root, fields.required(row, "video", fields.text))
    place.sample_id = _id(row, video.relative_to(root))
    if "reference" in row:
        row = _with_references(row)
    start = 0 if row.get("start") is None else fields.integer(row["start"], "start")
    end = None if row.get("end") is None else fields.integer(row["end"], "end")
    if end is not None and start >= end:
        raise Unusable("no frames", f"start is {start}, and end, one behind the last frame, is {end}")
    prompt = fields.member(row, "prompt")
    if isinstance(prompt, Unusable):  # of a folder's text file
        raise prompt
    if prompt is None:
        raise Unusable("no prompt", "there is none")
    prompts = fields.prompts(prompt, "prompt")
    references = _references(row, root, rule, place)
    scores = _scores(row, place) | {"references": float(len(references))}
    clip = Clip(video, start, end, stride=REAL_TIME)
    return Sample(place.sample_id, prompts, clip, references, place.source, place.row, scores)


def _with_references(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its `reference` named as the others are."""
    if row.get("references"):
        raise Unusable("field", "there are both references and reference, which are the same")
    return {**row, "references": row["reference"]}


def _id(row: Mapping[str, Any], video: Path) -> str:
    if row.get("id") is None:
        return fields.check_id(video.with_suffix("").as_posix())
    return fields.check_id(str(fields.integer(row["id"], "id")) if is_number(row["id"]) else row["id"])


def _references(row: Mapping[str, Any], root: Path, rule: SelectionRule, place: Place) -> tuple[Reference, ...]:
    images = _list(fields.member(row, "references"), "references")
    subjects = _list(row.get("subjects"), "subjects")
    if subjects and len(subjects) != len(images):
        raise Unusable("field", f"there are {len(images)} references, but subjects are {shorten(subjects)}")
    references = []
    for index, image in enumerate(images):
        with place.losing("reference"):
            label = fields.text(subjects[index], "a subject") if subjects else ""
            view = View(fields.path_inside(root, fields.text(image, "a reference")))
            if len(references) == rule.max_references:
                raise Unusable("field", f"reference {index}, {shorten(image)}, is beyond {rule.max_references}")
            references.append(Reference(label or str(index + 1), view, label=label))
    if not references:
        raise Unusable("no references", f"references is {shorten(images)}")
    return tuple(references)


def _list(value: Any, name: str) -> list[Any]:
    if value is None or isinstance(value, str):
        return [value] if value else []
    return fields.sequence(value, name)


def _scores(row: Mapping[str, Any], place: Place) -> dict[str, float]:
    scores = {}
    for name, value in row.items():
        if name not in _OWN and isinstance(value, int | float) and not isinstance(value, bool):
            with place.losing("nothing"):
                scores[fields.text(name, "a column's name")] = fields.number(value, shorten(name))
    return scores


def _check_table(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"The table {path} does not exist.")
    suffix, columns = path.suffix.lower(), None
    if suffix not in _READERS:
        raise ValueError(f"{path} is not a table: its name must end in {' or '.join(_READERS)} (.jsonl: JSON lines).")
    if suffix == ".csv":
        columns = _csv_header(_csv_lines(path))
    elif suffix == ".parquet":
        columns = parquet_columns(path)  # None: a Fault when it is read
    named = {"references" if column == "reference" else column for column in columns or ()}
    if columns is not None and not set(_COLUMNS) <= named:
        raise ValueError(f"{path} has the columns {shorten(columns)}; it must have {', '.join(_COLUMNS)}.")


def _csv_lines(path: Path) -> Iterator[list[str] | Unusable]:
    """The cells of a CSV file's lines that are not blank, the header's first."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            start = reader.line_num + 1
            try:
                if cells := next(reader):
                    yield cells
            except StopIteration:
                return
            except csv.Error as error:  # an open quote takes lines with it; the reader goes on behind them
                yield Unusable("not readable", f"lines {start} to {reader.line_num}: {error}")


def _csv_header(lines: Iterator[list[str] | Unusable]) -> list[str]:
    for cells in lines:
        if isinstance(cells, list):
            return cells
    return []


def _read_csv(path: Path) -> Iterator[Record]:
    lines = _csv_lines(path)
    header = _csv_header(lines)
    for row, cells in enumerate(lines):
        try:
            value = _csv_row(header, cells)
        except Unusable as error:
            value = error
        yield Record(row, value)


def _csv_row(header: list[str], cells: list[str] | Unusable) -> dict[str, Any]:
    if isinstance(cells, Unusable):
        raise cells
    if len(cells) != len(header):
        raise Unusable("not readable", f"{len(cells)} cells under a header of {len(header)}: {shorten(cells)}")
    if not all(map(is_unicode, cells)):
        raise Unusable("not readable", f"not UTF-8: {shorten(cells)}")
    return {name: _csv_value(name, cell.strip()) for name, cell in zip(header, cells, strict=True)}


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


def _read_folder(root: Path) -> Iterator[Record]:
    for row, value in enumerate(_folder_rows(root, root, frozenset())):
        yield Record(row, value)


def _folder_rows(folder: Path, root: Path, above: frozenset[Path]) -> Iterator[dict[str, Any] | Unusable]:
    """A row for each video of a folder and those in it, as of a table; links that lead back to `above` are passed."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        yield Unusable("not readable", f"{shorten(str(folder))}: {error}")
        return
    images: dict[str, list[tuple[int, str]]] = {}
    for entry in entries:
        if entry.suffix.lower() in _IMAGES and (match := _IMAGE_STEM.fullmatch(entry.stem)):
            images.setdefault(match[1], []).append((int(match[2]), entry.relative_to(root).as_posix()))
    videos = set()
    for entry in entries:
        if entry.is_dir() and (real := entry.resolve()) not in above:
            yield from _folder_rows(entry, root, above | {real})
        elif entry.suffix.lower() in _VIDEOS:
            videos.add(entry.stem)
            references = [path for _, path in sorted(images.get(entry.stem, ()))]
            video = entry.relative_to(root).as_posix()
            yield {"video": video, "prompt": _prompt_beside(entry), "references": references}
    for stem in sorted(images.keys() - videos):
        _, image = images[stem][0]
        yield Unusable("missing file", f"{shorten(image)} is a reference, but there is no video {shorten(stem)}")


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
