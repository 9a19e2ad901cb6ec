"""
What lies in a cache's folder, and how it is written and read.

    cache.json                            what each family is made with, and the VAE's latents_mean and latents_std
    plan/000012.jsonl                     the samples of a unit, with size and time of their files
    plan/summary.json                     digests of all units; written last, so that a plan without it is none
    plan/faults.jsonl                     what was wrong with the dataset's records
    records/<family>/000012.jsonl         a done unit: a header, then a line for each sample: its items, or its failure
    items/<family>/ab/<key>.safetensors   an item; or, with --shards:
    shards/<family>/000012-0.tar          items of a unit, as webdataset names them
    index/<family>.parquet                where each item lies in the shards
    quarantine.jsonl                      all failures, collected from the records
    locks/                                empty files that processes lock (`flock`); the kernel frees them on kill -9

An item is named by its key, the sha256 of its ingredients: whatever changes what is in it changes its name. Files are
written beside their place and renamed, so none is ever half. Records are also flushed to the disk before they are
renamed; items are not: they outlive a killed process, and after a loss of power `--verify` finds what is not whole.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from refalign.atomic import new_file


SCHEMA = 1  # of the folder; raised when an older cache can no longer be read
FAMILIES = ("video", "references", "text", "teacher")
SHARD_BYTES = 2 * 10**9
EMPTY = "empty"  # the unit of the family `text` that holds the empty prompt alone


def canonical(value: Any) -> str:
    """The value as JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """The sha256 of the value's canonical JSON, in hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


# -- What stands in the files -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """Where an item is, and what is in it."""

    key: str
    size: int
    """In bytes, of the safetensors file."""
    shapes: Mapping[str, list[int]]
    info: Mapping[str, Any] = field(default_factory=dict)
    """What is known beside the tensors, such as the references' subjects."""
    shard: str | None = None
    """The tar that holds it; `None`: it is a file of its own."""
    offset: int = 0
    """Of its first byte in the tar."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sample has no item in a family."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a sample in a family: an item for each variant, or a failure."""

    id: str
    files: str
    """A digest of the names, sizes and times of its files."""
    annotation: str
    """A digest of what the dataset says about it."""
    items: tuple[Item, ...] = ()
    failure: Failure | None = None


@dataclass(frozen=True)
class Header:
    """The first line of a record: all that is needed to know whether a unit is done, and how it went."""

    plan: str
    """The digest of the unit's samples. Empty: something of the record was found broken; the unit has to be redone."""
    ingredients: Mapping[str, Any]
    """What all items of the record are made with."""
    variants: int
    items: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    """How many samples failed, by kind."""
    size: int = 0
    """In bytes, of all items."""
    computed: int = 0
    """How many of the items were computed for this record; the others were there."""
    seconds: float = 0.0
    """It took."""
    written: float = 0.0
    """In seconds since 1970."""


@dataclass(frozen=True)
class CacheFolder:
    """The paths in a cache's folder."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "cache.json"

    @property
    def summary(self) -> Path:
        return self.root / "plan/summary.json"

    @property
    def faults(self) -> Path:
        return self.root / "plan/faults.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.jsonl"

    def plan(self, unit: str) -> Path:
        return self.root / "plan" / f"{unit}.jsonl"

    def records(self, family: str) -> Path:
        return self.root / "records" / family

    def record(self, family: str, unit: str) -> Path:
        return self.records(family) / f"{unit}.jsonl"

    def item(self, family: str, key: str) -> Path:
        return self.root / "items" / family / key[:2] / f"{key}.safetensors"

    def shards(self, family: str) -> Path:
        return self.root / "shards" / family

    def index(self, family: str) -> Path:
        return self.root / "index" / f"{family}.parquet"

    def lock(self, *names: str) -> Path:
        return self.root.joinpath("locks", *names)

    def read_settings(self) -> dict[str, Any]:
        """The content of cache.json. ValueError if there is none, or of another schema."""
        if not self.settings.is_file():
            raise ValueError(f"{self.root} is no cache: it has no {self.settings.name}.")
        settings = json.loads(self.settings.read_text("utf-8"))
        if settings.get("schema") != SCHEMA:
            raise ValueError(
                f"{self.root} is a cache of schema {settings.get('schema')}; this version reads schema {SCHEMA}. "
                "Name another folder."
            )
        return settings

    def read_summary(self) -> dict[str, Any]:
        """The content of plan/summary.json. ValueError if there is none."""
        try:
            return json.loads(self.summary.read_text("utf-8"))
        except FileNotFoundError:
            raise ValueError(f"The plan of {self.root} is not complete. Run `refalign-train cache` again.") from None


def family_units(family: str, summary: Mapping[str, Any]) -> dict[str, str]:
    """The names of a family's units, each with the digest of what its samples are."""
    units = {f"{number:06d}": plan for number, plan in enumerate(summary["units"])}
    return {EMPTY: EMPTY, **units} if family == "text" else units


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole, on the disk before it takes its name."""
    with new_file(path, overwrite=True) as file, file.open("w", encoding="utf-8", errors="surrogatepass") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


# -- Locks ------------------------------------------------------------------------------------------------------------


class Lock:
    """An open file whose lock this process holds until [`release`], or until it ends in whatever way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, shared: bool = False, wait: bool = False) -> "Lock | None":
        """The lock of that file; `None` if another holds it and `wait` is false."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


# -- Records ----------------------------------------------------------------------------------------------------------


def write_record(path: Path, header: Header, outcomes: Iterable[Outcome]) -> None:
    """Writes the record of a unit; the header's counts are made from the outcomes."""
    outcomes = list(outcomes)
    items = [item for outcome in outcomes for item in outcome.items]
    kinds = [outcome.failure.kind for outcome in outcomes if outcome.failure]
    header = dataclasses.replace(
        header,
        items=len(items),
        size=sum(item.size for item in items),
        failures={kind: kinds.count(kind) for kind in sorted(set(kinds))},
    )
    lines = [canonical(dataclasses.asdict(line)) for line in (header, *outcomes)]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_header(path: Path) -> Header | None:
    """The header of a record; `None` if there is no record."""
    try:
        with path.open(encoding="utf-8", errors="surrogatepass") as lines:
            return Header(**json.loads(next(lines)))
    except FileNotFoundError:
        return None


def read_outcomes(path: Path) -> Iterator[Outcome]:
    """What became of the samples of a record."""
    with path.open(encoding="utf-8", errors="surrogatepass") as lines:
        next(lines)
        for line in lines:
            record = json.loads(line)
            failure = record["failure"] and Failure(**record["failure"])
            yield Outcome(**record | {"items": tuple(Item(**i) for i in record["items"]), "failure": failure})


# -- Items ------------------------------------------------------------------------------------------------------------


def item_bytes(tensors: Mapping[str, torch.Tensor], ingredients: Mapping[str, Any], info: Mapping[str, Any]) -> bytes:
    """An item as the content of a safetensors file that says itself what it is made of."""
    return save(dict(tensors), {"ingredients": canonical(ingredients), "info": canonical(info)})


def parse_item(key: str, start: bytes, size: int) -> Item | None:
    """What a safetensors file of that size, which starts so, holds; `None` if it is not whole."""
    length = int.from_bytes(start[:8], "little")
    try:
        header = json.loads(start[8 : 8 + length])
        metadata = header.pop("__metadata__")
        end = max(tensor["data_offsets"][1] for tensor in header.values())
        shapes = {name: tensor["shape"] for name, tensor in sorted(header.items())}
        item = Item(key, size, shapes, json.loads(metadata["info"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return item if 8 + length + end == size else None


def find_item(path: Path) -> Item | None:
    """The item that is this file; `None` if there is none, or not a whole one."""
    try:
        with path.open("rb") as opened:
            start = opened.read(8)
            start += opened.read(min(int.from_bytes(start, "little"), 2**24))
            return parse_item(path.stem, start, os.fstat(opened.fileno()).st_size)
    except FileNotFoundError:
        return None


def read_item(folder: CacheFolder, family: str, item: Item) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    An item's tensors and metadata.

    Raises:
        ValueError: if it is not there or not a whole safetensors file.
    """
    path = folder.item(family, item.key) if item.shard is None else folder.shards(family) / item.shard
    try:
        with path.open("rb") as opened:
            opened.seek(item.offset)
            data = opened.read(item.size)
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        return tensors, json.loads(data[8 : 8 + length])["__metadata__"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"Item {item.key} of `{family}` cannot be read from {path}: {error}") from error


class ItemWriter:
    """Writes a unit's items as files, each at once."""

    def __init__(self, folder: CacheFolder, family: str) -> None:
        self._folder, self._family = folder, family

    def add(self, key: str, data: bytes) -> Item:
        """Writes an item and says where it is."""
        with new_file(self._folder.item(self._family, key), overwrite=True) as file:
            file.write_bytes(data)
        return _whole(key, data)

    def close(self) -> None:
        """Nothing is left to do."""

    def abandon(self) -> None:
        """What is written stays: the next run finds it."""


class ShardWriter:
    """Writes a unit's items into uncompressed tars of about 2 GB at most, which appear when the unit is done."""

    def __init__(self, folder: CacheFolder, family: str, unit: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._shards, self._unit, self._shard_bytes = folder.shards(family), unit, shard_bytes
        self._parts: list[tuple[Path, Path]] = []
        self._tar: tarfile.TarFile | None = None

    def add(self, key: str, data: bytes) -> Item:
        """Writes an item and says where it will be."""
        if self._tar is None or self._tar.offset + len(data) > self._shard_bytes:
            self._start_part()
        member = tarfile.TarInfo(f"{key}.safetensors")
        member.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE  # behind the member's header, which is one block in ustar
        self._tar.addfile(member, BytesIO(data))
        return dataclasses.replace(_whole(key, data), shard=self._parts[-1][1].name, offset=offset)

    def _start_part(self) -> None:
        self._close_part()
        self._shards.mkdir(parents=True, exist_ok=True)
        # Records of other units may point into a tar of an earlier plan's unit of this number: it has to stay
        number = len(self._parts)
        while (path := self._shards / f"{self._unit}-{number}.tar").exists() or path in (p for _, p in self._parts):
            number += 1
        unfinished = self._shards / f".{path.name}.{os.getpid()}"
        self._tar = tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT)
        self._parts.append((unfinished, path))

    def _close_part(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def close(self) -> None:
        """The tars take their names."""
        self._close_part()
        for unfinished, path in self._parts:
            unfinished.rename(path)

    def abandon(self) -> None:
        """Nothing of the unit is left."""
        self._close_part()
        for unfinished, _ in self._parts:
            unfinished.unlink(missing_ok=True)


def _whole(key: str, data: bytes) -> Item:
    item = parse_item(key, data, len(data))
    assert item is not None
    return item


# -- The index of the shards ------------------------------------------------------------------------------------------


def write_index(path: Path, rows: Iterable[tuple[str, int, Item]]) -> None:
    """Writes which item, of which sample and variant, lies where in the shards, as parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"key": [], "sample_id": [], "variant": [], "shard": [], "offset": [], "size": []}
    for sample_id, variant, item in rows:
        values = (item.key, sample_id, variant, item.shard, item.offset, item.size)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    types = [pa.string(), pa.string(), pa.int32(), pa.string(), pa.int64(), pa.int64()]
    table = pa.table([pa.array(c, t) for c, t in zip(columns.values(), types, strict=True)], names=list(columns))
    with new_file(path, overwrite=True) as file:
        parquet.write_table(table, file)


def read_index(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Key, shard, offset and size of what the index lists; nothing if there is none."""
    if not path.is_file():
        return
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(columns=["key", "shard", "offset", "size"]):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
