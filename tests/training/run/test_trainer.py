"""What the training loop does: its guard, its numbers, its signals, its folder, and what it starts from."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from refalign.hub import PROJECTORS
from refalign.keys import diffusers_to_native
from refalign_training import cli
from refalign_training.publish.export import ExportCommand, export
from refalign_training.run import trainer
from refalign_training.run.checkpoint import find_checkpoint, read_projectors, read_state, read_tensors
from refalign_training.run.config import to_yaml
from refalign_training.run.log import NUM_BINS, read_metrics
from refalign_training.run.trainer import Trainer, run
from tests.tiny_models import GOLDEN_FILES
from tests.tiny_pipeline import tiny_transformer
from tests.training.small_cache import item_file
from tests.training.small_run import (
    World,
    assert_equal_runs,
    changed,
    final_tensors,
    kill,
    run_command,
    start,
    wait,
    wait_for_a_checkpoint,
)


@pytest.fixture
def command(training_world, tmp_path):
    """The command of a run in a folder of its own, with other options."""

    def make(name: str = "run", cache: Path | None = None, **changes):
        return run_command(tmp_path / name, training_world.wan, cache or training_world.cache, **changes)

    return make


def skipped(output: Path) -> list[dict]:
    return read_metrics(output / "skipped.jsonl")


def ids_by_step(command, steps: int) -> list[list[str]]:
    """The samples that each step of a run takes."""
    batches = Trainer(changed(command, output=command.output.with_name("ids"))).batches
    per_step = command.batch.size // command.batch.micro
    return [[name for _ in range(per_step) for name in next(batches).ids] for _ in range(steps)]


# -- The guard --------------------------------------------------------------------------------------------------------


def poison(cache: Path, sample_id: str) -> None:
    """Writes a sample's latents as not a number: the file is whole, its content is not."""
    file = item_file(cache, sample_id, "video")
    with safe_open(file, "pt") as opened:
        metadata, latents = opened.metadata(), opened.get_tensor("latents").clone()
    latents[0, 0, 0, 0] = torch.nan
    save_file({"latents": latents}, file, metadata)


@pytest.fixture
def poisoned(training_world: World, tmp_path) -> Path:
    """A cache one of whose samples makes every loss not a number."""
    shutil.copytree(training_world.cache, tmp_path / "poisoned")
    poison(tmp_path / "poisoned", "clip03")
    return tmp_path / "poisoned"


def every_step(**changes) -> dict:
    return {"checkpoints.every": 1, "checkpoints.keep_last": 100, "log.every": 1, "steps": 4} | changes


def test_a_step_that_is_not_finite_changes_nothing(command, poisoned):
    asked = command(cache=poisoned, **every_step(**{"optimizer.ema_decay": 0.9, "steps": 6}))
    assert run(asked) == 0
    bad = [line["step"] for line in skipped(asked.output)]
    assert bad == [step + 1 for step, ids in enumerate(ids_by_step(asked, 6)) if "clip03" in ids]
    assert 0 < len(bad) < 6
    states = {step: tensors_of_step(asked.output, step) for step in range(1, 7)}
    assert all(tensor.isfinite().all() for tensors in states.values() for tensor in tensors.values())
    for step in range(2, 7):
        same = states[step].keys() == states[step - 1].keys() and all(
            torch.equal(states[step][name], states[step - 1][name]) for name in states[step]
        )
        assert same == (step in bad), step


def tensors_of_step(output: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(output / f"checkpoints/step-{step:08d}", "")


def test_what_was_skipped_is_listed_and_told(command, poisoned, caplog):
    asked = command(cache=poisoned, **every_step())
    assert run(asked) == 0
    for line in skipped(asked.output):
        assert line["ids"] == ["clip03"]
        assert line["reason"] == "loss or gradient (norm nan) is not finite"
        assert f"Step {line['step']} is skipped: {line['reason']}. Samples: clip03" in caplog.text


def test_no_number_of_a_skipped_step_is_logged(command, poisoned):
    asked = command(cache=poisoned, **every_step(**{"log.gradients_every": 1}))
    assert run(asked) == 0
    bad = {line["step"] for line in skipped(asked.output)}
    lines = {line["step"]: line for line in read_metrics(asked.output / "metrics.jsonl")}
    assert lines.keys() == {1, 2, 3, 4}
    assert {step for step, line in lines.items() if None in line.values()} == set()
    assert {step for step, line in lines.items() if "loss" not in line} == bad


def test_skipped_steps_in_a_row_end_the_run(command, poisoned):
    asked = command(cache=poisoned, max_skipped_steps=3, **{"batch.size": 8})  # all samples at each step
    with pytest.raises(ValueError, match=r"3 steps in a row were not finite, the last one with clip03.*skipped.jsonl"):
        run(asked)
    assert [line["step"] for line in skipped(asked.output)] == [1, 2, 3]


def test_skipped_steps_are_counted_beyond_a_resume(command, poisoned):
    asked = command(cache=poisoned, max_skipped_steps=3, steps=2, **{"batch.size": 8})
    assert run(asked) == 0
    assert read_state(find_checkpoint(asked.output))["skipped_in_a_row"] == 2
    with pytest.raises(ValueError, match="3 steps in a row"):
        run(changed(asked, steps=10, resume="latest"))
    assert [line["step"] for line in skipped(asked.output)] == [1, 2, 3]


def test_a_good_step_begins_the_count_anew(command, poisoned):
    asked = command(cache=poisoned, max_skipped_steps=2, steps=6)
    bad = ["clip03" in names for names in ids_by_step(asked, 6)]
    assert sum(bad) >= 2 and not any(a and b for a, b in pairwise(bad))
    assert run(asked) == 0


# -- One owner --------------------------------------------------------------------------------------------------------


def test_the_second_run_of_a_folder_is_told_who_has_it(command):
    asked = command(steps=100_000, **{"checkpoints.every": 1})
    (first,) = start(asked)
    wait_for_a_checkpoint(asked.output, [first])
    before = find_checkpoint(asked.output)
    try:
        with pytest.raises(ValueError, match=rf"run is in use by process {first.pid} on .* since .*Wait for it"):
            run(changed(asked, resume="latest"))
    finally:
        kill([first])
    assert before.parent.is_dir()
    assert run(changed(asked, resume="latest", steps=read_state(find_checkpoint(asked.output))["step"])) == 0


def test_a_run_that_is_refused_leaves_no_folder(command):
    asked = command(**{"model.base": "nowhere"})
    with pytest.raises(ValueError, match="nowhere"):
        run(asked)
    assert not asked.output.exists()


def test_a_run_removes_what_a_killed_one_has_left(command):
    asked = command(steps=1)
    (asked.output / ".config.yaml.abcdefgh.partial").mkdir(parents=True)
    (asked.output / ".lock").write_text("process 1 on another machine")
    assert run(asked) == 0
    assert list(asked.output.rglob(".*")) == []


# -- Samples that cannot be read --------------------------------------------------------------------------------------


@pytest.fixture
def incomplete(training_world: World, tmp_path) -> Path:
    """A cache that has lost the video of a sample with two references."""
    shutil.copytree(training_world.cache, tmp_path / "incomplete")
    item_file(tmp_path / "incomplete", "clip03", "video").unlink()
    return tmp_path / "incomplete"


def test_another_sample_of_its_bucket_takes_the_place_of_an_unreadable_one(command, incomplete):
    whole = chain.from_iterable(ids_by_step(command("whole"), 6))
    pairs = list(zip(whole, chain.from_iterable(ids_by_step(command(cache=incomplete), 6)), strict=True))
    assert [a for a, b in pairs if a != b] == ["clip03"] * 3  # an epoch has 2 steps
    assert {b for a, b in pairs if a != b} <= {"clip01", "clip05", "clip07"}


def test_an_unreadable_sample_is_listed_and_told(command, incomplete, caplog):
    asked = command(cache=incomplete, steps=6)
    whole = ids_by_step(command("whole"), 6)
    assert run(asked) == 0
    assert [(line["step"], line["ids"]) for line in skipped(asked.output)] == [
        (step + 1, ["clip03"]) for step, names in enumerate(whole) for name in names if name == "clip03"
    ]
    assert "clip03 cannot be used; another sample takes its place: " in caplog.text


def test_with_an_unreadable_sample_runs_are_still_equal(command, incomplete):
    one, other = command("one", cache=incomplete, steps=4), command("other", cache=incomplete, steps=2)
    assert run(one) == run(other) == run(changed(other, steps=4, resume="latest")) == 0
    assert_equal_runs(one.output, other.output)
    assert skipped(one.output) == skipped(other.output)


# -- Looking on changes nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", ["lora", "full"])
def test_validation_and_logs_change_no_bit(command, larger_cache, training):
    changes = {"training": training, "lora.dropout": 0.2, "optimizer.ema_decay": 0.9, "steps": 2}
    plain = command("plain", larger_cache, **changes, **{"validation.samples": 1})
    watched = changed(
        plain,
        output=plain.output.with_name("watched"),
        **{"validation.every": 1, "validation.videos": 1, "log.every": 1, "log.gradients_every": 2},
        **{"checkpoints.every": 1},
    )
    assert run(plain) == run(watched) == 0
    assert_equal_runs(plain.output, watched.output)
    assert len(list((watched.output / "samples").glob("*/*.mp4"))) == 2


def test_held_out_samples_are_never_trained_on(command, larger_cache):
    asked = command(cache=larger_cache, **{"validation.samples": 1, "validation.every": 1})
    (held_out,) = (name for name, _ in Trainer(asked).validation.values)
    seen = set(chain.from_iterable(ids_by_step(asked, 10)))
    assert seen == {f"clip{number:02d}" for number in range(12)} - {held_out}


def test_a_validation_by_the_average_is_that_of_the_average(command, larger_cache):
    asked = command(cache=larger_cache, steps=3, **{"validation.every": 3, "optimizer.ema_decay": 0.9})
    assert run(asked) == 0
    logged = next(line for line in read_metrics(asked.output / "metrics.jsonl") if "validation/mse" in line)
    again = Trainer(changed(asked, resume="latest"))
    last = again.validation.losses(again.objective, 2)
    with again.state.averaged():
        average = again.validation.losses(again.objective, 2)
    assert {name: logged[name] for name in average} == average
    assert average != last


# -- Numbers ----------------------------------------------------------------------------------------------------------


def test_every_number_of_a_step_is_logged(command):
    asked = command(**every_step(**{"log.gradients_every": 2, "optimizer.warmup_steps": 2, "batch.size": 8}))
    asked = changed(asked, **{"objective.no_references": 0.0, "objective.neither": 0.0})
    assert run(asked) == 0
    lines = read_metrics(asked.output / "metrics.jsonl")
    always = {
        *("step", "loss", "loss/diffusion", "loss/mse", "loss/alignment", "learning_rate", "gradients/norm"),
        *("alignment/cosine", "alignment/cosine_block_0", "alignment/cosine_block_1"),
        *("alignment/active_negatives", "alignment/active_negatives_block_0", "alignment/active_negatives_block_1"),
        *("speed/samples_per_second", "speed/data_wait", "memory/peak_gib"),
    }
    measured = {"gradients/diffusion", "gradients/alignment", "gradients/ratio"}
    bins = {f"mse_by_timestep/{100 * i:03d}-{100 * (i + 1):03d}" for i in range(NUM_BINS)}
    for line in lines:
        assert line.keys() - bins == always | (measured if line["step"] in (1, 3) else set()), line["step"]
        assert line.keys() & bins
        assert all(np.isfinite(value) for value in line.values())
        assert 0 <= line["speed/data_wait"] <= 1
        assert line["speed/samples_per_second"] > 0
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


def test_the_ratio_of_gradients_is_that_of_their_norms(command):
    asked = command(**every_step(**{"log.gradients_every": 1, "steps": 2}))
    assert run(asked) == 0
    for line in read_metrics(asked.output / "metrics.jsonl"):
        assert line["gradients/ratio"] == pytest.approx(line["gradients/alignment"] / line["gradients/diffusion"])


def test_gradients_of_a_step_of_one_micro_batch_add_up(command):
    """The norm of a sum is at most the sum of norms, and at least their difference."""
    asked = command(**every_step(**{"log.gradients_every": 1, "batch.micro": 4, "steps": 2, "alignment.weight": 3.0}))
    assert run(asked) == 0
    for line in read_metrics(asked.output / "metrics.jsonl"):
        total, parts = line["gradients/norm"], (line["gradients/diffusion"], line["gradients/alignment"])
        assert abs(parts[0] - parts[1]) <= total * 1.0001 and total <= sum(parts) * 1.0001


def test_without_alignment_there_is_nothing_of_it(command):
    asked = command(**every_step(**{"log.gradients_every": 1, "alignment.weight": 0.0}))
    assert run(asked) == 0
    names = {name for line in read_metrics(asked.output / "metrics.jsonl") for name in line}
    assert "loss" in names
    assert not [name for name in names if "alignment" in name or name == "gradients/ratio"]
    assert not [name for name in final_tensors(asked.output) if "alignment" in name]


def test_a_loss_logged_over_steps_is_the_mean_of_theirs(command):
    single, pairs = command("single", **every_step()), command("pairs", **every_step(**{"log.every": 2}))
    assert run(single) == run(pairs) == 0
    losses = [line["loss"] for line in read_metrics(single.output / "metrics.jsonl")]
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2)]
    assert [line["loss"] for line in read_metrics(pairs.output / "metrics.jsonl")] == pytest.approx(means)


# -- Signals ----------------------------------------------------------------------------------------------------------


# SIGTERM is sent to a run in test_resume.py too
SIGNALS = [
    pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow, id="term"),
    pytest.param(signal.SIGINT, 130, id="int"),
]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_and_saves_the_step(command, number, code):
    changes = {"steps": 100_000, "log.every": 1, "checkpoints.every": 100_000, "data.workers": 0}
    asked = command("stopped", **changes)
    (process,) = started = start(asked)
    while not (asked.output / "metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, number)
    assert wait(started) == [code]
    step = read_state(find_checkpoint(asked.output))["step"]
    assert step == read_metrics(asked.output / "metrics.jsonl")[-1]["step"]
    whole = command("whole", steps=step)
    assert run(whole) == 0
    assert_equal_runs(asked.output, whole.output)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_reaches_the_whole_group_of_a_real_run(command, tmp_path, workers):
    asked = command("stopped", **{"steps": 100_000, "log.every": 1, "data.workers": workers})
    (tmp_path / "run.yaml").write_text(yaml_of(asked))
    words = ["-m", "refalign_training.cli", "run", "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen([sys.executable, *words], start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (asked.output / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert read_state(find_checkpoint(asked.output))["step"] > 0


# -- The run's folder -------------------------------------------------------------------------------------------------


def yaml_of(asked) -> str:
    return to_yaml(asked)


def test_its_config_makes_the_same_run(command, tmp_path):
    changes = {"training": "full", "seed": 7, "optimizer.ema_decay": 0.5, "optimizer.projector_lr": 1e-2, "steps": 3}
    asked = command(**changes, **{"optimizer.schedule": "cosine", "optimizer.warmup_steps": 1, "batch.micro": 1})
    assert run(asked) == 0
    words = ["run", "--config", str(asked.output / "config.yaml"), "--output", str(tmp_path / "again")]
    assert cli.main(words) == 0
    assert_equal_runs(asked.output, tmp_path / "again")
    first, second = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("run", "again"))
    assert first.pop("output") != second.pop("output")
    assert first == second


def test_its_timesteps_are_drawn(command, monkeypatch):
    drawn = []
    monkeypatch.setattr(trainer, "plot_timesteps", lambda *asked: drawn.append(asked))
    asked = command(**{"alignment.gate_power": 2.0})
    Trainer(asked)
    assert drawn == [("refalign", asked.output / "timesteps.png", 2.0)]


def test_sample_videos_are_in_a_folder_of_their_step(command, larger_cache):
    asked = command(cache=larger_cache, steps=3, **{"validation.every": 2, "validation.videos": 1})
    assert run(asked) == 0
    (name,) = (name for name, _ in Trainer(changed(asked, output=asked.output.with_name("x"))).validation.values)
    samples = asked.output / "samples"
    assert sorted(str(path.relative_to(samples)) for path in samples.rglob("*.*")) == [
        f"step-{step:08d}/{name}.{end}" for step in (2, 3) for end in ("mp4", "png")
    ]


# -- What a run starts from -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_1(training_world: World, tmp_path_factory) -> Path:
    """A run of all weights, with projectors."""
    folder = tmp_path_factory.mktemp("stages") / "stage1"
    asked = run_command(folder, training_world.wan, training_world.cache, training="full", steps=2)
    assert run(asked) == 0
    return folder


@pytest.fixture(scope="module")
def stage_1_lora(training_world: World, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "stage1"
    assert run(run_command(folder, training_world.wan, training_world.cache, steps=2)) == 0
    return folder


@pytest.fixture(scope="module")
def exported(stage_1, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "stage1"
    export(ExportCommand(stage_1, folder, dtype="float32"))
    return folder


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weights.")}


def assert_begins_with(begun: Trainer, expected: dict[str, torch.Tensor]) -> None:
    """A run at step 0 with these weights and a fresh optimiser."""
    assert begun.step == 0
    actual = begun.state.tensors()
    assert [name for name in actual if name.startswith("optimizer.")] == []
    actual = weights(actual)
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000002"])
def test_stage_2_begins_with_the_last_weights_and_projectors_of_stage_1(command, stage_1, part):
    begun = Trainer(command(training="full", seed=1, **{"model.start": stage_1 / part}))
    assert_begins_with(begun, weights(final_tensors(stage_1)))


def test_stage_2_of_a_lora_begins_with_its_adapters_and_projectors(command, stage_1_lora):
    begun = Trainer(command(seed=1, **{"model.start": stage_1_lora}))
    assert_begins_with(begun, weights(final_tensors(stage_1_lora)))


def test_the_average_of_stage_2_begins_with_the_weights(command, stage_1):
    begun = Trainer(command(training="full", **{"model.start": stage_1, "optimizer.ema_decay": 0.9}))
    for name, average in begun.state.averages.items():
        assert torch.equal(average, begun.state.parameters[name])


def test_stage_2_trains_and_resumes(command, stage_1):
    changes = {"training": "full", "model.start": stage_1, "seed": 1}
    whole, parted = command("whole", steps=4, **changes), command("parted", steps=2, **changes)
    assert run(whole) == run(parted) == run(changed(parted, steps=4, resume="latest")) == 0
    assert_equal_runs(whole.output, parted.output)


def test_stage_2_begins_with_what_was_exported(command, exported, stage_1):
    begun = Trainer(command(training="full", seed=1, **{"model.start": exported}))
    assert_begins_with(begun, weights(final_tensors(stage_1)))


def test_a_lora_begins_on_the_exported_weights(command, exported, stage_1):
    begun = Trainer(command(seed=1, **{"model.start": exported}))
    base = {name.removeprefix("weights.transformer."): tensor for name, tensor in final_tensors(stage_1).items()}
    adapted = dict(begun.transformer.named_parameters())
    name = "blocks.0.attn1.to_q.{}weight"
    assert torch.equal(adapted[name.format("base_layer.")], base[name.format("")])
    actual = {name: tensor for name, tensor in begun.state.tensors().items() if ".alignment." in name}
    assert actual.keys() == {name for name in weights(final_tensors(stage_1)) if ".alignment." in name}
    assert all(torch.equal(tensor, final_tensors(stage_1)[name]) for name, tensor in actual.items())


def native_parts(stage_1: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    transformer = {
        name.removeprefix("weights.transformer."): tensor
        for name, tensor in final_tensors(stage_1).items()
        if name.startswith("weights.transformer.")
    }
    return diffusers_to_native(transformer), read_projectors(find_checkpoint(stage_1))


def test_stage_2_begins_with_a_native_file_with_projectors(command, stage_1, tmp_path):
    transformer, projectors = native_parts(stage_1)
    save_file(transformer | projectors, tmp_path / "stage1.safetensors")
    begun = Trainer(command(training="full", seed=1, **{"model.start": tmp_path / "stage1.safetensors"}))
    assert_begins_with(begun, weights(final_tensors(stage_1)))


@pytest.mark.parametrize("kind", ["file", "exported"])
def test_without_projectors_they_begin_as_the_seed_makes_them(command, stage_1, exported, tmp_path, kind):
    if kind == "file":
        save_file(native_parts(stage_1)[0], tmp_path / "start.safetensors")
        path = tmp_path / "start.safetensors"
    else:
        path = shutil.copytree(exported, tmp_path / "start")
        (path / PROJECTORS).unlink()
    begun = Trainer(command("begun", training="full", seed=1, **{"model.start": path}))
    fresh = Trainer(command("fresh", training="full", seed=1))
    expected = weights(final_tensors(stage_1)) | {
        name: tensor for name, tensor in weights(fresh.state.tensors()).items() if ".alignment." in name
    }
    assert_begins_with(begun, expected)


@pytest.mark.parametrize("golden", [f for f in GOLDEN_FILES if "one_" in f.stem], indirect=True, ids=["one"])
def test_the_authors_checkpoint_begins_a_run_with_its_projectors(command, golden, training_world, tmp_path):
    base = shutil.copytree(training_world.wan, tmp_path / "base")
    shutil.rmtree(base / "transformer")
    golden.model.save_pretrained(base / "transformer")
    save_file({name: tensor.contiguous() for name, tensor in golden.native.items()}, tmp_path / "authors.safetensors")
    start = {"model.base": str(base), "model.start": tmp_path / "authors.safetensors"}
    begun = Trainer(command(training="full", **start))
    native = begun.objective.alignment.native_state_dict()
    assert native.keys() == golden.projectors.keys()
    for name, tensor in golden.projectors.items():
        assert torch.equal(native[name], tensor)
    for name, tensor in golden.model.state_dict().items():
        assert torch.equal(begun.state.parameters[f"transformer.{name}"], tensor)


def test_a_start_that_is_none_is_refused(command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    told = {
        tmp_path / "absent": "model.start is .*absent, which does not exist",
        tmp_path / "empty": "empty is neither a checkpoint nor a run's folder with one",
        tmp_path / "text.safetensors": r"text\.safetensors",
    }
    for path, message in told.items():
        with pytest.raises(ValueError, match=message):
            Trainer(command(**{"model.start": path}))


@pytest.mark.parametrize(("training", "other"), [("full", "lora"), ("lora", "full")])
def test_a_run_of_another_kind_is_refused(command, stage_1, stage_1_lora, training, other):
    start = stage_1 if other == "full" else stage_1_lora
    with pytest.raises(ValueError, match=rf"is of {other} training, this run is {training}\."):
        Trainer(command(training=training, **{"model.start": start}))


def test_an_exported_lora_is_no_start(command, stage_1_lora, tmp_path):
    export(ExportCommand(stage_1_lora, tmp_path / "exported"))
    with pytest.raises(ValueError, match=r"LoRA|lora"):
        Trainer(command(training="full", **{"model.start": tmp_path / "exported"}))


def test_projectors_of_other_layers_or_kind_are_refused(command, stage_1, exported):
    changes = {"training": "full", "model.start": exported, "alignment.layers": (0,)}
    with pytest.raises(ValueError, match=r"The projectors do not fit layers \(0,\)"):
        Trainer(command(**changes))
    for path in (stage_1, exported):
        with pytest.raises(ValueError, match=r"do(es)? not fit .*projectors|projectors do not fit"):
            Trainer(command(**changes | {"model.start": path, "alignment.projector": "conv"}))


def test_a_start_of_another_size_is_refused(command, tmp_path):
    transformer = tiny_transformer(num_layers=3)
    save_file(diffusers_to_native(transformer.state_dict()), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit the base"):
        Trainer(command(training="full", **{"model.start": tmp_path / "other.safetensors"}))


def test_a_users_own_file_in_the_runs_folder_stays_as_it_is(training_world, tmp_path, caplog):
    mine = tmp_path / "run/config.yaml"
    mine.parent.mkdir()
    mine.write_text("steps: 1  # a comment\n", "utf-8")
    command = run_command(mine.parent, training_world.wan, training_world.cache, steps=1, config=mine)
    assert Trainer(command).train() == 0
    assert mine.read_text("utf-8") == "steps: 1  # a comment\n"
    assert "it does not have what the command line says besides" in caplog.text


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(training_world, tmp_path):
    """It compiles for half a minute."""
    losses = []
    for compiles in (False, True):
        changes = {"steps": 2, "model.compile": compiles, "log.every": 1}
        assert run(run_command(tmp_path / str(compiles), training_world.wan, training_world.cache, **changes)) == 0
        losses.append([line["loss"] for line in read_metrics(tmp_path / str(compiles) / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- The bar ----------------------------------------------------------------------------------------------------------


def test_the_bar_counts_steps_and_shows_the_newest_numbers(command, larger_cache, capsys):
    changes = {"validation.every": 2, "validation.samples": 1, "validation.videos": 0, "log.every": 1}
    assert run(command(cache=larger_cache, steps=2, **changes)) == 0
    last = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]
    assert re.search(r"2/2 .*step.* loss=\d\.\d{4}, alignment=\d\.\d{4}, validation=\d\.\d{4}\]", last), last
