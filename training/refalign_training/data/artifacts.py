"""From a subject in its surroundings to an example of a refinement: a masked picture, a reference, the true region.

Masks, augmentation and crops are ours after what REFINE's paper says (Refine-by-Align, arXiv 2412.00306, section 3):
a random part of the subject is masked, and the reference is another picture of it, or the same one turned, scaled,
bent and lit in another way, on which the true region is therefore known.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.nn import functional as F

from refalign.reference_images import bounding_box
from refalign_training.data.fields import Unusable
from refalign_training.data.recipe import RefineOptions


ROTATION = 30.0  # degrees
SIZE = (0.6, 0.98)  # of the subject's longer side to the reference's
WINDOW = (2.0, 3.0)  # of the side of the picture's part that the model sees to the mask's box
SMALLEST_WINDOW = 0.3  # of the picture's side
LIGHT = (0.8, 1.15)
BENDING = 0.04  # of the reference's half side: the standard deviation of the elastic shift at 4 x 4 points
BLUR_PROBABILITY = 0.3
BLUR = 0.01  # of the side, at most: the standard deviation
DILATION = 16 / 512  # of the side, at most
TRIES = 8
STICKERS = (10, 40)  # how many, below the second: a few would leave most of a subject as it is
STICKER_RADIUS = (0.06, 0.22)  # of the square root of the subject's area


@dataclass(frozen=True)
class Example:
    """What a refinement is trained on, before it is encoded."""

    image: np.ndarray
    """The right picture, uint8 `(side, side, 3)`."""
    mask: np.ndarray
    """What is to be made anew, bool `(side, side)`."""
    reference: np.ndarray
    """The subject on white, or in refinement mode its region alone, uint8 `(reference side, reference side, 3)`."""
    region: np.ndarray
    """The true region on the reference, bool `(reference side, reference side)`; nothing where it is not known."""


def draw_example(
    subject: np.ndarray, side: int, reference_side: int, options: RefineOptions, generator: np.random.Generator
) -> Example:
    """
    An example of a subject, uint8 `(side, side, 8)` as of [`load_subjects`]. Raises [`Unusable`] if nothing of the
    subject is seen.
    """
    picture, seen = subject[..., :3], subject[..., 3] > 127
    if not seen.any():
        raise Unusable("no mask", "nothing of the subject is seen")
    mask = draw_mask(seen, options.mask_area, generator)
    if subject[..., 7].any():
        source, part = subject[..., 4:8], np.zeros_like(seen)
    else:
        if generator.random() < options.sticker_share:
            picture = with_stickers(picture, seen, generator)
        source, part = np.dstack([picture, subject[..., 3]]), mask & seen
    reference, region = _draw_reference(source, part, reference_side, options, generator)
    box = _draw_window(mask, generator)
    image = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC, box)
    blurred = Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BILINEAR, box)
    mask = _dilated(np.asarray(blurred) > 127, generator.uniform(0, DILATION) * side)
    return Example(np.asarray(image), mask, reference, region)


def _draw_window(mask: np.ndarray, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """The square part of a picture that the model sees: two to three times the box of its mask, which lies in it."""
    room, left, top, right, bottom = len(mask), *bounding_box(mask)
    longest = max(right - left, bottom - top)
    side = min(max(longest * generator.uniform(*WINDOW), SMALLEST_WINDOW * room), room)
    corner = []
    for low, high in ((left, right), (top, bottom)):
        first, last = max(0.0, high - side), min(low, room - side)
        corner.append(generator.uniform(first, max(first, last)))
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def with_stickers(picture: np.ndarray, seen: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A picture, uint8 `(side, side, 3)`, with some polygons of random colours on its subject, bool `(side, side)`."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    rows, columns = np.nonzero(seen)
    size = math.sqrt(len(rows))
    for _ in range(generator.integers(*STICKERS)):
        place = int(generator.integers(len(rows)))
        count = int(generator.integers(3, 7))
        angles = 2 * np.pi * (np.arange(count) + generator.random(count)) / count
        radii = size * generator.uniform(*STICKER_RADIUS, count)
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + (columns[place], rows[place])
        draw.polygon(list(map(tuple, points.tolist())), fill=tuple(generator.integers(0, 256, 3).tolist()))
    return np.where(seen[..., None], np.asarray(image), picture)


# -- Masks ------------------------------------------------------------------------------------------------------------


def draw_mask(seen: np.ndarray, area: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """
    A blob or a brush stroke over a share of the subject between those of `area`, bool as `seen`, where the subject
    is. Where none of some tries is in between, the one that comes nearest.
    """
    wanted = generator.uniform(*area)
    rows, columns = np.nonzero(seen)
    best, best_error = seen, math.inf
    for _ in range(TRIES):
        place = int(generator.integers(len(rows)))
        length = math.sqrt(wanted * len(rows))
        draw = _blob if generator.random() < 0.5 else _stroke
        mask = draw(seen.shape, (columns[place], rows[place]), length, generator)
        share = (mask & seen).sum() / len(rows)
        error = 0.0 if area[0] <= share <= area[1] else abs(share - wanted)
        if share and error < best_error:
            best, best_error = mask, error
        if not best_error:
            break
    return best


def _blob(
    shape: tuple[int, int], centre: tuple[float, float], length: float, generator: np.random.Generator
) -> np.ndarray:
    """A closed curve of Bezier arcs around a centre, of about `length` squared in area."""
    count = int(generator.integers(4, 8))
    angles = 2 * np.pi * (np.arange(count) + generator.uniform(0, 0.6, count)) / count
    radii = length * generator.uniform(0.4, 0.8, count)
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + centre
    middles = (points + np.roll(points, -1, 0)) / 2
    curve: list[tuple[float, float]] = []
    for number in range(count):
        start, end = middles[number - 1], middles[number]
        for t in np.linspace(0, 1, 8, endpoint=False):
            place = (1 - t) ** 2 * start + 2 * t * (1 - t) * points[number] + t**2 * end
            curve.append((place[0], place[1]))
    image = Image.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(image).polygon(curve, fill=1)
    return np.asarray(image)


def _stroke(
    shape: tuple[int, int], centre: tuple[float, float], length: float, generator: np.random.Generator
) -> np.ndarray:
    """A brush stroke of some turns around a centre, of about `length` squared in area."""
    width = max(2.0, length * generator.uniform(0.4, 0.7))
    points = [np.array(centre)]
    angle = generator.uniform(0, 2 * np.pi)
    for _ in range(3):
        angle += generator.uniform(-1, 1)
        points.append(points[-1] + length**2 / width / 3 * np.array([math.cos(angle), math.sin(angle)]))
    moved = np.array(points) - np.mean(points, 0) + centre
    line = list(map(tuple, moved.tolist()))
    image = Image.new("1", (shape[1], shape[0]))
    draw = ImageDraw.Draw(image)
    draw.line(line, fill=1, width=round(width), joint="curve")
    for x, y in line:
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)
    return np.asarray(image)


def _dilated(mask: np.ndarray, radius: float) -> np.ndarray:
    size = 2 * round(radius) + 1
    if size == 1:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(size))) > 127


# -- References -------------------------------------------------------------------------------------------------------


def _draw_reference(
    source: np.ndarray, part: np.ndarray, side: int, options: RefineOptions, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out subject, uint8 `(size, size, 4)`, on white in another pose, and the part of it that is masked."""
    place = _Pose(source[..., 3], generator)
    light = generator.uniform(*LIGHT)
    layers = _layers(source, part)
    drawn, region = _render(layers, place(_square_grid(side)), light)
    if region.any() and generator.random() >= options.alignment_share:
        box = _jittered(region, options, generator)
        drawn, region = _render(layers, place(_square_grid(side, *box)), light)
    image = Image.fromarray(drawn)
    if generator.random() < BLUR_PROBABILITY:
        image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0, BLUR) * side))
    return np.asarray(image), region


class _Pose:
    """Where in a picture of the subject each place of the reference comes from; both from -1 to 1."""

    def __init__(self, alpha: np.ndarray, generator: np.random.Generator) -> None:
        ends = _ends(alpha)
        self._centre = torch.from_numpy(ends.mean(1)).float()
        self._scale = float(np.diff(ends).max()) / 2 / generator.uniform(*SIZE)
        angle = math.radians(generator.uniform(-ROTATION, ROTATION))
        cosine, sine = math.cos(angle), math.sin(angle)
        self._rotation = torch.tensor([[cosine, -sine], [sine, cosine]])
        self._bend = torch.from_numpy(generator.normal(0, BENDING, (1, 2, 4, 4))).float()

    def __call__(self, places: torch.Tensor) -> torch.Tensor:
        """The places in the picture that places of the reference come from, both `(rows, columns, 2)`."""
        bend = F.grid_sample(self._bend, places[None], mode="bicubic", padding_mode="border", align_corners=True)
        bent = places + bend[0].permute(1, 2, 0)
        return self._scale * bent @ self._rotation.T + self._centre


def _ends(mask: np.ndarray) -> np.ndarray:
    """Left and right, top and bottom of a mask's box, from -1 to 1, `(2, 2)`."""
    left, top, right, bottom = bounding_box(mask)
    return np.array([(left, right), (top, bottom)]) / len(mask) * 2 - 1


def _square_grid(side: int, x: float = 0.0, y: float = 0.0, half: float = 1.0) -> torch.Tensor:
    """The places of a square's pixels, `(side, side, 2)`, by default of the whole reference."""
    steps = half * ((2 * torch.arange(side) + 1) / side - 1)
    rows, columns = torch.meshgrid(y + steps, x + steps, indexing="ij")
    return torch.stack([columns, rows], -1)


def _layers(source: np.ndarray, part: np.ndarray) -> torch.Tensor:
    """Colours times alpha, alpha, and the part: float `(5, size, size)` from 0 to 1."""
    pixels = torch.from_numpy(source).permute(2, 0, 1).float() / 255
    return torch.cat([pixels[:3] * pixels[3:], pixels[3:], torch.from_numpy(part)[None].float()])


def _render(layers: torch.Tensor, places: torch.Tensor, light: float) -> tuple[np.ndarray, np.ndarray]:
    """The subject on white, uint8 `(side, side, 3)`, and its part, bool `(side, side)`."""
    colours, alpha, part = F.grid_sample(layers[None], places[None], align_corners=False)[0].split((3, 1, 1))
    lit = (light * colours).minimum(alpha)
    pixels = 255 * (lit + 1 - alpha)
    return pixels.permute(1, 2, 0).round().byte().numpy(), (part[0] > 0.5).numpy()


def _jittered(
    region: np.ndarray, options: RefineOptions, generator: np.random.Generator
) -> tuple[float, float, float]:
    """The centre and half the side of a square around the region, larger and moved at random; from -1 to 1."""
    ends = _ends(region)
    half = max(float(np.diff(ends).max()) / 2, options.smallest_crop)
    half *= generator.uniform(*options.crop_scale)
    x, y = ends.mean(1) + 2 * half * generator.uniform(-options.crop_shift, options.crop_shift, 2)
    return float(x), float(y), half
