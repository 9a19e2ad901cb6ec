"""From a [`Sample`] to pixels: the frames, the references as the model will see them, and one of the captions."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from refalign.reference_images import load_reference_image, prepare_reference_image
from refalign_training.data.augmentation import jitter_colours, warp
from refalign_training.data.fields import Unusable, check_file
from refalign_training.data.masks import check_box, decode_mask
from refalign_training.data.played import Played, fit_of
from refalign_training.data.randomness import numpy_generator
from refalign_training.data.recipe import PAPER_STRIDE, REAL_TIME, Recipe
from refalign_training.data.sample import Reference, Sample, View
from refalign_training.data.shown import square
from refalign_training.data.video import open_video


logger = logging.getLogger(__name__)

WARN = partial(logger.warning, "A reference is left out: %s")
Origin = Literal["regular", "cross", "image"]


@dataclass(frozen=True)
class ReferencePixels:
    """A reference as the model will see it."""

    image: Image.Image
    """RGB, of the video's size, letterboxed on white; with the recipe's `long_edge` in its own aspect."""
    subject: str
    """References of one sample with equal subjects show the same one."""
    origin: Origin
    """From the clip itself, from another clip, or an image file."""


def draw_prompt(sample: Sample, recipe: Recipe, variant: int = 0) -> str:
    """One of the sample's captions."""
    generator = numpy_generator("prompt", recipe.seed, variant, sample.id)
    return sample.prompts[generator.integers(len(sample.prompts))]


def draw_conditions(
    seed: int, step: int, sample_id: str, *, no_text: float = 0.1, no_references: float = 0.1, neither: float = 0.1
) -> tuple[bool, bool]:
    """
    Whether a sample keeps its text, and whether it keeps its references, at a training step. The three probabilities
    of dropping exclude each other (RefAlign, arXiv 2603.25743, section 4).

    Raises:
        ValueError: if a probability is below 0, or their sum above 1.
    """
    if not (min(no_text, no_references, neither) >= 0 and no_text + no_references + neither <= 1):
        raise ValueError(
            f"The dropout rates are {no_text}, {no_references} and {neither}; pass none below 0, and 1 at most in all."
        )
    place = numpy_generator("conditions", seed, step, sample_id).random()
    drops_text = place < no_text or no_text + no_references <= place < no_text + no_references + neither
    drops_references = no_text <= place < no_text + no_references + neither
    return not drops_text, not drops_references


def draw_frames(
    available: int,
    fps: float,
    recipe: Recipe,
    generator: np.random.Generator,
    *,
    stride: float = PAPER_STRIDE,
    times: np.ndarray | None = None,
) -> np.ndarray:
    """
    Which of a clip's frames are taken, int64 `(num_frames,)`, rising from 0 to at most `available - 1`.

    The recipe's stride, else `stride`, is relative to 25 frames per second and need not be whole; the start is random.
    A clip that is too short for it is taken as a whole, more slowly, and frames repeat where it has fewer than are
    needed. Where the rate is variable, `times` says when each frame is shown, so that motion keeps its speed.
    """
    span = min(available - 1, (recipe.num_frames - 1) * (recipe.stride or stride) * fps / 25)
    places = generator.uniform(0, available - span) + np.linspace(0, span, recipe.num_frames)
    places = np.minimum(places, available - 1)
    if times is None:
        return np.floor(places + 1e-6).astype(np.int64)  # 1e-6: a whole stride stays whole
    moments = times[0] + places * (times[-1] - times[0]) / (available - 1)
    return np.searchsorted(times, moments + 1e-6, side="right") - 1


def load_video(sample: Sample, recipe: Recipe, variant: int = 0) -> np.ndarray:
    """
    The frames that are drawn from the clip, uint8 `(frames, height, width, 3)`: scaled to cover the size, and the
    centre of that.

    Raises:
        Unusable: if the video cannot be read, or has no frames in the clip's range.
    """
    return play(sample, recipe, variant)[0]


def play(sample: Sample, recipe: Recipe, variant: int = 0) -> tuple[np.ndarray, Played]:
    """What [`load_video`] gives, and how it was made. Raises [`Unusable`]."""
    clip = sample.clip
    with open_video(clip.path) as video:
        end = len(video) if clip.end is None else min(clip.end, len(video))
        if not 0 <= clip.start < end:
            raise Unusable("no frames", f"{clip.path} has {len(video)} frames, the clip is {clip.start} to {clip.end}")
        generator = numpy_generator("frames", recipe.seed, variant, sample.id)
        available, fps = end - clip.start, video.fps
        times = _variable_times(video.times[clip.start : end])
        if times is not None:
            fps = (available - 1) / (times[-1] - times[0])
        numbers = draw_frames(available, fps, recipe, generator, stride=clip.stride, times=times) + clip.start
        frames, size = {}, (0, 0)
        for number, frame in video.read(numbers.tolist(), squares=False):
            image = square(crop_frame(frame, clip.crop))
            size = image.size
            frames[number] = np.asarray(cover(image, None, recipe.height, recipe.width))
        stride = recipe.stride or clip.stride
        slowdown = max((recipe.num_frames - 1) * stride * fps / 25 / max(available - 1, 1), 1.0)
        seconds, speed = available / fps, stride / REAL_TIME / slowdown
        notes = tuple(video.notes)
    played = Played(clip.path, size, fps, seconds, speed, slowdown, *fit_of(size, recipe), notes)
    return np.stack([frames[number] for number in numbers]), played


def _variable_times(times: Sequence[float]) -> np.ndarray | None:
    """The times, if frames are shown for longer and shorter by more than clocks round."""
    if len(times) < 3:
        return None
    steps = np.diff(times)
    usual = np.median(steps)
    return np.array(times) if np.abs(steps - usual).max() > 0.5 * usual else None


def cover(image: Image.Image, crop: tuple[int, int, int, int] | None, height: int, width: int) -> Image.Image:
    """The crop of an image, scaled to cover a size and centred; what is too much is cut off. Raises [`Unusable`]."""
    # Cropped apart, so that no filter reaches what was cut off
    return ImageOps.fit(square(crop_frame(image, crop)), (width, height), Image.Resampling.BICUBIC)


def crop_frame(image: Image.Image, crop: tuple[int, int, int, int] | None) -> Image.Image:
    left, top, right, bottom = crop or (0, 0, *image.size)
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise Unusable("crop", f"{crop} (left, top, right, bottom) in a frame of {image.width}x{image.height}")
    return image.crop((left, top, right, bottom))


def load_references(
    sample: Sample, recipe: Recipe, variant: int = 0, on_fault: Callable[[Unusable], None] = WARN
) -> list[ReferencePixels]:
    """
    The references that can be read, in the sample's order. Where the view that was drawn cannot be read, the subject's
    other views are tried. Each failure goes to `on_fault`. Raises [`Unusable`] if no reference can be read.
    """
    frames: dict[tuple[Path, int | float], Image.Image] = {}  # several subjects are cut out of one frame
    references = []
    for number, reference in enumerate(sample.references):
        generator = numpy_generator("reference", recipe.seed, variant, sample.id, number)
        for view, origin in drawn_views(reference, recipe, generator):
            try:
                image = cut_out(view, frames)
            except Unusable as fault:
                on_fault(fault)
                continue
            references.append(ReferencePixels(_prepare(image, origin, recipe, generator), reference.subject, origin))
            break
    if not references:
        raise Unusable("no references", f"none of the {len(sample.references)} can be read")
    return references


def drawn_views(reference: Reference, recipe: Recipe, generator: np.random.Generator) -> list[tuple[View, Origin]]:
    """The view that is drawn, and behind it the others in case it cannot be read."""
    takes_cross = generator.random() < recipe.cross_probability
    views: list[tuple[View, Origin]] = []
    for index in generator.permutation(len(reference.cross)):
        views.append((reference.cross[index], "cross"))
    if reference.view is not None:
        origin = "image" if reference.view.frame is None else "regular"
        views.insert(len(views) if takes_cross else 0, (reference.view, origin))
    return views


def _prepare(image: Image.Image, origin: Origin, recipe: Recipe, generator: np.random.Generator) -> Image.Image:
    augments = recipe.augment == "all" or recipe.augment == origin
    if augments:
        image = jitter_colours(image, generator)
    image = prepare_reference_image(image, recipe.height, recipe.width, cut_out=False, long_edge=recipe.long_edge)
    return warp(image, generator) if augments else image


def cut_out(view: View, frames: dict[tuple[Path, int | float], Image.Image]) -> Image.Image:
    """The view's subject: RGBA where it has a mask or its file has alpha, else RGB. Raises [`Unusable`]."""
    if view.frame is None:
        return read_image(view.path)
    place = (view.path, view.frame)
    if place not in frames:
        frames[place] = read_frame(*place)
    image = crop_frame(frames[place], view.crop)
    if view.mask is not None:
        mask = decode_mask(view.mask, image.height, image.width)
        if mask.any():  # else its box has to do
            image.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
    if view.box is not None:
        scale = 1.0 if view.box_long_side is None else max(image.size) / view.box_long_side
        box = [side * scale for side in view.box]
        left, top, right, bottom = check_box(box, image.width, image.height, tolerance=scale)
        image = image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
    return square(image)


def read_image(path: Path) -> Image.Image:
    check_file(path)
    try:
        return load_reference_image(path)
    except ValueError as error:
        raise Unusable("image", str(error)) from error


def read_frame(path: Path, frame: int | float) -> Image.Image:
    with open_video(path) as video:
        if isinstance(frame, float):  # a share of all
            frame = min(int(frame * len(video)), len(video) - 1)
        ((_, image),) = video.read([frame], squares=False)
    return image
