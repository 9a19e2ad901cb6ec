"""Artifact triplets of the small world: a picture whose subject is wrong in one place, that place, and a reference.

Right and wrong are drawn upright and brought to the same pose, so the true picture is known, and so is the true region
of the reference: the same place of the same subject, in the reference's pose.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from refalign.files import new_folder
from refalign_training.data.randomness import numpy_generator
from refalign_training.sprites.subject import (
    ACCESSORIES,
    COLOURS,
    FACES,
    PATTERNS,
    SIDE,
    Pose,
    Subject,
    draw_part,
    draw_subject,
    posed,
    subjects,
)
from refalign_training.sprites.views import draw_background, draw_view, fitted_pose, in_light


MOST_TRIES = 50
LEAST_CHANGED = 0.25  # of the wrong place's pixels, else nobody would see that it is wrong
LEAST_DIFFERENCE = 40  # of a pixel's colour, summed over the channels, of 765
MARGIN = 5  # pixels of the upright drawing by which the mask is larger than what is wrong, on all sides

Wrong = tuple[Image.Image, Image.Image]  # a wrong drawing, and where it replaces the right one: L


@dataclass(frozen=True)
class Triplet:
    """One task for a refining model; images of `SIDE` x `SIDE` pixels."""

    kind: str
    """What is wrong, of [`KINDS`]."""
    image: Image.Image
    """RGB, wrong inside the mask."""
    mask: Image.Image
    """L, 255 where the image may be wrong."""
    reference: Image.Image
    """RGBA: the subject alone, in another pose and light."""
    region: Image.Image
    """L, 255 in the part of the reference that the mask hides."""
    truth: Image.Image
    """RGB: what the image should be."""


def draw_triplet(number: int, seed: int = 0, held_out: bool = False) -> Triplet:
    """
    The triplet of that number: what is wrong goes round with it.

    Args:
        held_out (`bool`): whether the subject is one of those that are never trained on.
    """
    generator = numpy_generator("sprites artifact", seed, number)
    kind = list(KINDS)[number % len(KINDS)]
    subject = _draw_subject_for(kind, generator, held_out)
    right = draw_subject(subject)
    wrong, core = _draw_wrong(kind, subject, generator)
    place = core.filter(ImageFilter.MaxFilter(2 * MARGIN + 1))
    region = ImageChops.multiply(place, right.getchannel("A")).filter(ImageFilter.MaxFilter(9))
    seen = _random_pose(subject, generator, (0.6, 0.8), 25)
    background, light = draw_background(generator, SIDE), generator.uniform(0.85, 1.1)
    shown = _random_pose(subject, generator, (0.7, 0.95), 40)
    reference = posed(in_light(right, generator.uniform(0.85, 1.1)), shown, SIDE)
    return Triplet(
        kind=kind,
        image=draw_view(Image.composite(wrong, right, core), seen, background, light),
        mask=_where(place, seen),
        reference=reference,
        region=_where(ImageChops.multiply(region, place), shown),
        truth=draw_view(right, seen, background, light),
    )


def write_benchmark(folder: Path, count: int, seed: int = 0, held_out: bool = True) -> None:
    """
    Writes triplets in the form of the paper's benchmark, as `refalign-eval artifacts` reads them: all or none.

    Args:
        folder (`Path`): a new folder. It gets `<number>-<kind>/image.png`, `mask.png`, `reference.png`,
            `reference_mask.png` (the true region) and `truth.png`.
    """
    with new_folder(folder) as written:
        for number in tqdm(range(count), desc="triplets", mininterval=5):
            triplet = draw_triplet(number, seed, held_out)
            save_triplet(triplet, written / f"{number:04}-{triplet.kind}")


def save_triplet(triplet: Triplet, folder: Path) -> None:
    """Writes a triplet's pictures into a new folder."""
    folder.mkdir()
    triplet.image.save(folder / "image.png")
    triplet.mask.save(folder / "mask.png")
    triplet.reference.save(folder / "reference.png")
    triplet.region.save(folder / "reference_mask.png")
    triplet.truth.save(folder / "truth.png")


def _draw_subject_for(kind: str, generator: np.random.Generator, held_out: bool) -> Subject:
    """A subject that can be wrong in that respect: without an accessory, no reference shows what is missing."""
    pool = subjects(held_out)
    while True:
        subject = pool[generator.integers(len(pool))]
        if kind != "accessory" or subject.accessory != "nothing":
            return subject


def _random_pose(subject: Subject, generator: np.random.Generator, fill: tuple[float, float], tilt: float) -> Pose:
    shift = tuple(generator.uniform(-0.06, 0.06, 2))
    return fitted_pose(subject, generator.uniform(-tilt, tilt), generator.uniform(*fill), shift)


def _where(place: Image.Image, pose: Pose) -> Image.Image:
    """Where a place of the upright drawing is in a picture: L, 0 or 255."""
    seen = np.asarray(posed(place, pose, SIDE)) > 127
    return Image.fromarray(seen.astype(np.uint8) * 255)


# -- What can be wrong ------------------------------------------------------------------------------------------------


def _draw_wrong(kind: str, subject: Subject, generator: np.random.Generator) -> Wrong:
    """A wrong drawing that differs enough from the right one, and where."""
    right = np.asarray(draw_subject(subject)).astype(int)
    for _ in range(MOST_TRIES):
        wrong, core = KINDS[kind](subject, generator)
        changed = np.abs(np.asarray(wrong).astype(int) - right).sum(-1) > LEAST_DIFFERENCE
        place = np.asarray(core) > 127
        if place.any() and changed[place].mean() >= LEAST_CHANGED:
            return wrong, core
    raise RuntimeError(f"No wrong {kind} of {subject} was found in {MOST_TRIES} tries.")


def _other(names: tuple[str, ...], *but: str, generator: np.random.Generator) -> str:
    return str(generator.choice([name for name in names if name not in but]))


def _wrong_part(part: str, names: tuple[str, ...], subject: Subject, generator: np.random.Generator) -> Wrong:
    """Another face or accessory; the place is where either one is."""
    other = replace(subject, **{part: _other(names, getattr(subject, part), generator=generator)})
    both = ImageChops.lighter(draw_part(subject, part), draw_part(other, part))
    return draw_subject(other), both.filter(ImageFilter.MaxFilter(5))


def _wrong_pattern(subject: Subject, generator: np.random.Generator) -> Wrong:
    other = replace(subject, pattern=_other(PATTERNS, subject.pattern, generator=generator))
    return draw_subject(other), _blob_on(subject, "body", generator)


def _wrong_colours(subject: Subject, generator: np.random.Generator) -> Wrong:
    body = _other(tuple(COLOURS), subject.body, subject.second, generator=generator)
    second = _other(tuple(COLOURS), subject.body, subject.second, body, generator=generator)
    return draw_subject(replace(subject, body=body, second=second)), _blob_on(subject, "body", generator)


def _smeared(subject: Subject, generator: np.random.Generator) -> Wrong:
    right = draw_subject(subject)
    moved = ImageChops.offset(right, *generator.integers(-20, 21, 2).tolist())
    mixed = Image.blend(right, moved, 0.5).filter(ImageFilter.GaussianBlur(8))
    mixed.putalpha(right.getchannel("A"))
    part = str(generator.choice(("body", "face")))
    return mixed, _blob_on(subject, part, generator)


def _blob_on(subject: Subject, part: str, generator: np.random.Generator) -> Image.Image:
    """A rounded free form about a random point of a part, where the subject is: L."""
    rows, columns = np.nonzero(np.asarray(draw_part(subject, part)) > 127)
    index = generator.integers(len(rows))
    radius, phases = generator.uniform(13, 24), generator.uniform(0, 2 * math.pi, 3)
    corners = []
    for angle in np.linspace(0, 2 * math.pi, 48, endpoint=False):
        waves = np.cos(np.arange(1, 4) * angle + phases).sum()
        length = radius * (1 + 0.15 * waves)
        corners.append((columns[index] + length * math.cos(angle), rows[index] + length * math.sin(angle)))
    whole = draw_subject(subject).getchannel("A")
    blob = Image.new("L", whole.size)
    ImageDraw.Draw(blob).polygon(corners, fill=255)
    return ImageChops.multiply(blob, whole)


KINDS: dict[str, Callable[[Subject, np.random.Generator], Wrong]] = {
    "pattern": _wrong_pattern,
    "face": functools.partial(_wrong_part, "face", FACES),
    "accessory": functools.partial(_wrong_part, "accessory", ACCESSORIES),
    "colours": _wrong_colours,
    "smear": _smeared,
}
