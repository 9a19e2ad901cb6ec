import pytest
import torch

from refalign.pipeline_refine_by_align import RefineByAlignPipeline
from refalign_training.publish.export import ExportCommand, export
from refalign_training.run.checkpoint import find_checkpoint, read_tensors
from refalign_training.run.refine_trainer import run
from tests.tiny_refine import mask_of, picture, reference, tiny_refine_pipeline
from tests.training.small_refinement import refine_command, refine_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refine")
    command = refine_command(folder / "run", refine_world(folder), steps=2)
    assert run(command) == 0
    return command


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "my-refine"
    export(ExportCommand(finished.output, output, dtype="float32", licence="apache-2.0"))
    return output


def test_the_averaged_weights_are_exported(finished, exported):
    pipeline = RefineByAlignPipeline.from_pretrained(exported)
    averages = read_tensors(find_checkpoint(finished.output), "average.refiner.unet.")
    weights = pipeline.unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in averages.items())


def test_the_frozen_parts_are_the_bases(exported):
    exported_vae = RefineByAlignPipeline.from_pretrained(exported).vae.state_dict()
    vae = tiny_refine_pipeline().vae.state_dict()
    assert all(torch.equal(vae[name], value) for name, value in exported_vae.items())


def test_an_exported_model_refines(exported):
    pipeline = RefineByAlignPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(picture(), mask_of((30, 20, 50, 40)), reference(), generator=torch.Generator().manual_seed(0))
    assert output.images[0].size == picture().size


def test_its_card_says_what_the_run_was(exported):
    card = (exported / "README.md").read_text("utf-8")
    assert "pipeline_tag: image-to-image" in card
    assert "masks of 5% to 40% of a subject" in card
    assert "all weights of the UNet and the projector of references" in card
    assert "Videos" not in card


def test_another_base_is_refused(finished, tmp_path):
    unlike = tiny_refine_pipeline()
    unlike.register_modules(reference_projector=type(unlike.reference_projector)(16, 32))
    unlike.unet = type(unlike.unet).from_config({**unlike.unet.config, "cross_attention_dim": 32})
    unlike.save_pretrained(tmp_path / "unlike")
    with pytest.raises(ValueError, match=r"does not fit .*unlike"):
        export(ExportCommand(finished.output, tmp_path / "out", base=str(tmp_path / "unlike")))
    assert not (tmp_path / "out").exists()
