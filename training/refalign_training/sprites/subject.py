"""The small world's subjects: who there is, and how they are drawn. Flat shapes with a face, all of it by code.

Lengths are shares of the frame's side, or of the body's radius where a subject is drawn for itself.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter
from PIL.Image import Resampling, Transform

from refalign_training.data.randomness import numpy_generator


COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (246, 216, 62),
    "green": (58, 168, 74),
    "cyan": (70, 196, 214),
    "blue": (52, 86, 204),
    "purple": (142, 68, 186),
    "pink": (244, 130, 178),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "plus")
PATTERNS = ("half", "stripes", "spots", "rim")
FACES = ("two eyes", "one eye", "glasses")
ACCESSORIES = ("nothing", "hat", "crown", "antennae")
PARTS = ("body", "pattern", "face", "accessory")  # a later one hides an earlier one
HELD_OUT_SHARE = 10  # one of so many combinations of shape, colours and pattern is never trained on
SIDE = 128  # pixels of a drawn frame; models see half of it

Point = tuple[float, float]


@dataclass(frozen=True, order=True)
class Subject:
    """Who it is: a name in each of six respects."""

    shape: str
    body: str
    """A colour of [`COLOURS`]; so `second`, another one."""
    second: str
    pattern: str
    face: str
    accessory: str

    @property
    def is_held_out(self) -> bool:
        """Whether no subject of its shape, colours and pattern is trained on."""
        generator = numpy_generator("sprites held out", self.shape, self.body, self.second, self.pattern)
        return int(generator.integers(HELD_OUT_SHARE)) == 0


@cache
def subjects(held_out: bool) -> tuple[Subject, ...]:
    """All that are held out, or all that are not, in a fixed order."""
    pairs = itertools.permutations(COLOURS, 2)
    found = []
    for shape, colours, *rest in itertools.product(SHAPES, pairs, PATTERNS, FACES, ACCESSORIES):
        subject = Subject(shape, *colours, *rest)
        if subject.is_held_out == held_out:
            found.append(subject)
    return tuple(found)


def of_same_colours(subject: Subject) -> list[Subject]:
    """All others of its two colours, held out or not."""
    found = []
    for shape, *rest in itertools.product(SHAPES, PATTERNS, FACES, ACCESSORIES):
        other = Subject(shape, subject.body, subject.second, *rest)
        if other != subject:
            found.append(other)
    return found


# -- Drawing ----------------------------------------------------------------------------------------------------------

_MASTER = 192  # pixels of the square that a subject is first drawn in
_CENTRE = _MASTER / 2
_UNIT = 60  # pixels of the body's radius there
_OUTLINE = (42, 38, 46)
_GLASSES = (38, 38, 44)
_HAT = (54, 48, 60)
_STRIPES = (-1.0, -0.2, 0.6)
_SPOTS = ((-0.55, 0.45), (0.55, 0.45), (0.0, 0.62), (-0.5, -0.5), (0.5, -0.5), (0.0, -0.75))
_CROWN = ((-0.5, -0.68), (-0.56, -1.36), (-0.24, -1.0), (0, -1.42), (0.24, -1.0), (0.56, -1.36), (0.5, -0.68))
_ONE_EYE = ((0.0, -0.05, 0.34),)  # x, y, radius
_TWO_EYES = ((-0.3, -0.05, 0.23), (0.3, -0.05, 0.23))


@cache
def _corners(shape: str) -> tuple[Point, ...]:
    """The body's corners, about the origin; its radius is near 1."""
    if shape == "circle":
        return tuple(map(_circle_point, _turns(64)))
    if shape == "square":
        return ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    if shape == "triangle":
        return ((0.0, -1.1), (1.1, 0.85), (-1.1, 0.85))
    if shape == "plus":
        a, b = 0.4, 1.0
        half = ((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a))
        return half + tuple((-x, -y) for x, y in half)
    if shape == "star":
        return tuple(itertools.starmap(_star_corner, enumerate(_turns(10))))
    return tuple(map(_heart_point, _turns(64)))


def _turns(count: int) -> list[float]:
    """So many angles around the circle."""
    return [2 * math.pi * i / count for i in range(count)]


def _circle_point(angle: float) -> Point:
    return 0.95 * math.cos(angle), 0.95 * math.sin(angle)


def _star_corner(number: int, angle: float) -> Point:
    radius = 0.55 if number % 2 else 1.15
    return radius * math.sin(angle), 0.08 - radius * math.cos(angle)


def _heart_point(angle: float) -> Point:
    x = 16 * math.sin(angle) ** 3
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return 0.066 * x, -0.066 * y - 0.08


def _points(*places: Point, scale: float = 1.0) -> list[Point]:
    """Places about the body's centre, in pixels of the drawing."""
    return [(_CENTRE + scale * _UNIT * x, _CENTRE + scale * _UNIT * y) for x, y in places]


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Any, outline: Any = None) -> None:
    box = _points((x - radius, y - radius), (x + radius, y + radius))
    draw.ellipse(box, fill=fill, outline=outline, width=3)


@cache
def _body_mask(shape: str, scale: float) -> Image.Image:
    mask = Image.new("L", (_MASTER, _MASTER))
    ImageDraw.Draw(mask).polygon(_points(*_corners(shape), scale=scale), fill=255)
    return mask


@cache
def _outlined(shape: str) -> Image.Image:
    return _body_mask(shape, 1.0).filter(ImageFilter.MaxFilter(9))


@cache
def _pattern_mask(shape: str, pattern: str) -> Image.Image:
    """Where the body has its second colour."""
    mask = Image.new("L", (_MASTER, _MASTER))
    draw = ImageDraw.Draw(mask)
    if pattern == "half":
        draw.rectangle((0, _CENTRE + 0.15 * _UNIT, _MASTER, _MASTER), fill=255)
    elif pattern == "stripes":
        for place in _STRIPES:
            top = _CENTRE + place * _UNIT
            draw.rectangle((0, top, _MASTER, top + 0.4 * _UNIT), fill=255)
    elif pattern == "spots":
        for x, y in _SPOTS:
            _disc(draw, x, y, 0.22, 255)
    else:
        mask = ImageChops.invert(_body_mask(shape, 0.62))
    return mask


def _draw_face(draw: ImageDraw.ImageDraw, face: str) -> None:
    eyes = _ONE_EYE if face == "one eye" else _TWO_EYES
    for x, y, radius in eyes:
        _disc(draw, x, y, radius, "white", _OUTLINE)
        _disc(draw, x, y, 0.45 * radius, _OUTLINE)
    if face == "glasses":
        for x, y, _ in eyes:
            _disc(draw, x, y, 0.29, _GLASSES)
        draw.rectangle(_points((-0.3, -0.12), (0.3, 0.0)), fill=_GLASSES)


def _draw_accessory(draw: ImageDraw.ImageDraw, accessory: str) -> None:
    if accessory == "hat":
        draw.rectangle(_points((-0.62, -0.86), (0.62, -0.7)), fill=_HAT)
        draw.rectangle(_points((-0.38, -1.42), (0.38, -0.8)), fill=_HAT)
    elif accessory == "crown":
        draw.polygon(_points(*_CROWN), fill=(250, 206, 60), outline=_OUTLINE, width=3)
    elif accessory == "antennae":
        for side in (-1, 1):
            draw.line(_points((side * 0.2, -0.6), (side * 0.5, -1.25)), fill=_OUTLINE, width=8)
            _disc(draw, side * 0.5, -1.27, 0.2, "white", _OUTLINE)


def draw_subject(subject: Subject) -> Image.Image:
    """The subject upright, RGBA on nothing; the body's radius is 60 of 192 pixels."""
    image = Image.new("RGBA", (_MASTER, _MASTER))
    image.paste(_OUTLINE, mask=_outlined(subject.shape))
    body = Image.new("RGB", (_MASTER, _MASTER), COLOURS[subject.body])
    body.paste(COLOURS[subject.second], mask=_pattern_mask(subject.shape, subject.pattern))
    image.paste(body, mask=_body_mask(subject.shape, 1.0))
    draw = ImageDraw.Draw(image)
    _draw_face(draw, subject.face)
    _draw_accessory(draw, subject.accessory)
    return image


def draw_part(subject: Subject, part: str) -> Image.Image:
    """Where the upright drawing shows a part of [`PARTS`]: L, 255 there."""
    alone = Image.new("RGBA", (_MASTER, _MASTER))
    if part == "body":
        return _outlined(subject.shape)
    if part == "pattern":
        return ImageChops.multiply(_pattern_mask(subject.shape, subject.pattern), _body_mask(subject.shape, 1.0))
    if part == "face":
        _draw_face(ImageDraw.Draw(alone), subject.face)
    else:
        _draw_accessory(ImageDraw.Draw(alone), subject.accessory)
    return alone.getchannel("A")


# -- In a frame -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    """Where a subject is in a frame."""

    x: float
    y: float
    radius: float
    tilt: float = 0.0
    """Degrees clockwise."""


def posed(sprite: Image.Image, pose: Pose, side: int) -> Image.Image:
    """A drawn subject brought to its pose, on a frame of nothing of `side` x `side` pixels."""
    scale = _UNIT / (pose.radius * side)  # pixels of the drawing in one of the frame
    while scale > 2:  # else the transform would skip pixels
        sprite = sprite.reduce(2)
        scale = scale / 2
    angle = math.radians(pose.tilt)
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    x, y, centre = pose.x * side, pose.y * side, sprite.width / 2
    matrix = (a, b, centre - a * x - b * y, -b, a, centre + b * x - a * y)
    return sprite.transform((side, side), Transform.AFFINE, matrix, Resampling.BILINEAR)


def draw_reference(subject: Subject, tilt: float = 0.0, light: float = 1.0, side: int = SIDE) -> Image.Image:
    """The subject alone on white, turned by `tilt` degrees, RGB of `side` x `side` pixels."""
    sprite = posed(draw_subject(subject), Pose(0.5, 0.5, 0.3, tilt), side)
    image = Image.new("RGB", (side, side), "white")
    image.paste(ImageEnhance.Brightness(sprite.convert("RGB")).enhance(light), mask=sprite.getchannel("A"))
    return image
