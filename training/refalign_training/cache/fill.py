"""
Computes a cache's items. Any number of processes share the work: each claims a unit by locking its file, and goes on
to the next one that is free; at the end it waits for the others, and takes over what a killed one has left.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from refalign_training.cache import CacheCommand
from refalign_training.cache.checks import collect
from refalign_training.cache.decoding import Decoded, Task, decode_all
from refalign_training.cache.files import (
    FAMILIES,
    CacheFolder,
    Failure,
    Header,
    Item,
    ItemWriter,
    Lock,
    Outcome,
    ShardWriter,
    digest,
    family_units,
    find_item,
    item_bytes,
    parse_item,
    read_header,
    read_index,
    read_outcomes,
    write_record,
)
from refalign_training.cache.plan import Planned, item_ingredients, read_plan, sample_digests
from refalign_training.cache.settings import planned
from refalign_training.data.sample import Unusable
from refalign_training.encoders import Encoder, TeacherEncoder, TextEncoder, VaeEncoder


POLL_SECONDS = 0.5
NOT_FINITE = {"video": "video", "references": "image", "teacher": "image", "text": "not readable"}


def fill(command: CacheCommand) -> int:
    """Computes what the cache lacks, alone or beside other processes, and returns the exit code: 0."""
    _check(command)
    folder = CacheFolder(command.output)
    started = time.time()
    with planned(folder, command, started) as (settings, summary):
        fillers = [_Filler(folder, command, f, settings["families"][f], summary, started) for f in command.families]
        while any(filler.pending() for filler in fillers):
            if not sum(filler.work() for filler in fillers):
                time.sleep(POLL_SECONDS)  # others have what is left
        with Lock.take(folder.lock("plan"), wait=True):
            failures = collect(folder)
    print(f"{command.output}: {summary['samples']} samples, {', '.join(command.families)} done.")
    if failures:
        print(f"{failures} failures are listed in {folder.quarantine}.")
    return 0


def _check(command: CacheCommand) -> None:
    command.recipe.check()
    families = set(command.families)
    if command.source.data is None:
        raise ValueError("Pass the dataset: --data and what belongs to it.")
    if not families or len(families) < len(command.families):
        raise ValueError(f"--families is {command.families}; pass some of {', '.join(FAMILIES)}, each once.")
    if command.model is None and families - {"teacher"}:
        raise ValueError("Pass --model, a Wan 2.1 or RefAlign pipeline; only the family `teacher` needs none.")
    if command.teacher is None and "teacher" in families:
        raise ValueError("Pass --teacher, or leave `teacher` out of --families.")
    for name, least in (("variants", 1), ("unit_size", 1), ("workers", 0), ("limit", 1)):
        if (value := getattr(command, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: pass {least} or more.")


# -- Filling ----------------------------------------------------------------------------------------------------------


@dataclass
class _Row:
    """A sample of an open unit."""

    planned: Planned
    files: str
    annotation: str
    items: list[Item | None]
    failure: Failure | None = None

    def outcome(self) -> Outcome:
        items = () if self.failure else tuple(self.items)
        return Outcome(self.planned.sample.id, self.files, self.annotation, items, self.failure)


@dataclass
class _OpenUnit:
    """A unit that this process has claimed."""

    name: str
    plan: str
    lock: Lock
    writer: ItemWriter | ShardWriter
    rows: list[_Row] = field(default_factory=list)
    undecoded: int = 0
    started: float = field(default_factory=time.time)
    computed: int = 0


class _Filler:
    """Computes a family's items."""

    def __init__(
        self,
        folder: CacheFolder,
        command: CacheCommand,
        family: str,
        made: Mapping[str, Any],
        summary: Mapping[str, Any],
        started: float,
    ) -> None:
        self._folder, self._command, self._family, self._started = folder, command, family, started
        self._ingredients, self._variants = made["ingredients"], made["variants"]
        self._units = family_units(family, summary)
        self._pending = dict(self._in_turn())
        self._open: dict[str, _OpenUnit] = {}
        self._encoder: Encoder | None = None

    def _in_turn(self) -> list[tuple[str, str]]:
        """All units, each of several processes starting elsewhere, so that they rarely meet."""
        units = list(self._units.items())
        rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        first = rank * len(units) // processes
        return units[first:] + units[:first]

    def pending(self) -> bool:
        """Whether there are units without a record that is up to date."""
        self._pending = {unit: plan for unit, plan in self._pending.items() if not self._is_done(unit, plan)}
        return bool(self._pending)

    def _is_done(self, unit: str, plan: str) -> bool:
        header = read_header(self._folder.record(self._family, unit))
        if header is None or (header.plan, header.variants) != (plan, self._variants):
            return False
        retry = self._command.retry_quarantined and header.failures and header.written < self._started
        return header.ingredients == self._ingredients and not retry

    def work(self) -> int:
        """Does all units that no other process has; returns how many."""
        if not self.pending():
            return 0
        self._done = 0
        self._known = self._items_in_shards()
        self._quarantined = {} if self._command.retry_quarantined else self._failures()
        total = len(self._pending) * self._command.unit_size * self._variants
        try:
            with tqdm(total=total, desc=self._family, unit="item", smoothing=0.05) as self._bar:
                tasks = self._claim()
                for first in tasks:  # the decoders are started only if there is something to decode
                    self._encode_all(itertools.chain([first], tasks))
        finally:
            for unit in self._open.values():
                unit.writer.abandon()
                unit.lock.release()
            self._open.clear()
            self._encoder = None  # one family's model at a time
        return self._done

    def _claim(self) -> Iterator[Task]:
        """
        Claims units that are free, one after the other, and gives what is to compute in them. It never waits: what it
        claims is finished only while it is asked for more.
        """
        for name, plan in list(self._pending.items()):
            lock = Lock.take(self._folder.lock(self._family, f"{name}.lock"))
            if lock is None or self._is_done(name, plan):
                if lock is not None:
                    lock.release()
                self._bar.total -= self._command.unit_size * self._variants
                continue
            unit = self._open[name] = _OpenUnit(name, plan, lock, self._writer(name))
            tasks = self._tasks(unit)
            unit.undecoded = len(tasks)
            self._bar.total -= self._command.unit_size * self._variants - len(tasks)
            self._bar.refresh()
            if not tasks:
                self._finish(unit)
            yield from tasks

    def _writer(self, unit: str) -> ItemWriter | ShardWriter:
        if self._command.shards:
            return ShardWriter(self._folder, self._family, unit)
        return ItemWriter(self._folder, self._family)

    def _tasks(self, unit: _OpenUnit) -> list[Task]:
        """Fills the unit's rows with what there is already, and says what is missing."""
        tasks = []
        for number, entry in enumerate(read_plan(self._folder, unit.name)):
            files, annotation = sample_digests(self._family, entry)
            row = _Row(entry, files, annotation, [None] * self._variants)
            row.failure = self._quarantined.get((entry.sample.id, files, annotation))
            unit.rows.append(row)
            if row.failure is None:
                row.items = [self._find(self._key(row, variant)) for variant in range(self._variants)]
                missing = [variant for variant, item in enumerate(row.items) if item is None]
                tasks += [Task(unit.name, number, variant, entry.sample) for variant in missing]
        return tasks

    def _key(self, row: _Row, variant: int) -> str:
        return digest(item_ingredients(self._ingredients, row.files, row.annotation, variant))

    def _find(self, key: str) -> Item | None:
        """The item of that key if it was computed before, for whatever plan."""
        if item := find_item(self._folder.item(self._family, key)):
            return item
        if key not in self._known:
            return None
        shard, offset, size = self._known[key]
        try:
            with (self._folder.shards(self._family) / shard).open("rb") as opened:
                opened.seek(offset)
                item = parse_item(key, opened.read(min(size, 2**20)), size)
        except FileNotFoundError:
            return None
        return item and dataclasses.replace(item, shard=shard, offset=offset)

    def _items_in_shards(self) -> dict[str, tuple[str, int, int]]:
        if not self._folder.shards(self._family).is_dir():
            return {}
        known = {key: place for key, *place in read_index(self._folder.index(self._family))}
        for path in self._folder.records(self._family).glob("*.jsonl"):
            items = (item for outcome in read_outcomes(path) for item in outcome.items if item.shard)
            known |= {item.key: (item.shard, item.offset, item.size) for item in items}
        return known

    def _failures(self) -> dict[tuple[str, str, str], Failure]:
        if not self._folder.quarantine.is_file():
            return {}
        with self._folder.quarantine.open(encoding="utf-8", errors="surrogatepass") as lines:
            records = [r for r in map(json.loads, lines) if r["family"] == self._family]
        return {(r["sample_id"], r["files"], r["annotation"]): Failure(r["kind"], r["detail"]) for r in records}

    def _encode_all(self, tasks: Iterator[Task]) -> None:
        """Decodes in worker processes while this one encodes."""
        workers = 0 if self._family == "text" else self._command.workers
        batch: list[tuple[_Row, int, Decoded]] = []
        for name, number, variant, decoded in decode_all(self._family, self._command.recipe, tasks, workers):
            unit = self._open[name]
            row = unit.rows[number]
            unit.undecoded -= 1
            if isinstance(decoded, Unusable):
                self._fail(row, decoded)
            else:
                batch.append((row, variant, decoded))
            self._encoder = self._encoder or (self._load_encoder() if batch else None)
            if batch and (unit.undecoded == 0 or len(batch) == self._encoder.batch_size):
                self._encode(unit, batch)
                batch = []
            self._bar.update()
            if unit.undecoded == 0:
                self._finish(unit)

    def _encode(self, unit: _OpenUnit, batch: list[tuple[_Row, int, Decoded]]) -> None:
        for (row, variant, decoded), tensors in zip(batch, self._encoder([d for *_, d in batch]), strict=True):
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                self._fail(row, Unusable(NOT_FINITE[self._family], "what the encoder gives of it is not finite"))
                continue
            ingredients = item_ingredients(self._ingredients, row.files, row.annotation, variant)
            row.items[variant] = unit.writer.add(digest(ingredients), item_bytes(tensors, ingredients, decoded.info))
            unit.computed += 1

    def _fail(self, row: _Row, error: Unusable) -> None:
        row.failure = Failure(error.kind, error.detail)

    def _finish(self, unit: _OpenUnit) -> None:
        """Writes the record: from now on the unit is done."""
        unit.writer.close()
        header = Header(
            unit.plan,
            self._ingredients,
            self._variants,
            computed=unit.computed,
            seconds=time.time() - unit.started,
            written=time.time(),
        )
        path = self._folder.record(self._family, unit.name)
        write_record(path, header, (row.outcome() for row in unit.rows))
        self._open.pop(unit.name).lock.release()
        self._done += 1

    def _load_encoder(self) -> Encoder:
        dtype, device = getattr(torch, self._command.dtype), _device(self._command.device)
        command = self._command
        if self._family == "teacher":
            return TeacherEncoder(command.teacher, dtype, device, command.teacher_revision)
        if self._family == "text":
            return TextEncoder(command.model, dtype, device, command.revision)
        vae_dtype, references = getattr(torch, command.vae_dtype), self._family == "references"
        return VaeEncoder(command.model, dtype, device, vae_dtype, references, command.revision)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
