"""How well tokens of reference images tell subjects apart: figures of made-up tokens, the command on tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refalign import RefAlignWanPipeline
from refalign.pipeline_refalign_wan import paper_scheduler
from refalign_evaluation.cli import main
from refalign_evaluation.references import default_blocks, name_models, read_subjects
from refalign_evaluation.separability import (
    Setting,
    View,
    cosines,
    folds,
    probe,
    project,
    read_tokens,
    separability,
    subject_tokens,
)
from tests.tiny_pipeline import tiny_wan_pipeline


SUBJECTS = (0, 0, 0, 1, 1, 1)
SIZE = 32


def made_tokens(apart: float, by_image: float = 0.0, seed: int = 0) -> list[np.ndarray]:
    """Twenty tokens of each image: noise, with a direction for each subject and one for each image."""
    generator = np.random.default_rng(seed)
    of_subject = apart * np.eye(8)
    of_image = by_image * generator.standard_normal((len(SUBJECTS), 8))
    tokens = []
    for image, subject in enumerate(SUBJECTS):
        tokens.append(generator.standard_normal((20, 8)) + of_subject[subject] + of_image[image])
    return tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Three views of each of two subjects."""
    found = []
    for name, colour in (("red", (220, 30, 30)), ("blue", (20, 40, 200))):
        (tmp_path / name).mkdir()
        for view in range(3):
            image = Image.new("RGB", (SIZE, SIZE), "white")
            image.paste(colour, (2 * view, 2, 20 + 2 * view, 30))
            image.save(tmp_path / name / f"{view}.png")
        found.append(tmp_path / name)
    return found


def call(model: Path, folders: list[Path], output: Path, *more: str) -> int:
    words = ["references", "--model", model, "--references", *folders, "--output", output]
    return main([*map(str, words), "--size", str(SIZE), str(SIZE), "--num-frames", "5", "--device", "cpu", *more])


# -- Figures ----------------------------------------------------------------------------------------------------------


def test_tokens_that_go_by_the_subject_are_told_apart():
    figures = separability(made_tokens(apart=6.0), SUBJECTS)
    assert figures["probe"] == 1.0 and figures["chance"] == 0.5
    assert figures["within"] > 0.4 and figures["between"] < -0.4
    assert figures["gap"] == figures["within"] - figures["between"]


def test_tokens_that_tell_nothing_are_not():
    figures = separability(made_tokens(apart=0.0), SUBJECTS)
    assert 0.3 < figures["probe"] < 0.7
    assert abs(figures["gap"]) < 0.1


def test_what_tells_the_image_alone_does_not_tell_its_subject():
    probes = [probe(made_tokens(apart=0.0, by_image=6.0, seed=seed), SUBJECTS) for seed in range(8)]
    assert np.mean(probes) < 0.7  # with tokens of an image in training and test, it would be 1


def test_cosines_are_those_of_all_pairs_of_tokens():
    tokens = made_tokens(apart=1.0)
    unit = [some - np.mean(tokens, (0, 1)) for some in tokens]
    unit = [some / np.linalg.norm(some, axis=1, keepdims=True) for some in unit]
    same, other = [], []
    for i in range(len(unit)):
        for j in range(len(unit)):
            if i != j:
                (same if SUBJECTS[i] == SUBJECTS[j] else other).append((unit[i] @ unit[j].T).mean())
    assert cosines(tokens, SUBJECTS) == pytest.approx((np.mean(same), np.mean(other)))


def test_each_fold_leaves_an_image_of_each_subject_in_training():
    subjects = np.array([0] * 2 + [1] * 7)
    chosen = folds(subjects, seed=3)
    assert set(chosen) == {0, 1}
    for fold in (0, 1):
        assert set(subjects[chosen != fold]) == set(subjects[chosen == fold]) == {0, 1}


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_a_token_of_each_image_is_enough_for_a_projection(method):
    tokens = [some[:1] for some in made_tokens(apart=6.0)[1:5]]
    assert np.isfinite(project(tokens, method)).all()


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_projections_are_planar_and_the_same_again(method):
    tokens = made_tokens(apart=6.0)
    points = project(tokens, method)
    assert points.shape == (120, 2)
    np.testing.assert_array_equal(points, project(tokens, method))


# -- What is read of a model ------------------------------------------------------------------------------------------


def test_tokens_that_are_white_are_left_out():
    image = Image.new("RGB", (48, 32), "white")
    image.paste((0, 0, 0), (17, 17, 20, 20))
    assert subject_tokens(image, 16).tolist() == [4]


def test_tokens_are_the_transformers_hidden_states(model):
    pipeline = RefAlignWanPipeline.from_pretrained(model)
    image = Image.effect_noise((SIZE, SIZE), 90).convert("RGB")
    setting = Setting(prompt="a cat", num_frames=5, blocks=(0, 1), timesteps=(1000.0, 250.0), seed=4)
    behind = []
    hook = pipeline.transformer.blocks[1].register_forward_hook(lambda *call: behind.append(call[2]))
    found = read_tokens(pipeline, [View(0, image, np.array([1, 3]))], setting)
    assert list(found) == [(0, 1000.0), (1, 1000.0), (0, 250.0), (1, 250.0)]
    # The reference's four tokens stand behind the video's
    np.testing.assert_allclose(found[1, 250.0][0], behind[1][0, -4:][[1, 3]].numpy())
    behind.clear()
    pipeline.scheduler = paper_scheduler()
    # At timestep 1000 it is the first step of a generation
    pipeline(
        "a cat",
        reference_images=[image],
        height=SIZE,
        width=SIZE,
        num_frames=5,
        num_inference_steps=1,
        guidance_scale=1.0,
        image_guidance_scale=1.0,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    )
    hook.remove()
    np.testing.assert_allclose(found[1, 1000.0][0], behind[0][0, -4:][[1, 3]].numpy(), rtol=1e-4, atol=1e-5)


def test_hidden_states_that_are_not_finite_are_told(model):
    pipeline = RefAlignWanPipeline.from_pretrained(model)
    torch.nn.init.constant_(pipeline.transformer.blocks[1].ffn.net[2].bias, torch.inf)
    view = View(0, Image.new("RGB", (SIZE, SIZE)), np.array([0]))
    with pytest.raises(ValueError, match="Behind block 1 at timestep 500, hidden states are not finite"):
        read_tokens(pipeline, [view], Setting("", 5, (0, 1), (500.0,), 0))


@pytest.mark.parametrize(("count", "blocks"), [(1, (0,)), (2, (0, 1)), (6, (0, 1, 3, 5)), (30, (0, 8, 15, 29))])
def test_default_blocks(count, blocks):
    assert default_blocks(count) == blocks


# -- The command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_figures_and_a_picture_for_each_timestep(model, folders, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_wan_pipeline(seed=1).save_pretrained(other)
    output = tmp_path / "out"
    words = ["references", "--model", str(model), str(other), "--references", *map(str, folders)]
    words += ["--size", str(SIZE), str(SIZE), "--num-frames", "5", "--device", "cpu", "--output", str(output)]
    words += ["--blocks", "0", "1", "--timesteps", "900", "100", "--projection", "pca"]
    assert main(words) == 0, capsys.readouterr().err
    content = json.loads((output / "references.json").read_text("utf-8"))
    measured = [(row["model"], row["block"], row["timestep"]) for row in content["figures"]]
    assert measured[:4] == [("tiny", 0, 900), ("tiny", 0, 100), ("tiny", 1, 900), ("tiny", 1, 100)]
    assert [name for name, _, _ in measured[4:]] == ["other"] * 4
    assert content["settings"]["images"] == {"red": 3, "blue": 3}
    assert str(tmp_path) not in json.dumps(content)
    for name in ("pca-900.png", "pca-100.png"):
        with Image.open(output / name) as picture:
            assert picture.width > 500
    assert "A probe that is told nothing gets 50.0%." in capsys.readouterr().out


def test_figures_of_the_small_world_need_no_folders(model, tmp_path, capsys):
    words = ["references", "--sprites", "2", "--blocks", "1", "--timesteps", "900", "--projection", "pca"]
    assert main([*words, "--device", "cpu", "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    content = json.loads((tmp_path / "out/references.json").read_text("utf-8"))
    (row,) = content["figures"]
    assert row["model"] == "refalign-sprites" and row["probe"] > 0.8
    assert list(content["settings"]["images"].values()) == [8, 8]


def test_models_of_one_name_are_told_apart(tmp_path):
    for name in ("a/model", "b/model", "b/other"):
        (tmp_path / name).mkdir(parents=True)
    names = name_models([f"{tmp_path}/{name}" for name in ("a/model", "b/model", "b/other")])
    assert list(names) == [f"{tmp_path}/a/model", f"{tmp_path}/b/model", "other"]
    with pytest.raises(ValueError, match="--model has a model twice"):
        name_models([f"{tmp_path}/a/model", f"{tmp_path}/b/../a/model"])


# -- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--blocks", "0", "2"], "--blocks has 2, but the blocks of "),
        (["--blocks", "-1"], "--blocks has -1"),
        (["--blocks", "1", "1"], "--blocks has a number twice: 1 1"),
        (["--timesteps", "0"], "--timesteps has 0: pass numbers above 0"),
        (["--timesteps", "nan"], "--timesteps has nan"),
        (["--timesteps", "1001"], "--timesteps has 1001"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--num-frames", "0"], "`num_frames` must be 4k + 1, but is 0"),
        (["--sprites", "4"], "Pass either --references"),
        (["--size", "30", "32"], "divisible by 16, but is 30"),
    ],
)
def test_options_that_cannot_be_are_told(model, folders, tmp_path, capsys, more, told):
    assert call(model, folders, tmp_path / "out", *more) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def spoil(folders: list[Path], kind: str) -> list[Path]:
    """Folders of which one cannot be used."""
    red, blue = folders
    if kind == "one subject":
        return [red]
    if kind == "same folder":
        return [red, blue, blue / "." / "../blue"]
    if kind == "no folder":
        return [red, blue / "0.png"]
    if kind == "damaged":
        (blue / "1.png").write_bytes((blue / "1.png").read_bytes()[:60])
    elif kind == "white":
        Image.new("RGB", (SIZE, SIZE), "white").save(blue / "1.png")
    elif kind == "copy":
        (blue / "9.png").write_bytes((red / "1.png").read_bytes())
    else:
        keep = 1 if kind == "one image" else 0
        for file in sorted(blue.iterdir())[keep:]:
            file.unlink()
    return folders


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("one subject", "red is one subject, and there is none to tell it from"),
        ("same folder", "--references has a folder twice"),
        ("no folder", "0.png is no folder"),
        ("damaged", "blue/1.png"),
        ("white", "blue/1.png is white all over"),
        ("copy", "blue/9.png is the same image as "),
        ("one image", "blue holds one image alone, 0.png"),
        ("empty", "blue holds no images"),
    ],
)
def test_folders_that_cannot_be_used_are_told(model, folders, tmp_path, capsys, kind, told):
    assert call(model, spoil(folders, kind), tmp_path / "out") == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_told(model, folders, tmp_path, capsys):
    config = json.loads((model / "transformer/config.json").read_text("utf-8"))
    other = tmp_path / "other/transformer"
    other.mkdir(parents=True)
    (other / "config.json").write_text(json.dumps({**config, "in_channels": 48}))
    assert call(tmp_path / "other", folders, tmp_path / "out") == 1
    assert "is of another kind: Wan 2.2's TI2V-5B" in capsys.readouterr().err


def test_subjects_in_folders_of_one_name_are_told_apart(folders, tmp_path):
    for folder in folders:
        (tmp_path / f"of-{folder.name}").mkdir()
        folder.rename(tmp_path / f"of-{folder.name}/views")
    subjects = read_subjects([tmp_path / "of-red/views", tmp_path / "of-blue/views"])
    assert list(subjects) == ["of-red/views", "of-blue/views"]
