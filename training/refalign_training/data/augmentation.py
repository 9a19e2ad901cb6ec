"""Augmentation of references that were cut out of the clip itself (RefAlign, arXiv 2603.25743, section 4).

A reference with the pose it has in the video teaches copying; one that is turned and tinted does not.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter
from PIL.Image import Resampling, Transform

from refalign.reference_images import WHITE, letterbox


FLIP_PROBABILITY = 0.5
ROTATION = 45.0  # degrees, as are shears
SHEAR = 10.0
SCALE = (0.9, 1.1)
TRANSLATION = 0.05  # of the canvas
PERSPECTIVE_PROBABILITY = 0.5
PERSPECTIVE = 0.3  # of half the canvas, for each corner
BRIGHTNESS = (0.9, 1.1)
COLOUR_JITTER = 0.05  # of contrast and saturation; the hue stays, as a subject keeps its colours
NEARLY_WHITE = 250
BLUR = (0.1, 1.0)  # standard deviation, in pixels


def jitter_colours(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """
    Other brightness, contrast and saturation, and a light blur, of an RGB or RGBA image; the result is RGBA. What
    alpha hides has no part in it: no edge takes on the colour of a background that was cut off. Without alpha, white
    counts as cut off, so that what is behind a subject stays white.
    """
    if image.mode == "RGB":
        is_white = np.asarray(image).min(axis=-1) >= NEARLY_WHITE
        image = image.copy()
        image.putalpha(Image.fromarray(np.where(is_white, 0, 255).astype(np.uint8)))
    image = ImageEnhance.Brightness(image).enhance(generator.uniform(*BRIGHTNESS))
    for enhance in (ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(1 + generator.uniform(-COLOUR_JITTER, COLOUR_JITTER))
    blur = ImageFilter.GaussianBlur(generator.uniform(*BLUR))
    return image.convert("RGBa").filter(blur).convert("RGBA")


def warp(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """
    Flips, rotates, shears, scales, moves and tilts what is not white in an RGB image of a reference, with white where
    nothing is left. What would leave the canvas makes it larger first: it is all seen, smaller.
    """
    width, height = image.size
    matrix = _perspective(image.size, generator) @ _affine(image.size, generator)
    left, top, right, bottom = ImageChops.invert(image).getbbox() or (0, 0, width, height)
    x, y, scale = matrix @ [(left, left, right, right), (top, bottom, top, bottom), (1, 1, 1, 1)]
    x, y = (x / scale).round(3), (y / scale).round(3)
    left, top = min(0, math.floor(x.min())), min(0, math.floor(y.min()))
    size = (max(width, math.ceil(x.max())) - left, max(height, math.ceil(y.max())) - top)
    # PIL asks for the way back: from a place in the result to one in the source
    inverse = np.linalg.inv(matrix) @ np.array([[1, 0, left], [0, 1, top], [0, 0, 1]])
    coefficients = tuple((inverse / inverse[2, 2]).flatten()[:8])
    warped = image.transform(size, Transform.PERSPECTIVE, coefficients, Resampling.BICUBIC, fillcolor=WHITE)
    return letterbox(warped, height, width)


def _affine(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """A flip, rotation, shear and scale about the centre, then a move."""
    width, height = size
    angle = math.radians(generator.uniform(-ROTATION, ROTATION))
    shear_x, shear_y = map(math.tan, np.radians(generator.uniform(-SHEAR, SHEAR, 2)))
    scale = generator.uniform(*SCALE)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    flip = -1 if generator.random() < FLIP_PROBABILITY else 1
    linear = scale * rotation @ np.array([[1, shear_x], [0, 1]]) @ np.array([[1, 0], [shear_y, 1]]) * (flip, 1)
    centre = np.array([width / 2, height / 2])
    move = generator.uniform(-TRANSLATION, TRANSLATION, 2) * (width, height)
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, centre + move - linear @ centre
    return matrix


def _perspective(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """The homography that draws each corner inwards, by up to `PERSPECTIVE` of half the canvas in each direction, or
    none at all."""
    if generator.random() >= PERSPECTIVE_PROBABILITY:
        return np.eye(3)
    width, height = size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=float)
    inwards = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)])
    moved = corners + inwards * generator.uniform(0, PERSPECTIVE / 2, (4, 2)) * (width, height)
    rows = []
    for (x, y), (u, v) in zip(corners, moved, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    return np.append(np.linalg.solve(np.array(rows), moved.flatten()), 1).reshape(3, 3)
