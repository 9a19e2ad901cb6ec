"""The recipes of training/configs do what they say, with tiny models in the place of Wan."""

from pathlib import Path

import pytest

from refalign_training.cli import main
from refalign_training.run.checkpoint import find_checkpoint, read_state
from tests.training.small_run import World


CONFIGS = Path(__file__).parents[3] / "training/configs"
# sprites is trained whole, and refinements are of another network: test_refine.py
RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.stem[:6] not in ("sprite", "refine"))
FIRST_STAGE = "refalign-1.3b-stage1.yaml"


def arguments(recipe: str, world: World, output: Path) -> list[str]:
    """A recipe's command line: what is of its size and place is the tiny world's."""
    small = {"model.base": world.wan, "data.cache": world.cache, "alignment.layers": "0", "device": "cpu"}
    small["model.offload-blocks"] = 0  # the tiny model has two
    options = [f"--{name}={value}" for name, value in small.items()]
    return ["run", "--config", str(CONFIGS / recipe), "--output", str(output), *options]


@pytest.fixture(scope="module")
def first_stage(training_world, tmp_path_factory) -> Path:
    """A step of the first stage's recipe."""
    output = tmp_path_factory.mktemp("runs") / "first"
    short = ["--steps=1", "--optimizer.warmup-steps=0", "--batch.size=2", "--data.workers=0", "--log.tracker=none"]
    assert main([*arguments(FIRST_STAGE, training_world, output), *short]) == 0
    return output


def test_all_are_there():
    assert len(RECIPES) == 14


@pytest.mark.usefixtures("counted_once")
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_passes_a_dry_run(recipe, training_world, bernini_world, first_stage, tmp_path, capsys):
    stage = ["--model.start", str(first_stage)] if "stage2" in recipe else []
    world, samples = (
        (bernini_world, "11 samples and 1") if "bernini" in recipe else (training_world, "8 samples and 0")
    )
    assert main([*arguments(recipe, world, tmp_path / "run"), *stage, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "memory" in told and f"{samples} held out" in told
    assert not (tmp_path / "run").exists()


def test_a_step_of_the_first_stage_can_be_made(first_stage):
    state = read_state(find_checkpoint(first_stage))
    assert (state["step"], state["options"]["training"]) == (1, "full")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "stage2" in name])
def test_the_second_stage_needs_the_first(recipe, training_world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(recipe, training_world, tmp_path / "run"), "--dry-run"]) == 1
    assert "model.start" in capsys.readouterr().err
