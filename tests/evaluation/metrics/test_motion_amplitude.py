from itertools import pairwise

import numpy as np
import pytest

from refalign.video import write_video
from refalign_evaluation.metrics.motion_amplitude import MotionAmplitude, amplitude
from refalign_training.data.fields import Unusable
from tests.evaluation.tiny_metrics import texture, write_noise


PICTURE = texture(160, 240)


def moved(right: int, down: int = 0) -> np.ndarray:
    """A part of the picture, whose content lies so many pixels further."""
    return PICTURE[40 - down : 120 - down, 60 - right : 188 - right]


def test_a_picture_that_moves_gives_its_pixels_per_frame_over_both_axes():
    assert amplitude([moved(3 * number) for number in range(4)]) == pytest.approx(3 / 2, rel=0.1)
    assert amplitude([moved(2 * number, 2 * number) for number in range(4)]) == pytest.approx(2, rel=0.1)


def test_it_is_the_mean_of_the_mean_of_maps_of_width_16():
    import cv2

    frames = [texture(160, 240, seed) for seed in range(4)]
    maps = []
    for before, after in pairwise(frames):
        greys = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (before, after)]
        flow = cv2.calcOpticalFlowFarneback(*greys, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        maps.append(cv2.resize(flow, (16, 10), interpolation=cv2.INTER_AREA))
    expected = abs(np.mean(np.mean(np.array(maps), axis=0)))
    assert amplitude(frames) == pytest.approx(expected, rel=1e-5)


def test_the_direction_does_not_count():
    assert amplitude([moved(-3 * number) for number in range(4)]) == pytest.approx(3 / 2, rel=0.1)


def test_opposite_motions_cancel():
    assert amplitude([moved(0), moved(3), moved(0)]) == pytest.approx(0, abs=0.1)
    assert amplitude([moved(3 * number, -3 * number) for number in range(4)]) == pytest.approx(0, abs=0.1)


def test_red_weighs_what_blue_should_as_in_the_official_tool():
    still = np.zeros_like(moved(0))

    def in_channel(channel: int) -> float:
        frames = []
        for number in range(3):
            frame = still.copy()
            frame[..., channel] = moved(3 * number)[..., 0] // 8
            frames.append(frame)
        return amplitude(frames)

    # Faint motion is lost where it weighs 0.114, and seen where it weighs 0.299
    assert in_channel(0) < in_channel(2)


def test_a_video_is_measured_by_all_its_frames(tmp_path):
    video = write_video([moved(2 * number) for number in range(6)], tmp_path / "a.mp4")
    assert MotionAmplitude().measure(video, None) == pytest.approx(1, rel=0.15)


def test_a_video_of_one_frame_has_no_motion_that_could_be_measured(tmp_path):
    with pytest.raises(Unusable, match="too short"):
        MotionAmplitude().measure(write_noise(tmp_path / "a.mp4", frames=1), None)
