"""From a cache's tasks to what its encoders take, in worker processes: nothing of the encoders is imported here."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from refalign_training.data.example import load_references, load_video
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Sample, Unusable


@dataclass(frozen=True)
class Decoded:
    """A sample as a family's encoder takes it; what the family does not need is empty."""

    pixels: torch.Tensor | None = None
    """uint8 `(frames or references, height, width, 3)`."""
    prompts: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    """Kept with the item, such as the references' subjects."""


# Unit, row and variant of the task, and what the encoder takes; what cannot be used comes back as a value
Result = tuple[str, int, int, Decoded | Unusable]


@dataclass(frozen=True)
class Task:
    """An item to compute."""

    unit: str
    row: int
    variant: int
    sample: Sample


class _Decoding(Dataset):
    def __init__(self, family: str, recipe: Recipe) -> None:
        self.family, self.recipe = family, recipe

    def __getitem__(self, task: Task) -> Result:
        try:
            decoded = decode(self.family, task.sample, self.recipe, task.variant)
        except Unusable as error:
            decoded = error
        return task.unit, task.row, task.variant, decoded


class _Stream(Sampler):
    """Tasks in the order they come, made while earlier ones are computed."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Task]:
        return self._tasks


def decode(family: str, sample: Sample, recipe: Recipe, variant: int) -> Decoded:
    """What a family's encoder takes of a sample. Raises [`Unusable`]."""
    if family == "text":
        if not sample.prompts:
            raise Unusable("no prompt", f"{sample.id} has no caption")
        return Decoded(prompts=sample.prompts)
    if family == "video":
        frames = load_video(sample, recipe, variant)
        return Decoded(torch.from_numpy(frames), info={"frames": len(frames), "size": list(frames.shape[1:3])})
    references = load_references(sample, recipe, variant)
    info = {"subjects": [r.subject for r in references], "origins": [r.origin for r in references]}
    pixels = torch.from_numpy(np.stack([np.asarray(r.image) for r in references]))
    return Decoded(pixels, info=info | {"size": list(pixels.shape[1:3])})


def _as_it_is(value: Any) -> Any:
    return value


def decode_all(family: str, recipe: Recipe, tasks: Iterator[Task], workers: int) -> Iterable[Result]:
    """What becomes of the tasks, in their order. No more of them are asked for than two a worker ahead."""
    return DataLoader(
        _Decoding(family, recipe),
        batch_size=None,
        sampler=_Stream(tasks),
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context="spawn" if workers else None,  # a fork would inherit the locks and the GPU
    )
