"""
Frames of a video, as the official tools take them: 32 that are spread evenly, or all.

They take colours as FFmpeg does unasked, by BT.601 where a video does not say; players take BT.709 for large ones.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from refalign.video import open_container
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
    total = _count(video)
    numbers = spread(total, count)
    wanted = set(numbers)
    kept = {}
    for number, frame in enumerate(_decode(video, total)):
        if number in wanted:
            kept[number] = frame.to_ndarray(format="rgb24")
    return [kept[number] for number in numbers]


def all_frames(video: Path, least: int = 1) -> Iterator[np.ndarray]:
    """
    Every frame in turn, RGB, uint8 `(height, width, 3)`; only one is held at a time.

    Raises:
        Unusable: if the file is missing, empty, cut, not a video, or has less than `least` frames.
    """
    total = _count(video)
    if total < least:
        raise Unusable("video", f"{video.name} is too short: it has {total} frames, and {least} are needed")
    for frame in _decode(video, total):
        yield frame.to_ndarray(format="rgb24")


def _count(video: Path) -> int:
    """How many frames a whole video has."""
    with open_video(video) as frames:
        return len(frames)


def _decode(video: Path, total: int) -> Iterator[av.VideoFrame]:
    """The frames of a video, which must be so many."""
    decoded = 0
    try:
        with open_container(video) as container:
            for frame in container.decode(video=0):
                decoded += 1
                yield frame
    except (av.FFmpegError, OSError, UnicodeError) as error:
        raise Unusable("video", f"{video.name} cannot be decoded: {error}") from error
    if decoded < total:
        raise Unusable("video", f"{video.name} is damaged: {decoded} of its {total} frames can be decoded")
