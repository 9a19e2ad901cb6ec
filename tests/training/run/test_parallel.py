"""Two processes do what one does: the same batches, gradients and numbers, killed and gone on with."""

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign.owner import owned_folder
from refalign_training.method.objective import Batch
from refalign_training.method.options import ObjectiveOptions
from refalign_training.run.batches import load_batches
from refalign_training.run.checkpoint import find_checkpoint, read_state, read_tensors
from refalign_training.run.config import RunCommand
from refalign_training.run.inputs import CachedSamples
from refalign_training.run.log import read_metrics
from refalign_training.run.order import Order
from tests.training.small_run import (
    assert_equal_runs,
    assert_holds_no_base,
    changed,
    final_tensors,
    resumed,
    run_command,
    start,
    stop,
    train,
    train_with_kills,
    wait,
)


# -- The batches ------------------------------------------------------------------------------------------------------


class SmallSamples:
    """Samples of so many references each."""

    name, fingerprint = "small", "small"

    def __init__(self, references: list[int]) -> None:
        self.buckets = np.array([(5, 16, 16, count) for count in references], np.int32)

    def id(self, row: int) -> str:
        return f"sample {row}"

    def read(self, row: int, seed: int, epoch: int) -> dict[str, torch.Tensor]:
        references = int(self.buckets[row, 3])
        return {
            "latents": torch.full((16, 2, 2, 2), float(row)),
            "reference_latents": torch.full((16, references, 2, 2), float(row) + 1),
            "prompt_embeds": torch.full((1 + row % 3, 4), float(row) + epoch),
            "subjects": torch.arange(references),
        }

    def encode(self, read: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return read

    def empty_prompt_embeds(self) -> torch.Tensor:
        return torch.zeros(1, 4)


def global_batches(
    samples: SmallSamples, order: Order, world_size: int, first_step: int, steps: int
) -> dict[tuple[int, int], Batch]:
    """What all processes take together, by step and number in it."""
    turns = order.micro_batches // world_size
    taken = {}
    for rank in range(world_size):
        batches = load_batches(
            samples,
            order,
            ObjectiveOptions(max_sequence_length=4),
            rank=rank,
            world_size=world_size,
            first_step=first_step,
            steps=steps,
            workers=0,
            encodes=False,
        )
        for place, batch in enumerate(batches):
            taken[first_step + place // turns, place % turns * world_size + rank] = batch
    return taken


def assert_equal_batches(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        same = torch.equal(value, vars(other)[name]) if isinstance(value, torch.Tensor) else value == vars(other)[name]
        assert same, name


@settings(deadline=None, max_examples=25)
@given(
    references=st.lists(st.integers(1, 3), min_size=1, max_size=20),
    micro=st.integers(1, 3),
    times=st.integers(1, 2),
    seed=st.integers(0, 2**32),
    gone=st.integers(0, 3),
)
def test_any_number_of_processes_takes_the_same_batches_from_any_step_on(references, micro, times, seed, gone):
    samples = SmallSamples(references)
    order = Order(samples.buckets, np.arange(len(references)), 4 * micro * times, micro, seed)
    expected = global_batches(samples, order, world_size=1, first_step=0, steps=5)
    assert len(expected) == 5 * 4 * times
    for world_size in (2, 4):
        taken = global_batches(samples, order, world_size, first_step=gone, steps=5)
        assert taken.keys() == {place for place in expected if place[0] >= gone}
        for place, batch in taken.items():
            assert_equal_batches(batch, expected[place])


# -- The gradients ----------------------------------------------------------------------------------------------------


MODES = ("ddp", "fsdp2")
KINDS = ("lora", "full")
ONE_STEP = {
    "steps": 1,
    "batch.size": 8,
    "batch.micro": 1,
    "optimizer.max_grad_norm": 0.0,
    "log.gradients_every": 1,
    "objective.no_references": 0.3,
}


def one_step(folder: Path, world: Any, kind: str, **changes: Any) -> RunCommand:
    return run_command(folder, world.wan, world.cache, training=kind, **ONE_STEP | changes)


@pytest.fixture(scope="module")
def seed(training_world) -> int:
    """Whose first step has two processes take samples of one and of two references at the same time, both ways."""
    samples = CachedSamples(training_world.cache, needs_teacher=True)
    for seed in range(100):
        order = Order(samples.buckets, np.arange(8), 8, 1, seed)
        counts = [samples.buckets[order(0, number).rows[0], 3] for number in range(8)]
        if {(1, 2), (2, 1)} <= set(zip(counts[::2], counts[1::2], strict=True)):
            return seed
    raise AssertionError("no such seed")


# Each mode and each kind of training once; the slow ones are the other pairs
COMBINATIONS = [
    ("lora", "ddp"),
    ("full", "fsdp2"),
    pytest.param("lora", "fsdp2", marks=pytest.mark.slow),
    pytest.param("full", "ddp", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory, training_world, seed) -> RunCommand:
    """The command of a step of one process."""
    command = one_step(tmp_path_factory.mktemp("alone") / "run", training_world, request.param, seed=seed)
    train(command)
    return command


@pytest.fixture(scope="module")
def together(request, alone) -> Path:
    """The same step of two processes."""
    folder = alone.output.with_name(request.param)
    return train(changed(alone, output=folder, parallel=request.param), processes=2)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    """Each tensor, relative to its norm."""
    assert one.keys() == other.keys()
    far = {name: ((one[name] - other[name]).norm() / other[name].norm()).item() for name in one if other[name].any()}
    assert {name: distance for name, distance in far.items() if not distance <= tolerance} == {}


def gradients(output: Path) -> dict[str, torch.Tensor]:
    """A tenth of them: the optimiser's average after its first step."""
    return read_tensors(find_checkpoint(output), "optimizer.exp_avg.")


@pytest.mark.parametrize(("alone", "together"), COMBINATIONS, indirect=True, scope="module")
def test_two_processes_have_the_gradients_of_one(alone, together):
    assert_close(gradients(together), gradients(alone.output), 1e-6)


@pytest.mark.parametrize("alone", KINDS, indirect=True, scope="module")
def test_gradients_are_there_to_be_compared(alone):
    assert sum(gradient.norm() > 1e-4 for gradient in gradients(alone.output).values()) > 15


@pytest.mark.parametrize(("alone", "together"), [COMBINATIONS[0], COMBINATIONS[2]], indirect=True, scope="module")
def test_a_checkpoint_of_two_processes_holds_nothing_of_the_base(together):
    assert_holds_no_base(find_checkpoint(together))


# -- Killed, stopped, gone on with ------------------------------------------------------------------------------------


RUN = {
    "steps": 4,
    "checkpoints.every": 2,
    "batch.micro": 1,
    "data.workers": 1,
    "lora.dropout": 0.2,
    "optimizer.ema_decay": 0.9,
    "log.gradients_every": 3,  # not where a run goes on: it seeds too
    "validation.every": 2,
    "validation.samples": 1,
    "validation.videos": 1,
}
PAIRS = [
    pytest.param(("ddp", "lora"), id="ddp-lora", marks=pytest.mark.slow),
    pytest.param(("fsdp2", "full"), id="fsdp2-full"),
    pytest.param(("ddp", "full"), id="ddp-full", marks=pytest.mark.slow),
    pytest.param(("fsdp2", "lora"), id="fsdp2-lora", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=PAIRS)
def undisturbed(request, tmp_path_factory, training_world, larger_cache) -> RunCommand:
    """The command of a run of two processes that has come to its end."""
    mode, kind = request.param
    folder = tmp_path_factory.mktemp(f"{mode}-{kind}") / "run"
    command = run_command(folder, training_world.wan, larger_cache, parallel=mode, training=kind, **RUN)
    train(command, processes=2)
    return command


def test_two_killed_processes_come_to_the_same_tensors(undisturbed, tmp_path):
    command = changed(undisturbed, output=tmp_path / "run")
    assert_equal_runs(train_with_kills(command, processes=2), undisturbed.output)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_many_kills_of_two_processes(undisturbed, tmp_path, seed):
    command = changed(undisturbed, output=tmp_path / "run", **{"checkpoints.every": 1})
    assert_equal_runs(train_with_kills(command, processes=2, kills=2, seed=seed), undisturbed.output)


@pytest.mark.slow  # of one process: test_trainer.py
def test_validation_changes_nothing(undisturbed, tmp_path):
    command = changed(undisturbed, output=tmp_path / "run", **{"validation.every": 0})
    assert_equal_runs(train(command, processes=2), undisturbed.output)


def test_one_process_goes_on_with_what_two_began(undisturbed, tmp_path):
    begun = changed(undisturbed, output=tmp_path / "run", steps=2)
    train(begun, processes=2)
    train(changed(begun, steps=4, resume="latest"))
    assert_close(final_tensors(begun.output), final_tensors(undisturbed.output), 1e-3)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(undisturbed, tmp_path):
    begun = changed(undisturbed, output=tmp_path / "run", steps=2)
    train(begun)
    train(changed(begun, steps=4, resume="latest"), processes=2)
    assert_close(final_tensors(begun.output), final_tensors(undisturbed.output), 1e-3)


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def stopped(request, tmp_path_factory, training_world) -> tuple[RunCommand, list[int | None]]:
    """A run of two processes one of which was told to stop: its command, and the exit codes."""
    options = {"steps": 8, "checkpoints.every": 3, "log.every": 1, "parallel": request.param, "lora.dropout": 0.2}
    folder = tmp_path_factory.mktemp("stopped") / "run"
    command = run_command(folder, training_world.wan, training_world.cache, **options)
    return command, stop(command, signal.SIGTERM, processes=2, rank=1)


def test_what_two_did_until_a_signal_to_one_is_saved(stopped):
    command, codes = stopped
    logged = [line["step"] for line in read_metrics(command.output / "metrics.jsonl")]
    assert codes[1] == 143
    assert read_state(find_checkpoint(command.output))["step"] == max(logged) < command.steps


def test_all_processes_stop_if_one_is_told_to(stopped):
    assert stopped[1] == [143, 143]


def test_two_stopped_processes_come_to_the_same_tensors(stopped, tmp_path):
    command, _ = stopped
    copy = changed(command, output=Path(shutil.copytree(command.output, tmp_path / "run")))
    undisturbed = train(changed(command, output=tmp_path / "undisturbed"), processes=2)
    assert_equal_runs(train(resumed(copy), processes=2), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_three_killed_processes_come_to_the_same_tensors(training_world, tmp_path, mode):
    """With three summands the order counts, unlike with two."""
    options = {"training": "full", "batch.size": 6, "batch.micro": 1, "parallel": mode}
    command = run_command(tmp_path / "run", training_world.wan, training_world.cache, **options)
    undisturbed = train(changed(command, output=tmp_path / "undisturbed"), processes=3)
    assert_equal_runs(train_with_kills(command, processes=3), undisturbed)


# -- An alignment that ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_an_alignment_may_end_in_the_middle_of_a_run(training_world, tmp_path, kind, mode):
    options = {"steps": 6, "checkpoints.every": 1, "alignment.stop_step": 2, "log.gradients_every": 1}
    options |= {"parallel": mode, "training": kind}
    command = run_command(tmp_path / "two", training_world.wan, training_world.cache, **options)
    train(command, processes=2)
    alone = train(changed(command, output=tmp_path / "one"))
    assert_close(final_tensors(command.output), final_tensors(alone), 1e-3)
    begun = changed(command, output=tmp_path / "killed", steps=3)
    train(begun, processes=2)
    killed = changed(begun, steps=6)
    assert_equal_runs(train_with_kills(killed, processes=2, kills=2), command.output)


def test_all_processes_of_a_second_run_are_refused(training_world, tmp_path):
    command = run_command(tmp_path / "run", training_world.wan, training_world.cache)
    with owned_folder(command.output):
        assert wait(start(command, processes=2)) == [1, 1]
        assert [path.name for path in command.output.iterdir()] == [".lock"]
