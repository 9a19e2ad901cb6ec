"""
TotalScore of OpenS2V-Eval, version 1.1: how the seven scores become one, and the leaderboard's file.

Source: the weights of the official `merge_result.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from refalign.files import new_file, read_json
from refalign_evaluation.benchmark import Split
from refalign_evaluation.scores import METRICS
from refalign_training.data import fields
from refalign_training.data.fields import Unusable


_ALL_KINDS = {
    "aesthetics": 0.16,
    "motion_smoothness": 0.06,
    "motion_amplitude": 0.02,
    "face_similarity": 0.20,
    "gme": 0.12,
    "nexus": 0.20,
    "naturalness": 0.24,
}
_PEOPLE = {
    "aesthetics": 0.18,
    "motion_smoothness": 0.09,
    "motion_amplitude": 0.03,
    "face_similarity": 0.25,
    "gme": 0.15,
    "naturalness": 0.30,
}
WEIGHTS: dict[Split, dict[str, float]] = {"open": _ALL_KINDS, "human": _PEOPLE, "single": _ALL_KINDS}
"""The weight of each metric that counts, by split."""
_COUNTS: dict[Split, dict[str, int]] = {
    "open": {
        "singleobj": 30,
        "singlehuman": 30,
        "singleface": 30,
        "multiobject": 30,
        "humanobj": 15,
        "faceobj": 15,
        "multiface": 15,
        "multihuman": 15,
    },
    "human": {"singlehuman": 30, "singleface": 30},
    "single": {"singlehuman": 30, "singleface": 30, "singleobj": 30},
}
TOTAL_KEY = "total_score"
ROUNDING = 1e-3  # a total this far from that of its scores is another formula's


def official_ids(split: Split) -> tuple[str, ...]:
    """The ids of all samples of a split."""
    counts = _COUNTS[split].items()
    return tuple(f"{category}_{number + 1}" for category, count in counts for number in range(count))


def total_score(split: Split, scores: Mapping[str, float]) -> float:
    """
    TotalScore v1.1, from 0 to 1, of the scores of a split's metrics, from 0 to 1 each.

    Raises:
        ValueError: if one of them is missing.
    """
    weights = WEIGHTS[split]
    if missing := [METRICS[name].title for name in weights if name not in scores]:
        raise ValueError(f"There is no total of the split {split} without {', '.join(missing)}.")
    return sum(weight * scores[name] for name, weight in weights.items())


def upload_json(split: Split, scores: Mapping[str, float]) -> dict[str, float]:
    """What the leaderboard takes: the total and the scores of a split, as fractions, under its own keys."""
    keys = {METRICS[name].upload_key: scores[name] for name in WEIGHTS[split]}
    return {TOTAL_KEY: total_score(split, scores), **keys}


def write_upload(file: Path, content: Mapping[str, float]) -> None:
    """Writes the leaderboard's file, whole or not at all."""
    with new_file(file, overwrite=True) as partial:
        partial.write_text(json.dumps(content, indent=4, allow_nan=False) + "\n", "utf-8")


def read_upload(file: Path, split: Split) -> dict[str, float]:
    """
    The scores, by our names, of a leaderboard's file of a split.

    Raises:
        ValueError: if one is missing or is not a fraction, or the total is not that of TotalScore v1.1.
    """
    content = read_json(file)
    scores = {}
    try:
        for name in WEIGHTS[split]:
            key = METRICS[name].upload_key
            scores[name] = fields.required(content, key, fields.number)
            if abs(scores[name]) > 1:
                raise Unusable("score", f"{key} is {scores[name]:g}, not a fraction from 0 to 1")
        total = fields.required(content, TOTAL_KEY, fields.number)
    except Unusable as error:
        raise ValueError(
            f"{file} is not the leaderboard's file of the split {split}: {error.detail}. `refalign-eval total` "
            "writes one."
        ) from error
    right = total_score(split, scores)
    if abs(total - right) > ROUNDING:
        raise ValueError(
            f"{file}: {TOTAL_KEY} is {total:g}, but by TotalScore v1.1 its scores make {right:.4f}. It may be of "
            "version 1.0: write it anew by `refalign-eval total`."
        )
    return scores
