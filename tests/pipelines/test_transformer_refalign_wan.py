"""The transformer against the authors' golden tensors, against plain Wan, and with what diffusers does to models."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

from refalign import RefAlignWanTransformer3DModel
from refalign.keys import diffusers_to_native
from refalign.transformer_refalign_wan import RefAlignWanTransformerBlock
from tests.parallel import run_on_two_ranks
from tests.tiny_pipeline import tiny_transformer


def velocity(model, inputs, **changes):
    with torch.no_grad():
        return model(**{**inputs, **changes}, return_dict=False)[0]


# -- Equality with the authors' implementation ------------------------------------------------------------------------


@pytest.mark.parametrize("timestep", [999, 537, 25])
def test_velocity_equals_the_authors(golden, timestep):
    output = golden.model(
        golden.t["in.latents"],
        torch.tensor([timestep]),
        golden.t["in.prompt_embeds"],
        reference_hidden_states=golden.t["in.reference_latents"],
    ).sample
    assert (output - golden.t[f"out.forward_t{timestep}"]).abs().max() < 1e-4


def test_velocity_with_null_references_equals_the_authors(golden):
    output = golden.model(
        golden.t["in.latents"],
        torch.tensor([537]),
        golden.t["in.prompt_embeds"],
        reference_hidden_states=torch.zeros_like(golden.t["in.reference_latents"]),
    ).sample
    assert (output - golden.t["out.forward_null_reference_t537"]).abs().max() < 1e-4


# -- Equality with plain Wan ------------------------------------------------------------------------------------------


def test_same_parameters_and_configuration_as_wan(transformer):
    wan = tiny_transformer()
    assert {k: v.shape for k, v in transformer.state_dict().items()} == {
        k: v.shape for k, v in wan.state_dict().items()
    }
    ours = {k: v for k, v in transformer.config.items() if k[0] != "_"}
    branch = {"reference_rope": "frames", "text_to_references": False}
    assert ours == {k: v for k, v in wan.config.items() if k[0] != "_"} | branch


def test_without_references_it_is_wan_bit_for_bit(transformer, inputs):
    inputs.pop("reference_hidden_states")
    assert torch.equal(velocity(transformer, inputs), velocity(tiny_transformer(), inputs))


def test_from_wan_shares_the_weights_and_leaves_wan_as_it_is(transformer, inputs):
    wan = tiny_transformer()
    shared = RefAlignWanTransformer3DModel.from_wan(wan)
    assert shared.proj_out.weight.data_ptr() == wan.proj_out.weight.data_ptr()
    assert type(wan.blocks[0]) is not type(shared.blocks[0])
    assert torch.equal(velocity(shared, inputs), velocity(transformer, inputs))


def test_from_wan_refuses_a_transformer_with_loras():
    wan = tiny_transformer()
    wan.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="LoRAs cannot be given the reference branch"):
        RefAlignWanTransformer3DModel.from_wan(wan)


# -- The reference branch ---------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 4),
    references=st.integers(1, 5),
    height=st.sampled_from([2, 4, 6]),
    width=st.sampled_from([2, 4, 8]),
)
def test_any_shape_gives_the_videos_shape_and_tokens_of_every_reference(batch, frames, references, height, width):
    model = tiny_transformer(RefAlignWanTransformer3DModel)
    with torch.no_grad():
        output = model(
            torch.randn(batch, 16, frames, height, width),
            torch.full((batch,), 500),
            torch.randn(batch, 5, 32),
            reference_hidden_states=torch.randn(batch, 16, references, height, width),
            output_reference_layers=(1, 0),
        )
    assert output.sample.shape == (batch, 16, frames, height, width)
    tokens = references * (height // 2) * (width // 2)
    assert [r.shape for r in output.reference_hidden_states] == [(batch, tokens, 24)] * 2


def test_a_batch_equals_its_samples_one_by_one(transformer, inputs):
    together = velocity(transformer, inputs)
    for i in range(2):
        alone = velocity(transformer, {name: value[i : i + 1] for name, value in inputs.items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_reference_tokens_are_what_the_blocks_return(transformer, inputs):
    returned = []
    for block in transformer.blocks:
        block.register_forward_hook(lambda module, args, output: returned.append(output))
    with torch.no_grad():
        output = transformer(**inputs, output_reference_layers=(1, 0))
    references = 2 * 2 * 3
    assert torch.equal(output.reference_hidden_states[0], returned[1][:, -references:])
    assert torch.equal(output.reference_hidden_states[1], returned[0][:, -references:])


def test_asking_for_reference_tokens_does_not_change_the_velocity(transformer, inputs):
    sample, references = transformer(**inputs, output_reference_layers=[0], return_dict=False)
    assert torch.equal(sample, velocity(transformer, inputs))
    assert len(references) == 1


def test_the_text_reaches_references_only_through_the_video(transformer, inputs):
    """In the first block reference tokens skip the text, so another prompt leaves them as they are there."""
    prompt = inputs.pop("encoder_hidden_states")
    first, second = (
        transformer(**inputs, encoder_hidden_states=text, output_reference_layers=(0, 1)).reference_hidden_states
        for text in (prompt, -prompt)
    )
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_gradients_of_reference_tokens_stop_at_their_block(transformer, inputs):
    transformer(**inputs, output_reference_layers=(0,)).reference_hidden_states[0].sum().backward()
    assert transformer.blocks[0].ffn.net[2].weight.grad is not None
    assert transformer.blocks[1].ffn.net[2].weight.grad is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_hidden_states": torch.zeros(2, 16, 2, 4, 4)}, r"\(2, 16, 2, 4, 4\)"),
        ({"reference_hidden_states": torch.zeros(1, 16, 2, 4, 6)}, r"\(1, 16, 2, 4, 6\)"),
        ({"reference_hidden_states": torch.zeros(2, 16, 0, 4, 6)}, "Pass `None`"),
        ({"reference_hidden_states": torch.zeros(2, 16, 4, 6)}, "reference_hidden_states"),
        ({"timestep": torch.zeros(2, 30)}, "timestep"),
        ({"output_reference_layers": (2,)}, "block 2, but the blocks are 0 to 1"),
        ({"output_reference_layers": (-1,)}, "block -1"),
        ({"reference_hidden_states": None, "output_reference_layers": (0,)}, "no reference tokens"),
    ],
)
def test_wrong_arguments_are_named(transformer, inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        transformer(**{**inputs, **changes})


# -- What diffusers does to models ------------------------------------------------------------------------------------


def gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs, output_reference_layers=(0, 1))
    (output.sample.square().mean() + sum(r.square().mean() for r in output.reference_hidden_states)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_equal_gradients(transformer, inputs):
    plain = gradients(transformer.train(), inputs)
    transformer.enable_gradient_checkpointing()
    for name, gradient in gradients(transformer, inputs).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("with_references", [True, False])
def test_lora_scale_is_applied_once(transformer, inputs, with_references):
    if not with_references:
        inputs.pop("reference_hidden_states")
    base = velocity(transformer, inputs)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["proj_out"], init_lora_weights=False))
    full = velocity(transformer, inputs, attention_kwargs={"scale": 1.0})
    half = velocity(transformer, inputs, attention_kwargs={"scale": 0.5})
    assert not torch.allclose(full, base)
    # The output is linear in the last layer's LoRA, so half the scale is half the way
    torch.testing.assert_close(half - base, 0.5 * (full - base), atol=1e-6, rtol=1e-4)


def test_lora_of_attention_and_feed_forward_saves_and_loads(transformer, inputs, tmp_path):
    target_modules = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False))
    with_lora = velocity(transformer, inputs)
    transformer.save_lora_adapter(tmp_path)
    fresh = tiny_transformer(RefAlignWanTransformer3DModel)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(velocity(fresh, inputs), with_lora)


def cached_steps(model, inputs, config=None, steps=8):
    """Velocities of several steps with slowly changing latents, in the contexts of two passes; and block calls."""
    calls = []
    for block in model.blocks:
        block.attn1.to_q.register_forward_pre_hook(lambda *_: calls.append(1))
    if config is not None:
        model.enable_cache(config)
    outputs = {"reference": [], "null": []}
    for i in range(steps):
        step = {**inputs, "hidden_states": inputs["hidden_states"] * (1 - 0.02 * i)}
        for name, references in (("reference", step["reference_hidden_states"]), ("null", None)):
            references = torch.zeros_like(step["reference_hidden_states"]) if references is None else references
            with model.cache_context(name, step_index=i, sigma=1 - i / steps, num_inference_steps=steps):
                outputs[name].append(velocity(model, {**step, "reference_hidden_states": references}))
    return {name: torch.stack(values) for name, values in outputs.items()}, len(calls)


CACHES = {
    "FirstBlockCache": (FirstBlockCacheConfig(threshold=0.0), FirstBlockCacheConfig(threshold=0.5)),
    "MagCache": (
        MagCacheConfig(retention_ratio=1.0, num_inference_steps=8, mag_ratios=torch.ones(8)),
        MagCacheConfig(threshold=0.5, num_inference_steps=8, retention_ratio=0.2, mag_ratios=torch.ones(8)),
    ),
    "SeaCache": (SeaCacheConfig(threshold=0.0), SeaCacheConfig(threshold=10.0)),
    "TaylorSeer": (
        TaylorSeerCacheConfig(disable_cache_before_step=100),
        TaylorSeerCacheConfig(disable_cache_before_step=3, cache_interval=3),
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_never_skips_changes_nothing(transformer, inputs, cache):
    expected, _ = cached_steps(copy.deepcopy(transformer), inputs)
    outputs, _ = cached_steps(transformer, inputs, CACHES[cache][0])
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name])


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_skips_work_and_keeps_passes_apart(transformer, inputs, cache):
    expected, all_calls = cached_steps(copy.deepcopy(transformer), inputs)
    outputs, calls = cached_steps(transformer, inputs, CACHES[cache][1])
    assert calls < all_calls
    for name in expected:
        other = expected["null" if name == "reference" else "reference"]
        error = (outputs[name] - expected[name]).abs().mean()
        # Were the passes' states mixed, a cached output would be as far off as the passes are from each other
        assert error < 0.3 * (other - expected[name]).abs().mean()


def test_a_disabled_cache_leaves_no_trace(transformer, inputs):
    expected = velocity(transformer, inputs)
    transformer.enable_cache(TaylorSeerCacheConfig())
    transformer.disable_cache()
    assert torch.equal(velocity(transformer, inputs), expected)


@pytest.mark.parametrize("config_class", [PyramidAttentionBroadcastConfig, FasterCacheConfig])
def test_caches_that_mix_guidance_passes_are_refused(transformer, config_class):
    with pytest.raises(ValueError, match=f"{config_class.__name__} mixes.*FirstBlockCacheConfig"):
        transformer.enable_cache(config_class())
    assert not transformer.is_cache_enabled


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_changes_nothing(transformer, inputs, offload_type):
    expected = velocity(transformer, inputs)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    transformer.enable_group_offload(torch.device("cpu"), offload_type=offload_type, **blocks)
    assert torch.equal(velocity(transformer, inputs), expected)


def test_layerwise_fp8_casting_stores_fp8_and_stays_close(transformer, inputs):
    expected = velocity(transformer, inputs)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert transformer.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn
    assert transformer.patch_embedding.weight.dtype == torch.float32
    difference = (velocity(transformer, inputs) - expected).abs().mean()
    assert 0 < difference < 0.2 * expected.abs().mean()


def test_repeated_blocks_compile_once_without_graph_breaks(transformer, inputs):
    expected = velocity(transformer, inputs)
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(velocity(transformer, inputs), expected)


@pytest.mark.parametrize("with_projectors", [False, True])
def test_from_single_file_reads_native_checkpoints(golden, tmp_path, with_projectors):
    golden.model.save_config(tmp_path / "transformer")
    native = {k: v for k, v in golden.native.items() if with_projectors or "input_mlp" not in k}
    save_file(native, tmp_path / "native.safetensors")
    loaded = RefAlignWanTransformer3DModel.from_single_file(
        str(tmp_path / "native.safetensors"), config=str(tmp_path), subfolder="transformer"
    )
    assert type(loaded.blocks[0]) is RefAlignWanTransformerBlock
    for name, tensor in golden.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_from_single_file_keeps_in_float32_what_from_pretrained_keeps(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    native = diffusers_to_native(transformer.state_dict())
    loaded = RefAlignWanTransformer3DModel.from_single_file(native, config=str(tmp_path), dtype=torch.bfloat16)
    expected = RefAlignWanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32, torch.bfloat16}
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("saving", [{}, {"variant": "bf16"}, {"max_shard_size": "40KB"}], ids=str)
def test_save_and_load(transformer, inputs, tmp_path, saving):
    transformer.save_pretrained(tmp_path, **saving)
    loaded = RefAlignWanTransformer3DModel.from_pretrained(tmp_path, variant=saving.get("variant"))
    assert torch.equal(velocity(loaded, inputs), velocity(transformer, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(transformer, inputs, dtype):
    expected = velocity(transformer, inputs)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    output = velocity(transformer.to(dtype), half)
    assert output.dtype == dtype
    assert (output.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_fused_projections_change_nothing(transformer, inputs):
    expected = velocity(transformer, inputs)
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(velocity(transformer, inputs), expected)


def test_loads_into_plain_wan_and_back(transformer, inputs, tmp_path):
    transformer.save_pretrained(tmp_path)
    wan = WanTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(velocity(RefAlignWanTransformer3DModel.from_wan(wan), inputs), velocity(transformer, inputs))


def test_context_parallel_on_two_ranks_is_exact(transformer, inputs):
    """Ulysses over two gloo processes; 36 tokens, of which a rank's half cuts through the video."""
    expected = transformer(**inputs, output_reference_layers=(0, 1))
    for sample, references in run_on_two_ranks(transformer, inputs):
        torch.testing.assert_close(sample, expected.sample, atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(references, expected.reference_hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
