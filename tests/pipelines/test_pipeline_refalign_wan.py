"""The pipeline: equal to the authors' sampling, to plain Wan without references, and good to its users."""

import inspect
import re

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel
from refalign.convert import convert
from refalign.keys import native_key
from refalign.pipeline_refalign_wan import (
    CALL_DEFAULTS,
    DEFAULT_NEGATIVE_PROMPT,
    check_size,
    combine_passes,
    complete_passes,
    count_passes,
    guidance_passes,
    passes_made,
)
from refalign.reference_images import prepare_reference_image
from tests.drawn_references import draw_face, draw_pet, draw_place


SIZE = {"height": 32, "width": 48, "num_frames": 5}


def arguments(**changes):
    """A small call: two references, two steps, latents out."""
    defaults = {
        "prompt": "a cat walks",
        "reference_images": [draw_face(0.1), draw_pet(0.4)],
        **SIZE,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "max_sequence_length": 16,
        "batch_passes": False,  # so that tests see each
    }
    return {**defaults, **changes}


def run(pipeline, **changes):
    return pipeline(**arguments(**changes)).frames


@pytest.fixture
def calls(pipeline):
    """Keyword arguments of every call of the transformer, in order."""
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


# -- Equality with the authors' implementation ------------------------------------------------------------------------


@pytest.fixture
def golden_pipeline(golden):
    pipeline = RefAlignWanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=5.0), golden.model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_golden(pipeline, golden, **changes):
    c, t = golden.c, golden.t
    return pipeline(
        prompt_embeds=t["in.prompt_embeds"],
        negative_prompt_embeds=t["in.negative_prompt_embeds"],
        latents=t["in.noise"],
        reference_latents=t["in.reference_latents"],
        num_inference_steps=4,
        height=c.latent_height * 8,
        width=c.latent_width * 8,
        num_frames=(c.latent_frames - 1) * 4 + 1,
        output_type="latent",
        **changes,
    ).frames


def test_sampling_equals_the_authors(golden, golden_pipeline):
    output, expected = sample_golden(golden_pipeline, golden), golden.t["out.sample_4_steps"]
    assert (output - expected).abs().max() / expected.abs().max() < 2e-3


def test_schedule_equals_the_authors(golden, golden_pipeline):
    sample_golden(golden_pipeline, golden)
    assert torch.equal(golden_pipeline.scheduler.timesteps, golden.t["out.sample_timesteps"])
    assert torch.equal(golden_pipeline.scheduler.sigmas[:-1], golden.t["out.sample_sigmas"])
    golden_pipeline._set_timesteps(50, torch.device("cpu"))
    assert torch.equal(golden_pipeline.scheduler.timesteps, golden.t["out.timesteps_50"])


# -- Guidance ---------------------------------------------------------------------------------------------------------

scales = st.one_of(st.sampled_from([0.0, 1.0, 5.0, 7.5]), st.floats(0, 20))


@given(scales, scales)
def test_passes_left_out_do_not_change_the_velocity(guidance_scale, image_guidance_scale):
    generator = torch.Generator().manual_seed(0)
    null, reference, full = torch.randn(3, 8, dtype=torch.float32, generator=generator)
    predictions = {"null": null, "reference": reference, "full": full}
    passes = guidance_passes(guidance_scale, image_guidance_scale)
    velocity = combine_passes([predictions[name] for name, _ in passes], [weight for _, weight in passes])
    expected = null + image_guidance_scale * (reference - null) + guidance_scale * (full - reference)
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("guidance_scale", "image_guidance_scale", "passes"),
    [
        (7.5, 5.0, ["null", "reference", "full"]),
        (7.5, 1.0, ["reference", "full"]),
        (5.0, 5.0, ["null", "full"]),
        (1.0, 5.0, ["null", "reference", "full"]),
        (0.0, 5.0, ["null", "reference"]),
        (1.0, 1.0, ["full"]),
    ],
)
def test_only_needed_passes_are_made(pipeline, calls, guidance_scale, image_guidance_scale, passes):
    run(pipeline, guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale, num_inference_steps=1)
    prompt = pipeline.encode_prompt("a cat walks", max_sequence_length=16)[0]
    seen = [
        "null"
        if not call["reference_hidden_states"].any()
        else ("full" if torch.allclose(call["encoder_hidden_states"], prompt, atol=1e-4) else "reference")
        for call in calls
    ]
    assert seen == passes


def test_without_references_a_step_is_wans(pipeline, calls):
    run(pipeline, reference_images=None, num_inference_steps=1)
    assert [call["reference_hidden_states"] for call in calls] == [None, None]


def test_velocities_are_combined_in_float32(pipeline):
    seen = []
    original = pipeline.scheduler.step
    pipeline.scheduler.step = lambda velocity, *args, **kwargs: (
        seen.append((velocity.dtype, args[1].dtype)) or original(velocity, *args, **kwargs)
    )
    pipeline.to(torch.bfloat16)
    run(pipeline)
    assert seen == [(torch.float32, torch.float32)] * 2


# -- Equality with plain Wan ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_without_references_it_is_wans_text_to_video(wan_folder, guidance_scale):
    """With UniPC, the scheduler of Wan's own repos."""
    call = arguments(guidance_scale=guidance_scale, negative_prompt="bad", output_type="np")
    del call["reference_images"], call["batch_passes"]
    outputs = []
    for cls in (WanPipeline, RefAlignWanPipeline):
        pipeline = cls.from_pretrained(wan_folder)
        pipeline.set_progress_bar_config(disable=True)
        call["generator"] = torch.Generator().manual_seed(0)
        outputs.append(pipeline(**call).frames)
    # Not bit for bit: where a file's weights lie in memory changes the last digit of a matrix product
    np.testing.assert_allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("source", [WanPipeline, RefAlignWanPipeline])
def test_from_pipe_takes_wans_pipelines_and_its_own(repo_folder, wan_folder, source):
    pipeline = source.from_pretrained(wan_folder if source is WanPipeline else repo_folder)
    ours = RefAlignWanPipeline.from_pipe(pipeline)
    ours.set_progress_bar_config(disable=True)
    assert type(ours.transformer) is RefAlignWanTransformer3DModel
    assert run(ours).shape == (1, 16, 2, 4, 6)


def test_plain_wan_weights_are_warned_of(wan_folder, caplog):
    RefAlignWanPipeline.from_pretrained(wan_folder)
    assert "without a RefAlign LoRA it hardly follows references" in caplog.text


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_the_end_of_a_text_that_is_not_read_is_told(name, pipeline, caplog):
    text = "a" * 20 + " a dragon"
    short = {"prompt": "a", "negative_prompt": "b", "num_inference_steps": 1, "reference_images": None}
    run(pipeline, **{**short, name: text, "max_sequence_length": 22})
    (told,) = [line for line in caplog.messages if "tokens" in line]
    assert told.startswith(f"`{name}` has 31 tokens, but the model reads 22: what begins with 'a dragon' is not read")


def test_a_text_that_is_read_whole_is_not_told(pipeline, caplog):
    run(pipeline, prompt="a" * 14, negative_prompt="", reference_images=None, num_inference_steps=1)
    assert caplog.messages == []


@pytest.mark.parametrize(("number", "told"), [(3, False), (4, True)])
def test_more_references_than_were_trained_are_told(number, told, pipeline, caplog):
    references = torch.zeros(1, 16, number, 4, 6)
    run(pipeline, reference_images=None, reference_latents=references, negative_prompt="", num_inference_steps=1)
    assert ("has 4 references, but RefAlign was trained with 3 at most" in caplog.text) is told


# -- References -------------------------------------------------------------------------------------------------------


def test_references_are_letterboxed_encoded_and_normalised(pipeline):
    latents = pipeline.encode_reference(draw_face(0.1), 32, 48)
    image = prepare_reference_image(draw_face(0.1), 32, 48, cut_out=False)
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    config = pipeline.vae.config
    mean, std = (torch.tensor(x).view(1, 16, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    expected = (pipeline.vae.encode(pixels).latent_dist.mode() - mean) / std
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    assert latents.shape == (1, 16, 1, 4, 6)


def test_reference_latents_stand_in_for_images(pipeline):
    latents = torch.cat([pipeline.encode_reference(image, 32, 48) for image in (draw_face(0.1), draw_pet(0.4))], dim=2)
    assert torch.equal(run(pipeline, reference_images=None, reference_latents=latents), run(pipeline))


def reference_forms(tmp_path):
    image = draw_face(0.1)
    image.save(tmp_path / "face.png")
    pixels = np.asarray(image)
    return {
        "pil": image,
        "numpy bytes": pixels,
        "numpy floats": pixels.astype(np.float32) / 255,
        "torch": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "path": tmp_path / "face.png",
        "string": str(tmp_path / "face.png"),
        "list": [image],
        "tuple": (image,),
        "list of lists": [[image]],
    }


@pytest.mark.parametrize(
    "form", ["numpy bytes", "numpy floats", "torch", "path", "string", "list", "tuple", "list of lists"]
)
def test_every_form_of_a_reference_gives_the_same_video(pipeline, tmp_path, form):
    forms = reference_forms(tmp_path)
    assert torch.equal(run(pipeline, reference_images=forms[form]), run(pipeline, reference_images=forms["pil"]))


def test_references_matter_and_so_does_their_order(pipeline):
    face, pet = draw_face(0.1), draw_pet(0.4)
    both = run(pipeline, reference_images=[face, pet])
    assert not torch.allclose(both, run(pipeline, reference_images=[pet, face]))
    assert not torch.allclose(both, run(pipeline, reference_images=[face]))


def test_samples_with_different_numbers_of_references_equal_one_by_one_runs(pipeline):
    prompts = ["a cat walks", "hills", "two friends", "an empty sky"]
    references = [[draw_pet(0.1)], [draw_face(0.3), draw_pet(0.6), draw_place(0.2)], [draw_place(0.5)], []]
    noise = [torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    together = run(pipeline, prompt=prompts, reference_images=references, latents=torch.cat(noise))
    for i in range(4):
        alone = run(pipeline, prompt=prompts[i], reference_images=references[i], latents=noise[i])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_groups_have_cache_contexts_of_their_own(pipeline, monkeypatch):
    names = []
    original = pipeline.transformer.cache_context
    monkeypatch.setattr(
        pipeline.transformer, "cache_context", lambda name, **kwargs: names.append(name) or original(name, **kwargs)
    )
    run(
        pipeline,
        prompt=["a", "b"],
        reference_images=[[draw_pet(0.1)], [draw_pet(0.1), draw_face(0.1)]],
        num_inference_steps=1,
    )
    assert names == ["null", "reference", "full", "null_1", "reference_1", "full_1"]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        (["a", "b"], "two", "could mean two things"),
        (["a", "b"], [["one"], ["one"], []], "3 lists for 2 prompts"),
        (["a", "b"], [["one"], "one"], "mixes images and lists"),
        ("a", [["one"], []], "2 lists for 1 prompts"),
        ("a", ["one", 3], "Reference 2 of prompt 1.*int"),
        ("a", ["nowhere.png"], "Reference 1 of prompt 1.*nowhere.png"),
    ],
)
def test_references_that_do_not_fit_are_named(pipeline, prompt, images, message):
    def fill(entry):
        if isinstance(entry, list):
            return [fill(e) for e in entry]
        return draw_pet(0.1) if entry == "one" else entry

    images = [draw_pet(0.1), draw_face(0.1)] if images == "two" else fill(images)
    with pytest.raises(ValueError, match=message):
        run(pipeline, prompt=prompt, reference_images=images)


# -- Wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 40}, "`height` must be divisible by 16, but is 40. Nearest: 32"),
        ({"width": 45}, "`width` must be divisible by 16, but is 45. Nearest: 48"),
        ({"height": 0}, "Nearest: 16"),
        ({"height": -16}, "Nearest: 16"),
        ({"height": 32.0}, "`height` must be a whole number"),
        ({"num_frames": 6}, r"`num_frames` must be 4k \+ 1, but is 6. Nearest: 5"),
        ({"num_frames": 80}, "Nearest: 81"),
        ({"num_frames": 0}, "Nearest: 1"),
        ({"num_frames": True}, "whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"image_guidance_scale": float("inf")}, "image_guidance_scale"),
        ({"image_guidance_scale": "5"}, "image_guidance_scale"),
        ({"output_type": "mp4"}, "output_type"),
        ({"prompt": None}, "exactly one of `prompt`"),
        ({"prompt_embeds": torch.zeros(1, 4, 32)}, "exactly one of `prompt`"),
        ({"prompt": 3}, "`prompt` must be a string"),
        ({"prompt": []}, "`prompt` must be a string"),
        ({"prompt": ["a", 1]}, "`prompt` must be a string"),
        ({"negative_prompt": ["a", "b"]}, "2 entries for 1 prompts"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 4, 32)}, "not both"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 32)}, r"\(1, 32\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 31)}, r"\(1, 4, 31\)"),
        ({"negative_prompt_embeds": torch.zeros(2, 4, 32)}, "negative_prompt_embeds"),
        ({"latents": torch.zeros(1, 16, 2, 4, 4)}, r"\(1, 16, 2, 4, 4\).*\(1, 16, 2, 4, 6\)"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 entries for 1 videos"),
        ({"reference_latents": torch.zeros(1, 16, 1, 4, 6)}, "not both"),
        ({"reference_images": None, "reference_latents": torch.zeros(1, 16, 1, 4, 4)}, r"\(1, 16, 1, 4, 4\)"),
        ({"reference_images": None, "reference_latents": torch.zeros(2, 16, 1, 4, 6)}, r"\(2, 16, 1, 4, 6\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"callback_on_step_end": 3}, "callable"),
        ({"attention_kwargs": "scale"}, "attention_kwargs"),
        ({"guidance_gate": (0.5, 1.5)}, r"`guidance_gate` must be two shares.*is \(0.5, 1.5\)"),
        ({"guidance_gate": (0.6, 0.5)}, "first not above the second"),
        ({"guidance_gate": (float("nan"), 1.0)}, "guidance_gate"),
        ({"guidance_gate": 0.5}, "guidance_gate"),
        ({"guidance_gate": (True, True)}, "guidance_gate"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"max_sequence_length": "16"}, "max_sequence_length"),
        ({"guidance_scale": True}, "guidance_scale"),
        ({"generator": 3}, "torch.Generator"),
        ({"latents": np.zeros((1, 16, 2, 4, 6))}, "`latents` must be a tensor"),
        ({"prompt": None, "prompt_embeds": [[1.0]]}, "`prompt_embeds` must be a tensor"),
        ({"reference_images": None, "reference_latents": [1]}, "`reference_latents` must be a tensor"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named_before_anything_is_computed(pipeline, changes, message, monkeypatch):
    monkeypatch.setattr(pipeline, "encode_prompt", None)
    monkeypatch.setattr(pipeline, "encode_reference", None)
    with pytest.raises(ValueError, match=message):
        run(pipeline, **changes)


@pytest.mark.parametrize(("missing", "changes"), [("vae", {"output_type": "np"}), ("vae", {}), ("text_encoder", {})])
def test_a_part_that_is_missing_and_needed_is_named(repo_folder, missing, changes):
    pipeline = RefAlignWanPipeline.from_pretrained(repo_folder, **{missing: None})
    with pytest.raises(ValueError, match=f"needs the pipeline's `{missing}`"):
        run(pipeline, **changes)


@given(height=st.integers(-100, 3000), num_frames=st.integers(-10, 400))
def test_the_nearest_valid_size_it_names_is_valid(height, num_frames):
    size = {"height": height, "width": 64, "num_frames": num_frames}
    for _ in range(2):
        try:
            check_size(**size)
        except ValueError as error:
            name, nearest = re.search(r"`(\w+)` must .*Nearest: (\d+)", str(error)).groups()
            assert abs(size[name] - int(nearest)) <= 8 or size[name] < 16
            size[name] = int(nearest)
    check_size(**size)


# -- Prompts, noise and outputs ---------------------------------------------------------------------------------------


def test_the_default_negative_prompt_is_wans_and_can_be_changed(pipeline):
    assert inspect.signature(pipeline.__call__).parameters["negative_prompt"].default == DEFAULT_NEGATIVE_PROMPT
    assert DEFAULT_NEGATIVE_PROMPT.startswith("色调艳丽") and DEFAULT_NEGATIVE_PROMPT.endswith("倒着走")
    default = run(pipeline)
    assert torch.equal(run(pipeline, negative_prompt=DEFAULT_NEGATIVE_PROMPT), default)
    assert not torch.equal(run(pipeline, negative_prompt="a dog"), default)
    assert torch.equal(run(pipeline, negative_prompt=None), run(pipeline, negative_prompt=""))


def test_embeddings_stand_in_for_prompts(pipeline):
    prompt_embeds, negative_prompt_embeds = pipeline.encode_prompt(
        "a cat walks", "a dog", max_sequence_length=16, num_videos_per_prompt=1
    )
    expected = run(pipeline, negative_prompt="a dog", num_videos_per_prompt=2)
    output = run(
        pipeline,
        prompt=None,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        num_videos_per_prompt=2,
    )
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_encode_prompt_works_without_the_other_parts(pipeline):
    alone = RefAlignWanPipeline(pipeline.tokenizer, pipeline.text_encoder, None, None, None)
    for ours, theirs in zip(alone.encode_prompt("a", "b"), pipeline.encode_prompt("a", "b"), strict=True):
        assert torch.equal(ours, theirs)


def test_noise_is_drawn_on_the_cpu_in_float32(pipeline):
    noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(pipeline), run(pipeline, latents=noise))


def test_videos_of_a_prompt_equal_runs_with_their_generators(pipeline):
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    references = [[draw_pet(0.1)], [draw_pet(0.1), draw_face(0.3)]]
    together = run(
        pipeline, prompt=["a", "b"], reference_images=references, num_videos_per_prompt=2, generator=generators
    )
    for i in range(4):
        alone = run(
            pipeline,
            prompt="ab"[i // 2],
            reference_images=references[i // 2],
            generator=torch.Generator().manual_seed(i),
        )
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_output_types_show_the_same_video(pipeline):
    videos = {kind: run(pipeline, output_type=kind) for kind in ("np", "pt", "pil", "latent")}
    assert videos["np"].shape == (1, 5, 32, 48, 3)
    np.testing.assert_allclose(videos["pt"].permute(0, 1, 3, 4, 2).numpy(), videos["np"], atol=1e-6)
    assert isinstance(videos["pil"][0][0], PIL.Image.Image)
    np.testing.assert_allclose(np.stack(videos["pil"][0]) / 255, videos["np"][0], atol=1 / 255)
    assert videos["latent"].shape == (1, 16, 2, 4, 6)


def test_tuple_and_output_class_are_equal(pipeline):
    assert torch.equal(pipeline(**arguments(), return_dict=False)[0], run(pipeline))


def test_given_latents_give_the_size(pipeline):
    latents = torch.randn(1, 16, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    references = torch.zeros(1, 16, 1, 6, 4)
    unsized = {"height": None, "width": None, "num_frames": None, "reference_images": None}
    assert run(pipeline, **unsized, latents=latents, reference_latents=references).shape == latents.shape
    assert run(pipeline, **{**unsized, "num_frames": 5}, reference_latents=references).shape == (1, 16, 2, 6, 4)


@pytest.mark.parametrize("num_frames", [1, 9])
def test_any_number_of_frames(pipeline, num_frames):
    assert run(pipeline, num_frames=num_frames, output_type="np").shape[1] == num_frames


# -- Schedulers, callbacks, interruption ------------------------------------------------------------------------------


def test_unipc_samples_too(pipeline):
    euler = run(pipeline, num_inference_steps=30)
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )
    unipc = run(pipeline, num_inference_steps=30)
    assert not torch.equal(unipc, euler)
    assert (unipc - euler).abs().mean() < 0.1 * euler.abs().mean()  # both solve the same equation


def test_callback_sees_and_changes_every_named_tensor(pipeline):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, float(timestep), sorted(kwargs)))
        return {"latents": torch.zeros_like(kwargs["latents"])}

    names = pipeline._callback_tensor_inputs
    output = run(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [entry[0] for entry in seen] == [0, 1]
    assert seen[0][1:] == (1000.0, sorted(names))
    assert not output.any()


def test_callback_may_change_guidance(pipeline, calls):
    def callback(pipe, step, timestep, kwargs):
        pipe._guidance_scale = pipe._image_guidance_scale = 1.0
        return kwargs

    run(pipeline, callback_on_step_end=callback)
    assert len(calls) == 3 + 1


def test_callback_may_raise_guidance(pipeline, calls):
    def callback(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 5.0

    run(pipeline, guidance_scale=1.0, image_guidance_scale=1.0, callback_on_step_end=callback)
    assert len(calls) == 1 + 2


def test_stochastic_sampling_follows_the_generator(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    assert torch.equal(run(pipeline), run(pipeline))


def test_interrupt_stops_after_the_step(pipeline, calls):
    def callback(pipe, step, timestep, kwargs):
        pipe._interrupt = True
        return kwargs

    run(pipeline, callback_on_step_end=callback, num_inference_steps=5)
    assert len(calls) == 3


def test_progress_bar_counts_steps(pipeline, capfd):
    pipeline.set_progress_bar_config(disable=False)
    run(pipeline)
    assert "2/2" in capfd.readouterr().err


def test_a_result_that_is_not_finite_is_no_black_video(pipeline):
    with pytest.raises(ValueError, match="The video holds numbers that are not finite"):
        run(pipeline, guidance_scale=1e38, output_type="np")


# -- What diffusers does to pipelines ---------------------------------------------------------------------------------


def test_save_and_load_by_the_installed_package(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = RefAlignWanPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is RefAlignWanTransformer3DModel
    expected = pipeline.transformer.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.transformer.state_dict().items())
    # Some CPUs round in another way where weights lie at another place in memory
    torch.testing.assert_close(run(loaded), run(pipeline), atol=1e-4, rtol=0)


def test_save_and_load_a_variant_in_half_precision(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="bf16")
    loaded = RefAlignWanPipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert loaded.transformer.dtype == torch.bfloat16
    assert torch.isfinite(run(loaded)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_numbers(pipeline, dtype):
    video = run(pipeline.to(dtype), output_type="np")
    assert np.isfinite(video).all()


def test_components_may_be_missing(repo_folder):
    pipeline = RefAlignWanPipeline.from_pretrained(repo_folder, vae=None, text_encoder=None, tokenizer=None)
    output = run(
        pipeline,
        prompt=None,
        reference_images=None,
        prompt_embeds=torch.zeros(1, 4, 32),
        negative_prompt_embeds=torch.zeros(1, 4, 32),
        reference_latents=torch.zeros(1, 16, 1, 4, 6),
    )
    assert output.shape == (1, 16, 2, 4, 6)


@pytest.mark.parametrize("offload", ["model", "group leaf", "group block"])
def test_offload_changes_nothing(pipeline, repo_folder, offload):
    """On the CPU, so that only the moving is tried: every part is called through its hook. (Sequential offload to the
    CPU fails in accelerate for every Wan pipeline.)"""
    expected = run(pipeline, output_type="np")
    offloaded = RefAlignWanPipeline.from_pretrained(repo_folder)
    device = torch.device("cpu")
    if offload == "model":
        offloaded.enable_model_cpu_offload(device=device)
    elif offload == "group leaf":
        offloaded.enable_group_offload(device, offload_type="leaf_level")
    else:
        offloaded.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
    for _ in range(2):
        np.testing.assert_allclose(run(offloaded, output_type="np"), expected, atol=1e-4)


def test_layerwise_casting_of_the_transformer(pipeline):
    expected = run(pipeline)
    pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    output = run(pipeline)
    assert torch.isfinite(output).all()
    assert 0 < (output - expected).abs().mean() < 0.5 * expected.abs().mean()


CACHES = {
    "FirstBlockCache": FirstBlockCacheConfig(threshold=0.3),
    "MagCache": MagCacheConfig(threshold=0.5, num_inference_steps=6, mag_ratios=torch.ones(6)),
    "SeaCache": SeaCacheConfig(threshold=10.0),
    "TaylorSeer": TaylorSeerCacheConfig(disable_cache_before_step=3, cache_interval=2),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_works_through_three_passes(pipeline, cache):
    plain = run(pipeline, num_inference_steps=6)
    pipeline.transformer.enable_cache(CACHES[cache])
    cached = run(pipeline, num_inference_steps=6)
    assert not torch.equal(cached, plain)
    assert (cached - plain).abs().mean() < 0.3 * plain.abs().mean()


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_starts_afresh_even_after_a_call_that_failed(pipeline, cache):
    def fail(pipe, step, timestep, kwargs):
        if step == 4:
            raise InterruptedError

    pipeline.transformer.enable_cache(CACHES[cache])
    first = run(pipeline, num_inference_steps=6)
    with pytest.raises(InterruptedError):
        run(pipeline, num_inference_steps=6, height=48, callback_on_step_end=fail)
    torch.testing.assert_close(run(pipeline, num_inference_steps=6), first)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_keeps_groups_of_samples_apart(pipeline, cache):
    references = [[draw_pet(0.1)], [draw_face(0.3), draw_pet(0.6)]]
    noise = [torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    pipeline.transformer.enable_cache(CACHES[cache])
    call = {"num_inference_steps": 6}
    together = run(pipeline, prompt=["a", "b"], reference_images=references, latents=torch.cat(noise), **call)
    for i in range(2):
        alone = run(pipeline, prompt="ab"[i], reference_images=references[i], latents=noise[i], **call)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


# -- The guidance gate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "made"),
    [(0, ["null", "reference", "full"]), (2, ["reference", "full"]), (5, ["reference", "full"]), (6, ["full"])],
)
def test_a_gate_leaves_out_the_null_pass_and_then_the_reference_pass(step, made):
    assert passes_made(["null", "reference", "full"], (0.2, 0.6), step, 10) == made


def test_a_gate_leaves_the_last_pass_and_the_first_step():
    assert passes_made(["null", "reference"], (0.0, 0.0), 1, 10) == ["reference"]
    assert passes_made(["null", "reference"], (0.0, 0.0), 0, 10) == ["null", "reference"]
    assert count_passes(["null", "reference", "full"], (0.2, 0.6), 10) == 10 + 6 + 2


def test_a_pass_that_is_left_out_keeps_its_distance():
    null, reference, full, later = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    names, differences = ["null", "reference", "full"], {}
    complete_passes(names, {"null": null, "reference": reference, "full": full}, differences)
    predictions = complete_passes(names, {"full": later}, differences)
    expected = [later + null - full, later + reference - full, later]
    torch.testing.assert_close(predictions, expected)


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 5.0}, {"reference_images": None}], ids=str)
def test_an_open_gate_changes_no_bit(pipeline, changes):
    assert torch.equal(run(pipeline, guidance_gate=(1, 1), **changes), run(pipeline, **changes))


def test_a_gate_saves_passes_and_changes_the_video_a_little(pipeline, calls):
    exact = run(pipeline, num_inference_steps=10)
    calls.clear()
    gated = run(pipeline, num_inference_steps=10, guidance_gate=(0.5, 0.8))
    assert len(calls) == 5 + 8 + 10
    assert not torch.equal(gated, exact)
    assert (gated - exact).abs().mean() < 0.3 * exact.abs().mean()


def test_a_gate_keeps_groups_of_samples_apart(pipeline):
    references = [[draw_pet(0.1)], [draw_face(0.3), draw_pet(0.6)], []]
    noise = [torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    call = {"num_inference_steps": 4, "guidance_gate": (0.25, 0.5)}
    together = run(
        pipeline,
        prompt=["a", "b", "c"],
        reference_images=references,
        latents=torch.cat(noise),
        num_videos_per_prompt=2,
        **call,
    )
    for i in range(6):
        alone = run(pipeline, prompt="abc"[i // 2], reference_images=references[i // 2], latents=noise[i], **call)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def change_scale(pipe, step, kwargs):
    pipe._guidance_scale = 3.0


def change_prompt_in_place(pipe, step, kwargs):
    kwargs["prompt_embeds"] *= 2


def change_negative_prompt(pipe, step, kwargs):
    return {"negative_prompt_embeds": kwargs["negative_prompt_embeds"] * 2}


def change_latents(pipe, step, kwargs):
    return {"latents": kwargs["latents"] * 2}


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (change_scale, [3, 2, 2, 3, 1]),
        (change_prompt_in_place, [3, 2, 2, 3, 1]),
        (change_negative_prompt, [3, 2, 2, 3, 1]),
        (change_latents, [3, 2, 2, 1, 1]),
    ],
)
def test_a_callback_that_changes_the_guidance_lets_a_step_make_all_passes(pipeline, calls, change, passes):
    counts = []

    def callback(pipe, step, timestep, kwargs):
        counts.append(len(calls) - sum(counts))
        return change(pipe, step, kwargs) if step == 2 else {}

    tensors = pipeline._callback_tensor_inputs
    call = {"num_inference_steps": 5, "guidance_gate": (0.2, 0.6)}
    run(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=tensors, **call)
    assert counts == passes


def test_the_step_before_a_gate_closes_takes_nothing_from_a_cache(pipeline):
    """What it adds is added again in all later steps."""
    computed = []
    last = pipeline.transformer.blocks[-1].attn1.to_q
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))  # all but what must be computed
    last.register_forward_pre_hook(lambda *_: computed.append(1))
    run(pipeline, num_inference_steps=10)
    assert len(computed) == 3
    computed.clear()
    run(pipeline, num_inference_steps=10, guidance_gate=(0.3, 0.6))
    assert len(computed) == 3 + 3 + 2


@pytest.mark.parametrize("cache", CACHES)
def test_a_gate_works_with_a_cache_and_with_passes_that_come_back(pipeline, cache):
    """The change is so small that the caches must tell their states of before the gate by something else."""

    def callback(pipe, step, timestep, kwargs):
        if step == 4:
            pipe._guidance_scale = 7.5 + 1e-3

    call = {"num_inference_steps": 6, "callback_on_step_end": callback}
    plain = run(pipeline, guidance_gate=(0.5, 0.7), **call)
    pipeline.transformer.enable_cache(CACHES[cache])
    cached = run(pipeline, guidance_gate=(0.5, 0.7), **call)
    assert torch.equal(run(pipeline, guidance_gate=(0.5, 0.7), **call), cached)
    assert (cached - plain).abs().mean() < 0.3 * plain.abs().mean()


# -- What is kept over the steps of a small model ---------------------------------------------------------------------


def count_keys(pipeline, monkeypatch) -> list:
    """Grows by one whenever a matrix multiplies a text to keys."""
    seen = []
    keys = [block.attn2.to_k for block in pipeline.transformer.blocks]
    original = torch.nn.Linear.forward

    def forward(self, text):
        if any(self is layer for layer in keys):
            seen.append(1)
        return original(self, text)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


@pytest.mark.parametrize("changes", [{}, {"prompt": ["a", "b"], "reference_images": "groups"}], ids=str)
def test_texts_and_positions_kept_over_steps_change_no_bit(pipeline, monkeypatch, changes):
    if changes.get("reference_images") == "groups":
        changes = {**changes, "reference_images": [[draw_pet(0.1)], [draw_face(0.3), draw_pet(0.6)]]}
    kept = run(pipeline, num_inference_steps=4, **changes)
    monkeypatch.setattr("refalign.pipeline_refalign_wan.FEW_TOKENS", 0)
    assert torch.equal(run(pipeline, num_inference_steps=4, **changes), kept)


def test_passes_are_one_batch_where_videos_are_small(pipeline, calls, monkeypatch):
    apart = run(pipeline)
    calls.clear()
    together = run(pipeline, batch_passes=None)
    assert [len(call["hidden_states"]) for call in calls] == [3, 3]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    calls.clear()
    monkeypatch.setattr("refalign.pipeline_refalign_wan.FEW_TOKENS", 0)
    assert torch.equal(run(pipeline, batch_passes=None), apart)
    assert [len(call["hidden_states"]) for call in calls] == 6 * [1]


PASSES = {
    "two": {"image_guidance_scale": 7.5},
    "Wan's two": {"reference_images": None},
    "groups": {"prompt": ["a", "b"], "reference_images": [[draw_pet(0.1)], [draw_face(0.3), draw_pet(0.6)]]},
    "gate": {"guidance_gate": (0.3, 0.7), "num_inference_steps": 4},
    "projection": {"guidance_projection": {"eta": 0.5, "thresholds": [50, 50]}},
    "unequal embeddings": {
        "prompt": None,
        "prompt_embeds": torch.ones(1, 6, 32),
        "negative_prompt_embeds": torch.zeros(1, 4, 32),
    },
}


@pytest.mark.parametrize("changes", PASSES.values(), ids=PASSES)
def test_one_batch_of_passes_changes_rounding_alone(pipeline, changes):
    apart = run(pipeline, **changes)
    torch.testing.assert_close(run(pipeline, **changes, batch_passes=True), apart, atol=1e-5, rtol=0)


def change_weights(pipe, step, kwargs):
    pipe.transformer.blocks[0].attn2.to_k.weight.data *= 0.5


def raise_guidance(pipe, step, kwargs):
    pipe._guidance_scale = 9.0


@pytest.mark.parametrize(
    "change", [change_scale, change_prompt_in_place, change_negative_prompt, change_weights, raise_guidance]
)
def test_one_batch_of_passes_follows_callbacks(pipeline, change):
    state = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    tensors = pipeline._callback_tensor_inputs
    call = {"num_inference_steps": 4, "image_guidance_scale": 7.5, "callback_on_step_end_tensor_inputs": tensors}

    def callback(pipe, step, timestep, kwargs):
        return change(pipe, step, kwargs) if step == 1 else {}

    made = []
    for batches in (False, True):
        pipeline.transformer.load_state_dict(state)
        made.append(run(pipeline, **call, callback_on_step_end=callback, batch_passes=batches))
    torch.testing.assert_close(made[1], made[0], atol=1e-5, rtol=0)
    pipeline.transformer.load_state_dict(state)
    assert (run(pipeline, **call) - made[0]).abs().max() > 1e-3


def test_a_callback_that_raises_the_guidance_needs_a_negative_prompt(pipeline):
    embeds = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False, max_sequence_length=16)[0]
    pipeline.text_encoder = None
    call = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "guidance_scale": 1.0}

    def callback(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 5.0

    with pytest.raises(ValueError, match="pass `negative_prompt_embeds`"):
        run(pipeline, **call, image_guidance_scale=1.0, callback_on_step_end=callback)


def test_texts_of_a_batch_of_passes_are_embedded_once(pipeline, monkeypatch):
    seen = count_keys(pipeline, monkeypatch)
    run(pipeline, num_inference_steps=4, batch_passes=True)
    assert len(seen) == len(pipeline.transformer.blocks)


def test_passes_with_a_cache_are_no_batch(pipeline, calls):
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=10))
    run(pipeline, batch_passes=None)
    assert {len(call["hidden_states"]) for call in calls} == {1}
    with pytest.raises(ValueError, match="`batch_passes` is True, but a cache keeps what it reuses for each pass"):
        run(pipeline, batch_passes=True)


def test_texts_are_embedded_once_for_all_steps_of_a_small_model_alone(pipeline, monkeypatch):
    seen = count_keys(pipeline, monkeypatch)
    run(pipeline, num_inference_steps=4)
    blocks = len(pipeline.transformer.blocks)
    assert len(seen) == 2 * blocks  # the prompt and the negative one
    seen.clear()
    monkeypatch.setattr("refalign.pipeline_refalign_wan.FEW_TOKENS", 0)
    run(pipeline, num_inference_steps=4)
    assert len(seen) == 4 * 3 * blocks


def test_positions_are_computed_once_for_all_steps_of_a_small_model_alone(pipeline, monkeypatch):
    sizes = []
    original = WanRotaryPosEmbed.forward

    def forward(self, latents):
        sizes.append(latents.shape)
        return original(self, latents)

    monkeypatch.setattr(WanRotaryPosEmbed, "forward", forward)
    run(pipeline, num_inference_steps=4)
    assert len(sizes) == 1
    monkeypatch.setattr("refalign.pipeline_refalign_wan.FEW_TOKENS", 0)
    run(pipeline, num_inference_steps=4)
    assert len(sizes) == 1 + 4 * 3


def test_a_callback_may_change_weights_that_texts_go_through(pipeline, monkeypatch):
    def callback(pipe, step, timestep, kwargs):
        for block in pipe.transformer.blocks:
            block.attn2.to_k.weight.data *= 0.5

    state = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    kept = run(pipeline, num_inference_steps=3, callback_on_step_end=callback)
    pipeline.transformer.load_state_dict(state)
    monkeypatch.setattr("refalign.pipeline_refalign_wan.FEW_TOKENS", 0)
    assert torch.equal(run(pipeline, num_inference_steps=3, callback_on_step_end=callback), kept)
    assert "forward" not in vars(pipeline.transformer.blocks[0].attn2.to_k)


# -- LoRA -------------------------------------------------------------------------------------------------------------


def test_lora_loads_scales_and_unloads(pipeline, lora_folder):
    base = run(pipeline)
    pipeline.load_lora_weights(lora_folder / "first")
    with_lora = run(pipeline)
    assert not torch.equal(with_lora, base)
    assert torch.equal(run(pipeline, attention_kwargs={"scale": 0.0}), base)
    pipeline.unload_lora_weights()
    assert torch.equal(run(pipeline), base)


def test_lora_in_native_keys_equals_diffusers_keys(pipeline, lora_folder, tmp_path):
    """The key style of ComfyUI and of Wan's own trainers: `diffusion_model.blocks.0.self_attn.q.lora_A.weight`."""
    pipeline.load_lora_weights(lora_folder / "first")
    expected = run(pipeline)
    native = {}
    for key, tensor in get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0").items():
        module, _, matrix = key.partition(".lora_")
        native[f"diffusion_model.{native_key(f'{module}.weight').removesuffix('.weight')}.lora_{matrix}"] = tensor
    save_file(native, tmp_path / "native.safetensors")
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / "native.safetensors")
    assert torch.equal(run(pipeline), expected)


def test_loras_combine_and_fuse(pipeline, lora_folder):
    base = run(pipeline)
    pipeline.load_lora_weights(lora_folder / "first", adapter_name="first")
    pipeline.load_lora_weights(lora_folder / "second", adapter_name="second")
    pipeline.set_adapters(["first", "second"], [0.7, 0.4])
    both = run(pipeline)
    pipeline.set_adapters(["first"], [0.7])
    assert not torch.allclose(run(pipeline), both)
    pipeline.set_adapters(["first", "second"], [0.7, 0.4])
    pipeline.fuse_lora(adapter_names=["first", "second"])
    torch.testing.assert_close(run(pipeline), both, atol=1e-3, rtol=1e-3)
    pipeline.unfuse_lora()
    pipeline.disable_lora()
    torch.testing.assert_close(run(pipeline), base, atol=1e-3, rtol=1e-3)


# -- A model's own defaults -------------------------------------------------------------------------------------------


OWN = {
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "negative_prompt": "",
}


def test_a_models_own_defaults_are_stored_and_taken(pipeline, tmp_path):
    own = RefAlignWanPipeline(**pipeline.components, call_defaults=OWN)
    own.save_pretrained(tmp_path / "own")
    loaded = RefAlignWanPipeline.from_pretrained(tmp_path / "own")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.call_defaults == CALL_DEFAULTS | OWN
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    short = loaded("a cat", reference_images=draw_pet(0.4), generator=generators[0]).frames
    values = {**OWN, "image_guidance_scale": 5.0, "max_sequence_length": 512}
    whole = pipeline("a cat", reference_images=draw_pet(0.4), generator=generators[1], **values).frames
    assert short.shape == (1, 5, 32, 48, 3)
    assert np.abs(short - whole).max() < 1e-4


def test_what_a_call_says_goes_before_a_models_own_defaults(pipeline):
    own = RefAlignWanPipeline(**pipeline.components, call_defaults=OWN)
    own.set_progress_bar_config(disable=True)
    assert own("a cat", num_frames=1, num_inference_steps=1).frames.shape == (1, 1, 32, 48, 3)


def test_without_own_defaults_they_are_the_published_models(pipeline):
    assert pipeline.call_defaults == CALL_DEFAULTS
    assert (CALL_DEFAULTS["guidance_scale"], CALL_DEFAULTS["image_guidance_scale"]) == (7.5, 5.0)


def test_defaults_of_no_argument_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"names \['fps'\]"):
        RefAlignWanPipeline(**pipeline.components, call_defaults={"fps": 8})


def test_a_converted_checkpoint_keeps_its_bases_defaults_and_schedule(pipeline, native_file, tmp_path):
    base = RefAlignWanPipeline(**pipeline.components, call_defaults=OWN)
    base.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    base.save_pretrained(tmp_path / "base")
    convert(native_file, tmp_path / "base", tmp_path / "converted")
    converted = RefAlignWanPipeline.from_pretrained(tmp_path / "converted")
    assert converted.call_defaults == CALL_DEFAULTS | OWN
    assert converted.scheduler.config.shift == 7.0
