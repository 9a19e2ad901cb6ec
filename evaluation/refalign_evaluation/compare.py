"""`refalign-eval compare`: runs side by side, beside the published results: a table, a picture and a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from refalign_evaluation.benchmark import Split


if TYPE_CHECKING:
    from refalign_evaluation.entries import Entry


@dataclass(frozen=True)
class Compare:
    """Compare runs of OpenS2V-Eval: their scores, how sure the differences are, and their videos side by side."""

    first: Positional[Path]
    """The run that others are compared with: its folder, or a JSON file as the leaderboard takes it."""
    output: Path
    """The new folder to write index.html, scores.png and copies of the videos to."""
    others: Positional[tuple[Path, ...]] = ()
    """More runs, as the first."""
    published: bool = False
    """Show the published results of other models too. They are of the open split."""
    split: Split | None = None
    """The split, if only the leaderboard's files are compared. Runs know their own; else it is open."""
    videos: bool = True
    """Copy the videos beside the page, to be seen side by side."""
    resamples: int = 10_000
    """How often samples are drawn anew for the intervals of differences."""
    seed: int = 0
    """The seed of these draws."""


def run(command: Compare) -> int:
    """
    Prints the table and writes the folder.

    Raises:
        ValueError: if a run cannot be read or is of another split, or the folder exists.
    """
    from refalign.files import check_free, new_folder
    from refalign_evaluation.entries import published_entries, read_entries
    from refalign_evaluation.report import write_report

    if command.resamples < 100:
        raise ValueError(f"--resamples is {command.resamples}: pass 100 or more, such as 10000.")
    if command.seed < 0:
        raise ValueError(f"--seed is {command.seed}: pass 0 or more.")
    check_free(command.output)
    split, entries = read_entries((command.first, *command.others), command.split, command.resamples, command.seed)
    if command.published:
        entries += published_entries(split)
    print(describe(split, entries))
    with new_folder(command.output) as folder:
        for line in write_report(folder, split, entries, command.videos):
            print(line)
    print(f"The page: {command.output / 'index.html'}")
    return 0


# -- For a terminal ---------------------------------------------------------------------------------------------------


def describe(split: Split, entries: "Sequence[Entry]") -> str:
    """The scores in percent, the differences from the first run, and what is marked, for a terminal."""
    from refalign_evaluation.entries import percent, title_of
    from refalign_evaluation.totals import WEIGHTS

    width = max(len(entry.title) for entry in entries)
    titles = list(map(title_of, ("total", *WEIGHTS[split])))
    lines = [f"OpenS2V-Eval, split {split}, TotalScore v1.1, in percent", f"{'':{width}}  {'  '.join(titles)}"]
    for entry in entries:
        values = [entry.total, *map(entry.scores.get, WEIGHTS[split])]
        cells = [f"{percent(value):>{len(title)}}" for value, title in zip(values, titles, strict=True)]
        lines.append(f"{entry.title:{width}}  {'  '.join(cells)}")
    for entry in entries:
        if entry.differences:
            lines.append(f"{entry.name} less {entries[0].name}, with 95% intervals over the samples that both have:")
            lines.extend(_described(entry))
    lines.extend(f"* {entry.name}: {'; '.join(entry.notes)}." for entry in entries if entry.notes)
    return "\n".join(lines)


def _described(entry: "Entry") -> list[str]:
    from refalign_evaluation.entries import shown, title_of

    lines = []
    for name, difference in entry.differences.items():
        lines.append(f"  {title_of(name):16} {shown(difference)}, {difference.samples} samples")
    return lines
