"""Which of a frame's subjects become references (RefAlign, arXiv 2603.25743, section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

from refalign_training.data.masks import drop_duplicates
from refalign_training.data.recipe import SelectionRule
from refalign_training.data.sample import Reference


@dataclass(frozen=True)
class Candidate:
    """A subject that may become a reference."""

    reference: Reference
    crop_ratio: float
    """The area of its box, or of the first in another clip if it has none here, as a share of the frame's."""
    aesthetic: float | None = None
    gme: float | None = None


def select(candidates: Sequence[Candidate], rule: SelectionRule) -> tuple[Reference, ...]:
    """
    The references, the largest first. Scores come before duplicates: a subject whose larger mask scores too low is
    still taken by its smaller one.
    """
    good = [c for c in candidates if c.crop_ratio >= rule.min_crop_ratio and rule.passes(c.aesthetic, c.gme)]
    here = [c for c in good if c.reference.view is not None]
    single = [here[i] for i in drop_duplicates([c.reference.view for c in here], rule.duplicate_iou)]
    elsewhere = [c for c in good if c.reference.view is None]
    largest = sorted(single + elsewhere, key=lambda c: -c.crop_ratio)[: rule.max_references]
    return tuple(c.reference for c in largest)
