import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from refalign_evaluation.benchmark import BenchmarkSample
from refalign_evaluation.metrics.gme import Gme
from tests.evaluation.tiny_metrics import texture, write_gme, write_noise


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_gme(tmp_path_factory.mktemp("gme"))


@pytest.fixture(scope="module")
def gme(folder):
    return Gme(str(folder), CPU)


@pytest.fixture
def asked(gme, monkeypatch):
    """What the model is asked: tokens as text, and the pixels' grids."""
    texts = []
    tokens = gme._tokens
    monkeypatch.setattr(gme, "_tokens", lambda text: texts.append(text) or tokens(text))
    return texts


def test_the_prompt_is_asked_for_as_the_official_tool_does(gme, asked):
    gme.embed_text("a dog jumps")
    assert asked == [
        "<|im_start|>system\nFind an image that matches the given text.<|im_end|>\n<|im_start|>user\na dog jumps"
        "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    ]


def test_a_frame_is_given_with_the_default_instruction_and_all_its_tokens(gme, asked):
    next(gme.embed_frames([texture(480, 832)]))
    tokens = 17 * 30  # 476x840 in cells of 28
    assert asked == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * tokens
        + "<|vision_end|><|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    ]


# Frames are resized twice: 96x128 to 84x140 pixels and then to 13x21 tokens. Once would give 14x19
@pytest.mark.parametrize(("height", "width", "tokens"), [(96, 128, 13 * 21), (1600, 1600, 35 * 35)])
def test_frames_have_256_to_1280_tokens_whatever_the_folder_says(gme, asked, height, width, tokens):
    next(gme.embed_frames([np.zeros((height, width, 3), np.uint8)]))
    assert asked[0].count("<|image_pad|>") == tokens


def test_the_embedding_is_the_last_tokens_of_the_whole_model(gme):
    """The whole Qwen2-VL says the same, told to count positions through the image's tokens."""
    frame = texture(448, 448)
    _, processor = gme._processors
    inputs = processor([frame], return_tensors="pt")
    content = "<|vision_start|>" + "<|image_pad|>" * 256 + "<|vision_end|>"
    tokens = gme._tokens(
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )
    positions = torch.arange(tokens.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        hidden = gme._model(input_ids=tokens, position_ids=positions, **inputs).last_hidden_state[0, -1]
    expected = hidden / hidden.norm()
    assert torch.allclose(next(gme.embed_frames([frame]))[0], expected, atol=1e-5)


def test_frames_together_have_the_embeddings_that_they_have_alone(gme):
    frames = [texture(448, 448, seed) for seed in range(10)]  # of two batches
    together = torch.cat(list(gme.embed_frames(frames)))
    alone = torch.cat([next(gme.embed_frames([frame])) for frame in frames])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.std(0).max() > 1e-4


def test_the_score_is_the_mean_cosine(gme, monkeypatch):
    text = torch.tensor([1.0, 0.0])
    frames = torch.tensor([[0.6, 0.8], [-0.2, 0.9798]])
    monkeypatch.setattr(gme, "embed_text", lambda prompt: text)
    monkeypatch.setattr(gme, "embed_frames", lambda frames_: iter(frames.split(1)))
    assert gme.measure_frames([], "a dog") == pytest.approx(0.2)


def test_a_video_is_measured_by_its_prompt(gme, tmp_path):
    video = write_noise(tmp_path / "a.mp4", frames=2)
    scores = []
    for prompt in ("a dog", "two cats dance"):
        scores.append(gme.measure(video, BenchmarkSample("singleobj_1", prompt, (), ())))
    assert all(-1 <= score <= 1 for score in scores)
    assert scores[0] != scores[1]


def test_the_hubs_layout_with_and_without_a_head_is_read(folder, gme, tmp_path):
    weights = load_file(folder / "model.safetensors")
    assert {"lm_head.weight", "visual.patch_embed.proj.weight", "model.norm.weight"} <= weights.keys()
    copy = write_gme(tmp_path / "gme")
    del weights["lm_head.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    other = Gme(str(copy), CPU)
    assert torch.equal(other.embed_text("a dog"), gme.embed_text("a dog"))
    assert other.settings != gme.settings


@pytest.mark.parametrize("kind", ["qwen2_vl", ""])
def test_the_hubs_flat_configuration_is_read_and_none_of_its_code_is_run(gme, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    copy = write_gme(tmp_path / "gme")
    config = json.loads((copy / "config.json").read_text())
    text = config.pop("text_config")
    for name in ("rope_parameters", "model_type", "layer_types"):
        del text[name]
    rope = {"rope_theta": 5e5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    code = {"auto_map": {"AutoConfig": "own_code.Config", "AutoModel": "own_code.Model"}}
    (copy / "config.json").write_text(json.dumps({**text, **config, **rope, **code, "model_type": kind}))
    (copy / "own_code.py").write_text("raise SystemExit('own code was run')")
    other = Gme(str(copy), CPU)
    other.load()
    assert other._model.config.text_config.rope_parameters["rope_theta"] == 5e5
    assert other.embed_text("a dog").shape == (32,)


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    copy = write_gme(tmp_path / "gme")
    weights = load_file(copy / "model.safetensors")
    del weights["visual.patch_embed.proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks visual\.patch_embed\.proj\.weight"):
        Gme(str(copy), CPU).load()
