"""What `refalign-train cache` can be told. Imports nothing heavy, so that `--help` answers at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import OmitArgPrefixes

from refalign_training.data.recipe import Recipe
from refalign_training.data.source import Dataset, check_source


Family = Literal["video", "references", "text", "teacher"]
Dtype = Literal["float32", "bfloat16", "float16"]


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


def check(command: CacheCommand) -> None:
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
