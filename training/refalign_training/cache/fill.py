"""
Computes a cache's items. Any number of processes share the work: each claims a unit by locking its file, and goes on
to the next one that is free; at the end it waits for the others, and takes over what a killed one has left.
"""

import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tqdm.auto import tqdm

from refalign.files import new_file
from refalign_training.cache.checks import collect, failure_key, read_failures
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.decoding import Decoded, Decoder, Task
from refalign_training.cache.encoders import Encoder, Models, TeacherEncoder, TextEncoder, VaeEncoder, fetch_models
from refalign_training.cache.files import (
    CacheFolder,
    Failure,
    Header,
    Item,
    Lock,
    Outcome,
    digest,
    done,
    read_outcomes,
    write_record,
)
from refalign_training.cache.items import ItemWriter, ShardWriter, find_item, make_item, read_index, shard_is_whole
from refalign_training.cache.plan import Planned, item_ingredients, read_plan, sample_digests, text_digests
from refalign_training.cache.settings import planned
from refalign_training.data.sample import Unusable


logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
NOT_FINITE = {"video": "video", "references": "image", "teacher": "image", "text": "not readable"}


def fill(command: CacheCommand) -> int:
    """Computes what the cache lacks, alone or beside others, and returns the exit code: 0 if a sample is complete."""
    started = time.time()
    folder = CacheFolder(command.output)
    models = fetch_models(command.families, command.model, command.teacher, command.revision, command.teacher_revision)
    with planned(folder, command, models, started) as settings:
        fillers = [_Filler(folder, command, models, f, settings[f], started) for f in command.families]
        while any(filler.pending() for filler in fillers):
            if not sum(filler.work() for filler in fillers):
                time.sleep(POLL_SECONDS)  # others have what is left
        failures, failed = collect(folder)
    samples = folder.read_summary()["samples"]
    print(f"{command.output}: {samples - failed} of {samples} samples are complete: {', '.join(command.families)}.")
    if failures:
        print(f"Failures and lost references: {failures}, listed in {folder.quarantine}.")
    return 0 if samples > failed else 1


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
        models: Models,
        family: str,
        made: Mapping[str, Any],
        started: float,
    ) -> None:
        self._folder, self._command, self._models, self._family = folder, command, models, family
        self._made, self._ingredients, self._variants = made, made["ingredients"], made["variants"]
        self._retry_before = started if command.retry_quarantined else None
        self._pending = dict(self._in_turn())
        self._open: dict[str, _OpenUnit] = {}
        self._encoder: Encoder | None = None

    def _in_turn(self) -> list[tuple[str, str]]:
        """All units, each of several processes starting elsewhere, so that they rarely meet."""
        units = list(self._folder.units().items())
        rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        first = rank * len(units) // processes
        return units[first:] + units[:first]

    def pending(self) -> bool:
        """Whether there is something without a record that is up to date."""
        self._pending = {unit: plan for unit, plan in self._pending.items() if not self._is_done(unit, plan)}
        return bool(self._pending) or self._lacks_empty_prompt()

    def _is_done(self, unit: str, plan: str) -> bool:
        return done(self._folder, self._family, unit, plan, self._made, self._retry_before) is not None

    def work(self) -> int:
        """Does all units that no other process has; returns how many."""
        if not self.pending():
            return 0
        self._done, self._bar = 0, None
        self._changes: Counter[str] = Counter()
        try:
            tasks = self._claim()
            for first in tasks:  # the decoders are started only if there is something to decode
                self._encode_all(itertools.chain([first], tasks))
            if self._lacks_empty_prompt():
                self._write_empty_prompt()
        finally:
            for unit in self._open.values():
                unit.writer.abandon()
                unit.lock.release()
            self._open.clear()
            self._encoder = None  # one family's model at a time
            if self._bar is not None:
                self._bar.close()
        for change, count in sorted(self._changes.items()):
            logger.info("%d samples of `%s`: %s changed", count, self._family, change)
        return self._done

    # -- What is to compute ----------------------------------------------------------------------------------------

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
                continue
            unit = self._open[name] = _OpenUnit(name, plan, lock, self._writer(name))
            tasks = self._tasks(unit)
            unit.undecoded = len(tasks)
            self._expect(len(tasks))
            if not tasks:
                self._finish(unit)
            yield from tasks

    def _expect(self, tasks: int) -> None:
        """Brings the bar's total up to date; there is none while this process only waits for others."""
        if self._bar is None:
            total = len(self._pending) * self._command.unit_size * self._variants
            self._bar = tqdm(total=total, desc=self._family, unit="item", smoothing=0.05)
        self._bar.total -= self._command.unit_size * self._variants - tasks
        self._bar.refresh()

    def _writer(self, unit: str) -> ItemWriter | ShardWriter:
        if self._command.shards:
            return ShardWriter(self._folder, self._family, unit)
        return ItemWriter(self._folder, self._family)

    def _tasks(self, unit: _OpenUnit) -> list[Task]:
        """Fills the unit's rows with what there is already, and says what is missing."""
        tasks = []
        before = {outcome.id: outcome for outcome in read_outcomes(self._folder.record(self._family, unit.name))}
        for number, entry in enumerate(read_plan(self._folder, unit.name)):
            files, annotation = sample_digests(self._family, entry)
            if old := before.get(entry.sample.id):
                changes = [("files", old.files != files), ("annotation", old.annotation != annotation)]
                self._changes.update(name for name, is_other in changes if is_other)
            row = _Row(entry, files, annotation, [None] * self._variants)
            row.failure = self._failures.get(failure_key(self._ingredients, files, annotation))
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
        item = find_item(self._folder.item(self._family, key), key) or self._in_shards.get(key)
        if item is None or (item.shard and not shard_is_whole(self._folder.item(self._family, item), item)):
            return None
        return None if self._command.retry_quarantined and item.info.get("lost") else item

    @cached_property
    def _in_shards(self) -> dict[str, Item]:
        if not self._folder.shards(self._family).is_dir():
            return {}
        known = {item.key: item for item in read_index(self._folder.index(self._family))}
        for path in self._folder.records(self._family).glob("[!.]*.jsonl"):
            items = (item for outcome in read_outcomes(path) for item in outcome.items if item.shard)
            known |= {item.key: item for item in items}
        return known

    @cached_property
    def _failures(self) -> dict[str, Failure]:
        return {} if self._command.retry_quarantined else read_failures(self._folder, self._family)

    # -- Computing it ----------------------------------------------------------------------------------------------

    def _encode_all(self, tasks: Iterator[Task]) -> None:
        """Decodes in worker processes while this one encodes."""
        workers = 0 if self._family == "text" else self._command.workers
        batch: list[tuple[_Row, int, Decoded]] = []
        with Decoder(self._family, self._command.recipe, tasks, workers) as results:
            for name, number, variant, decoded in results:
                unit = self._open[name]
                row = unit.rows[number]
                unit.undecoded -= 1
                if isinstance(decoded, Unusable):
                    row.failure = Failure(decoded.kind, decoded.detail)
                else:
                    batch.append((row, variant, decoded))
                if batch and (unit.undecoded == 0 or len(batch) == self._load_encoder().batch_size):
                    self._encode(unit, batch)
                    batch = []
                self._bar.update()
                if unit.undecoded == 0:
                    self._finish(unit)

    def _encode(self, unit: _OpenUnit, batch: list[tuple[_Row, int, Decoded]]) -> None:
        encoded = self._load_encoder()([decoded for *_, decoded in batch])
        for (row, variant, decoded), tensors in zip(batch, encoded, strict=True):
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                row.failure = Failure(NOT_FINITE[self._family], "what the encoder gives of it is not finite")
                continue
            ingredients = item_ingredients(self._ingredients, row.files, row.annotation, variant)
            row.items[variant] = unit.writer.add(*make_item(tensors, ingredients, decoded.info))
            unit.computed += 1

    def _finish(self, unit: _OpenUnit) -> None:
        """Writes the record: from now on the unit is done."""
        unit.writer.close()
        now = time.time()
        header = Header(unit.plan, self._ingredients, self._variants, unit.computed, now - unit.started, now)
        path = self._folder.record(self._family, unit.name)
        write_record(path, header, (row.outcome() for row in unit.rows))
        self._open.pop(unit.name).lock.release()
        self._done += 1

    def _empty_prompt_ingredients(self) -> dict[str, Any]:
        return item_ingredients(self._ingredients, *text_digests([""]), 0)

    def _lacks_empty_prompt(self) -> bool:
        key = digest(self._empty_prompt_ingredients())
        return self._family == "text" and find_item(self._folder.empty_prompt, key) is None

    def _write_empty_prompt(self) -> None:
        (tensors,) = self._load_encoder()([Decoded(prompts=("",))])
        _, data = make_item(tensors, self._empty_prompt_ingredients(), {})
        with new_file(self._folder.empty_prompt, overwrite=True) as file:
            file.write_bytes(data)
        self._done += 1

    def _load_encoder(self) -> Encoder:
        if self._encoder is None:
            dtype, device = getattr(torch, self._command.dtype), _device(self._command.device)
            if self._family == "teacher":
                self._encoder = TeacherEncoder(self._models.teacher, dtype, device)
            elif self._family == "text":
                self._encoder = TextEncoder(self._models.pipeline, dtype, device)
            else:
                vae_dtype, references = getattr(torch, self._command.vae_dtype), self._family == "references"
                self._encoder = VaeEncoder(self._models.pipeline, dtype, device, vae_dtype, references)
        return self._encoder


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
