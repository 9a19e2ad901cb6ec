"""
`refalign-train cache`: compute once what the frozen encoders give of a dataset, so that training does not.

    refalign-train cache --data opens2v --annotations Jsons/part1.json --videos Videos \
        --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --teacher facebook/dinov3-vitb16-pretrain-lvd1689m --output CACHE
    accelerate launch --num_processes 8 -m refalign_training.cli cache ...     # or start it eight times: they share
    refalign-train cache --output CACHE --status

Run again, it goes on where it was, and computes only what has changed. [`refalign_training.cache.reader.Cache`] reads
it; what lies in its folder says [`refalign_training.cache.files`]. Nothing heavy is imported before it is needed, so
that `--help` answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import OmitArgPrefixes

from refalign_training.data.recipe import Recipe
from refalign_training.data.source import Source, check_source


Family = Literal["video", "references", "text", "teacher"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Dataset(Source):
    """The dataset, which not every command needs."""

    data: Literal["opens2v", "phantom", "table", "folder", "samples"] | None = None
    """The format: OpenS2V-5M, Phantom-Data, a table or a folder of your own, or files that the subset tool wrote."""


@dataclass(frozen=True)
class CacheCommand:
    """Compute once what the frozen encoders give: latents, text embeddings, teacher features. Goes on when killed."""

    output: Path
    """The cache's folder: a new one, or one to go on with."""
    source: Annotated[Dataset, OmitArgPrefixes] = field(default_factory=Dataset)
    """The dataset."""
    recipe: Annotated[Recipe, OmitArgPrefixes] = field(default_factory=Recipe)
    """How pixels are made of it."""
    model: str | None = None
    """The Wan 2.1 or RefAlign pipeline, folder or Hub id, whose VAE and text encoder to use."""
    revision: str | None = None
    """Of the model on the Hub."""
    teacher: str | None = None
    """The vision model whose features references are aligned to: folder or Hub id."""
    teacher_revision: str | None = None
    """Of the teacher on the Hub."""
    families: tuple[Family, ...] = ("video", "references", "text", "teacher")
    """What to compute."""
    variants: int = 1
    """How often references are drawn and augmented."""
    dtype: Dtype = "bfloat16"
    """Text encoder and teacher run in it, and everything is stored in it."""
    vae_dtype: Dtype = "float32"
    """The VAE runs in it."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes the first there is, and under accelerate each process its own GPU."""
    workers: int = 2
    """Processes that decode videos and images while the encoder runs; 0: none of their own."""
    unit_size: int = 256
    """Samples after which a record is written."""
    shards: bool = False
    """Write tars of many items instead of a file an item: for more than some 10,000 samples."""
    limit: int | None = None
    """Only the dataset's first samples."""
    retry_quarantined: bool = False
    """Try samples again that failed or lost a reference; else they wait until something they are made of changes."""
    status: bool = False
    """Only say how far the cache is."""
    verify: bool = False
    """Only read everything through. What is broken is made anew by the next run; exit code 1 if anything is."""
    prune: bool = False
    """Only remove what no sample needs any more, and what killed processes left."""


def run(command: CacheCommand) -> int:
    """
    Does what the command says and returns the exit code.

    Raises:
        ValueError: if the command does not fit together, or another process works on the cache with other settings.
    """
    asked = [name for name in ("status", "verify", "prune") if getattr(command, name)]
    if len(asked) > 1:
        raise ValueError(f"Pass one of {', '.join(f'--{name}' for name in asked)} at a time.")
    if asked:
        from refalign_training.cache import checks

        return getattr(checks, asked[0])(command.output)
    _check(command)
    from refalign_training.cache import fill

    return fill.fill(command)


def _check(command: CacheCommand) -> None:
    command.recipe.check()
    families = set(command.families)
    if command.source.data is None:
        raise ValueError("Pass the dataset: --data and what belongs to it.")
    check_source(command.source)
    if not families or len(families) < len(command.families):
        raise ValueError(f"--families is {command.families}; pass some of {', '.join(get_args(Family))}, each once.")
    if command.model is None and families - {"teacher"}:
        raise ValueError("Pass --model, a Wan 2.1 or RefAlign pipeline; only the family `teacher` needs none.")
    if command.teacher is None and "teacher" in families:
        raise ValueError("Pass --teacher, or leave `teacher` out of --families.")
    for name, least in (("variants", 1), ("unit_size", 1), ("workers", 0), ("limit", 1)):
        if (value := getattr(command, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: pass {least} or more.")
    if command.output.is_dir() and any(command.output.iterdir()) and not (command.output / "locks").is_dir():
        raise ValueError(f"{command.output} holds other things than a cache. Name a new folder as --output.")
