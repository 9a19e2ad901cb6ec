"""Which of a frame's subjects become references (RefAlign, arXiv 2603.25743, section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

from refalign_training.data.masks import drop_duplicates
from refalign_training.data.sample import Reference


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
