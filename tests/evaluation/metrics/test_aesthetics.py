import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from refalign_evaluation.metrics.aesthetics import Aesthetics, Head
from tests.evaluation.tiny_metrics import texture, write_clip, write_head, write_noise


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetics")
    return write_clip(folder / "clip"), write_head(folder / "head.safetensors")


@pytest.fixture(scope="module")
def measure(models):
    return Aesthetics(str(models[0]), models[1], CPU)


def test_the_heads_keys_and_shapes_are_the_official_ones():
    shapes = {key: tuple(value.shape) for key, value in Head().state_dict().items()}
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    expected = {f"layers.{number}.weight": size for number, size in sizes.items()}
    expected |= {f"layers.{number}.bias": size[:1] for number, size in sizes.items()}
    assert shapes == expected


def test_the_head_is_linear_in_directions_and_takes_no_notice_of_length():
    head = Head().eval()
    one = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(head(one), head(7 * one), atol=1e-5)
    weight = torch.eye(768)
    bias = torch.zeros(768)
    for number in (0, 2, 4, 6, 7):
        layer = head.layers[number]
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    expected = one / one.norm(dim=1, keepdim=True) @ weight.T + bias
    assert torch.allclose(head(one), expected.squeeze(1), atol=1e-5)


def test_the_score_is_the_mean_of_the_frames_scores(measure):
    frames = [texture(seed=seed) for seed in range(3)]
    single = [measure.measure_frames([frame]) for frame in frames]
    assert np.ptp(single) > 1e-4
    assert measure.measure_frames(frames) == pytest.approx(np.mean(single), abs=1e-5)


def test_a_video_is_scored_by_32_frames(measure, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(measure, "measure_frames", lambda frames: counts.append(len(frames)) or 5.0)
    assert measure.measure(write_noise(tmp_path / "a.mp4"), None) == 5.0
    assert counts == [32]


def test_settings_tell_other_weights_apart(models, measure, tmp_path):
    other = {key: value + 1 for key, value in load_file(models[1]).items()}
    save_file(other, tmp_path / "head.safetensors")
    settings = Aesthetics(str(models[0]), tmp_path / "head.safetensors", CPU).settings
    assert settings["clip"] == measure.settings["clip"]
    assert settings["head"] != measure.settings["head"]


def test_a_model_without_an_image_part_is_refused(models, tmp_path):
    clip = write_clip(tmp_path / "clip")
    weights = load_file(clip / "model.safetensors")
    cut = {key: value for key, value in weights.items() if "visual_projection" not in key}
    save_file(cut, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="it lacks visual_projection"):
        Aesthetics(str(clip), models[1], CPU).load()


def test_another_clip_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="embeddings of 512 numbers, and the predictor takes 768"):
        Aesthetics(str(write_clip(tmp_path / "clip", dim=512)), models[1], CPU).load()
