"""A cache's settings and plan: made from the command and the dataset, by one process for all that work together."""

import json
import logging
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from refalign_training.cache.command import CacheCommand
from refalign_training.cache.encoders import Models, vae_config
from refalign_training.cache.files import SCHEMA, CacheFolder, Lock, canonical, digest, write_text
from refalign_training.cache.plan import family_ingredients, make_plan
from refalign_training.data.sample import Sample
from refalign_training.data.source import read_source


logger = logging.getLogger(__name__)

ATTEMPTS = 6


@contextmanager
def planned(folder: CacheFolder, command: CacheCommand, models: Models, started: float) -> Iterator[dict[str, Any]]:
    """
    The settings of the command's families. They and the plan stay as they are until the block ends.

    Who has the cache's lock alone may change them; who works holds it with others. A process that finds others at
    work takes their plan, without a look at the dataset.
    """
    families = {family: _family_settings(family, command, models) for family in command.families}
    plan_of = digest([repr(command.source), command.limit, command.unit_size, os.getcwd()])
    lock = _shared_lock(folder, command, families, plan_of, started)
    with lock:
        yield families


def _shared_lock(
    folder: CacheFolder, command: CacheCommand, families: Mapping[str, Any], plan_of: str, started: float
) -> Lock:
    for _ in range(ATTEMPTS):
        if alone := Lock.take(folder.lock("cache.lock")):
            with alone:
                _write_settings(folder, families)
                _write_plan(folder, command, plan_of, started)
        lock = Lock.take(folder.lock("cache.lock"), shared=True, wait=True)
        if _holds(folder, families, plan_of):
            return lock
        lock.release()
        time.sleep(random.uniform(0.0, 0.1))  # several that find each other here must not do so again
    raise ValueError(
        f"Another process works in {folder.root} with other settings, families or data. Wait for it, or pass the same "
        "to share its work."
    )


def _holds(folder: CacheFolder, families: Mapping[str, Any], plan_of: str) -> bool:
    """Whether settings and plan are those of this command."""
    if not (folder.settings.is_file() and folder.summary.is_file()):
        return False
    return folder.read_settings()["families"].items() >= families.items() and _plan_marker(folder).get("of") == plan_of


def _family_settings(family: str, command: CacheCommand, models: Models) -> dict[str, Any]:
    dtypes, settings = {"dtype": command.dtype}, {}
    if family in ("video", "references"):
        dtypes["vae_dtype"] = command.vae_dtype
        config = vae_config(models.pipeline)
        settings["vae"] = {name: config[name] for name in ("latents_mean", "latents_std")}
    variants = command.variants if family in ("references", "teacher") else 1
    ingredients = family_ingredients(family, command.recipe, models.identities[family], dtypes)
    return {"ingredients": ingredients, "variants": variants, **settings}


def _write_settings(folder: CacheFolder, families: Mapping[str, Any]) -> None:
    """Families that the command does not compute stay as they are."""
    old = folder.read_settings() if folder.settings.is_file() else {"schema": SCHEMA, "families": {}}
    for family in families.keys() & old["families"].keys():
        if changes := _difference(old["families"][family]["ingredients"], families[family]["ingredients"]):
            logger.info("`%s` is computed anew: %s", family, changes)
    settings = old | {"families": {**old["families"], **families}}
    if old != settings:
        write_text(folder.settings, json.dumps(settings, indent=2, ensure_ascii=False))


def _difference(old: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    parts = []
    for name in sorted(set(old) | set(current)):
        before, now = old.get(name), current.get(name)
        if before != now:
            digests = any(str(value).startswith("sha256:") for value in (before, now))
            parts.append(f"{name} changed" + ("" if digests else f" from {before} to {now}"))
    return "; ".join(parts)


def _write_plan(folder: CacheFolder, command: CacheCommand, plan_of: str, started: float) -> None:
    """The plan of the dataset as it is now, unless a process that was launched with this one has just made it."""
    made, launch = _plan_marker(folder), _launch()
    is_new = made.get("time", 0.0) > started or (launch is not None and made.get("launch") == launch)
    if made.get("of") == plan_of and is_new and folder.summary.is_file():
        return
    items = read_source(command.source)
    folder.lock("planned").unlink(missing_ok=True)
    make_plan(folder, _first_samples(items, command.limit), command.unit_size)
    write_text(folder.lock("planned"), canonical({"of": plan_of, "time": time.time(), "launch": launch}))


def _plan_marker(folder: CacheFolder) -> dict[str, Any]:
    try:
        return json.loads(folder.lock("planned").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _launch() -> str | None:
    """What the processes of one launch of torchrun have in common and those of the next have not, if it tells."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else f"{name} {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _first_samples(items: Iterable[Any], limit: int | None) -> Iterator[Any]:
    count = 0
    for item in items:
        yield item
        count += isinstance(item, Sample)
        if count == limit:
            return
