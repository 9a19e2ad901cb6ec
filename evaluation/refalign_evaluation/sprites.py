"""
`refalign-eval sprites`: does a model show the references' subjects, each in its place, doing what the prompt says?

In the small world this can be computed: what a clip should show is drawn, and laid over the clip. A clip's explanation
is a subject in an act before a background that stands still; the explanation with the smallest error says who is there
and what happens. Nothing is learnt, and no model that was trained with takes part.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign.files import new_file


if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from refalign_training.sprites.world import Scene, Subject


CANDIDATES = 8  # subjects to tell apart
REFERENCE_TILT = (12.0, 30.0)  # degrees to one side or the other
BATCH = 16
SHIFTS = (-1, 0, 1)  # pixels to each side that an explanation may be moved by
FRAME_STEP = 2  # every second frame is looked at
KEPT = 400  # drawings
LEAST_PRESENCE = 0.25  # with less movement than this share of a subject's, it is missing


@dataclass(frozen=True)
class Sprites:
    """Measure a model in the small world: identity, motion, confusion of two subjects, copied poses, sharpness."""

    model: str | None = None
    """A pipeline folder or Hub id; by default the tiny model that comes with this package."""
    samples: int = 96
    """Clips of one subject, and as many of two, all of subjects that are never trained on."""
    seed: int = 0
    """The seed of scenes, references and noise."""
    json: Path | None = None
    """A file for the figures, replaced if it exists."""
    steps: int | None = None
    """Denoising steps; by default the model's own."""
    guidance_scale: float | None = None
    """By default the model's own."""
    image_guidance_scale: float | None = None
    """By default the model's own."""
    sheet: Path | None = None
    """A PNG file for references and frames of the first clips, replaced if it exists."""
    drawn: bool = False
    """Measure clips that are drawn instead of a model's: what a perfect model would get."""
    swapped: bool = False
    """Judge by exchanged references: what a model that takes no notice of them would get."""


@dataclass(frozen=True)
class Case:
    """A clip to make, and what it is judged by."""

    scene: "Scene"
    tilts: tuple[float, ...]
    """How the references are turned, in degrees."""
    others: tuple["Subject", ...]
    """Held-out subjects that are not shown."""
    alike: tuple["Subject", ...]
    """Subjects of the first one's two colours."""


@dataclass
class Verdict:
    """What one clip shows."""

    identity: bool | None = None
    """One subject: the right one of eight; so `same_colours`, of eight of its colours."""
    same_colours: bool | None = None
    motion: bool | None = None
    """The act of the prompt; of two subjects, both."""
    copied: bool | None = None
    """The pose of the reference fits better than the act's; none for acts that turn."""
    confusion: str | None = None
    """Two subjects: right, swapped, doubled, missing or other."""
    psnr: float = field(default=math.nan)
    """How near the clip is to its best explanation, where the subjects are, in decibels."""


# -- Cases ------------------------------------------------------------------------------------------------------------


def make_cases(samples: int, seed: int) -> list[Case]:
    """So many clips of one held-out subject, then as many of two."""
    from refalign_training.data.randomness import numpy_generator
    from refalign_training.sprites.world import of_same_colours, random_scene, subjects

    pool, cases = subjects(held_out=True), []
    for number in range(2 * samples):
        generator = numpy_generator("sprites evaluation", seed, number)
        count = 1 if number < samples else 2
        chosen = [pool[i] for i in generator.choice(len(pool), CANDIDATES + count, replace=False)]
        tilts = generator.uniform(*REFERENCE_TILT, count) * generator.choice((-1, 1), count)
        same = of_same_colours(chosen[0])
        alike = [same[i] for i in generator.choice(len(same), CANDIDATES - 1, replace=False)]
        scene = random_scene(generator, tuple(chosen[:count]))
        others = chosen[count : CANDIDATES + (count - 1)]
        cases.append(Case(scene, tuple(map(float, tilts)), tuple(others[: CANDIDATES - count]), tuple(alike)))
    return cases


def references_of(case: Case) -> "list[Image.Image]":
    """The references, in poses of their own."""
    from refalign_training.sprites.world import draw_reference

    pairs = zip(case.scene.subjects, case.tilts, strict=True)
    return [draw_reference(subject, tilt) for subject, tilt in pairs]


def drawn_clip(case: Case) -> "np.ndarray":
    """The clip that a perfect model makes."""
    from refalign_training.sprites.vae import draw_frames

    return draw_frames(case.scene)


# -- Explanations -----------------------------------------------------------------------------------------------------


class Judge:
    """Fits explanations to clips."""

    def __init__(self) -> None:
        self._drawn: dict[Any, torch.Tensor] = {}

    def error(self, clip: "torch.Tensor", subject: "Subject", act: str, spot: str, tilt: float = 0.0) -> float:
        """
        The mean squared error, in a place's part of a clip, of a subject in an act before what stands still; the best
        of some shifts.

        Args:
            clip (`torch.Tensor` of shape `(frames, 64, 64, 3)`): in [0, 1].
        """
        import torch

        clip = clip[:, :, _columns(act, spot)]
        drawn = self._draw(subject, act, spot, tilt)
        return torch.stack([_residual(clip, moved).square().mean() for moved in drawn]).min().item()

    def movement(self, clip: "torch.Tensor", act: str, spot: str) -> float:
        """How much changes over time in a place's part of a clip: the mean square of what does not stand still."""
        return _movement(clip[:, :, _columns(act, spot)])

    def presence(self, clip: "torch.Tensor", subject: "Subject", act: str, spot: str) -> float:
        """How much changes over time in a place's own half, as a share of what would if the subject were there."""
        clip = clip[:, :, _columns(act, spot)]
        residuals = [_residual(clip, moved) for moved in self._draw(subject, act, spot, 0.0)]
        explained = clip - min(residuals, key=lambda residual: residual.square().mean())
        half = slice(0, 32) if spot == "left" else slice(-32, None)
        return _movement(clip[:, :, half]) / max(_movement(explained[:, :, half]), 1e-9)

    def psnr(self, clip: "torch.Tensor", subject: "Subject", act: str, spot: str) -> float:
        """How near a clip is to the explanation, where the subject is, in decibels."""
        import torch

        clip, errors = clip[:, :, _columns(act, spot)], []
        for moved in self._draw(subject, act, spot, 0.0):
            weight = moved[..., 3:]
            errors.append((_residual(clip, moved).square() * weight).sum() / (3 * weight.sum()))
        return -10 * torch.log10(torch.stack(errors).min()).item()

    def _draw(self, subject: "Subject", act: str, spot: str, tilt: float) -> "torch.Tensor":
        """The subject in the act at nine shifts, RGBA in [0, 1]: `(9, frames, 64, columns, 4)`."""
        import numpy as np
        import torch

        from refalign_training.sprites.world import draw_act

        key = (subject, act, spot, tilt)
        if key not in self._drawn:
            frames = np.stack(draw_act(subject, act, spot, tilt, FRAME_STEP))
            values = torch.from_numpy(frames).float() / 255
            values = torch.cat([values[..., :3] * values[..., 3:], values[..., 3:]], -1)
            small = values.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
            moved = [small.roll((y, x), (1, 2))[:, :, _columns(act, spot)] for y in SHIFTS for x in SHIFTS]
            if len(self._drawn) > KEPT:
                self._drawn.clear()
            self._drawn[key] = torch.stack(moved)
        return self._drawn[key]


def _columns(act: str, spot: str) -> slice:
    """The part of a frame that a place is judged in."""
    from refalign_training.sprites.world import CROSSES

    if spot == "middle" or act == CROSSES:
        return slice(0, 64)
    return slice(0, 32) if spot == "left" else slice(32, 64)


def _movement(clip: "torch.Tensor") -> float:
    return (clip - clip.mean(0)).square().mean().item()


def _residual(clip: "torch.Tensor", drawn: "torch.Tensor") -> "torch.Tensor":
    """What a drawn subject (premultiplied RGBA), in the light that suits it, before the best still place leaves."""
    colours, alpha = drawn[..., :3], drawn[..., 3:]
    uncovered = 1 - alpha
    background = (uncovered * clip).sum(0) / uncovered.sum(0).clamp(min=1e-3)
    behind = clip - uncovered * background
    light = ((behind * colours).sum() / colours.square().sum().clamp(min=1e-6)).clamp(0.8, 1.2)
    return behind - light * colours


def judge(case: Case, clip: "np.ndarray", judged: Judge) -> Verdict:
    """
    What a clip shows.

    Args:
        clip (`np.ndarray` of shape `(17, 64, 64, 3)`): uint8.
    """
    import torch

    values = torch.from_numpy(clip[::FRAME_STEP].copy()).float() / 255
    return _judge_one(case, values, judged) if len(case.scene.subjects) == 1 else _judge_two(case, values, judged)


def _judge_one(case: Case, clip: "torch.Tensor", judged: Judge) -> Verdict:
    from refalign_training.sprites.world import ACTS

    (own,), (asked,) = case.scene.subjects, case.scene.acts
    by_act = {act: judged.error(clip, own, act, "middle") for act in ACTS}
    act = min(by_act, key=by_act.get)
    others = [judged.error(clip, other, act, "middle") for other in case.others]
    alike = [judged.error(clip, other, act, "middle") for other in case.alike]
    copied = None
    if act != "spins":
        copied = judged.error(clip, own, act, "middle", case.tilts[0]) < by_act[act]
    return Verdict(
        identity=by_act[act] < min(others),
        same_colours=by_act[act] < min(alike),
        motion=act == asked,
        copied=copied,
        psnr=judged.psnr(clip, own, act, "middle"),
    )


def _judge_two(case: Case, clip: "torch.Tensor", judged: Judge) -> Verdict:
    from refalign_training.sprites.world import ACTS_OF_TWO, CROSSES

    scene, found, motions, psnrs = case.scene, [], [], []
    for index, spot in enumerate(scene.spots):
        own, other = scene.subjects[index], scene.subjects[1 - index]
        tries = {
            (subject, act): judged.error(clip, subject, act, spot)
            for subject in (own, other)
            for act in (*ACTS_OF_TWO, CROSSES)
        }
        # Errors of the whole frame and of a half are of different size: each is told by its share of what moves
        moving = {act: judged.movement(clip, act, spot) for act in (*ACTS_OF_TWO, CROSSES)}
        _, act = min(tries, key=lambda key: tries[key] / max(moving[key[1]], 1e-9))
        errors = {who: judged.error(clip, who, act, spot) for who in (own, other, *case.others)}
        who = min(errors, key=errors.get)
        found.append(who if judged.presence(clip, who, act, spot) > LEAST_PRESENCE else None)
        motions.append(act == scene.acts[index])
        psnrs.append(judged.psnr(clip, own, act, spot))
    return Verdict(confusion=_confusion(found, scene.subjects), motion=all(motions), psnr=sum(psnrs) / 2)


def _confusion(found: "Sequence[Subject | None]", asked: "Sequence[Subject]") -> str:
    if tuple(found) == tuple(asked):
        return "right"
    if None in found:
        return "missing"
    if tuple(found) == tuple(asked)[::-1]:
        return "swapped"
    return "doubled" if found[0] == found[1] else "other"


# -- Figures ----------------------------------------------------------------------------------------------------------


def summarise(verdicts: Sequence[Verdict], model: str) -> dict[str, Any]:
    """The figures of all clips, fractions and decibels, each with a 95% interval."""
    one = [verdict for verdict in verdicts if verdict.confusion is None]
    two = [verdict for verdict in verdicts if verdict.confusion is not None]
    shares = {
        "identity": [verdict.identity for verdict in one],
        "identity_same_colours": [verdict.same_colours for verdict in one],
        "motion": [verdict.motion for verdict in one],
        "motion_of_two": [verdict.motion for verdict in two],
        "both_right": [verdict.confusion == "right" for verdict in two],
        "swapped": [verdict.confusion == "swapped" for verdict in two],
        "doubled": [verdict.confusion == "doubled" for verdict in two],
        "missing": [verdict.confusion == "missing" for verdict in two],
        "confusion": [verdict.confusion != "right" for verdict in two],
        "copy_paste": [verdict.copied for verdict in one if verdict.copied is not None],
    }
    figures: dict[str, Any] = {name: _mean(values) for name, values in shares.items()}
    intervals: dict[str, Any] = {name: _wilson(values) for name, values in shares.items()}
    figures["psnr"] = _mean([verdict.psnr for verdict in verdicts])
    spread = _mean([(verdict.psnr - figures["psnr"]) ** 2 for verdict in verdicts])
    margin = 1.96 * math.sqrt(spread / max(len(verdicts), 1))
    intervals["psnr"] = [figures["psnr"] - margin, figures["psnr"] + margin]
    counts = {"clips": len(verdicts), "clips_of_one": len(one), "clips_of_two": len(two)}
    return {**figures, "intervals": intervals, **counts, "model": model}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _wilson(values: Sequence[bool]) -> list[float]:
    """The 95% interval of a share (Wilson, 1927)."""
    count, z = max(len(values), 1), 1.96
    share = sum(values) / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    margin = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return [max(centre - margin, 0.0), min(centre + margin, 1.0)]


def describe(figures: dict[str, Any]) -> str:
    """The figures as a table for a terminal."""
    lines = [f"{figures['model']}: {figures['clips_of_one']} clips of one subject, {figures['clips_of_two']} of two"]
    for name, (low, high) in figures["intervals"].items():
        value = figures[name]
        shown = f"{value:6.2f} dB" if name == "psnr" else f"{100 * value:5.1f} %"
        limits = f"{low:.2f} to {high:.2f}" if name == "psnr" else f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(f"  {name:22} {shown:>10}   ({limits})")
    return "\n".join(lines)


# -- The command ------------------------------------------------------------------------------------------------------


def run(command: Sprites) -> int:
    """
    Makes the clips, judges them, prints the figures and returns the exit code.

    Raises:
        ValueError: if options do not fit, or there is no such model.
    """
    if command.samples < 1:
        raise ValueError(f"--samples is {command.samples}: pass 1 or more.")
    if command.drawn and command.model is not None:
        raise ValueError("--drawn measures no model. Leave --model out.")
    cases = make_cases(command.samples, command.seed)
    clips = list(map(drawn_clip, cases)) if command.drawn else list(generate(command, cases))
    if command.swapped:
        cases = list(map(swapped, cases))
    figures = evaluate(cases, clips, "drawn clips" if command.drawn else _name(command.model))
    print(describe(figures))
    if command.json is not None:
        with new_file(command.json, overwrite=True) as file:
            file.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    if command.sheet is not None:
        shown = [*range(6), *range(command.samples, command.samples + 6)]
        with new_file(command.sheet, overwrite=True) as file:
            draw_sheet([(cases[i], clips[i]) for i in shown if i < len(clips)]).save(file)
    return 0


def _name(model: str | None) -> str:
    """What to call it in reports: of a folder, its name."""
    if model is None:
        return "the embedded model"
    return Path(model).resolve().name if Path(model).is_dir() else model


def evaluate(cases: Sequence[Case], clips: "Sequence[np.ndarray]", model: str) -> dict[str, Any]:
    """The figures of clips, each `(17, 64, 64, 3)` uint8, of those cases."""
    judged = Judge()
    verdicts = [judge(case, clip, judged) for case, clip in zip(cases, clips, strict=True)]
    return summarise(verdicts, model)


def swapped(case: Case) -> Case:
    """The case with another subject asked for, or the two exchanged."""
    scene = case.scene
    if len(scene.subjects) == 2:
        return replace(case, scene=replace(scene, subjects=scene.subjects[::-1]))
    others = (*case.others[1:], scene.subjects[0])
    return replace(case, scene=replace(scene, subjects=case.others[:1]), others=others)


def generate(command: Sprites, cases: Sequence[Case]) -> "Iterator[np.ndarray]":
    """The model's clips of the cases, uint8 `(17, 64, 64, 3)`."""
    from refalign import RefAlignWanPipeline
    from refalign.sprites import FOLDER

    pipeline = RefAlignWanPipeline.from_pretrained(command.model or FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "num_inference_steps": command.steps,
        "guidance_scale": command.guidance_scale,
        "image_guidance_scale": command.image_guidance_scale,
    }
    yield from generate_by(pipeline, cases, command.seed, **settings)


def generate_by(pipeline: Callable, cases: Sequence[Case], seed: int, **settings: Any) -> "Iterator[np.ndarray]":
    """As [`generate`], by a pipeline that is loaded."""
    import torch
    from tqdm import tqdm

    from refalign_training.sprites.vae import MODEL_SIDE
    from refalign_training.sprites.world import NUM_FRAMES, captions

    for start in tqdm(range(0, len(cases), BATCH), desc="clips", unit="batch", mininterval=5):
        batch = cases[start : start + BATCH]
        generators = [torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(len(batch))]
        videos = pipeline(
            [captions(case.scene)[0] for case in batch],
            reference_images=[references_of(case) for case in batch],
            height=MODEL_SIDE,
            width=MODEL_SIDE,
            num_frames=NUM_FRAMES,
            generator=generators,
            **settings,
        ).frames
        yield from (videos * 255).round().astype("uint8")


def draw_sheet(pairs: "Sequence[tuple[Case, np.ndarray]]") -> "Image.Image":
    """A row for each clip: its references, then six of its frames."""
    from PIL import Image

    side = 96
    sheet = Image.new("RGB", (8 * side + 8, side * len(pairs)), "white")
    for row, (case, clip) in enumerate(pairs):
        for column, reference in enumerate(references_of(case)):
            sheet.paste(reference.resize((side, side)), (column * side, row * side))
        for column, frame in enumerate(clip[:: len(clip) // 5][:6]):
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, ((2 + column) * side + 8, row * side))
    return sheet
