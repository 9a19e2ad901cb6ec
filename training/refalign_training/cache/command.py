"""The options of `refalign-train cache`. Nothing heavy is imported, so that `--help` answers at once."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from pydantic import TypeAdapter, ValidationError
from tyro.conf import OmitArgPrefixes

from refalign.files import new_file, read_json
from refalign_training.bounds import InvalidOption
from refalign_training.data.recipe import Recipe
from refalign_training.data.source import Dataset, check_source


Family = Literal["video", "references", "text", "teacher", "pictures"]
Dtype = Literal["float32", "bfloat16", "float16"]
FAMILIES: tuple[Family, ...] = get_args(Family)
OF_VIDEOS: tuple[Family, ...] = ("video", "references", "text", "teacher")


@dataclass(frozen=True)
class CacheCommand:
    """Compute latents, text embeddings and teacher features once. A command that was killed goes on when repeated."""

    output: Path
    """The cache's folder: a new one, or one to go on with, whose options are then the defaults of all others."""
    source: Annotated[Dataset, OmitArgPrefixes] = field(default_factory=Dataset)
    """The dataset."""
    recipe: Annotated[Recipe, OmitArgPrefixes] = field(default_factory=Recipe)
    """How pixels are made of the dataset."""
    config: Path | None = None
    """A YAML file of `refalign-train run`, or the name of a recipe, for the dataset, the models and the output. The
    command line overrides it."""
    model: str | None = None
    """The Wan 2.1 or RefAlign pipeline, a folder or Hub id, whose VAE and text encoder are used."""
    revision: str | None = None
    """The model's revision on the Hub."""
    teacher: str | None = None
    """The vision model whose features references are aligned to: a folder or Hub id."""
    teacher_revision: str | None = None
    """The teacher's revision on the Hub."""
    families: tuple[Family, ...] = OF_VIDEOS
    """What to compute. pictures are what a refinement is trained on; the others are for videos."""
    variants: int = 1
    """How often the references of each sample are drawn and augmented."""
    dtype: Dtype = "bfloat16"
    """What the text encoder and the teacher compute in, and what everything is stored in."""
    vae_dtype: Dtype = "float32"
    """What the VAE computes in."""
    device: str = "auto"
    """cuda, mps or cpu. auto takes the first that there is; each process of accelerate takes its own GPU."""
    workers: int = 2
    """How many processes decode videos and images while the encoder runs. With 0, the encoder waits for decoding."""
    ray: str | None = None
    """Let a Ray cluster of many machines do it: `auto` for the one that runs here (or a new one on this machine), or a
    cluster's address. Needs the extra `ray`."""
    limit: int | None = None
    """How many of the dataset's first samples to take; by default all."""
    allow_changes: bool = False
    """Go on with other sizes, models or dtypes than the folder was made with. What they concern is computed anew,
    beside what is there."""
    retry_failed: bool = False
    """Try again the samples of failed.jsonl, which otherwise wait until their files or captions change."""
    status: bool = False
    """Only say how far the cache is."""
    verify: bool = False
    """Only read every item. Broken ones are removed, the exit code is 1, and the next run computes them."""
    prune: bool = False
    """Only remove what the last command does not need: other recipes, samples that are gone, and what killed processes
    of other machines have left unfinished (that of this machine's goes with the next command)."""


OPTIONS = "options.json"
_OF_THE_CALL = {
    "config",
    "output",
    "device",
    "workers",
    "ray",
    "allow_changes",
    "retry_failed",
    "status",
    "verify",
    "prune",
}


def write_options(command: CacheCommand, path: Path) -> None:
    """Keeps what a later command on the same folder takes as its defaults."""
    options = TypeAdapter(CacheCommand).dump_python(command, mode="json", exclude=_OF_THE_CALL)
    with new_file(path, overwrite=True) as file:
        file.write_text(json.dumps(options, indent=2), "utf-8")


def read_command(_: type, args: Sequence[str], **told: Any) -> CacheCommand:
    """The options that a command line gives; those that it leaves out are the folder's own, if it is a cache. Raises
    ValueError if the folder's cannot be read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", nargs="?", type=Path)
    output, default = parser.parse_known_args(args)[0].output, None
    if output is not None and (output / OPTIONS).is_file():
        options = read_json(output / OPTIONS)
        try:
            default = TypeAdapter(CacheCommand).validate_json(json.dumps({**options, "output": str(output)}))
        except (InvalidOption, ValidationError, TypeError) as error:
            raise ValueError(f"{output / OPTIONS} holds no options of a cache ({error}). Remove that file.") from None
    return tyro.cli(CacheCommand, args=args, default=default, **told)


def check(command: CacheCommand) -> None:
    """Raises ValueError if options are missing, wrong, or do not go together."""
    families = set(command.families)
    if command.source.data is None:
        raise ValueError("Pass the dataset: --data and what belongs to it.")
    check_source(command.source)
    if not families or len(families) < len(command.families):
        raise ValueError(f"--families is {command.families}; pass some of {', '.join(FAMILIES)}, each once.")
    if command.model is None and families - {"teacher", "pictures"}:
        raise ValueError("Pass --model, a Wan 2.1 or RefAlign pipeline; only `teacher` and `pictures` need none.")
    if "pictures" in families and len(families) > 1:
        raise ValueError("--families pictures is for a cache of its own. Name another --output for the others.")
    if command.teacher is None and "teacher" in families:
        raise ValueError("Pass --teacher, or leave `teacher` out of --families.")
    for name, least in (("variants", 1), ("workers", 0), ("limit", 1)):
        value = getattr(command, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}: pass {least} or more.")
