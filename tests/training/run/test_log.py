"""What a run logs: means over samples whatever the batches, and files that hold each step once."""

import json
import logging
import math
import sys

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refalign_training.method.objective import Losses
from refalign_training.run.config import LogOptions
from refalign_training.run.log import Metrics, RunLog, append_skipped, check_tracker, read_metrics


LAYERS = (0, 3)
OPTIONS = {"steps": 100, "optimizer.lr": 5e-5, "data.cache": None, "alignment.layers": [0, 3]}


def random_losses(batch, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    total, diffusion, mse, alignment = torch.rand(4, batch, generator=generator)
    cosine, active_negatives = torch.rand(2, batch, len(LAYERS), generator=generator)
    everyone = torch.ones(batch, dtype=torch.bool)
    losses = Losses(total, diffusion, mse, alignment, everyone, everyone, cosine, active_negatives)
    return losses._replace(**fields)


def alone(tensor):
    """The all-reduce of one process."""


def collected(*batches, all_reduce=alone):
    metrics = Metrics(LAYERS, "cpu")
    for losses, timesteps in batches:
        metrics.add(losses, timesteps)
    metrics.commit()
    return metrics.collect(all_reduce)


def timesteps(batch, seed=0):
    return 1000 * torch.rand(batch, generator=torch.Generator().manual_seed(seed))


# -- Means ------------------------------------------------------------------------------------------------------------


def test_samples_weigh_the_same_in_batches_of_any_size():
    losses, t = random_losses(7), timesteps(7)
    parts = [(Losses(*(field[rows] for field in losses)), t[rows]) for rows in (slice(0, 1), slice(1, 7))]
    assert collected(*parts) == pytest.approx(collected((losses, t)))


def test_means_are_those_of_the_samples():
    losses = random_losses(5)
    means = collected((losses, timesteps(5)))
    expected = {
        "loss": losses.total.mean(),
        "loss/diffusion": losses.diffusion.mean(),
        "loss/mse": losses.mse.mean(),
        "loss/alignment": losses.alignment.mean(),
        "alignment/cosine": losses.cosine.mean(),
        "alignment/cosine_block_3": losses.cosine[:, 1].mean(),
        "alignment/active_negatives": losses.active_negatives.mean(),
        "alignment/active_negatives_block_0": losses.active_negatives[:, 0].mean(),
    }
    assert {name: means[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()})


def test_processes_are_summed():
    batches = [(random_losses(2, seed=1), timesteps(2, 1)), (random_losses(5, seed=2), timesteps(5, 2))]
    flat = []
    collected(batches[1], all_reduce=lambda tensor: flat.append(tensor.clone()))
    means = collected(batches[0], all_reduce=lambda tensor: tensor.add_(flat[0]))
    assert means == pytest.approx(collected(*batches))


def test_each_sample_is_in_the_bin_of_its_timestep():
    mse = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    means = collected((random_losses(5, mse=mse), torch.tensor([0.0, 99.9, 100.0, 950.0, 1000.0])))
    bins = {name.partition("/")[2]: value for name, value in means.items() if name.startswith("mse_by_timestep/")}
    assert bins == {"000-100": 1.5, "100-200": 4.0, "900-1000": 12.0}


def test_dropped_references_do_not_count_for_the_alignment():
    kept = torch.tensor([True, False, True])
    alignment = torch.tensor([1.0, math.nan, 3.0])
    cosine = torch.tensor([[0.2, 0.4], [math.nan, math.nan], [0.4, 0.6]])
    means = collected((random_losses(3, kept=kept, alignment=alignment, cosine=cosine), timesteps(3)))
    assert means["loss/alignment"] == 2
    assert means["alignment/cosine"] == pytest.approx(0.4)


def test_samples_of_one_subject_do_not_count_for_the_negatives():
    active = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    losses = random_losses(2, has_negatives=torch.tensor([True, False]), active_negatives=active)
    assert collected((losses, timesteps(2)))["alignment/active_negatives"] == 0.5


def test_without_alignment_nothing_is_said_of_it():
    nobody = torch.zeros(3, dtype=torch.bool)
    losses = random_losses(3, kept=nobody, has_negatives=nobody, cosine=None, active_negatives=None)
    assert not [name for name in collected((losses, timesteps(3))) if "alignment" in name]


def test_a_discarded_step_leaves_no_trace():
    metrics = Metrics(LAYERS, "cpu")
    metrics.add(random_losses(2, seed=1), timesteps(2, 1))
    metrics.commit()
    metrics.add(random_losses(2, seed=2, total=torch.full((2,), math.nan)), timesteps(2, 2))
    metrics.discard()
    assert metrics.collect(alone) == collected((random_losses(2, seed=1), timesteps(2, 1)))


def test_collecting_starts_anew():
    metrics = Metrics(LAYERS, "cpu")
    metrics.add(random_losses(2), timesteps(2))
    metrics.commit()
    metrics.collect(alone)
    assert metrics.collect(alone) == {}


def test_losses_with_a_graph_are_taken_without_it():
    graph = []
    losses = random_losses(2, total=torch.ones(2, requires_grad=True) * 2)
    collected((losses, timesteps(2)), all_reduce=lambda tensor: graph.append(tensor.requires_grad))
    assert graph == [False]


# -- The file of all numbers ------------------------------------------------------------------------------------------


def run_log(folder, step=0, tracker="none"):
    return RunLog(folder, LogOptions(tracker=tracker), OPTIONS, step)


def test_a_line_a_step(tmp_path):
    log = run_log(tmp_path)
    log.log({"loss": 0.5}, 10)
    log.log({"loss": 0.25, "loss/mse": 1}, 20)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss": 0.5},
        {"step": 20, "loss": 0.25, "loss/mse": 1.0},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, value):
    run_log(tmp_path).log({"loss": value}, 10)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10, "loss": null}\n'


def test_a_run_that_goes_on_drops_what_lies_beyond(tmp_path):
    log = run_log(tmp_path)
    for step in (10, 20, 30):
        log.log({"loss": step}, step)
        append_skipped(tmp_path, step, [f"sample {step}"], "not finite")
    run_log(tmp_path, step=20).log({"loss": 31}, 30)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 31]
    assert [line["step"] for line in read_metrics(tmp_path / "skipped.jsonl")] == [10, 20]


def test_a_half_line_of_a_killed_process_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    run_log(tmp_path, step=20).log({"loss": 3}, 30)
    assert read_metrics(file) == [{"step": 10, "loss": 1.0}, {"step": 30, "loss": 3.0}]


def test_a_half_line_is_not_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10}\n{"step": 20, "lo')
    assert read_metrics(file) == [{"step": 10}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10}\nxyz\n{"step": 30}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_skipped_samples_are_listed(tmp_path):
    append_skipped(tmp_path, 7, ("a", "clip ü"), "loss is nan")
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 7, "ids": ["a", "clip ü"], "reason": "loss is nan"}


# -- Trackers ---------------------------------------------------------------------------------------------------------


def events(folder):
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what it purges
    return EventAccumulator(str(folder / "logs")).Reload()


def scalars(folder, name):
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_tensorboard_holds_what_was_logged(tmp_path):
    log = run_log(tmp_path, tracker="tensorboard")
    log.log({"loss": 0.5, "loss/mse": 2.0}, 10)
    log.log({"loss": 0.25}, 20)
    log.finish()
    assert scalars(tmp_path, "loss") == [(10, 0.5), (20, 0.25)]
    assert scalars(tmp_path, "loss/mse") == [(10, 2.0)]


def test_tensorboard_holds_nothing_beyond_where_a_run_goes_on(tmp_path):
    log = run_log(tmp_path, tracker="tensorboard")
    for step in (10, 20, 30, 40):
        log.log({"loss": step}, step)
    log.finish()
    log = run_log(tmp_path, step=20, tracker="tensorboard")
    log.log({"loss": 31}, 30)
    log.finish()
    assert scalars(tmp_path, "loss") == [(10, 10), (20, 20), (30, 31)]


def test_tensorboard_shows_the_options(tmp_path):
    run_log(tmp_path, tracker="tensorboard").finish()
    (event,) = events(tmp_path).Tensors("options/text_summary")
    assert b"    optimizer.lr: 5e-05" in event.tensor_proto.string_val[0]


def test_tensorboard_makes_event_files_alone(tmp_path):
    run_log(tmp_path, tracker="tensorboard").finish()
    assert [file.name[:19] for file in (tmp_path / "logs").rglob("*")] == ["events.out.tfevents"]


def test_tensorboard_shows_images(tmp_path):
    log = run_log(tmp_path, tracker="tensorboard")
    log.log_images({"samples/dog": Image.new("RGB", (24, 16), "red")}, 10)
    log.finish()
    (event,) = events(tmp_path).Images("samples/dog")
    assert (event.step, event.width, event.height) == (10, 24, 16)


def test_images_are_left_out_without_a_tracker(tmp_path):
    run_log(tmp_path).log_images({"samples/dog": Image.new("RGB", (24, 16))}, 10)
    assert not list(tmp_path.iterdir())


def test_no_tracker_writes_no_events(tmp_path):
    log = run_log(tmp_path)
    log.log({"loss": 1.0}, 10)
    log.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_the_others_get_a_run_of_their_own_with_its_options_and_numbers(tmp_path, monkeypatch, tracker):
    (tmp_path / f"{tracker}.py").write_text(
        "calls = []\n"
        "class config:\n"
        "    update = staticmethod(lambda values, allow_val_change: calls.append(values))\n"
        "class Run:\n"
        "    log = staticmethod(lambda values, step: calls.append((values, step)))\n"
        "    finish = staticmethod(lambda: calls.append('finish'))\n"
        "def init(**options):\n"
        "    calls.append(options)\n"
        "    return Run\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, tracker, raising=False)
    folder = tmp_path / "cats"
    folder.mkdir()
    log = run_log(folder, step=20, tracker=tracker)
    log.log({"loss": 0.5}, 30)
    log.finish()
    first, *others = sys.modules.pop(tracker).calls
    assert {"project": "refalign", "name": "cats-from-20", "group": "cats"}.items() <= first.items()
    assert others == [OPTIONS, ({"loss": 0.5}, 30), "finish"]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_touched(tmp_path, monkeypatch, tracker):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match=f"log.tracker is {tracker}, which is not installed. `pip install {tracker}`"):
        run_log(tmp_path, tracker=tracker)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10}\n'


def test_a_folder_that_wandb_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="not installed"):
        check_tracker("wandb")


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_what_is_there_is_accepted(tracker):
    check_tracker(tracker)
