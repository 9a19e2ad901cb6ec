"""Frames of a video, as the official tools take them: 32 that are spread evenly, or all."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from refalign_training.data.fields import Unusable
from refalign_training.data.video import open_video


FRAMES = 32  # of a video, whatever its length


def spread(total: int, count: int = FRAMES) -> list[int]:
    """
    The numbers of `count` frames from the first to the last of `total`: a short video's frames count several times.

    Source: `sample_video_frames` of the official tools, `numpy.linspace(0, total - 1, count, dtype=int)`.
    """
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def spread_frames(video: Path, count: int = FRAMES) -> list[np.ndarray]:
    """
    The frames of [`spread`], each RGB, uint8 `(height, width, 3)`.

    Raises:
        Unusable: if the file is missing, empty, cut, or not a video.
    """
    with open_video(video) as frames:
        numbers = spread(len(frames), count)
        images = {number: np.asarray(image) for number, image in frames.read(numbers)}
    return [images[number] for number in numbers]


def all_frames(video: Path, least: int = 1) -> Iterator[np.ndarray]:
    """
    Every frame in turn, RGB, uint8 `(height, width, 3)`; only one is held at a time.

    Raises:
        Unusable: if the file is missing, empty, cut, not a video, or has less than `least` frames.
    """
    with open_video(video) as frames:
        if len(frames) < least:
            raise Unusable("video", f"{video.name} is too short: it has {len(frames)} frames, and {least} are needed")
        for _, image in frames.read(range(len(frames))):
            yield np.asarray(image)
