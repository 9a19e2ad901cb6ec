"""May a run go on, and from where: all that decides it.

A run resumes its own checkpoint (`resume`), or starts from the weights of another one (`model.start`).
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from refalign.convert import find_config, read_native
from refalign.files import find_safetensors, read_headers
from refalign.hub import LORA_WEIGHTS, PROJECTORS
from refalign_training.run.checkpoint import STATE, find_checkpoint, has_checkpoint, read_state
from refalign_training.run.config import RunCommand, flatten


logger = logging.getLogger(__name__)

# Options that may differ when a run goes on: nothing that is trained depends on them
FREE_OPTIONS = (
    *("config", "output", "resume", "allow_changes", "dry_run", "parallel", "device", "max_skipped_steps"),
    *("checkpoints", "log", "model.compile", "data.workers", "gpu_memory"),
    *("model.offload_blocks", "model.offload_activations"),
    "data.cache",  # the dataset's fingerprint is compared
    "objective.family",  # it is the base's, and older checkpoints have none
    *("validation.every", "validation.videos", "validation.video_steps"),
    *("validation.guidance_scale", "validation.image_guidance_scale", "validation.prompts"),
)


def checkpoint_to_resume(command: RunCommand) -> Path | None:
    """Where the run goes on; ValueError if there is nothing, or if its folder holds a run that was not asked for."""
    if command.resume == "auto" and not has_checkpoint(command.output):
        logger.info("There is no checkpoint in %s: the run starts.", command.output)
        return None
    if command.resume is not None:
        return find_checkpoint(command.output if command.resume in ("latest", "auto") else Path(command.resume))
    if has_checkpoint(command.output):
        raise ValueError(f"{command.output} holds a run already. Pass --resume latest to go on, or another --output.")
    return None


def check_unchanged(checkpoint: Path, command: RunCommand, frozen: str, dataset: Mapping[str, Any]) -> None:
    """Raises ValueError if a checkpoint was made with other options, data or frozen weights (by their fingerprint),
    unless `allow_changes` lets it: then they are logged."""
    state = read_state(checkpoint)
    changes = changed_options(state["options"], flatten(command))
    is_told = any(change.startswith(("training:", "model.")) for change in changes)
    if state["frozen"] != frozen and not is_told:
        changes.append("the weights that the adapters were trained on")
    old, new = state["dataset"], dataset
    if old["fingerprint"] != new["fingerprint"]:
        changes.append(f"the dataset: {old['name']} of {old['samples']} samples -> {new['name']} of {new['samples']}")
    if changes and not command.allow_changes:
        raise ValueError(
            f"{checkpoint} was made with other options or data: {'; '.join(changes)}. Pass the same ones, or "
            "--allow-changes to go on with the new ones."
        )
    for change in changes:
        logger.warning("Changed since the checkpoint: %s", change)


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a checkpoint's options and those of now differ in, of what matters, as `name: old -> new`."""
    free, defaults = FREE_OPTIONS, flatten(RunCommand(Path()))
    old, new = defaults | old, defaults | new  # an option that came later was at its default
    if old["optimizer.schedule"] == new["optimizer.schedule"] == "constant":
        free = (*free, "steps")  # a longer run begins as the shorter one did
    sections = tuple(f"{name}." for name in free)
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and not f"{name}.".startswith(sections):
            changes.append(f"{name}: {old.get(name)} -> {new.get(name)}")
    return changes


class Start(NamedTuple):
    """What a run starts from, other than its base: another run's checkpoint, or headers of tensors in files."""

    checkpoint: Path | None = None
    transformer: Mapping[str, Any] = {}
    projectors: Mapping[str, Any] = {}


def find_start(command: RunCommand, resumes: bool = False) -> Start:
    """What `model.start` names. A run that `resumes` takes weights from its own checkpoint: it only needs the whole
    weights that adapters belong to. Raises ValueError if there is nothing, or of another kind of training."""
    path = command.model.start
    if path is None or (resumes and (command.training == "full" or not path.exists())):
        return Start()
    if not path.exists():
        raise ValueError(f"model.start is {path}, which does not exist.")
    if (path / LORA_WEIGHTS).is_file():
        raise ValueError(f"{path} holds exported adapters. Name the run, or the checkpoint, that they are of.")
    if (path / "transformer").is_dir():
        if (path / "transformer/config.json").is_file():
            find_config(path)
        projectors = read_headers(list(path.glob(PROJECTORS)))
        return Start(None, read_headers(find_safetensors(path / "transformer")), projectors)
    if not path.is_dir() or (any(path.glob("*.safetensors")) and not (path / STATE).is_file()):
        return Start(None, *read_native(path))
    checkpoint = find_checkpoint(path)
    if resumes:
        return Start()
    training = read_state(checkpoint)["options"]["training"]
    if training != command.training:
        remedy = {
            "full": "Export it (refalign-train export) and name that folder as model.start.",
            "lora": "Adapters are not whole weights to start from: train as lora, or without model.start.",
        }
        raise ValueError(f"{checkpoint} is of {training} training, this run is {command.training}. {remedy[training]}")
    return Start(checkpoint)


def check_start(checkpoint: Path, command: RunCommand, frozen: str) -> None:
    """Raises ValueError if another run's adapters were trained on other weights, or at another scale."""
    state = read_state(checkpoint)
    if state["frozen"] != frozen:
        raise ValueError(f"The adapters of {checkpoint} were trained on other weights than this run's model.base.")
    scale = state["options"]["lora.alpha"] / state["options"]["lora.rank"]
    if frozen and scale != command.lora.alpha / command.lora.rank:
        raise ValueError(f"The adapters of {checkpoint} have a scale (alpha / rank) of {scale:g}: pass the same.")


def frozen_fingerprint(transformer: nn.Module) -> str:
    """A digest of some values of every frozen weight: other weights, another digest. Empty if none is frozen."""
    total, is_any = hashlib.sha256(), False
    for name, parameter in transformer.named_parameters():
        if not parameter.requires_grad:
            is_any, values = True, parameter.detach().flatten()
            places = torch.linspace(0, len(values) - 1, 64, dtype=torch.float64).long()
            total.update(f"{name} {tuple(parameter.shape)}".encode() + values[places].float().numpy().tobytes())
    return f"sha256:{total.hexdigest()}" if is_any else ""
