"""The small refining model: its frozen parts, its stages and its card."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from refalign.hub import REFINE_PIPELINE_TAG, fill_card
from refalign_training.cli import main
from refalign_training.sprites import recipe, refine_model, refine_parts
from refalign_training.sprites.refine_parts import (
    correspondence,
    image_psnr,
    to_model,
    train_image_encoder,
    train_image_vae,
)
from refalign_training.sprites.views import IMAGE_SIDE
from tests.tiny_refine import tiny_refine_pipeline


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(refine_parts.VAE, "block_out_channels", (8, 8, 8))
    monkeypatch.setitem(refine_parts.ENCODER, "num_hidden_layers", 1)
    monkeypatch.setattr(refine_parts, "VAE_BATCH", 4)
    monkeypatch.setattr(refine_parts, "ENCODER_BATCH", 4)


def test_the_vae_is_trained_and_its_latents_deviate_by_one(tmp_path, small):
    vae = train_image_vae(tmp_path, steps=2, images=8)
    images = refine_parts.draw_views(8, held_out=False, purpose="refine vae").images
    assert images.shape == (8, IMAGE_SIDE, IMAGE_SIDE, 3)
    with torch.no_grad():
        latents = vae.encode(to_model(images), return_dict=False)[0].mean * vae.config["scaling_factor"]
    assert latents.shape == (8, 4, 16, 16)
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
    assert 0 < image_psnr(vae, images) < 30


def test_the_encoder_is_trained_to_a_grid_of_patches(tmp_path, small):
    torch.manual_seed(0)
    before = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**refine_parts.ENCODER))
    encoder = train_image_encoder(tmp_path, steps=2, images=8)
    patches = refine_parts.patches_of(encoder, torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE))
    assert patches.shape == (1, 256, refine_parts.ENCODER["hidden_size"])
    weight = "encoder.layer.0.mlp.fc1.weight"
    assert not torch.equal(before.state_dict()[weight], encoder.state_dict()[weight])


def test_patches_that_know_nothing_are_found_by_chance(small):
    class Alike(torch.nn.Module):
        config = Dinov2WithRegistersConfig(**refine_parts.ENCODER)

        def forward(self, pixels):
            noise = torch.randn(len(pixels), 261, 8, generator=torch.Generator().manual_seed(int(pixels.sum())))
            return type("Output", (), {"last_hidden_state": noise})

    found, by_chance = correspondence(cast(Any, Alike()), 12)
    assert found == pytest.approx(by_chance, rel=0.15)
    assert 0.5 < by_chance < 1.5


def test_its_stages_are_those_made_with_refine(tmp_path, monkeypatch, capsys):
    launched = []
    monkeypatch.setattr(recipe, "launch", lambda arguments, processes: launched.append(arguments))
    (tmp_path / "refine-vae").mkdir()
    assert main(["sprites", "--output", str(tmp_path), "--refine", "--until", "refine-encoder"]) == 0
    assert [arguments[arguments.index("--only") + 1] for arguments in launched] == ["refine-encoder"]
    assert main(["sprites", "--output", str(tmp_path), "--until", "refine-base"]) == 1
    assert "--until refine-base is not one of the stages" in capsys.readouterr().err
    assert main(["sprites", "--output", str(tmp_path), "--refine", "--ablation"]) == 1
    assert "pass one of them" in capsys.readouterr().err


def test_its_card_says_what_was_measured():
    value = {"value": 0.5, "low": 0.4, "high": 0.6, "samples": 200}
    arms, both = dict.fromkeys(("input", "whole", "predicted", "true"), value), {"mask": value, "box": value}
    figures = {
        "triplets": 200,
        "alignment": {"model": both, "best_constant": both, "best_matching": both},
        "error": arms,
        "similarity": arms,
        "less_error": {"whole than input": value, "predicted than whole": value},
        "outside": 0.0,
    }
    parts = {"vae": {"psnr": 27.7, "images": 200}, "encoder": {"distance": 0.51, "by_chance": 0.99}}
    facts = {"figures": figures, "parts": parts, "steps": 4500, "seen": 144_000, "weights": 3_000_000}
    facts |= refine_model.card_rows(figures)
    card = fill_card("refine-sprites", None, None, pipeline_tag=REFINE_PIPELINE_TAG, **facts)
    assert "| model | 0.500 (0.400 to 0.600) | 0.500 (0.400 to 0.600) |" in card
    assert "whole than input 0.500 (0.400 to 0.600); predicted than whole 0.500 (0.400 to 0.600)." in card
    assert "on 200 triplets" in card and "144,000 pictures seen" in card


def test_all_weights_of_a_folder_are_counted(tmp_path):
    pipe = tiny_refine_pipeline()
    pipe.save_pretrained(tmp_path)
    parts = (pipe.vae, pipe.unet, pipe.image_encoder, pipe.reference_projector)
    counts = [np.sum([parameter.numel() for parameter in part.parameters()]) for part in parts]
    assert refine_model.count_weights(tmp_path) == sum(counts)


def test_some_views_have_stickers_where_a_part_is_seen():
    plain = refine_parts.draw_views(4, held_out=False, purpose="test")
    stuck = refine_parts.draw_views(4, held_out=False, purpose="test", sticker_share=1.0)
    assert torch.equal(stuck.parts, plain.parts)
    changed = (stuck.images != plain.images).any(-1).reshape(4, 16, 4, 16, 4).any((2, 4)).reshape(4, -1)
    assert changed.any(1).all() and not changed[stuck.parts.numpy() == 0].any()
