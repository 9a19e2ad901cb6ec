import re
import shutil

import pytest
import torch

from refalign_training.cache.command import CacheCommand
from refalign_training.cache.writer import fill
from refalign_training.cli import main
from refalign_training.data.recipe import Recipe, RefineOptions
from refalign_training.run.checkpoint import find_checkpoint, read_tensors
from refalign_training.run.checks import check
from refalign_training.run.config import PromptOptions
from refalign_training.run.log import read_metrics
from refalign_training.run.refine import CachedSubjects
from refalign_training.run.refine_trainer import RefineTrainer, run
from tests.training.small_refinement import refine_command, refine_world
from tests.training.small_run import changed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return refine_world(tmp_path_factory.mktemp("refine"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    command = refine_command(tmp_path_factory.mktemp("runs") / "run", world)
    assert run(command) == 0
    return command


def tensors(command):
    return read_tensors(find_checkpoint(command.output), "")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_unet_and_the_projector_learn_and_nothing_else(finished, world):
    names = {name.split(".")[2] for name in tensors(finished) if name.startswith("weights.")}
    assert names == {"unet", "reference_projector"}


def test_a_run_that_goes_on_comes_to_the_same_tensors(finished, world, tmp_path):
    command = refine_command(tmp_path / "run", world)
    assert run(changed(command, steps=2)) == 0
    assert run(changed(command, resume="latest")) == 0
    assert_equal(tensors(command), tensors(finished))


def test_a_cache_and_its_dataset_train_alike(finished, world, tmp_path):
    recipe = Recipe(height=64, width=64, num_frames=1)
    command = CacheCommand(tmp_path / "cache", world.source, recipe, families=("pictures",), workers=0)
    assert fill(command) == 0
    cached = refine_command(tmp_path / "run", world, **{"data.cache": tmp_path / "cache", "steps": 1})
    online = refine_command(tmp_path / "online", world, **{"data.recipe": recipe, "steps": 1})
    losses = []
    for command in (cached, online):
        trainer = RefineTrainer(command)
        losses.append(trainer.objective(next(trainer.batches), 0).total)
    # Other pictures are drawn by the epoch here and by the variant there; both are the first
    assert torch.equal(*losses)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["refinement", "alignment"])
def test_each_mode_overfits_eight_subjects(world, tmp_path, share):
    changes = {"refine.alignment_share": share, "data.recipe": Recipe(cross_probability=0.0), "optimizer.lr": 1e-2}
    trainer = RefineTrainer(refine_command(tmp_path, world, steps=1, **changes))
    batches = [next(trainer.batches) for _ in range(2)] * 20
    batches[0].timesteps[:] = batches[1].timesteps[:] = 500
    losses = []
    for batch in batches:
        loss = trainer.objective(batch, 0).total.mean()
        loss.backward()
        trainer.state.update(0)
        trainer.state.optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_a_shift_of_timesteps_gives_more_of_much_noise(world, tmp_path):
    drawn = []
    for shift in (1.0, 3.0):
        options = {"refine.timestep_shift": shift, "data.recipe": Recipe(height=64, width=64, num_frames=1)}
        drawn.append(next(RefineTrainer(refine_command(tmp_path / f"{shift}", world, **options)).batches).timesteps)
    even, moved = (timesteps.double() / 1000 for timesteps in drawn)
    torch.testing.assert_close(moved, 3 * even / (1 + 2 * even), atol=4e-3, rtol=0)
    assert (moved > even).all()


def test_validation_tells_the_loss_and_how_well_regions_are_found(world, tmp_path):
    command = refine_command(tmp_path / "run", world, **{"validation.every": 4})
    trainer = RefineTrainer(command)
    trainer.held_out = trainer.rows  # four samples are too few to hold one out
    trainer._open_validation()
    trainer.train()
    last = read_metrics(command.output / "metrics.jsonl")[-1]
    assert 0 <= last["validation/miou"] <= 1
    assert last["validation/mse"] > 0


def test_a_cache_of_another_size_is_refused(world, tmp_path):
    recipe = Recipe(height=32, width=32, num_frames=1)
    fill(CacheCommand(tmp_path / "cache", world.source, recipe, families=("pictures",), workers=0))
    with pytest.raises(ValueError, match="was made for a height of 32, but the model refines pictures of 64 pixels"):
        RefineTrainer(refine_command(tmp_path / "run", world, **{"data.cache": tmp_path / "cache"}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": "lora"}, "objective.kind refine trains all weights of a UNet: pass training full"),
        ({"alignment.weight": 1.0}, "objective.kind refine has no alignment loss: pass alignment.weight 0, not 1"),
        ({"model.attention": "flash"}, "model.attention is for videos, not for objective.kind refine"),
        ({"validation.prompts": (PromptOptions("A dog."),)}, "validation.prompts is for videos"),
        ({"dry_run": True, "gpu_memory": 24.0}, "--gpu-memory is reckoned for videos"),
    ],
)
def test_options_that_do_not_fit_are_refused(world, tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        check(refine_command(tmp_path, world, **changes))


@pytest.mark.parametrize("recipe", ["refine", "refine-sprites"])
def test_its_recipes_pass_a_dry_run(recipe, world, tmp_path, capsys):
    source = world.source
    options = ["--config", recipe, "--output", tmp_path / "run", "--model.base", world.base, "--data.cache", "None"]
    options += ["--data.source.data", "opens2v", "--data.source.videos", source.videos]
    options += ["--data.source.annotations", *source.annotations, "--validation.cache", "None", "--dry-run"]
    assert main(["run", *map(str, options)]) == 0
    told = capsys.readouterr().out
    assert "4 samples and 0 held out" in told
    assert "TFLOP a sample" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_base_that_predicts_something_else_is_told_before_its_weights_are_read(world, tmp_path, dry_run):
    base = shutil.copytree(world.base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = base / "scheduler/scheduler_config.json"
    config.write_text(config.read_text("utf-8").replace('"epsilon"', '"sample"'), "utf-8")
    told = f"scheduler_config.json of {base} is 'sample', but must be epsilon or v_prediction. Take a base"
    with pytest.raises(ValueError, match=re.escape(told)):
        run(refine_command(tmp_path / "run", world, **{"model.base": str(base), "dry_run": dry_run}))


def test_an_item_of_another_shape_cannot_be_used(world, tmp_path, monkeypatch):
    recipe = Recipe(height=64, width=64, num_frames=1)
    fill(CacheCommand(tmp_path / "cache", world.source, recipe, families=("pictures",), workers=0))
    samples = CachedSubjects(tmp_path / "cache", RefineOptions(), 64, 64)
    monkeypatch.setattr(samples.cache, "read", lambda *_: {"pixels": torch.zeros(1, 2, 2, 3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"holds uint8 \(1, 2, 2, 3\), not uint8 \(subjects, 80, 80, 8\)"):
        samples.read(0, seed=0, epoch=0)
