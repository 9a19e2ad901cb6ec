"""The frozen encoders give what the pipeline computes for inference."""

import hashlib
import json
import re
import shutil
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from refalign.files import identity
from refalign.pipeline_refalign_wan import normalize_latents
from refalign_training.cache.encoders import (
    BATCH_SIZES,
    PARTS,
    TeacherEncoder,
    TextEncoder,
    VaeEncoder,
    fetch_models,
    model_identity,
    vae_config,
)
from refalign_training.data.decoding import Decoded
from refalign_training.method.teachers import load_teacher
from tests.mock_hub import MockHub
from tests.programs import call_script
from tests.training.small_cache import write_teacher


CPU = torch.device("cpu")
PROMPTS = ("a cat", "", "A  long   prompt &amp; more, " * 4, "x" * 700)


@pytest.fixture
def images() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in values]


@pytest.fixture(scope="module")
def text_encoder(wan_folder) -> TextEncoder:
    return TextEncoder(wan_folder, torch.float32, CPU)


def test_references_are_bit_for_bit_the_pipelines(pipeline, repo_folder, images):
    encoder = VaeEncoder(repo_folder, torch.float32, CPU, references=True)
    (item,) = encoder([Decoded(torch.from_numpy(np.stack(images)))])
    ours = normalize_latents(item["latents"], vae_config(repo_folder))
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
    (item,) = VaeEncoder(repo_folder, torch.float32, CPU)([Decoded(frames)])
    video = pipeline.video_processor.preprocess_video([Image.fromarray(frame) for frame in frames.numpy()])
    with torch.no_grad():
        assert torch.equal(item["latents"], pipeline.vae.encode(video).latent_dist.mean[0])
    assert item["latents"].shape == (16, 3, 4, 6)


def test_a_caption_beyond_what_is_read_is_told_once(wan_folder, caplog):
    encoder = TextEncoder(wan_folder, torch.float32, CPU)
    encoder([Decoded(prompts=("a cat",))])
    assert not caplog.records
    encoder([Decoded(prompts=("x" * 700,)), Decoded(prompts=("y" * 700,))])
    (record,) = caplog.records
    assert re.search(
        r"The caption 'x+\.\.\.' has \d{3} tokens\. Of this and other long ones, only the first 512", record.message
    )


def test_prompts_are_the_pipelines_without_padding(pipeline, text_encoder):
    (item,) = text_encoder([Decoded(prompts=PROMPTS)])
    theirs, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=512)
    for number, padded in enumerate(theirs):
        ours = item[f"prompt_embeds_{number}"]
        torch.testing.assert_close(ours, padded[: len(ours)], atol=1e-4, rtol=1e-4)
        assert not padded[len(ours) :].any()
    assert len(item["prompt_embeds_1"]) == 1  # the end token alone
    assert len(item["prompt_embeds_3"]) == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_is_the_same_bit_for_bit_alone_and_among_others_and_in_the_pipeline(wan_folder, pipeline, dtype):
    encoder = TextEncoder(wan_folder, dtype, CPU)
    whole = replace(pipeline, "text_encoder", encoder.text_encoder)
    together = encoder([Decoded(prompts=PROMPTS[:2]), Decoded(prompts=PROMPTS[2:])])
    for embeds, prompt in zip([e for item in together for e in item.values()], PROMPTS, strict=True):
        (alone,) = encoder([Decoded(prompts=(prompt,))])
        assert torch.equal(embeds, alone["prompt_embeds_0"])
        with torch.no_grad():  # with a gradient, other kernels run
            padded, _ = whole.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        assert torch.equal(embeds, padded[0, : len(embeds)].to(dtype))


def replace(pipeline, name, component):
    return type(pipeline)(**pipeline.components | {name: component})


def test_more_prompts_than_a_batch(text_encoder):
    prompts = tuple(f"prompt {number}" for number in range(BATCH_SIZES["text"] + 3))
    (item,) = text_encoder([Decoded(prompts=prompts)])
    last = text_encoder([Decoded(prompts=prompts[-1:])])[0]["prompt_embeds_0"]
    torch.testing.assert_close(item[f"prompt_embeds_{len(prompts) - 1}"], last, atol=1e-4, rtol=1e-4)


def test_teacher_features_lie_on_the_transformers_grid(tmp_path, images):
    folder = write_teacher(tmp_path / "teacher")
    encoder = TeacherEncoder(folder, torch.float32, CPU)
    (item,) = encoder([Decoded(torch.from_numpy(np.stack(images)))])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert item["features"].shape == (3, 2, 3, 24)
    assert torch.equal(item["features"], load_teacher(folder)(pixels))


def test_what_is_stored_has_the_dtype_asked_for(wan_folder, images):
    encoder = VaeEncoder(wan_folder, torch.bfloat16, CPU, references=True)
    assert encoder([Decoded(torch.from_numpy(np.stack(images)))])[0]["latents"].dtype == torch.bfloat16
    text_encoder = TextEncoder(wan_folder, torch.bfloat16, CPU)
    assert text_encoder([Decoded(prompts=("a",))])[0]["prompt_embeds_0"].dtype == torch.bfloat16


def test_identity_of_a_folder_is_its_content(wan_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(wan_folder, copy)
    identity = model_identity(wan_folder, ("vae",))
    (copy / "vae/README.md").write_text("nothing of it")
    assert model_identity(copy, ("vae",)) == identity
    text = model_identity(copy, ("text_encoder", "tokenizer"))
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 3] ^= 1  # as long as before
    weights.write_bytes(content)
    assert model_identity(copy, ("vae",)) != identity
    assert model_identity(copy, ("text_encoder", "tokenizer")) == text


def test_identity_takes_the_hubs_own_digests_of_large_files(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    content = b"weights"
    (tmp_path / "here/model.safetensors").write_bytes(content)
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(b"is not read")
    (tmp_path / "snapshot/model.safetensors").symlink_to(blob)
    here, hub = tmp_path / "here", tmp_path / "snapshot"
    assert identity(hub, hub.iterdir()) == identity(here, here.iterdir())


@pytest.mark.parametrize(
    ("family", "file", "pickle"),
    [
        ("video", "vae/diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("text", "text_encoder/model", "pytorch_model.bin"),
    ],
)
def test_pickled_parts_are_refused(wan_folder, tmp_path, family, file, pickle):
    folder = shutil.copytree(wan_folder, tmp_path / "wan")
    weights = folder / f"{file}.safetensors"
    torch.save(load_file(weights), weights.with_name(pickle))
    weights.unlink()
    with pytest.raises(ValueError, match=f"{pickle} is refused"):
        fetch_models([family], str(folder), None)
    encoder = VaeEncoder if family == "video" else TextEncoder
    with pytest.raises(ValueError, match=r"cannot be loaded .*safetensors"):
        encoder(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    ("part", "file"), [(VaeEncoder, "vae/diffusion_pytorch_model"), (TextEncoder, "text_encoder/model")]
)
def test_weights_that_are_not_finite_are_refused(wan_folder, tmp_path, part, file):
    folder = shutil.copytree(wan_folder, tmp_path / "wan")
    tensors = load_file(folder / f"{file}.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        part(folder, torch.float32, CPU)


def test_another_model_is_refused_before_its_weights_are_read(wan_folder, tmp_path):
    folder = shutil.copytree(wan_folder, tmp_path / "wan", ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((folder / "model_index.json").read_text("utf-8")) | {"boundary_ratio": 0.875}
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ValueError, match="which has two transformers"):
        fetch_models(["video"], str(folder), None)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="holds no model in vae"):
        model_identity(tmp_path, ("vae",))
    with pytest.raises(ValueError, match="no VAE that can be read"):
        vae_config(tmp_path)
    with pytest.raises(ValueError, match="no revision 'main'"):
        fetch_models(("video",), str(tmp_path), None, revision="main")


def test_a_hub_id_is_resolved_once_and_identified_by_its_content(wan_folder, tmp_path):
    shutil.copytree(wan_folder, tmp_path / "repos/org/wan")
    code = """
        import sys
        from pathlib import Path
        from refalign_training.cache.encoders import fetch_models
        for commit in ("one commit", "another commit"):
            Path(sys.argv[1]).write_text(commit)
            models = fetch_models(("video", "text"), "org/wan", None)
            print(models["video"].folder.name, models["video"].identity, models["text"].identity)
    """
    with MockHub(tmp_path / "repos") as hub:
        card = str(tmp_path / "repos/org/wan/README.md")
        done = call_script(textwrap.dedent(code), card, environment=hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        first, second = map(str.split, done.stdout.splitlines())
        assert second[0] == hub.sha("org/wan") != first[0]
        assert first[1:] == second[1:] == [model_identity(wan_folder, PARTS[family]) for family in ("video", "text")]
        assert len([path for _, path in hub.requests if path.endswith("/revision/main")]) == 2
        transformer = [path for _, path in hub.requests if "/transformer/" in path]
        assert transformer and all(path.endswith("/transformer/config.json") for path in transformer)
