"""
Computes what a cache lacks.

Processes of torchrun or accelerate (RANK, WORLD_SIZE) take every so many'th sample and know nothing of each other. The
one that finds everything done at its end, by whomever, writes samples.parquet.
"""

import dataclasses
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import torch
from filelock import FileLock
from pyarrow import parquet
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from refalign.devices import find_device
from refalign.files import new_file
from refalign_training.cache import encoders
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.plan import ROOT, Plan
from refalign_training.cache.reader import (
    BUCKET,
    FAILED,
    INDEX,
    PLAN,
    RECIPE,
    check_format,
    digest,
    item_path,
    open_index,
    text_key,
)
from refalign_training.data.decoding import Decoded, Task, decoding
from refalign_training.data.sample import Clip, Sample, Unusable
from refalign_training.data.sample_files import read_sample


ROWS = 10_000  # of samples.parquet are written at once
SCHEMAS = {"video": 1, "references": 1, "text": 1, "teacher": 1}  # raised when our code gives other numbers
NOT_FINITE = {"video": "video", "references": "image", "teacher": "image", "text": "not readable"}
NOT_COMPUTED = "not computed yet"
EMPTY_PROMPT = Sample("the empty prompt", ("",), Clip(Path()), (), "", 0)

# What of the pixels' recipe a family's items do not depend on
_WITHOUT = {
    "video": {"cross_probability", "augment"},
    "references": {"num_frames", "stride"},
    "teacher": {"num_frames", "stride"},
}

# (folder of the family, key): the line of failed.jsonl
Failures = dict[tuple[str, str], dict[str, Any]]
# A task and what became of it; the second is tensors with what is kept beside them, or why there are none
Outcome = tuple[Task, tuple[dict[str, torch.Tensor], Mapping[str, Any]] | Unusable]


class _Unfinished(Exception):
    """Items are missing that other processes compute."""


def fill(command: CacheCommand) -> int:
    """Computes what the cache lacks, alone or as one of several processes. Returns 1 if no sample can be used."""
    root = command.output
    _check_output(root)
    models = encoders.fetch_models(
        command.families, command.model, command.teacher, command.revision, command.teacher_revision
    )
    families = open_index(root)[0]["families"] if (root / INDEX).exists() else {}
    recipes = {family: _recipe(family, command, models) for family in command.families}
    for family, recipe in recipes.items():
        variants = command.variants if family in ("references", "teacher") else 1
        families[family] = {"folder": f"{family}-{digest(recipe)[:12]}", "variants": variants}
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=root) as file:
        plan = Plan(file, command, families)
        _write_json(root / PLAN, plan.header)
        failures = read_failures(root)
        for family, recipe in recipes.items():
            store = Store(root / families[family]["folder"])
            _write_json(store.folder / RECIPE, recipe)
            tasks = Tasks(plan, family, store, failures, command.retry_failed)
            if len(tasks):
                _compute(family, command, models, store, tasks)
        return _finish(root, plan, command.families)


def _check_output(root: Path) -> None:
    check_format(root)
    root.mkdir(parents=True, exist_ok=True)
    others = [path for path in root.iterdir() if not path.name.startswith(".")]
    if others and not (root / PLAN).exists():  # looked for last: a process that starts beside this one writes it first
        raise ValueError(f"{root} holds other things than a cache. Name a new folder as --output.")


def _recipe(family: str, command: CacheCommand, models: encoders.Models) -> dict[str, Any]:
    """What all items of a family are made with."""
    recipe = {"family": family, "schema": SCHEMAS[family], "model": models.identities[family], "dtype": command.dtype}
    if family in ("video", "references"):
        config = encoders.vae_config(models.pipeline)
        recipe["vae_dtype"] = command.vae_dtype
        recipe["vae"] = {name: config[name] for name in ("latents_mean", "latents_std")}
    if family != "text":
        options = dataclasses.asdict(command.recipe)
        recipe |= {name: value for name, value in options.items() if name not in _WITHOUT[family]}
    return recipe


def _write_json(path: Path, value: Any) -> None:
    with new_file(path, overwrite=True) as file:
        file.write_text(json.dumps(value, indent=2), "utf-8")


# -- What is there and what is missing --------------------------------------------------------------------------------


class Tasks:
    """What this process is to compute of a family."""

    def __init__(self, plan: Plan, family: str, store: "Store", failures: Failures, retry: bool) -> None:
        self._plan, self._family, self._store, self._failures, self._retry = plan, family, store, failures, retry

    def __len__(self) -> int:
        return sum(1 for _ in self._missing())

    def __iter__(self) -> Iterator[Task]:
        for line, variant, key in self._missing():
            yield Task(key, variant, EMPTY_PROMPT if line is None else read_sample(line, ROOT))

    def _missing(self) -> Iterator[tuple[str | None, int, str]]:
        if self._family == "text" and self._plan.rank == 0 and self._is_missing(text_key([""])):
            yield None, 0, text_key([""])
        for record in self._plan.records():
            if "sample" in record:
                for variant, key in enumerate(record["keys"][self._family]):
                    if self._is_missing(key):
                        yield record["sample"], variant, key

    def _is_missing(self, key: str) -> bool:
        failure = self._failures.get((self._store.folder.name, key))
        if failure and (self._retry or failure["lost"] == "sample"):
            return self._retry
        return self._store.find(key) is None


class Store:
    """The items of a family."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str) -> dict[str, Any] | None:
        """What is kept of an item beside its tensors; `None` if it is missing, or not whole."""
        try:
            with safe_open(item_path(self.folder, key), "pt") as opened:
                metadata = opened.metadata()
            return json.loads(metadata["info"]) if metadata["key"] == key else None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def write(self, key: str, tensors: dict[str, torch.Tensor], info: Mapping[str, Any]) -> None:
        data = save(tensors, {"key": key, "info": json.dumps(info)})
        with new_file(item_path(self.folder, key), overwrite=True) as file:
            file.write_bytes(data)

    def write_failure(self, task: Task, fault: Unusable) -> None:
        line = self.failure(task.key, task.sample.id, "sample", fault.kind, fault.detail)
        with FileLock(self.folder.parent / ".lock"), (self.folder.parent / FAILED).open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(line)}\n")  # on a line of its own, also after one that a kill has cut off

    def failure(self, key: str, sample_id: str, lost: str, kind: str, detail: str) -> dict[str, Any]:
        """A line of failed.jsonl."""
        folder = self.folder.name
        return {"folder": folder, "key": key, "sample_id": sample_id, "lost": lost, "kind": kind, "detail": detail}


def read_failures(root: Path) -> Failures:
    """The lines of failed.jsonl, without faults of the dataset. What a kill has cut off is tried again."""
    failures = {}
    if (root / FAILED).exists():
        for text in (root / FAILED).read_text("utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if "key" in line:
                failures[line["folder"], line["key"]] = line
    return failures


# -- From one to the other --------------------------------------------------------------------------------------------


def _compute(family: str, command: CacheCommand, models: encoders.Models, store: Store, tasks: Tasks) -> None:
    """Decodes in worker processes while this one encodes."""
    encoder = make_encoder(family, command, models)
    workers = 0 if family == "text" else command.workers
    bar = tqdm(total=len(tasks), desc=family, unit="item", smoothing=0.05)
    with bar, decoding(family, command.recipe, tasks, workers) as results:
        while batch := list(itertools.islice(results, encoder.batch_size)):
            for task, outcome in encode(family, encoder, batch):
                if isinstance(outcome, Unusable):
                    store.write_failure(task, outcome)
                else:
                    store.write(task.key, *outcome)
            bar.update(len(batch))


def encode(
    family: str, encoder: encoders.Encoder, batch: Sequence[tuple[Task, Decoded | Unusable]]
) -> Iterator[Outcome]:
    """What becomes of decoded tasks."""
    usable = [(task, decoded) for task, decoded in batch if isinstance(decoded, Decoded)]
    yield from ((task, fault) for task, fault in batch if isinstance(fault, Unusable))
    encoded = encoder([decoded for _, decoded in usable])
    for (task, decoded), tensors in zip(usable, encoded, strict=True):
        if all(tensor.isfinite().all() for tensor in tensors.values()):
            yield task, (tensors, decoded.info)
        else:
            yield task, Unusable(NOT_FINITE[family], "what the encoder gives of it is not finite")


def make_encoder(family: str, command: CacheCommand, models: encoders.Models) -> encoders.Encoder:
    """A family's encoder, on this process's device."""
    device = find_device(command.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    dtype = getattr(torch, command.dtype)
    if family == "teacher":
        return encoders.TeacherEncoder(models.teacher, dtype, device)
    if family == "text":
        return encoders.TextEncoder(models.pipeline, dtype, device)
    vae_dtype = getattr(torch, command.vae_dtype)
    return encoders.VaeEncoder(models.pipeline, dtype, device, vae_dtype, references=family == "references")


# -- The end ----------------------------------------------------------------------------------------------------------


def _finish(root: Path, plan: Plan, computed: Sequence[str]) -> int:
    """Writes samples.parquet and failed.jsonl, if nothing is missing, and says how it went."""
    counts: Counter[str] = Counter()
    # With the lock: the process that comes last to it finds what all others have done
    with FileLock(root / ".lock"):
        try:
            with new_file(root / FAILED, overwrite=True) as file, file.open("w", encoding="utf-8") as failed:
                write_index(root, plan.header, _rows(root, plan, computed, failed, counts))
        except _Unfinished:
            print(f"{root}: this process is done; others, or the same command again, do the rest.")
            return 0
    print(f"{root}: {counts['complete']} of {plan.samples} samples are complete: {', '.join(computed)}.")
    if counts["failed"]:
        print(f"{counts['failed']} failures, faults of the dataset and lost references: see {root / FAILED}.")
    return 0 if counts["complete"] else 1


def _rows(
    root: Path, plan: Plan, computed: Sequence[str], failed: TextIO, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The rows of samples.parquet. Failures that are still true are written to `failed`."""
    stores = {family: Store(root / made["folder"]) for family, made in plan.families.items()}
    failures = read_failures(root)
    current = {store.folder.name for store in stores.values()}
    others = {folder for folder, _ in failures if folder not in current and (root / folder).exists()}
    lines = [line for (folder, _), line in failures.items() if folder in others]
    if "text" in computed and stores["text"].find(text_key([""])) is None:
        raise _Unfinished
    for record in plan.records():
        if "fault" in record:
            lines.append(record["fault"])
        else:
            row, found = {"id": record["id"], "prompts": record["prompts"]}, {}
            for family, store in stores.items():
                found[family] = [store.find(key) for key in record["keys"][family]]
                row |= _columns(family, store, record, found[family], failures, lines)
                if family in computed and row[f"{family}_missing"] == NOT_COMPUTED:
                    raise _Unfinished
            row |= _shape(found)
            counts["complete"] += all(row[f"{family}_missing"] is None for family in computed)
            yield row
        failed.writelines(f"{json.dumps(line)}\n" for line in lines)
        counts["failed"] += len(lines)
        lines.clear()


def _columns(
    family: str,
    store: Store,
    record: Mapping[str, Any],
    items: Sequence[dict[str, Any] | None],
    failures: Failures,
    lines: list[dict[str, Any]],
) -> dict[str, Any]:
    """The keys of a sample's items, and why it has none; failures go to `lines`."""
    keys, missing = [], None if any(item is not None for item in items) else "failed"
    for key, item in zip(record["keys"][family], items, strict=True):
        failure = failures.get((store.folder.name, key))
        keys.append(None if item is None else bytes.fromhex(key))
        if item is not None:
            lost = item.get("lost", ())
            lines += [store.failure(key, record["id"], "reference", kind, detail) for kind, detail in lost]
        elif failure is not None:
            lines.append(failure)
        else:
            missing = NOT_COMPUTED
    return {family: keys, f"{family}_missing": missing}


def _shape(found: Mapping[str, Sequence[dict[str, Any] | None]]) -> dict[str, Any]:
    """The columns of a sample's bucket, and by variant the numbers of its references' subjects."""
    video = next(filter(None, found.get("video", ())), {"frames": 0, "size": (0, 0)})
    families = [found[family] for family in ("references", "teacher") if any(found.get(family, ()))]
    subjects: list[list[int] | None] = [_agreed(items) for items in zip(*families, strict=False)]
    count = next((len(numbers) for numbers in subjects if numbers is not None), 0)
    for variant, numbers in enumerate(subjects):
        if numbers is not None and len(numbers) != count:
            subjects[variant] = None
    bucket = (video["frames"], *video["size"], count)
    return dict(zip(BUCKET, bucket, strict=True)) | {"subjects": subjects or [[]]}


def _agreed(items: Sequence[dict[str, Any] | None]) -> list[int] | None:
    """Numbers of the references' subjects; `None` if an item is missing or the families saw other references."""
    for item in items:
        if item is None or any(item[name] != items[0][name] for name in ("subjects", "origins")):
            return None
    subjects = items[0]["subjects"]
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
    return [numbers[subject] for subject in subjects]


def write_index(root: Path, header: Mapping[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Writes samples.parquet."""
    fields = [("id", pa.string()), ("prompts", pa.int32()), *((name, pa.int32()) for name in BUCKET)]
    fields.append(("subjects", pa.list_(pa.list_(pa.int32()))))
    for family in header["families"]:
        fields += [(family, pa.list_(pa.binary(16))), (f"{family}_missing", pa.string())]
    schema, rows = pa.schema(fields), iter(rows)
    with new_file(root / INDEX, overwrite=True) as file, parquet.ParquetWriter(file, schema) as writer:
        writer.add_key_value_metadata({"cache": json.dumps(header)})
        while chunk := list(itertools.islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(chunk, schema))
