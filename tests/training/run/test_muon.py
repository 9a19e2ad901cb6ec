"""Muon for hidden matrices, AdamW beside it, as one optimiser that can be saved and loaded."""

import pytest
import torch
from torch import nn

from refalign_training.run.config import OptimizerOptions
from refalign_training.run.muon import is_hidden, is_matrix
from refalign_training.run.state import TrainState
from tests.tiny_pipeline import tiny_transformer
from tests.training.run.test_state import assert_same, copies, on_disk, take_steps


class Network(nn.Module):
    """A matrix and a kernel inside a block, and what lies outside."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.ModuleDict({"linear": nn.Linear(6, 4), "conv": nn.Conv3d(2, 3, 2)})])
        self.head = nn.Linear(4, 2)


def make_state(seed: int = 0, **options) -> TrainState:
    values = {"name": "muon", "lr": 1e-3, "muon_lr": 1e-2, "weight_decay": 0.0}
    return TrainState({"transformer": Network(seed)}, OptimizerOptions(**values | options), 10)


def test_a_transformers_blocks_are_hidden_and_its_ends_are_not():
    named = dict(tiny_transformer().named_parameters())
    hidden = {name for name, parameter in named.items() if is_hidden(name, parameter)}
    assert "blocks.0.attn1.to_q.weight" in hidden and "blocks.1.ffn.net.2.weight" in hidden
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in hidden)
    assert not {name for name in hidden if "norm" in name}


def test_a_norms_column_is_no_matrix():
    assert not is_matrix("gamma", torch.ones(8, 1, 1, 1))
    assert is_matrix("weight", torch.ones(8, 2, 1, 1))


def test_a_hidden_matrix_takes_torchs_own_step():
    state, other = make_state(), Network()
    name = "transformer.blocks.0.linear.weight"
    matrix = other.blocks[0]["linear"].weight
    muon = torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    gradient = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    state.parameters[name].grad, matrix.grad = gradient.clone(), gradient.clone()
    state.update(0)
    muon.step()
    assert torch.equal(state.parameters[name], matrix)


def test_a_kernel_is_taken_for_the_matrix_it_is():
    state = make_state()
    kernel = state.parameters["transformer.blocks.0.conv.weight"]
    before = kernel.detach().clone()
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1))
    state.update(0)
    scales = torch.linalg.svdvals((before - kernel.detach()).flatten(1))
    assert scales.min() > 0.3 * scales.max()  # a gradient's own are far apart


def test_the_rest_takes_adamws_step():
    state = make_state()
    head = state.parameters["transformer.head.weight"]
    before = head.detach().clone()
    head.grad = torch.ones_like(head)
    state.update(0)
    assert torch.allclose(before - head.detach(), torch.full_like(head, 1e-3), atol=1e-6)


def test_loaded_it_goes_on_bit_for_bit(tmp_path):
    whole, first, second = (make_state(seed, ema_decay=0.9) for seed in (0, 0, 1))
    take_steps(whole, 0, 5)
    take_steps(first, 0, 3)
    second.load(on_disk(first, tmp_path), is_parallel=False)
    take_steps(second, 3, 2)
    assert_same(copies(second), copies(whole))


def test_without_gradient_nothing_moves():
    state = make_state()
    before = copies(state)
    state.update(0)
    assert_same({n: t for n, t in copies(state).items() if n.startswith("weights.")}, before)


@pytest.mark.parametrize("name", ["muon", "adamw8bit"])
def test_it_is_refused_with_shards(name, training_world, tmp_path):
    from refalign_training.run.checks import check
    from tests.training.small_run import run_command

    changes = {"optimizer.name": name, "parallel": "fsdp2"}
    with pytest.raises(ValueError, match=f"{name} does not work with fsdp2"):
        check(run_command(tmp_path, training_world.wan, training_world.cache, **changes))
