import resource
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from refalign.video import read_video, write_video
from refalign_training.data.sample import Unusable
from refalign_training.data.shown import TO_709, colours, show
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


TURNS = {  # a, b, c and d of the matrix by which a track is shown
    "upright": ((1, 0, 0, 1), lambda image: image),
    "clockwise": ((0, 1, -1, 0), lambda image: image.transpose(Image.Transpose.ROTATE_270)),
    "overhead": ((-1, 0, 0, -1), lambda image: image.transpose(Image.Transpose.ROTATE_180)),
    "counterclockwise": ((0, -1, 1, 0), lambda image: image.transpose(Image.Transpose.ROTATE_90)),
    "mirrored": ((-1, 0, 0, 1), lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "upside down": ((1, 0, 0, -1), lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
    "mirrored clockwise": ((0, 1, 1, 0), lambda image: image.transpose(Image.Transpose.TRANSPOSE)),
    "mirrored counterclockwise": ((0, -1, -1, 0), lambda image: image.transpose(Image.Transpose.TRANSVERSE)),
    "aslant": ((0.866, 0.5, -0.5, 0.866), lambda image: image.rotate(-30)),
    "to nothing": ((0, 0, 0, 0), lambda image: image),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_phones_video_is_upright(tmp_path, name):
    """Each quarter of the frame is of another colour."""
    (a, b, c, d), turn = TURNS[name]
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:24, :32], frame[:24, 32:], frame[24:, :32] = 255, (200, 0, 0), (0, 0, 200)
    path = write_video([frame] * 3, tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    row = [int(value * (1 << 16)) for value in (a, b, 0, c, d, 0, 0, 0)]
    data[place : place + 36] = struct.pack(">9i", *row, 1 << 30)
    path.write_bytes(data)
    with open_video(path) as video:
        ((_, image),) = video.read([1])
    if "clockwise" in name:  # with pixels that are shown three times as wide as high, too
        with open_video(path) as video:
            video._look = (3.0, *video._look[1:])
            assert next(video.read([1]))[1].size == (48, 3 * 64)
            assert next(video.read([1], squares=False))[1].size == (48, 64)
    expected = turn(Image.fromarray(frame))
    assert image.size == expected.size
    assert np.abs(np.asarray(image).astype(int) - expected).mean() < 12


def test_what_pyav_does_not_know_beside_a_frame_does_no_harm():
    class Frame:
        """As of an iPhone's spatial video."""

        colorspace, height, rotation = 1, 48, -90

        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

        def to_image(self, src_colorspace):
            return Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))

    shown = show(Frame(), 1, 1, 1)
    expected = Frame().to_image(None).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))


def write_two(path, first, second):
    """A file of two videos, each of `(size, frames, codec, disposition)`."""
    with av.open(str(path), "w") as container:
        streams = []
        for (width, height), _, codec, disposition in (first, second):
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.disposition = width, height, disposition
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            streams.append(stream)
        for stream, (_, count, *_) in zip(streams, (first, second), strict=True):
            for _ in range(count):
                frame = np.zeros((stream.height, stream.width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return path


FILM = ((64, 48), 9, "libx264", 0)
OTHERS = {
    "cover": ((800, 600), 1, "mjpeg", Disposition.attached_pic),
    "cover that does not say so": ((800, 600), 1, "mjpeg", 0),
    "preview": ((32, 24), 9, "libx264", 0),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("other", OTHERS)
def test_the_film_is_taken_and_not_its_cover_or_preview(tmp_path, other, suffix):
    path = write_two(tmp_path / f"a{suffix}", OTHERS[other], FILM)
    with open_video(path) as video:
        ((_, image),) = video.read([8])
        assert len(video) == 9 and image.size == (64, 48)


def boxes(data, start, end):
    """The boxes of a part of an mp4 file, by name."""
    found = {}
    while start < end:
        size = int.from_bytes(data[start : start + 4], "big")
        found[data[start + 4 : start + 8]] = (start, start + size)
        start += size
    return found


def test_a_cover_that_stands_before_the_film(tmp_path):
    """As taggers write it: the pictures' box comes first, and with it FFmpeg's first stream is the cover."""
    path = write_two(tmp_path / "a.mp4", OTHERS["cover"], FILM)
    data = path.read_bytes()
    start, end = boxes(data, 0, len(data))[b"moov"]
    inner = boxes(data, start + 8, end)
    order = sorted(inner, key=lambda name: {b"mvhd": 0, b"udta": 1}.get(name, 2))
    path.write_bytes(data[: start + 8] + b"".join(data[slice(*inner[name])] for name in order) + data[end:])
    with av.open(str(path)) as container:
        assert [stream.width for stream in container.streams.video] == [800, 64]
    with open_video(path) as video:
        assert len(video) == 9 and video.notes == []
        assert next(video.read([8]))[1].size == (64, 48)


COUNTED = {
    "b_frames.avi": ("libx264", {"bf": "3", "g": "12"}),
    "packed.avi": ("mpeg4", {"bf": "2", "g": "12"}),
    "disc.mpg": ("mpeg1video", {"bf": "2", "g": "12"}),
    "camera.mp4": ("mpeg4", {"bf": "2"}),
    "old_web.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}),
    "flash.flv": ("libx264", {"bf": "2", "g": "12"}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_frames_without_times_to_trust_are_counted(tmp_path, name):
    codec, options = COUNTED[name]
    path = write_greys(tmp_path / name, codec, options)
    with open_video(path) as video:
        assert len(video) == 60 and video.fps == pytest.approx(30, rel=0.01)
    greys = read(path, [59, 3, 17, 18, 40, 0])
    assert list(greys.values()) == pytest.approx(list(greys), abs=1.2)


def test_an_avis_empty_chunks_are_no_frames(tmp_path):
    """They stand where frames were dropped: here after frames 9 and 29."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number + 3 * (number > 9) + 3 * (number > 29), Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with open_video(path) as video:
        assert len(video) == 60
        assert video.times[9:11] == pytest.approx([9 / 30, 13 / 30])
    assert list(read(path, [5, 20, 59]).values()) == pytest.approx([5, 20, 59], abs=1.2)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(Unusable, match="is cut short"):
        read(path, [0])


def write_light(path, transfer, code):
    """A grey of 10 bits in BT.2020, coded by one of FFmpeg's transfers."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p10le"
        frame = av.VideoFrame(32, 32, "yuv420p10le")
        for plane, value in zip(frame.planes, (round(64 + 876 * code), 512, 512), strict=True):
            plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
        for coded in (stream.codec_context, frame):
            coded.color_primaries, coded.color_trc, coded.colorspace, coded.color_range = 9, transfer, 9, 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("transfer", "code", "grey"),
    [
        (16, 0.3809, 108),  # PQ, 26 cd/m2: an eighth of paper white, 255 * 0.128 ** (1 / 2.4)
        (16, 0.5807, 228),  # 203, paper white, which leaves room for highlights
        (16, 0.7518, 255),  # 1000
        (18, 0.75, 228),  # HLG, 203
        (18, 1.0, 255),  # 1000
        (14, 0.5, 128),  # no HDR
    ],
)
def test_hdr_becomes_what_an_ordinary_screen_shows(tmp_path, transfer, code, grey):
    with open_video(write_light(tmp_path / "a.mp4", transfer, code)) as video:
        ((_, image),) = video.read([0])
        assert ("is HDR; its light is mapped to an ordinary screen's" in video.notes) == (transfer != 14)
    assert np.asarray(image).reshape(-1, 3).mean(axis=0) == pytest.approx([grey] * 3, abs=8)


def test_colours_of_a_wide_gamut_are_kept():
    """BT.2020's numbers for a red and a blue of BT.709, both of gamma 2.4."""
    for colour in ((200, 40, 40), (60, 120, 200)):
        light = np.linalg.solve(TO_709, (np.array(colour) / 255) ** 2.4)
        coded = Image.new("RGB", (1, 1), tuple((255 * light ** (1 / 2.4)).round().astype(int).tolist()))
        assert coded.filter(colours(1, 9)).getpixel((0, 0)) == pytest.approx(colour, abs=4)


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


def cut_in_the_header(path):
    """After the streams' sizes, before their codecs, in a file that begins with its header, as ours do."""
    write_video([np.zeros((48, 64, 3), np.uint8)] * 3, path, overwrite=True)
    path.write_bytes(path.read_bytes()[:400])


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
        (cut_in_the_header, "video"),
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


def write_gif(path: Path, side: int) -> Path:
    """Two whole pictures of that side, in 100 bytes."""
    first, second = (Image.new("L", (2, 2), grey) for grey in (0, 255))
    first.save(path, save_all=True, append_images=[second])
    data = bytearray(path.read_bytes())
    data[6:10] = struct.pack("<HH", side, side)
    path.write_bytes(data)
    return path


def test_a_picture_that_would_take_all_memory_is_not_decoded(tmp_path):
    for side in (8193, 16000, 65535):
        with (
            pytest.raises(Unusable, match=r"more than 67,108,864 pixels"),
            open_video(write_gif(tmp_path / "a.gif", side)) as video,
        ):
            list(video.read([0]))
    with pytest.raises(av.FFmpegError):
        read_video(tmp_path / "a.gif")
    assert len(read(write_gif(tmp_path / "b.gif", 2000), [0, 1])) == 2


def huge(path: Path, box: bytes, *values: tuple[int, int]) -> Path:
    """A video in which numbers of a box say something else."""
    data = bytearray(write_greys(path).read_bytes())
    for place, value in values:
        start = data.index(box) + place
        data[start : start + 4] = struct.pack(">I", value)
    path.write_bytes(data)
    return path


def test_headers_that_claim_what_is_not_there_take_no_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(read(huge(tmp_path / "pictures.mp4", b"avc1", (28, 0xFFFFFFFF)), [0, 59])) == 2
    assert len(read(huge(tmp_path / "duration.mp4", b"mvhd", (20, 0xFFFFFFF0)), [0, 59])) == 2
    for box, *values in ((b"stts", (12, 0x7FFFFFF0)), (b"stsz", (8, 1), (12, 0xFFFFFFF0))):
        with pytest.raises(Unusable, match="is cut short"):
            read(huge(tmp_path / "frames.mp4", box, *values), [0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


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
