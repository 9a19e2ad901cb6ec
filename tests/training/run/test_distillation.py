"""A run that distils: it learns, goes on to the same numbers, shares its work, and its export asks for one pass."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from refalign import RefAlignWanPipeline
from refalign.cli import main as refalign_main
from refalign.hub import LORA_WEIGHTS
from refalign.loading import read_defaults
from refalign.lora_defaults import read_lora_defaults
from refalign_training.publish.export import ExportCommand, export
from refalign_training.run.checks import check
from refalign_training.run.config import RunCommand
from refalign_training.run.log import read_metrics
from refalign_training.run.trainer import run
from tests.training.method.test_distillation import DISTIL, SCALES
from tests.training.small_run import assert_equal_runs, changed, final_tensors, run_command, train


@pytest.fixture
def command(training_world, tmp_path):
    def make(name: str = "run", **changes) -> RunCommand:
        options = {"steps": 4, "log.every": 1, **DISTIL, **SCALES, **changes}
        return run_command(tmp_path / name, training_world.wan, training_world.cache, **options)

    return make


@pytest.fixture(scope="module", params=["lora", "full"])
def distilled(request, training_world, tmp_path_factory) -> Path:
    """The export of a run of a few steps."""
    folder = tmp_path_factory.mktemp(f"distilled-{request.param}")
    options = {"training": request.param, "steps": 2, **DISTIL, **SCALES}
    assert run(run_command(folder / "run", training_world.wan, training_world.cache, **options)) == 0
    export(ExportCommand(folder / "run", folder / "export", dtype="float32"))
    return folder / "export"


# -- The run ----------------------------------------------------------------------------------------------------------


def test_it_learns(command):
    asked = command(steps=12, **{"optimizer.lr": 1e-2, "log.every": 4, "batch.size": 8, "batch.micro": 4})
    assert run(asked) == 0
    losses = [line["loss"] for line in read_metrics(asked.output / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_run_that_goes_on_comes_to_the_same_numbers(command, training):
    one, other = command("one", training=training), command("other", training=training, steps=2)
    assert run(one) == run(other) == run(changed(other, steps=4, resume="latest")) == 0
    assert_equal_runs(one.output, other.output)


@pytest.mark.parametrize("training", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_shards_learn_what_one_process_learns(command, training):
    one = command("one", training=training, steps=2, **{"batch.micro": 1})
    two = changed(one, output=one.output.with_name("two"), parallel="fsdp2")
    train(one)
    train(two, processes=2)
    ours, theirs = final_tensors(one.output), final_tensors(two.output)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-3, msg=name)


# -- What it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective.no_text": 0.1, "alignment.weight": 1.0}, "needs alignment.weight 0, objective.no_text 0"),
        ({"objective.guidance_scale": 1.0, "objective.image_guidance_scale": 1.0}, "that is one pass already"),
    ],
)
def test_what_does_not_fit_it_is_told(command, changes, told):
    with pytest.raises(ValueError, match=told):
        check(command(**changes))


# -- The export and its doors -----------------------------------------------------------------------------------------


def test_an_export_asks_for_one_pass(distilled, training_world):
    if (distilled / LORA_WEIGHTS).is_file():
        defaults = read_defaults(str(training_world.wan), [str(distilled / LORA_WEIGHTS)])
    else:
        defaults = read_defaults(str(distilled))
    assert (defaults["guidance_scale"], defaults["image_guidance_scale"], defaults["height"]) == (1.0, 1.0, 480)


def test_its_card_says_so(distilled):
    card = (distilled / "README.md").read_text("utf-8")
    assert "at 1, so that a step takes one pass: guidance at the\nscales 4 (prompt) and 2.5 (references)" in card
    assert "7.5" not in card


@pytest.fixture
def lora(distilled) -> Path:
    file = distilled / LORA_WEIGHTS
    if not file.is_file():
        pytest.skip("all weights were trained")
    return file


def test_a_distilled_lora_loads_in_diffusers_and_tells_its_scales(lora, training_world, caplog):
    pipeline = RefAlignWanPipeline.from_pretrained(training_world.wan)
    pipeline.load_lora_weights(lora)
    assert "is distilled: call the pipeline with guidance_scale 1, image_guidance_scale 1" in caplog.text
    plain = WanPipeline.from_pretrained(training_world.wan)  # knows nothing of it
    plain.load_lora_weights(lora)
    ours, theirs = pipeline.transformer.state_dict(), plain.transformer.state_dict()
    assert any("lora_B" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.mark.parametrize("style", ["native", "diffusers", "kohya"])
def test_a_distilled_lora_keeps_its_scales_in_another_style(lora, style, tmp_path):
    output = tmp_path / "converted.safetensors"
    assert refalign_main(["lora", "convert", str(lora), "--output", str(output), "--to", style]) == 0
    assert read_lora_defaults(str(output)) == {"guidance_scale": 1.0, "image_guidance_scale": 1.0}


def generated(lora: Path, wan: Path, output: Path, *options: str) -> int:
    small = ["--height=32", "--width=32", "--num-frames=5", "--steps=1", "--device=cpu", "--prompt=A dog."]
    words = ["generate", "--model", str(wan), "--lora", str(lora), "--output", str(output), *small, *options]
    return refalign_main([*words, "--reference", str(reference_of(output.parent))])


def reference_of(folder: Path) -> Path:
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    return folder / "red.png"


def test_generate_takes_one_pass(lora, training_world, tmp_path, capsys):
    assert generated(lora, training_world.wan, tmp_path / "a.mp4") == 0
    told = capsys.readouterr().out
    assert "passes per step: 1" in told
    assert f"LoRA {lora} is distilled for guidance_scale 1, image_guidance_scale 1." in told


def test_generate_takes_scales_that_were_given_and_tells_it(lora, training_world, tmp_path, capsys):
    assert generated(lora, training_world.wan, tmp_path / "a.mp4", "--guidance-scale=4") == 0
    told = capsys.readouterr().out
    assert "passes per step: 2" in told  # all but the null pass, whose weight is 0
    assert "image_guidance_scale 1, but others were given for generate." in told


def test_a_file_that_states_something_else_is_refused(lora, tmp_path):
    with safe_open(lora, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    save_file(tensors, tmp_path / "odd.safetensors", {"call_defaults": '{"steps": 4}'})
    with pytest.raises(
        ValueError, match=r"its call_defaults is .*steps.*must give numbers for guidance_scale or image"
    ):
        read_lora_defaults(str(tmp_path / "odd.safetensors"))
