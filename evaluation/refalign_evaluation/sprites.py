"""
`refalign-eval sprites`: does a model show the references' subjects, each in its place, doing what the prompt says?

In the small world this can be computed ([`refalign_evaluation.judge`]). Nothing heavy is imported before it is needed,
so that `--help` answers at once.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign.files import new_file
from refalign.privacy import source_name
from refalign.video_options import SpeedOptions


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from refalign_evaluation.judge import Case, Verdict
    from refalign_training.sprites.subject import Subject


CANDIDATES = 8  # subjects to tell apart
REFERENCE_TILT = (12.0, 30.0)  # degrees to one side or the other
BATCH = 16


@dataclass(frozen=True)
class Sprites(SpeedOptions):
    """Measure a model in the small world: identity, motion, confusion of two subjects, copied poses, sharpness."""

    model: str | None = None
    """The model to measure, as a pipeline folder or a Hub id. By default it is the tiny one of this package."""
    lora: tuple[str, ...] = ()
    """The LoRAs to measure it with, as .safetensors files or Hub ids, each with a :SCALE if you like. Scales that a
    distilled one asks for are taken unless others are given."""
    samples: int = 96
    """The number of clips of one subject, and of clips of two. All show subjects that are never trained on."""
    seed: int = 0
    """The seed of scenes, references and noise."""
    json: Path | None = None
    """The file to write the figures to. It is replaced if it exists."""
    steps: int | None = None
    """The number of denoising steps. By default it is the model's own."""
    guidance_scale: float | None = None
    """How closely the prompt is followed. By default it is the model's own."""
    image_guidance_scale: float | None = None
    """How closely the references are followed. By default it is the model's own."""
    guidance_gate: tuple[float, float] | None = None
    """The shares of the steps that make a null pass, and a reference pass. By default all steps make both."""
    fast: str | None = None
    """Settings for speed at once, as `refalign generate` has them: exact, balanced or fast."""
    sheet: Path | None = None
    """The PNG file to draw references and frames of the first clips to. It is replaced if it exists."""
    drawn: bool = False
    """Measure clips that are drawn instead of a model's. This is what a perfect model would get."""
    swapped: bool = False
    """Judge by exchanged references. This is what a model that takes no notice of them would get."""


# -- Cases ------------------------------------------------------------------------------------------------------------


def make_cases(samples: int, seed: int) -> "list[Case]":
    """The cases of `samples` clips of one held-out subject, then of as many of two."""
    from refalign_evaluation.judge import Case
    from refalign_training.data.randomness import numpy_generator
    from refalign_training.sprites.subject import of_same_colours, subjects
    from refalign_training.sprites.world import random_scene

    pool = subjects(held_out=True)
    cases = []
    for number in range(2 * samples):
        generator = numpy_generator("sprites evaluation", seed, number)
        count = 1 if number < samples else 2
        chosen = _pick(generator, pool, CANDIDATES + count)
        tilts = generator.uniform(*REFERENCE_TILT, count) * generator.choice((-1, 1), count)
        alike = _pick(generator, of_same_colours(chosen[0]), CANDIDATES - 1)
        scene = random_scene(generator, chosen[:count])
        cases.append(Case(scene, tuple(tilts.tolist()), chosen[count:CANDIDATES], alike))
    return cases


def _pick(generator: "np.random.Generator", pool: "Sequence[Subject]", count: int) -> "tuple[Subject, ...]":
    return tuple(pool[i] for i in generator.choice(len(pool), count, replace=False))


def references_of(case: "Case") -> "list[Image.Image]":
    """The references, in poses of their own."""
    from refalign_training.sprites.subject import draw_reference

    return list(map(draw_reference, case.scene.subjects, case.tilts))


def drawn_clip(case: "Case") -> "np.ndarray":
    """The clip that a perfect model makes."""
    from refalign_training.sprites.vae import draw_frames

    return draw_frames(case.scene)


# -- Figures ----------------------------------------------------------------------------------------------------------


def summarise(verdicts: "Sequence[Verdict]", model: str) -> dict[str, Any]:
    """The figures of all clips, fractions and decibels, each with a 95% interval."""
    import numpy as np

    clips: dict[str, list[Verdict]] = {"one": [], "two": []}
    for verdict in verdicts:
        clips["one" if verdict.confusion is None else "two"].append(verdict)
    figures: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name, (kind, is_so) in MEASURES.items():
        answers = [answer for answer in map(is_so, clips[kind]) if answer is not None]
        figures[name], intervals[name] = _share(answers)
    psnrs = [verdict.psnr for verdict in verdicts]
    psnr, margin = float(np.mean(psnrs)), float(1.96 * np.std(psnrs) / math.sqrt(len(psnrs)))
    figures["psnr"], intervals["psnr"] = psnr, [psnr - margin, psnr + margin]
    counts = {"clips": len(verdicts), "clips_of_one": len(clips["one"]), "clips_of_two": len(clips["two"])}
    return {**figures, "intervals": intervals, **counts, "model": model}


# The share of the clips of one or of two subjects for which something is so; None where it cannot be said
MEASURES: dict[str, tuple[str, "Callable[[Verdict], bool | None]"]] = {
    "identity": ("one", lambda verdict: verdict.identity),
    "identity_same_colours": ("one", lambda verdict: verdict.same_colours),
    "motion": ("one", lambda verdict: verdict.motion),
    "motion_of_two": ("two", lambda verdict: verdict.motion),
    "both_right": ("two", lambda verdict: verdict.confusion == "right"),
    "swapped": ("two", lambda verdict: verdict.confusion == "swapped"),
    "doubled": ("two", lambda verdict: verdict.confusion == "doubled"),
    "missing": ("two", lambda verdict: verdict.confusion == "missing"),
    "confusion": ("two", lambda verdict: verdict.confusion != "right"),
    "copy_paste": ("one", lambda verdict: verdict.copied),
}


def _share(answers: Sequence[bool]) -> tuple[float, list[float]]:
    """The share of answers that are true, nan of none, and its 95% interval (Wilson, 1927)."""
    count, z = max(len(answers), 1), 1.96
    share = sum(answers) / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    margin = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    interval = [max(centre - margin, 0.0), min(centre + margin, 1.0)]
    return share if answers else math.nan, interval


def describe(figures: dict[str, Any]) -> str:
    """The figures as a table for a terminal."""
    lines = [f"{figures['model']}: {figures['clips_of_one']} clips of one subject, {figures['clips_of_two']} of two"]
    for name, (low, high) in figures["intervals"].items():
        value = figures[name]
        shown = f"{value:6.2f} dB" if name == "psnr" else f"{100 * value:5.1f} %"
        limits = f"{low:.2f} to {high:.2f}" if name == "psnr" else f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(f"  {name:22} {shown:>10}   ({limits})")
    if "seconds_per_clip" in figures:
        lines.append(f"  {figures['seconds_per_clip']:.2f} seconds per clip")
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
    if command.drawn and (command.model is not None or command.lora):
        raise ValueError("--drawn measures no model. Leave --model and --lora out.")
    cases, started = make_cases(command.samples, command.seed), time.perf_counter()
    clips = list(map(drawn_clip, cases) if command.drawn else generate(command, cases))
    seconds = (time.perf_counter() - started) / len(clips)
    if command.swapped:
        cases = list(map(swapped, cases))
    name = "drawn clips" if command.drawn else " with ".join([_name(command.model), *map(source_name, command.lora)])
    figures = evaluate(cases, clips, name) | {"seconds_per_clip": seconds}
    print(describe(figures))
    if command.json is not None:
        with new_file(command.json, overwrite=True) as file:
            file.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    if command.sheet is not None:
        pairs = list(zip(cases, clips, strict=True))
        second = command.samples  # the first clip of two subjects
        with new_file(command.sheet, overwrite=True) as file:
            draw_sheet(pairs[: min(6, second)] + pairs[second : second + 6]).save(file)
    return 0


def _name(model: str | None) -> str:
    """What to call a model in reports: a folder by its name."""
    if model is None:
        return "the embedded model"
    return Path(model).resolve().name if Path(model).is_dir() else model


def evaluate(cases: "Sequence[Case]", clips: "Sequence[np.ndarray]", model: str) -> dict[str, Any]:
    """The figures of clips, each `(17, 64, 64, 3)` uint8, of those cases."""
    from refalign_evaluation.judge import Judge, judge

    judged = Judge()
    verdicts = [judge(case, clip, judged) for case, clip in zip(cases, clips, strict=True)]
    return summarise(verdicts, model)


def swapped(case: "Case") -> "Case":
    """The case with another subject asked for, or the two exchanged."""
    scene = case.scene
    if len(scene.subjects) == 2:
        return replace(case, scene=replace(scene, subjects=scene.subjects[::-1]))
    others = (*case.others[1:], scene.subjects[0])
    return replace(case, scene=replace(scene, subjects=case.others[:1]), others=others)


def generate(command: Sprites, cases: "Sequence[Case]") -> "Iterator[np.ndarray]":
    """The model's clips of the cases, uint8 `(17, 64, 64, 3)`."""
    from refalign.levers import set_cache
    from refalign.loading import load_pipeline, parse_lora, read_defaults
    from refalign.presets import with_preset
    from refalign.sprites import FOLDER

    model, loras = command.model or str(FOLDER), list(map(parse_lora, command.lora))
    defaults = with_preset(command.fast, "cpu", read_defaults(model, command.lora))
    where = {"device": "cpu", "offload": "none"}
    pipeline = load_pipeline(model, base=None, loras=loras, dtype="float32", **where, speed=command)
    pipeline.set_progress_bar_config(disable=True)
    steps = command.steps or defaults["num_inference_steps"]
    set_cache(pipeline, command.cache or defaults.get("cache"), model, steps)
    settings = {"num_inference_steps": steps, "batch_passes": command.batch_passes}
    settings["guidance_gate"] = command.guidance_gate or defaults.get("guidance_gate")
    for name in ("guidance_scale", "image_guidance_scale"):
        given = getattr(command, name)
        settings[name] = defaults[name] if given is None else given
    yield from generate_by(pipeline, cases, command.seed, **settings)


def generate_by(pipeline: Callable, cases: "Sequence[Case]", seed: int, **settings: Any) -> "Iterator[np.ndarray]":
    """As [`generate`], by a pipeline that is loaded."""
    import torch
    from tqdm import tqdm

    from refalign_training.sprites.vae import MODEL_SIDE
    from refalign_training.sprites.world import NUM_FRAMES, captions

    for start in tqdm(range(0, len(cases), BATCH), desc="clips", unit="batch", mininterval=5):
        batch = cases[start : start + BATCH]
        prompts, generators = [], []
        for number, case in enumerate(batch, start):
            prompts.append(captions(case.scene)[0])
            generators.append(torch.Generator().manual_seed(1_000_003 * seed + number))
        videos = pipeline(
            prompts,
            reference_images=list(map(references_of, batch)),
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
