"""The small world: subjects that slide, hop and spin before painted places. All of it is drawn by code.

Everything follows from a [`Scene`]: the same scene gives the same pixels. Lengths are shares of the frame's side.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from refalign_training.data.randomness import numpy_generator
from refalign_training.sprites.subject import SIDE, Pose, Subject, draw_subject, posed, subjects


NUM_FRAMES = 17
FPS = 16

# -- Acts -------------------------------------------------------------------------------------------------------------

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


def draw_act(subject: Subject, act: str, spot: str, tilt: float = 0.0, every: int = 1) -> list[np.ndarray]:
    """The subject alone in an act, turned by `tilt` degrees more than that: RGBA on nothing, every so many frames."""
    sprite = draw_subject(subject)
    frames = []
    for number in range(0, NUM_FRAMES, every):
        at = pose(act, spot, number / (NUM_FRAMES - 1))
        frames.append(np.asarray(posed(sprite, replace(at, tilt=at.tilt + tilt), SIDE)))
    return frames


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


def draw_place(place: str, generator: np.random.Generator, side: int) -> Image.Image:
    """A place of [`PLACES`] without anybody, `side` x `side` pixels; its details are drawn."""
    _, above, below, ground = PLACES[place]
    tint = generator.uniform(0.94, 1.06, 3)
    share = np.linspace(0, 1, side)[:, None]
    sky = (np.array(above) * (1 - share) + np.array(below) * share)[:, None].repeat(side, 1) * tint
    image = Image.fromarray(sky.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    horizon = side * generator.uniform(0.6, 0.7)
    darker = tuple(map(int, np.array(ground) * 0.9))
    x = side * generator.uniform(0.1, 0.9)
    y = side * generator.uniform(0.08, 0.2)
    size = side * 0.07
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
    draw.rectangle((0, horizon, side, side), fill=ground)
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
    """The seed of what no caption tells: the light, details of the place, and a shift by some pixels."""

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
        acts = tuple(map(str, generator.choice(ACTS_OF_TWO, 2)))
    return Scene(who, acts, str(generator.choice(list(PLACES))), int(generator.integers(1 << 31)))


def captions(scene: Scene) -> tuple[str, ...]:
    """What happens and where, in two ways of saying it; not who it is."""
    where = PLACES[scene.place][0]
    if len(scene.subjects) == 1:
        act = ACTS[scene.acts[0]]
        return f"It {act} {where}.", f"{where.capitalize()}, it {act}."
    if scene.acts[0] == CROSSES:
        return f"The two change places {where}.", f"{where.capitalize()}, the two change places."
    left, right = map(ACTS.get, scene.acts)
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
    background = draw_place(scene.place, generator, side)
    light = generator.uniform(0.9, 1.06)
    shift = generator.uniform(-0.02, 0.02, 2)
    sprites = list(map(draw_subject, scene.subjects))
    frames, masks = [], np.zeros((len(sprites), NUM_FRAMES, side, side), bool)
    for number in range(NUM_FRAMES):
        frame = background.copy()
        # The left one is in front
        for index in reversed(range(len(sprites))):
            at = pose(scene.acts[index], scene.spots[index], number / (NUM_FRAMES - 1))
            sprite = posed(sprites[index], replace(at, x=at.x + shift[0], y=at.y + shift[1]), side)
            frame.paste(sprite, mask=sprite)
            seen = np.asarray(sprite.getchannel("A")) > 127
            masks[:, number] &= ~seen
            masks[index, number] = seen
        frames.append(np.asarray(ImageEnhance.Brightness(frame).enhance(light)))
    return Drawn(np.stack(frames), masks)
