"""What a training run can be told: a tree of options, filled from a YAML file and overridden from the command line.

A file's keys are the options' names: `optimizer: {lr: 5e-5}` is `--optimizer.lr 5e-5`. Nothing heavy is imported.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter
from pydantic.dataclasses import dataclass
from tyro.conf import Fixed

from refalign_training.bounds import UNKNOWN, InvalidOption, Listed, Many, Options, ShareBelowOne
from refalign_training.data.recipe import Recipe, RefineOptions
from refalign_training.data.source import Dataset
from refalign_training.method.options import AlignmentOptions, ObjectiveOptions
from refalign_training.run.yaml_file import with_exponents


CONFIG_FILE = "config.yaml"  # of a run's folder


@dataclass(frozen=True)
class ModelOptions(Options):
    """The transformer that is trained."""

    base: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """The Wan 2.1 or RefAlign pipeline, as a folder or a Hub id. Its transformer is trained; its VAE and text encoder
    are used as they are."""
    revision: str | None = None
    """The revision of the base on the Hub."""
    start: Path | None = None
    """Weights to start from instead of the base's, with the projectors that come with them: an earlier run or one of
    its checkpoints (whose last weights are taken, not the average), a folder that `refalign-train export` wrote of a
    full training, or a native safetensors file."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """The precision of the computation and of frozen weights. Trained weights, gradients and the optimiser's state
    are always in float32."""
    gradient_checkpointing: bool = True
    """Compute each block again in the backward pass. A step takes a third more time and a fraction of the memory."""
    compile: bool = False
    """Compile the blocks by torch.compile. The start takes a minute or more, then steps are faster."""
    attention: str | None = None
    """The kernel of diffusers that computes attention, such as flash or _native_cudnn. None: torch chooses."""
    quantization: Literal["int8", "fp8", "nf4"] | None = None
    """The bits of the frozen matrices of the blocks, for adapters alone: int8 and fp8 by torchao, nf4 by bitsandbytes.
    They are made when the run starts; a LoRA that learnt beside them fits the whole model too."""
    offload_blocks: NonNegativeInt = 0
    """The number of blocks whose frozen weights stay in the CPU's memory and are copied whenever the block computes,
    for adapters alone. Exact, and slower."""
    offload_activations: bool = False
    """Keep what the blocks are computed again from in the CPU's memory. Exact, and a little slower."""


@dataclass(frozen=True)
class LoraOptions(Options):
    """The adapters, if `training` is `lora`."""

    rank: PositiveInt = 64
    """The rank of each adapter."""
    alpha: NonNegativeFloat = 64.0
    """The numerator of the adapters' scale, which is alpha / rank."""
    dropout: ShareBelowOne = 0.0
    """The probability that an input of an adapter is dropped."""
    targets: Annotated[tuple[str, ...], Many, Field(min_length=1)] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("ffn.net.0.proj", "ffn.net.2"),
    )
    """The layers that get an adapter, by the ends of their names."""


@dataclass(frozen=True)
class DataOptions(Options):
    """What is trained on: a cache, or a dataset whose encoders run along with the training. A dataset is slower, but
    is augmented anew in each epoch. With both, the cache is trained on; `refalign-train cache` makes it of the
    dataset."""

    cache: Path | None = None
    """The folder that `refalign-train cache` made, or with --config is to make."""
    source: Dataset = field(default_factory=Dataset)
    """The dataset, if there is no cache, or what `refalign-train cache --config` makes it of."""
    recipe: Recipe = field(default_factory=Recipe)
    """How pixels are made of the dataset."""
    teacher: str | None = None
    """The vision model whose features references are aligned to, as a folder or a Hub id. It goes with the dataset."""
    teacher_revision: str | None = None
    """The revision of the teacher on the Hub."""
    workers: NonNegativeInt = 4
    """How many processes read and decode for each training process. 0: it reads and decodes itself."""


@dataclass(frozen=True)
class BatchOptions(Options):
    """How many samples are taken at once."""

    size: PositiveInt = 8
    """The number of samples per step, of all processes together. The number of processes changes nothing."""
    micro: PositiveInt = 1
    """The number of samples that a process takes at once, all of one shape and number of references. Gradients are
    accumulated over size / (micro * processes) of them per step."""


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """The optimiser, and how the learning rate changes."""

    name: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "muon"] = "adamw"
    """The optimiser. adamw8bit is AdamW with its state in 8 bits, and needs bitsandbytes. adafactor keeps next to no
    state. prodigy finds its learning rate itself, with lr 1, and needs prodigyopt. muon changes the matrices of the
    blocks by Muon and all other weights by AdamW. Only adamw works with fsdp2."""
    lr: NonNegativeFloat = 5e-5
    """AdamW's learning rate."""
    muon_lr: NonNegativeFloat = 1e-2
    """Muon's learning rate."""
    projector_lr: NonNegativeFloat | None = None
    """The learning rate of projectors: the alignment's, or that of a refinement's references. None: it is AdamW's."""
    betas: Annotated[tuple[ShareBelowOne, ShareBelowOne], Listed] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """The weight decay of matrices. Biases, norms and modulation have none."""
    max_grad_norm: NonNegativeFloat = 1.0
    """The norm that gradients are scaled down to. 0: they are never scaled."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate changes after the warm-up: not at all, or along half a cosine or a line to 0 at the last
    step."""
    warmup_steps: NonNegativeInt = 0
    """The number of steps over which the learning rate rises at the start."""
    ema_decay: ShareBelowOne | None = None
    """The decay of a moving average of the trained weights, which is then what is exported. None: there is no
    average."""


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """What is kept to go on from. A checkpoint is also written after the last step and on SIGTERM."""

    every: PositiveInt = 500
    """The number of steps from one checkpoint to the next."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are multiples of this number are kept for good. None: there are none."""


@dataclass(frozen=True)
class LogOptions(Options):
    """What can be watched. All figures are in `metrics.jsonl` in the run's folder, whatever the tracker."""

    every: PositiveInt = 10
    """The number of steps from one log line to the next."""
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"
    """The tracker that shows the figures. trackio and wandb must be installed; wandb sends them to its server."""
    project: str = "refalign"
    """The name of the project in the tracker."""
    gradients_every: NonNegativeInt = 100
    """The number of steps from one measurement of the two losses' own gradients to the next. Each takes two more
    passes. 0: they are never measured."""


@dataclass(frozen=True)
class PromptOptions(Options):
    """A video of one's own to look at."""

    prompt: str
    """A description of what happens in the video."""
    references: Annotated[tuple[str, ...], Many] = ()
    """The images of the subjects and of the place, as paths or URLs. They are taken as they are: nothing is cut
    out."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """The seed of the noise. The same seed gives the same noise in `refalign generate`."""


@dataclass(frozen=True)
class ValidationOptions(Options):
    """What is measured on samples that are held out. It changes nothing about the run."""

    every: NonNegativeInt = 500
    """The number of steps from one validation to the next. 0: there is none."""
    samples: NonNegativeInt = 16
    """How many samples of the dataset are held out: always the same ones, and a tenth of the dataset at most."""
    cache: Path | None = None
    """A cache whose first samples are validated on. All samples of the dataset are then trained on."""
    prompts: Annotated[tuple[PromptOptions, ...], Listed, Fixed] = ()
    """Prompts of your own with references of your own, which are shown as videos before the first step and at each
    validation. A YAML file lists them: `prompts: [{prompt: A dog runs., references: [dog.png], seed: 0}]`."""
    videos: NonNegativeInt = 2
    """How many of the samples are shown as videos, with the references beside them."""
    video_steps: PositiveInt = 30
    """The number of denoising steps of the videos."""
    guidance_scale: NonNegativeFloat | None = None
    """How closely the videos follow the prompt. None: as the model's family does by default."""
    image_guidance_scale: NonNegativeFloat | None = None
    """How closely the videos follow the references. None: as the model's family does by default."""


@dataclass(frozen=True)
class RunCommand(Options):
    """Train adapters or all weights, on one GPU or many. A stopped run goes on exactly by --resume latest."""

    output: Path
    """The run's folder."""
    config: Path | None = None
    """A YAML file with these options, or the name of one of this package's recipes, such as lora-1.3b. What the
    command line says overrides it."""
    training: Literal["lora", "full"] = "lora"
    """What is trained: adapters alone (lora), or all weights of the transformer (full)."""
    steps: PositiveInt = 10_000
    """The number of optimiser steps of the whole run."""
    seed: int = 0
    """The seed. With the data, it decides everything random."""
    resume: str | None = None
    """What to go on from: latest, or the folder of a checkpoint. auto takes the latest checkpoint, and starts if there
    is none. Without --config, the options are those of the run's folder."""
    allow_changes: bool = False
    """Go on although the dataset or the options differ from the checkpoint's."""
    dry_run: bool = False
    """Only say what would be done, with an estimate of the memory and time."""
    gpu_memory: PositiveFloat | None = None
    """The memory of the GPU in GiB, for --dry-run: it names the smallest setting that fits."""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several processes share the work: each holds all weights (ddp), or its part of them (fsdp2). auto is fsdp2
    if accelerate's file says FSDP, else ddp."""
    device: str = "auto"
    """The device: cuda, mps or cpu. auto takes the first that there is, and for each process its own GPU."""
    max_skipped_steps: PositiveInt = 10
    """The run ends after this number of steps in a row whose loss or gradient is not finite. Such steps change no
    weight."""
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataOptions = field(default_factory=DataOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    refine: RefineOptions = field(default_factory=RefineOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    log: LogOptions = field(default_factory=LogOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)


def _sections(options: type, prefix: str = "") -> dict[type, str]:
    """The classes of a tree, and what their options' names begin with."""
    sections = {options: prefix}
    for name, kind in get_type_hints(options).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            sections |= _sections(kind, f"{prefix}{name}.")
    return sections


SECTIONS = _sections(RunCommand) | {PromptOptions: "validation.prompts."}
_TREE = TypeAdapter(RunCommand)


def validated(content: Mapping[str, Any]) -> RunCommand:
    """The options that a file's content gives, defaults for what it does not name. Raises ValueError as
    [`naming_sections`]."""
    # In JSON, text may be a path, but nothing else is taken for another type. It has no dates: they become sections
    text = json.dumps(content, default=lambda date: {type(date).__name__: str(date)})
    return _TREE.validate_json(text)


@contextmanager
def naming_sections(place: str = "") -> Iterator[None]:
    """Inside this context, an option that cannot be used raises a ValueError with the option's dotted name."""
    try:
        yield
    except InvalidOption as error:
        name = f"{SECTIONS[error.section]}{error.name}".rstrip(".")
        hint = _nearest(name) if error.problem == UNKNOWN else ""
        raise ValueError(f"{place}{name} {error.problem}{hint}") from None


def _nearest(key: str) -> str:
    names = list(flatten(RunCommand(Path())))
    sections = [prefix.rstrip(".") for prefix in SECTIONS.values()]
    same = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    matches = same or difflib.get_close_matches(key, [*names, *sections], n=1, cutoff=0.5)
    return f" Did you mean {matches[0]}?" if matches else ""


def flatten(command: RunCommand) -> dict[str, Any]:
    """Every option by its dotted name, as values that JSON and YAML know."""
    return dict(_leaves(_TREE.dump_python(command, mode="json")))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def to_yaml(command: RunCommand) -> str:
    """The options as a YAML file that makes the same run."""
    import yaml

    of_the_call = {"config", "resume", "allow_changes", "dry_run", "gpu_memory"}
    tree = _TREE.dump_python(command, mode="json", exclude=of_the_call)
    return yaml.dump(tree, Dumper=with_exponents(yaml.SafeDumper), sort_keys=False, allow_unicode=True)


def accumulation(command: RunCommand, world_size: int) -> int:
    """The number of micro-batches per process and step. Raises ValueError if the batch cannot be shared evenly."""
    count, rest = divmod(command.batch.size, command.batch.micro * world_size)
    if rest:
        raise ValueError(
            f"batch.size is {command.batch.size}, which {world_size} processes with batch.micro {command.batch.micro} "
            f"cannot share evenly. Pass a multiple of {command.batch.micro * world_size}."
        )
    return count


def wants_shards(mode: str) -> bool:
    """Whether `parallel` asks for FSDP2: itself, or by accelerate's file."""
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return mode == "fsdp2" or (mode == "auto" and is_fsdp)
