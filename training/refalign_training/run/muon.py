"""Muon for the matrices of a network's blocks, AdamW for all else, as one optimiser."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


_HIDDEN = re.compile(r"block|\blayers?\.\d")


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a weight maps features to features, unlike a bias, a norm or a modulation."""
    is_vector = parameter.numel() == max(parameter.shape, default=1)
    return parameter.ndim >= 2 and not is_vector and not name.endswith("scale_shift_table")


def is_hidden(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon changes it: a matrix or a kernel inside a block, and no embedding or head."""
    return is_matrix(name, parameter) and _HIDDEN.search(name) is not None


class MuonWithAdamW:
    """`torch.optim.Muon` (https://kellerjordan.github.io/posts/muon/) with the step size of AdamW (Moonlight, arXiv
    2502.16982), and `torch.optim.AdamW` beside it, which has the betas and eps. A kernel counts as the matrix from its
    inputs to its outputs. Groups of parameters with `muon=True` are Muon's."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        # Views that share their memory: Muon takes matrices alone
        self._flat: dict[nn.Parameter, nn.Parameter] = {}
        of_muon, of_adamw = [], []
        for group in groups:
            if group.pop("muon", False):
                flat = [nn.Parameter(parameter.detach().flatten(1)) for parameter in group["params"]]
                self._flat |= zip(group["params"], flat, strict=True)
                of_muon.append(group | {"params": flat})
            else:
                of_adamw.append(group)
        self._optimizers: list[torch.optim.Optimizer] = []
        if of_muon:
            self._optimizers.append(torch.optim.Muon(of_muon, adjust_lr_fn="match_rms_adamw"))
        if of_adamw:
            self._optimizers.append(torch.optim.AdamW(of_adamw, betas=betas, eps=eps, fused=True))
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:
        """The optimisers' state by the network's own parameters."""
        state: dict[torch.Tensor, dict[str, Any]] = {}
        for optimizer in self._optimizers:
            state |= optimizer.state
        for ours, flat in self._flat.items():
            if flat in state:
                state[ours] = state.pop(flat)
        return state

    def step(self) -> None:
        for ours, flat in self._flat.items():
            flat.grad = None if ours.grad is None else ours.grad.flatten(1)
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        for ours in self._flat:
            ours.grad = None
