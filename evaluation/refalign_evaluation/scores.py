"""
The seven metrics of OpenS2V-Eval, version 1.1: where their raw scores stand, and how they become scores from 0 to 1.

Raw scores are kept in the files of the official tools, so that either can go on with the other's:
`{sample id: {key: raw score}}`, a file for each metric.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from refalign.files import new_file, read_json
from refalign_evaluation.benchmark import category, check_sample_id
from refalign_training.data import fields
from refalign_training.data.fields import Unusable


@dataclass(frozen=True)
class Metric:
    """A metric, and its way from raw scores of videos to one score."""

    title: str
    """What tables of results call it."""
    files: tuple[str, ...]
    """The official files of its raw scores. A video's raw score is the mean of those that it has."""
    key: str | None
    """Which value of a video's entry is the raw score. None where the entry is the raw score itself."""
    upload_key: str
    """What the leaderboard's file calls it."""
    low: float
    """The raw score that counts as 0."""
    high: float
    """The raw score that counts as 1, beyond which nothing is gained."""
    stops_at_low: bool = False
    """Whether raw scores below `low` count as `low`."""
    is_signed: bool = False
    """Whether the sign of a raw score is left out."""
    leaves_out_zero: bool = False
    """Whether videos with a raw score of 0 do not count."""
    categories: tuple[str, ...] = ()
    """The kinds of samples that are measured. Empty for all."""

    def applies(self, sample_id: str) -> bool:
        """Whether it is measured of this sample."""
        return not self.categories or category(sample_id) in self.categories

    def clip(self, raw: float) -> float | None:
        """What of a raw score enters the mean; None if the video does not count."""
        if self.leaves_out_zero and raw == 0:
            return None
        value = min(abs(raw) if self.is_signed else raw, self.high)
        return max(value, self.low) if self.stops_at_low else value

    def score(self, raw: Collection[float]) -> float | None:
        """The score from 0 to 1 of the raw scores of videos; None if none of them counts."""
        clipped = [value for value in map(self.clip, raw) if value is not None]
        if not clipped:
            return None
        return (fmean(clipped) - self.low) / (self.high - self.low)


FACES = ("singlehuman", "singleface", "humanobj", "faceobj")
METRICS = {
    "aesthetics": Metric("Aesthetics", ("aesthetic_score.json",), "aes_score", "aes_score", 4, 7, stops_at_low=True),
    "motion_smoothness": Metric(
        "MotionSmoothness", ("motion_smoothness.json",), "motion_smoothness", "motion_smoothness", 0, 1, is_signed=True
    ),
    "motion_amplitude": Metric(
        "MotionAmplitude", ("motion_amplitude.json",), "motion_fb", "motion_amplitude", 0, 1, is_signed=True
    ),
    "face_similarity": Metric("FaceSim", ("facesim.json",), "cur_score", "facesim_cur", 0, 1, categories=FACES),
    "gme": Metric("GmeScore", ("gmescore.json",), "gme_score", "gme_score", 0, 1),
    "nexus": Metric("NexusScore", ("nexusscore.json",), "nexus_score", "nexus_score", 0, 0.05, leaves_out_zero=True),
    "naturalness": Metric(
        "NaturalScore",
        ("naturalscore_1.json", "naturalscore_2.json", "naturalscore_3.json"),
        None,
        "natural_score",
        1,
        5,
        stops_at_low=True,
    ),
}
FAILED = "error"  # what the official tool writes where a model gave no answer


@dataclass
class Raw:
    """The raw scores of a metric."""

    scores: dict[str, float] = field(default_factory=dict)
    """By sample id."""
    unscored: dict[str, str] = field(default_factory=dict)
    """Why a sample that a file names has none."""


def read_raw(folder: Path) -> dict[str, Raw]:
    """
    The raw scores of a folder of official files, by metric: of those metrics that have a file there.

    Raises:
        ValueError: if a file is cut, or a value in it is not a finite number.
    """
    raw = {}
    for name, metric in METRICS.items():
        files = [folder / file for file in metric.files]
        there = list(filter(Path.exists, files))
        if there:
            raw[name] = read_files(metric, there)
    return raw


def read_files(metric: Metric, files: Collection[Path]) -> Raw:
    """
    The raw scores of official files of a metric.

    Raises:
        ValueError: as [`read_raw`].
    """
    values: dict[str, list[float]] = defaultdict(list)
    names: set[str] = set()
    for file in files:
        fields.check_given(file, "The file of raw scores")
        for sample_id, entry in read_json(file).items():
            names.add(sample_id)
            value = _value(metric, file, sample_id, entry)
            if value is not None:
                values[sample_id].append(value)
    raw = Raw({sample_id: fmean(found) for sample_id, found in values.items()})
    for sample_id in sorted(names - values.keys()):
        raw.unscored[sample_id] = f"the official tool failed ({FAILED!r} in {', '.join(file.name for file in files)})"
    return raw


def _value(metric: Metric, file: Path, sample_id: str, entry: Any) -> float | None:
    try:
        check_sample_id(sample_id)
        if metric.key is not None:
            return fields.required(entry, metric.key, fields.number)
        return None if entry == FAILED else fields.number(_parsed(entry), "the score")
    except Unusable as error:
        raise ValueError(
            f"{file}: the entry of {fields.shorten(sample_id)} cannot be used: {error.detail}. Remove the entry, or "
            "measure it again."
        ) from error


def _parsed(entry: Any) -> Any:
    """The number that a text gives, or the entry as it is."""
    try:
        return float(entry) if isinstance(entry, str) else entry
    except ValueError:
        return entry


def write_raw(folder: Path, name: str, entries: Mapping[str, Mapping[str, float]]) -> None:
    """Writes a metric's official file, whole or not at all: `entries` are `{sample id: {key: value}}`."""
    (file,) = METRICS[name].files
    with new_file(folder / file, overwrite=True) as partial:
        partial.write_text(json.dumps(entries, indent=4, allow_nan=False) + "\n", "utf-8")
