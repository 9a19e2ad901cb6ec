"""The tiny refining model that comes with the package is small and open, and stays as good as it was measured. Its
card says what it is not good at yet."""

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from refalign.cli import main
from refalign.pipeline_refine_by_align import RefineByAlignPipeline
from refalign.refine import load_refine_pipeline
from refalign.sprites import REFINE_FOLDER, TRIPLETS
from refalign_evaluation.alignment import overlaps
from refalign_evaluation.triplets import generators_of, inputs_of, read_benchmark
from refalign_training.sprites.artifacts import write_benchmark


MIB = 1 << 20
TRIPLETS_MEASURED = 12
STEPS = 6
# Well beyond what was measured on 200 triplets (the model's card)
FLOOR, CEILING = 0.46, 0.2


@pytest.fixture(scope="module")
def pipe() -> RefineByAlignPipeline:
    pipeline = load_refine_pipeline(None, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped") / "triplets"
    write_benchmark(folder, TRIPLETS_MEASURED)
    return read_benchmark(folder)


def test_it_weighs_at_most_six_mebibytes():
    assert sum(file.stat().st_size for file in REFINE_FOLDER.glob("*/*.safetensors")) <= 6 * MIB


def test_its_code_is_this_packages():
    package = REFINE_FOLDER.parents[1]
    for file in REFINE_FOLDER.glob("*.py"):
        assert file.read_bytes() == (package / file.name).read_bytes(), file.name


@pytest.mark.parametrize("steps", [1000, 1001])
def test_more_steps_than_its_scheduler_has_are_told(pipe, tasks, steps):
    """Its timesteps begin at 1, so there are 999."""
    with pytest.raises(ValueError, match="but the scheduler has 999 timesteps"):
        pipe(*inputs_of(tasks[:1]), num_inference_steps=steps)


def test_its_folder_opens_as_a_repo_does():
    pipeline = DiffusionPipeline.from_pretrained(REFINE_FOLDER, trust_remote_code=True)
    assert type(pipeline).__name__ == "RefineByAlignPipeline"


def test_it_finds_regions_as_it_did(pipe, tasks):
    alignments = pipe.align(*inputs_of(tasks), generator=generators_of(tasks, 0))
    assert overlaps(tasks, [alignment.mask for alignment in alignments]).mask.mean() > FLOOR


def test_what_it_makes_is_as_near_to_the_truth_as_it_was_and_the_same_outside(pipe, tasks):
    noise = generators_of(tasks, 0)
    images = pipe(*inputs_of(tasks), region="whole", num_inference_steps=STEPS, generator=noise).images
    errors = []
    for task, image in zip(tasks, images, strict=True):
        truth, values = np.asarray(task.truth).astype(int), np.asarray(image).astype(int)
        errors.append(np.abs(values - truth)[task.mask].mean() / 255)
        assert np.array_equal(values[~task.mask], np.asarray(task.image)[~task.mask])
    assert np.mean(errors) < CEILING


def test_the_demo_shows_each_of_its_pictures(tmp_path, capsys):
    assert main(["demo", "--refine", "--output", str(tmp_path)]) == 0
    assert "refine.png" in capsys.readouterr().out
    with Image.open(tmp_path / "refine.png") as sheet:
        assert sheet.height == len(list(TRIPLETS.iterdir())) * 392 - 8
        assert np.asarray(sheet).std() > 10
