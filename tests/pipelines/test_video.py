"""mp4 files: what was written is what is read, and a file is whole or not there."""

import weakref

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refalign.video import read_settings, read_video, write_video


def moving_square(frames=9, height=64, width=96):
    video = np.full((frames, height, width, 3), 230, np.uint8)
    for i, frame in enumerate(video):
        frame[16:48, 4 * i : 4 * i + 32] = (200, 30, 60)
    return video


def test_frames_come_back(tmp_path):
    video = moving_square()
    read = read_video(write_video(video, tmp_path / "a.mp4"))
    assert read.shape == video.shape
    assert np.abs(read.astype(int) - video).mean() < 3


def test_it_is_h264_at_16_frames_a_second_in_colours_every_player_knows(tmp_path):
    with av.open(str(write_video(moving_square(), tmp_path / "a.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.pix_fmt) == ("h264", 16, "yuv420p")


def test_the_pipelines_floats_and_images_are_taken(tmp_path):
    video = moving_square()
    floats = read_video(write_video(video.astype(np.float32) / 255, tmp_path / "floats.mp4"))
    images = read_video(write_video(map(Image.fromarray, video), tmp_path / "images.mp4"))
    assert np.abs(floats.astype(int) - video).mean() < 3 and np.abs(images.astype(int) - video).mean() < 3


def test_frames_are_taken_one_by_one(tmp_path):
    """So that a bar around them shows how far the writing is."""
    taken, most = [], 0

    def frames():
        nonlocal most
        for array in moving_square(20):
            frame = Image.fromarray(array)
            taken.append(weakref.ref(frame))
            most = max(most, sum(reference() is not None for reference in taken))
            yield frame

    write_video(frames(), tmp_path / "a.mp4")
    assert most < 5


def test_equal_frames_give_equal_files(tmp_path):
    squares = np.random.default_rng(0).integers(0, 256, (17, 8, 8, 3), dtype=np.uint8)
    frames = squares.repeat(8, axis=1).repeat(8, axis=2)
    files = set()
    for number in range(24):
        files.add(write_video(frames, tmp_path / f"{number}.mp4").read_bytes())
    assert len(files) == 1


def test_settings_come_back(tmp_path):
    settings = {"prompt": 'Zwei Hunde, "schnell"\n走', "seed": 3, "reference": ["a.png"], "scale": 0.5}
    assert read_settings(write_video(moving_square(), tmp_path / "a.mp4", settings=settings)) == settings


def test_a_video_without_settings_has_none(tmp_path):
    assert read_settings(write_video(moving_square(), tmp_path / "a.mp4")) == {}


@settings(max_examples=10, deadline=None)
@given(frames=st.integers(1, 6), height=st.integers(1, 6), width=st.integers(1, 6))
def test_every_size_the_pipeline_makes_is_kept(tmp_path_factory, frames, height, width):
    output = tmp_path_factory.mktemp("video") / "a.mp4"
    video = np.zeros((frames, 16 * height, 16 * width, 3), np.uint8)
    assert read_video(write_video(video, output)).shape == video.shape


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "0 frames"),
        (np.zeros((1, 15, 16, 3), np.uint8), "16x15.*even sides"),
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)], r"\(16, 32, 3\)"),
        (np.zeros((1, 16, 16), np.uint8), r"\(16, 16\)"),
        (np.zeros((1, 16, 16, 3), np.int64), "int64"),
    ],
    ids=["none", "odd", "mixed", "grey", "integers"],
)
def test_what_cannot_be_written_is_said(tmp_path, video, message):
    with pytest.raises(ValueError, match=message):
        write_video(video, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_told(tmp_path):
    output = write_video(moving_square(), tmp_path / "a.mp4")
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"exists already\..* write_video\(\.\.\., overwrite=True\)"):
        write_video(moving_square(5), output)
    assert output.read_bytes() == before
    assert len(read_video(write_video(moving_square(5), output, overwrite=True))) == 5


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    output = write_video(moving_square(), tmp_path / "a.mp4")
    before = output.read_bytes()
    frames = [*moving_square(3), np.zeros((8, 8), np.float32)]
    with pytest.raises(ValueError):
        write_video(frames, output, overwrite=True)
    assert output.read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]
