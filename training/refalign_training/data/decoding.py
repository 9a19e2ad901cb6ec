"""From a [`Sample`] to what a family's encoder takes, here or in worker processes; no encoder is imported."""

import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from refalign_training.data.fields import Unusable
from refalign_training.data.pixels import load_references, load_video
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Sample
from refalign_training.data.subjects import load_subjects
from refalign_training.data.workers import end_with_parent


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """A sample as a family's encoder takes it; what the family does not need is empty."""

    pixels: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """uint8 `(frames or references, height, width, 3)`."""
    own_sizes: tuple[torch.Tensor, ...] = ()
    """In place of `pixels`, references of their own sizes: each uint8 `(1, height, width, 3)`."""
    prompts: tuple[str, ...] = ()
    prefix: Literal["references", "no_references"] | None = "references"
    """Which of the texts that the model wants before prompts stands before these."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """What is kept beside the encoder's output, such as the references' subjects."""


@dataclass(frozen=True)
class Task:
    """An item to decode: a variant of a sample, and the key of what will be made of it."""

    key: str
    variant: int
    sample: Sample


def decode(family: str, sample: Sample, recipe: Recipe, variant: int) -> Decoded:
    """What a family's encoder takes of a sample. Raises [`Unusable`]."""
    if family == "text":
        if not sample.prompts:
            raise Unusable("no prompt", f"{sample.id} has no caption")
        "".join(sample.prompts).encode()  # half a surrogate pair would end the tokenizer
        return Decoded(prompts=sample.prompts)
    if family == "video":
        frames = load_video(sample, recipe, variant)
        info = {"frames": len(frames), "size": list(frames.shape[1:3])}
        return Decoded(torch.from_numpy(frames), info=info)
    lost: list[Unusable] = []
    if family == "pictures":
        subjects, names = load_subjects(sample, recipe, variant, on_fault=lost.append)
        return Decoded(torch.from_numpy(subjects), info=_info_of(names, ["regular"] * len(names), lost))
    references = load_references(sample, recipe, variant, on_fault=lost.append)
    images = [reference.image for reference in references]
    names = [reference.subject for reference in references]
    origins = [reference.origin for reference in references]
    info = _info_of(names, origins, lost)
    if recipe.long_edge is not None:
        info["sizes"] = [[image.height, image.width] for image in images]
    return dataclasses.replace(decoded_references(images, recipe.long_edge), info=info)


def _info_of(subjects: list[str], origins: list[str], lost: list[Unusable]) -> dict[str, Any]:
    """What is kept beside an item of references."""
    info: dict[str, Any] = {"subjects": subjects, "origins": origins}
    if lost:
        info["lost"] = [[fault.kind, fault.detail] for fault in lost]
    return info


def decoded_references(images: Sequence[Image.Image], long_edge: int | None) -> Decoded:
    """Prepared references as encoders take them: of one size, or with `long_edge` of their own."""
    pixels = [torch.from_numpy(np.array(image))[None] for image in images]
    if long_edge is None:
        return Decoded(torch.cat(pixels))
    return Decoded(own_sizes=tuple(pixels))


def try_decode(family: str, task: Task, recipe: Recipe) -> Decoded | Unusable:
    """[`decode`]s a task. What cannot be used comes back as a value: one sample of millions must not end the run."""
    try:
        return decode(family, task.sample, recipe, task.variant)
    except Unusable as error:
        return error
    except Exception as error:
        logger.debug("%s", task.sample.id, exc_info=True)
        return Unusable("not readable", f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Tasks(Dataset):
    family: str
    recipe: Recipe

    def __getitem__(self, task: Task) -> Decoded | Unusable:
        return try_decode(self.family, task, self.recipe)


@contextmanager
def decoding(
    family: str, recipe: Recipe, tasks: Iterable[Task], workers: int
) -> Iterator[Iterator[tuple[Task, Decoded | Unusable]]]:
    """
    Gives the tasks in their order, each with what became of it. At most two per worker are decoded ahead.

    Raises:
        ValueError: if a worker dies; it names the samples that it may have died of.
    """
    in_flight: deque[Task] = deque()

    def stream() -> Iterator[Task]:
        for task in tasks:
            in_flight.append(task)
            yield task

    loader = DataLoader(
        _Tasks(family, recipe),
        batch_size=None,
        sampler=stream(),
        num_workers=workers,
        worker_init_fn=end_with_parent,
        multiprocessing_context="spawn" if workers else None,  # a fork would inherit the locks and the GPU
    )
    try:
        yield ((in_flight.popleft(), decoded) for decoded in loader)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        samples = ", ".join(dict.fromkeys(task.sample.id for task in in_flight))
        raise ValueError(
            f"A process that decodes has died ({error}), of memory or of one of these samples: {samples}. Run the "
            "command again with fewer workers or with --workers 0; it goes on where it was."
        ) from error
