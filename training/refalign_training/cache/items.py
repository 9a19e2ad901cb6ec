"""
A family of a cache: a folder named by the recipe that its items are made by.

    recipe.json                 the recipe
    ab/<key>.safetensors        an item; `key` and what is kept beside its tensors are in its metadata
    failed/<key>.json           why there is none
    shards/<name>.tar, .json    many items, written by a cluster, and where each lies

Every file is written beside its place and renamed: an item that exists is done.
"""

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from refalign.files import new_file, read_json
from refalign_training.cache.holders import root_lock
from refalign_training.data.decoding import Task
from refalign_training.data.sample import Unusable


RECIPE = "recipe.json"
_PLACE = struct.Struct(">16s8sQQ")  # key, shard, start and size of an item in a shard

# Where an item lies: its key alone, for a file of its own, or a _PLACE
Place = bytes
# An item before it is written: tensors, and what is kept beside them; or why there is none
Outcome = tuple[dict[str, torch.Tensor], Mapping[str, Any]] | Unusable


def digest(value: Any) -> str:
    """128 bits of the sha256 of the value as JSON, in hexadecimal digits. Paths count by their name alone."""
    text = json.dumps(value, sort_keys=True, default=lambda path: path.name)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def text_key(prompts: Sequence[str]) -> str:
    """The key of an item of the family `text`, which depends on the captions alone."""
    return digest([list(prompts), 0])


def write_json(path: Path, value: Any) -> None:
    with new_file(path, overwrite=True) as file:
        file.write_text(json.dumps(value, indent=2), "utf-8")


def numbered(name: str, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which there are many as an item holds them: `name_0`, `name_1`, ..."""
    return {f"{name}_{number}": tensor for number, tensor in enumerate(tensors)}


def in_numbers(item: Mapping[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """The tensors of [`numbered`]; none if the item holds them as one."""
    return [item[f"{name}_{number}"] for number in range(len(item)) if f"{name}_{number}" in item]


class Items:
    """The items of a family in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, place: Place) -> Path:
        """The file that an item lies in."""
        if len(place) == _PLACE.size:
            return self.folder / "shards" / f"{_PLACE.unpack(place)[1].hex()}.tar"
        key = place.hex()
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, place: Place) -> dict[str, torch.Tensor]:
        """An item's tensors. Raises ValueError if it is not there, or not whole."""
        start, size = _PLACE.unpack(place)[2:] if len(place) == _PLACE.size else (0, -1)
        path = self.path(place)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return load(file.read(size))
        except (OSError, OverflowError, MemoryError, SafetensorError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}). `refalign-train cache --verify` finds all such items."
            ) from error

    # -- What is there ---------------------------------------------------------------------------------------------

    def find(self, key: str) -> tuple[Place, dict[str, Any]] | None:
        """Where an item lies, and what is kept beside its tensors; `None` if it is missing, or not whole."""
        place = bytes.fromhex(key)
        try:
            with safe_open(self.path(place), "pt") as opened:
                metadata = opened.metadata()
            if metadata["key"] == key:
                return place, json.loads(metadata["info"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            pass  # it may lie in a shard
        return self._in_shards.get(key)

    def place(self, key: str) -> Place:
        """Where an item lies; if it is missing, the place of its own file."""
        found = self.find(key)
        return found[0] if found else bytes.fromhex(key)

    def find_failure(self, key: str) -> dict[str, Any] | None:
        """The line of failed.jsonl about an item that could not be made."""
        path = self._failure_path(key)
        return read_json(path) if path.exists() else None

    def lacks(self, key: str, retry: bool) -> bool:
        """Whether an item is to be made; with `retry`, also if it failed before or has lost references."""
        found = self.find(key)
        if found is None:
            return retry or self.find_failure(key) is None
        return retry and "lost" in found[1]

    @cached_property
    def _in_shards(self) -> dict[str, tuple[Place, dict[str, Any]]]:
        items = {}
        for index in self.folder.glob("shards/[!.]*.json"):
            for key, (start, size, info) in read_json(index).items():
                place = _PLACE.pack(bytes.fromhex(key), bytes.fromhex(index.stem), start, size)
                items[key] = (place, info)
        return items

    def sizes(self) -> list[int]:
        """The sizes in bytes of all items."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/[!.]*.safetensors")]
        for place, _ in self._in_shards.values():
            sizes.append(_PLACE.unpack(place)[3])
        return sizes

    def failures(self) -> list[Path]:
        return list(self.folder.glob("failed/[!.]*.json"))

    def forget_failures(self, still_true: Set[str]) -> None:
        """Removes those of other keys: their samples have gone, or their files have changed."""
        for path in self.failures():
            if path.stem not in still_true:
                path.unlink()

    def without(self, keys: Set[str]) -> list[Path]:
        """The files of all other items, of shards without such an item, and what killed processes were writing."""
        unneeded = [*self.folder.glob("**/.*")]
        unneeded += [path for path in self.folder.glob("??/[!.]*.safetensors") if path.stem not in keys]
        for shard in self.folder.glob("shards/[!.]*.tar"):
            index = shard.with_suffix(".json")
            if not index.exists():  # its writer was killed before it wrote that
                unneeded.append(shard)
            elif not keys & read_json(index).keys():
                unneeded += [index, shard]
        return unneeded

    # -- Writing ---------------------------------------------------------------------------------------------------

    def write(self, task: Task, outcome: Outcome) -> None:
        """Writes an item, or why there is none."""
        if isinstance(outcome, Unusable):
            self._write_failure(task, outcome)
            return
        with new_file(self.path(bytes.fromhex(task.key)), overwrite=True) as file:
            file.write_bytes(_serialized(task, outcome))
        self._failure_path(task.key).unlink(missing_ok=True)

    def write_shard(self, outcomes: Iterable[tuple[Task, Outcome]]) -> None:
        """Writes many items as one tar file, then its index. Called again with the same items, it writes the same."""
        index, content = {}, io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for task, outcome in outcomes:
                if isinstance(outcome, Unusable):
                    self._write_failure(task, outcome)
                    continue
                data = _serialized(task, outcome)
                member = tarfile.TarInfo(f"{task.key}.safetensors")
                member.size = len(data)
                start = tar.offset + tarfile.BLOCKSIZE  # behind the member's header, a block
                tar.addfile(member, io.BytesIO(data))
                index[task.key] = (start, len(data), outcome[1])
        if index:
            path = self.folder / "shards" / f"{digest(sorted(index))[:16]}.tar"
            with new_file(path, overwrite=True) as file:
                file.write_bytes(content.getbuffer())
            write_json(path.with_suffix(".json"), index)
        for key in index:
            self._failure_path(key).unlink(missing_ok=True)

    def remove(self, place: Place) -> None:
        """Removes an item; its bytes in a shard stay, but are no longer found."""
        path = self.path(place)
        if len(place) == _PLACE.size:
            index = path.with_suffix(".json")
            with root_lock(self.folder.parent):
                kept = read_json(index) if index.exists() else {}
                if kept.pop(place[:16].hex(), None):
                    write_json(index, kept)
        else:
            path.unlink(missing_ok=True)

    def _write_failure(self, task: Task, fault: Unusable) -> None:
        write_json(self._failure_path(task.key), self.failure(task.key, task.sample.id, "sample", fault))

    def _failure_path(self, key: str) -> Path:
        return self.folder / "failed" / f"{key}.json"

    def failure(self, key: str, sample_id: str, lost: str, fault: Unusable) -> dict[str, Any]:
        """A line of failed.jsonl."""
        line = {"folder": self.folder.name, "key": key, "sample_id": sample_id}
        return line | {"lost": lost, "kind": fault.kind, "detail": fault.detail}


def _serialized(task: Task, item: tuple[dict[str, torch.Tensor], Mapping[str, Any]]) -> bytes:
    tensors, info = item
    return save(tensors, {"key": task.key, "info": json.dumps(info)})
