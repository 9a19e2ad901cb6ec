"""The loop that trains the frozen parts of the small world: resumable, and the same again for the same seed."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from refalign_training.run.checkpoint import (
    find_checkpoint,
    has_checkpoint,
    read_state,
    remove_old_checkpoints,
    save_checkpoint,
)
from refalign_training.run.config import OptimizerOptions
from refalign_training.run.parallel import Parallel
from refalign_training.run.state import TrainState


logger = logging.getLogger(__name__)

SAVE_EVERY = 200  # steps
HALVES = 2  # of a batch, so that one process and two come to the same


def train_part(
    folder: Path,
    modules: Mapping[str, nn.Module],
    loss: Callable[[int, int], torch.Tensor],
    options: OptimizerOptions,
    steps: int,
) -> None:
    """
    Minimises the mean of `loss(step, half)` over a batch's two halves, which two processes may share. Whatever is
    random in it must depend on these two numbers alone: killed, the same call goes on from the last checkpoint in
    `folder`.
    """
    parallel, first = Parallel(device="cpu"), 0
    state = TrainState(modules, options, steps)
    if has_checkpoint(folder):
        checkpoint = find_checkpoint(folder)
        state.load(checkpoint, is_parallel=False)
        first = read_state(checkpoint)["step"]
    with tqdm(total=steps, initial=first, desc=folder.name, mininterval=5, disable=not parallel.is_main) as bar:
        for step in range(first, steps):
            for half in range(parallel.rank, HALVES, parallel.world_size):
                value = loss(step, half) / HALVES
                value.backward()
            _sum_gradients(state, parallel)
            state.clip_gradients()
            state.update(step)
            state.optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{HALVES * value.item():.4f}", refresh=False)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                save_checkpoint(folder / "checkpoints", state.tensors(), {"step": step + 1}, parallel)
                if parallel.is_main:
                    remove_old_checkpoints(folder / "checkpoints", 1, None)


def _sum_gradients(state: TrainState, parallel: Parallel) -> None:
    if parallel.world_size > 1:
        gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
        total = parallel.sum(torch.cat(list(map(torch.flatten, gradients))))
        for gradient, part in zip(gradients, total.split(list(map(torch.numel, gradients))), strict=True):
            gradient.copy_(part.view_as(gradient))
