"""
What was measured of a run: raw scores in the official files, and beside them with what, of which videos, and why not.

Each change is written whole, so that a call that was killed is gone on with.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refalign.files import new_file, read_json
from refalign_evaluation.run_folder import SCORES, SCORING
from refalign_evaluation.scores import METRICS, read_files, write_raw
from refalign_training.data import fields
from refalign_training.data.fields import Unusable


@dataclass
class MetricScores:
    """What was measured of a run by one metric."""

    run: Path
    name: str
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The official file's entries, by sample id."""
    settings: dict[str, Any] | None = None
    """What they were measured with. None for scores of the official tool."""
    videos: dict[str, str] = field(default_factory=dict)
    """A digest of each sample's video, as it was measured."""
    unscored: dict[str, str] = field(default_factory=dict)
    """Why a sample has no score."""

    @property
    def file(self) -> Path:
        """The official file."""
        return self.run / SCORES / METRICS[self.name].files[0]

    def is_done(self, sample_id: str, video: str) -> bool:
        """Whether a sample has its score, of this video."""
        return sample_id in self.entries and (self.settings is None or self.videos.get(sample_id) == video)

    def raw(self) -> dict[str, float]:
        """The raw scores by sample id."""
        key = str(METRICS[self.name].key)
        return {sample_id: entry[key] for sample_id, entry in self.entries.items()}

    def use(self, settings: dict[str, Any]) -> None:
        """
        Takes settings for what is measured from now on.

        Raises:
            ValueError: if there are scores of others.
        """
        if self.entries and self.settings != settings:
            what = "the official tool, or by hand"
            if self.settings is not None:
                names = sorted(self.settings.keys() | settings.keys())
                changed = [name for name in names if self.settings.get(name) != settings.get(name)]
                what = f"other settings ({', '.join(map(self._told, changed))})"
            raise ValueError(
                f"{self.file} has scores that were measured with {what}, and scores are comparable only with the "
                f"same. Pass the same, leave {self.name} out of --metrics, or move the file away to measure all anew."
            )
        self.settings = settings

    def _told(self, name: str) -> str:
        return f"{name} {(self.settings or {}).get(name)!r:.60} there"

    def keep(self, sample_id: str, score: float, video: str) -> None:
        """Notes a sample's score, once it is written."""
        self.entries[sample_id] = {str(METRICS[self.name].key): score}
        self.videos.pop(sample_id, None)  # should the process end between the two files, it is measured again
        self.unscored.pop(sample_id, None)
        self._write_notes()
        write_raw(self.run / SCORES, self.name, self.entries)
        self.videos[sample_id] = video
        self._write_notes()

    def tell_failure(self, sample_id: str, reason: str) -> None:
        """Notes why a sample has no score. One that it had, of a video that was replaced, is forgotten."""
        self.unscored[sample_id] = reason
        if self.entries.pop(sample_id, None) is not None:
            write_raw(self.run / SCORES, self.name, self.entries)
        self.videos.pop(sample_id, None)
        self._write_notes()

    def _write_notes(self) -> None:
        notes = read_notes(self.run)
        parts = {"settings": self.settings, "videos": self.videos, "unscored": self.unscored}
        for part, value in parts.items():
            if value is not None:
                notes[part][self.name] = value
        with new_file(self.run / SCORING, overwrite=True) as partial:
            partial.write_text(json.dumps(notes, indent=2) + "\n", "utf-8")


def read_notes(run: Path) -> dict[str, dict[str, Any]]:
    """
    `scoring.json`: by part (settings, videos, unscored) and metric.

    Raises:
        ValueError: if it is cut, or not what this module writes.
    """
    file = run / SCORING
    notes: dict[str, Any] = read_json(file) if file.exists() else {}
    for part in ("settings", "videos", "unscored"):
        value = notes.setdefault(part, {})
        if not isinstance(value, dict) or not all(isinstance(of_metric, dict) for of_metric in value.values()):
            raise ValueError(f"{file}: its part {part!r} is not what `refalign-eval score` writes. Remove the file.")
    return notes


def read_metric(run: Path, name: str) -> MetricScores:
    """
    What is there of a metric.

    Raises:
        ValueError: if its file or `scoring.json` cannot be used.
    """
    notes = read_notes(run)
    scores = MetricScores(run, name)
    if scores.file.exists():
        read_files(METRICS[name], [scores.file])
        scores.entries = read_json(scores.file)
    scores.settings = notes["settings"].get(name)
    try:
        for part, own in (("videos", scores.videos), ("unscored", scores.unscored)):
            for sample_id, value in notes[part].get(name, {}).items():
                own[sample_id] = fields.text(value, sample_id)
    except Unusable as error:
        raise ValueError(f"{run / SCORING} cannot be used: {error.detail}. Remove the file.") from error
    return scores
