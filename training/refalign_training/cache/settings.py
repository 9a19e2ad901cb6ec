"""A cache's settings and plan: made from the command and the dataset, compared with what the cache has."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from refalign_training.cache import CacheCommand
from refalign_training.cache.files import (
    SCHEMA,
    CacheFolder,
    Lock,
    canonical,
    digest,
    family_units,
    read_header,
    read_outcomes,
    write_text,
)
from refalign_training.cache.plan import family_ingredients, make_plan, read_plan, sample_digests
from refalign_training.data.sample import Sample
from refalign_training.data.source import read_source
from refalign_training.encoders import PARTS, model_identity, vae_config


logger = logging.getLogger(__name__)


@contextmanager
def planned(
    folder: CacheFolder, command: CacheCommand, started: float
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Settings and plan, up to date and staying so until the block ends: no other process may change them."""
    with Lock.take(folder.lock("plan"), wait=True):
        guard = _Exclusive(folder)
        try:
            settings = _settings(folder, command)
            summary = _summary(folder, command, started, guard)
            _say_what_is_stale(folder, command.families, settings, summary)
            old = folder.read_settings() if folder.settings.is_file() else {}
            if old != settings:
                if not _only_adds(old, settings):
                    guard()
                write_text(folder.settings, json.dumps(settings, indent=2, ensure_ascii=False))
        finally:
            guard.release()
        use = Lock.take(folder.lock("use"), shared=True)
        if use is None:
            raise ValueError(f"{folder.root} is being verified or pruned. Wait for the end of it.")
    with use:
        yield settings, summary


class _Exclusive:
    """Called, it makes sure that no other process works in the cache until it is released."""

    def __init__(self, folder: CacheFolder) -> None:
        self._folder, self._lock = folder, None

    def __call__(self) -> None:
        self._lock = self._lock or Lock.take(self._folder.lock("use"))
        if self._lock is None:
            raise ValueError(
                f"Another process works in {self._folder.root} with other settings or data. Wait for it, or pass "
                "the same settings to share its work."
            )

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _only_adds(old: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether what is new are families, which does not disturb processes that compute others."""
    families = old.get("families", {}).items() <= settings["families"].items()
    return families and old.items() <= {**settings, "families": old.get("families")}.items()


def _settings(folder: CacheFolder, command: CacheCommand) -> dict[str, Any]:
    """cache.json as this command makes it: families it does not compute stay as they are."""
    old = folder.read_settings() if folder.settings.is_file() else {"families": {}}
    families = {family: _family_settings(family, command) for family in command.families}
    settings = old | {"schema": SCHEMA, "unit_size": command.unit_size, "families": old["families"] | families}
    if {"video", "references"} & set(families):
        config = vae_config(command.model, command.revision)
        settings["vae"] = {name: config[name] for name in ("latents_mean", "latents_std")}
    return settings


def _family_settings(family: str, command: CacheCommand) -> dict[str, Any]:
    if family == "teacher":
        model = model_identity(command.teacher, revision=command.teacher_revision)
    else:
        model = model_identity(command.model, PARTS[family], command.revision)
    dtypes = {"dtype": command.dtype}
    if family in ("video", "references"):
        dtypes["vae_dtype"] = command.vae_dtype
    ingredients = family_ingredients(family, command.recipe, model, dtypes)
    return {"ingredients": ingredients, "variants": command.variants if family in ("references", "teacher") else 1}


def _summary(folder: CacheFolder, command: CacheCommand, started: float, guard: _Exclusive) -> dict[str, Any]:
    """The plan of the dataset as it is now; of processes that start together, one reads it for all."""
    marker = folder.lock("planned")
    wanted = digest([repr(command.source), command.limit, command.unit_size, os.getcwd()])
    if marker.is_file() and folder.summary.is_file():
        made = json.loads(marker.read_text("utf-8"))
        if made["of"] == wanted and made["time"] > started:
            return folder.read_summary()
    items = read_source(command.source)
    summary = make_plan(folder, _first_samples(items, command.limit), command.unit_size, guard)
    write_text(marker, canonical({"of": wanted, "time": time.time()}))
    return summary


def _first_samples(items: Iterable[Any], limit: int | None) -> Iterator[Any]:
    count = 0
    for item in items:
        yield item
        count += isinstance(item, Sample)
        if count == limit:
            return


def _say_what_is_stale(
    folder: CacheFolder, families: Iterable[str], settings: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    for family in families:
        for reason, count in stale_items(folder, family, settings["families"][family], summary).items():
            logger.info("%d items of `%s` are stale: %s", count, family, reason)


def stale_items(folder: CacheFolder, family: str, made: Mapping[str, Any], summary: Mapping[str, Any]) -> Counter[str]:
    """How many recorded items are no longer what their samples need, by reason."""
    counts = Counter()
    for unit, plan in family_units(family, summary).items():
        header = read_header(folder.record(family, unit))
        if header is None:
            continue
        if header.ingredients != made["ingredients"]:
            counts[_difference(header.ingredients, made["ingredients"])] += header.items
        elif header.plan != plan:
            planned = {p.sample.id: sample_digests(family, p) for p in read_plan(folder, unit)}
            for outcome in read_outcomes(folder.record(family, unit)):
                files, annotation = planned.get(outcome.id, (outcome.files, outcome.annotation))
                names = [("files", files != outcome.files), ("annotation", annotation != outcome.annotation)]
                if reason := "; ".join(f"{name} changed" for name, changed in names if changed):
                    counts[reason] += len(outcome.items)
    return +counts


def _difference(old: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    parts = []
    for name in sorted(set(old) | set(current)):
        before, now = old.get(name), current.get(name)
        if before != now:
            digests = any(str(value).startswith("sha256:") for value in (before, now))
            parts.append(f"{name} changed" + ("" if digests else f" from {before} to {now}"))
    return "; ".join(parts)
