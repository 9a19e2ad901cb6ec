"""The optimiser, its schedule, the average of the weights, and how they come from and to the disk."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refalign_training.run.checkpoint import save_checkpoint
from refalign_training.run.config import OptimizerOptions
from refalign_training.run.parallel import Parallel
from refalign_training.run.state import TrainState, learning_rate_factor


class Block(nn.Module):
    """One parameter of each kind that a transformer has."""

    def __init__(self, seed: int = 0, size: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.conv = nn.Conv3d(1, 2, 2)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, size))
        self.frozen = nn.Parameter(torch.randn(size, size), requires_grad=False)


def make_state(seed: int = 0, steps: int = 100, size: int = 4, **options) -> TrainState:
    modules = {"transformer": Block(seed, size), "alignment": nn.Linear(size, 2)}
    return TrainState(modules, OptimizerOptions(**{"lr": 1e-2} | options), steps)


def set_gradients(state: TrainState, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in state.parameters.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def take_steps(state: TrainState, first: int, count: int) -> None:
    for step in range(first, first + count):
        set_gradients(state, step)
        state.update(step)
        state.optimizer.zero_grad()


def copies(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def on_disk(state: TrainState, folder: Path, step: int = 1) -> Path:
    return save_checkpoint(folder, state.tensors(), {"step": step}, Parallel(device="cpu"))


# -- The learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", {4: 1.0, 54: 1.0, 103: 1.0}),
        ("linear", {4: 1.0, 54: 0.5, 103: 0.01, 104: 0.0}),
        ("cosine", {4: 1.0, 29: 0.853553, 54: 0.5, 79: 0.146447, 104: 0.0}),
    ],
)
def test_each_schedule_warms_up_and_ends(schedule, factors):
    options = OptimizerOptions(schedule=schedule, warmup_steps=4)
    warm_up = [learning_rate_factor(step, 104, options) for step in range(4)]
    assert warm_up == [0.25, 0.5, 0.75, 1.0]
    assert {s: learning_rate_factor(s, 104, options) for s in factors} == pytest.approx(factors, abs=1e-6)


@given(
    steps=st.integers(1, 50),
    warmup_steps=st.integers(0, 60),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
)
def test_every_step_has_a_rate_above_zero_that_first_rises_and_then_falls(steps, warmup_steps, schedule):
    options = OptimizerOptions(schedule=schedule, warmup_steps=warmup_steps)
    factors = [learning_rate_factor(step, steps, options) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    rising, falling = factors[:warmup_steps], factors[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_the_rate_of_a_step_moves_the_weights():
    state = make_state(schedule="linear", steps=10, weight_decay=0.0)
    moved = []
    for step in (0, 5, 9):
        before = copies(state)
        set_gradients(state, seed=1)  # the same each time: Adam's step is then the learning rate
        state.update(step)
        bias = "weights.transformer.linear.bias"
        moved.append((state.tensors()[bias] - before[bias]).abs().mean().item())
    assert moved == pytest.approx([1e-2, 5e-3, 1e-3], rel=1e-2)


# -- Groups -----------------------------------------------------------------------------------------------------------


def groups(state: TrainState) -> dict[str, tuple[float, float]]:
    """Full learning rate and weight decay by name."""
    names = {id(parameter): name for name, parameter in state.parameters.items()}
    return {
        names[id(parameter)]: (group["full_lr"], group["weight_decay"])
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }


def test_only_matrices_decay():
    assert {name: decay for name, (_, decay) in groups(make_state(weight_decay=0.1)).items()} == {
        "transformer.linear.weight": 0.1,
        "transformer.linear.bias": 0.0,
        "transformer.norm.weight": 0.0,
        "transformer.norm.bias": 0.0,
        "transformer.conv.weight": 0.1,
        "transformer.conv.bias": 0.0,
        "transformer.scale_shift_table": 0.0,
        "alignment.weight": 0.1,
        "alignment.bias": 0.0,
    }


def test_no_vector_or_modulation_of_a_real_transformer_decays(transformer):
    decays = groups(TrainState({"transformer": transformer}, OptimizerOptions(weight_decay=0.1), 1))
    kept = {name.removeprefix("transformer.") for name, (_, decay) in decays.items() if decay == 0.0}
    assert kept == {n for n, p in transformer.named_parameters() if p.ndim == 1 or n.endswith("scale_shift_table")}


@pytest.mark.parametrize("projector_lr", [None, 0.5, 0.0])
def test_projectors_may_have_a_rate_of_their_own(projector_lr):
    rates = {name: lr for name, (lr, _) in groups(make_state(lr=0.1, projector_lr=projector_lr)).items()}
    of_projectors = {lr for name, lr in rates.items() if name.startswith("alignment.")}
    assert of_projectors == {0.1 if projector_lr is None else projector_lr}
    assert {lr for name, lr in rates.items() if name.startswith("transformer.")} == {0.1}


def test_frozen_weights_are_neither_trained_nor_saved():
    state = make_state(ema_decay=0.9)
    take_steps(state, 0, 1)
    assert [name for name in [*state.parameters, *state.tensors()] if "frozen" in name] == []


# -- Clipping ---------------------------------------------------------------------------------------------------------


def gradients(state: TrainState) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in state.parameters.values()])


@pytest.mark.parametrize(("max_grad_norm", "factor"), [(0.5, 0.05), (10.0, 1.0), (1e3, 1.0), (0.0, 1.0)])
def test_gradients_are_scaled_down_to_the_norm_and_never_by_0(max_grad_norm, factor):
    state = make_state(max_grad_norm=max_grad_norm)
    set_gradients(state, seed=0)
    set_gradients(state, seed=0, scale=10.0 / gradients(state).norm().item())
    before = gradients(state)
    assert state.clip_gradients() == pytest.approx(10.0)
    torch.testing.assert_close(gradients(state), factor * before)


def test_without_any_gradient_the_norm_is_0():
    assert make_state().clip_gradients() == 0.0


# -- The average ------------------------------------------------------------------------------------------------------


def test_the_average_is_that_of_a_plain_loop():
    state = make_state(ema_decay=0.5)
    name = "transformer.linear.weight"
    expected = state.parameters[name].detach().double()
    for step in range(12):
        take_steps(state, step, 1)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * state.parameters[name].detach().double()
        torch.testing.assert_close(state.averages[name].double(), expected, rtol=1e-5, atol=1e-7)


def test_projectors_have_no_average():
    assert {name.partition(".")[0] for name in make_state(ema_decay=0.9).averages} == {"transformer"}


def test_within_it_the_weights_are_their_averages():
    state = make_state(ema_decay=0.9)
    take_steps(state, 0, 3)
    averages = {name: average.clone() for name, average in state.averages.items()}
    with state.averaged():
        assert all(torch.equal(state.parameters[name], average) for name, average in averages.items())
    assert not any(torch.equal(state.parameters[name], average) for name, average in averages.items())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_afterwards_all_is_bit_for_bit_as_before(error):
    state = make_state(ema_decay=0.9)
    take_steps(state, 0, 3)
    before = copies(state)
    try:
        with state.averaged():
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert_same(state.tensors(), before)


def test_without_an_average_the_weights_stay():
    state = make_state()
    before = copies(state)
    with state.averaged():
        assert_same(state.tensors(), before)
    assert state.averages == {}


# -- On the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.9, "projector_lr": 0.3, "schedule": "cosine"},
        {"name": "adafactor"},
        {"name": "prodigy", "lr": 1.0, "weight_decay": 0.01, "warmup_steps": 2},
    ],
    ids=["", "all", "adafactor", "prodigy"],
)
def test_loaded_it_goes_on_bit_for_bit(tmp_path, options):
    whole, first, second = (make_state(seed, **options) for seed in (0, 0, 1))
    take_steps(whole, 0, 6)
    take_steps(first, 0, 3)
    second.load(on_disk(first, tmp_path), is_parallel=False)
    assert_same(second.tensors(), first.tensors())
    take_steps(second, 3, 3)
    assert_same(second.tensors(), whole.tensors())


def test_prodigy_goes_on_from_weights_that_began_at_zero(tmp_path):
    whole, first, second = (make_state(seed, name="prodigy", lr=1.0) for seed in (0, 0, 1))
    for state in (whole, first):
        state.parameters["transformer.linear.weight"].data.zero_()  # of which it keeps one number
    take_steps(whole, 0, 4)
    take_steps(first, 0, 2)
    second.load(on_disk(first, tmp_path), is_parallel=False)
    take_steps(second, 2, 2)
    assert_same(second.tensors(), whole.tensors())


def test_prodigy_finds_a_rate_of_its_own():
    state = make_state(name="prodigy", lr=1.0)
    before = state.tensors()["optimizer.group_0.d"].item()
    for step in range(20):
        for parameter in state.parameters.values():
            parameter.grad = parameter.detach().clone()  # towards zero
        state.update(step)
    assert state.tensors()["optimizer.group_0.d"].item() > 1.5 * before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": 5e-5}, "lr is 5e-05, but prodigy finds its own: pass optimizer.lr 1"),
        ({"lr": 1.0, "projector_lr": 0.5}, "projector_lr is 0.5 and lr 1: prodigy has one learning rate"),
    ],
)
def test_rates_that_prodigy_cannot_take_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        make_state(name="prodigy", **options)


def test_what_has_never_had_a_gradient_has_no_state_after_loading_either(tmp_path):
    states = make_state(0), make_state(1)
    for step in range(3):
        set_gradients(states[0], step)
        for name in ("alignment.weight", "alignment.bias"):
            states[0].parameters[name].grad = None
        states[0].update(step)
    states[1].load(on_disk(states[0], tmp_path), is_parallel=False)
    assert not any(name.startswith("optimizer.") and ".alignment." in name for name in states[0].tensors())
    assert_same(states[1].tensors(), states[0].tensors())
    for state in states:
        take_steps(state, 3, 2)
    assert_same(states[1].tensors(), states[0].tensors())


def test_an_untouched_state_is_loaded_as_one(tmp_path):
    first, second = make_state(0), make_state(1)
    second.load(on_disk(first, tmp_path), is_parallel=False)
    for state in (first, second):
        take_steps(state, 0, 2)
    assert_same(second.tensors(), first.tensors())


def test_loading_leaves_no_gradient(tmp_path):
    state = make_state()
    state.load(on_disk(make_state(1), tmp_path), is_parallel=False)
    assert all(parameter.grad is None for parameter in state.parameters.values())


def test_another_average_does_not_fit(tmp_path):
    checkpoint = on_disk(make_state(), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this run: missing \(7\): average\.transformer"):
        make_state(ema_decay=0.9).load(checkpoint, is_parallel=False)


def test_weights_alone_start_a_fresh_optimiser_and_average(tmp_path):
    first, second = make_state(0), make_state(1, ema_decay=0.9)
    take_steps(first, 0, 3)
    second.load_weights(on_disk(first, tmp_path), is_parallel=False)
    assert {name: t for name, t in second.tensors().items() if name.startswith("optimizer.")} == {}
    for name, parameter in first.parameters.items():
        assert torch.equal(second.parameters[name], parameter)
    for name, average in second.averages.items():
        assert torch.equal(average, first.parameters[name])


def test_weights_of_a_run_without_projectors_leave_ours(tmp_path):
    alone = TrainState({"transformer": Block(0)}, OptimizerOptions(), 1)
    state = make_state(1)
    before = copies(state)
    state.load_weights(on_disk(alone, tmp_path), is_parallel=False)
    assert torch.equal(state.tensors()["weights.alignment.weight"], before["weights.alignment.weight"])
    assert torch.equal(state.parameters["transformer.linear.weight"], alone.parameters["transformer.linear.weight"])


def test_weights_of_another_shape_do_not_start_a_run(tmp_path):
    checkpoint = on_disk(make_state(size=6), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this run: of another shape"):
        make_state().load_weights(checkpoint, is_parallel=False)


# -- 8 bits -----------------------------------------------------------------------------------------------------------


def test_8_bit_adam_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="adamw8bit needs bitsandbytes: pip install bitsandbytes"):
        make_state(name="adamw8bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_8_bit_adam_goes_on_bit_for_bit(tmp_path):
    # 96 x 96 = 9216: from 4096 on, bitsandbytes keeps the state in 8 bits
    whole, first, second = (make_state(seed, size=96, name="adamw8bit", ema_decay=0.9) for seed in (0, 0, 1))
    take_steps(whole, 0, 6)
    take_steps(first, 0, 3)
    assert first.tensors()["optimizer.state1.transformer.linear.weight"].dtype == torch.uint8
    second.load(on_disk(first, tmp_path), is_parallel=False)
    assert_same(second.tensors(), first.tensors())
    take_steps(second, 3, 3)
    assert_same(second.tensors(), whole.tensors())
    assert math.isfinite(second.tensors()["weights.transformer.linear.weight"].sum())
