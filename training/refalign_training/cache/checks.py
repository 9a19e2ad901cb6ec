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

import torch
from tqdm.auto import tqdm

from refalign_training.cache.files import (
    FAMILIES,
    CacheFolder,
    Header,
    Item,
    Lock,
    Outcome,
    canonical,
    digest,
    family_units,
    read_header,
    read_index,
    read_item,
    read_outcomes,
    write_index,
    write_record,
    write_text,
)


# -- What is derived from the records ---------------------------------------------------------------------------------


def collect(folder: CacheFolder) -> int:
    """Writes quarantine.jsonl and the shards' indices from the plan's records, and returns the count of failures."""
    if not _is_outdated(folder):
        return sum(1 for _ in folder.quarantine.open(encoding="utf-8", errors="surrogatepass"))
    summary, lines = folder.read_summary(), []
    for family in folder.read_settings()["families"]:
        rows = []
        for unit in family_units(family, summary):
            path = folder.record(family, unit)
            for outcome in read_outcomes(path) if path.is_file() else ():
                if outcome.failure:
                    lines.append(_quarantined(family, outcome))
                rows += [(outcome.id, v, item) for v, item in enumerate(outcome.items) if item.shard]
        if rows or folder.index(family).is_file():
            write_index(folder.index(family), rows)
    write_text(folder.quarantine, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _is_outdated(folder: CacheFolder) -> bool:
    """Whether the plan or a record has been written since; of records, their folder's time tells."""
    if not folder.quarantine.is_file():
        return True
    sources = [folder.summary, *(folder.records(family) for family in FAMILIES)]
    collected = folder.quarantine.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns >= collected for path in sources if path.exists())


def _quarantined(family: str, outcome: Outcome) -> str:
    names = {"sample_id": outcome.id, "files": outcome.files, "annotation": outcome.annotation}
    return canonical({"family": family, **names, **dataclasses.asdict(outcome.failure)})


# -- Status -----------------------------------------------------------------------------------------------------------


def status(output: Path) -> int:
    """Prints how far each family is, and returns the exit code."""
    folder = CacheFolder(output)
    settings, summary = folder.read_settings(), folder.read_summary()
    print(f"{output}: {summary['samples']} samples in {len(summary['units'])} units.")
    for fault, count in summary["faults"].items():
        print(f"  {count} faults of the dataset cost a {fault} (see {folder.faults})")
    lines = [("family", "units", "items", "failed", "size", "left, by one process")]
    for family, made in settings["families"].items():
        lines.append((family, *_progress(folder, family, made, summary)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _progress(
    folder: CacheFolder, family: str, made: Mapping[str, Any], summary: Mapping[str, Any]
) -> tuple[str, str, str, str, str]:
    units = family_units(family, summary)
    headers = [h for unit, plan in units.items() if (h := done(folder, family, unit, plan, made))]
    failures = sum((Counter(header.failures) for header in headers), Counter())
    failed = ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items())) or "0"
    size = f"{sum(header.size for header in headers) / 1e6:,.1f} MB"
    worked = [header.seconds for header in headers if header.computed]
    left = (len(units) - len(headers)) * sum(worked) / len(worked) if worked else None
    estimate = "none" if len(headers) == len(units) else "unknown" if left is None else f"{left / 3600:.1f} h"
    return f"{len(headers)}/{len(units)}", f"{sum(h.items for h in headers)}", failed, size, estimate


def done(folder: CacheFolder, family: str, unit: str, plan: str, made: Mapping[str, Any]) -> Header | None:
    """The header of a unit's record, if it is up to date."""
    header = read_header(folder.record(family, unit))
    wanted = (plan, made["ingredients"], made["variants"])
    return header if header and (header.plan, header.ingredients, header.variants) == wanted else None


# -- Verify -----------------------------------------------------------------------------------------------------------


def verify(output: Path) -> int:
    """
    Reads every recorded item through, and returns 1 if any is broken. Those are listed, and no longer recorded: the
    next run computes them.
    """
    folder = CacheFolder(output)
    settings = folder.read_settings()
    with _alone(folder):
        paths = [(f, p) for f in settings["families"] for p in sorted(folder.records(f).glob("*.jsonl"))]
        broken = sum(_verify_record(folder, family, path) for family, path in tqdm(paths, desc="verify", unit="unit"))
        if broken:
            collect(folder)
    print(f"{output}: {broken} broken items. " + ("The next run makes them anew." if broken else "All is whole."))
    return 1 if broken else 0


def _verify_record(folder: CacheFolder, family: str, path: Path) -> int:
    header, outcomes, broken = read_header(path), list(read_outcomes(path)), 0
    for number, outcome in enumerate(outcomes):
        faults = [(item, fault) for item in outcome.items if (fault := _fault(folder, family, item))]
        for item, fault in faults:
            print(f"{family} {outcome.id!r}: {fault}")
            if item.shard is None:
                folder.item(family, item.key).unlink(missing_ok=True)  # else it would count as computed
        if faults:
            bad = {item.key for item, _ in faults}
            whole = tuple(item for item in outcome.items if item.key not in bad)
            outcomes[number] = dataclasses.replace(outcome, items=whole)
            broken += len(faults)
    if broken:
        write_record(path, dataclasses.replace(header, plan=""), outcomes)
    return broken


def _fault(folder: CacheFolder, family: str, item: Item) -> str | None:
    try:
        tensors, metadata = read_item(folder, family, item)
    except ValueError as error:
        return str(error)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != item.shapes:
        return f"item {item.key} has shapes {shapes} instead of {item.shapes}"
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        return f"item {item.key} holds values that are not finite"
    if _digest_of_text(metadata["ingredients"]) != item.key:
        return f"item {item.key} is made of other ingredients: {metadata['ingredients']}"
    return None


def _digest_of_text(ingredients: str) -> str:
    return digest(json.loads(ingredients))


# -- Prune ------------------------------------------------------------------------------------------------------------


def prune(output: Path) -> int:
    """Removes items that no record needs, and what killed processes left; returns the exit code."""
    folder = CacheFolder(output)
    settings, summary = folder.read_settings(), folder.read_summary()
    with _alone(folder):
        removed = [_remove(path) for path in _unfinished(folder)]
        for family in FAMILIES:
            removed += map(_remove, _unneeded(folder, family, settings["families"].get(family), summary))
        collect(folder)
    print(f"{output}: removed {len(removed)} files and folders, {sum(removed) / 1e6:,.1f} MB.")
    return 0


def _unneeded(
    folder: CacheFolder, family: str, made: Mapping[str, Any] | None, summary: Mapping[str, Any]
) -> Iterator[Path]:
    """
    Records and items of a family to remove. While the family is not complete, the items of records of earlier plans
    stay if they are made with the same ingredients: samples that have moved to other units will find them.
    """
    units = family_units(family, summary) if made else {}
    complete = made is not None and all(done(folder, family, unit, plan, made) for unit, plan in units.items())
    keys, shards = set(), set()
    for path in sorted(folder.records(family).glob("*.jsonl")):
        header = read_header(path)
        if made and header.ingredients == made["ingredients"] and (path.stem in units or not complete):
            items = [item for outcome in read_outcomes(path) for item in outcome.items]
            keys |= {item.key for item in items if item.shard is None}
            shards |= {item.shard for item in items if item.shard}
        else:
            yield path
    if made and not complete:
        shards |= {shard for _, shard, *_ in read_index(folder.index(family))}
    yield from (p for p in (folder.root / "items" / family).glob("*/*.safetensors") if p.stem not in keys)
    yield from (p for p in folder.shards(family).glob("[!.]*.tar") if p.name not in shards)


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
    plan = Lock.take(folder.lock("plan"))
    use = plan and Lock.take(folder.lock("use"))
    if use is None:
        if plan is not None:
            plan.release()
        raise ValueError(f"Another process works in {folder.root}. Wait for it, or end it.")
    with plan, use:
        yield
