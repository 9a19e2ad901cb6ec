"""The command of a tiny training run, and the tiny world it trains in."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign_training.config import (
    AlignmentOptions,
    BatchOptions,
    CheckpointOptions,
    DataOptions,
    LogOptions,
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    RunCommand,
    ValidationOptions,
)


@dataclass(frozen=True)
class World:
    """Folders of tiny models, and of what is trained on."""

    wan: Path
    teacher: Path
    clips: Path
    cache: Path
    """Of 8 samples, each second one with two references, in float32."""


def run_command(folder: Path, wan_folder: Path, cache: Path, **changes: Any) -> RunCommand:
    """
    Ten steps of four samples on the CPU, two at once, as LoRA in float32; without workers, tracker and validation.

    Args:
        folder (`Path`): the run's.
        changes: options by their dotted names, as in `**{"optimizer.lr": 1e-4}`.
    """
    command = RunCommand(
        output=folder,
        steps=10,
        device="cpu",
        model=ModelOptions(base=str(wan_folder), precision="float32", gradient_checkpointing=False),
        lora=LoraOptions(rank=4, alpha=8.0),
        data=DataOptions(cache=cache, workers=0),
        batch=BatchOptions(size=4, micro=2),
        optimizer=OptimizerOptions(lr=1e-3),
        alignment=AlignmentOptions(layers=(0, 1)),
        checkpoints=CheckpointOptions(every=5),
        log=LogOptions(every=2, tracker="none", gradients_every=0),
        validation=ValidationOptions(every=0, videos=0, video_steps=2),
    )
    return changed(command, **changes)


def changed(options: Any, **changes: Any) -> Any:
    """The options with others in their place, by dotted names."""
    for name, value in changes.items():
        section, _, rest = name.partition(".")
        if rest:
            value = changed(getattr(options, section), **{rest: value})
        options = dataclasses.replace(options, **{section: value})
    return options
