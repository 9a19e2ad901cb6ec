"""The recipe by which pixels are made of samples. Imports nothing heavy: command lines are made of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """How pixels are made of a sample (RefAlign, arXiv 2603.25743, section 4)."""

    height: int = 480
    """In pixels, a multiple of 16."""
    width: int = 832
    """In pixels, a multiple of 16."""
    num_frames: int = 81
    """4k + 1."""
    stride: float = 3.0
    """From one taken frame to the next, in frames of 25 a second; 1.5625 is real time at the model's 16 a second."""
    cross_probability: float = 0.23
    """Of taking a reference from another clip, where there is one."""
    augment: Literal["regular", "all", "none"] = "regular"
    """Which references are augmented: those cut from the clip itself, also all others, or none."""
    seed: int = 0
    """With the sample's id and the variant or epoch, all that randomness depends on."""

    def check(self) -> None:
        """Raises ValueError for what no video can be made with."""
        if min(self.height, self.width) < 16 or self.height % 16 or self.width % 16:
            raise ValueError(f"The size is {self.height}x{self.width}; height and width have to be multiples of 16.")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            raise ValueError(f"The number of frames is {self.num_frames}; it has to be 4k + 1, such as 81.")
        if not (self.stride > 0 and 0 <= self.cross_probability <= 1):
            raise ValueError(
                f"The stride is {self.stride} and the probability of a cross pair {self.cross_probability}; they have "
                "to be above 0, and from 0 to 1."
            )
