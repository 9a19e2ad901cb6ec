"""What can be chosen of the method. Imports nothing heavy: the command line reads it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObjectiveOptions:
    """What is predicted under which conditions (RefAlign, arXiv 2603.25743, section 4)."""

    timesteps: Literal["refalign", "logit_normal", "uniform"] = "refalign"
    """refalign: shift 5, bump weights, the paper's. logit_normal: shift 3, unweighted. uniform: shift 7, unweighted,
    for tiny models."""
    detail_weight: float = 1.0
    """How much more than others those positions count at first whose latents differ from their neighbours'."""
    detail_steps: int = 0
    """The step until which that weight falls evenly to 1; 0: it stays."""
    no_text: float = 0.1
    """Share of samples without their text."""
    no_references: float = 0.1
    """Share of samples without their references."""
    neither: float = 0.1
    """Share of samples without both."""
    max_sequence_length: int = 512
    """Text tokens, padded with zeros; what the pipeline is later called with."""


@dataclass(frozen=True)
class AlignmentOptions:
    """The reference alignment loss. The defaults are the paper's."""

    weight: float = 1.0
    """Of the loss; 0: no alignment, no projectors, no teacher."""
    layers: tuple[int, ...] = tuple(range(9))
    """Aligned blocks, counted from 0."""
    projector: Literal["linear", "conv"] = "linear"
    """conv is iREPA's."""
    spatial_norm: bool = False
    """Normalise the teacher's features over the grid (iREPA)."""
    positive_margin: float = 0.0
    """Distance to the own features that costs nothing."""
    negative_margin: float = 1.0
    """Distance to other subjects' features above which nothing costs."""
    negative_weight: float = 1.0
    """Of the push from other subjects; 0: none."""
    gate_power: float = 3.0
    """The loss is weighted by (t / 1000) to this power; 0: at all timesteps alike."""
    decay_start: int | None = None
    """The step from which its weight falls along half a cosine; None: never."""
    decay_steps: int = 0
    """How long that takes."""
    stop_step: int | None = None
    """The step from which there is no alignment any more; None: never."""
