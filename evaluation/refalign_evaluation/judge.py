"""
What a clip of the small world shows, told by computation.

What a clip should show is drawn, and laid over the clip. A clip's explanation is a subject in an act before a
background that stands still; the explanation with the smallest error says who is there and what happens. Nothing is
learnt, and no model that was trained with takes part.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from refalign_training.sprites.subject import Subject
from refalign_training.sprites.world import ACTS, ACTS_OF_TWO, CROSSES, Scene, draw_act


SHIFTS = (-1, 0, 1)  # pixels to each side that an explanation may be moved by
FRAME_STEP = 2  # every second frame is looked at
KEPT = 400  # drawings
LEAST_PRESENCE = 0.25  # with less movement than this share of a subject's, it is missing


@dataclass(frozen=True)
class Case:
    """A clip to make, and what it is judged by."""

    scene: Scene
    tilts: tuple[float, ...]
    """How the references are turned, in degrees."""
    others: tuple[Subject, ...]
    """Held-out subjects that are not shown."""
    alike: tuple[Subject, ...]
    """Subjects of the first one's two colours."""


@dataclass
class Verdict:
    """What one clip shows."""

    identity: bool | None = None
    """With one subject: whether it looks like the right one of eight."""
    same_colours: bool | None = None
    """With one subject: whether it looks like the right one of eight in its colours."""
    motion: bool | None = None
    """Whether the prompt's act is seen; with two subjects, both acts."""
    copied: bool | None = None
    """Whether the reference's pose fits better than the act's. None for acts that turn."""
    confusion: str | None = None
    """With two subjects: right, swapped, doubled, missing or other."""
    psnr: float = math.nan
    """How near the clip is to its best explanation, where the subjects are, in decibels."""


class Judge:
    """Fits explanations to clips, `(frames, 3, 64, 64)` in [0, 1]."""

    def __init__(self) -> None:
        self._drawn: dict[tuple, list[torch.Tensor]] = {}

    def error(self, clip: torch.Tensor, subject: Subject, act: str, spot: str, tilt: float = 0.0) -> float:
        """
        The mean squared error, in a place's part of a clip, of a subject in an act before what stands still; the best
        of some shifts.
        """
        return min(map(_mean_square, self._residuals(clip, subject, act, spot, tilt)))

    def least_error(self, clip: torch.Tensor, subjects: Iterable[Subject], act: str, spot: str) -> float:
        """The error of the subject that explains the clip best."""
        return min(self.error(clip, subject, act, spot) for subject in subjects)

    def movement(self, clip: torch.Tensor, act: str, spot: str) -> float:
        """How much changes over time in a place's part of a clip: the mean square of what does not stand still."""
        return _movement(clip[..., _columns(act, spot)])

    def presence(self, clip: torch.Tensor, subject: Subject, act: str, spot: str) -> float:
        """How much changes over time in a place's own half, as a share of what would if the subject were there."""
        residuals = self._residuals(clip, subject, act, spot)
        clip = clip[..., _columns(act, spot)]
        explained = clip - min(residuals, key=_mean_square)
        half = slice(0, 32) if spot == "left" else slice(-32, None)
        return _movement(clip[..., half]) / max(_movement(explained[..., half]), 1e-9)

    def psnr(self, clip: torch.Tensor, subject: Subject, act: str, spot: str) -> float:
        """How near a clip is to the explanation, where the subject is, in decibels."""
        errors = []
        drawn = self._draw(subject, act, spot, 0.0)
        for residual, moved in zip(self._residuals(clip, subject, act, spot), drawn, strict=True):
            weight = moved[:, 3:]
            errors.append((residual.square() * weight).sum() / (3 * weight.sum()))
        return -10 * torch.log10(torch.stack(errors).min()).item()

    def _residuals(
        self, clip: torch.Tensor, subject: Subject, act: str, spot: str, tilt: float = 0.0
    ) -> list[torch.Tensor]:
        """What the explanation leaves of a place's part of the clip, for each shift."""
        clip = clip[..., _columns(act, spot)]
        return [_residual(clip, moved) for moved in self._draw(subject, act, spot, tilt)]

    def _draw(self, subject: Subject, act: str, spot: str, tilt: float) -> list[torch.Tensor]:
        """The subject in the act at nine shifts, each premultiplied RGBA in [0, 1]: `(frames, 4, 64, columns)`."""
        key = (subject, act, spot, tilt)
        if key not in self._drawn:
            frames = np.stack(draw_act(subject, act, spot, tilt, FRAME_STEP))
            values = torch.from_numpy(frames).movedim(-1, 1).contiguous().float() / 255
            values[:, :3] *= values[:, 3:]
            rows = values[:, :, ::2] + values[:, :, 1::2]
            small = (rows[..., ::2] + rows[..., 1::2]) / 4  # quicker than a mean over two dimensions
            shifts = itertools.product(SHIFTS, SHIFTS)
            columns = _columns(act, spot)
            moved = [small.roll(shift, (2, 3))[..., columns].contiguous() for shift in shifts]
            if len(self._drawn) > KEPT:
                self._drawn.clear()
            self._drawn[key] = moved
        return self._drawn[key]


def _columns(act: str, spot: str) -> slice:
    """The part of a frame that a place is judged in."""
    if spot == "middle" or act == CROSSES:
        return slice(0, 64)
    return slice(0, 32) if spot == "left" else slice(32, 64)


def _mean_square(values: torch.Tensor) -> float:
    return values.square().mean().item()


def _movement(clip: torch.Tensor) -> float:
    return _mean_square(clip - clip.mean(0))


def _residual(clip: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """What a drawn subject (premultiplied RGBA), in the light that suits it, before the best still place leaves."""
    colours, alpha = drawn[:, :3], drawn[:, 3:]
    uncovered = 1 - alpha
    background = (uncovered * clip).sum(0) / uncovered.sum(0).clamp(min=1e-3)
    behind = clip - uncovered * background
    light = ((behind * colours).sum() / colours.square().sum().clamp(min=1e-6)).clamp(0.8, 1.2)
    return behind - light * colours


def judge(case: Case, clip: np.ndarray, judged: Judge) -> Verdict:
    """What a clip, uint8 `(17, 64, 64, 3)`, shows."""
    values = torch.from_numpy(clip[::FRAME_STEP].copy()).movedim(-1, 1).contiguous().float() / 255
    judge_clip = _judge_one if len(case.scene.subjects) == 1 else _judge_two
    return judge_clip(case, values, judged)


def _judge_one(case: Case, clip: torch.Tensor, judged: Judge) -> Verdict:
    (own,), (asked,) = case.scene.subjects, case.scene.acts
    by_act = {act: judged.error(clip, own, act, "middle") for act in ACTS}
    act = min(by_act, key=by_act.__getitem__)
    error, copied = by_act[act], None
    if act != "spins":
        copied = judged.error(clip, own, act, "middle", case.tilts[0]) < error
    return Verdict(
        identity=error < judged.least_error(clip, case.others, act, "middle"),
        same_colours=error < judged.least_error(clip, case.alike, act, "middle"),
        motion=act == asked,
        copied=copied,
        psnr=judged.psnr(clip, own, act, "middle"),
    )


def _judge_two(case: Case, clip: torch.Tensor, judged: Judge) -> Verdict:
    scene = case.scene
    found, motions, psnrs = [], [], []
    for index, spot in enumerate(scene.spots):
        own, other = scene.subjects[index], scene.subjects[1 - index]
        # Errors of the whole frame and of a half are of different size: each is told by its share of what moves
        shares = {}
        for act in (*ACTS_OF_TWO, CROSSES):
            error = judged.least_error(clip, (own, other), act, spot)
            shares[act] = error / max(judged.movement(clip, act, spot), 1e-9)
        act = min(shares, key=shares.__getitem__)
        errors = {who: judged.error(clip, who, act, spot) for who in (own, other, *case.others)}
        who = min(errors, key=errors.__getitem__)
        is_there = judged.presence(clip, who, act, spot) > LEAST_PRESENCE
        found.append(who if is_there else None)
        motions.append(act == scene.acts[index])
        psnrs.append(judged.psnr(clip, own, act, spot))
    return Verdict(confusion=_confusion(found, scene.subjects), motion=all(motions), psnr=sum(psnrs) / 2)


def _confusion(found: Sequence[Subject | None], asked: Sequence[Subject]) -> str:
    if tuple(found) == tuple(asked):
        return "right"
    if None in found:
        return "missing"
    if tuple(found) == tuple(asked)[::-1]:
        return "swapped"
    return "doubled" if found[0] == found[1] else "other"
