import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from refalign.video import write_video
from refalign_training.data.sample import Unusable
from refalign_training.data.video import open_video


DAMAGED = Path(__file__).parents[2] / "fixtures/damaged_hevc.mp4"
CODECS = {
    "b_frames.mp4": ("libx264", {"bf": "3", "g": "12"}),
    "open_groups.mp4": ("libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "one_group.mkv": ("libx264", {"g": "250"}),
    "transport.ts": ("libx264", {"bf": "2", "g": "12"}),
    "old.avi": ("mpeg4", {}),
    "web.webm": ("libvpx-vp9", {"g": "12"}),
}


def write_greys(path, codec="libx264", options=None, count=60, times=None):
    """A video whose frame n is of grey 4n; `times` in milliseconds make it one of variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path, numbers):
    """The numbers that the frames' greys tell, by the numbers asked for."""
    with open_video(path) as video:
        return {number: np.asarray(image).mean() / 4 for number, image in video.read(numbers)}


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_those_of_their_numbers(tmp_path, name):
    path = write_greys(tmp_path / name, *CODECS[name])
    greys = read(path, [59, 3, 3, 17, 18, 40, 11, 12, 13, 0])
    assert list(greys) == [0, 3, 11, 12, 13, 17, 18, 40, 59]
    assert list(greys.values()) == pytest.approx(list(greys), abs=0.9)


def test_a_variable_frame_rate_does_not_shift_numbers(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(10, 90, 60)).tolist()
    path = write_greys(tmp_path / "a.mp4", "libx264", {"g": "10", "bf": "2"}, times=times)
    greys = read(path, range(60))
    assert list(greys.values()) == pytest.approx(list(range(60)), abs=0.9)


def test_length_and_rate_are_known_without_decoding(tmp_path):
    with open_video(write_greys(tmp_path / "a.mp4")) as video:
        assert len(video) == 60
        assert video.fps == pytest.approx(30)


class Spy:
    """A container that remembers how many frames were decoded."""

    def __init__(self, container):
        self.container, self.decoded = container, 0

    def __getattr__(self, name):
        return getattr(self.container, name)

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame


def test_only_what_leads_to_a_frame_is_decoded(tmp_path):
    with open_video(write_greys(tmp_path / "a.mp4", "libx264", {"g": "10", "bf": "0"})) as video:
        video._container = Spy(video._container)
        assert [number for number, _ in video.read([45, 12])] == [12, 45]
        assert video._container.decoded == 3 + 6  # from the key frames 10 and 40


def test_a_phones_video_is_upright(tmp_path):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32] = 255
    path = write_video([frame] * 3, tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # of the matrix by which the track is shown
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise
    path.write_bytes(data)
    with open_video(path) as video:
        ((_, image),) = video.read([1])
    assert image.size == (48, 64)
    assert np.asarray(image)[:30].min() > 200
    assert np.asarray(image)[34:].max() < 50


def test_a_number_that_is_none(tmp_path):
    path = write_greys(tmp_path / "a.mp4", count=5)
    with pytest.raises(Unusable, match="has 5 frames, but not frame 5") as caught:
        read(path, [5])
    assert caught.value.kind == "no frames"


def cut_short(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def cut_in_the_pictures(path):
    """The index is whole and stands in front; the pictures are not."""
    fast = path.with_name("fast.mp4")
    with av.open(str(path)) as source, av.open(str(fast), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data = fast.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2])


def scramble(path):
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : start + 4000] = bytes(4000)
    path.write_bytes(data)


def only_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


def a_text(path):
    path.write_text("no video at all")


def nothing(path):
    path.write_bytes(b"")


def no_file(path):
    path.unlink()


def a_long_name(path):
    return path.with_name("a" * 300 + ".mp4")


@pytest.mark.parametrize(
    ("breakage", "kind"),
    [
        (cut_short, "video"),
        (cut_in_the_pictures, "video"),
        (scramble, "video"),
        (only_sound, "no frames"),
        (a_text, "video"),
        (nothing, "video"),
        (no_file, "missing file"),
        (a_long_name, "missing file"),
    ],
)
def test_what_cannot_be_decoded_is_unusable(tmp_path, breakage, kind):
    path = write_greys(tmp_path / "a.mp4", "libx264", {"g": "10"})
    path = breakage(path) or path
    with pytest.raises(Unusable) as caught:
        read(path, range(60))
    assert caught.value.kind == kind
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["list.m3u8", "list.ffconcat", "picture.png"])
def test_a_file_that_names_others_or_is_no_video_is_not_opened(tmp_path, name):
    write_greys(tmp_path / "other.ts")
    texts = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{tmp_path}/other.ts\n#EXT-X-ENDLIST\n",
        "list.ffconcat": "ffconcat version 1.0\nfile other.ts\n",
    }
    path = tmp_path / name
    if name in texts:
        path.write_text(texts[name])
    else:
        Image.new("RGB", (64, 48)).save(path)
    with pytest.raises(Unusable, match="video: "):
        read(path, [0])


def test_a_damaged_video_ends(tmp_path):
    """With FFmpeg's frame threads this one waits for ever."""
    with pytest.raises(Unusable), open_video(DAMAGED) as video:
        for number in range(len(video)):
            list(video.read([number]))


def test_a_title_that_is_not_utf8_does_no_harm(tmp_path):
    path = tmp_path / "a.mp4"
    write_video([np.zeros((48, 64, 3), np.uint8)] * 3, path, settings={"title": "Cafe"})
    path.write_bytes(path.read_bytes().replace(b"Cafe", b"Caf\xe9"))
    assert list(read(path, [0, 1, 2])) == [0, 1, 2]


def test_an_error_of_the_caller_is_not_the_videos(tmp_path):
    path = write_greys(tmp_path / "a.mp4")
    with pytest.raises(OSError, match="disk is full"), open_video(path):
        raise OSError(28, "the disk is full")


def test_hd_that_does_not_say_is_of_hds_colours(tmp_path):
    path, red = tmp_path / "a.mp4", np.full((720, 64, 3), (220, 40, 40), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 720, "yuv420p"
        frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.colorspace = 2  # not said
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    with open_video(path) as video:
        ((_, image),) = video.read([0])
    assert np.abs(np.asarray(image).astype(int) - red).max() <= 4
