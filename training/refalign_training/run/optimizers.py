"""The optimisers by name. Nothing is imported before its optimiser is asked for, but torch's own."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from refalign_training.run.config import OptimizerOptions
from refalign_training.run.muon import MuonWithAdamW


# What is no part of torch, and what its name is for pip
PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
# What an optimiser keeps for all parameters of a group together, beside what it keeps for each
GROUP_STATE = {"prodigy": ("d", "d_max", "d_numerator", "k")}


def check_optimizer(options: OptimizerOptions) -> None:
    """Raises ValueError if the optimiser's package is not installed, or options do not fit it."""
    package = PACKAGES.get(options.name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(f"optimizer.name {options.name} needs {package}: pip install {package}")
    if options.name != "prodigy":
        return
    if options.lr < 0.1:
        raise ValueError(f"optimizer.lr is {options.lr:g}, but prodigy finds its own: pass optimizer.lr 1.")
    if options.projector_lr not in (None, options.lr):
        raise ValueError(
            f"optimizer.projector_lr is {options.projector_lr:g} and lr {options.lr:g}: prodigy has one learning rate."
        )


def make_optimizer(options: OptimizerOptions, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | MuonWithAdamW:
    """The optimiser of groups of parameters. Raises ValueError as [`check_optimizer`]."""
    check_optimizer(options)
    betas, eps = options.betas, options.eps
    match options.name:
        case "muon":
            return MuonWithAdamW(groups, betas, eps)
        case "adafactor":
            return torch.optim.Adafactor(groups)
        case "prodigy":
            from prodigyopt import Prodigy

            # Steps are bounded while the learning rate still warms up, in which it finds its own
            return Prodigy(groups, betas=betas, eps=eps, use_bias_correction=True, safeguard_warmup=True)
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # only for this one

            return AdamW8bit(groups, betas=betas, eps=eps)
    # The others than the fused one take as much memory as the gradients for a moment
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def group_state(name: str, groups: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What an optimiser keeps for its groups, in float64, by names for a checkpoint."""
    state = {}
    for number, group in enumerate(groups):
        for key in GROUP_STATE.get(name, ()):
            state[f"optimizer.group_{number}.{key}"] = torch.tensor(float(group[key]), dtype=torch.float64)
    return state


def load_group_state(name: str, groups: list[dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what [`group_state`] gave."""
    for number, group in enumerate(groups):
        for key in GROUP_STATE.get(name, ()):
            group[key] = type(group[key])(tensors[f"optimizer.group_{number}.{key}"].item())
