"""Files of any size, one record at a time: a JSON file's members, items or lines, a parquet file's rows.

Each record of JSON is decoded on its own by Python's `json`. A parser of events such as ijson gives up all that
follows in a file of 66 GB at one `NaN`, number over 64 bits or byte that is not UTF-8; here that is one fault, and the
next record is read.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO, TypeVarTuple

from refalign_training.data.fields import SURROGATE, Unusable, is_unicode, shorten
from refalign_training.data.sample import Fault, Place, Sample


if TYPE_CHECKING:
    import pyarrow as pa


Further = TypeVarTuple("Further")
CHUNK = 1 << 20
LONGEST_RECORD = 1 << 24  # characters; memory stays below some of these, and no record comes near
_ROWS = 256  # of a parquet file that are in memory
_BUFFER = 1 << 20
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)
_SCALAR = re.compile(r"[^,\]}]+")


class Record(NamedTuple):
    """A record of a file."""

    row: int
    """From 0. In files of lines, the line."""
    value: Any
    """What it holds; an [`Unusable`] where it cannot be read."""
    key: str | None = None
    """The name of a member of a JSON object."""

    def checked(self) -> Any:
        """What it holds. Raises [`Unusable`] where it cannot be read."""
        if isinstance(self.value, Unusable):
            raise self.value
        return self.value


def read_samples(
    files: Iterable[Path],
    read_records: Callable[[Path], Iterable[Record]],
    read: Callable[[Record, Place, *Further], Sample],
    *further: *Further,
) -> Iterator[Sample | Fault]:
    """
    The samples of files, each behind what is wrong with parts of it, or a fault where there is none. `read` makes a
    sample of a record, or raises [`Unusable`]; it says the sample's id and reports what is wrong to the place.
    """
    for path in files:
        for record in read_records(path):
            place = Place(str(path), record.row)
            try:
                item = read(record, place, *further)
            except Unusable as error:
                item = place.fault(error)
            yield from place.faults
            yield item


# int() refuses 4300 digits, float() none
_DECODER = json.JSONDecoder(parse_int=lambda digits: (int if len(digits) < 20 else float)(digits), strict=False)


def decode(document: str) -> Any:
    """
    A JSON document; integers over 19 digits become floats. Raises [`Unusable`] if it is not JSON, nests too deep, or
    comes of bytes that are not UTF-8.
    """
    if not is_unicode(document):
        raise Unusable("not readable", f"not UTF-8: {shorten(document)}")
    try:
        return _DECODER.decode(document)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Unusable("not readable", f"not JSON: {error}: {shorten(document)}") from None


def read_lines(path: Path) -> Iterator[Record]:
    """A file's lines that are not blank, as texts for [`decode`]; UTF-8 with or without byte order mark."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for row in itertools.count():
            line = end = file.readline(LONGEST_RECORD)
            while len(end) == LONGEST_RECORD and not end.endswith("\n"):
                end = file.readline(LONGEST_RECORD)
            if not line:
                return
            if len(line) == LONGEST_RECORD and not line.endswith("\n"):
                yield Record(row, Unusable("not readable", f"a line of over {LONGEST_RECORD} characters"))
            elif line := line.strip():
                yield Record(row, line)


def first_character(path: Path) -> str:
    """The first character that is not blank; empty if there is none in the first kilobyte."""
    with path.open("rb") as file:
        return file.read(1024).decode("utf-8-sig", "replace").strip()[:1]


def read_members(path: Path, brackets: Literal["{}", "[]"] = "{}") -> Iterator[Record]:
    """The members of the object, or the items of the list, that a JSON file holds."""
    opening, closing = brackets
    row = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        text = _Text(file)
        try:
            text.expect(opening)
            more = not text.skip(closing)
            while more:
                key = text.key() if opening == "{" else None
                yield Record(row, text.value(), key)
                row += 1
                more = text.skip(",")
            if row:
                text.expect(closing)
            text.expect("")
        except Unusable as error:
            yield Record(row, error)


# -- A JSON file's text -----------------------------------------------------------------------------------------------


class _Text:
    """A file's text, of which a few records at a time are in memory. Bytes that are not UTF-8 are surrogates in it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at = "", 0
        self._dropped = 0  # characters before `_text`

    def wrong(self, what: str) -> Unusable:
        return Unusable("not readable", f"{what} at character {self._dropped + self._at}")

    def skip(self, mark: str) -> bool:
        """Whether `mark`, or the file's end if it is empty, is what comes next, and goes past it."""
        while self._at < len(self._text) or self._read():
            if self._text[self._at] not in " \t\r\n":
                break
            self._at += 1
        found = self._text[self._at : self._at + 1] == mark
        self._at += found and len(mark)
        return found

    def expect(self, mark: str) -> None:
        if not self.skip(mark):
            found, wanted = self._text[self._at : self._at + 20], repr(mark) if mark else "the end"
            raise self.wrong(f"{shorten(found) if found else 'the end'} instead of {wanted}")

    def key(self) -> str:
        """The key that comes next, and goes past its colon."""
        key = self.value()
        if not isinstance(key, str):
            raise key if isinstance(key, Unusable) else self.wrong(f"{shorten(key)} instead of a key")
        self.expect(":")
        return key

    def value(self) -> Any:
        """The JSON value that comes next, or an [`Unusable`] if only its end could be found; else raises one."""
        self.skip("")
        problem, value, end = "the end", None, None
        while self._at < len(self._text):
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                # Not the error itself, which holds the whole text and, kept in a variable, would hold itself
                problem, end = getattr(error, "msg", str(error)), _end_of_value(self._text, self._at)
                value = self.wrong(f"not JSON: {problem}")
            if end is not None and end < len(self._text):  # else a number may go on
                break
            if len(self._text) - self._at > LONGEST_RECORD or not self._read():
                break
        if end is None:
            raise self.wrong(f"no whole record, but {problem},")
        return self._take(end, value)

    def _take(self, end: int, value: Any) -> Any:
        source, self._at = self._text[self._at : end], end
        wrong = not source.isascii() and SURROGATE.search(source)
        if not wrong:
            return value
        around = source[max(0, wrong.start() - 40) : wrong.start() + 40]
        return Unusable("not readable", f"not UTF-8: {shorten(around)}")

    def _read(self) -> bool:
        """Reads on, and says whether there is more."""
        try:
            new = self._file.read(CHUNK)
        except OSError as error:
            raise self.wrong(f"{error}") from None
        if new:
            self._dropped += self._at
            self._text, self._at = self._text[self._at :] + new, 0
        return bool(new)


def _end_of_value(text: str, start: int) -> int | None:
    """One behind the brackets or the quote that close what starts there; `None` if the text ends before."""
    if start < len(text) and text[start] not in '{["':
        scalar = _SCALAR.match(text, start)
        return scalar and scalar.end()
    depth = 0
    for token in _TOKEN.finditer(text, start):
        if token[0] == '"':  # a string that does not end
            return None
        depth += (token[0] in "{[") - (token[0] in "}]")
        if depth == 0:
            return token.end()
    return None


# -- Parquet ----------------------------------------------------------------------------------------------------------


def parquet_columns(path: Path) -> list[str] | None:
    """The names of a file's columns; `None` if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError):
        return None


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """
    The rows as `{column: value}`, of all columns or of those of `columns` that the file has; an [`Unusable`] instead
    of a row that cannot be converted, or of all that follow where the file cannot be read on.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            kept = names if columns is None else [name for name in names if name in columns]
            for batch in file.iter_batches(_ROWS, columns=kept):
                for index in range(batch.num_rows):
                    yield Record(row, _row(batch, index))
                    row += 1
    except (pa.ArrowException, OSError) as error:
        yield Record(row, Unusable("not readable", f"not parquet from row {row} on: {shorten(str(error))}"))


def _row(batch: "pa.RecordBatch", index: int) -> dict[str, Any] | Unusable:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, dates out of Python's range
        return Unusable("not readable", shorten(str(error)))
