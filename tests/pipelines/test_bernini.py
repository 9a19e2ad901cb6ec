"""Bernini-R (arXiv 2605.22344) by our classes, against tensors that its authors' code computed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler, WanTransformer3DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel, cli, prepare_reference_image
from refalign.convert import convert
from refalign.keys import diffusers_to_native
from refalign.pipeline_refalign_wan import combine_passes, project_guidance
from tests.parallel import run_on_two_ranks
from tests.tiny_pipeline import tiny_wan_pipeline


FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def bernini() -> SimpleNamespace:
    """What the authors' implementation computed (`t`), the references (`references`), and our model (`model`)."""
    file = FIXTURES / "bernini_forward_sample.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    model = RefAlignWanTransformer3DModel(**config["transformer"], reference_rope="sources", text_to_references=True)
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    references = [tensors[f"in.reference_{number}"] for number in (1, 2, 3)]
    many = [tensors[f"in.many_reference_{number}"] for number in range(1, 8)]
    return SimpleNamespace(t=tensors, c=config, references=references, many=many, model=model.eval())


def velocity(bernini, timestep, references, prompt="in.prompt_embeds", **changes):
    with torch.no_grad():
        return bernini.model(
            bernini.t["in.latents"],
            torch.tensor([timestep]),
            bernini.t[prompt],
            reference_hidden_states=references,
            **changes,
        )


# -- The transformer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep", [999, 537, 25])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_velocity_with_references_of_their_own_sizes_equals_the_authors(bernini, timestep, number):
    output = velocity(bernini, timestep, bernini.references[:number]).sample
    assert (output - bernini.t[f"out.forward_t{timestep}_{number}_references"]).abs().max() < 1e-4


@pytest.mark.parametrize("timestep", [999, 537, 25])
def test_velocity_without_references_equals_the_authors(bernini, timestep):
    output = velocity(bernini, timestep, None, "in.negative_prompt_embeds").sample
    assert (output - bernini.t[f"out.forward_t{timestep}_null"]).abs().max() < 1e-4


def test_more_references_than_were_trained_share_the_trained_range(bernini):
    output = velocity(bernini, 537, bernini.many).sample
    assert (output - bernini.t["out.forward_t537_7_references"]).abs().max() < 1e-4


def test_rotary_positions_equal_the_authors(bernini):
    cosines, sines = bernini.model.rope(bernini.t["in.latents"], bernini.references)
    names = ["out.rope_video", *(f"out.rope_reference_{number}" for number in (1, 2, 3))]
    expected = torch.cat([bernini.t[name] for name in names])
    ours = torch.stack([cosines[0, :, 0, ::2], sines[0, :, 0, ::2]], dim=-1)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_one_tensor_of_references_is_a_list_of_equal_sizes(bernini):
    references = [bernini.references[1], bernini.references[1].flip(-1)]
    as_list = velocity(bernini, 537, references).sample
    as_tensor = velocity(bernini, 537, torch.cat(references, dim=2)).sample
    torch.testing.assert_close(as_tensor, as_list, atol=1e-5, rtol=1e-5)


def test_reference_tokens_come_for_each_reference(bernini):
    output = velocity(bernini, 537, bernini.references, output_reference_layers=(1, 0))
    for layer in output.reference_hidden_states:
        assert [tokens.shape[1] for tokens in layer] == [12, 30, 14]


def test_the_order_of_references_is_seen(bernini):
    first, second, _ = bernini.references
    expected = velocity(bernini, 537, [first, second]).sample
    assert (velocity(bernini, 537, [second, first]).sample - expected).abs().max() > 1e-3


def test_sources_and_switches_are_kept(bernini, tmp_path):
    bernini.model.save_pretrained(tmp_path)
    model = RefAlignWanTransformer3DModel.from_pretrained(tmp_path)
    loaded = SimpleNamespace(t=bernini.t, model=model)
    expected = velocity(bernini, 537, bernini.references).sample
    ours = velocity(loaded, 537, bernini.references).sample
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_equal_gradients(bernini):
    gradients = []
    for checkpointing in (False, True):
        model = bernini.model
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        arguments = (bernini.t["in.latents"], torch.tensor([537]), bernini.t["in.prompt_embeds"])
        model(*arguments, reference_hidden_states=bernini.references).sample.square().mean().backward()
        gradients.append(model.patch_embedding.weight.grad.clone())
    bernini.model.disable_gradient_checkpointing()
    bernini.model.zero_grad()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([], "empty list"),
        ([torch.zeros(1, 16, 2, 4, 4)], r"Reference 1 .* \(1, 16, 2, 4, 4\)"),
        ([torch.zeros(1, 16, 1, 4, 4), torch.zeros(1, 16, 1, 5, 4)], r"Reference 2 .* a multiple of 2"),
    ],
)
def test_wrong_references_are_named(bernini, references, message):
    with pytest.raises(ValueError, match=message):
        velocity(bernini, 537, references)


def test_a_list_is_refused_where_references_are_frames(transformer, inputs):
    with pytest.raises(ValueError, match="reference_rope"):
        transformer(**{**inputs, "reference_hidden_states": [inputs["reference_hidden_states"]]})


def test_an_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="'rows'"):
        RefAlignWanTransformer3DModel(num_layers=1, reference_rope="rows")


def test_context_parallel_on_two_ranks_is_exact(bernini):
    """Ulysses over two gloo processes; the half of 128 tokens cuts through the video."""
    inputs = {
        "hidden_states": bernini.t["in.latents"],
        "timestep": torch.tensor([537]),
        "encoder_hidden_states": bernini.t["in.prompt_embeds"],
        "reference_hidden_states": bernini.references,
    }
    expected = velocity(bernini, 537, bernini.references, output_reference_layers=(0, 1))
    for sample, references in run_on_two_ranks(bernini.model, inputs):
        torch.testing.assert_close(sample, expected.sample, atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(references, expected.reference_hidden_states, strict=True):
            torch.testing.assert_close(ours, torch.cat(theirs, dim=1), atol=1e-5, rtol=1e-4)


# -- Reference images -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resized() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "bernini_reference_resize.npz"))


@pytest.mark.parametrize("number", range(4))
def test_references_are_resized_as_the_authors_do(resized, number):
    long_edge = int(resized["max_image_size"])
    image = prepare_reference_image(resized[f"in_{number}"], 480, 848, cut_out=False, long_edge=long_edge)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels, resized[f"out_{number}"], atol=1e-6)


def test_sizes_of_references_equal_the_authors(resized):
    for long_edge, width, height, *expected in resized["sizes"].tolist():
        image = prepare_reference_image(Image.new("RGB", (width, height)), 480, 848, False, long_edge)
        assert [*image.size] == expected, (long_edge, width, height)


@pytest.mark.parametrize("long_edge", [15, 0, 850, 848.0, True])
def test_a_wrong_long_edge_is_named(long_edge):
    with pytest.raises(ValueError, match="`long_edge` must be a multiple of 16"):
        prepare_reference_image(Image.new("RGB", (32, 32)), 480, 848, False, long_edge)


# -- Sampling ---------------------------------------------------------------------------------------------------------

APG = {"eta": 0.5, "thresholds": [50, 50]}
BINDING_APG = {"eta": 0.3, "thresholds": [9, 4], "momentum": -0.5}


def bernini_pipeline(model, **parts) -> RefAlignWanPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None} | parts
    return RefAlignWanPipeline(scheduler=scheduler, transformer=model, first_sigma=0.999, **parts)


def sample(bernini, references, **changes):
    pipeline = bernini_pipeline(bernini.model)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "latents": bernini.t["in.noise"],
        "prompt_embeds": bernini.t["in.prompt_embeds"],
        "negative_prompt_embeds": bernini.t["in.negative_prompt_embeds"],
        "reference_latents": references,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "image_guidance_scale": 4.5,
        "output_type": "latent",
    }
    return pipeline(**(arguments | changes)).frames


@pytest.mark.parametrize(
    ("name", "number", "projection"),
    [
        ("plain", 3, {}),
        ("plain_1_reference", 1, {}),
        ("apg", 3, APG),
        ("apg_binding", 3, BINDING_APG),
        ("t2v", 0, {}),
        ("t2v_apg", 0, APG),
    ],
)
def test_samples_equal_the_authors(bernini, name, number, projection):
    ours = sample(bernini, bernini.references[:number] or None, guidance_projection=projection)
    assert (ours - bernini.t[f"out.sample_4_steps_{name}"]).abs().max() < 1e-3


@pytest.mark.parametrize(("steps", "name"), [(4, "sample_{}"), (40, "{}_40")])
def test_timesteps_equal_the_authors(bernini, steps, name):
    pipeline = bernini_pipeline(bernini.model)
    pipeline._set_timesteps(steps, torch.device("cpu"))
    assert torch.equal(pipeline.scheduler.timesteps, bernini.t["out." + name.format("timesteps")])
    assert torch.equal(pipeline.scheduler.sigmas, bernini.t["out." + name.format("sigmas")])


def test_samples_with_references_of_other_sizes_equal_one_by_one_runs(bernini):
    one, two, _ = bernini.references
    references = [[one, two], [two], [one, two], []]
    batch = {name: bernini.t[f"in.{name}"].repeat(4, 1, 1) for name in ("prompt_embeds", "negative_prompt_embeds")}
    noise = torch.randn(4, *bernini.t["in.noise"].shape[1:], generator=torch.Generator().manual_seed(0))
    together = sample(bernini, references, latents=noise, guidance_projection=APG, **batch)
    for number, own in enumerate(references):
        alone = sample(bernini, own or None, latents=noise[number : number + 1], guidance_projection=APG)
        torch.testing.assert_close(together[number : number + 1], alone, atol=1e-3, rtol=1e-3)


def test_projection_that_keeps_all_is_plain_guidance():
    generator = torch.Generator().manual_seed(0)
    latents, *predictions = torch.randn(4, 2, 16, 3, 4, 4, generator=generator)
    plain = combine_passes(predictions, [1, 4.5, 4.0])
    projected = project_guidance(predictions, [1, 4.5, 4.0], latents, 0.7, {"eta": 1}, {})
    torch.testing.assert_close(projected, plain, atol=1e-4, rtol=1e-4)


def test_equal_scales_make_all_passes_where_guidance_is_projected(bernini):
    ours = sample(bernini, bernini.references, image_guidance_scale=4.0, guidance_projection={"eta": 1})
    plain = sample(bernini, bernini.references, image_guidance_scale=4.0, guidance_projection={})
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        ({"etta": 1}, "etta"),
        ({"thresholds": 50}, "two `thresholds`"),
        ({"eta": -1}, "-1"),
        ({"momentum": 2}, "between -1 and 1"),
        ("apg", "must be a dict"),
    ],
)
def test_a_wrong_projection_is_named(bernini, projection, message):
    with pytest.raises(ValueError, match=message):
        sample(bernini, None, guidance_projection=projection)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"prompt_prefix": "You are"}, "`prompt_prefix` must have a text for each"),
        ({"prompt_prefix": {"references": "You are"}}, "no_references"),
        ({"prompt_prefix": {"references": 1, "no_references": "a"}}, "must have a text"),
        ({"first_sigma": 0}, "above 0, at most 1, but is 0"),
        ({"first_sigma": "0.9"}, "'0.9'"),
    ],
)
def test_wrong_settings_of_a_models_files_are_named_before_a_call(bernini, kept, message):
    with pytest.raises(ValueError, match=message):
        RefAlignWanPipeline(None, None, None, UniPCMultistepScheduler(), bernini.model, **kept)


def test_more_references_than_bernini_was_trained_with_are_told(bernini, caplog):
    sample(bernini, bernini.many, num_inference_steps=1)
    assert "7 references, but Bernini-R was trained with 5" in caplog.text


# -- Conversion -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Wan 2.1 pipeline, whose transformer is of the size of `release`."""
    folder = tmp_path_factory.mktemp("base") / "wan"
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def release(base, tmp_path_factory) -> Path:
    """A folder as ByteDance/Bernini-R-1.3B-Diffusers is: no model_index.json, stock keys and configuration."""
    folder = tmp_path_factory.mktemp("release")
    WanTransformer3DModel.from_pretrained(base / "transformer").save_pretrained(folder / "transformer")
    (folder / "config.json").write_text(json.dumps({"model_type": "bernini_renderer"}))
    return folder


@pytest.fixture(scope="module")
def converted(base, release, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "bernini"
    arguments = ["--checkpoint", str(release), "--base", str(base), "--family", "bernini", "--output", str(output)]
    assert cli.main(["convert", *arguments]) == 0
    return output


def test_a_converted_model_keeps_what_is_bernini_in_its_files(converted):
    pipeline = RefAlignWanPipeline.from_pretrained(converted)
    assert pipeline.transformer.config.reference_rope == "sources"
    assert pipeline.transformer.config.text_to_references
    assert pipeline.call_defaults["guidance_scale"] == 4.0 and pipeline.call_defaults["image_guidance_scale"] == 4.5
    assert pipeline.call_defaults["reference_long_edge"] == 848
    assert type(pipeline.scheduler) is UniPCMultistepScheduler and pipeline.scheduler.config.flow_shift == 5
    assert "license: apache-2.0" in (converted / "README.md").read_text("utf-8")


def test_a_native_checkpoint_converts_to_the_same_weights(base, release, converted, tmp_path):
    model = WanTransformer3DModel.from_pretrained(release / "transformer")
    native = tmp_path / "wan2.1_bernini_1.3B.safetensors"
    save_file(diffusers_to_native(model.state_dict()), native)
    convert(native, base, tmp_path / "bernini", family="bernini")
    ours = load_file(tmp_path / "bernini/transformer/diffusion_pytorch_model.safetensors")
    theirs = load_file(converted / "transformer/diffusion_pytorch_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_converted_model_opens_without_the_package(converted):
    pipeline = DiffusionPipeline.from_pretrained(converted, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = [Image.new("RGB", (40, 24), "red"), Image.new("RGB", (24, 24), "blue")]
    size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "reference_long_edge": 48}
    frames = pipeline("A cat from image0.", reference_images=images, output_type="np", **size).frames
    assert frames.shape == (1, 5, 32, 48, 3)


def test_prompts_get_the_prefix_of_their_task(converted):
    pipeline = RefAlignWanPipeline.from_pretrained(converted)
    with_references, without = pipeline._with_prefix([" a  cat ", "a dog"], [["latents"], None])
    assert with_references == "You are a helpful assistant specialized in subject-to-video generation.a cat"
    assert without == "You are a helpful assistant specialized in text-to-video generation.a dog"


def test_generate_shows_what_the_model_sees(converted, tmp_path):
    Image.new("RGB", (100, 60), "red").save(tmp_path / "cat.png")
    size = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "1", "--reference-long-edge", "48"]
    files = ["--reference", str(tmp_path / "cat.png"), "--output", str(tmp_path / "cat.mp4"), "--preview"]
    assert cli.main(["generate", "--model", str(converted), "--prompt", "The cat from image0.", *size, *files]) == 0
    (preview,) = tmp_path.glob("cat.*.png")
    assert Image.open(preview).size == (48, 32)


def test_sizes_of_another_model_in_the_configuration_ask_for_a_later_revision(base, release, tmp_path):
    shutil.copytree(release, tmp_path / "early")
    config = json.loads((release / "transformer/config.json").read_text())
    (tmp_path / "early/transformer/config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match="--revision"):
        convert(tmp_path / "early", base, tmp_path / "out", family="bernini")


def test_two_experts_are_refused(base, release, tmp_path):
    shutil.copytree(release, tmp_path / "14b")
    shutil.copytree(release / "transformer", tmp_path / "14b/transformer_2")
    with pytest.raises(ValueError, match="two transformers"):
        convert(tmp_path / "14b", base, tmp_path / "out", family="bernini")
    assert not (tmp_path / "out").exists()


def test_own_sizes_are_refused_by_a_model_that_reads_the_videos(base):
    pipeline = RefAlignWanPipeline.from_pretrained(base)
    with pytest.raises(ValueError, match="`reference_long_edge` is 48"):
        pipeline("a cat", reference_long_edge=48)
