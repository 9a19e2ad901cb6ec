"""Triplets to measure a Refine-by-Align model on: read from a folder, and as the pipeline takes them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from refalign.pipeline_refine_by_align import check_mask, load_mask, on_white, subject_mask
from refalign.reference_images import load_reference_image
from refalign_training.data.randomness import seed_of


@dataclass(frozen=True)
class Task:
    """An image that went wrong in one place, with a reference and the truth."""

    name: str
    image: Image.Image
    mask: np.ndarray
    """bool, of the image's size."""
    reference: Image.Image
    region: np.ndarray
    """bool, of the reference's size: the true region."""
    truth: Image.Image | None = None
    """RGB: what the image should be."""


def read_benchmark(folder: Path, limit: int | None = None) -> list[Task]:
    """
    The triplets of a benchmark's folder, by their folders' names. One that cannot be read is told in a line and left
    out.

    Raises:
        ValueError: if there is none that can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Pass one of triplets, or draw some with --sprites 200.")
    tasks = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if len(tasks) == limit:
            break
        try:
            tasks.append(read_task(place))
        except (ValueError, OSError) as error:
            print(f"{place.name} is left out: {error}", file=sys.stderr)
    if not tasks:
        raise ValueError(f"{folder} holds no triplet: folders with image.png, mask.png, reference.png and so on.")
    return tasks


def read_task(folder: Path) -> Task:
    """
    A triplet of a folder.

    Raises:
        ValueError: if a picture is missing, is none, is empty, or does not fit another one.
    """
    for name in ("image", "mask", "reference", "reference_mask"):
        if not (folder / f"{name}.png").is_file():
            raise ValueError(f"it has no {name}.png.")
    image, reference = (load_reference_image(folder / f"{name}.png") for name in ("image", "reference"))
    mask = load_mask(folder / "mask.png", image.size)
    check_mask(mask)
    subject_mask(reference)
    region = load_mask(folder / "reference_mask.png", reference.size, "The reference's mask")
    if not region.any():
        raise ValueError("reference_mask.png is empty: it must show the true region white.")
    truth = None
    if (folder / "truth.png").is_file():
        truth = on_white(load_reference_image(folder / "truth.png"))
        if truth.size != image.size:
            raise ValueError(f"truth.png has {truth.size} pixels, but the image has {image.size}.")
    return Task(folder.name, image, mask, reference, region, truth)


def batches(tasks: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    """The tasks, so many at a time."""
    for start in range(0, len(tasks), size):
        yield tasks[start : start + size]


def inputs_of(tasks: Sequence[Task]) -> tuple[list[Image.Image], list[np.ndarray], list[Image.Image]]:
    """Images, masks and references, as the pipeline takes them."""
    return [task.image for task in tasks], [task.mask for task in tasks], [task.reference for task in tasks]


def generators_of(tasks: Sequence[Task], seed: int) -> list[torch.Generator]:
    """A new generator for each task, that depends on its name alone: the same noise in every call."""
    return [torch.Generator().manual_seed(seed_of("artifacts", seed, task.name)) for task in tasks]
