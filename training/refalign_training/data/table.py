"""Your own data in tables: JSON lines or a JSON list, CSV as any program writes it, parquet.

A table has the columns `video`, `prompt` and `references` (or `reference`: the images' paths), and may have `id`,
`subjects` (a text for each reference), `start` and `end` (frames of the video; the end is one behind the last). Other
columns of numbers become scores. In CSV, `references` and `subjects` are written with `|` between their items, or as a
JSON list.

Names of columns may have capitals, and paths backslashes. CSV is UTF-8 or UTF-16, and its separator a comma,
semicolon, tab or bar.
"""

import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from refalign_training.data import fields
from refalign_training.data.fields import Unusable, is_number, is_unicode, shorten
from refalign_training.data.recipe import DEFAULT_RULE, REAL_TIME, SelectionRule
from refalign_training.data.records import (
    Record,
    decode,
    first_character,
    parquet_columns,
    read_lines,
    read_members,
    read_rows,
    read_samples,
)
from refalign_training.data.sample import Clip, Fault, Place, Reference, Sample, View


_COLUMNS = ("video", "prompt", "references")
_LISTS = ("references", "reference", "subjects")
_TEXTS = ("video", "prompt", "id")
_OWN = (*_LISTS, *_TEXTS, "start", "end")
_LONGEST_HEADER = 1 << 20  # characters
_SEPARATORS = ",;\t|"
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # how absolute paths begin there
_DECIMAL = re.compile(r"[-+]?\d+,\d+")


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
    return read_samples(annotations, lambda path: _READERS[path.suffix.lower()](path), sample_of, root, rule)


def sample_of(record: Record, place: Place, root: Path | None, rule: SelectionRule) -> Sample:
    """A row's sample. Raises [`Unusable`]."""
    root = root or Path(place.source).parent
    value = record.checked()
    row = _named(fields.mapping(decode(value) if isinstance(value, str) else value, "a row"))
    video = _path(root, fields.required(row, "video", fields.text))
    place.sample_id = _id(row, video.relative_to(root))
    if "reference" in row:
        row = _with_references(row)
    start = 0 if row.get("start") is None else fields.integer(row["start"], "start, a frame and not a second,")
    end = None if row.get("end") is None else fields.integer(row["end"], "end, a frame and not a second,")
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


def _name(column: Any) -> Any:
    """A column's name; those that mean something may be written with blanks and capitals."""
    plain = column.strip() if isinstance(column, str) else column
    return plain.lower() if isinstance(plain, str) and plain.lower() in _OWN else plain


def _named(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """A row by its columns' plain names. NaN is what pandas writes where there is nothing."""
    values = {}
    for column, value in row.items():
        name = _name(column)
        is_nothing = name in _OWN and isinstance(value, float) and math.isnan(value)
        text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
        values[name] = None if is_nothing else text
    return values


def _path(root: Path, path: str) -> Path:
    """A path as Windows or others write it."""
    if _WINDOWS.match(path):
        raise Unusable("path", f"{path!r} is a path of Windows' own; write it from the table's folder on, with /")
    if "\\" in path and "\0" not in path and not (root / path).exists():
        path = path.replace("\\", "/")
    return fields.path_inside(root, path)


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
            view = View(_path(root, fields.text(image, "a reference")))
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
    fields.check_given(path, "The table")
    suffix, columns = path.suffix.lower(), None
    if suffix not in _READERS or (suffix == ".json" and first_character(path) != "["):
        names = " or ".join(_READERS)
        raise ValueError(f"{path} is not a table: its name must end in {names} (.jsonl: JSON lines, .json: a list).")
    if suffix in (".csv", ".tsv"):
        columns = _csv_header(_csv_lines(path))
    elif suffix == ".parquet":
        columns = parquet_columns(path)  # None: a Fault when it is read
    named = set(map(_name, columns or ()))
    if "reference" in named:
        named.add("references")
    if columns is not None and not set(_COLUMNS) <= named:
        raise ValueError(f"{path} has the columns {shorten(columns)}; it must have {', '.join(_COLUMNS)}.")


def _csv_lines(path: Path) -> Iterator[list[str] | Unusable]:
    """The cells of a CSV file's lines that are not blank, the header's first."""
    separator, skipped = _separator(path)
    with _open_csv(path) as file:
        for _ in range(skipped):
            file.readline()
        reader = csv.reader(file, strict=True, delimiter=separator)
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
                if any(map(str.strip, cells)):
                    yield cells
            except StopIteration:
                return
            except csv.Error as error:  # an open quote takes lines with it; the reader goes on behind them
                yield Unusable("not readable", f"lines {start} to {reader.line_num}: {error}")


def _open_csv(path: Path) -> TextIO:
    return path.open(encoding=fields.encoding_of(path), errors="surrogateescape", newline="")


def _separator(path: Path) -> tuple[str, int]:
    """What stands between cells, by the header, and how many lines are before that: Excel writes `sep=;` there."""
    with _open_csv(path) as file:
        first = file.readline(_LONGEST_HEADER)
    if match := re.fullmatch(r"sep=(.)\s*", first):
        return match[1], 1
    for separator in _SEPARATORS:
        if set(_COLUMNS) <= set(map(_name, next(csv.reader([first], delimiter=separator), []))):
            return separator, 0
    return ",", 0


def _csv_header(lines: Iterator[list[str] | Unusable]) -> list[str]:
    for cells in lines:
        if isinstance(cells, list):
            return cells
    return []


def _read_csv(path: Path) -> Iterator[Record]:
    lines = _csv_lines(path)
    header = list(map(_name, _csv_header(lines)))
    has_decimal_commas = _separator(path)[0] != ","
    for row, cells in enumerate(lines):
        try:
            value = _csv_row(header, cells, has_decimal_commas)
        except Unusable as error:
            value = error
        yield Record(row, value)


def _csv_row(header: list[str], cells: list[str] | Unusable, has_decimal_commas: bool) -> dict[str, Any]:
    if isinstance(cells, Unusable):
        raise cells
    lacking, extra = header[len(cells) :], cells[len(header) :]
    if any(map(str.strip, extra)) or set(lacking) & set(_COLUMNS):
        raise Unusable("not readable", f"{len(cells)} cells under a header of {len(header)}: {shorten(cells)}")
    if not all(map(is_unicode, cells)):
        raise Unusable("not readable", f"not UTF-8, which the table should be saved as: {shorten(cells)}")
    row = dict.fromkeys(lacking)
    for name, cell in zip(header, cells, strict=False):  # without those of no column, which are blank
        row[name] = _csv_value(name, cell.strip(), has_decimal_commas)
    row.pop("", None)
    return row


def _csv_value(name: str, cell: str, has_decimal_commas: bool) -> Any:
    if not cell:
        return None
    if name in _LISTS:
        if cell.startswith("["):
            return decode(cell)
        return list(filter(None, map(str.strip, cell.split("|"))))
    if name in _TEXTS:
        return cell
    if has_decimal_commas and _DECIMAL.fullmatch(cell):
        cell = cell.replace(",", ".")
    try:
        return float(cell)
    except ValueError:
        return cell


def _read_json(path: Path) -> Iterator[Record]:
    return read_members(path, "[]") if first_character(path) == "[" else read_lines(path)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": read_rows,
}
