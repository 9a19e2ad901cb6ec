"""
What a cache will hold: the dataset's samples in units, and the ingredients of every item, which its key is made of.

The identity of a sample's files is their names, sizes and times of modification (mtime_ns): to read millions of videos
through takes as long as to encode them. So a dataset may be moved, or copied with its times (`cp -p`, `rsync -a`),
without a new cache; a file that is touched is encoded again.
"""

import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from refalign.files import new_file
from refalign_training.cache.files import CacheFolder, canonical, digest, write_text
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Fault, Reference, Sample, View
from refalign_training.data.sample_files import read_sample, write_sample


ROOT = Path("/")  # plans hold absolute paths
ENCODING_SCHEMAS = {"video": 1, "references": 1, "text": 1, "teacher": 1}  # raised when our code gives other numbers

# What of a recipe a family's items do not depend on; by what is new to a recipe, all change
_WITHOUT = {
    "video": {"cross_probability", "augment"},
    "references": {"num_frames", "stride"},
    "teacher": {"num_frames", "stride"},
}


@dataclass(frozen=True)
class Planned:
    """A sample of the plan."""

    sample: Sample
    files: Mapping[str, list[int] | None]
    """Size and mtime_ns of its files by path; `None`: there is no such file."""


def family_ingredients(family: str, recipe: Recipe, model: str, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """What all items of a family are made with: recipe, model and dtypes, as far as it depends on them."""
    ingredients = {"family": family, "schema": ENCODING_SCHEMAS[family], "model": model, **dtypes}
    if family == "text":
        return ingredients
    fields = dataclasses.asdict(recipe)
    return ingredients | {name: value for name, value in fields.items() if name not in _WITHOUT[family]}


def sample_digests(family: str, planned: Planned) -> tuple[str, str]:
    """Digests of a sample's files and of what the dataset says about it, as far as the family depends on them."""
    sample = planned.sample
    if family == "text":
        return text_digests(sample.prompts)
    if family == "video":
        paths, annotation = [sample.clip.path], dataclasses.asdict(sample.clip)
    else:
        views = [view for reference in sample.references for view in _views(reference)]
        paths, annotation = [view.path for view in views], [dataclasses.asdict(r) for r in sample.references]
    files = sorted({(path.name, *(planned.files[str(path)] or (None, None))) for path in paths}, key=repr)
    # By name alone, so that a dataset that is moved keeps its keys
    text = json.dumps([sample.id, annotation], sort_keys=True, default=lambda path: path.name)
    return digest(files), digest(text)


def text_digests(prompts: Sequence[str]) -> tuple[str, str]:
    """[`sample_digests`] of captions alone."""
    return digest([]), digest(prompts)


def item_ingredients(ingredients: Mapping[str, Any], files: str, annotation: str, variant: int) -> dict[str, Any]:
    """What an item is made with; its key is the digest of it."""
    return {**ingredients, "files": files, "annotation": annotation, "variant": variant}


def _views(reference: Reference) -> list[View]:
    return [view for view in (reference.view, *reference.cross) if view is not None]


def make_plan(folder: CacheFolder, items: Iterable[Sample | Fault], unit_size: int) -> None:
    """
    Writes what changed of the plan and its summary: `units` (digests), `samples`, `faults` (counts). Memory does not
    grow with the dataset. No other process may work in the cache.

    Args:
        folder (`CacheFolder`): the cache.
        items (`Iterable`): what a dataset's reader gives.
        unit_size (`int`): samples a unit.
    """
    units, count = [], 0
    faults: Counter[str] = Counter()
    with (
        new_file(folder.faults, overwrite=True) as file,
        file.open("w", encoding="utf-8", errors="surrogatepass") as f,
    ):
        samples = _samples(items, f, faults)
        while unit := list(itertools.islice(samples, unit_size)):
            lines = "".join(f"{line}\n" for line in map(_plan_line, unit))
            _write_if_new(folder, folder.plan(f"{len(units):06d}"), lines)
            units.append(digest(lines))
            count += len(unit)
    for path in folder.summary.parent.glob("[0-9]*.jsonl"):
        if int(path.stem) >= len(units):
            folder.summary.unlink(missing_ok=True)
            path.unlink()
    summary = {"units": units, "samples": count, "faults": dict(sorted(faults.items()))}
    _write_if_new(folder, folder.summary, canonical(summary))


def _write_if_new(folder: CacheFolder, path: Path, text: str) -> None:
    try:
        if path.read_text("utf-8", "surrogatepass") == text:
            return
    except (FileNotFoundError, ValueError):
        pass
    folder.summary.unlink(missing_ok=True)  # until all is written, there is no plan
    write_text(path, text)


def read_plan(folder: CacheFolder, unit: str) -> Iterator[Planned]:
    """The samples of a unit."""
    with folder.plan(unit).open(encoding="utf-8", errors="surrogatepass") as lines:
        for line in lines:
            record = json.loads(line)
            yield Planned(read_sample(json.dumps(record["sample"]), ROOT), record["files"])


def _samples(items: Iterable[Sample | Fault], listed: TextIO, counts: Counter[str]) -> Iterator[Sample]:
    """The samples alone; faults are listed and counted."""
    for item in items:
        if isinstance(item, Sample):
            yield item
        else:
            listed.write(f"{canonical(dataclasses.asdict(item))}\n")
            counts[f"{item.lost}: {item.kind}"] += 1


def _plan_line(sample: Sample) -> str:
    sample = _with_absolute_paths(sample)
    paths = {sample.clip.path, *(view.path for r in sample.references for view in _views(r))}
    files = {str(path): _identity(path) for path in paths}
    return canonical({"sample": json.loads(write_sample(sample, ROOT)), "files": files})


def _with_absolute_paths(sample: Sample) -> Sample:
    def absolute(part: Any) -> Any:
        return None if part is None else dataclasses.replace(part, path=Path(os.path.abspath(part.path)))

    references = tuple(
        dataclasses.replace(r, view=absolute(r.view), cross=tuple(map(absolute, r.cross))) for r in sample.references
    )
    return dataclasses.replace(sample, clip=absolute(sample.clip), references=references)


def _identity(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
