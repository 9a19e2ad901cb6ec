"""The demo and the model that comes with the package: whole, open by every door, and good at what it is for."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel, model_cards
from refalign.cli import main
from refalign.convert import export_native
from refalign.demo import Demo
from refalign.sprites import FOLDER, SUBJECTS, subject_names
from refalign.video import read_settings, read_video
from refalign_evaluation.judge import Case
from refalign_evaluation.sprites import evaluate, generate_by, make_cases
from tests.programs import FORGET, call_script


MIB = 1 << 20
SAMPLES = 4  # of one figure, and as many of two
# Well below what was measured on 96 clips (the model's card), as there are but a few here
FLOORS = {"identity": 0.5, "motion": 0.5, "both_right": 0.3}


@pytest.fixture(scope="module")
def sprites() -> RefAlignWanPipeline:
    pipeline = RefAlignWanPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise() -> torch.Tensor:
    return torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))


def velocity(transformer) -> torch.Tensor:
    embeds = torch.ones(1, 4, transformer.config.text_dim)
    with torch.no_grad():
        return transformer(noise(), torch.tensor([500.0]), embeds, reference_hidden_states=noise()[:, :, :2]).sample


# -- What is shipped --------------------------------------------------------------------------------------------------


def test_it_is_small():
    files = [file for folder in (FOLDER, SUBJECTS) for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16 * MIB


def test_its_code_is_this_packages():
    """After a change of these files: refalign export --model pipelines/refalign/sprites/model --output FOLDER."""
    names = [name for name in os.listdir(FOLDER) if name.endswith(".py")]
    assert len(names) == 3
    assert [name for name in names if (FOLDER / name).read_text() != (FOLDER.parents[1] / name).read_text()] == []


def test_it_opens_without_this_package(sprites):
    loaded = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    assert loaded.call_defaults == sprites.call_defaults
    assert torch.equal(velocity(loaded.transformer), velocity(sprites.transformer))


def test_its_transformer_opens_alone(sprites):
    loaded = AutoModel.from_pretrained(str(FOLDER), subfolder="transformer", trust_remote_code=True)
    assert torch.equal(velocity(loaded), velocity(sprites.transformer))


def test_its_transformer_opens_as_a_native_file(sprites, tmp_path):
    file = export_native(FOLDER, tmp_path / "native.safetensors")
    loaded = RefAlignWanTransformer3DModel.from_single_file(str(file), config=str(FOLDER), subfolder="transformer")
    assert (velocity(loaded) - velocity(sprites.transformer)).abs().max() < 1e-5


def test_it_can_be_pushed(capsys):
    assert main(["push", str(FOLDER), "--repo", "org/sprites", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "model_index.json" in told and "README.md" in told and "assets/demo.mp4" in told


def test_its_card_says_what_was_measured_and_on_how_many_clips():
    card = (FOLDER / "README.md").read_text("utf-8")
    assert "on 96 clips of one and 96 of two figures" in card
    assert "| both_right |" in card and "| psnr |" in card


def test_its_card_is_made_of_the_template():
    own = (FOLDER / "README.md").read_text("utf-8")
    template = (Path(model_cards.__file__).parent / "sprites.md").read_text("utf-8").replace("{{ repo }}", "ORG/NAME")
    _, _, intended = template.partition("# Sprites")
    assert own.partition("# Sprites")[2].startswith(intended.partition("{{")[0])


def test_its_card_begins_with_a_whole_snippet_that_needs_nothing_of_ours():
    before, _, after = ModelCard.load(FOLDER / "README.md").text.partition("```")
    snippet = after.partition("```")[0]
    assert "##" not in before
    assert "trust_remote_code=True" in snippet and "reference_images=" in snippet


def test_its_card_shows_a_video_that_is_there():
    card = ModelCard.load(FOLDER / "README.md")
    assert card.data.pipeline_tag == "image-text-to-video" and "\n<Gallery />\n" in card.text
    (shown,) = card.data.to_dict()["widget"]
    assert shown["text"] == Demo.prompt == read_settings(FOLDER / shown["output"]["url"])["prompt"]
    assert read_video(FOLDER / shown["output"]["url"]).shape == (17, 392, 600, 3)


def test_its_recipe_writes_that_video(tmp_path):
    """By a model that takes one step."""
    from refalign_training.sprites.recipe import write_sample

    folder = shutil.copytree(FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("assets"))
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["call_defaults"]["num_inference_steps"] = 1
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    (shown,) = ModelCard.load(FOLDER / "README.md").data.to_dict()["widget"]
    assert write_sample(folder) == shown
    made, shipped = (read_video(where / shown["output"]["url"]) for where in (folder, FOLDER))
    assert made.shape == shipped.shape
    references = np.s_[:, :, :192]
    assert np.abs(made[references].astype(int) - shipped[references]).mean() < 1


def test_the_subjects_it_is_shown_with_are_held_out():
    from refalign_training.sprites.recipe import CAST
    from refalign_training.sprites.subject import Subject

    assert set(subject_names()) == set(CAST)
    assert all(Subject(*who).is_held_out for who, _ in CAST.values())


# -- What it does -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(sprites):
    """Cases with a seed of their own, and the model's clips of them."""
    cases = make_cases(SAMPLES, seed=7)
    return cases, list(generate_by(sprites, cases, seed=7))


def test_it_keeps_its_measures(made):
    cases, clips = made
    figures = evaluate(cases, clips, "the embedded model")
    assert {name: figures[name] for name, floor in FLOORS.items() if figures[name] < floor} == {}


def test_references_that_are_swapped_swap_the_subjects(sprites, made):
    """The same prompts and noise as before, with the two references exchanged."""
    cases = [swap_references(case) for case in made[0][SAMPLES:]]
    figures = evaluate(cases, list(generate_by(sprites, cases, seed=7)), "the embedded model")
    assert figures["both_right"] >= FLOORS["both_right"]
    assert figures["swapped"] <= 0.25


def swap_references(case: Case) -> Case:
    scene = dataclasses.replace(case.scene, subjects=case.scene.subjects[::-1])
    return dataclasses.replace(case, scene=scene, tilts=case.tilts[::-1])


def test_the_same_seed_gives_the_same_clip(sprites):
    def make() -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        picture = Image.open(SUBJECTS / "yellow-heart.png")
        arguments = {"reference_images": picture, "num_inference_steps": 2, "generator": generator}
        return sprites("It hops up and down in a meadow.", **arguments).frames

    assert np.array_equal(make(), make())


# -- The commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> SimpleNamespace:
    """What `refalign demo` makes in a process of its own, without network, and what that told and imported of ours."""
    folder = tmp_path_factory.mktemp("demo")
    code = "from refalign.cli import main; main(sys.argv[1:]); print(sorted(sys.modules))"
    done = call_script(FORGET + code, "demo", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, told=done.stdout)


def test_the_demo_writes_a_video_and_pictures(demo):
    video = demo.folder / "demo.mp4"
    assert read_video(video).shape == (17, 384, 384, 3)
    assert read_settings(video)["subjects"] == ["crowned-star", "yellow-heart"]
    assert Image.open(demo.folder / "demo.png").width > 700
    moving = Image.open(demo.folder / "demo.webp")
    assert (moving.n_frames, moving.width > moving.height) == (17, True)
    assert str(video) in demo.told


def test_it_needs_no_network_and_none_of_training(demo):
    assert "'refalign.demo'" in demo.told and "refalign_training" not in demo.told


def test_the_demo_takes_a_picture_of_ones_own_and_runs_again(demo, tmp_path):
    Image.new("RGB", (40, 60), "red").save(tmp_path / "mine.png")
    folder = tmp_path / "demo"
    shutil.copytree(demo.folder, folder)
    arguments = ["demo", "--output", str(folder), "--subjects", str(tmp_path / "mine.png"), "--seed", "1"]
    arguments += ["--prompt", "It spins around at night."]
    assert main(arguments) == 0
    assert read_settings(folder / "demo.mp4")["subjects"] == [str(tmp_path / "mine.png")]


@pytest.mark.parametrize(
    ("subjects", "told"),
    [(["nobody"], "nobody is neither a file nor one of the subjects: "), (["a", "b", "c"], "3 subjects are named")],
)
def test_wrong_subjects_are_told_before_anything_is_made(subjects, told, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo"), "--subjects", *subjects]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_demo_names_its_subjects(capsys):
    assert main(["demo", "--list"]) == 0
    assert capsys.readouterr().out.split() == subject_names()


def test_generate_takes_it_without_a_model_and_says_so(tmp_path, capsys):
    arguments = ["generate", "--prompt", "It rises at night.", "--reference", str(SUBJECTS / "red-square.png")]
    assert main([*arguments, "--output", str(tmp_path / "a.mp4"), "--steps", "2"]) == 0
    assert "No --model: taking the tiny one" in capsys.readouterr().out
    assert read_video(tmp_path / "a.mp4").shape == (17, 64, 64, 3)
    settings = read_settings(tmp_path / "a.mp4")
    assert (settings["steps"], settings["negative_prompt"]) == (2, "")
