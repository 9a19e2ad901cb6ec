"""How well the region of a reference is found that corresponds to a masked one, and how well by simpler means.

Masks are bool `(height, width)` of the reference's size; maps are float32 `(rows, columns)` on the reference as the
image encoder sees it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from refalign.pipeline_refine_by_align import (
    cut_mask,
    cut_surroundings,
    encode_patches,
    find_region,
    mask_square,
    on_white,
    prepare_reference,
    put_square,
    reference_pixels,
    reference_square,
    subject_mask,
)
from refalign.reference_images import Box, bounding_box
from refalign_evaluation.triplets import Task, batches, generators_of, inputs_of


if TYPE_CHECKING:
    from refalign.pipeline_refine_by_align import RefineByAlignPipeline

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # shares of a map's maximum that are tried
BLURS = (0.0, 1.0, 1.5)  # standard deviations in tokens that are tried
FRAME = 64  # pixels of the square about the subject in which constant guesses are made
BOX_STEP = 4  # of these pixels, between the corners of boxes that are tried
GREY = (127, 127, 127)


@dataclass(frozen=True)
class Overlaps:
    """IoU with the true region for each task, each `(tasks,)`."""

    mask: np.ndarray
    box: np.ndarray
    """The overlap of the boxes around both."""


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks, of which one is not empty."""
    return float((first & second).sum() / (first | second).sum())


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (_area(first) + _area(second) - shared)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def overlaps(tasks: Sequence[Task], masks: Sequence[np.ndarray]) -> Overlaps:
    """The overlaps of a mask for each task; 0 where it is empty."""
    mask_values, box_values = [], []
    for task, mask in zip(tasks, masks, strict=True):
        mask_values.append(mask_iou(mask, task.region))
        box_values.append(box_iou(bounding_box(mask), bounding_box(task.region)) if mask.any() else 0.0)
    return Overlaps(np.array(mask_values), np.array(box_values))


def mask_of_map(map: torch.Tensor, task: Task, size: int, threshold: float, blur: float = 0.0) -> np.ndarray:
    """The region that a map means, as the pipeline finds it; `size` is that of its references."""
    foreground = subject_mask(task.reference)
    square = reference_square(foreground)
    shown = F.adaptive_avg_pool2d(cut_mask(foreground, square, size), (map.shape[0], map.shape[1]))[0]
    mask = torch.from_numpy(find_region(map, shown, size, threshold, blur).mask)
    return put_square(mask, square, task.reference.size, "nearest-exact").numpy() > 0


def overlaps_of_maps(
    tasks: Sequence[Task], maps: Sequence[torch.Tensor], size: int, threshold: float, blur: float = 0.0
) -> Overlaps:
    """The overlaps of a map for each task."""
    masks = [mask_of_map(map, task, size, threshold, blur) for map, task in zip(maps, tasks, strict=True)]
    return overlaps(tasks, masks)


# -- Step and block ---------------------------------------------------------------------------------------------------


def search_grid(
    pipeline: "RefineByAlignPipeline", tasks: Sequence[Task], steps: Sequence[float], seed: int, batch_size: int = 16
) -> torch.Tensor:
    """
    The maps of all blocks at several steps, as shares of the timesteps.

    Returns:
        `torch.Tensor`: float32 `(steps, blocks, tasks, rows, columns)`.
    """
    maps = []
    for batch in batches(tasks, batch_size):
        images, masks, references = inputs_of(batch)
        generators = generators_of(batch, seed)
        maps.append(pipeline.attention_maps(images, masks, references, steps=steps, generator=generators))
    return torch.cat(maps, dim=2)


def grid_overlaps(
    tasks: Sequence[Task], maps: torch.Tensor, size: int, threshold: float, blur: float = 0.0
) -> dict[str, np.ndarray]:
    """The mean IoU of masks and boxes by step and block, each `(steps, blocks)`."""
    found: dict[str, np.ndarray] = {"mask": np.zeros(maps.shape[:2]), "box": np.zeros(maps.shape[:2])}
    for step, block in product(range(maps.shape[0]), range(maps.shape[1])):
        values = overlaps_of_maps(tasks, list(maps[step, block]), size, threshold, blur)
        found["mask"][step, block] = values.mask.mean()
        found["box"][step, block] = values.box.mean()
    return found


# -- Baselines --------------------------------------------------------------------------------------------------------


def best_constant(tasks: Sequence[Task]) -> Overlaps:
    """
    What one guess for all references gets, on the square around the subject: the best of fixed masks (the places that
    are true most often, with and without what is not the subject) and the best of fixed boxes. They are searched on
    these very tasks, which favours them.
    """
    regions, subjects = [], []
    for task in tasks:
        foreground = subject_mask(task.reference)
        square = reference_square(foreground)
        regions.append(cut_mask(task.region, square, FRAME)[0].numpy() > 0)
        subjects.append(cut_mask(foreground, square, FRAME)[0].numpy() > 0)
    true, seen = np.stack(regions), np.stack(subjects)
    often = true.mean(axis=0)
    found = []
    for level in np.linspace(0.02, 0.98, 49) * often.max():
        guess = np.broadcast_to(often >= level, true.shape)
        found += [_stacked_iou(guess, true), _stacked_iou(guess & seen, true)]
    return Overlaps(max(found, key=np.mean), _best_box(true))


def _stacked_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    shared = (first & second).sum(axis=(1, 2))
    return shared / np.maximum((first | second).sum(axis=(1, 2)), 1)


def _best_box(true: np.ndarray) -> np.ndarray:
    """The IoU of the best fixed box with the regions' boxes, `(tasks,)`."""
    left, top, right, bottom = np.array([bounding_box(mask) for mask in true]).T[..., None]
    edges = range(0, FRAME + 1, BOX_STEP)
    low, high = np.array([pair for pair in product(edges, edges) if pair[0] < pair[1]]).T
    widths = np.maximum(np.minimum(right, high) - np.maximum(left, low), 0)
    heights = np.maximum(np.minimum(bottom, high) - np.maximum(top, low), 0)
    shared = widths[:, :, None] * heights[:, None]  # (tasks, pairs across, pairs down)
    areas = (right - left) * (bottom - top)
    values = shared / (areas[..., None] + np.outer(high - low, high - low) - shared)
    values = values.reshape(len(true), -1)
    return values[:, values.mean(axis=0).argmax()]


def best_matching(pipeline: "RefineByAlignPipeline", tasks: Sequence[Task]) -> Overlaps:
    """
    What the image encoder alone gets: the reference's patches that are most similar to those of the mask. The best of
    some variants, thresholds and blurs, searched on these very tasks: the mask's patches as they are or grey; their
    mean, the mean of their similarities, or how often each patch of the reference is the nearest; tokens centred or
    not.
    """
    size, found = pipeline.config["reference_size"], []
    variants = [_similarity_maps(pipeline, task) for task in tasks]
    for name in variants[0]:
        maps = [maps_of_task[name] for maps_of_task in variants]
        found += [overlaps_of_maps(tasks, maps, size, *level) for level in product(THRESHOLDS, BLURS)]
    masks, boxes = [each.mask for each in found], [each.box for each in found]
    return Overlaps(max(masks, key=np.mean), max(boxes, key=np.mean))


@torch.no_grad()
def _similarity_maps(pipeline: "RefineByAlignPipeline", task: Task) -> dict[tuple[bool, str, bool], torch.Tensor]:
    """One map for each variant of [`best_matching`]."""
    size = pipeline.config["reference_size"]
    square = mask_square(task.mask, pipeline.config["crop_scale"])
    hidden = on_white(task.image)
    hidden.paste(GREY, mask=Image.fromarray(task.mask))
    seen = [cut_surroundings(image, square, size) for image in (task.image, hidden)]
    tokens = encode(pipeline, [*seen, prepare_reference(task.reference, size)[0]])
    side = round(tokens.shape[1] ** 0.5)
    shares = F.adaptive_avg_pool2d(cut_mask(task.mask, square, size), side).flatten()
    is_masked = shares >= min(0.5, float(shares.max()))
    maps = {}
    for is_grey, is_centred in product((False, True), (False, True)):
        pair = torch.stack((tokens[int(is_grey)], tokens[2]))
        if is_centred:
            pair = pair - pair.mean(dim=1, keepdim=True)
        masked, reference = F.normalize(pair[0][is_masked], dim=-1), F.normalize(pair[1], dim=-1)
        similarities = masked @ reference.T
        nearest = torch.bincount(similarities.argmax(dim=1), minlength=len(reference)).float()
        mean = F.normalize(pair[0][is_masked].mean(dim=0), dim=-1)
        by_name = {"mean": reference @ mean, "similarities": similarities.mean(dim=0), "nearest": nearest}
        for name, values in by_name.items():
            maps[is_grey, name, is_centred] = (values - values.min()).reshape(side, side)
    return maps


def encode(pipeline: "RefineByAlignPipeline", images: Sequence[Image.Image]) -> torch.Tensor:
    """The image encoder's patch tokens of RGB squares, float32 `(images, tokens, dim)`."""
    pixels = reference_pixels(torch.stack([torch.from_numpy(np.array(image)) for image in images]))
    encoder: Any = pipeline.image_encoder
    return encode_patches(encoder, pixels.to(encoder.device, encoder.dtype)).float().cpu()
