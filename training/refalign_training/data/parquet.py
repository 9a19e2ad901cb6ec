"""Parquet files, row by row: batches of rows are in memory, never a file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refalign_training.data.fields import shorten
from refalign_training.data.json_stream import Record
from refalign_training.data.sample import Unusable


_ROWS = 256
_BUFFER = 1 << 20


def parquet_columns(path: Path) -> list[str] | None:
    """The names of a file's columns; `None` if it cannot be read."""
    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError):
        return None


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """
    The rows as `{column: value}`; an [`Unusable`] instead of one that cannot be converted, or of all that follow where
    the file cannot be read on.

    Args:
        columns (`Sequence[str]`, *optional*): those to read, by default all; those that the file lacks are left out.
    """
    row = 0
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for batch in file.iter_batches(_ROWS, columns=names):
                for index in range(batch.num_rows):
                    yield Record(row, None, _row(batch, index))
                    row += 1
    except (pa.ArrowException, OSError) as error:
        yield Record(row, None, Unusable("not readable", f"no parquet from row {row} on: {shorten(str(error))}"))


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | Unusable:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, dates out of Python's range
        return Unusable("not readable", shorten(str(error)))
