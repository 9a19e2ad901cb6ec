"""A track: a box for each frame of a video, with which one mask moves."""

import csv
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refalign.files import read_json


Track = list[tuple[float, float, float, float]]  # left, top, right, bottom, in pixels
NAMES = ["left", "top", "right", "bottom"]


def read_track(file: Path, frames: int, size: tuple[int, int]) -> Track:
    """
    The boxes of a video's frames, in their order.

    Args:
        file (`Path`): a `.json` file with a list of boxes, or a CSV file with a box in each line, with or without a
            line of names; each box is left, top, right and bottom, in pixels.
        frames (`int`): how many the video has.
        size (`tuple[int, int]`): their width and height.

    Raises:
        ValueError: if there is no such file or not one box for each frame, or one is empty or leaves the frame.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist. --track takes a file with a box for each frame.")
    rows = read_json(file, object) if file.suffix.lower() == ".json" else _read_lines(file)
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds {reprlib.repr(rows)}, not a list of boxes [left, top, right, bottom].")
    if len(rows) != frames:
        raise ValueError(f"{file} has {len(rows)} boxes, but the video {frames} frames. Write one for each frame.")
    return [_box(row, f"Box {number} of {file}", size) for number, row in enumerate(rows)]


def _read_lines(file: Path) -> list[list[str]]:
    lines = file.read_text("utf-8-sig", errors="replace").splitlines()
    try:
        rows = list(csv.reader(filter(str.strip, lines), skipinitialspace=True))
    except csv.Error as error:
        raise ValueError(f"{file} is not a CSV file: {error}. Write a box into each line of it.") from error
    has_names = rows and [cell.strip().lower() for cell in rows[0]] == NAMES
    return rows[1:] if has_names else rows


def _box(row: Any, name: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box of a file, checked."""
    try:
        if not isinstance(row, list):
            raise TypeError("It is not a list.")
        left, top, right, bottom = map(_number, row)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{name} is {reprlib.repr(row)}, but must be four finite numbers: left, top, right, bottom."
        ) from error
    if left >= right or top >= bottom:
        raise ValueError(f"{name} is {row}, so it is empty: right must be more than left, and bottom more than top.")
    if left < 0 or top < 0 or right > size[0] or bottom > size[1]:
        raise ValueError(f"{name} is {row}, so it leaves the frame of {size[0]}x{size[1]} pixels. Keep it inside.")
    return left, top, right, bottom


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError("It is not a finite number.")
    return number


def moved(mask: np.ndarray, start: Sequence[float], box: Sequence[float]) -> np.ndarray:
    """A mask, bool `(height, width)`, moved and scaled as the box `start` is to become `box`; what leaves the image is
    cut."""
    across = (start[2] - start[0]) / (box[2] - box[0])
    down = (start[3] - start[1]) / (box[3] - box[1])
    # Where in the mask each pixel comes from
    origin = (across, 0, start[0] - box[0] * across, 0, down, start[1] - box[1] * down)
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, origin)) > 0
