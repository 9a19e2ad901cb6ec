"""A cache's items: safetensors that say themselves what they are made of, as files or in tars with an index."""

import dataclasses
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from refalign.files import new_file
from refalign_training.cache.files import CacheFolder, Item, canonical, digest


SHARD_BYTES = 2 * 10**9


def make_item(
    tensors: Mapping[str, torch.Tensor], ingredients: Mapping[str, Any], info: Mapping[str, Any]
) -> tuple[Item, bytes]:
    """An item and the content of its file."""
    key = digest(ingredients)
    crc32 = checksum(key, tensors)
    metadata = {"ingredients": canonical(ingredients), "info": json.dumps(info), "crc32": str(crc32)}
    data = save(dict(tensors), metadata)
    return Item(key, len(data), crc32, info), data


def checksum(key: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """The crc32 of an item's key and tensors, with their names, types and shapes."""
    total = zlib.crc32(key.encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), total)
    return total


def find_item(path: Path, key: str | None = None) -> Item | None:
    """The item that is this file, if it is that of the key; `None` if there is none, or not a whole one."""
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        found = digest(json.loads(metadata["ingredients"]))
        if key in (None, found):
            return Item(found, path.stat().st_size, int(metadata["crc32"]), json.loads(metadata["info"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass
    return None


def read_item(path: Path, item: Item) -> dict[str, torch.Tensor]:
    """
    An item's tensors.

    Raises:
        ValueError: if it is not there or not a whole safetensors file.
    """
    try:
        with path.open("rb") as opened:
            opened.seek(item.offset)
            return load(opened.read(item.size))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). `refalign-train cache --verify` finds all such items."
        ) from error


class ItemWriter:
    """Writes a unit's items as files, each at once."""

    def __init__(self, folder: CacheFolder, family: str) -> None:
        self._folder, self._family = folder, family

    def add(self, item: Item, data: bytes) -> Item:
        """Writes an item and says where it is."""
        with new_file(self._folder.item(self._family, item), overwrite=True) as file:
            file.write_bytes(data)
        return item

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

    def add(self, item: Item, data: bytes) -> Item:
        """Writes an item and says where it will be."""
        if self._tar is None or self._tar.offset + len(data) > self._shard_bytes:
            self._start_part()
        member = tarfile.TarInfo(f"{item.key}.safetensors")
        member.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE  # behind the member's header, which is one block in ustar
        self._tar.addfile(member, BytesIO(data))
        return dataclasses.replace(item, shard=self._parts[-1][1].name, offset=offset)

    def _start_part(self) -> None:
        self._close_part()
        self._shards.mkdir(parents=True, exist_ok=True)
        # A name of its own: records may point into a tar of an earlier plan's unit of this number, which has to stay
        path = self._shards / f"{self._unit}-{len(self._parts)}-{uuid4().hex[:8]}.tar"
        unfinished = path.with_name(f".{path.name}")
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


# -- The index of the shards ------------------------------------------------------------------------------------------


def write_index(path: Path, units: Iterable[list[tuple[str, int, Item]]]) -> None:
    """Writes which item, of which sample and variant, lies where in the shards, as parquet; a group of rows a unit."""
    import pyarrow as pa
    from pyarrow import parquet

    texts, numbers = ("key", "sample_id", "shard", "info"), ("variant", "offset", "size", "crc32")
    schema = pa.schema([(name, pa.string()) for name in texts] + [(name, pa.int64()) for name in numbers])
    with new_file(path, overwrite=True) as file, parquet.ParquetWriter(file, schema) as writer:
        for rows in units:
            records = [dataclasses.asdict(i) | {"sample_id": s, "variant": v} for s, v, i in rows]
            records = [record | {"info": json.dumps(record["info"])} for record in records]
            writer.write_table(pa.Table.from_pylist(records, schema))


def read_index(path: Path) -> Iterator[Item]:
    """What the index lists; nothing if there is none that can be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        columns = ["key", "size", "crc32", "info", "shard", "offset"]
        for batch in parquet.ParquetFile(path).iter_batches(columns=columns):
            yield from (Item(**row | {"info": json.loads(row["info"])}) for row in batch.to_pylist())
    except (FileNotFoundError, pa.ArrowInvalid):
        return


def shard_is_whole(path: Path, item: Item) -> bool:
    """Whether the tar is there and as long as the item's place in it says."""
    try:
        return os.stat(path).st_size >= item.offset + item.size
    except FileNotFoundError:
        return False
