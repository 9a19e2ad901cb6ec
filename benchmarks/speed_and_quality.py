"""What settings for speed cost in the small world, and what they save: the tables of docs/speed.md.

    python benchmarks/speed_and_quality.py --samples 48 --json speed.json

The settings take turns on batches of 16 clips in one process of one thread, and seconds are its processor time, so
that they can be compared on a busy machine.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refalign import RefAlignWanPipeline
from refalign.levers import set_cache
from refalign.presets import with_preset
from refalign.sprites import FOLDER
from refalign_evaluation.judge import Judge, Verdict, judge
from refalign_evaluation.sprites import BATCH, generate_by, make_cases, summarise


SHOWN = ("identity", "identity_same_colours", "motion", "motion_of_two", "both_right", "confusion")
# Two passes a step, as the small model has it by default, and three
SCALES = {"two": (3.0, 3.0), "three": (4.0, 2.0)}
SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "gate 0.8 0.9": {"guidance_gate": (0.8, 0.9)},
    "gate 0.6 0.8": {"guidance_gate": (0.6, 0.8)},
    "gate 0.4 0.6": {"guidance_gate": (0.4, 0.6)},
    "gate 0.2 0.4": {"guidance_gate": (0.2, 0.4)},
    "cache first-block:0.1": {"cache": "first-block:0.1"},
    "12 steps of 16": {"num_inference_steps": 12},
    "--fast balanced": {"fast": "balanced"},
    "--fast fast": {"fast": "fast"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=48, help="clips of one subject, and as many of two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="settings to measure beside exact")
    parser.add_argument("--passes", nargs="*", default=list(SCALES), choices=list(SCALES))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = RefAlignWanPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    cases = make_cases(options.samples, options.seed)
    # One of one subject, one of two, and so on, so that a run that is broken off has measured both
    cases = [case for pair in zip(cases[: options.samples], cases[options.samples :], strict=True) for case in pair]
    names = [name for name in SETTINGS if name in ("exact", *options.only)]
    ways = [(passes, name) for passes in options.passes for name in names]
    clips: dict[tuple[str, str], list[np.ndarray]] = {way: [] for way in ways}
    verdicts: dict[tuple[str, str], list[Verdict]] = {way: [] for way in ways}
    seconds, judged, rows = dict.fromkeys(ways, 0.0), Judge(), []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        for way in ways:
            begun = time.process_time()
            # A seed for each batch: else all batches would have the same noise
            made = list(generate_by(pipeline, batch, options.seed + start, **prepare(pipeline, *way)))
            seconds[way] += time.process_time() - begun
            clips[way] += made
            verdicts[way] += [judge(case, clip, judged) for case, clip in zip(batch, made, strict=True)]
        rows = [row(way, verdicts[way], clips, seconds) for way in ways]
        options.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    print("\n".join(map(as_line, rows)))


def prepare(pipeline: RefAlignWanPipeline, passes: str, name: str) -> dict[str, Any]:
    """The arguments of the call; the cache is put on the pipeline."""
    settings = dict(SETTINGS[name])
    defaults = with_preset(settings.pop("fast", None), "cpu", pipeline.call_defaults)
    steps = settings.get("num_inference_steps", defaults["num_inference_steps"])
    set_cache(pipeline, settings.pop("cache", defaults.get("cache")), str(FOLDER), steps)
    scale, image_scale = SCALES[passes]
    gate = settings.get("guidance_gate", defaults.get("guidance_gate"))
    return {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "image_guidance_scale": image_scale,
        "guidance_gate": gate,
    }


def row(way: tuple[str, str], verdicts: list[Verdict], clips: dict, seconds: dict) -> dict[str, Any]:
    """A way's figures, its seconds as a share of the exact way's, and how near its clips are to the exact ones."""
    exact = (way[0], "exact")
    figures = summarise(verdicts, way[1])
    psnrs = [psnr(one, other) for one, other in zip(clips[way], clips[exact], strict=True)]
    near = {"psnr_to_exact": float(np.mean(psnrs)), "psnr_margin": float(1.96 * np.std(psnrs) / math.sqrt(len(psnrs)))}
    return {"passes": way[0], "seconds": seconds[way], "share": seconds[way] / seconds[exact], **near, **figures}


def psnr(clip: np.ndarray, exact: np.ndarray) -> float:
    """In decibels, of uint8 frames; 99 for the same ones."""
    error = float(np.mean((clip.astype(float) - exact) ** 2))
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def as_line(figures: dict[str, Any]) -> str:
    """A row of a table in Markdown."""
    shown = [f"{figures['passes']}: {figures['model']}", f"{figures['share']:.2f}", f"{figures['psnr_to_exact']:.1f}"]
    for name in SHOWN:
        low, high = (100 * bound for bound in figures["intervals"][name])
        shown.append(f"{100 * figures[name]:.0f} ({low:.0f}-{high:.0f})")
    return f"| {' | '.join(shown)} |"


if __name__ == "__main__":
    main()
