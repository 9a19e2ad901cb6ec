"""What `refalign generate` is asked for: its options, and the jobs that the lines of a batch describe.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from refalign.video_options import VideoOptions


if TYPE_CHECKING:
    from refalign.reference_images import CutOut


@dataclass(frozen=True)
class Generate(VideoOptions):
    """Make a video of the references' subjects acting out a prompt."""

    prompt: str | None = None
    """A description of what happens in the video."""
    reference: Annotated[tuple[str, ...], arg(aliases=["--references"])] = ()
    """The images of the subjects and of the place, as paths or URLs. Without any, the prompt alone makes the video."""
    output: Path | None = None
    """The mp4 file to write."""
    batch: Path | None = None
    """A JSONL file that describes many videos. Each line is an object with prompt, references, output and any of
    the settings from height to cut_out."""
    preview: bool = False
    """Write the references beside the video too, as the model sees them."""
    overwrite: bool = False
    """Replace videos that exist."""
    parallel: Literal["passes", "jobs"] | None = None
    """What processes that torchrun started share: the guidance passes of each video, or the jobs of a batch. The
    default is jobs for a batch of several, else passes."""


# What a line of a batch may set, each with its type
JOB_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "references": (str, list),
    "reference": (str, list),  # the same
    "output": str,
    "height": int,
    "width": int,
    "num_frames": int,
    "steps": int,
    "seed": int,
    "guidance_scale": (int, float),
    "image_guidance_scale": (int, float),
    "negative_prompt": str,
    "cut_out": (bool, str, list),
}
CUT_OUT: dict[str, "CutOut"] = {"auto": "auto", "true": True, "false": False}


@dataclass(frozen=True)
class Job:
    """One video to make: what to call it in messages, its file, and the command with a line of the batch put in."""

    name: str
    output: Path
    command: Generate

    @property
    def previews(self) -> list[Path]:
        """Where the references are written, if the command asks for it."""
        count = len(self.command.reference) if self.command.preview else 0
        return [self.output.with_name(f"{self.output.stem}.reference_{i + 1}.png") for i in range(count)]


def read_jobs(command: Generate) -> list[Job]:
    """What a command asks for: one job, or a line of its batch each; ValueError for the first that is wrong."""
    if command.batch is None:
        job = checked("generate", command)
        existing = [str(path) for path in (job.output, *job.previews) if path.exists()]
        if existing and not command.overwrite:
            raise ValueError(f"{', '.join(existing)} exists already. Name another output, or pass --overwrite.")
        return [job]
    if command.prompt is not None or command.output is not None or command.reference:
        raise ValueError("With --batch, prompt, reference and output stand in the file's lines. Leave them out here.")
    try:
        lines = command.batch.read_text("utf-8-sig").split("\n")  # not splitlines: JSON may hold other line breaks
    except UnicodeDecodeError as error:
        raise ValueError(f"{command.batch} is not UTF-8: {error}") from error
    jobs = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name = f"{command.batch.name}:{number}"
            jobs.append(checked(name, replace(command, **_read_line(name, line))))
    if not jobs:
        raise ValueError(f"{command.batch} has no lines.")
    outputs = Counter(str(job.output) for job in jobs)
    if twice := sorted(output for output, count in outputs.items() if count > 1):
        raise ValueError(f"{command.batch} writes the same output more than once: {', '.join(twice)}.")
    return jobs


def _read_line(name: str, line: str) -> dict[str, Any]:
    try:
        job = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(job, dict):
        raise ValueError(f'{name} must be an object such as {{"prompt": "...", "output": "a.mp4"}}.')
    if unknown := sorted(job.keys() - JOB_SETTINGS.keys()):
        raise ValueError(f"{name} has unknown settings {unknown}. Known are: {', '.join(JOB_SETTINGS)}.")
    for key, value in job.items():
        is_bool = isinstance(value, bool) and key != "cut_out"  # which Python takes for a number
        if is_bool or not isinstance(value, JOB_SETTINGS[key]):
            raise ValueError(f"{name}: {key} is {json.dumps(value)}, of a wrong type.")
    if "references" in job and "reference" in job:
        raise ValueError(f"{name} has both references and reference, which are the same. Leave one out.")
    if references := job.keys() & {"references", "reference"}:
        job["reference"] = _as_tuple(job.pop(references.pop()))
    if "cut_out" in job:
        job["cut_out"] = tuple(str(word).lower() for word in _as_tuple(job["cut_out"]))  # JSON's true is True
    if "output" in job:
        job["output"] = Path(job["output"])
    return job


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list) else (value,)


def checked(name: str, command: Generate) -> Job:
    if command.prompt is None:
        raise ValueError(f"{name}: the prompt is missing.")
    if command.output is None:
        raise ValueError(f"{name}: the output is missing.")
    job = Job(name, command.output, command)
    _check_output(job)
    if not all(isinstance(reference, str) for reference in command.reference):
        raise ValueError(f"{name}: references are paths or URLs, not {command.reference}.")
    if unknown := set(command.cut_out) - CUT_OUT.keys():
        raise ValueError(f"{name}: cut_out is {', '.join(sorted(unknown))}; known are auto, true and false.")
    if len(command.cut_out) not in (1, len(command.reference)):
        raise ValueError(
            f"{name}: cut_out has {len(command.cut_out)} words for {len(command.reference)} references. Give one "
            "for all, or one each."
        )
    if not -(2**63) <= command.seed < 2**64:
        raise ValueError(f"{name}: the seed is {command.seed}, more than 64 bits.")
    return job


def _check_output(job: Job) -> None:
    output = job.output
    if output.is_symlink():
        raise ValueError(f"{job.name}: the output {output} is a symbolic link: name {output.resolve()} instead.")
    if output.suffix != ".mp4":
        raise ValueError(f"{job.name}: the output is {output}, but must end in .mp4.")
    place = next(parent for parent in output.absolute().parents if parent.exists())
    if output.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{job.name}: {output} cannot be written. Name another output.")
