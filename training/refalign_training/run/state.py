"""All that changes while a run goes on: trained weights, their average, the optimiser."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refalign_training.run.checkpoint import load_tensors, stored_tensors
from refalign_training.run.config import OptimizerOptions
from refalign_training.run.muon import is_hidden, is_matrix
from refalign_training.run.optimizers import group_state, load_group_state, make_optimizer
from refalign_training.run.parallel import gradient_norm, local


PROJECTORS = "alignment."
REFERENCE_PROJECTOR = "refiner.reference_projector."


class TrainState:
    """The parameters of named modules that require a gradient, their average and their optimiser, whose schedule ends
    after `steps`. Raises ValueError if the optimiser's package is not installed."""

    def __init__(self, modules: Mapping[str, nn.Module], options: OptimizerOptions, steps: int) -> None:
        self.options, self.steps = options, steps
        self.parameters: dict[str, nn.Parameter] = {}
        self.averages: dict[str, torch.Tensor] = {}
        for name, parameter in nn.ModuleDict(modules).named_parameters():
            if parameter.requires_grad:
                self.parameters[name] = parameter
                if options.ema_decay is not None and not name.startswith(PROJECTORS):  # they are not exported
                    self.averages[name] = parameter.detach().clone()
        self.optimizer = make_optimizer(options, self._groups())

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters of one learning rate and weight decay together; with Muon, those that it changes apart."""
        options = self.options
        groups: dict[Any, dict[str, Any]] = {}
        for name, parameter in self.parameters.items():
            lr = options.lr
            is_projector = name.startswith((PROJECTORS, REFERENCE_PROJECTOR))
            if is_projector and options.projector_lr is not None:
                lr = options.projector_lr
            extra = {}
            if options.name == "muon" and is_hidden(name, parameter):
                lr, extra = options.muon_lr, {"muon": True}
            decay = options.weight_decay if is_matrix(name, parameter) else 0.0
            group = {"full_lr": lr, "lr": lr, "weight_decay": decay, **extra}
            groups.setdefault(tuple(group.items()), {"params": [], **group})["params"].append(parameter)
        return list(groups.values())

    def clip_gradients(self) -> float:
        """The norm of all gradients, which are scaled down to `max_grad_norm`."""
        return gradient_norm(list(self.parameters.values()), self.options.max_grad_norm).item()

    def update(self, step: int) -> None:
        """Changes the weights along their gradients, and the average after them."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * learning_rate_factor(step, self.steps, self.options)
        self.optimizer.step()
        if self.averages and self.options.ema_decay is not None:
            # At first the average follows closely, else it would long remember the start
            decay = min(self.options.ema_decay, (1 + step) / (10 + step))
            averages = [local(average) for average in self.averages.values()]
            weights = [local(self.parameters[name].detach()) for name in self.averages]
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this context, the weights are their averages, if there are some."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.averages.items():
            weight, average = local(self.parameters[name].detach()), local(average)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, the tensors themselves: what is written, and what is filled."""
        tensors = {f"average.{name}": average for name, average in self.averages.items()}
        tensors |= group_state(self.options.name, self.optimizer.param_groups)
        for name, parameter in self.parameters.items():
            tensors[f"weights.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        return tensors

    def load(self, checkpoint: Path, is_parallel: bool) -> None:
        """Goes on where a checkpoint was written. Raises ValueError if it does not fit."""
        self._make_optimizer_state()
        stored, tensors, state = stored_tensors(checkpoint), self.tensors(), self.optimizer.state
        for name, parameter in self.parameters.items():
            for key in list(state[parameter]):
                place = f"optimizer.{key}.{name}"
                if place not in stored:  # it has never had a gradient
                    del state[parameter][key], tensors[place]
                elif stored[place].shape != tensors[place].shape:  # prodigy keeps less of what began at 0
                    state[parameter][key] = tensors[place] = parameter.new_empty(stored[place].shape)
        load_tensors(checkpoint, tensors, is_parallel)
        for name, parameter in self.parameters.items():
            for key, value in state[parameter].items():
                if not isinstance(value, torch.Tensor):
                    state[parameter][key] = tensors[f"optimizer.{key}.{name}"].item()
        load_group_state(self.options.name, self.optimizer.param_groups, tensors)

    def load_weights(self, checkpoint: Path, is_parallel: bool) -> None:
        """Starts from another run's weights, and projectors if it has some. Raises ValueError if they do not fit."""
        has_projectors = any(name.startswith(f"weights.{PROJECTORS}") for name in stored_tensors(checkpoint))
        tensors = {}
        for name, parameter in self.parameters.items():
            if has_projectors or not name.startswith(PROJECTORS):
                tensors[f"weights.{name}"] = parameter.detach()
        load_tensors(checkpoint, tensors, is_parallel)
        for name, average in self.averages.items():
            local(average).copy_(local(self.parameters[name].detach()))

    def _make_optimizer_state(self) -> None:
        """A step of gradient and learning rate 0, with which optimisers make their state; no weight changes."""
        # torch.distributed.checkpoint.state_dict does this too, but not for us: it takes torch.optim.Optimizer alone,
        # which MuonWithAdamW is not; it makes a state before a save as well, so that what never had a gradient would
        # get one; and it adds `param_groups`, which are not tensors, and a checkpoint holds nothing else
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()


def learning_rate_factor(step: int, steps: int, options: OptimizerOptions) -> float:
    """The share of the full learning rate at a step, counted from 0."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    place = (step - options.warmup_steps) / max(steps - options.warmup_steps, 1)
    match options.schedule:
        case "cosine":
            return (1 + math.cos(math.pi * place)) / 2
        case "linear":
            return 1 - place
    return 1.0
