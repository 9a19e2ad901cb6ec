"""The rows of a comparison: runs, the leaderboard's files and published results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refalign_evaluation.benchmark import Split
from refalign_evaluation.bootstrap import Difference, differences
from refalign_evaluation.published import SPLIT, published
from refalign_evaluation.results import Results, read_results
from refalign_evaluation.scores import METRICS
from refalign_evaluation.totals import read_upload, total_score


@dataclass(frozen=True)
class Entry:
    """A row of the comparison."""

    name: str
    scores: dict[str, float]
    """From 0 to 1, by our names of metrics."""
    total: float | None
    source: str
    """Where the figures are from."""
    notes: tuple[str, ...] = ()
    """What must be known to read them. With any, they are marked."""
    results: Results | None = None
    """The raw scores, of a run."""
    is_published: bool = False
    differences: dict[str, Difference] = field(default_factory=dict)
    """From the first row, by metric and as `total`."""

    @property
    def title(self) -> str:
        """The name, marked if there is something to know."""
        return self.name + (" *" if self.notes else "")


def read_entries(
    paths: Sequence[Path], split: Split | None = None, resamples: int = 10_000, seed: int = 0
) -> tuple[Split, list[Entry]]:
    """
    The split, and a row for each run.

    Args:
        paths (`Sequence[Path]`): folders of runs, or JSON files as the leaderboard takes them.
        split (`str`, *optional*): the split, where there are only such files. By default it is open.
        resamples (`int`, defaults to 10,000): the number of draws for the intervals of differences.
        seed (`int`, defaults to 0): the seed of the draws.

    Raises:
        ValueError: if a run cannot be read, is named twice or is of another split.
    """
    folders = [path for path in paths if not path.is_file()]
    results = {path: read_results([path]) for path in folders}
    split = _one_split(split, results)
    first = results.get(paths[0])
    entries = []
    for path, name in zip(paths, _names(paths, results), strict=True):
        if path not in results:
            entries.append(_of_upload(path, name, split))
            continue
        found = {}
        if first is not None and path != paths[0]:
            found = differences(first, results[path], resamples, seed)
        entries.append(_of_run(path, name, results[path], found))
    return split, entries


def _one_split(found: Split | None, results: dict[Path, Results]) -> Split:
    """The split of all runs."""
    for path, result in results.items():
        if found not in (None, result.split):
            raise ValueError(f"{path} is a run of the split {result.split}, not {found}: compare runs of one split.")
        found = result.split
    return found or "open"


def _names(paths: Sequence[Path], results: dict[Path, Results]) -> list[str]:
    """What to call each run: its model; with its folder or a number where that is not enough."""
    if len(set(paths)) < len(paths):
        raise ValueError("A run is named twice. Name each once.")
    names = []
    for path in paths:
        run = results[path].run if path in results else None
        names.append(path.stem if run is None else run.model)
    if len(set(names)) < len(names):
        names = [f"{name} ({path.name})" for name, path in zip(names, paths, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    return names


def _of_upload(path: Path, name: str, split: Split) -> Entry:
    scores = read_upload(path, split)
    return Entry(name, scores, total_score(split, scores), f"given: {path.name}, without raw scores")


def _of_run(path: Path, name: str, results: Results, found: dict[str, Difference]) -> Entry:
    if results.run is None:
        raise ValueError(f"{path} is not a run: it has no run.json. Name a run, or `refalign-eval total`'s JSON file.")
    notes = []
    if results.left_out:
        notes.append(f"{results.left_out} of the split's samples were not asked for")
    for measured in results.measured.values():
        title = measured.metric.title
        if measured.score is None:
            notes.append(f"no {title}, so no total")
        elif not measured.is_whole:
            notes.append(f"{title} of {measured.counted} of {measured.asked} videos")
    return Entry(name, results.scores, results.total, f"measured: {path.name}", tuple(notes), results, False, found)


def published_entries(split: Split) -> list[Entry]:
    """
    A row for each published result.

    Raises:
        ValueError: if the split is not theirs.
    """
    if split != SPLIT:
        raise ValueError(f"Published results are of the split {SPLIT}, and this is {split}: leave --published out.")
    entries = []
    for row in published():
        scores = {name: value / 100 for name, value in row.metrics.items()}
        words = [f"published: {row.source}", row.date, "closed" if row.closed else ""]
        notes = (row.note.rstrip("."),) if row.note else ()
        source = ", ".join(filter(None, words))
        entries.append(Entry(row.model, scores, row.total / 100, source, notes, is_published=True))
    return entries


def title_of(name: str) -> str:
    """What tables call a metric or the total."""
    return METRICS[name].title if name in METRICS else "Total"


def percent(value: float | None) -> str:
    """A score in percent, a dash for none."""
    return "-" if value is None else f"{100 * value:.2f}"


def shown(difference: Difference) -> str:
    """A difference with its interval, in percent."""
    return f"{100 * difference.value:+.2f} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
