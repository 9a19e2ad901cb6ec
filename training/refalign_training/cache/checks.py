"""How far a cache is, whether it is whole, and what of it can go: `--status`, `--verify`, `--prune`."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from refalign.files import new_file
from refalign_training.cache.files import (
    FAMILIES,
    CacheFolder,
    Failure,
    Header,
    Item,
    Lock,
    Outcome,
    canonical,
    digest,
    done,
    read_header,
    read_outcomes,
    write_record,
)
from refalign_training.cache.items import checksum, find_item, read_index, read_item, write_index
from refalign_training.cache.plan import item_ingredients, read_plan, sample_digests


# -- What is derived from the records ---------------------------------------------------------------------------------


def collect(folder: CacheFolder) -> tuple[int, int]:
    """Writes quarantine.jsonl and the shards' indices from the plan's records. Returns the numbers of failures, and of
    samples that are lost by them."""
    families, units, count, lost = folder.read_settings()["families"], folder.units(), 0, set()
    with Lock.take(folder.lock("collect.lock"), wait=True):
        for family in families:
            if folder.shards(family).is_dir():
                write_index(folder.index(family), (_in_shards(folder.record(family, unit)) for unit in units))
        with new_file(folder.quarantine, overwrite=True) as file:
            with file.open("w", encoding="utf-8", errors="surrogatepass") as lines:
                for line in (line for f in families for unit in units for line in _failures(folder, f, unit)):
                    lines.write(f"{canonical(line)}\n")
                    count += 1
                    if line["lost"] == "sample":
                        lost.add(line["sample_id"])
    return count, len(lost)


def _in_shards(record: Path) -> list[tuple[str, int, Item]]:
    outcomes = read_outcomes(record)
    return [(outcome.id, v, item) for outcome in outcomes for v, item in enumerate(outcome.items) if item.shard]


def _failures(folder: CacheFolder, family: str, unit: str) -> Iterator[dict[str, Any]]:
    header = read_header(folder.record(family, unit))
    if header is None or not header.failures:
        return
    for outcome in read_outcomes(folder.record(family, unit)):
        failures = [("sample", outcome.failure)] if outcome.failure else [("reference", f) for f in outcome.lost()]
        key = failure_key(header.ingredients, outcome.files, outcome.annotation)
        for lost, failure in failures:
            yield {"family": family, "sample_id": outcome.id, "lost": lost, "key": key, **dataclasses.asdict(failure)}


def failure_key(ingredients: Mapping[str, Any], files: str, annotation: str) -> str:
    """What a failure belongs to: with another model, dtype, recipe or file, the sample is tried again by itself."""
    return digest([ingredients, files, annotation])


def read_failures(folder: CacheFolder, family: str) -> dict[str, Failure]:
    """The quarantined samples of a family by [`failure_key`]."""
    if not folder.quarantine.is_file():
        return {}
    failures = {}
    with folder.quarantine.open(encoding="utf-8", errors="surrogatepass") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off: the sample is tried again
            if record["family"] == family and record["lost"] == "sample":
                failures[record["key"]] = Failure(record["kind"], record["detail"])
    return failures


# -- Status -----------------------------------------------------------------------------------------------------------


def status(output: Path) -> int:
    """Prints how far each family is, and returns the exit code."""
    folder = CacheFolder(output)
    settings, summary = folder.read_settings(), folder.read_summary()
    print(f"{output}: {summary['samples']} samples in {len(summary['units'])} units.")
    for fault, count in summary["faults"].items():
        print(f"  {count} faults of the dataset cost a {fault} (see {folder.faults})")
    lines = [("family", "units", "items", "failed", "size", "left, by one process")]
    lines += [(family, *_progress(folder, family, made)) for family, made in settings["families"].items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    lock = Lock.take(folder.lock("cache.lock"))
    print("A process is at work on it." if lock is None else "No process is at work on it.")
    if lock is not None:
        lock.release()
    return 0


def _progress(folder: CacheFolder, family: str, made: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    units = folder.units()
    headers = [header for unit, plan in units.items() if (header := done(folder, family, unit, plan, made))]
    failures = sum((Counter(header.failures) for header in headers), Counter())
    failed = ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items())) or "0"
    size = f"{sum(header.size for header in headers) / 1e6:,.1f} MB"
    worked = [header.seconds for header in headers if header.computed]
    left = (len(units) - len(headers)) * sum(worked) / len(worked) if worked else None
    estimate = "none" if len(headers) == len(units) else "unknown" if left is None else f"{left / 3600:.1f} h"
    count = sum(header.items for header in headers)
    in_open_units = 0
    if len(headers) < len(units):
        in_open_units = sum(1 for _ in folder.items(family).glob("*/*.safetensors")) - count
    items = f"{count}+{in_open_units}" if in_open_units > 0 else f"{count}"
    return f"{len(headers)}/{len(units)}", items, failed, size, estimate


# -- Verify -----------------------------------------------------------------------------------------------------------


def verify(output: Path) -> int:
    """
    Reads every recorded item through, and returns 1 if any is broken. Those are listed, and no longer recorded: the
    next run computes them.
    """
    folder = CacheFolder(output)
    settings = folder.read_settings()
    with _alone(folder):
        paths = [(f, p) for f in settings["families"] for p in sorted(folder.records(f).glob("[!.]*.jsonl"))]
        broken = _verify_empty_prompt(folder)
        broken += sum(_verify_record(folder, family, path) for family, path in tqdm(paths, desc="verify", unit="unit"))
        if broken:
            collect(folder)
    print(f"{output}: {broken} broken items. " + ("The next run makes them anew." if broken else "All is whole."))
    return 1 if broken else 0


def _verify_record(folder: CacheFolder, family: str, path: Path) -> int:
    header, outcomes, broken = read_header(path), list(read_outcomes(path)), 0
    if header is None:
        print(f"{family}: the record {path} is damaged, and removed")
        path.unlink()
        return 1
    for number, outcome in enumerate(outcomes):
        bad = {item.key for item in outcome.items if _is_broken(folder, family, outcome, item)}
        if bad:
            whole = tuple(item for item in outcome.items if item.key not in bad)
            outcomes[number] = dataclasses.replace(outcome, items=whole)
            broken += len(bad)
    if broken:
        write_record(path, dataclasses.replace(header, plan=""), outcomes)
    return broken


def _is_broken(folder: CacheFolder, family: str, outcome: Outcome, item: Item) -> bool:
    path = folder.item(family, item)
    fault = _fault(path, item)
    if fault:
        print(f"{family} {outcome.id!r}: {fault}")
        if item.shard is None:
            path.unlink(missing_ok=True)  # else it would count as computed
    return bool(fault)


def _fault(path: Path, item: Item) -> str | None:
    try:
        tensors = read_item(path, item)
    except ValueError as error:
        return str(error)
    return None if checksum(item.key, tensors) == item.crc32 else f"item {item.key} is not what was written: {path}"


def _verify_empty_prompt(folder: CacheFolder) -> int:
    path = folder.empty_prompt
    if not path.is_file():
        return 0
    item = find_item(path)
    fault = f"{path} cannot be read" if item is None else _fault(path, item)
    if fault:
        print(f"the empty prompt: {fault}")
        path.unlink()
    return 1 if fault else 0


# -- Prune ------------------------------------------------------------------------------------------------------------


def prune(output: Path) -> int:
    """Removes items that no sample of the plan needs, and what killed processes left; returns the exit code."""
    folder = CacheFolder(output)
    settings = folder.read_settings()
    with _alone(folder):
        removed = [_remove(path) for path in _unfinished(folder)]
        for family in FAMILIES:
            removed += map(_remove, list(_unneeded(folder, family, settings["families"].get(family))))
        collect(folder)
    print(f"{output}: removed {len(removed)} files and folders, {sum(removed) / 1e6:,.1f} MB.")
    return 0


def _unneeded(folder: CacheFolder, family: str, made: Mapping[str, Any] | None) -> Iterator[Path]:
    """Records, items and tars of a family to remove. Units that are not done yet will find items of whatever plan."""
    keys, is_complete = _needed_keys(folder, family, made) if made else (set(), True)
    units, shards = folder.units(), set()
    for path in sorted(folder.records(family).glob("[!.]*.jsonl")):
        header: Header | None = read_header(path)
        if made and header and header.ingredients == made["ingredients"] and (path.stem in units or not is_complete):
            shards |= {item.shard for outcome in read_outcomes(path) for item in outcome.items if item.key in keys}
        else:
            yield path
    if not is_complete:
        shards |= {item.shard for item in read_index(folder.index(family)) if item.key in keys}
    yield from (p for p in folder.items(family).glob("*/*.safetensors") if p.stem not in keys)
    yield from (p for p in folder.shards(family).glob("[!.]*.tar") if p.name not in shards)


def _needed_keys(folder: CacheFolder, family: str, made: Mapping[str, Any]) -> tuple[set[str], bool]:
    """The keys of all items of the plan, whether they are there or not, and whether all units are done."""
    keys, is_complete = set(), True
    for unit, plan in folder.units().items():
        if done(folder, family, unit, plan, made):
            keys |= {item.key for outcome in read_outcomes(folder.record(family, unit)) for item in outcome.items}
            continue
        is_complete = False
        for planned in read_plan(folder, unit):
            digests = sample_digests(family, planned)
            variants = range(made["variants"])
            keys |= {digest(item_ingredients(made["ingredients"], *digests, variant)) for variant in variants}
    return keys, is_complete


def _unfinished(folder: CacheFolder) -> Iterator[Path]:
    """What processes were writing beside its place when they were killed: all of it is hidden."""
    for place, folders, files in os.walk(folder.root, topdown=True):
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if name not in hidden]
        yield from (Path(place) / name for name in (*hidden, *(f for f in files if f.startswith("."))))


def _remove(path: Path) -> int:
    """Removes a file or folder and returns its size in bytes."""
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shutil.rmtree(path)
    else:
        size = path.stat().st_size
        path.unlink()
    return size


@contextmanager
def _alone(folder: CacheFolder) -> Iterator[None]:
    """While no other process works in the cache. ValueError if one does."""
    lock = Lock.take(folder.lock("cache.lock"))
    if lock is None:
        raise ValueError(f"Another process works in {folder.root}. Wait for it, or end it.")
    with lock:
        yield
