"""
A run: a folder with the videos that one model has made of a benchmark's samples, and what was measured of them.

- `<sample id>.mp4`, flat, as the official tools want them;
- `run.json`, what made them ([`Run`]);
- `failed/<sample id>.json`, why a video is missing;
- `scores/`, the official files of raw scores ([`refalign_evaluation.scores`]).
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from refalign.files import new_file, read_json
from refalign_evaluation.benchmark import Split, check_sample_id


RUN = "run.json"
FAILED = "failed"
SCORES = "scores"
SCORING = "scoring.json"  # with what was measured, and what could not be
TOTAL = "total.json"  # the leaderboard's file


class Run(BaseModel):
    """What made the videos of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: Split
    """The benchmark's split."""
    model: str
    """What to call the model in tables."""
    samples: tuple[Annotated[str, AfterValidator(check_sample_id)], ...]
    """The ids of the samples that were asked for."""
    settings: dict[str, Any]
    """What the videos were made with; it must be one for all."""
    versions: dict[str, str]
    """Of the packages that made them."""


def read_run(folder: Path) -> Run:
    """
    What made the videos of a run.

    Raises:
        ValueError: if the folder is not a run.
    """
    file = folder / RUN
    if not file.is_file():
        raise ValueError(f"{folder} is not a run: it has no {RUN}. `refalign-eval generate` makes one.")
    try:
        return Run.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file} is not what `refalign-eval generate` writes: {place}: {first['msg']}.") from error


def write_run(folder: Path, run: Run) -> None:
    """Writes `run.json`, whole or not at all."""
    with new_file(folder / RUN, overwrite=True) as partial:
        partial.write_text(json.dumps(run.model_dump(mode="json"), indent=2) + "\n", "utf-8")


def video_of(folder: Path, sample_id: str) -> Path:
    """Where the video of a sample stands."""
    return folder / f"{sample_id}.mp4"
