"""One subject in a picture of the size that the small refining model sees, and what each of its places shows."""

import math

import numpy as np
from PIL import Image, ImageEnhance
from PIL.Image import Resampling

from refalign_training.sprites.subject import PARTS, Pose, Subject, draw_part, draw_subject, posed, subjects
from refalign_training.sprites.world import PLACES, draw_place


IMAGE_SIDE = 64  # pixels of an image, and of a reference, as the model sees them
GRID = 16  # patches of an image's side
_FIRST_RADIUS = 0.25  # with it, every subject is whole inside a frame, however it is turned


def fitted_pose(subject: Subject, tilt: float, fill: float, shift: tuple[float, float] = (0.0, 0.0)) -> Pose:
    """
    The pose in which the longer side of the subject's box is `fill` of the frame's side.

    Args:
        tilt (`float`): degrees clockwise.
        fill (`float`): above 1 the frame shows a piece of the subject.
        shift (`tuple`): from the frame's middle to the box's, in sides of the frame.
    """
    first = Pose(0.5, 0.5, _FIRST_RADIUS, tilt)
    alpha = posed(draw_subject(subject), first, 256).getchannel("A")
    left, top, right, bottom = (edge / 256 for edge in alpha.getbbox() or (0, 0, 256, 256))
    scale = fill / max(right - left, bottom - top)
    x = 0.5 + shift[0] + scale * (0.5 - (left + right) / 2)
    y = 0.5 + shift[1] + scale * (0.5 - (top + bottom) / 2)
    return Pose(x, y, scale * _FIRST_RADIUS, tilt)


def draw_view(sprite: Image.Image, pose: Pose, background: Image.Image, light: float = 1.0) -> Image.Image:
    """A drawn subject in its pose on a square background, RGB, all of it in that light."""
    image = background.copy()
    placed = posed(sprite, pose, image.width)
    image.paste(placed, mask=placed)
    return ImageEnhance.Brightness(image).enhance(light)


def draw_background(generator: np.random.Generator, side: int = IMAGE_SIDE) -> Image.Image:
    """A piece of a place, `side` x `side` pixels; in one of three somebody else is seen."""
    place = draw_place(str(generator.choice(list(PLACES))), generator, 2 * side)
    if generator.random() < 1 / 3:
        pool = subjects(held_out=False)
        other = draw_subject(pool[generator.integers(len(pool))])
        x, y = generator.uniform(0, 1, 2)
        placed = posed(other, Pose(x, y, generator.uniform(0.15, 0.3)), 2 * side)
        place.paste(placed, mask=placed)
    left, top = generator.uniform(0, 0.5, 2) * 2 * side
    length = 2 * side - max(left, top)
    box = (left, top, left + length, top + length)
    return place.resize((side, side), Resampling.BICUBIC, box)


KINDS = ("in a place", "on white", "from near by")


def random_view(generator: np.random.Generator, subject: Subject, kind: str | None = None) -> tuple[Image.Image, Pose]:
    """As a model may see a subject: in a place, alone on white, or a piece of that from near by."""
    kind = kind or str(generator.choice(KINDS))
    tilt, light = generator.uniform(-40, 40), generator.uniform(0.85, 1.1)
    fill, shift = (0.55, 1.0), 0.08
    if kind == "from near by":
        fill, shift = (1.0, 3.0), 0.5
    pose = fitted_pose(subject, tilt, generator.uniform(*fill), tuple(generator.uniform(-shift, shift, 2)))
    background = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), "white")
    sprite = draw_subject(subject)
    if kind == "in a place":
        return draw_view(sprite, pose, draw_background(generator), light), pose
    return draw_view(in_light(sprite, light), pose, background), pose


def in_light(sprite: Image.Image, light: float) -> Image.Image:
    """A drawn subject, RGBA, so much brighter."""
    lit = ImageEnhance.Brightness(sprite.convert("RGB")).enhance(light)
    lit.putalpha(sprite.getchannel("A"))
    return lit


def parts_of_view(subject: Subject, pose: Pose, side: int = GRID) -> np.ndarray:
    """The part that each cell of a view shows: 0 is none, 1 and more are those of [`PARTS`]; uint8 `(side, side)`."""
    shown = np.zeros((side, side), np.uint8)
    for number, part in enumerate(PARTS, 1):
        shown[np.asarray(posed(draw_part(subject, part), pose, side)) > 127] = number
    return shown


def own_places(pose: Pose, side: int = GRID) -> np.ndarray:
    """Where on the upright subject each cell of a view is, in its radii from its middle; float32 `(side, side, 2)`."""
    middles = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = np.meshgrid((middles - pose.x) / pose.radius, (middles - pose.y) / pose.radius)
    cosine, sine = math.cos(math.radians(pose.tilt)), math.sin(math.radians(pose.tilt))
    return np.stack((cosine * x + sine * y, cosine * y - sine * x), -1)
