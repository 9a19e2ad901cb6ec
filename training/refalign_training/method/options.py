"""What can be chosen of the method. Nothing heavy is imported: the command line reads it."""

import dataclasses
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from refalign_training.bounds import InvalidOption, Many, Options, Share


@dataclass(frozen=True)
class ObjectiveOptions(Options):
    """What is predicted under which conditions (RefAlign, arXiv 2603.25743, section 4)."""

    kind: Literal["refalign", "distil", "refine"] = "refalign"
    """What is learnt. refalign: to denoise, with the alignment of references. distil: that one pass of the trained
    model equals the guided passes of the base, which takes two or three; the result is used with both scales at 1.
    refine: to make a masked part of a picture anew from a reference (Refine-by-Align); see the options of refine."""
    guidance_scale: NonNegativeFloat = 7.5
    """The guidance scale that distil teaches: how closely the prompt is followed."""
    image_guidance_scale: NonNegativeFloat = 5.0
    """The image guidance scale that distil teaches: how closely the references are followed."""
    family: Literal["auto", "refalign", "bernini"] = "auto"
    """How the model reads references, and what the defaults below are. auto is what the base's files say; anything
    else must be that too."""
    timesteps: Literal["auto", "refalign", "logit_normal", "bernini", "uniform"] = "auto"
    """How timesteps are drawn and weighted. refalign is the paper's: shift 5 and bump weights. logit_normal has shift
    3 and no weights. bernini is Bernini-R's for references: shift 4 and no weights. uniform has shift 7 and no
    weights, for tiny models. distil takes no weights from any. auto is the family's own."""
    detail_weight: NonNegativeFloat = 1.0
    """The weight of positions whose latents differ from their neighbours', beside 1 for the others."""
    detail_steps: NonNegativeInt = 0
    """The step until which the detail weight falls evenly to 1. 0: it never falls."""
    no_text: Share | None = None
    """The share of samples that are trained without their text alone. None: 0.1, of Bernini-R 0.09."""
    no_references: Share | None = None
    """The share of samples that are trained without their references alone. None: 0.1, of Bernini-R 0.09."""
    neither: Share | None = None
    """The share of samples that are trained without text and references. None: 0.1, of Bernini-R 0.01, so that text
    and references are each dropped with 0.1, independently."""
    max_sequence_length: PositiveInt = 512
    """The number of text tokens, padded with zeros. The pipeline must be called with the same number."""

    @model_validator(mode="after")
    def _shares_of_all(self) -> Self:
        shares = (self.no_text, self.no_references, self.neither)
        total = sum(filter(None, shares)) + 0.1 * shares.count(None)
        if total > 1:
            told = f"is {self.no_text}: with no_references and neither it must be 1 or less in sum, but is {total:g}."
            raise InvalidOption(type(self), "no_text", told)
        return self

    def filled(self) -> Self:
        """The options with the family's own for those that are not given: RefAlign's, if no family is."""
        family = "refalign" if self.family == "auto" else self.family
        values = {"family": family, **OF_FAMILIES[family]}
        given = {name: value for name in values if (value := getattr(self, name)) not in (None, "auto")}
        return dataclasses.replace(self, **(values | given))


OF_FAMILIES: dict[str, dict[str, Any]] = {
    "refalign": {"timesteps": "refalign", "no_text": 0.1, "no_references": 0.1, "neither": 0.1},
    # Text and references are dropped independently, each with 0.1 (Bernini-R, arXiv 2605.22344)
    "bernini": {"timesteps": "bernini", "no_text": 0.09, "no_references": 0.09, "neither": 0.01},
}


@dataclass(frozen=True)
class AlignmentOptions(Options):
    """The reference alignment loss. The defaults are the paper's."""

    weight: NonNegativeFloat = 1.0
    """The weight of the alignment loss. 0: no alignment, so no projectors and no teacher."""
    layers: Annotated[tuple[NonNegativeInt, ...], Many, Field(min_length=1)] = tuple(range(9))
    """The blocks whose hidden states are aligned, counted from 0."""
    projector: Literal["linear", "conv"] = "linear"
    """The kind of projector: linear is the paper's, conv is iREPA's."""
    spatial_norm: bool = False
    """Normalise the teacher's features over the grid, as iREPA does."""
    positive_margin: float = 0.0
    """The distance to the subject's own features below which the loss is 0."""
    negative_margin: float = 1.0
    """The distance to other subjects' features above which the loss is 0."""
    negative_weight: NonNegativeFloat = 1.0
    """The weight of the push away from other subjects. 0: there is none."""
    gate_power: NonNegativeFloat = 3.0
    """The loss is weighted by (t / 1000) to this power. 0: it has the same weight at all timesteps."""
    decay_start: NonNegativeInt | None = None
    """The step from which the weight falls along half a cosine. None: it never falls."""
    decay_steps: NonNegativeInt = 0
    """The number of steps over which the weight falls to 0."""
    stop_step: NonNegativeInt | None = None
    """The step from which there is no alignment any more. None: it never stops."""

    @model_validator(mode="after")
    def _decay_is_whole(self) -> Self:
        if (self.decay_start is None) != (self.decay_steps == 0):
            told = (
                f"is {self.decay_start} and decay_steps {self.decay_steps}: set both. To end at once, use stop_step."
            )
            raise InvalidOption(type(self), "decay_start", told)
        return self
