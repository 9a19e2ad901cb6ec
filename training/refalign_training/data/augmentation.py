"""Augmentation of references that were cut out of the clip itself (RefAlign, arXiv 2603.25743, section 4).

A reference with the pose it has in the video teaches copying; one that is turned and tinted does not.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from refalign.reference_images import WHITE


FLIP_PROBABILITY = 0.5
ROTATION = 45.0  # degrees, as are shears
SHEAR = 10.0
SCALE = (0.9, 1.1)
TRANSLATION = 0.05  # of the canvas
PERSPECTIVE_PROBABILITY = 0.5
PERSPECTIVE = 0.3  # of half the canvas, for each corner
BRIGHTNESS = (0.9, 1.1)
COLOUR_JITTER = 0.05  # of contrast and saturation; the hue stays, as a subject keeps its colours
BLUR = (0.1, 1.0)  # standard deviation, in pixels


def jitter_colours(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Other brightness, contrast and saturation, and a light blur. Alpha stays, so white behind a subject does."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB")
    colours = ImageEnhance.Brightness(colours).enhance(generator.uniform(*BRIGHTNESS))
    for enhance in (ImageEnhance.Contrast, ImageEnhance.Color):
        colours = enhance(colours).enhance(1 + generator.uniform(-COLOUR_JITTER, COLOUR_JITTER))
    colours = colours.filter(ImageFilter.GaussianBlur(generator.uniform(*BLUR)))
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def warp(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """
    Flips, rotates, shears, scales, moves and tilts an RGB image on its own canvas, in one resampling, with white where
    nothing is left.
    """
    flip = generator.random() < FLIP_PROBABILITY
    matrix = _affine(image.size, generator)
    if flip:
        matrix = matrix @ np.array([[-1, 0, image.width], [0, 1, 0], [0, 0, 1.0]])
    if generator.random() < PERSPECTIVE_PROBABILITY:
        matrix = _perspective(image.size, generator) @ matrix
    # PIL asks for the way back: from a place in the result to one in the source
    inverse = np.linalg.inv(matrix)
    coefficients = (inverse / inverse[2, 2]).flatten()[:8]
    return image.transform(
        image.size, Image.Transform.PERSPECTIVE, tuple(coefficients), Image.Resampling.BICUBIC, fillcolor=WHITE
    )


def _affine(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Rotation, shear and scale about the centre, then a move."""
    width, height = size
    angle = math.radians(generator.uniform(-ROTATION, ROTATION))
    shear_x, shear_y = (math.tan(math.radians(generator.uniform(-SHEAR, SHEAR))) for _ in range(2))
    scale = generator.uniform(*SCALE)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = scale * rotation @ np.array([[1, shear_x], [0, 1]]) @ np.array([[1, 0], [shear_y, 1]])
    centre = np.array([width / 2, height / 2])
    move = generator.uniform(-TRANSLATION, TRANSLATION, 2) * (width, height)
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, centre + move - linear @ centre
    return matrix


def _perspective(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """The homography that draws each corner inwards, by up to `PERSPECTIVE` of half the canvas in each direction."""
    width, height = size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=float)
    inwards = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)])
    moved = corners + inwards * generator.uniform(0, PERSPECTIVE / 2, (4, 2)) * (width, height)
    rows = []
    for (x, y), (u, v) in zip(corners, moved, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    return np.append(np.linalg.solve(np.array(rows), moved.flatten()), 1).reshape(3, 3)
