"""From a [`Sample`] to its subjects in their surroundings: what a refinement is trained on.

A subject becomes eight channels of one square image: the picture around it (RGB), its mask, and another picture of
the same subject, cut out (RGBA), whose alpha is 0 everywhere where there is none.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from refalign.reference_images import WHITE, bounding_box
from refalign_training.data.fields import Unusable
from refalign_training.data.masks import decode_mask
from refalign_training.data.pixels import WARN, crop_frame, cut_out, drawn_views, read_frame, read_image
from refalign_training.data.randomness import numpy_generator
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Reference, Sample, View
from refalign_training.data.shown import square


CHANNELS = 8
ROOM = 1.25  # of the picture's side to the model's, so that a part of it can be drawn
MARGIN = 1.5  # of the picture's side to the subject's box


def picture_side(side: int) -> int:
    """The side in pixels of the pictures for a model of that side."""
    return math.ceil(ROOM * side)


def load_subjects(
    sample: Sample, recipe: Recipe, variant: int = 0, on_fault: Callable[[Unusable], None] = WARN
) -> tuple[np.ndarray, list[str]]:
    """
    A sample's subjects that have a mask, or a file with alpha.

    Args:
        recipe ([`Recipe`]): its height is the model's side.
        variant (`int`): which of the draws of another picture of the subject.
        on_fault (`Callable`): gets each that cannot be used.

    Returns:
        `tuple[np.ndarray, list[str]]`: uint8 `(subjects, side, side, 8)`, and the subjects' names.

    Raises:
        Unusable: if none can be used.
    """
    frames: dict[tuple[Path, int | float], Image.Image] = {}
    side = picture_side(recipe.height)
    pictures, names = [], []
    for number, reference in enumerate(sample.references):
        generator = numpy_generator("subject", recipe.seed, variant, sample.id, number)
        try:
            pictures.append(_load(reference, recipe, side, generator, frames))
        except Unusable as fault:
            on_fault(fault)
        else:
            names.append(reference.subject)
    if not pictures:
        raise Unusable("no references", f"none of the {len(sample.references)} has a mask or alpha that can be read")
    return np.stack(pictures), names


def _load(
    reference: Reference,
    recipe: Recipe,
    side: int,
    generator: np.random.Generator,
    frames: dict[tuple[Path, int | float], Image.Image],
) -> np.ndarray:
    if reference.view is None:
        raise Unusable("no mask", f"{reference.subject} has no picture of its own")
    surroundings, mask = _in_its_surroundings(reference.view, side, frames)
    other = np.zeros((side, side, 4), np.uint8)
    for view, origin in drawn_views(reference, recipe, generator):
        if origin != "cross":
            break  # what the video itself shows is the picture already
        try:
            other = _alone(cut_out(view, frames), side)
            break
        except Unusable:
            continue  # another view of it, or none
    return np.concatenate([surroundings, mask[..., None], other], axis=-1)


def _in_its_surroundings(
    view: View, side: int, frames: dict[tuple[Path, int | float], Image.Image]
) -> tuple[np.ndarray, np.ndarray]:
    """A square around the subject, uint8 `(side, side, 3)`, and its mask, uint8 `(side, side)`."""
    if view.frame is None:
        image = read_image(view.path)
        if image.mode != "RGBA":
            raise Unusable("no mask", f"{view.path} has no alpha")
        mask = image.getchannel("A")
        background = Image.new("RGB", image.size, WHITE)
        background.paste(image, mask=mask)
        image = background
    else:
        if view.mask is None:
            raise Unusable("no mask", f"a subject of {view.path} has a box alone")
        place = (view.path, view.frame)
        if place not in frames:
            frames[place] = read_frame(*place)
        cropped = crop_frame(frames[place], view.crop)
        pixels = decode_mask(view.mask, cropped.height, cropped.width)
        mask = Image.fromarray(pixels.astype(np.uint8) * 255)
        mask.info, image = dict(cropped.info), square(cropped)
        mask = square(mask)
    seen = np.asarray(mask) > 127
    if not seen.any():
        raise Unusable("no mask", f"the mask of a subject of {view.path} is empty")
    left, top, right, bottom = bounding_box(seen)
    half = MARGIN * max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    around = (x - half, y - half, x + half, y + half)
    # Where the square leaves the frame, the frame's edge goes on
    image = _replicated(image, around, side)
    mask = mask.transform((side, side), Image.Transform.EXTENT, around, Image.Resampling.BILINEAR)
    return np.asarray(image), np.asarray(mask)


def _replicated(image: Image.Image, box: tuple[float, float, float, float], side: int) -> Image.Image:
    """The box of an image, resized to a square, its outermost pixels going on where it leaves the image."""
    left, top = max(0, math.ceil(-box[0])), max(0, math.ceil(-box[1]))
    right, bottom = max(0, math.ceil(box[2] - image.width)), max(0, math.ceil(box[3] - image.height))
    padded = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    moved = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
    return Image.fromarray(padded).resize((side, side), Image.Resampling.BICUBIC, box=moved)


def _alone(image: Image.Image, side: int) -> np.ndarray:
    """A cut-out subject in the middle of a square, uint8 `(side, side, 4)`; nothing where it has no alpha."""
    if image.mode != "RGBA":
        return np.zeros((side, side, 4), np.uint8)
    scale = side / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas)
