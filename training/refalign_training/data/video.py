"""Frames out of video files, by PyAV: only those that are needed, each by its exact number, as players show it."""

import bisect
import errno
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import av
from av.container import InputContainer
from av.error import ArgumentError
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from refalign.video import MOST_PIXELS, open_container
from refalign_training.data.fields import Unusable, check_file
from refalign_training.data.shown import HLG, PQ, show, square


# Files of pictures and sound alone: a playlist could name files outside the dataset's folder
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,dv,mxf,rm,ivf,nut"
# Where packets of these containers and codecs have times, each is of one frame that is shown
_TIMED_FORMATS = {"mov", "matroska"}
_TIMED_CODECS = {"h264", "hevc", "vvc", "av1", "vp9"}
_COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
_MOST_STRETCHED = 10  # pixels that are said to be shown longer than this are not those of a camera
# What is wrong with the machine and not with the file
_NO_FAULT_OF_THE_FILE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}


@dataclass
class _Packets:
    """What the packets of a stream tell."""

    count: int = 0
    """How many packets have something in them."""
    times: set[int] = field(default_factory=set)
    """When frames are shown."""
    keys: set[tuple[int, int]] = field(default_factory=set)
    """When each key frame is shown, and when it is decoded, which is what containers seek by."""
    doubtful: bool = False
    """One has no time, or another one's."""

    def add(self, packet: av.Packet) -> None:
        if not packet.size:
            return
        self.count += 1
        if packet.pts is None or packet.pts in self.times:
            self.doubtful = True
        elif not packet.is_discard:
            self.times.add(packet.pts)
            if packet.is_keyframe:
                self.keys.add((packet.pts, packet.pts if packet.dts is None else packet.dts))


class VideoFrames:
    """
    The frames of an open video, by number: counted from 0 in the order in which they are shown. The numbers come from
    the packets' timestamps where these can be trusted: they are exact for variable frame rates too, and the length is
    known without decoding. Elsewhere all frames are decoded and counted.
    """

    def __init__(self, path: Path, container: InputContainer) -> None:
        self._path, self._container, self._name = path, container, container.name
        self.notes: list[str] = []
        """What is worth knowing about the file, each as a rest of "It ..."."""
        # Its threads stay those of slices: FFmpeg's frame threads can wait for ever on a damaged file
        self._stream, packets = self._choose()
        self._place = container.streams.video.index(self._stream)
        if self._stream.width * self._stream.height > MOST_PIXELS:
            size = f"{self._stream.width}x{self._stream.height}"
            raise Unusable("video", f"{self._name} has pictures of {size}, more than {MOST_PIXELS:,} pixels")
        self._check_whole(packets.count)
        aspect = float(self._stream.sample_aspect_ratio or 1)
        if not 1 / _MOST_STRETCHED <= aspect <= _MOST_STRETCHED:
            raise Unusable("video", f"{self._name} says that its pixels are {aspect:.3g} times as wide as high")
        self._look = (aspect, self._stream.color_trc, self._stream.color_primaries)
        if self._stream.color_trc in (PQ, HLG):
            self.notes.append("is HDR; its light is mapped to an ordinary screen's")
        self._keys = sorted(packets.keys)
        self._is_counted = packets.doubtful or not _has_good_times(container, self._stream)
        times: list[int] = sorted(packets.times)
        self._times = times
        self._length = len(times)
        if self._is_counted:
            self.notes.append("has times that cannot be trusted; its frames are counted by decoding it")
            status = path.stat()
            self._length, times = _count(path, self._place, status.st_size, status.st_mtime_ns)
        if not self._length:
            raise Unusable("no frames", f"{self._name} has no frames")
        base = float(self._stream.time_base or 0)
        self.times: list[float] = [(time - times[0]) * base for time in times]
        """When each frame is shown, in seconds from the first one; empty if that is not known."""

    def _choose(self) -> tuple[VideoStream, _Packets]:
        """The film among covers, thumbnails and previews: moving, and the largest."""
        streams = self._container.streams.video
        packets = {stream.index: _Packets() for stream in streams}
        if streams:
            for packet in self._container.demux(*streams):
                packets[packet.stream.index].add(packet)
        films = [stream for stream in streams if not stream.disposition & _COVERS]
        if not films:
            what = "no video but a cover picture" if streams else "no video"
            raise Unusable("no frames", f"{self._name} has {what} in it")

        def rank(stream: VideoStream) -> tuple[bool, int, bool]:
            is_default = bool(stream.disposition & Disposition.default)
            return packets[stream.index].count > 1, stream.width * stream.height, is_default

        film = max(films, key=rank)
        if len(films) > 1:
            self.notes.append(f"holds {len(films)} videos; the one of {film.width}x{film.height} is taken")
        return film, packets[film.index]

    def _check_whole(self, count: int) -> None:
        if count >= self._stream.frames:
            return
        # Where a frame stays for long, AVI has chunks with nothing in them
        if self._container.format.name != "avi" or _lacks_its_end(self._path):
            raise Unusable("video", f"{self._name} is cut short: {count} of {self._stream.frames} frames")

    def __len__(self) -> int:
        return self._length

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        if self.times and self.times[-1] > 0:
            return (len(self) - 1) / self.times[-1]
        return float(self._stream.average_rate or 25)

    def read(self, numbers: Sequence[int], *, squares: bool = True) -> Iterator[tuple[int, Image.Image]]:
        """
        The frames of these numbers as `(number, RGB image)`, each once and in rising order, as players show them.
        Without `squares`, pixels that are not square stay as they are in the file, which is what annotations count
        in, for [`refalign_training.data.shown.square`].

        Raises:
            Unusable: if a number is not one of the video's, or its frame cannot be decoded.
        """
        wanted = sorted(set(numbers))
        if outside := [number for number in wanted if not 0 <= number < len(self)]:
            raise Unusable("no frames", f"{self._name} has {len(self)} frames, but not frame {outside[0]}")
        for number, frame in self._decode(wanted):
            image = show(frame, *self._look)
            yield number, square(image) if squares else image

    def _decode(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        if self._is_counted:
            with _decoding(self._name):
                yield from self._read_counted(wanted)
            return
        for key, group in itertools.groupby(wanted, key=self._key_before):
            with _decoding(self._name):
                yield from self._read_group(key, list(group))

    def _read_counted(self, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames of a file that is decoded from its start; it is opened anew, as seeking may not lead there."""
        with _open(self._path) as container:
            frames = container.decode(container.streams.video[self._place])
            for number, frame in enumerate(itertools.islice(frames, numbers[-1] + 1)):
                if number == numbers[0]:
                    yield numbers.pop(0), frame
        if numbers:
            raise Unusable("video", f"frame {numbers[0]} of {self._name} cannot be decoded")

    def _key_before(self, number: int) -> int:
        """The place of the last key frame up to this frame."""
        return max(bisect.bisect_right(self._keys, self._times[number], key=lambda key: key[0]) - 1, 0)

    def _read_group(self, key: int, numbers: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames behind one key frame."""
        if not self._keys:
            raise Unusable("video", f"{self._name} has no key frame to decode from")
        for start in (self._keys[key][1], self._keys[0][1]):  # the second, should a seek have gone too far
            self._container.seek(start, stream=self._stream)
            for frame in self._container.decode(self._stream):
                if frame.pts == self._times[numbers[0]]:
                    yield numbers.pop(0), frame
                    if not numbers:
                        return
                elif frame.pts is not None and frame.pts > self._times[numbers[0]]:
                    break
        raise Unusable("video", f"frame {numbers[0]} of {self._name} cannot be decoded")


def _has_good_times(container: InputContainer, stream: VideoStream) -> bool:
    codec = stream.codec_context.codec
    is_timed = codec.intra_only or stream.codec_context.name in _TIMED_CODECS or codec.name in _TIMED_CODECS
    return is_timed and container.format.name.split(",")[0] in _TIMED_FORMATS


@lru_cache(maxsize=8)
def _count(path: Path, place: int, size: int, changed: int) -> tuple[int, list[int]]:
    """How many frames a stream has, by decoding it, and when each is shown; no times if these are not all known."""
    with _open(path) as container, _decoding(path):
        times = [frame.pts for frame in container.decode(container.streams.video[place])]
    known = {time for time in times if time is not None}
    return len(times), sorted(known) if len(known) == len(times) else []


def _lacks_its_end(path: Path) -> bool:
    """Whether an AVI file is shorter than it says."""
    with path.open("rb") as file:
        head = file.read(8)
    return path.stat().st_size < 8 + int.from_bytes(head[4:], "little")


@contextmanager
def open_video(path: Path) -> Iterator[VideoFrames]:
    """
    The frames of a video file.

    Raises:
        Unusable: if the file is missing, is not a video, has no frames, or one that is read cannot be decoded.
    """
    check_file(path)
    with _open(path) as container:
        with _decoding(path):
            frames = VideoFrames(path, container)
        yield frames


def _open(path: Path) -> InputContainer:
    with _decoding(path):
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        try:
            return open_container(path, options, metadata_errors="replace")
        except ArgumentError:
            names = FORMATS.replace(",", ", ")
            raise Unusable("video", f"{path} is not of a format that is read. These are: {names}") from None


@contextmanager
def _decoding(name: str | Path) -> Iterator[None]:
    """What a damaged file makes PyAV raise, as [`Unusable`]."""
    try:
        yield
    except (av.FFmpegError, OSError, LookupError, UnicodeError) as error:
        if getattr(error, "errno", None) in _NO_FAULT_OF_THE_FILE:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, ArgumentError):  # all that FFmpeg says of it
            reason = f"{reason} (pictures of more than {MOST_PIXELS:,} pixels are not read)"
        raise Unusable("video", f"{name} cannot be decoded: {reason}") from error
