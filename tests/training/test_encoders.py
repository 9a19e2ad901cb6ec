"""The frozen encoders give what the pipeline computes for inference."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from refalign_training.cache.decoding import Decoded
from refalign_training.cache.reader import normalize_latents
from refalign_training.encoders import (
    TeacherEncoder,
    TextEncoder,
    VaeEncoder,
    model_identity,
    vae_config,
)
from refalign_training.teachers import load_teacher
from tests.mock_hub import MockHub
from tests.training.small_cache import write_teacher


CPU = torch.device("cpu")
PROMPTS = ("a cat", "", "A  long   prompt &amp; more, " * 4, "x" * 700)


@pytest.fixture
def images() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in values]


@pytest.fixture(scope="module")
def text_encoder(wan_folder) -> TextEncoder:
    return TextEncoder(str(wan_folder), torch.float32, CPU)


def test_references_are_bit_for_bit_the_pipelines(pipeline, repo_folder, images):
    encoder = VaeEncoder(str(repo_folder), torch.float32, CPU, references=True)
    (item,) = encoder([Decoded(torch.from_numpy(np.stack(images)))])
    ours = normalize_latents(item["latents"], vae_config(str(repo_folder)))
    theirs = torch.cat([pipeline.encode_reference(image, 32, 48)[0] for image in images], dim=1)
    assert ours.shape == (16, 3, 4, 6)
    assert torch.equal(ours, theirs)


def test_normalize_latents_takes_batches_and_half_precision(wan_folder):
    config = vae_config(str(wan_folder))
    latents = torch.randn(2, 16, 3, 4, 6, dtype=torch.bfloat16)
    normal = normalize_latents(latents, config)
    assert normal.dtype == torch.float32
    assert torch.equal(normal[1], normalize_latents(latents[1], config))
    mean, std = (torch.tensor(config[name]) for name in ("latents_mean", "latents_std"))
    assert torch.equal(normal[:, 3], (latents[:, 3].float() - mean[3]) / std[3])


def test_a_clip_is_encoded_as_the_mean_of_its_posterior(pipeline, repo_folder):
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8))
    (item,) = VaeEncoder(str(repo_folder), torch.float32, CPU)([Decoded(frames)])
    video = pipeline.video_processor.preprocess_video([Image.fromarray(frame) for frame in frames.numpy()])
    with torch.no_grad():
        assert torch.equal(item["latents"], pipeline.vae.encode(video).latent_dist.mean[0])
    assert item["latents"].shape == (16, 3, 4, 6)


def test_prompts_are_the_pipelines_without_padding(pipeline, text_encoder):
    (item,) = text_encoder([Decoded(prompts=PROMPTS)])
    theirs, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=512)
    for number, padded in enumerate(theirs):
        ours = item[f"prompt_embeds_{number}"]
        torch.testing.assert_close(ours, padded[: len(ours)], atol=1e-4, rtol=1e-4)
        assert not padded[len(ours) :].any()
    assert len(item["prompt_embeds_1"]) == 1  # the end token alone
    assert len(item["prompt_embeds_3"]) == 512


def test_a_prompt_is_the_same_alone_and_among_others(text_encoder):
    together = text_encoder([Decoded(prompts=PROMPTS[:2]), Decoded(prompts=PROMPTS[2:])])
    alone = [text_encoder([Decoded(prompts=(prompt,))])[0]["prompt_embeds_0"] for prompt in PROMPTS]
    for embeds, expected in zip([e for item in together for e in item.values()], alone, strict=True):
        torch.testing.assert_close(embeds, expected, atol=1e-4, rtol=1e-4)


def test_more_prompts_than_a_batch(text_encoder):
    prompts = tuple(f"prompt {number}" for number in range(text_encoder.batch_size + 3))
    (item,) = text_encoder([Decoded(prompts=prompts)])
    last = text_encoder([Decoded(prompts=prompts[-1:])])[0]["prompt_embeds_0"]
    torch.testing.assert_close(item[f"prompt_embeds_{len(prompts) - 1}"], last, atol=1e-4, rtol=1e-4)


def test_teacher_features_lie_on_the_transformers_grid(tmp_path, images):
    folder = write_teacher(tmp_path / "teacher")
    encoder = TeacherEncoder(str(folder), torch.float32, CPU)
    (item,) = encoder([Decoded(torch.from_numpy(np.stack(images)))])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert item["features"].shape == (3, 2, 3, 24)
    assert torch.equal(item["features"], load_teacher(folder)(pixels))


def test_what_is_stored_has_the_dtype_asked_for(wan_folder, images):
    encoder = VaeEncoder(str(wan_folder), torch.bfloat16, CPU, references=True)
    assert encoder([Decoded(torch.from_numpy(np.stack(images)))])[0]["latents"].dtype == torch.bfloat16
    text_encoder = TextEncoder(str(wan_folder), torch.bfloat16, CPU)
    assert text_encoder([Decoded(prompts=("a",))])[0]["prompt_embeds_0"].dtype == torch.bfloat16


def test_identity_of_a_folder_is_its_content(wan_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(wan_folder, copy)
    identity = model_identity(str(wan_folder), ("vae",))
    assert model_identity(str(copy), ("vae",)) == identity
    text = model_identity(str(copy), ("text_encoder", "tokenizer"))
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # as long as before
    weights.write_bytes(content)
    assert model_identity(str(copy), ("vae",)) != identity
    assert model_identity(str(copy), ("text_encoder", "tokenizer")) == text


def test_identity_of_a_large_file_is_its_samples(tmp_path):
    weights = tmp_path / "model.safetensors"
    content = bytearray(np.random.default_rng(0).integers(0, 256, 3 * 2**20, dtype=np.uint8).tobytes())
    identities = set()
    for change in (0, 1, -1):  # the first and the last bytes are always among them
        content[change] ^= 255
        weights.write_bytes(content)
        identities.add(model_identity(str(tmp_path)))
    assert len(identities) == 2 + (content[0] != content[1])


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="holds no model in vae"):
        model_identity(str(tmp_path), ("vae",))
    with pytest.raises(ValueError, match="no VAE that can be read"):
        vae_config(str(tmp_path))


def test_identity_of_a_hub_id_is_its_commit_and_takes_no_weights(wan_folder, tmp_path):
    shutil.copytree(wan_folder, tmp_path / "repos/org/wan")
    code = "from refalign_training.encoders import model_identity as i; print(i('org/wan', ('vae',)))"
    with MockHub(tmp_path / "repos") as hub:
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == f"org/wan@{hub.sha('org/wan')}", done.stderr
        assert not [path for _, path in hub.requests if path.endswith(".safetensors")]
