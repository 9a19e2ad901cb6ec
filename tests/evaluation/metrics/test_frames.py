import numpy as np
import pytest

from refalign.video import read_video, write_video
from refalign_evaluation.metrics.frames import all_frames, spread, spread_frames
from refalign_training.data.fields import Unusable
from tests.evaluation.tiny_metrics import texture, write_noise


def test_32_frames_of_a_long_video_are_those_of_the_official_tool():
    numbers = spread(81)
    assert len(numbers) == 32
    assert numbers[:4] == [0, 2, 5, 7]  # floor(80 * k / 31), as linspace(..., dtype=int) gives
    assert numbers[-2:] == [77, 80]


def test_a_short_videos_frames_count_several_times():
    assert spread(2, 5) == [0, 0, 0, 0, 1]
    assert spread(1, 3) == [0, 0, 0]


def test_the_frames_are_those_of_their_numbers_in_rgb(tmp_path):
    greys = [np.full((16, 16, 3), (40 * number, 20, 20), np.uint8) for number in range(5)]
    video = write_video(greys, tmp_path / "a.mp4")
    reds = [frame[8, 8, 0] for frame in spread_frames(video, 3)]
    assert np.allclose(reds, [0, 80, 160], atol=8)


def test_all_frames_come_in_turn(tmp_path):
    video = write_noise(tmp_path / "a.mp4", frames=4)
    assert [frame.shape for frame in all_frames(video)] == [(48, 64, 3)] * 4


def test_colours_of_large_videos_are_those_of_the_official_tool_and_not_of_players(tmp_path):
    video = write_video([texture(720, 64)], tmp_path / "a.mp4")
    assert np.array_equal(next(all_frames(video)), read_video(video)[0])


def test_a_damaged_video_is_told(tmp_path):
    content = bytearray(write_noise(tmp_path / "whole.mp4", frames=9).read_bytes())
    content[len(content) // 3 : -1500] = bytes(len(content) - 1500 - len(content) // 3)
    video = tmp_path / "a.mp4"
    video.write_bytes(content)
    with pytest.raises(Unusable, match=r"is damaged|cannot be decoded"):
        list(all_frames(video))


def test_a_video_of_one_frame_is_too_short_where_two_are_needed(tmp_path):
    video = write_noise(tmp_path / "a.mp4", frames=1)
    with pytest.raises(Unusable, match="too short: it has 1 frames"):
        list(all_frames(video, least=2))


@pytest.mark.parametrize("content", [b"", b"not a video", None])
def test_a_file_that_is_no_video_is_told(tmp_path, content):
    video = tmp_path / "a.mp4"
    if content is None:
        video.write_bytes(write_noise(tmp_path / "whole.mp4").read_bytes()[:-400])
    else:
        video.write_bytes(content)
    with pytest.raises(Unusable):
        spread_frames(video)
