"""A decoded frame as players show it: upright, in square pixels, and in the colours of an ordinary screen."""

import math
import struct
from functools import lru_cache

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image, ImageFilter


# FFmpeg's AVCOL_SPC_UNSPECIFIED, AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67, AVCOL_PRI_BT2020: not all PyAV have them
UNSPECIFIED, PQ, HLG, BT2020 = 2, 16, 18, 9
ASPECT = "pixel_aspect"  # in `Image.info`: how many times wider than high a pixel is shown
_WHITE, _PEAK = 203.0, 1000.0  # cd/m2 of paper white and of the brightest highlights in HDR (ITU-R BT.2408)
_KNEE = 0.5  # up to this share of paper white, light stays as it is
_GAMMA = 2.4  # of screens (ITU-R BT.1886)
_LUMA = np.array([0.2627, 0.6780, 0.0593])  # of BT.2020
TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
_TABLE = 65  # points a side of a table of colours


def show(frame: av.VideoFrame, pixel_aspect: float, transfer: int, primaries: int) -> Image.Image:
    """
    A frame as an upright RGB image with the colours of BT.709. Its pixels are still those of the file: where they are
    not square, `Image.info` says so, and [`square`] makes them so.

    Args:
        pixel_aspect (`float`): how many times wider than high a pixel of the file is.
        transfer (`int`), primaries (`int`): FFmpeg's numbers for how light and colours are coded.
    """
    # Videos that do not say how their colours were made are played as HD's from 720 lines on
    is_untold_hd = frame.colorspace == UNSPECIFIED and frame.height >= 720
    image = frame.to_image(src_colorspace=Colorspace.ITU709 if is_untold_hd else None)
    if transfer in (PQ, HLG) or primaries == BT2020:
        image = image.filter(colours(transfer, primaries))
    image, turns = _turn(image, _matrix(frame))
    pixel_aspect = 1 / pixel_aspect if turns else pixel_aspect
    if pixel_aspect != 1:
        image.info[ASPECT] = pixel_aspect
    return image


def square(image: Image.Image) -> Image.Image:
    """The image with square pixels. One side grows, none shrinks: nothing is lost."""
    aspect = image.info.get(ASPECT, 1)
    size = (round(image.width * max(aspect, 1)), round(image.height * max(1 / aspect, 1)))
    image = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    image.info.pop(ASPECT, None)
    return image


def _matrix(frame: av.VideoFrame) -> tuple[int, ...]:
    """A frame's display matrix."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV up to 18 does not know all that FFmpeg keeps beside frames: the turn is told apart
        cosine, sine = math.cos(math.radians(frame.rotation)), math.sin(math.radians(frame.rotation))
        return tuple(round((1 << 16) * value) for value in (cosine, -sine, 0, sine, cosine))
    return (1, 0, 0, 0, 1) if matrix is None else struct.unpack("=9i", bytes(matrix))


def _turn(image: Image.Image, matrix: tuple[int, ...]) -> tuple[Image.Image, bool]:
    """
    The image as FFmpeg's autorotate turns and mirrors it, and whether its sides are exchanged. A display matrix
    `(a, b, u, c, d, v, x, y, w)` shows the point `(p, q)` at `(a p + c q, b p + d q)`.
    """
    a, b, _, c, d = matrix[:5]
    if a * d == b * c:  # shows nothing
        return image, False
    clockwise = round(math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c))))
    quarters = round(clockwise / 90)
    if abs(clockwise - 90 * quarters) > 1:
        return image.rotate(-clockwise, Image.Resampling.BICUBIC), False
    turns = bool(quarters % 2)
    if turns:
        image, a, d = image.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if d < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image, turns


# -- Colours ----------------------------------------------------------------------------------------------------------


@lru_cache
def colours(transfer: int, primaries: int) -> ImageFilter.Color3DLUT:
    """From colours as coded to those of BT.709. FFmpeg's own scaler takes seconds to make such a table."""
    steps = np.linspace(0, 1, _TABLE)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")
    coded = np.stack([red, green, blue], axis=-1)
    light = _LIGHT[transfer](coded) if transfer in _LIGHT else coded**_GAMMA
    if primaries == BT2020:
        light = light @ TO_709.T
    light = light.clip(0)
    if transfer in _LIGHT:
        light = _tone_map(light)
    table = light.clip(0, 1) ** (1 / _GAMMA)
    return ImageFilter.Color3DLUT(_TABLE, table.astype(np.float32).ravel(), _copy_table=False)


def _light_of_pq(coded: np.ndarray) -> np.ndarray:
    """What SMPTE ST 2084 codes, paper white being 1."""
    root = coded ** (32 / 2523)
    return 10000 / _WHITE * ((root - 0.8359375).clip(0) / (18.8515625 - 18.6875 * root)) ** (16384 / 2610)


def _light_of_hlg(coded: np.ndarray) -> np.ndarray:
    """What ITU-R BT.2100's HLG codes, on a screen of 1000 cd/m2; paper white is 1."""
    scene = np.where(coded <= 0.5, coded**2 / 3, (np.exp((coded - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return _PEAK / _WHITE * scene * (scene @ _LUMA)[..., None] ** 0.2


_LIGHT = {PQ: _light_of_pq, HLG: _light_of_hlg}


def _tone_map(light: np.ndarray) -> np.ndarray:
    """FFmpeg's `tonemap=mobius` on the largest of a pixel's channels: the peak becomes 1, hues stay."""
    peak = _PEAK / _WHITE
    largest = light.max(axis=-1, keepdims=True).clip(1e-6)
    a = -(_KNEE**2) * (peak - 1) / (_KNEE**2 - 2 * _KNEE + peak)
    b = (_KNEE**2 - 2 * _KNEE * peak + peak) / (peak - 1)
    seen = largest.clip(None, peak)
    mapped = (b + _KNEE) ** 2 / (b - a) * (seen + a) / (seen + b)
    return light / largest * np.where(seen <= _KNEE, seen, mapped)
