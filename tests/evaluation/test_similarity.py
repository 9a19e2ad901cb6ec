"""What says how similar squares of images are."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from refalign_evaluation.similarity import load_features
from tests.evaluation.tiny_metrics import texture, write_clip
from tests.tiny_refine import tiny_refine_pipeline


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("similarity") / "clip", dim=32)


@pytest.fixture(scope="module")
def pipe():
    return tiny_refine_pipeline()


@pytest.fixture(scope="module")
def squares():
    return [Image.fromarray(texture(224, 224, seed)) for seed in range(3)]


def test_clip_gives_the_embedding_that_transformers_gives(clip, pipe, squares):
    found = load_features(str(clip), pipe)(squares)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(squares, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        whole = CLIPModel.from_pretrained(clip).get_image_features(pixel_values=pixels)
    torch.testing.assert_close(found, F.normalize(whole.pooler_output, dim=-1))


def test_the_image_half_of_a_clip_is_enough(clip, pipe, squares, tmp_path):
    half = transformers.CLIPVisionModelWithProjection.from_pretrained(clip)
    half.save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    torch.testing.assert_close(load_features(str(tmp_path), pipe)(squares), load_features(str(clip), pipe)(squares))


def test_a_teacher_gives_the_mean_of_its_patches(pipe, squares, tmp_path):
    pipe.image_encoder.save_pretrained(tmp_path)
    found = load_features(str(tmp_path), pipe)(squares)
    small = [square.resize((56, 56), Image.Resampling.BICUBIC) for square in squares]
    own = load_features(None, tiny_refine_pipeline(reference_size=56))(small)
    torch.testing.assert_close((found * own).sum(dim=-1), torch.ones(3), atol=1e-3, rtol=0)


def test_every_feature_has_length_one(clip, pipe, squares):
    for name in (None, str(clip)):
        lengths = load_features(name, pipe)(squares).norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones(3))


def test_a_clip_that_is_not_whole_is_told(pipe, tmp_path):
    folder = write_clip(tmp_path / "clip", dim=32)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"The CLIP model of .* visual_projection"):
        load_features(str(folder), pipe)
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="it lacks visual_projection"):
        load_features(str(folder), pipe)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"The CLIP model of .* cannot be loaded"):
        load_features(str(folder), pipe)


def test_a_model_of_another_kind_is_told(pipe, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model type 'llama'"):
        load_features(str(tmp_path), pipe)
