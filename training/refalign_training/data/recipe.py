"""What may be chosen about samples: which subjects become references, and how pixels are made.

Nothing heavy is imported: command lines are made of it.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AllowInfNan, Field, NonNegativeInt, PositiveFloat, model_validator
from pydantic.dataclasses import dataclass

from refalign_training.bounds import InvalidOption, Listed, Options, Share


def _whole_latents(num_frames: int) -> int:
    if num_frames % 4 != 1:
        raise ValueError("it must be 4k + 1, such as 81.")
    return num_frames


MODEL_FPS = 16  # frames a second of what Wan makes
REAL_TIME = 25 / MODEL_FPS  # the stride by which a clip keeps its speed
PAPER_STRIDE = 3.0  # RefAlign's, by which a clip is played 1.92 times as fast as it was filmed

Side = Annotated[int, Field(ge=16, multiple_of=16)]  # the pipeline's TOKEN_PIXELS, without its imports


@dataclass(frozen=True)
class Recipe(Options):
    """How pixels are made of a sample (RefAlign, arXiv 2603.25743, section 4)."""

    height: Side = 480
    """The height of the clips in pixels, a multiple of 16."""
    width: Side = 832
    """The width of the clips in pixels, a multiple of 16."""
    num_frames: Annotated[int, Field(ge=1), AfterValidator(_whole_latents)] = 81
    """The number of frames of a clip, 4k + 1."""
    stride: Annotated[float, Field(gt=0)] | None = None
    """The distance from one taken frame to the next, in frames of a video with 25 per second. 1.5625 is real time at
    the model's 16 per second; 3 is the paper's, 1.9 times as fast. None: real time for tables and folders of your own,
    the paper's for opens2v and phantom."""
    cross_probability: Share = 0.23
    """The probability that a reference is taken from another clip of the subject, where there is one."""
    augment: Literal["regular", "all", "none"] = "regular"
    """Which references are augmented: regular takes those that are cut from the clip itself, all takes the others
    too, none takes none."""
    long_edge: Side | None = None
    """The longer side of references in pixels at most, a multiple of 16, for a model that reads them in their own
    aspect (Bernini-R). None: what the model's own files say, which for RefAlign's models is the size of the clips."""
    seed: int = 0
    """The seed. With the sample's id and the variant or epoch, it decides everything random."""


@dataclass(frozen=True)
class RefineOptions(Options):
    """What a refinement is trained on, for objective.kind refine (Refine-by-Align, arXiv 2412.00306, section 3). The
    defaults are this project's: the paper says less."""

    alignment_share: Share = 0.5
    """The share of samples whose reference is the whole subject, so that the region is found by attention. The others
    are given the region alone. A picture from elsewhere is always whole."""
    mask_area: Annotated[tuple[Share, Share], Listed] = (0.05, 0.4)
    """The smallest and the largest share of the subject that is masked."""
    crop_scale: Annotated[tuple[PositiveFloat, PositiveFloat], Listed] = (1.0, 1.6)
    """How much larger than the region its crop is, at least and at most."""
    crop_shift: Share = 0.15
    """How far the crop is moved at most, as a share of its side."""
    sticker_share: Share = 0.0
    """The share of samples whose subject gets random stickers, in the picture and on the reference, for drawn subjects
    whose looks few numbers tell: what a sticker shows is only found where it is."""
    outside_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The weight of the error outside the mask, to 1 inside it. What is predicted outside is never seen: there the
    image stays."""
    timestep_shift: Annotated[float, Field(ge=1)] = 1.0
    """How much more often much noise than little is trained: quantile q is at timestep 1000 s q / (1 + (s - 1) q). 1:
    all alike. What is seen of the reference is decided where noise is most."""
    smallest_crop: Share = 0.2
    """The smallest side of a region, as a share of the reference's."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name in ("mask_area", "crop_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                told = f"is {low:g} to {high:g}: pass two numbers above 0, the smaller one first."
                raise InvalidOption(type(self), name, told)
        return self


@dataclass(frozen=True)
class SelectionRule(Options):
    """Which subjects of a clip become references: the largest that score high enough in one of two ways."""

    min_aesthetic: Annotated[float, AllowInfNan()] = 4.5
    """The aesthetic score from which a subject is taken."""
    min_gme: Annotated[float, AllowInfNan()] = 0.6
    """The GME score (of the subject's image against its name) from which it is taken, whatever its aesthetic score."""
    unscored: bool = True
    """Take subjects without either score: those of OpenS2V-5M whose mask was empty. Their box is used."""
    min_crop_ratio: Share = 0.10
    """The smallest area of a subject's box, as a share of its frame's area."""
    max_references: NonNegativeInt = 3
    """How many references a sample has at most. The largest subjects are taken; of your own data, the first ones."""
    duplicate_iou: float = 0.8
    """If the boxes of two subjects have an intersection over union above this, only the larger one is taken."""
    max_image_similarity: float | None = 0.98
    """Cross pairs that are more similar than this are near copies and are left out. None: all are taken."""
    max_cross_views: NonNegativeInt = 8
    """How many views from other clips a reference gets at most. The most similar ones are taken."""

    def passes(self, aesthetic: float | None, gme: float | None) -> bool:
        """Whether the scores do; `None` where there is none, NaN where there is a bad one."""
        if aesthetic is None and gme is None:
            return self.unscored
        return (aesthetic is not None and aesthetic >= self.min_aesthetic) or (gme is not None and gme >= self.min_gme)


DEFAULT_RULE = SelectionRule()
