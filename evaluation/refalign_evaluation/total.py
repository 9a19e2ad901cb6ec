"""`refalign-eval total`: TotalScore v1.1 of a run, with what is missing of it, and the leaderboard's file."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from refalign_evaluation.benchmark import Split


if TYPE_CHECKING:
    from refalign_evaluation.results import Measured, Results


@dataclass(frozen=True)
class Total:
    """Make OpenS2V-Eval's TotalScore of a run's raw scores, and the file that its leaderboard takes."""

    path: Positional[Path]
    """A run's folder, or a folder or file of the official tools' raw scores."""
    more: Positional[tuple[Path, ...]] = ()
    """More folders or files of the official tools' raw scores, which are taken together with the first."""
    split: Split | None = None
    """The split that was measured. A run knows its own; else it is open."""
    output: Path | None = None
    """The JSON file to write, which is replaced if it exists. By default it is the run's total.json."""
    strict: bool = False
    """Refuse a total of which a sample, a video's score or one of the three files of NaturalScore is missing."""


def run(command: Total) -> int:
    """
    Prints the scores and writes the leaderboard's file.

    Raises:
        ValueError: if a metric has no score, or raw scores cannot be used.
    """
    from refalign_evaluation.results import read_results
    from refalign_evaluation.run_folder import TOTAL
    from refalign_evaluation.totals import upload_json, write_upload

    results = read_results((command.path, *command.more), command.split)
    print(describe(results))
    output = command.output
    if output is None and results.folder is not None:
        output = results.folder / TOTAL
    is_refused = command.strict and not results.is_whole
    if output is not None and output.exists() and (results.total is None or is_refused):
        print(f"{output} is of an earlier call.")
    check_total(results)
    if is_refused:
        raise ValueError("With --strict there is no total, for something is missing. It is told above.")
    if output is not None:
        write_upload(output, upload_json(results.split, results.scores))
        print(f"The leaderboard's file: {output}")
    return 0


def check_total(results: "Results") -> None:
    """Raises ValueError, which says how to get it, if a metric has no score."""
    from refalign_evaluation.results import OURS

    lines = []
    for name, measured in results.measured.items():
        if measured.score is not None:
            continue
        files = ", ".join(measured.metric.files)
        if measured.raw:
            lines.append(f"{measured.metric.title} (no video of {files} counts)")
        elif name in OURS:
            lines.append(f"{measured.metric.title} (`refalign-eval score` measures it, or the official tool: {files})")
        else:
            lines.append(f"{measured.metric.title} (the official tool measures it: {files})")
    if lines:
        where = results.folder / "scores" if results.folder is not None else "that folder"
        raise ValueError(f"There is no total without {'; '.join(lines)}. Files of the official tools go to {where}.")


def describe(results: "Results") -> str:
    """The scores in percent, the videos they are of, and what is missing, for a terminal."""
    model = results.run.model if results.run is not None else "raw scores"
    lines = [f"{model}: OpenS2V-Eval, split {results.split}, TotalScore v1.1, in percent"]
    for measured in results.measured.values():
        shown = "     -" if measured.score is None else f"{100 * measured.score:6.2f}"
        lines.append(f"  {measured.metric.title:16} {shown}  {measured.counted} of {measured.asked} videos")
    total = "     -" if results.total is None else f"{100 * results.total:6.2f}"
    lines.append(f"  {'Total':16} {total}")
    if results.left_out:
        lines.append(f"Not all of the split: {results.left_out} of its samples were not asked for.")
    for measured in results.measured.values():
        lines.extend(_what_is_missing(measured))
    return "\n".join(lines)


def _what_is_missing(measured: "Measured") -> list[str]:
    from refalign_evaluation.results import listed

    if not measured.files:
        return []
    title = measured.metric.title
    by_reason: dict[str, list[str]] = defaultdict(list)
    for sample_id, reason in measured.missing.items():
        by_reason[reason].append(sample_id)
    lines = [f"{title}: without {listed(ids)}: {reason}" for reason, ids in by_reason.items()]
    if measured.lacks_files:
        lines.append(f"{title}: {', '.join(measured.lacks_files)} missing, so it is the mean of fewer measurements.")
    return lines
