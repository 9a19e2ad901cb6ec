"""Frames out of video files, by PyAV: only those that are needed, each by its exact number."""

import bisect
import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer
from av.video.reformatter import Colorspace
from PIL import Image

from refalign_training.data.fields import Unusable


# Files of pictures and sound alone: a playlist could name files outside the dataset's folder
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
UNSPECIFIED = 2  # FFmpeg's AVCOL_SPC_UNSPECIFIED, which PyAV's Colorspace lacks
# What is wrong with the machine and not with the file
_NO_FAULT_OF_THE_FILE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}


class VideoFrames:
    """
    The frames of an open video, by number: counted from 0 in the order in which they are shown. The numbers come from
    the packets' timestamps: they are exact for variable frame rates too, and the length is known without decoding.
    """

    def __init__(self, container: InputContainer) -> None:
        self._container, self._name = container, container.name
        if not container.streams.video:
            raise Unusable("no frames", f"{self._name} has no video in it")
        # Its threads stay those of slices: FFmpeg's frame threads can wait for ever on a damaged file
        self._stream = container.streams.video[0]
        count, times, keys = 0, set(), set()
        for packet in container.demux(self._stream):
            count += bool(packet.size)
            if packet.size and packet.pts is not None and not packet.is_discard:
                times.add(packet.pts)
                if packet.is_keyframe:
                    keys.add((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if count < self._stream.frames:
            raise Unusable("video", f"{self._name} is cut short: {count} of {self._stream.frames} frames")
        if count and not times:
            raise Unusable("video", f"{self._name} has no timestamps")
        if not times:
            raise Unusable("no frames", f"{self._name} has no frames")
        self._times = sorted(times)
        # When each key frame is shown, and when it is decoded, which is what containers seek by
        self._keys = sorted(keys)

    def __len__(self) -> int:
        return len(self._times)

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        seconds = float((self._times[-1] - self._times[0]) * self._stream.time_base)
        return (len(self) - 1) / seconds if seconds > 0 else float(self._stream.average_rate or 25)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """
        The frames of these numbers as `(number, RGB image)`, upright, each once and in rising order.

        Raises:
            Unusable: if a number is not one of the video's, or its frame cannot be decoded.
        """
        wanted = sorted(set(numbers))
        if outside := [number for number in wanted if not 0 <= number < len(self)]:
            raise Unusable("no frames", f"{self._name} has {len(self)} frames, but not frame {outside[0]}")
        for key, group in itertools.groupby(wanted, key=self._key_before):
            with _decoding(self._name):
                yield from self._read_group(key, list(group))

    def _key_before(self, number: int) -> int:
        """The place of the last key frame up to this frame."""
        return max(bisect.bisect_right(self._keys, self._times[number], key=lambda key: key[0]) - 1, 0)

    def _read_group(self, key: int, numbers: list[int]) -> Iterator[tuple[int, Image.Image]]:
        """Frames behind one key frame."""
        if not self._keys:
            raise Unusable("video", f"{self._name} has no key frame to decode from")
        for start in (self._keys[key][1], self._keys[0][1]):  # the second, should a seek have gone too far
            self._container.seek(start, stream=self._stream)
            for frame in self._container.decode(self._stream):
                if frame.pts == self._times[numbers[0]]:
                    yield numbers.pop(0), _upright(frame)
                    if not numbers:
                        return
                elif frame.pts is not None and frame.pts > self._times[numbers[0]]:
                    break
        raise Unusable("video", f"frame {numbers[0]} of {self._name} cannot be decoded")


def _upright(frame: av.VideoFrame) -> Image.Image:
    # Videos that do not say how their colours were made are played as HD's from 720 lines on
    is_untold_hd = frame.colorspace == UNSPECIFIED and frame.height >= 720
    image = frame.to_image(src_colorspace=Colorspace.ITU709 if is_untold_hd else None)
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


@contextmanager
def open_video(path: Path) -> Iterator[VideoFrames]:
    """
    The frames of a video file.

    Raises:
        Unusable: if the file is missing, is not a video, has no frames, or one that is read cannot be decoded.
    """
    check_file(path)
    with _decoding(path):
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        container = av.open(str(path), options=options, metadata_errors="replace")
    with container:
        with _decoding(path):
            frames = VideoFrames(container)
        yield frames


def check_file(path: Path) -> None:
    """Raises [`Unusable`] unless it is a file."""
    if not os.path.isfile(path):  # unlike Path's, false for a name that is too long too  # noqa: PTH113
        raise Unusable("missing file", f"{path} is not a file")


@contextmanager
def _decoding(name: str | Path) -> Iterator[None]:
    """What a damaged file makes PyAV raise, as [`Unusable`]."""
    try:
        yield
    except (av.FFmpegError, OSError, LookupError, UnicodeError) as error:
        if getattr(error, "errno", None) in _NO_FAULT_OF_THE_FILE:
            raise
        raise Unusable("video", f"{name} cannot be decoded: {getattr(error, 'strerror', None) or error}") from error
