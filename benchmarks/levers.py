"""What each lever of `refalign generate` costs and brings in the small world, where weights are trained and what is
right can be computed: identity, motion, both subjects right, PSNR to the exact clips, seconds and bytes as ratios.

    python -m benchmarks.levers                                    # half an hour on one core
    python -m benchmarks.levers --samples 2 --levers first-block   # does it run

All settings make the clips of a batch in turns, in one process, from the same noise. Seconds are the process's own
(`time.process_time`), so that other work on the machine counts little; the ratio is the median over batches. Bytes are
the transformer's weights. The table is written as Markdown, between the marks of its name in the file `--page`.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from benchmarks.machine import machine_line, markdown_table, write_between_marks
from refalign.levers import set_cache
from refalign.loading import load_pipeline
from refalign.quantization import weight_bytes
from refalign.sprites import FOLDER
from refalign.video_options import SpeedOptions
from refalign_evaluation.sprites import evaluate, generate_by, make_cases


EXACT = "exact (float32)"
# Each with its options and its dtype
LEVERS: dict[str, tuple[dict[str, Any], str]] = {
    "bfloat16": ({}, "bfloat16"),
    "--quantize int8": ({"quantize": "int8"}, "float32"),
    "--quantize fp8": ({"quantize": "fp8"}, "float32"),
    "--cache first-block:0.05": ({"cache": "first-block:0.05"}, "float32"),
    "--cache first-block:0.1": ({"cache": "first-block:0.1"}, "float32"),
    "--cache mag:0.06": ({"cache": "mag:0.06"}, "float32"),
    "--cache mag:0.12": ({"cache": "mag:0.12"}, "float32"),
    "--cache taylorseer:2": ({"cache": "taylorseer:2"}, "float32"),
    "--cache taylorseer:3": ({"cache": "taylorseer:3"}, "float32"),
}
BATCH = 16


@dataclass(frozen=True)
class Options:
    """Measures levers in the small world."""

    samples: int = 48
    """Clips of one held-out subject, and as many of two."""
    levers: tuple[str, ...] = ()
    """Parts of the names of those to measure. By default all are."""
    page: Path | None = None
    """The Markdown file to write the table into."""


def pipeline_of(options: dict[str, Any], dtype: str) -> Any:
    """The small world's pipeline with these options."""
    model, speed = str(FOLDER), SpeedOptions(**options)
    pipeline = load_pipeline(model, base=None, loras=(), dtype=dtype, device="cpu", offload="none", speed=speed)
    pipeline.set_progress_bar_config(disable=True)
    set_cache(pipeline, speed.cache, model, pipeline.call_defaults["num_inference_steps"])
    return pipeline


def make_clips(pipelines: dict[str, Any], cases: Sequence[Any]) -> tuple[dict[str, list], dict[str, list[float]]]:
    """The clips of every setting, uint8, and the seconds of each batch."""
    clips: dict[str, list] = {name: [] for name in pipelines}
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    turns = [(start, name) for start in range(0, len(cases), BATCH) for name in pipelines]
    for start, name in tqdm(turns, mininterval=10):
        begin = time.process_time()
        clips[name] += generate_by(pipelines[name], cases[start : start + BATCH], seed=start)
        seconds[name].append(time.process_time() - begin)
    return clips, seconds


def psnr(ours: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> str:
    """The mean PSNR of clips to the exact ones, in dB, with its 95% interval. Equal clips count as 60 dB."""
    values = []
    for one, other in zip(ours, exact, strict=True):
        error = np.square((one.astype(float) - other) / 255).mean()
        values.append(60.0 if error == 0 else min(60.0, -10 * np.log10(error)))
    margin = 1.96 * np.std(values) / len(values) ** 0.5
    return f"{np.mean(values):.1f} ({np.mean(values) - margin:.1f}-{np.mean(values) + margin:.1f})"


def table(pipelines: dict[str, Any], cases: Sequence[Any]) -> str:
    """The Markdown table of these settings, of which the first is the exact one."""
    clips, seconds = make_clips(pipelines, cases)
    exact_bytes = weight_bytes(pipelines[EXACT].transformer)
    rows = []
    for name, pipeline in pipelines.items():
        figures = evaluate(cases, clips[name], name)
        shares = []
        for measure in ("identity", "motion", "both_right"):
            low, high = figures["intervals"][measure]
            shares.append(f"{100 * figures[measure]:.0f} ({100 * low:.0f}-{100 * high:.0f})")
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[EXACT], strict=True)]
        similarity = "" if name == EXACT else psnr(clips[name], clips[EXACT])
        size = weight_bytes(pipeline.transformer) / exact_bytes
        rows.append([name, *shares, similarity, f"{statistics.median(ratios):.2f}", f"{size:.2f}"])
    header = ["setting", "identity, %", "motion, %", "both right, %", "PSNR to exact, dB", "seconds", "bytes"]
    return markdown_table(header, rows)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    chosen = {name: lever for name, lever in LEVERS.items() if _is_chosen(name, options.levers)}
    pipelines = {EXACT: pipeline_of({}, "float32")}
    for name, (lever, dtype) in chosen.items():
        pipelines[name] = pipeline_of(lever, dtype)
    cases = make_cases(options.samples, seed=0)
    lines = [table(pipelines, cases), f"{len(cases)} held-out clips. {machine_line()}"]
    text = "\n\n".join(lines)
    print(text)
    if options.page is not None:
        write_between_marks(options.page, "levers", text)


def _is_chosen(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(part in name for part in parts)


if __name__ == "__main__":
    main(tyro.cli(Options))
