"""
Computes what a cache lacks.

Processes of torchrun or accelerate (RANK, WORLD_SIZE) take every so many'th sample and know nothing of each other. The
one that finds everything done at its end, by whomever, writes samples.parquet.
"""

import dataclasses
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from pyarrow import parquet
from tqdm.auto import tqdm

from refalign.files import new_file, read_json
from refalign_training.cache import cluster, encoders
from refalign_training.cache.command import OPTIONS, CacheCommand, write_options
from refalign_training.cache.holders import remove_leftovers, root_lock, writing
from refalign_training.cache.items import RECIPE, Items, digest, text_key, write_json
from refalign_training.cache.plan import Plan
from refalign_training.cache.reader import (
    BUCKET,
    FAILED,
    FORMAT,
    INDEX,
    OF_REFERENCES,
    PLAN,
    SIZES,
    check_format,
    open_families,
    open_index,
)
from refalign_training.data.decoding import decoding
from refalign_training.data.sample import Unusable


ROWS = 10_000  # of samples.parquet are written at once
SCHEMAS = {
    "video": 2,
    "references": 2,
    "text": 1,
    "teacher": 2,
    "pictures": 1,
}  # raised when our code gives other numbers

# What of the pixels' recipe a family's items do not depend on
_WITHOUT = {
    "video": {"cross_probability", "augment", "long_edge"},
    "references": {"num_frames", "stride"},
    "teacher": {"num_frames", "stride"},
    "pictures": {"num_frames", "stride", "augment", "long_edge"},
}


class _Unfinished(Exception):
    """Items are missing that other processes compute."""


def fill(command: CacheCommand) -> int:
    """Computes what the cache lacks, alone or as one of several processes. Returns 1 if no sample can be used."""
    root = command.output
    _check_output(root)
    models = encoders.fetch_models(
        command.families, command.model, command.teacher, command.revision, command.teacher_revision
    )
    command = encoders.with_long_edge(command)
    families = open_index(root)[0]["families"] if (root / INDEX).exists() else {}
    recipes = {}
    for family in command.families:
        recipe = _recipe(family, command, models[family])
        variants = command.variants if family in OF_REFERENCES else 1
        families[family] = {"folder": f"{family}-{digest(recipe)[:12]}", "variants": variants}
        recipes[root / families[family]["folder"]] = recipe
    if not command.allow_changes:
        _check_changes(root, recipes.values())
    remove_leftovers(root)
    with writing(root):
        for folder, recipe in recipes.items():
            write_json(folder / RECIPE, recipe)
        write_options(command, root / OPTIONS)
        with tempfile.TemporaryFile("w+", encoding="utf-8", dir=root) as file:
            plan = Plan(file, command, families)
            write_json(root / PLAN, plan.header)
            for family in command.families:
                items = Items(root / families[family]["folder"])
                compute = cluster.compute if command.ray else _compute
                compute(family, command, models[family], items, plan)
            return _finish(root, plan, command.families)


def _check_output(root: Path) -> None:
    check_format(root)
    root.mkdir(parents=True, exist_ok=True)
    # The plan is looked for last: a process that starts beside this one writes it
    if any(root.glob("[!.]*")) and not any(root.glob(f"*/{RECIPE}")) and not (root / PLAN).exists():
        raise ValueError(f"{root} holds other things than a cache. Name a new folder as --output.")


def _check_changes(root: Path, recipes: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError if the last command, finished or not, made a family in another way."""
    if not (root / PLAN).exists():
        return
    changes = {}
    families = open_families(root, read_json(root / PLAN)["families"])
    for recipe in recipes:
        folder = families[recipe["family"]].folder if recipe["family"] in families else root
        if not (folder / RECIPE).exists():  # it is new, or was removed to be made again
            continue
        old = read_json(folder / RECIPE)
        for name in old.keys() | recipe.keys():
            if old.get(name) != recipe.get(name):
                changes[name] = f"{name} (there {old.get(name)!s:.20}, now {recipe.get(name)!s:.20})"
    if changes:
        raise ValueError(
            f"{root} was made with other options: {', '.join(sorted(changes.values()))}. Leave them out, name another "
            "folder, or pass --allow-changes: what they concern is computed anew, beside what is there."
        )


def _recipe(family: str, command: CacheCommand, model: encoders.Model) -> dict[str, Any]:
    """What all items of a family are made with."""
    recipe = {"family": family, "schema": SCHEMAS[family], "model": model.identity, "dtype": command.dtype}
    if family in ("video", "references"):
        config = encoders.vae_config(model.folder)
        recipe["vae_dtype"] = command.vae_dtype
        recipe["vae"] = {"latents_mean": config["latents_mean"], "latents_std": config["latents_std"]}
    if family == "text":
        prefix = encoders.reference_prefix(model.folder)
        return recipe | ({"prefix": prefix} if prefix else {})
    recipe |= dataclasses.asdict(command.recipe)
    for name in _WITHOUT[family]:
        del recipe[name]
    if recipe.get("long_edge") is None:  # as caches were made before there was one
        recipe.pop("long_edge", None)
    return recipe


# -- Items ------------------------------------------------------------------------------------------------------------


def _compute(family: str, command: CacheCommand, model: encoders.Model, items: Items, plan: Plan) -> None:
    """Decodes in worker processes while this one encodes."""
    encoder = None
    workers = 0 if family == "text" else command.workers
    bar = tqdm(plan.tasks(family), desc=family, unit="item", smoothing=0.05)
    missing = (task for task in bar if items.lacks(task.key, command.retry_failed))
    with bar, decoding(family, command.recipe, missing, workers) as results:
        while batch := list(itertools.islice(results, encoders.BATCH_SIZES[family])):
            encoder = encoder or encoders.make_encoder(family, command, model)
            for task, outcome in encoders.encode(family, encoder, batch):
                items.write(task, outcome)


# -- The end ----------------------------------------------------------------------------------------------------------


def _finish(root: Path, plan: Plan, computed: Sequence[str]) -> int:
    """Writes samples.parquet and failed.jsonl, if nothing is missing, and says how it went."""
    counts: Counter[str] = Counter()
    # With the lock: the process that comes last to it finds what all others have done
    with root_lock(root):
        try:
            with new_file(root / FAILED, overwrite=True) as file, file.open("w", encoding="utf-8") as failed:
                write_index(root, plan.header, _rows(root, plan, computed, failed, counts))
        except _Unfinished:
            print(f"{root}: this process is done; others, or the same command again, do the rest.")
            return 0
    print(f"{root}: {counts['complete']} of {plan.samples} samples are complete: {', '.join(computed)}.")
    if plan.is_limited:
        print("These are the dataset's first ones, as --limit says. --limit None takes all.")
    if counts["failed"]:
        print(f"{counts['failed']} failures, faults of the dataset and lost references: see {root / FAILED}.")
    return 0 if counts["complete"] else 1


def _rows(
    root: Path, plan: Plan, computed: Sequence[str], failed: TextIO, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The rows of samples.parquet; what failed is written to `failed`."""
    families = open_families(root, plan.families)
    if "text" in computed and families["text"].find(text_key([""])) is None:
        raise _Unfinished
    failed_keys: set[str] = set()
    for record in plan.records():
        lines = [record["fault"]] if "fault" in record else []
        if not lines:
            infos = {}
            row = {"id": record["id"], "prompts": record["prompts"]}
            for family, items in families.items():
                row[family], infos[family] = _find(items, record, family, family in computed, lines)
            counts["complete"] += None not in map(row.get, computed)
            yield row | _shape(infos)
        for line in lines:
            failed.write(f"{json.dumps(line)}\n")
            counts["failed"] += 1
            failed_keys.add(line.get("key", ""))
    for items in families.values():
        items.forget_failures(failed_keys)


def _find(
    items: Items, record: Mapping[str, Any], family: str, is_computed: bool, lines: list[dict[str, Any]]
) -> tuple[list[bytes | None] | None, list[dict[str, Any] | None]]:
    """By variant, where a sample's items lie (`None` if there are none) and what is kept beside their tensors."""
    places, infos = [], []
    for key in record["keys"][family]:
        place, info = items.find(key) or (None, None)
        places.append(place)
        infos.append(info)
        if info is not None:
            for lost in info.get("lost", ()):
                lines.append(items.failure(key, record["id"], "reference", Unusable(*lost)))
        elif failure := items.find_failure(key):
            lines.append(failure)
        elif is_computed:
            raise _Unfinished
    return places if any(places) else None, infos


def _shape(infos: Mapping[str, Sequence[dict[str, Any] | None]]) -> dict[str, Any]:
    """The columns of a sample's bucket, and by variant the numbers of its references' subjects."""
    video = next(filter(None, infos.get("video", ())), {"frames": 0, "size": (0, 0)})
    families = [infos[family] for family in OF_REFERENCES if any(infos.get(family, ()))]
    subjects = list(map(_agreed, zip(*families, strict=False)))
    count = next((len(numbers) for numbers in subjects if numbers is not None), 0)
    for variant, numbers in enumerate(subjects):
        if numbers is not None and len(numbers) != count:
            subjects[variant] = None
    bucket = (video["frames"], *video["size"], count)
    first = next(filter(None, families[0]), {}) if families else {}
    sizes = list(itertools.chain(*first.get("sizes", ())))
    return dict(zip(BUCKET, bucket, strict=True)) | {"subjects": subjects or [[]], SIZES: sizes}


def _agreed(infos: Sequence[dict[str, Any] | None]) -> list[int] | None:
    """Numbers of the references' subjects; `None` if an item is missing or the families saw other references."""
    first = infos[0]
    if first is None:
        return None
    for info in infos:
        if info is None or (info["subjects"], info["origins"]) != (first["subjects"], first["origins"]):
            return None
    numbers: dict[str, int] = {}
    return [numbers.setdefault(subject, len(numbers)) for subject in first["subjects"]]


def write_index(root: Path, header: Mapping[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Writes samples.parquet."""
    columns = dict.fromkeys(("prompts", *BUCKET), pa.int32())
    columns |= dict.fromkeys(header["families"], pa.list_(pa.binary()))
    columns |= {"id": pa.string(), "subjects": pa.list_(pa.list_(pa.int32())), SIZES: pa.list_(pa.int32())}
    schema, rows = pa.schema(columns), iter(rows)
    with new_file(root / INDEX, overwrite=True) as file, parquet.ParquetWriter(file, schema) as writer:
        writer.add_key_value_metadata({"cache": json.dumps({**header, "format": FORMAT})})
        while chunk := list(itertools.islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(chunk, schema))
