"""What a cache is to hold: a dataset's samples, with the keys of their items."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from refalign.devices import rank_and_processes
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.items import digest, text_key
from refalign_training.data.decoding import Task
from refalign_training.data.sample import Clip, Fault, Sample
from refalign_training.data.sample_files import read_sample, write_sample
from refalign_training.data.source import Source, read_source


ROOT = Path("/")  # plans hold absolute paths
EMPTY_PROMPT = Sample("the empty prompt", ("",), Clip(Path()), (), "", 0)


class Plan:
    """
    The dataset as it is now: samples with the keys of their items, and faults, in its order. They are held in `file`,
    so that memory does not grow with the dataset; of the samples of other processes, only id and keys.

    Args:
        families (`Mapping[str, Any]`): as in the header of samples.parquet.
    """

    def __init__(self, file: TextIO, command: CacheCommand, families: Mapping[str, Any]) -> None:
        self._file, self.families, self.samples, self.is_limited = file, families, 0, False
        rank, processes = rank_and_processes()
        total = hashlib.sha256()
        for item in read_source(_with_absolute_paths(command.source)):
            if isinstance(item, Fault):
                record = {"fault": dataclasses.asdict(item)}
            else:
                record = {"id": item.id, "prompts": len(item.prompts), "keys": {}}
                for name, made in families.items():
                    record["keys"][name] = item_keys(name, item, made["variants"])
                total.update(json.dumps(record).encode())
                if self.samples % processes == rank:
                    record["sample"] = write_sample(item, ROOT)
                self.samples += 1
            file.write(json.dumps(record) + "\n")
            self.is_limited = self.samples == command.limit
            if self.is_limited:
                break
        self.header = {"families": families, "samples": self.samples, "digest": total.hexdigest()}
        self._makes_empty_prompt = rank == 0

    def records(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        return map(json.loads, self._file)

    def tasks(self, family: str) -> Iterator[Task]:
        """What this process is to have of a family."""
        if family == "text" and self._makes_empty_prompt:
            yield Task(text_key([""]), 0, EMPTY_PROMPT)
        for record in self.records():
            if "sample" in record:
                for variant, key in enumerate(record["keys"][family]):
                    yield Task(key, variant, read_sample(record["sample"], ROOT))


def item_keys(family: str, sample: Sample, variants: int) -> list[str]:
    """The keys of a sample's items, by variant."""
    if family == "text":
        return [text_key(sample.prompts)]
    if family == "video":
        annotation, paths = dataclasses.asdict(sample.clip), {sample.clip.path}
    else:
        annotation, paths = [], set()
        for reference in sample.references:
            annotation.append(dataclasses.asdict(reference))
            paths.update(view.path for view in (reference.view, *reference.cross) if view is not None)
    files = list(map(_identity, sorted(paths)))
    return [digest([sample.id, annotation, files, variant]) for variant in range(variants)]


def _identity(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError:
        return [path.name, None, None]
    return [path.name, status.st_size, status.st_mtime_ns]


def _with_absolute_paths(source: Source) -> Source:
    annotations = tuple(map(_absolute, source.annotations))
    videos = source.videos and _absolute(source.videos)
    return dataclasses.replace(source, annotations=annotations, videos=videos)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (it removes "..", and keeps links)
