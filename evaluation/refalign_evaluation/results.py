"""The results of a run: its raw scores, checked against its samples, and for each metric what of them counts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from refalign.files import read_json
from refalign_evaluation.benchmark import Split
from refalign_evaluation.run_folder import RUN, SCORES, SCORING, Run, read_failures, read_run
from refalign_evaluation.scores import METRICS, Metric, Raw, read_files
from refalign_evaluation.totals import WEIGHTS, official_ids, total_score
from refalign_training.data.fields import check_given


OFFICIAL_FILES = {file: name for name, metric in METRICS.items() for file in metric.files}
OURS = ("aesthetics", "motion_amplitude", "face_similarity", "gme")  # what `refalign-eval score` measures
ZERO = "a score of 0 does not count, as in the official tools"
SHOWN = 8  # of ids in a line


@dataclass(frozen=True)
class Measured:
    """What was measured by one metric."""

    metric: Metric
    files: tuple[Path, ...]
    """The official files that were read, none if there are none."""
    raw: dict[str, float]
    """The raw scores by sample id."""
    missing: dict[str, str]
    """Why samples that should count do not, by their ids."""
    asked: int
    """The number of samples that should count."""

    @property
    def counted(self) -> int:
        """The number of videos that the score is the mean of."""
        return self.asked - len(self.missing)

    @property
    def score(self) -> float | None:
        """The score from 0 to 1; None if no video counts."""
        return self.metric.score(list(self.raw.values()))

    @property
    def lacks_files(self) -> tuple[str, ...]:
        """Official files that are not there, of a metric that is measured several times."""
        there = [file.name for file in self.files]
        return tuple(name for name in self.metric.files if name not in there)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing but videos that do not count."""
        return not self.lacks_files and set(self.missing.values()) <= {ZERO}

    @property
    def date(self) -> str:
        """The day, in UTC, on which the newest of its files was written."""
        newest = max(file.stat().st_mtime for file in self.files)
        return datetime.fromtimestamp(newest, UTC).date().isoformat()


@dataclass(frozen=True)
class Results:
    """What was measured of the videos of a run, or of those that official files name."""

    split: Split
    samples: tuple[str, ...]
    """The ids that should have been measured."""
    measured: dict[str, Measured]
    """By our names of metrics: all those of the split."""
    run: Run | None = None
    folder: Path | None = None
    """The run's."""
    settings: dict[str, Any] | None = None
    """What `refalign-eval score` measured with, by our names of metrics."""

    @property
    def scores(self) -> dict[str, float]:
        """The scores from 0 to 1 of those metrics that have one."""
        found = {name: measured.score for name, measured in self.measured.items()}
        return {name: score for name, score in found.items() if score is not None}

    @property
    def total(self) -> float | None:
        """TotalScore v1.1 from 0 to 1; None if a metric has no score."""
        scores = self.scores
        return total_score(self.split, scores) if scores.keys() == self.measured.keys() else None

    @property
    def left_out(self) -> int:
        """The number of the split's samples that were not asked for."""
        return len(set(official_ids(self.split)) - set(self.samples))

    @property
    def is_whole(self) -> bool:
        """Whether all of the split is measured."""
        return not self.left_out and all(measured.is_whole for measured in self.measured.values())


def read_results(paths: Sequence[Path], split: Split | None = None) -> Results:
    """
    The results in a run folder, in folders of official files, or in official files: all of them together.

    Args:
        paths (`Sequence[Path]`): of which one at most is a run.
        split (`str`, *optional*): the split; a run knows its own.

    Raises:
        ValueError: if there are no raw scores, some are of samples that are not of the run, or cannot be used.
    """
    runs = [path for path in paths if (path / RUN).is_file()]
    if len(runs) > 1:
        raise ValueError(f"{runs[0]} and {runs[1]} are runs: name one. `refalign-eval compare` takes several.")
    run = read_run(runs[0]) if runs else None
    if run is not None and split not in (None, run.split):
        raise ValueError(f"{runs[0]} is a run of the split {run.split}, not {split}: leave --split out.")
    split = run.split if run is not None else split or "open"
    samples = run.samples if run is not None else official_ids(split)
    folder = runs[0] if runs else None
    scoring = _read_scoring(folder)
    reasons = _reasons(folder, scoring)
    files = _find_files(paths)
    measured = {}
    for name in WEIGHTS[split]:
        there = [files[file] for file in METRICS[name].files if file in files]
        raw = read_files(METRICS[name], there)
        _check_samples(METRICS[name], there, raw, samples)
        measured[name] = _measured(METRICS[name], there, raw, samples, reasons.get(name, {}))
    return Results(split, samples, measured, run, folder, scoring.get("settings", {}))


def _find_files(paths: Iterable[Path]) -> dict[str, Path]:
    """The official files by their names."""
    found: dict[str, Path] = {}
    for path in paths:
        for file in _files_of(path):
            if file.name in found:
                raise ValueError(f"{found[file.name]} and {file} are the same official file twice: name one of them.")
            found[file.name] = file
    return found


def _files_of(path: Path) -> list[Path]:
    if (path / RUN).is_file():
        path = path / SCORES
        return [path / name for name in OFFICIAL_FILES if (path / name).exists()]
    if path.is_dir():
        files = [path / name for name in OFFICIAL_FILES if (path / name).exists()]
        if not files:
            raise ValueError(
                f"{path} has no raw scores: neither {RUN} nor one of {', '.join(OFFICIAL_FILES)}. Name the folder of "
                "a run, or that of the official tools' result files."
            )
        return files
    check_given(path, "The file of raw scores")
    if path.name not in OFFICIAL_FILES:
        raise ValueError(f"{path} is not named as the official tools name their files: {', '.join(OFFICIAL_FILES)}.")
    return [path]


def _check_samples(metric: Metric, files: Sequence[Path], raw: Raw, samples: Iterable[str]) -> None:
    """Raises ValueError if there are raw scores of samples that are not measured."""
    named = raw.scores.keys() | raw.unscored.keys()
    where = ", ".join(map(str, files))
    if others := sorted(named - set(samples)):
        raise ValueError(
            f"{where}: {len(others)} samples are not of this run or split: {listed(others)}. Are they of another "
            "run's videos? Name the right file, or the right --split."
        )
    if others := sorted(sample_id for sample_id in named if not metric.applies(sample_id)):
        raise ValueError(
            f"{where}: {metric.title} is not measured of samples such as {listed(others)}. Remove their entries."
        )


def _measured(
    metric: Metric, files: Sequence[Path], raw: Raw, samples: Sequence[str], reasons: Mapping[str, str]
) -> Measured:
    asked = list(filter(metric.applies, samples))
    missing = {}
    for sample_id in asked:
        if sample_id in raw.scores:
            if metric.clip(raw.scores[sample_id]) is None:
                missing[sample_id] = ZERO
            continue
        silent = "it is not in the file" if files else "there is no file"
        missing[sample_id] = reasons.get(sample_id) or raw.unscored.get(sample_id) or silent
    return Measured(metric, tuple(files), raw.scores, missing, len(asked))


def _read_scoring(folder: Path | None) -> dict[str, Any]:
    """What `refalign-eval score` says of its work."""
    file = None if folder is None else folder / SCORING
    if file is None or not file.is_file():
        return {}
    content = read_json(file)
    for key in ("settings", "unscored"):
        values = content.get(key, {})
        if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
            raise ValueError(f"{file} is not what `refalign-eval score` writes: look at {key!r}. Score the run again.")
    return content


def _reasons(folder: Path | None, scoring: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Why samples of a run have no raw scores, by metric and id."""
    failures = {}
    if folder is not None:
        failures = {sample_id: f"no video ({error})" for sample_id, error in read_failures(folder).items()}
    reasons = {}
    for name in METRICS:
        unscored = scoring.get("unscored", {}).get(name, {})
        reasons[name] = {**failures, **{sample_id: str(reason) for sample_id, reason in unscored.items()}}
    return reasons


def listed(ids: Sequence[str]) -> str:
    """The first ids, for a line."""
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(ids[:SHOWN]) + more
