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
from refalign.owner import owned
from refalign_evaluation.benchmark import Split, check_sample_id


RUN = "run.json"
FAILED = "failed"
SCORES = "scores"
WEIGHTS = "weights"  # the setting that is known when they are loaded
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
    """The versions of the packages that made them."""
    images: dict[str, str] = {}
    """By sample, a digest of the images that its video is made of; older runs have none."""


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


def check_same(folder: Path, run: Run) -> Run:
    """
    The run that a folder holds once `run` is added to it.

    Raises:
        ValueError: if the folder holds videos of other settings or images, or of nobody knows which.
    """
    if not (folder / RUN).exists():
        if any(folder.glob("*.mp4")):
            raise ValueError(f"{folder} has videos but no {RUN} that says what made them. Name another --output.")
        return run
    there = read_run(folder)
    before = {"split": there.split, "model": there.model, **there.settings}
    now = {"split": run.split, "model": run.model, **run.settings}
    others = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    others += sorted((before.keys() ^ now.keys()) - {WEIGHTS})
    if others:
        told = ", ".join(f"{name} {before.get(name)!r:.60} there and {now.get(name)!r:.60} here" for name in others)
        raise ValueError(f"{folder} holds videos of other settings ({told}). Name another --output, or say the same.")
    for sample_id in there.images.keys() & run.images.keys():
        if there.images[sample_id] != run.images[sample_id] and video_of(folder, sample_id).exists():
            raise ValueError(
                f"{folder} has a video of the sample {sample_id}, whose images in the benchmark have changed since. "
                "Get the old ones back, or remove that video to have it made anew."
            )
    samples = tuple(dict.fromkeys((*there.samples, *run.samples)))
    return there.model_copy(update={"samples": samples, "images": {**there.images, **run.images}})


def begin(folder: Path, run: Run) -> None:
    """
    Writes what makes the videos from now on, with the samples that were asked for before.

    Raises:
        ValueError: as [`check_same`].
    """
    folder.mkdir(parents=True, exist_ok=True)
    with owned(folder / RUN):
        write_run(folder, check_same(folder, run))


def tell_failure(folder: Path, sample_id: str, error: str | None) -> None:
    """Keeps why a sample has no video; without an error, forgets it."""
    file = folder / FAILED / f"{sample_id}.json"
    if error is None:
        file.unlink(missing_ok=True)
        return
    with new_file(file, overwrite=True) as partial:
        partial.write_text(json.dumps({"error": error}) + "\n", "utf-8")


def read_failures(folder: Path) -> dict[str, str]:
    """Why samples have no video, by their ids."""
    files = sorted((folder / FAILED).glob("*.json"))
    return {file.stem: str(read_json(file).get("error")) for file in files}


def video_of(folder: Path, sample_id: str) -> Path:
    """Where the video of a sample stands."""
    return folder / f"{sample_id}.mp4"
