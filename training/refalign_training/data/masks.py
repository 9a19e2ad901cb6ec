"""Boxes, and masks in COCO's compressed run-length encoding (RLE): checked, decoded, measured, compared, selected.

pycocotools' C code trusts what it is given: run lengths that do not sum to the image's size make it read or write
beyond its memory. So nothing reaches it before [`check_mask`] has summed them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
from pycocotools import mask as coco

from refalign_training.data.fields import Unusable, is_number, member, sequence, shorten
from refalign_training.data.recipe import SelectionRule
from refalign_training.data.sample import Box, Reference, View


_LARGEST_SIDE = 1 << 14  # pixels; pycocotools counts a mask's in 32 bits
_LONGEST_RUN = 6  # characters of 5 bits: 2**29 pixels


class RLE(TypedDict):
    """A mask in COCO's compressed run-length encoding."""

    size: list[int]
    """Height and width."""
    counts: str | bytes


def check_mask(mask: Any, height: int, width: int) -> RLE:
    """
    A record's mask, once it is known to be one of that frame. Raises [`Unusable`] of kind "mask size" or "mask", or
    "field" where one is missing.
    """
    size = sequence(member(mask, "size"), "a mask's size")
    counts = member(mask, "counts")
    if size != [height, width] or not 0 < max(height, width) <= _LARGEST_SIDE:
        raise Unusable("mask size", f"{shorten(size)}, but the cropped frame has [height, width] {[height, width]}")
    if not isinstance(counts, str):
        raise Unusable("mask", f"counts are {shorten(counts)}, which is not compressed RLE")
    runs = _runs(counts)
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise Unusable("mask", f"runs of {int(runs.sum())} pixels, not {height}x{width}: {shorten(counts)}")
    return {"size": [height, width], "counts": counts}


def _runs(counts: str) -> np.ndarray:
    """
    The lengths of the runs, in turns without and with the subject, int64. As `rleFrString` of pycocotools' maskApi.c:
    little-endian groups of 5 bits, each from character 48 up, a sixth bit where the number goes on, a sign in the last
    group; from the fourth number on, differences to the last but one.
    """
    codes = np.frombuffer(counts.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise Unusable("mask", f"counts are not compressed RLE: {shorten(counts)}")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() >= _LONGEST_RUN:
        raise Unusable("mask", f"a run of over {_LONGEST_RUN} characters: {shorten(counts)}")
    places = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 31) << 5 * places, starts)
    values -= np.where(codes[ends] & 16, np.int64(32) << 5 * (ends - starts), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def decode_mask(mask: Any, height: int, width: int) -> np.ndarray:
    """A mask's pixels, bool `(height, width)`. Raises [`Unusable`] as [`check_mask`] does."""
    return coco.decode(check_mask(mask, height, width)).astype(bool)


def mask_box(mask: RLE) -> Box | None:
    """The tight box around a checked mask's pixels; `None` if there are none."""
    if not coco.area(mask):  # toBbox makes something up
        return None
    left, top, width, height = coco.toBbox(mask).tolist()
    return left, top, left + width, top + height


def check_box(value: Any, width: float, height: float, tolerance: float = 0.0) -> Box:
    """
    A box `[left, top, right, bottom]` inside a frame; what leaves it by up to `tolerance` pixels is cut off. Raises
    [`Unusable`] of kind "box".
    """
    if not (isinstance(value, list) and len(value) == 4 and all(map(is_number, value))):
        raise Unusable("box", f"{shorten(value)} is not four finite numbers")
    left, top, right, bottom = map(float, value)
    if min(left, top) < -tolerance or right > width + tolerance or bottom > height + tolerance:
        raise Unusable("box", f"{shorten(value)} leaves its frame of {width:g}x{height:g}")
    box = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    if not (box[0] < box[2] and box[1] < box[3]):
        raise Unusable("box", f"{shorten(value)} is empty in its frame of {width:g}x{height:g}")
    return box


def box_area(box: Box) -> float:
    """A box's area in square pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def drop_duplicates(views: Sequence[View], limit: float = 0.8) -> list[int]:
    """
    The indices of the views of one frame that stay if of any two with an IoU over `limit` the larger one does. Views
    are compared by their masks where both have one, else by their boxes.
    """
    areas = list(map(view_area, views))
    kept: list[int] = []
    for index in sorted(range(len(views)), key=areas.__getitem__, reverse=True):
        if not any(_overlaps(views[index], views[other], areas[index], areas[other], limit) for other in kept):
            kept.append(index)
    return sorted(kept)


def view_area(view: View) -> float:
    """The area in square pixels of a view's mask, or of its box if it has none."""
    return box_area(cast(Box, view.box)) if view.mask is None else int(coco.area(cast(RLE, view.mask)))


def _overlaps(a: View, b: View, area_a: float, area_b: float, limit: float) -> bool:
    """Whether the IoU is over the limit."""
    box_a, box_b = cast(Box, a.box), cast(Box, b.box)  # only views of image files have none
    (left, top), (right, bottom) = map(max, box_a[:2], box_b[:2]), map(min, box_a[2:], box_b[2:])
    shared = max(right - left, 0.0) * max(bottom - top, 0.0)
    if a.mask is None or b.mask is None:
        return shared > limit * (box_area(box_a) + box_area(box_b) - shared)
    # The masks share no more than their boxes, and cover no less than the larger of them: most pairs end here
    if min(area_a, area_b, shared) <= limit * max(area_a, area_b):
        return False
    masks_a, masks_b = [cast(RLE, a.mask)], [cast(RLE, b.mask)]
    return np.asarray(coco.iou(masks_a, masks_b, [0]))[0, 0] > limit


# -- Which of a frame's subjects become references (RefAlign, arXiv 2603.25743, section 4) ---------------------------


class Candidate(NamedTuple):
    """A subject whose scores are high enough for a reference."""

    reference: Reference
    crop_ratio: float
    """The area of its box, or of the first in another clip if it has none here, as a share of the frame's."""


def select(candidates: Sequence[Candidate], rule: SelectionRule) -> tuple[Reference, ...]:
    """
    The references, the largest first. Scores come before duplicates: a subject whose larger mask scores too low is
    still taken by its smaller one.
    """
    here, views, elsewhere = [], [], []
    for candidate in candidates:
        if candidate.crop_ratio < rule.min_crop_ratio:
            continue
        if (view := candidate.reference.view) is None:
            elsewhere.append(candidate)
        else:
            here.append(candidate)
            views.append(view)
    left = [*map(here.__getitem__, drop_duplicates(views, rule.duplicate_iou)), *elsewhere]
    left.sort(key=lambda candidate: -candidate.crop_ratio)
    return tuple(reference for reference, _ in left[: rule.max_references])
