"""
`refalign-train check`: what is in a dataset, what is wrong with it, what the model will see of it; and a subset of it.

    refalign-train check --data folder --videos CLIPS --preview PREVIEW
    refalign-train check --data opens2v --annotations Jsons/mask_and_bbox/total_part1.json \
        --select "aesthetic>5.5,references>=2" --max-samples 1000 --write subset.jsonl

Without `--videos` only annotations are read. Nothing heavy is imported before it is needed, so that `--help` answers
at once.
"""

import dataclasses
import json
import operator
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TextIO

from tqdm import tqdm
from tyro.conf import OmitArgPrefixes

from refalign.files import check_free, new_file, new_folder
from refalign_training.data.fields import FAULTS, Unusable
from refalign_training.data.played import Summary
from refalign_training.data.preview import Preview
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Fault, Place, Sample
from refalign_training.data.sample_files import write_sample
from refalign_training.data.source import Source, read_source


LISTED = 20
PREVIEWED = 16
COSTS = {"sample": "lost samples", "reference": "lost references", "nothing": "remarks"}
VIDEO_PART = re.compile(r"total_part\d+")
_TERM = re.compile(r"\s*([^\s<>=!]+)\s*([<>=!]=|[<>=])\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*", re.IGNORECASE)
_OPERATORS = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}
Term = tuple[str, Callable[[float, float], bool], float]
"""The name of a score, how it is compared, and with what."""


@dataclass(frozen=True)
class Check:
    """Read a dataset, say what can be used and what is wrong with it, and show samples as the model will see them."""

    source: Annotated[Source, OmitArgPrefixes]
    """The dataset. Without --videos, opens2v and phantom are read, but no video is opened."""
    recipe: Annotated[Recipe, OmitArgPrefixes] = field(default_factory=Recipe)
    """How pixels are made of the dataset."""
    config: Path | None = None
    """A YAML file of `refalign-train run`, or the name of a recipe, for the dataset. The command line
    overrides it."""
    limit: int | None = None
    """Stop after this number of samples, usable or not."""
    preview: Path | None = None
    """A new folder for samples as the model will see them, with an index.html. It shows 16 samples, or as many as
    --limit says."""
    faults: Path | None = None
    """A new JSONL file for all faults. The first 20 of each kind are also printed."""
    select: str | None = None
    """Take only samples whose scores fulfil all of these conditions, such as "aesthetic>5.5,references>=2". The signs
    are >, >=, <, <=, = and !=. opens2v has the scores aesthetic, motion, tech, fps, duration, num_frames, height,
    width and references; a table has its columns of numbers."""
    write: Path | None = None
    """A new file for the usable samples, which --data samples reads."""
    max_samples: int | None = None
    """Stop after this number of usable samples. They are the first ones, so that a subset of opens2v needs few parts
    of the videos."""


@dataclass
class Report:
    """What was found so far. Memory does not grow with the dataset."""

    file: TextIO | None
    """Where all faults are written."""
    clips: Summary
    """How clips are played."""
    read: int = 0
    usable: int = 0
    passed_over: int = 0
    references: Counter = field(default_factory=Counter)
    """Usable samples by their number of references."""
    with_cross: int = 0
    """Usable samples of which a subject is shown by another clip."""
    faults: Counter = field(default_factory=Counter)
    """How many there are, by what they cost and by kind."""
    examples: dict[tuple[str, str], list[Fault]] = field(default_factory=lambda: defaultdict(list))
    """The first ones of these."""
    names: set[str] = field(default_factory=set)
    """The names of the samples' scores."""
    parts: Counter = field(default_factory=Counter)
    """OpenS2V-5M's parts, by the usable samples that need them."""

    def add_fault(self, fault: Fault) -> None:
        """Counts it, keeps the first ones of a kind, and writes it to the file of all."""
        if self.file:
            self.file.write(json.dumps(dataclasses.asdict(fault), ensure_ascii=False) + "\n")
        key = (fault.lost, fault.kind)
        self.faults[key] += 1
        if self.faults[key] <= LISTED:
            self.examples[key].append(fault)

    def add_usable(self, sample: Sample) -> None:
        """Counts it, and what it has."""
        self.usable += 1
        self.references[len(sample.references)] += 1
        cross = []
        for reference in sample.references:
            cross += reference.cross
        self.with_cross += bool(cross)
        parts = {view.path.parent.name for view in (sample.clip, *cross)}
        self.parts.update(filter(VIDEO_PART.fullmatch, parts))


def run(command: Check) -> int:
    """
    Reads the dataset and returns the exit code: 0 if something of it can be used. Raises ValueError if an option has a
    wrong value, or an output exists.
    """
    terms = parse_selection(command.select or "")
    opens_files = command.source.videos is not None or command.source.data not in ("opens2v", "phantom")
    _check_options(command, opens_files)
    source = command.source if opens_files else dataclasses.replace(command.source, videos=Path())
    # The folder that a subset's paths start from
    root = source.videos or Path(os.path.commonpath([path.parent for path in source.annotations] or [""]))
    with ExitStack() as stack:
        report = Report(_open_new(stack, command.faults), Summary(command.recipe))
        subset = _open_new(stack, command.write)
        preview = command.preview and Preview(stack.enter_context(new_folder(command.preview)), command.recipe)
        for item in tqdm(read_source(source), desc="Reading", unit=" records"):
            if isinstance(item, Fault):
                report.add_fault(item)
                continue
            report.read += 1
            report.names.update(item.scores)
            if not is_selected(item, terms):
                report.passed_over += 1
            elif not opens_files or _opens(item, command, report, preview):
                report.add_usable(item)
                if subset:
                    subset.write(write_sample(item, root) + "\n")
            if report.read == command.limit or report.usable == command.max_samples:
                break
        if preview is not None:
            preview.write_index(_lost(report))
    _print(report)
    if unknown := sorted({name for name, *_ in terms} - report.names):
        print(f"No sample has the score {', '.join(unknown)}. There are: {', '.join(sorted(report.names)) or 'none'}.")
    if command.write:
        _finish_subset(command.write, report, root)
    return 0 if report.usable else 1


def parse_selection(text: str) -> list[Term]:
    """
    Terms `name>number` (or >=, <, <=, =, !=) with commas between them, for [`is_selected`]. Raises ValueError naming
    the term that is not like this.
    """
    terms = []
    for term in filter(str.strip, text.split(",")):
        if (match := _TERM.fullmatch(term)) is None:
            raise ValueError(f'--select: {term.strip()!r} is not like "aesthetic>5.5". Put commas in between.')
        name, sign, number = match.groups()
        terms.append((name, _OPERATORS[sign], float(number)))
    return terms


def is_selected(sample: Sample, terms: list[Term]) -> bool:
    """Whether all terms hold for a sample's scores. It does not pass without one of them."""
    for name, compare, number in terms:
        if name not in sample.scores or not compare(sample.scores[name], number):
            return False
    return True


def _check_options(command: Check, opens_files: bool) -> None:
    for name in ("limit", "max_samples"):
        if (value := getattr(command, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; pass 1 or more.")
    if command.preview and not opens_files:
        raise ValueError("--preview shows videos. Pass their folder as --videos.")
    if command.write:
        check_free(_parts_file(command.write))


def _open_new(stack: ExitStack, path: Path | None) -> TextIO | None:
    """A text file that is there when the stack ends well."""
    if path is None:
        return None
    return stack.enter_context(stack.enter_context(new_file(path)).open("w", encoding="utf-8"))


def _opens(sample: Sample, command: Check, report: Report, preview: Preview | None) -> bool:
    """Whether the sample's video and a reference or more can be decoded; shows them where there is room."""
    from refalign_training.data.pixels import load_references, play

    place = Place(sample.source, sample.row, sample.id)
    try:
        frames, played = play(sample, command.recipe)
        references = load_references(
            sample, command.recipe, on_fault=lambda error: report.add_fault(place.fault(error, "reference"))
        )
    except Unusable as error:
        report.add_fault(place.fault(error))
        return False
    report.clips.add(sample.id, played)
    if preview is not None and len(preview) < (command.limit or PREVIEWED):
        preview.add(sample, frames, references, played)
    return True


# -- What is told -----------------------------------------------------------------------------------------------------


def _print(report: Report) -> None:
    print(f"usable samples: {report.usable}")
    for number, count in sorted(report.references.items()):
        print(f"  number of references {number}: {count}")
    if report.with_cross:
        print(f"  with a subject that another clip shows too: {report.with_cross}")
    for line in report.clips.lines():
        print(line)
    if report.passed_over:
        print(f"not selected: {report.passed_over}")
    for lost, cost in COSTS.items():
        for kind in sorted(FAULTS):
            if count := report.faults[lost, kind]:
                print(f"{cost}, {kind}: {count} ({FAULTS[kind]})")
                _print_examples(report.examples[lost, kind], count)


def _lost(report: Report) -> list[str]:
    """The first lost samples of each kind, for the page of the preview."""
    lines = []
    for (lost, kind), faults in report.examples.items():
        if lost == "sample":
            lines += [f"{fault.sample_id or '?'} ({kind}, row {fault.row}): {fault.detail}" for fault in faults]
            if more := report.faults[lost, kind] - len(faults):
                lines.append(f"and {more} more: {kind}")
    return lines


def _print_examples(faults: list[Fault], count: int) -> None:
    for fault in faults:
        print(f"    {fault.sample_id or '?'} ({fault.source}, row {fault.row}): {fault.detail}")
    if count > LISTED:
        print(f"    and {count - LISTED} more: --faults FILE lists all")


def _finish_subset(subset: Path, report: Report, root: Path) -> None:
    if not report.usable:
        subset.unlink()  # so that the next try finds its place free
        print(f"{subset} is not written.")
        return
    videos = "FOLDER (that of total_part1, ...)" if root == Path() and report.parts else root
    print(f"Wrote {subset}, to be read by --data samples --annotations {subset} --videos {videos}")
    if not report.parts:
        return
    parts = sorted(report.parts, key=lambda part: (len(part), part))
    patterns = [f"Videos/{part}/*" for part in parts]
    with new_file(_parts_file(subset)) as file:
        file.write_text("\n".join(patterns) + "\n", "utf-8")
    print(f"It needs {len(parts)} of OpenS2V-5M's 13 video parts ({_parts_file(subset)}), of nearly 1 TB each:")
    for part in parts:
        print(f"    {part}: {report.parts[part]} samples")
    include = '"' + '" "'.join(patterns) + '"'
    print(f"hf download BestWishYsh/OpenS2V-5M --repo-type dataset --include {include} --local-dir OpenS2V-5M")
    print("Join each part and unpack it beside the others: cat PART.tar.split.* | tar -x -C Videos")


def _parts_file(subset: Path) -> Path:
    return subset.with_suffix(".parts.txt")
