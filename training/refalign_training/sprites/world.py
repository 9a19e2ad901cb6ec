"""The small world: subjects of flat shapes that slide, hop and spin before painted places. All of it is drawn by code.

Everything follows from a [`Scene`]: the same scene gives the same pixels. Lengths are shares of the frame's side.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from PIL.Image import Resampling, Transform

from refalign_training.data.randomness import numpy_generator


SIDE = 128  # pixels of a drawn frame; models see half of it
NUM_FRAMES = 17
FPS = 16

# -- Subjects ---------------------------------------------------------------------------------------------------------

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
HELD_OUT_SHARE = 10  # one of so many combinations of shape, colours and pattern is never trained on


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
    every = itertools.product(SHAPES, pairs, PATTERNS, FACES, ACCESSORIES)
    named = (Subject(shape, *colours, *rest) for shape, colours, *rest in every)
    return tuple(subject for subject in named if subject.is_held_out == held_out)


def of_same_colours(subject: Subject) -> list[Subject]:
    """All others of its two colours, held out or not."""
    every = itertools.product(SHAPES, PATTERNS, FACES, ACCESSORIES)
    alike = [Subject(shape, subject.body, subject.second, *rest) for shape, *rest in every]
    return [other for other in alike if other != subject]


_MASTER = 192  # pixels of the square that a subject is first drawn in
_UNIT = 60  # pixels of the body's radius there
_OUTLINE = (42, 38, 46)


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The body's corners, about the origin; its radius is near 1."""
    if shape == "circle":
        return _on_circle(64, 0.95)
    if shape == "square":
        return ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    if shape == "triangle":
        return ((0.0, -1.1), (1.1, 0.85), (-1.1, 0.85))
    if shape == "plus":
        a, b = 0.4, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return tuple(corners + [(-x, -y) for x, y in corners])
    if shape == "star":
        angles = [math.pi * i / 5 for i in range(10)]
        radii = [1.15, 0.55] * 5
        return tuple((r * math.sin(a), 0.08 - r * math.cos(a)) for r, a in zip(radii, angles, strict=True))
    turns = [2 * math.pi * i / 64 for i in range(64)]
    x = [16 * math.sin(a) ** 3 for a in turns]
    y = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in turns]
    return tuple((0.066 * u, -0.066 * v - 0.08) for u, v in zip(x, y, strict=True))


def _on_circle(count: int, radius: float) -> tuple[tuple[float, float], ...]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


@cache
def _body_mask(shape: str, scale: float) -> Image.Image:
    mask = Image.new("L", (_MASTER, _MASTER))
    centre = _MASTER / 2
    corners = [(centre + scale * _UNIT * x, centre + scale * _UNIT * y) for x, y in _outline(shape)]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask


@cache
def _pattern_mask(shape: str, pattern: str) -> Image.Image:
    """Where the body has its second colour."""
    mask = Image.new("L", (_MASTER, _MASTER), 255 if pattern == "rim" else 0)
    draw, centre = ImageDraw.Draw(mask), _MASTER / 2
    if pattern == "half":
        draw.rectangle((0, centre + 0.15 * _UNIT, _MASTER, _MASTER), fill=255)
    elif pattern == "stripes":
        for place in (-1.0, -0.2, 0.6):
            top = centre + place * _UNIT
            draw.rectangle((0, top, _MASTER, top + 0.4 * _UNIT), fill=255)
    elif pattern == "spots":
        places = [(-0.55, 0.45), (0.55, 0.45), (0.0, 0.62), (-0.5, -0.5), (0.5, -0.5), (0.0, -0.75)]
        for x, y in places:
            _disc(draw, x, y, 0.22, 255)
    else:
        mask.paste(0, mask=_body_mask(shape, 0.62))
    return mask


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill, outline=None) -> None:
    centre = _MASTER / 2
    box = [centre + _UNIT * (place + sign * radius) for sign in (-1, 1) for place in (x, y)]
    draw.ellipse(box, fill=fill, outline=outline, width=3)


def _draw_face(draw: ImageDraw.ImageDraw, face: str) -> None:
    eyes = [(0.0, -0.05, 0.34)] if face == "one eye" else [(-0.3, -0.05, 0.23), (0.3, -0.05, 0.23)]
    for x, y, radius in eyes:
        _disc(draw, x, y, radius, "white", _OUTLINE)
        _disc(draw, x, y, 0.45 * radius, _OUTLINE)
    if face == "glasses":
        for x, y, _ in eyes:
            _disc(draw, x, y, 0.29, (38, 38, 44))
        centre = _MASTER / 2
        draw.rectangle((centre - 0.3 * _UNIT, centre - 0.12 * _UNIT, centre + 0.3 * _UNIT, centre), fill=(38, 38, 44))


def _draw_accessory(draw: ImageDraw.ImageDraw, accessory: str) -> None:
    def points(*places: tuple[float, float]) -> list[tuple[float, float]]:
        return [(_MASTER / 2 + _UNIT * x, _MASTER / 2 + _UNIT * y) for x, y in places]

    if accessory == "hat":
        draw.rectangle(points((-0.62, -0.86), (0.62, -0.7)), fill=(54, 48, 60))
        draw.rectangle(points((-0.38, -1.42), (0.38, -0.8)), fill=(54, 48, 60))
    elif accessory == "crown":
        crown = ((-0.5, -0.68), (-0.56, -1.36), (-0.24, -1.0), (0, -1.42), (0.24, -1.0), (0.56, -1.36), (0.5, -0.68))
        draw.polygon(points(*crown), fill=(250, 206, 60), outline=_OUTLINE, width=3)
    elif accessory == "antennae":
        for side in (-1, 1):
            draw.line(points((side * 0.2, -0.6), (side * 0.5, -1.25)), fill=_OUTLINE, width=8)
            _disc(draw, side * 0.5, -1.27, 0.2, "white", _OUTLINE)


@cache
def _outlined(shape: str) -> Image.Image:
    return _body_mask(shape, 1.0).filter(ImageFilter.MaxFilter(9))


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


def draw_reference(subject: Subject, tilt: float = 0.0, light: float = 1.0, side: int = SIDE) -> Image.Image:
    """The subject alone on white, turned by `tilt` degrees, RGB of `side` x `side` pixels."""
    pose = Pose(0.5, 0.5, 0.3, tilt)
    sprite = _posed(draw_subject(subject), pose, side)
    image = Image.new("RGB", (side, side), "white")
    image.paste(ImageEnhance.Brightness(sprite.convert("RGB")).enhance(light), mask=sprite.getchannel("A"))
    return image


# -- Acts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    """Where a subject is in a frame."""

    x: float
    y: float
    radius: float
    tilt: float = 0.0
    """Degrees clockwise."""


# What a subject alone may do; the first five also beside another
ACTS = {
    "hops": "hops up and down",
    "spins": "spins around",
    "grows": "grows",
    "rises": "rises",
    "falls": "falls",
    "slides right": "slides to the right",
    "slides left": "slides to the left",
}
ACTS_OF_TWO = tuple(ACTS)[:5]
CROSSES = "crosses"  # what two do together: they change places
_LEFT, _RIGHT = 0.26, 0.74


def pose(act: str, place: str, time: float) -> Pose:
    """
    Where a subject is at a time from 0 to 1.

    Args:
        act (`str`): of [`ACTS`], or [`CROSSES`].
        place (`str`): `"middle"`, alone, or `"left"` or `"right"` of two, where it is at the start.
    """
    is_alone = place == "middle"
    x = {"left": _LEFT, "middle": 0.5, "right": _RIGHT}[place]
    radius, high, low = (0.22, 0.32, 0.72) if is_alone else (0.18, 0.34, 0.74)
    if act == "hops":
        return Pose(x, 0.7 - 0.3 * abs(math.sin(2 * math.pi * time)), radius)
    if act == "spins":
        return Pose(x, 0.58, radius, 360 * time)
    if act == "grows":
        return Pose(x, 0.58, radius * (0.6 + 0.5 * time))
    if act == "rises":
        return Pose(x, low + (high - low) * time, radius)
    if act == "falls":
        return Pose(x, high + (low - high) * time, radius)
    if act == CROSSES:
        start, end, y = (_LEFT, _RIGHT, 0.66) if place == "left" else (_RIGHT, _LEFT, 0.58)
        return Pose(start + (end - start) * time, y, radius)
    start, end = (0.26, 0.74) if act == "slides right" else (0.74, 0.26)
    return Pose(start + (end - start) * time, 0.62, radius)


def _posed(sprite: Image.Image, pose: Pose, side: int) -> Image.Image:
    """A drawn subject brought to its pose, on a frame of nothing."""
    scale = _UNIT / (pose.radius * side)  # pixels of the drawing in one of the frame
    while scale > 2:  # else the transform would skip pixels
        sprite, scale = sprite.reduce(2), scale / 2
    angle = math.radians(pose.tilt)
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    x, y, centre = pose.x * side, pose.y * side, sprite.width / 2
    matrix = (a, b, centre - a * x - b * y, -b, a, centre + b * x - a * y)
    return sprite.transform((side, side), Transform.AFFINE, matrix, Resampling.BILINEAR)


def draw_act(subject: Subject, act: str, spot: str, tilt: float = 0.0, every: int = 1) -> list[np.ndarray]:
    """The subject alone in an act, turned by `tilt` degrees more than that: RGBA on nothing, every so many frames."""
    sprite = draw_subject(subject)
    times = [number / (NUM_FRAMES - 1) for number in range(0, NUM_FRAMES, every)]
    poses = [pose(act, spot, time) for time in times]
    return [np.asarray(_posed(sprite, replace(posed, tilt=posed.tilt + tilt), SIDE)) for posed in poses]


# -- Places -----------------------------------------------------------------------------------------------------------

# In words, the sky's colours from above, the ground's colour
PLACES = {
    "meadow": ("in a meadow", (186, 216, 236), (226, 238, 240), (166, 196, 132)),
    "beach": ("on a beach", (176, 220, 232), (222, 236, 232), (232, 218, 180)),
    "snow": ("in the snow", (190, 200, 222), (220, 224, 234), (242, 244, 248)),
    "night": ("at night", (44, 48, 84), (74, 76, 118), (62, 74, 72)),
    "desert": ("in a desert", (236, 206, 168), (246, 230, 200), (212, 172, 122)),
    "city": ("in a city", (192, 196, 204), (216, 216, 216), (142, 142, 148)),
}


def _draw_place(place: str, generator: np.random.Generator, side: int) -> Image.Image:
    _, above, below, ground = PLACES[place]
    tint = generator.uniform(0.94, 1.06, 3)
    share = np.linspace(0, 1, side)[:, None]
    sky = (np.array(above) * (1 - share) + np.array(below) * share)[:, None].repeat(side, 1) * tint
    image = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    draw, horizon = ImageDraw.Draw(image), side * generator.uniform(0.6, 0.7)
    darker = tuple(int(channel) for channel in np.array(ground) * 0.9)
    x, y, size = side * generator.uniform(0.1, 0.9), side * generator.uniform(0.08, 0.2), side * 0.07
    if place in ("meadow", "desert"):
        _round(draw, x, y, size, (250, 236, 170))
        for left in side * generator.uniform(-0.3, 0.8, 2):
            draw.ellipse((left, horizon - 0.14 * side, left + 0.7 * side, horizon + 0.4 * side), fill=darker)
    elif place == "beach":
        _round(draw, x, y, size, (250, 240, 190))
        draw.rectangle((0, horizon - 0.1 * side, side, horizon), fill=(110, 176, 200))
    elif place == "snow":
        for left in side * generator.uniform(-0.2, 0.7, 2):
            peak = (left + 0.25 * side, horizon - 0.26 * side)
            draw.polygon([(left, horizon), peak, (left + 0.5 * side, horizon)], fill=(170, 178, 200))
    elif place == "night":
        _round(draw, x, y, size, (236, 232, 206))
        for u, v in side * generator.uniform(0.02, 0.98, (10, 2)) * (1, 0.5):
            draw.rectangle((u, v, u + 1, v + 1), fill=(220, 220, 230))
    else:
        for left in range(0, side, side // 8):
            top = horizon - side * generator.uniform(0.08, 0.32)
            shade = int(generator.integers(160, 182))
            draw.rectangle((left, top, left + side // 8 - 2, horizon), fill=(shade, shade, shade + 8))
    draw.rectangle((0, horizon, side, side), fill=tuple(int(channel) for channel in np.array(ground)))
    return image.filter(ImageFilter.GaussianBlur(side / 128))


def _round(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


# -- Scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """All that a clip shows."""

    subjects: tuple[Subject, ...]
    """One, or two from the left to the right, as they stand at the start; so `acts`."""
    acts: tuple[str, ...]
    place: str
    seed: int = 0
    """Of what no caption tells: the light, details of the place, and a shift by some pixels."""

    @property
    def spots(self) -> tuple[str, ...]:
        """Where the subjects stand, as [`pose`] calls it."""
        return ("middle",) if len(self.subjects) == 1 else ("left", "right")

    def mirrored(self) -> "Scene":
        """The same with the two subjects' sides, and acts, exchanged."""
        return replace(self, subjects=self.subjects[::-1], acts=self.acts[::-1])


def random_scene(
    generator: np.random.Generator, who: tuple[Subject, ...], crosses_share: float = 1 / 6, acts: tuple[str, ...] = ()
) -> Scene:
    """A scene of these subjects; what they do, where, and all else is drawn, unless `acts` say it."""
    if not acts and len(who) == 1:
        acts = (str(generator.choice(list(ACTS))),)
    elif not acts and generator.random() < crosses_share:
        acts = (CROSSES, CROSSES)
    elif not acts:
        acts = tuple(str(act) for act in generator.choice(ACTS_OF_TWO, 2))
    return Scene(who, acts, str(generator.choice(list(PLACES))), int(generator.integers(1 << 31)))


def captions(scene: Scene) -> tuple[str, ...]:
    """What happens and where, in two ways of saying it; not who it is."""
    where = PLACES[scene.place][0]
    if len(scene.subjects) == 1:
        act = ACTS[scene.acts[0]]
        return f"It {act} {where}.", f"{where.capitalize()}, it {act}."
    if scene.acts[0] == CROSSES:
        return f"The two change places {where}.", f"{where.capitalize()}, the two change places."
    left, right = (ACTS[act] for act in scene.acts)
    return (
        f"On the left one {left}, on the right one {right}, {where}.",
        f"{where.capitalize()}, the left one {left} and the right one {right}.",
    )


class Facts(NamedTuple):
    """What a caption says."""

    place: str
    first_act: str
    second_act: str | None


def all_captions() -> Iterator[tuple[str, Facts]]:
    """Every caption there is."""
    someone = subjects(held_out=False)[0]
    alone = [(act,) for act in ACTS]
    together = [*itertools.product(ACTS_OF_TWO, repeat=2), (CROSSES, CROSSES)]
    for place, acts in itertools.product(PLACES, alone + together):
        facts = Facts(place, acts[0], acts[1] if len(acts) > 1 else None)
        for caption in captions(Scene((someone,) * len(acts), acts, place)):
            yield caption, facts


@dataclass(frozen=True)
class Drawn:
    """A scene's pixels."""

    frames: np.ndarray
    """uint8 `(frames, side, side, 3)`."""
    masks: np.ndarray
    """bool `(subjects, frames, side, side)`: where a subject is seen, not hidden by the other one."""


def draw_scene(scene: Scene, side: int = SIDE) -> Drawn:
    """The clip of a scene: 17 frames, 16 a second."""
    generator = numpy_generator("sprites scene", scene.seed)
    background = _draw_place(scene.place, generator, side)
    light = generator.uniform(0.9, 1.06)
    shift = generator.uniform(-0.02, 0.02, 2)
    sprites = [draw_subject(subject) for subject in scene.subjects]
    frames, masks = [], np.zeros((len(sprites), NUM_FRAMES, side, side), bool)
    for number in range(NUM_FRAMES):
        frame = background.copy()
        # The left one is in front
        for index in reversed(range(len(sprites))):
            posed = pose(scene.acts[index], scene.spots[index], number / (NUM_FRAMES - 1))
            posed = replace(posed, x=posed.x + shift[0], y=posed.y + shift[1])
            sprite = _posed(sprites[index], posed, side)
            frame.paste(sprite, mask=sprite)
            seen = np.asarray(sprite.getchannel("A")) > 127
            masks[:, number] &= ~seen
            masks[index, number] = seen
        frames.append(np.asarray(ImageEnhance.Brightness(frame).enhance(light)))
    return Drawn(np.stack(frames), masks)
