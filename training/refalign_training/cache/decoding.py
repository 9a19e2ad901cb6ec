"""From a cache's tasks to what its encoders take, in worker processes: nothing of the encoders is imported here."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from refalign_training.data.pixels import load_references, load_video
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Sample, Unusable


logger = logging.getLogger(__name__)


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
        except Exception as error:  # one sample of millions must not end the run
            logger.debug("%s", task.sample.id, exc_info=True)
            decoded = Unusable("not readable", f"{type(error).__name__}: {error}")
        return task.unit, task.row, task.variant, decoded


class _Stream(Sampler):
    """Tasks in the order they come, made while earlier ones are computed; it notes those that are not done."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self._tasks = tasks
        self.in_flight: list[Task] = []

    def __iter__(self) -> Iterator[Task]:
        for task in self._tasks:
            self.in_flight.append(task)
            yield task


def decode(family: str, sample: Sample, recipe: Recipe, variant: int) -> Decoded:
    """What a family's encoder takes of a sample. Raises [`Unusable`]."""
    if family == "text":
        if not sample.prompts:
            raise Unusable("no prompt", f"{sample.id} has no caption")
        "".join(sample.prompts).encode()  # half a surrogate pair would end the tokenizer
        return Decoded(prompts=sample.prompts)
    if family == "video":
        frames = load_video(sample, recipe, variant)
        return Decoded(torch.from_numpy(frames), info={"frames": len(frames), "size": list(frames.shape[1:3])})
    lost: list[Unusable] = []
    references = load_references(sample, recipe, variant, on_fault=lost.append)
    info = {"subjects": [r.subject for r in references], "origins": [r.origin for r in references]}
    if lost:
        info["lost"] = [[fault.kind, fault.detail] for fault in lost]
    pixels = torch.from_numpy(np.stack([np.asarray(r.image) for r in references]))
    return Decoded(pixels, info=info | {"size": list(pixels.shape[1:3])})


def _as_it_is(value: Any) -> Any:
    return value


class Decoder:
    """
    What becomes of the tasks, in their order. No more of them are asked for than two a worker ahead. In a `with`, the
    death of a worker, wherever torch tells of it, is a ValueError that names the samples it may have died of.
    """

    def __init__(self, family: str, recipe: Recipe, tasks: Iterator[Task], workers: int) -> None:
        self._stream = _Stream(tasks)
        self._loader = DataLoader(
            _Decoding(family, recipe),
            batch_size=None,
            sampler=self._stream,
            num_workers=workers,
            collate_fn=_as_it_is,
            multiprocessing_context="spawn" if workers else None,  # a fork would inherit the locks and the GPU
        )

    def __iter__(self) -> Iterator[Result]:
        for result in self._loader:
            self._stream.in_flight.pop(0)
            yield result

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            samples = ", ".join(dict.fromkeys(task.sample.id for task in self._stream.in_flight))
            raise ValueError(
                f"A process that decodes has died ({error}), of memory or of one of these samples: {samples}. Run "
                "again, which goes on where it was, with fewer workers or with --workers 0."
            ) from error
