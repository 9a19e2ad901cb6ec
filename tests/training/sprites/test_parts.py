"""The small world's parts: the loop that trains them, and what is special about each; the command's stages."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from refalign_training.cli import main
from refalign_training.method.teachers import load_teacher
from refalign_training.run.config import OptimizerOptions
from refalign_training.sprites import ablation, recipe, teacher, vae
from refalign_training.sprites.subject import subjects
from refalign_training.sprites.text import MAX_SEQUENCE_LENGTH, make_tokenizer
from refalign_training.sprites.training import train_part
from refalign_training.sprites.vae import (
    Coder,
    FirstFrameConv3d,
    draw_random,
    letterboxed_reference,
    new_vae,
    to_model,
)
from refalign_training.sprites.world import all_captions


# -- The loop ---------------------------------------------------------------------------------------------------------


def trained(folder, steps: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    layer = nn.Linear(3, 2)

    def loss(step: int, half: int) -> torch.Tensor:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + half))
        return layer(inputs).square().mean()

    train_part(folder, {"layer": layer}, loss, OptimizerOptions(lr=0.1, ema_decay=0.9), steps)
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


def test_a_part_goes_on_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "whole", 6)
    trained(tmp_path / "parts", 4)
    parts = trained(tmp_path / "parts", 6, seed=1)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_part_that_is_done_is_only_loaded(tmp_path):
    done = trained(tmp_path, 3)
    assert all(torch.equal(value, done[name]) for name, value in trained(tmp_path, 3, seed=1).items())


def test_both_halves_of_a_batch_count(tmp_path):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)

    def loss(step: int, half: int) -> torch.Tensor:
        return layer.weight.sum() * (1.0, 3.0)[half]

    options = OptimizerOptions(lr=1.0, max_grad_norm=0.0, betas=(0.0, 0.0), weight_decay=0.0)
    gradients = []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.item()))
    train_part(tmp_path, {"layer": layer}, loss, options, 1)
    assert gradients == [0.5, 2.0]  # summed up: the mean of both


# -- VAE --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_vae():
    torch.manual_seed(0)
    model = new_vae()
    for module in model.modules():
        if isinstance(module, WanCausalConv3d):
            nn.init.normal_(module.weight, std=0.05)  # with a past
    return model


def clip(frames: int) -> torch.Tensor:
    return torch.randn(1, 3, frames, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


@torch.no_grad()
def test_in_training_it_codes_as_in_use(plain_vae):
    pixels = clip(9)
    latents = plain_vae.encode(pixels).latent_dist.mode()
    decoded = plain_vae.decode(latents).sample
    coder = Coder(plain_vae)
    assert (coder.encode(pixels) - latents).abs().max() < 1e-4
    assert (coder.decode(latents).clamp(-1, 1) - decoded).abs().max() < 1e-4


@torch.no_grad()
def test_a_first_frame_is_convolved_as_before():
    torch.manual_seed(0)
    convolution = WanCausalConv3d(4, 6, 3, padding=1)
    inputs = torch.randn(2, 4, 1, 8, 10)
    before = convolution(inputs)
    convolution.__class__ = FirstFrameConv3d
    assert (convolution(inputs) - before).abs().max() < 1e-5
    past = torch.randn(2, 4, 2, 8, 10)
    assert not torch.allclose(convolution(inputs, past), before)


def test_it_starts_without_a_past():
    model, pixels = new_vae(), clip(5)
    with torch.no_grad():
        changed = pixels.clone()
        changed[:, :, 0] = 0
        latents = [model.encode(value).latent_dist.mode()[:, :, 1] for value in (pixels, changed)]
    assert torch.equal(*latents)


def test_a_training_step_is_made_and_latents_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "STAGES", ((17, 1, 1.0),))
    monkeypatch.setitem(vae.VAE, "base_dim", 4)
    model = vae.train_vae(tmp_path, steps=1, clips=4)
    assert len(model.config.latents_mean) == 16 and min(model.config.latents_std) > 0


# -- Text and teacher -------------------------------------------------------------------------------------------------


def test_every_word_of_a_caption_is_a_token_and_others_are_spelled():
    tokenizer = make_tokenizer()
    for caption, _ in list(all_captions())[::25]:
        ids = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) < MAX_SEQUENCE_LENGTH / 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    assert tokenizer.unk_token_id not in tokenizer("A zebra?").input_ids


def test_the_teacher_gives_the_transformers_grid(tmp_path):
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**teacher.CONFIG)).save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    assert loaded(torch.rand(1, 3, 64, 64), grid=(4, 4)).shape == (1, 4, 4, 128)


def test_references_are_as_a_reader_gives_them():
    one = subjects(held_out=True)[0]
    first, again, other = (letterboxed_reference(one, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (64, 64, 3) and np.array_equal(first, again) and not np.array_equal(first, other)
    rows = (first < 250).any((1, 2))
    columns = (first < 250).any((0, 2))
    assert max(rows.sum(), columns.sum()) > 58  # it fills the picture, as a tight box does


def test_drawn_clips_are_what_the_models_take():
    frames, reference = draw_random(1, held_out=True, purpose="test")
    assert frames.shape == (17, 64, 64, 3) and reference.shape == (64, 64, 3)
    pixels = to_model(frames[None])
    assert pixels.shape == (1, 3, 17, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1


# -- The command ------------------------------------------------------------------------------------------------------


def test_stages_that_are_done_are_passed_over(tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(recipe, "launch", lambda arguments, processes: launched.append((arguments, processes)))
    (tmp_path / "vae").mkdir()
    assert main(["sprites", "--output", str(tmp_path), "--until", "teacher", "--processes", "1"]) == 0
    assert [arguments[arguments.index("--only") + 1] for arguments, _ in launched] == ["text", "teacher"]


def test_a_stage_that_fails_ends_the_command_in_a_line(tmp_path, capsys):
    (tmp_path / "vae").write_text("not a folder")
    arguments = ["sprites", "--output", str(tmp_path), "--only", "base"]
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("refalign-train: ")


def test_a_folder_that_another_works_in_is_left_alone(tmp_path, capsys):
    """Also if that other was killed: what it had started holds the folder as long as it lives."""
    code = "import sys, pathlib, subprocess, refalign_training.sprites.command as command\n"
    code += "with command._owned(pathlib.Path(sys.argv[1])):\n"
    code += "    child = subprocess.Popen(['sleep', '600'], close_fds=False); print(child.pid, flush=True)\n"
    code += "    child.wait()"
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    assert main(["sprites", "--output", str(tmp_path), "--until", "vae"]) == 1
    assert f"{tmp_path} is in use by another" in capsys.readouterr().err
    os.kill(child, signal.SIGKILL)


def test_wrong_numbers_are_refused(tmp_path, capsys):
    assert main(["sprites", "--output", str(tmp_path), "--processes", "0"]) == 1
    assert "--processes 0: pass 1 or more" in capsys.readouterr().err


# -- The ablation -----------------------------------------------------------------------------------------------------


def result(arm: str, seed: int, identity: float) -> dict:
    figures = dict.fromkeys(ablation.MEASURES, 0.5) | {"identity": identity}
    return {"name": f"{arm}-{seed}", "arm": arm, "seed": seed, "steps": 10, "figures": figures}


def test_its_table_has_means_and_spreads_of_what_is_done():
    results = [result("no RA loss", 0, 0.6), result("no RA loss", 1, 0.8), result("gate off", 0, 0.7)]
    lines = ablation.table(results).splitlines()
    assert lines[2].startswith("| no RA loss | 2 | 70 (60-80) | 50 (50-50) |")
    assert lines[3].startswith("| gate off | 1 | 70 | 50 |")
    assert len(lines) == 4


def test_its_plot_is_a_picture(tmp_path):
    ablation.plot([result("no RA loss", 0, 0.6)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_arm_is_a_run_that_options_allow(tmp_path, training_world):
    from refalign_training.run.checks import check
    from refalign_training.run.config_files import read_command

    for options in ablation.ARMS.values():
        check(read_command(["--config", "training/configs/sprites.yaml", *options]))


def test_arms_that_are_done_are_not_trained_again(tmp_path, monkeypatch):
    trained_arms, folder = [], tmp_path / "ablation"

    def train(command, output, options):
        trained_arms.append(output.name)
        (output / "model").mkdir(parents=True)
        figures = dict.fromkeys(ablation.MEASURES, 0.5)
        (output / "model.json").write_text(json.dumps(figures), "utf-8")

    plotted = []
    monkeypatch.setattr(recipe, "train", train)
    monkeypatch.setattr(ablation, "plot", lambda results, output: plotted.append(len(results)))
    monkeypatch.setattr(ablation, "plot_features", lambda *_: None)
    command = dataclasses.replace(recipe.SpritesCommand(), output=tmp_path, steps=10)
    assert ablation.run(command) == 0
    assert len(trained_arms) == len(ablation.ARMS) * len(ablation.SEEDS)
    assert plotted == list(range(1, len(trained_arms) + 1))
    results = json.loads((folder / "ablation.json").read_text("utf-8"))
    (folder / "ablation.json").write_text(json.dumps(results[1:]), "utf-8")
    trained_arms.clear()
    monkeypatch.setattr(recipe, "train", lambda command, output, options: trained_arms.append(output.name))
    assert ablation.run(command) == 0
    assert trained_arms == [results[0]["name"]]
