"""
MotionAmplitude: how much a video moves as a whole, by Farneback's optical flow.

- Source: `eval/get_motion_amplitude.py` of OpenS2V-Nexus, its value `motion_fb`, by OpenCV.
- Raw score: pixels per frame, averaged with their sign over both axes, the frame and all of the video; its size alone
  counts. It depends on the video's size and frame rate, and opposite motions cancel.
- Score: each video's raw score is clipped to 1; the mean is the score.
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from refalign_evaluation.benchmark import BenchmarkSample
from refalign_evaluation.metrics.frames import all_frames


FLOW = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}
WIDTH = 16  # of the flow maps that are averaged


class MotionAmplitude:
    """Measures videos; it has no model."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"farneback": FLOW, "width": WIDTH}

    def load(self) -> None:
        """Checks that OpenCV is there."""
        import cv2  # noqa: F401

    def measure(self, video: Path, sample: BenchmarkSample) -> float:
        """
        The raw score of a video.

        Raises:
            Unusable: if the video cannot be read, or has one frame alone.
        """
        return amplitude(all_frames(video, least=2))


def amplitude(frames: Iterable[np.ndarray]) -> float:
    """The raw score of two frames or more, each RGB, uint8 `(height, width, 3)`."""
    means = []
    for before, after in pairwise(map(_grey, frames)):
        means.append(_mean_flow(before, after))
    return abs(fmean(means))  # the maps are of one size: it is the mean of their mean map, too


def _grey(frame: np.ndarray) -> np.ndarray:
    import cv2

    # The official tool takes RGB frames for BGR here: red weighs what blue should. Scores are comparable only so
    return cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)


def _mean_flow(before: np.ndarray, after: np.ndarray) -> float:
    """The mean over both axes of the flow from one grey frame to the next, shrunk first, as the official tool does."""
    import cv2

    flow = cv2.calcOpticalFlowFarneback(before, after, None, **FLOW)  # pyright: ignore[reportCallIssue, reportArgumentType]
    height, width = flow.shape[:2]
    small = cv2.resize(flow, (WIDTH, int(height * (WIDTH / width))), interpolation=cv2.INTER_AREA)
    return float(small.mean(dtype=np.float64))
