"""Stopped or killed, a run goes on to the same numbers; and goes on only with what it began with."""

import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from refalign_training.run.checkpoint import find_checkpoint, read_state
from refalign_training.run.config import RunCommand
from refalign_training.run.log import read_metrics
from refalign_training.run.trainer import Trainer
from tests.training.small_run import (
    assert_equal_runs,
    assert_holds_no_base,
    changed,
    resumed,
    run_command,
    stop,
    train,
    train_with_kills,
)


# All that has a state or randomness of its own
EVERYTHING = {
    "steps": 6,
    "checkpoints.every": 2,
    "batch.micro": 1,
    "data.workers": 2,
    "lora.dropout": 0.2,
    "optimizer.ema_decay": 0.9,
    "optimizer.schedule": "cosine",
    "log.every": 1,
    "log.gradients_every": 3,  # not where a run goes on: it seeds too
    "validation.every": 3,
    "validation.samples": 1,
}
KINDS = {
    "lora": {},
    "full": {"training": "full", "batch.micro": 2},
    "bfloat16": {"model.precision": "bfloat16", "model.gradient_checkpointing": True},
}


# All weights are killed in test_parallel.py too
SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "bfloat16")]


@pytest.fixture(scope="module", params=["lora", *SLOW_KINDS])
def undisturbed(request, tmp_path_factory, training_world, larger_cache) -> RunCommand:
    """The command of a run that has come to its end."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    command = run_command(folder, training_world.wan, larger_cache, **EVERYTHING | KINDS[request.param])
    train(command)
    return command


def losses(output: Path) -> list[dict[str, Any]]:
    """What was logged, but for what is measured by a clock."""
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines]


def numbers(output: Path) -> list[int]:
    return [line["step"] for line in losses(output)]


# -- Killed, stopped --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(undisturbed) -> Path:
    """The same run, killed at a random moment."""
    return train_with_kills(changed(undisturbed, output=undisturbed.output.with_name("killed")))


def test_a_killed_run_comes_to_the_same_tensors(undisturbed, killed):
    assert_equal_runs(killed, undisturbed.output)


def test_a_killed_run_logs_the_same_losses(undisturbed, killed):
    assert losses(killed) == losses(undisturbed.output)


SIGNALS = [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SIGNALS, ids=lambda number: number.name)
def stopped(request, tmp_path_factory, training_world) -> SimpleNamespace:
    """A run of twelve steps that was told to stop: its command and its exit code."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    options = {"steps": 12, "checkpoints.every": 3, "batch.micro": 1, "log.every": 1, "lora.dropout": 0.2}
    command = run_command(folder, training_world.wan, training_world.cache, **options)
    (code,) = stop(command, request.param)
    return SimpleNamespace(command=command, code=code, signal=request.param)


def test_a_signal_is_told_by_the_exit_code(stopped):
    assert stopped.code == 128 + stopped.signal


def test_what_was_done_until_a_signal_is_saved(stopped):
    latest = read_state(find_checkpoint(stopped.command.output))["step"]
    assert latest == max(numbers(stopped.command.output)) < stopped.command.steps


def test_a_stopped_run_comes_to_the_same_tensors(stopped, tmp_path):
    undisturbed = train(changed(stopped.command, output=tmp_path / "undisturbed"))
    assert_equal_runs(train(resumed(stopped.command)), undisturbed)


def test_all_processes_of_a_job_may_get_the_signal(training_world, tmp_path):
    """A terminal sends it to the workers too, and clusters do."""
    options = {"data.workers": 2, "batch.size": 16, "batch.micro": 1, "steps": 12, "checkpoints.every": 2}
    command = run_command(tmp_path / "run", training_world.wan, training_world.cache, **options)
    assert stop(command, signal.SIGTERM, to_group=True) == [143]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills(undisturbed, tmp_path, seed):
    command = changed(undisturbed, output=tmp_path / "killed", **{"checkpoints.every": 1})
    assert_equal_runs(train_with_kills(command, kills=4, seed=seed), undisturbed.output)


# -- What a run may go on with ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, training_world) -> RunCommand:
    """The command of a LoRA run of two steps that is done."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    command = run_command(folder, training_world.wan, training_world.cache, steps=2, **{"lora.dropout": 0.2})
    train(command)
    return command


@pytest.fixture
def goes_on(finished, tmp_path) -> RunCommand:
    """The command that goes on with a copy of it."""
    shutil.copytree(finished.output, tmp_path / "run")
    return changed(finished, output=tmp_path / "run", resume="latest")


CHANGES = {
    "optimizer.lr": (2e-3, "optimizer.lr: 0.001 -> 0.002"),
    "seed": (1, "seed: 0 -> 1"),
    "batch.size": (8, "batch.size: 4 -> 8"),
    "lora.dropout": (0.0, "lora.dropout: 0.2 -> 0.0"),
    "alignment.stop_step": (5, "alignment.stop_step: None -> 5"),
    "model.precision": ("bfloat16", "model.precision: float32 -> bfloat16"),
    "training": ("full", "training: lora -> full"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_option_is_refused_by_name(goes_on, name):
    value, told = CHANGES[name]
    with pytest.raises(ValueError, match=f"other options or data: {re.escape(told)}. Pass the same ones, or --allow"):
        Trainer(changed(goes_on, **{name: value}))


def test_all_changed_options_are_told(goes_on):
    with pytest.raises(ValueError, match=r": optimizer.lr: 0.001 -> 0.002; seed: 0 -> 1. Pass"):
        Trainer(changed(goes_on, seed=1, **{"optimizer.lr": 2e-3}))


def test_another_length_is_refused_if_the_learning_rate_depends_on_it(training_world, tmp_path):
    cosine = {"optimizer.schedule": "cosine"}
    command = run_command(tmp_path / "run", training_world.wan, training_world.cache, steps=1, **cosine)
    train(command)
    with pytest.raises(ValueError, match=r"other options or data: steps: 1 -> 2\. Pass"):
        Trainer(changed(command, steps=2, resume="latest"))


def test_a_changed_dataset_is_refused(goes_on, larger_cache):
    with pytest.raises(ValueError, match="the dataset: cache of 8 samples -> cache of 12"):
        Trainer(changed(goes_on, **{"data.cache": larger_cache}))


def test_the_same_dataset_may_lie_elsewhere(goes_on, training_world, tmp_path):
    moved = shutil.copytree(training_world.cache, tmp_path / "moved")
    assert Trainer(changed(goes_on, **{"data.cache": moved})).step == 2


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "training"])
def test_a_changed_option_is_taken_if_that_is_allowed(goes_on, name):
    assert Trainer(changed(goes_on, allow_changes=True, **{name: CHANGES[name][0]})).step == 2


def test_a_changed_dataset_is_taken_if_that_is_allowed(goes_on, larger_cache):
    trainer = Trainer(changed(goes_on, allow_changes=True, **{"data.cache": larger_cache}))
    assert (trainer.step, len(trainer.rows)) == (2, 11)


def test_options_that_change_no_number_are_free(goes_on, finished, tmp_path):
    free = {"steps": 4, "data.workers": 1, "checkpoints.every": 1, "log.every": 1, "log.gradients_every": 1}
    train(changed(goes_on, **free))
    assert_equal_runs(goes_on.output, train(changed(finished, output=tmp_path / "longer", steps=4)))


MISFITS = {
    "of another kind": ({"training": "full"}, r"missing \(\d+\): weights.transformer"),
    "of another rank": ({"lora.rank": 8}, r"of another shape \(\d+\): weights.transformer.*lora_A"),
    "with other layers": ({"lora.targets": ("to_q", "to_k", "proj_out")}, r"missing \(\d\): .*proj_out.*lora_A"),
    "with an average": ({"optimizer.ema_decay": 0.9}, r"missing \(\d+\): average.transformer"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_though_changes_are_allowed(goes_on, name):
    changes, told = MISFITS[name]
    with pytest.raises(ValueError, match=f"step-00000002 does not fit this run: {told}"):
        Trainer(changed(goes_on, allow_changes=True, **changes))


def test_what_is_refused_changes_nothing(goes_on):
    before = {path: path.stat().st_mtime_ns for path in goes_on.output.rglob("*")}
    with pytest.raises(ValueError, match="seed"):
        Trainer(changed(goes_on, seed=1))
    assert {path: path.stat().st_mtime_ns for path in goes_on.output.rglob("*")} == before


def test_a_folder_with_a_run_is_refused_without_resume(finished):
    with pytest.raises(ValueError, match=r"holds a run already\. Pass --resume latest to go on, or another --output"):
        Trainer(finished)


def test_a_finished_run_has_nothing_to_go_on_with(goes_on, finished):
    train(goes_on)
    assert_equal_runs(goes_on.output, finished.output)


def test_an_earlier_checkpoint_is_gone_on_with_beside_later_ones(training_world, tmp_path):
    options = {"steps": 4, "checkpoints.every": 1, "checkpoints.keep_last": 4}
    command = run_command(tmp_path / "run", training_world.wan, training_world.cache, **options)
    undisturbed = shutil.copytree(train(command), tmp_path / "undisturbed")
    early = str(command.output / "checkpoints" / "step-00000001")
    train(changed(command, steps=2, resume=early, **{"checkpoints.keep_last": 1}))
    assert find_checkpoint(command.output).name == "step-00000002"
    assert numbers(command.output) == [2]
    assert_equal_runs(train(resumed(command)), undisturbed)


def test_a_damaged_latest_checkpoint_names_the_older_one_that_the_run_can_go_on_from(training_world, tmp_path):
    options = {"steps": 3, "checkpoints.every": 1}
    command = run_command(tmp_path / "run", training_world.wan, training_world.cache, **options)
    undisturbed = shutil.copytree(train(command), tmp_path / "undisturbed")
    file = next(find_checkpoint(command.output).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is damaged") as told:
        Trainer(changed(command, resume="latest"))
    older = str(told.value).partition("--resume ")[2]
    assert_equal_runs(train(changed(command, resume=older)), undisturbed)


# -- What a checkpoint holds ------------------------------------------------------------------------------------------


def test_a_lora_checkpoint_holds_nothing_of_the_base(finished):
    assert_holds_no_base(find_checkpoint(finished.output))


# -- The weights that adapters belong to ------------------------------------------------------------------------------


@pytest.fixture
def other_base(training_world, tmp_path) -> Path:
    """The world's pipeline with other weights in its transformer."""
    folder = Path(shutil.copytree(training_world.wan, tmp_path / "other"))
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_other_weights_in_the_place_of_the_base_are_refused(training_world, other_base, tmp_path):
    wan = Path(shutil.copytree(training_world.wan, tmp_path / "wan"))
    command = run_command(tmp_path / "run", wan, training_world.cache, steps=1)
    train(command)
    shutil.rmtree(wan)
    other_base.rename(wan)
    with pytest.raises(ValueError, match="the weights that the adapters were trained on"):
        Trainer(resumed(command))


def test_adapters_do_not_start_on_other_weights_than_their_own(finished, training_world, other_base, tmp_path):
    options = {"model.start": finished.output, "lora.dropout": 0.2}
    command = run_command(tmp_path / "run", other_base, training_world.cache, **options)
    with pytest.raises(ValueError, match="were trained on other weights"):
        Trainer(command)


def test_a_full_run_goes_on_without_the_files_it_started_from(training_world, tmp_path):
    wan = Path(shutil.copytree(training_world.wan, tmp_path / "wan"))
    options = {"training": "full", "checkpoints.every": 2, "steps": 4}
    command = run_command(tmp_path / "run", wan, training_world.cache, **options)
    undisturbed = Path(shutil.copytree(train(command), tmp_path / "undisturbed"))
    for weights in (wan / "transformer").glob("*.safetensors"):
        weights.unlink()
    early = str(command.output / "checkpoints/step-00000002")
    assert_equal_runs(train(changed(command, resume=early)), undisturbed)
