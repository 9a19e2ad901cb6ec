"""Frames out of video files, by PyAV: only those that are needed, each by its exact number."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
from PIL import Image

from refalign_training.data.sample import Unusable


class VideoFrames:
    """
    The frames of an open video, by number: counted from 0 in the order in which they are shown.

    The numbers come from the packets' timestamps, so they are exact for variable frame rates too, and the length is
    known without decoding.

    Raises:
        Unusable: if there are no frames, or less than the file says.
    """

    def __init__(self, container: av.container.InputContainer) -> None:
        if not container.streams.video:
            raise Unusable("no frames", f"{container.name} has no video in it")
        self._container, self._stream = container, container.streams.video[0]
        self._stream.thread_type = "AUTO"
        packets = [packet for packet in container.demux(self._stream) if packet.size]
        if len(packets) < self._stream.frames:
            raise Unusable("video", f"{container.name} is cut short: {len(packets)} of {self._stream.frames} frames")
        shown = [packet for packet in packets if packet.pts is not None and not packet.is_discard]
        if not shown:
            raise Unusable("no frames", f"{container.name} has no frames")
        self._times = sorted({packet.pts for packet in shown})
        # When each key frame is shown, and when it is decoded, which is what containers seek by
        self._keys = sorted({(p.pts, p.pts if p.dts is None else p.dts) for p in shown if p.is_keyframe})

    def __len__(self) -> int:
        return len(self._times)

    @property
    def fps(self) -> float:
        """Frames a second, on average."""
        seconds = float((self._times[-1] - self._times[0]) * self._stream.time_base)
        return (len(self) - 1) / seconds if seconds > 0 else float(self._stream.average_rate or 25)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """
        The frames of these numbers as `(number, RGB image)`, upright, each once and in rising order.

        Raises:
            Unusable: if a number is not one of the video's, or its frame cannot be decoded.
        """
        wanted = sorted(set(numbers))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(self):
            raise Unusable("no frames", f"{self._container.name} has {len(self)} frames, but not frame {wanted[-1]}")
        for key, group in itertools.groupby(wanted, key=self._key_before):
            yield from self._read_group(key, list(group))

    def _key_before(self, number: int) -> int:
        """The place of the last key frame up to this frame."""
        return max(bisect.bisect_right(self._keys, self._times[number], key=lambda key: key[0]) - 1, 0)

    def _read_group(self, key: int, numbers: list[int]) -> Iterator[tuple[int, Image.Image]]:
        """Frames behind one key frame."""
        if not self._keys:
            raise Unusable("video", f"{self._container.name} has no key frame to decode from")
        for start in (self._keys[key][1], self._keys[0][1]):  # the second, should a seek have gone too far
            self._container.seek(start, stream=self._stream)
            for frame in self._container.decode(self._stream):
                if frame.pts == self._times[numbers[0]]:
                    yield numbers.pop(0), _upright(frame)
                    if not numbers:
                        return
                elif frame.pts is not None and frame.pts > self._times[numbers[0]]:
                    break
        raise Unusable("video", f"frame {numbers[0]} of {self._container.name} cannot be decoded")


def _upright(frame: av.VideoFrame) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


@contextmanager
def open_video(path: Path) -> Iterator[VideoFrames]:
    """
    The frames of a video file.

    Raises:
        Unusable: if the file is missing, is no video, has no frames, or one that is read cannot be decoded.
    """
    if not path.is_file():
        raise Unusable("missing file", f"{path} does not exist")
    try:
        # Only what the file itself holds: a playlist could name other files and addresses
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            yield VideoFrames(container)
    except (av.FFmpegError, OSError) as error:
        raise Unusable("video", f"{path} cannot be decoded: {error}") from error
