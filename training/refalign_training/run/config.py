"""What a training run can be told: a tree of options, filled from a YAML file and overridden from the command line.

A file's keys are the options' names: `optimizer: {lr: 5e-5}` is `--optimizer.lr 5e-5`. Nothing heavy is imported.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from refalign_training.data.recipe import Recipe
from refalign_training.data.source import Dataset
from refalign_training.method.options import AlignmentOptions, ObjectiveOptions


@dataclass(frozen=True)
class ModelOptions:
    """The transformer that is trained."""

    base: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """A Wan 2.1 or RefAlign pipeline, folder or Hub id: its transformer is trained, its VAE and text encoder used."""
    revision: str | None = None
    """Of the base on the Hub."""
    start: Path | None = None
    """Weights to start from instead of the base's, with the projectors that come with them: an earlier run or one of
    its checkpoints (of its last step, not the average), a folder that `refalign-train export` wrote of full training,
    or a native safetensors file."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """What is computed in. Trained weights, gradients and optimiser are always in float32; what is frozen is not."""
    gradient_checkpointing: bool = True
    """Compute each block again in the backward pass: a third more time, a fraction of the memory."""
    compile: bool = False
    """Compile the blocks by torch.compile: a minute or more at the start, then faster steps."""


@dataclass(frozen=True)
class LoraOptions:
    """The adapters, if `training` is `lora`."""

    rank: int = 64
    """Of each adapter."""
    alpha: float = 64.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    """Names of the layers that get one, by their ends."""


@dataclass(frozen=True)
class DataOptions:
    """Either a cache, or a dataset whose encoders run along with the training (slower, but new augmentation each
    epoch)."""

    cache: Path | None = None
    """A folder that `refalign-train cache` made."""
    source: Dataset = field(default_factory=Dataset)
    """The dataset, if there is no cache."""
    recipe: Recipe = field(default_factory=Recipe)
    """How pixels are made of it."""
    teacher: str | None = None
    """The vision model that references are aligned to, if there is no cache: folder or Hub id."""
    teacher_revision: str | None = None
    """Of the teacher on the Hub."""
    workers: int = 4
    """Processes that read and decode, for each training process; 0: none of their own."""


@dataclass(frozen=True)
class BatchOptions:
    """How many samples at once."""

    size: int = 8
    """Samples a step, of all processes together: changing the number of processes changes nothing."""
    micro: int = 1
    """Samples that a process takes at once, all of one shape and number of references. `size` is reached by
    accumulation: size / (micro * processes) times a step."""


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW or Muon, and how the learning rate goes."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit keeps its state in 8 bits (needs bitsandbytes). muon changes the matrices of the blocks by Muon and
    all else by AdamW. Neither works with fsdp2."""
    lr: float = 5e-5
    """AdamW's learning rate."""
    muon_lr: float = 1e-2
    """Muon's learning rate."""
    projector_lr: float | None = None
    """Of the projectors; by default the same."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    eps: float = 1e-8
    """Of AdamW."""
    weight_decay: float = 0.01
    """Of matrices; biases, norms and modulation have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Of the learning rate after the warm-up, down to 0 at the last step unless constant."""
    warmup_steps: int = 0
    """The learning rate rises over so many steps."""
    ema_decay: float | None = None
    """Of a moving average of the trained weights, which is then what is exported; None: no average."""


@dataclass(frozen=True)
class CheckpointOptions:
    """What is kept to go on from. The last step and a SIGTERM save too."""

    every: int = 500
    """Steps between checkpoints."""
    keep_last: int = 2
    """Of the latest ones, so many are kept."""
    keep_every: int | None = None
    """Those at multiples of so many steps are kept for good; None: none."""


@dataclass(frozen=True)
class LogOptions:
    """What can be watched. `metrics.jsonl` in the run's folder holds all numbers, whatever the tracker."""

    every: int = 10
    """Steps between two lines."""
    tracker: Literal["tensorboard", "trackio", "wandb", "none"] = "tensorboard"
    """trackio and wandb have to be installed; wandb sends to its server."""
    project: str = "refalign"
    """The tracker's name for a group of runs."""
    gradients_every: int = 100
    """Steps between measurements of the two losses' own gradients, which take two extra passes; 0: none."""


@dataclass(frozen=True)
class ValidationOptions:
    """What is measured on samples that are held out. It changes nothing about the run."""

    every: int = 500
    """Steps between validations; 0: none."""
    samples: int = 16
    """So many samples of the dataset are held out, always the same ones and a tenth of it at most; 0: none."""
    cache: Path | None = None
    """A cache whose first `samples` are validated on; the dataset's own are all trained on then."""
    videos: int = 2
    """Of so many of them videos are made, with the references beside them."""
    video_steps: int = 30
    """Denoising steps of the videos."""
    guidance_scale: float = 7.5
    """How closely the videos follow the prompt."""
    image_guidance_scale: float = 5.0
    """How closely the videos follow the references."""


@dataclass(frozen=True)
class RunCommand:
    """Train: LoRA or all weights, on one GPU or many. Stopped, --resume latest goes on exactly where it was."""

    output: Path
    """The run's folder."""
    config: Path | None = None
    """A YAML file with these options; what the command line says goes before it."""
    training: Literal["lora", "full"] = "lora"
    """Adapters alone, or all weights of the transformer."""
    steps: int = 10_000
    """Optimiser steps in all."""
    seed: int = 0
    """With it and the data, everything random is given."""
    resume: str | None = None
    """latest, or a checkpoint's folder, to go on with; auto: the latest if there is one, else start."""
    allow_changes: bool = False
    """Go on although the dataset or the options are others than the checkpoint's."""
    dry_run: bool = False
    """Say what would be done, with an estimate of memory and time, and do nothing."""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several processes share the work: each with all weights (ddp), or each with its part (fsdp2). auto: fsdp2 if
    accelerate's file says FSDP, else ddp."""
    device: str = "auto"
    """cuda, mps, cpu; auto takes the first there is, and each process its own GPU."""
    max_skipped_steps: int = 10
    """The run ends after so many steps in a row whose loss or gradient was not finite. Such steps change no weight."""
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataOptions = field(default_factory=DataOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    log: LogOptions = field(default_factory=LogOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)


def expand_config(arguments: Sequence[str]) -> list[str]:
    """
    The arguments of a command line in which those of `--config FILE` stand before the line's own.

    Raises:
        ValueError: if the file is none, or has a key that no option has.
    """
    words = list(arguments)
    if words[:1] != ["run"]:
        return words
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == "--config":
            path = value or (words[number + 1] if number + 1 < len(words) else "")
            content = read_yaml(Path(path))
            if "config" in content:
                raise ValueError(f"{path} names another file as config, but a run has one.")
            return [*words[:1], *_arguments(content, RunCommand, path), *words[1:]]
    return words


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file of options; ValueError, naming it, if it is none."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold options such as `steps: 1000`, but holds {content!r:.80}.")
    return content


def _arguments(content: Mapping[str, Any], cls: type, path: str, prefix: str = "") -> Iterator[str]:
    """The options of a mapping as words of a command line."""
    types = get_type_hints(cls)
    for key, value in content.items():
        if key not in types:
            raise ValueError(f"{path} has the unknown key {prefix}{key}.{_nearest(f'{prefix}{key}')}")
        option = f"{prefix}{key}"
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {option} is {value!r:.80}, but has to hold options of its own.")
            yield from _arguments(value, types[key], path, f"{option}.")
        elif misfit := _misfit(value, types[key]):
            raise ValueError(f"{path}: {option} is {value!r:.80}, but has to be {misfit}.")
        elif isinstance(value, bool):
            yield f"--{option if value else f'{prefix}no-{key}'}".replace("_", "-")
        else:
            values = value if isinstance(value, list) else [value]
            yield from (f"--{option}".replace("_", "-"), *map(str, values))


def _misfit(value: Any, kind: Any) -> str | None:
    """What a value of YAML has to be instead, if a command line would take it for something else."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None:
        return None if NoneType in kinds else "a value"
    if isinstance(value, dict) or isinstance(value, bool) != (bool in kinds):
        return "true or false" if bool in kinds else "a value; put text in quotes"
    if isinstance(value, list):
        parts = next((get_args(k) for k in kinds if get_origin(k) is tuple), None)
        return "one value" if parts is None else next(filter(None, (_misfit(v, parts[0]) for v in value)), None)
    # 0123 is 83 to YAML, and 2026-01-01 a date
    return None if isinstance(value, str) or not {str, Path} & {*kinds} else "text; put it in quotes"


def _nearest(key: str) -> str:
    names = list(flatten(RunCommand(Path())))
    sections = {name.rpartition(".")[0] for name in names} - {""}
    same = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    matches = same or difflib.get_close_matches(key, [*names, *sorted(sections)], n=1, cutoff=0.5)
    return f" Did you mean {matches[0]}?" if matches else ""


def flatten(options: Any, prefix: str = "") -> dict[str, Any]:
    """Every option of a tree by its dotted name, as values that JSON and YAML know."""
    flat: dict[str, Any] = {}
    for part in dataclasses.fields(options):
        value = getattr(options, part.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{part.name}.")
        else:
            flat[f"{prefix}{part.name}"] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def to_yaml(command: RunCommand) -> str:
    """The options as a YAML file that makes the same run."""
    import yaml

    tree: dict[str, Any] = {}
    for name, value in flatten(command).items():
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    for name in ("config", "resume", "allow_changes", "dry_run"):  # of the call, not of the run
        del tree[name]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def accumulation(command: RunCommand, world_size: int) -> int:
    """
    How many micro-batches each process takes a step.

    Raises:
        ValueError: if the processes cannot share the batch evenly.
    """
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


def check(command: RunCommand) -> None:
    """Raises ValueError, naming the option, for values that cannot be meant or do not fit each other."""
    values = flatten(command)
    least = {
        "steps": 1, "max_skipped_steps": 1, "batch.size": 1, "batch.micro": 1, "lora.rank": 1, "data.workers": 0,
        "checkpoints.every": 1, "checkpoints.keep_last": 1, "checkpoints.keep_every": 1, "log.every": 1,
        "log.gradients_every": 0, "validation.every": 0, "validation.samples": 0, "validation.videos": 0,
        "validation.video_steps": 1, "validation.guidance_scale": 0, "validation.image_guidance_scale": 0,
        "optimizer.warmup_steps": 0, "optimizer.lr": 0, "optimizer.muon_lr": 0, "optimizer.projector_lr": 0,
        "optimizer.weight_decay": 0, "optimizer.max_grad_norm": 0, "alignment.weight": 0, "alignment.decay_steps": 0,
        "alignment.decay_start": 0, "alignment.stop_step": 0, "alignment.gate_power": 0,
        "alignment.negative_weight": 0, "objective.no_text": 0, "objective.no_references": 0, "objective.neither": 0,
        "objective.max_sequence_length": 1, "objective.detail_weight": 0, "objective.detail_steps": 0,
        "lora.alpha": 0, "lora.dropout": 0,
    }  # fmt: skip
    for name, minimum in least.items():
        if values[name] is not None and not minimum <= values[name] < math.inf:  # NaN is not
            raise ValueError(f"{name} is {values[name]}: it has to be {minimum} or more.")
    accumulation(command, world_size=1)
    optimizer, objective, alignment = command.optimizer, command.objective, command.alignment
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ValueError(f"optimizer.betas are {optimizer.betas}: they have to be from 0 to below 1.")
    if optimizer.warmup_steps > command.steps:
        raise ValueError(f"optimizer.warmup_steps is {optimizer.warmup_steps}, more than the {command.steps} steps.")
    if objective.no_text + objective.no_references + objective.neither > 1:
        raise ValueError("objective.no_text, no_references and neither are shares of all samples, more than 1 in sum.")
    if optimizer.ema_decay is not None and not 0 <= optimizer.ema_decay < 1:
        raise ValueError(f"optimizer.ema_decay is {optimizer.ema_decay}: it has to be from 0 to below 1, or None.")
    if not command.lora.targets or not alignment.layers:
        raise ValueError("lora.targets and alignment.layers have to name a layer or more. No alignment is weight 0.")
    if (alignment.decay_start is None) != (alignment.decay_steps == 0):
        raise ValueError("alignment.decay_start and decay_steps go together. To end at once, pass stop_step.")
    if command.lora.dropout >= 1:
        raise ValueError(f"lora.dropout is {command.lora.dropout}: it has to be below 1.")
    if optimizer.name != "adamw" and wants_shards(command.parallel):
        raise ValueError(f"optimizer.name {optimizer.name} does not work with fsdp2. Choose adamw, or parallel ddp.")
    if command.data.cache is not None and command.data.source.data is not None:
        raise ValueError("data.cache and data.source.data are both set. --data.cache None leaves the cache out.")
    if (command.data.cache is None) == (command.data.source.data is None):
        raise ValueError(
            "Pass either data.cache, a folder of `refalign-train cache`, or a dataset as data.source.data."
        )
    if command.data.cache is not None and command.data.teacher is not None:
        raise ValueError("data.teacher goes with a dataset: a cache has its teacher's features. Leave it out.")
    if command.data.cache is None and command.data.teacher is None and alignment.weight:
        raise ValueError(
            "Without a cache, data.teacher has to name the vision model to align to; or alignment.weight 0."
        )
    if command.validation.cache is not None and command.data.cache is None:
        raise ValueError("validation.cache goes with data.cache.")
