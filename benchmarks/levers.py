"""What each lever of speed costs and saves in the small world, where weights are trained and what is right can be
computed: identity, motion, both subjects right, PSNR to the exact clips, seconds and bytes as ratios.

    python -m benchmarks.levers                                               # hours on one core
    python -m benchmarks.levers --levers first-block gate --guidance three    # these alone, with three passes a step
    python -m benchmarks.levers --samples 1 --levers first-block              # does it run

All settings make the clips of a batch in turns, in one process of one thread, from the same noise. Seconds are the
process's own (`time.process_time`), so that other work on the machine counts little; the ratio is the median over
batches. Bytes are the transformer's weights. The table is written as Markdown, between the marks of its name in the
file `--page`; the figures after each batch to the file `--json`.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from benchmarks.machine import machine_line, markdown_table, write_between_marks
from refalign.levers import set_cache
from refalign.loading import load_pipeline
from refalign.presets import with_preset
from refalign.quantization import weight_bytes
from refalign.sprites import FOLDER, ONE_PASS
from refalign.video_options import SpeedOptions
from refalign_evaluation.judge import Judge, Verdict, judge
from refalign_evaluation.sprites import BATCH, generate_by, make_cases, summarise


SHOWN = ("identity", "motion", "both_right")
# Scales of text and references: two passes a step, as the small model has it by default, and three
GUIDANCE = {"two": (3.0, 3.0), "three": (4.0, 2.0)}


@dataclass(frozen=True)
class Lever(SpeedOptions):
    """What is measured beside the exact clips."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    steps: int | None = None
    scales: tuple[float, float] | None = None
    """In the place of those of the guidance."""
    lora: Path | None = None


EXACT = "exact (float32)"
LEVERS = {
    EXACT: Lever(),
    "bfloat16": Lever(dtype="bfloat16"),
    "--quantize int8": Lever(quantize="int8"),
    "--quantize fp8": Lever(quantize="fp8"),
    "--cache first-block:0.05": Lever(cache="first-block:0.05"),
    "--cache first-block:0.1": Lever(cache="first-block:0.1"),
    "--cache mag:0.06": Lever(cache="mag:0.06"),
    "--cache mag:0.12": Lever(cache="mag:0.12"),
    "--cache taylorseer:2": Lever(cache="taylorseer:2"),
    "--cache taylorseer:3": Lever(cache="taylorseer:3"),
    "--guidance-gate 0.8 0.9": Lever(guidance_gate=(0.8, 0.9)),
    "--guidance-gate 0.6 0.8": Lever(guidance_gate=(0.6, 0.8)),
    "--guidance-gate 0.4 0.6": Lever(guidance_gate=(0.4, 0.6)),
    "--guidance-gate 0.2 0.4": Lever(guidance_gate=(0.2, 0.4)),
    "--steps 12 (of 16)": Lever(steps=12),
    "--fast balanced": Lever(fast="balanced"),
    "--fast fast": Lever(fast="fast"),
    "one pass without the LoRA": Lever(scales=(1.0, 1.0)),
    "one pass with the LoRA": Lever(scales=(1.0, 1.0), lora=ONE_PASS),
}
Way = tuple[str, str]  # guidance and lever


@dataclass(frozen=True)
class Options:
    """Measures levers in the small world."""

    samples: int = 48
    """Clips of one held-out subject, and as many of two."""
    levers: tuple[str, ...] = ("",)
    """Parts of the names of those to measure. By default all are."""
    guidance: tuple[Literal["two", "three"], ...] = ("two",)
    """How many passes a step makes."""
    seed: int = 0
    """The seed of scenes, references and noise."""
    page: Path | None = None
    """The Markdown file to write the table into."""
    json: Path | None = None
    """The file to write the figures into, after each batch."""


@dataclass
class Made:
    """What a way has made so far."""

    clips: list[np.ndarray] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """The seconds of each batch."""


@cache
def pipeline_of(dtype: str, quantize: str | None, lora: Path | None) -> Any:
    """The small world's pipeline, loaded once for all levers that do not change its weights."""
    loras = [] if lora is None else [(str(lora), 1.0)]
    where = {"base": None, "device": "cpu", "offload": "none"}
    pipeline = load_pipeline(str(FOLDER), loras=loras, dtype=dtype, speed=SpeedOptions(quantize=quantize), **where)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prepared(way: Way) -> tuple[Any, dict[str, Any]]:
    """A way's pipeline, with its cache, and the arguments of its call."""
    guidance, name = way
    lever = LEVERS[name]
    pipeline = pipeline_of(lever.dtype, lever.quantize, lever.lora)
    defaults = with_preset(lever.fast, "cpu", pipeline.call_defaults)
    steps = lever.steps or defaults["num_inference_steps"]
    set_cache(pipeline, lever.cache or defaults.get("cache"), str(FOLDER), steps)
    scale, image_scale = lever.scales or GUIDANCE[guidance]
    return pipeline, {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "image_guidance_scale": image_scale,
        "guidance_gate": lever.guidance_gate or defaults.get("guidance_gate"),
    }


def measure(cases: Sequence[Any], ways: Sequence[Way], options: Options) -> list[dict[str, Any]]:
    """The figures of each way."""
    made, judged, rows = {way: Made() for way in ways}, Judge(), []
    turns = [(start, way) for start in range(0, len(cases), BATCH) for way in ways]
    for start, way in tqdm(turns, mininterval=10):
        batch = cases[start : start + BATCH]
        pipeline, arguments = prepared(way)
        begun = time.process_time()
        # A seed for each batch: else all batches would have the same noise
        clips = list(generate_by(pipeline, batch, options.seed + start, **arguments))
        made[way].seconds.append(time.process_time() - begun)
        made[way].clips += clips
        made[way].verdicts += [judge(case, clip, judged) for case, clip in zip(batch, clips, strict=True)]
        if way == ways[-1]:
            rows = [row(way, made) for way in ways]
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    return rows


def row(way: Way, made: dict[Way, Made]) -> dict[str, Any]:
    """A way's figures; seconds, bytes and PSNR are to the exact way with the same guidance."""
    (guidance, name), exact_way = way, (way[0], EXACT)
    ours, exact = made[way], made[exact_way]
    ratios = [one / other for one, other in zip(ours.seconds, exact.seconds, strict=True)]
    sizes = [weight_bytes(prepared(each)[0].transformer) for each in (way, exact_way)]
    psnrs = [psnr(one, other) for one, other in zip(ours.clips, exact.clips, strict=True)]
    margin = 1.96 * float(np.std(psnrs)) / math.sqrt(len(psnrs))
    near = {"psnr_to_exact": float(np.mean(psnrs)), "psnr_margin": margin}
    settings = {key: value for key, value in asdict(LEVERS[name]).items() if value and key != "lora"}
    shares = {"guidance": guidance, "settings": settings, "seconds": statistics.median(ratios)}
    return {**shares, "bytes": sizes[0] / sizes[1], **near, **summarise(ours.verdicts, name)}


def psnr(clip: np.ndarray, exact: np.ndarray) -> float:
    """In decibels, of uint8 frames; 60 at most, which equal ones have."""
    error = np.square((clip.astype(float) - exact) / 255).mean()
    return 60.0 if error == 0 else min(60.0, -10 * math.log10(error))


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["setting", "identity, %", "motion, %", "both right, %", "PSNR to exact, dB", "seconds", "bytes"]
    lines = []
    for figures in rows:
        prefix = f"{figures['guidance']} passes: " if figures["guidance"] != "two" else ""
        cells = [prefix + figures["model"]]
        for name in SHOWN:
            low, high = figures["intervals"][name]
            cells.append(f"{100 * figures[name]:.0f} ({100 * low:.0f}-{100 * high:.0f})")
        near, margin = figures["psnr_to_exact"], figures["psnr_margin"]
        cells.append("" if figures["model"] == EXACT else f"{near:.1f} ({near - margin:.1f}-{near + margin:.1f})")
        lines.append([*cells, f"{figures['seconds']:.2f}", f"{figures['bytes']:.2f}"])
    return markdown_table(header, lines)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    cases = make_cases(options.samples, options.seed)
    # One of one subject, one of two, and so on, so that a run that is broken off has measured both
    cases = [case for pair in zip(cases[: options.samples], cases[options.samples :], strict=True) for case in pair]
    names = [name for name in LEVERS if name == EXACT or any(part in name for part in options.levers)]
    ways = [(guidance, name) for guidance in options.guidance for name in names]
    text = f"{as_table(measure(cases, ways, options))}\n\n{len(cases)} held-out clips. {machine_line()}"
    print(text)
    if options.page is not None:
        write_between_marks(options.page, "levers", text)


if __name__ == "__main__":
    main(tyro.cli(Options))
