"""A run of six samples with hand-made raw scores of all metrics, and no videos."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign_evaluation.run_folder import SCORES, Run, write_run
from refalign_evaluation.scores import METRICS
from tests.evaluation.small_benchmark import SAMPLES


IDS = tuple(SAMPLES)
PERFECT = {
    "aesthetics": 7.0,
    "motion_smoothness": 1.0,
    "motion_amplitude": 1.0,
    "face_similarity": 1.0,
    "gme": 1.0,
    "nexus": 0.05,
    "naturalness": 5.0,
}


def write_results(folder: Path, model: str = "small", raw: Mapping[str, Mapping[str, float]] | None = None) -> Path:
    """Writes a run and its official files, of perfect raw scores but for those that are given by metric and id."""
    run = Run(split="open", model=model, samples=IDS, settings={"seed": 0}, versions={"refalign": "1"})
    folder.mkdir(parents=True)
    write_run(folder, run)
    for name, perfect in PERFECT.items():
        scores = dict.fromkeys(filter(METRICS[name].applies, IDS), perfect)
        write_official(folder / SCORES, name, {**scores, **(raw or {}).get(name, {})})
    return folder


def write_official(folder: Path, name: str, scores: Mapping[str, float]) -> None:
    """Writes the official files of a metric."""
    key = METRICS[name].key
    entries: dict[str, Any] = {sample_id: {key: score} for sample_id, score in scores.items()}
    if key is None:
        entries = {sample_id: str(score) for sample_id, score in scores.items()}
    folder.mkdir(exist_ok=True)
    for file in METRICS[name].files:
        (folder / file).write_text(json.dumps(entries), "utf-8")
