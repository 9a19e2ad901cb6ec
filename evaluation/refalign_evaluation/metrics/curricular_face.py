"""
The IR-101 network of CurricularFace (arXiv 2004.00288), which makes an embedding of an aligned face.

Its layout and keys are those of `glint360k_curricular_face_r101_backbone.bin` (`BestWishYsh/OpenS2V-Weight`): Tencent
TFace's `IR_101` for 112x112 pixels.
"""

from collections.abc import Sequence

import torch
from torch import nn


BLOCKS = (3, 13, 30, 3)  # in each stage, the first of which halves the sides
WIDTHS = (64, 128, 256, 512)
SIDE = 112  # pixels of a face
DIM = 512  # of an embedding


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if channels != width:
            convolution = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(convolution, nn.BatchNorm2d(width))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.res_layer(features) + self.shortcut_layer(features)


class CurricularFace(nn.Module):
    """IR-101, or with other numbers of blocks a smaller one of its kind."""

    def __init__(self, blocks: Sequence[int] = BLOCKS, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        channels = widths[0]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.PReLU(channels)
        )
        body = []
        for count, width in zip(blocks, widths, strict=True):
            for number in range(count):
                body.append(Block(channels, width, 2 if number == 0 else 1))
                channels = width
        self.body = nn.Sequential(*body)
        cells = (SIDE // 2 ** len(blocks)) ** 2
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(channels * cells, DIM),
            nn.BatchNorm1d(DIM, affine=False),
        )

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch, 512)`, of whatever length, of aligned RGB faces `(batch, 3, 112, 112)` in [-1, 1]."""
        return self.output_layer(self.body(self.input_layer(faces)))
