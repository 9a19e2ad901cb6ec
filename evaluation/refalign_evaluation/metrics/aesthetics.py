"""
Aesthetics: how beautiful frames are, as LAION's aesthetic predictor says.

- Source: `eval/get_aesscore.py` of OpenS2V-Nexus. CLIP ViT-L/14 (`openai/clip-vit-large-patch14`) makes an embedding
  of a frame, and LAION's linear layers (`aesthetic-model.pth` of `BestWishYsh/OpenS2V-Weight`) make a number of it.
- Raw score: the mean of 32 frames, mostly 3 to 7.
- Score: each video's raw score is clipped to [4, 7]; of their mean, 4 counts as 0 and 7 as 1.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from refalign_evaluation.benchmark import BenchmarkSample
from refalign_evaluation.metrics.clip import Clip
from refalign_evaluation.metrics.frames import FRAMES, spread_frames
from refalign_evaluation.metrics.weights import check_weights, digest, fetch_model, load_weights


DIM = 768  # of CLIP ViT-L/14's embeddings
HEAD = "The aesthetic predictor's head"


class Head(nn.Module):
    """LAION's predictor, with the keys of `aesthetic-model.pth`: no activations stand between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(DIM, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores `(frames,)` of CLIP's embeddings `(frames, 768)`, of whatever length."""
        return self.layers(nn.functional.normalize(embeddings, dim=-1)).squeeze(-1)


class Aesthetics:
    """Measures videos, by CLIP (a folder or Hub id) and a safetensors copy of the predictor's head."""

    def __init__(self, clip: str, head: Path, device: torch.device) -> None:
        check_weights(head, HEAD)
        self._name, self._head_file, self._device = clip, head, device
        self._folder, weights = fetch_model(clip)
        self.settings: dict[str, Any] = {"frames": FRAMES, "clip": weights, "head": digest(head)}

    def load(self) -> None:
        """Loads the models; ValueError if they are others than those that are needed."""
        _ = self._models

    @cached_property
    def _models(self) -> tuple[Clip, Head]:
        head = Head()
        load_weights(head, self._head_file, HEAD)
        clip = Clip(self._folder, self._name, self._device)
        if clip.dim != DIM:
            raise ValueError(
                f"{self._name} makes embeddings of {clip.dim} numbers, and the predictor takes {DIM}. Pass "
                "openai/clip-vit-large-patch14."
            )
        return clip, head.to(self._device).eval()

    def measure(self, video: Path, sample: BenchmarkSample) -> float:
        """
        The raw score of a video.

        Raises:
            Unusable: if the video cannot be read.
        """
        return self.measure_frames(spread_frames(video))

    @torch.no_grad()
    def measure_frames(self, frames: Sequence[np.ndarray]) -> float:
        """The mean score of frames, each RGB, uint8 `(height, width, 3)`."""
        clip, head = self._models
        return head(clip(frames)).mean().item()
