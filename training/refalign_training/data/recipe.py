"""What may be chosen about samples: which subjects become references, and how pixels are made. Imports nothing heavy:
command lines are made of it."""

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


@dataclass(frozen=True)
class SelectionRule:
    """Which subjects of a clip become references: the largest that score high enough in one of two ways."""

    min_aesthetic: float = 4.5
    """An aesthetic score from which a subject is taken..."""
    min_gme: float = 0.6
    """... or a GME score, of its image against its name, from which it is."""
    unscored: bool = True
    """Whether subjects without either score are taken: OpenS2V-5M's whose mask was empty. Their box is."""
    min_crop_ratio: float = 0.10
    """Smallest area of a subject's box, as a share of its frame's."""
    max_references: int = 3
    """The largest ones are taken; from your own data, the first ones."""
    duplicate_iou: float = 0.8
    """Of two subjects with an intersection over union above this, the larger one stays."""
    max_image_similarity: float | None = 0.98
    """Cross pairs more similar than this are near copies, and teach what the clip's own reference does; None: any."""
    max_cross_views: int = 8
    """Most views from other clips that a reference gets; of more, the ones most similar to it."""

    def passes(self, aesthetic: float | None, gme: float | None) -> bool:
        """Whether the scores do; `None` where there is none, NaN where there is a bad one."""
        if aesthetic is None and gme is None:
            return self.unscored
        return (aesthetic is not None and aesthetic >= self.min_aesthetic) or (gme is not None and gme >= self.min_gme)


DEFAULT_RULE = SelectionRule()
