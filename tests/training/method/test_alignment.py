"""Reference alignment over the blocks: against the authors' training steps, its projectors and its schedule."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from refalign import RefAlignWanTransformer3DModel
from refalign.keys import diffusers_to_native
from refalign_training.method.alignment import ReferenceAlignment, alignment_weight, normalize_over_grid
from refalign_training.method.losses import (
    add_noise,
    flow_matching_loss,
    reference_alignment_loss,
    timestep_gate,
    timestep_table,
)
from tests.tiny_pipeline import tiny_transformer


HEIGHT, WIDTH = 2, 3


@pytest.fixture
def hidden_states():
    """Those of two blocks: 2 samples, 3 references of 2x3 tokens."""
    return tuple(torch.randn(2, 2, 3 * HEIGHT * WIDTH, 8, generator=torch.Generator().manual_seed(1)).requires_grad_())


@pytest.fixture
def features():
    return torch.randn(2, 3, HEIGHT, WIDTH, 6, generator=torch.Generator().manual_seed(2))


def make_alignment(**options) -> ReferenceAlignment:
    torch.manual_seed(0)
    return ReferenceAlignment(8, 6, (0, 3), **options)


# -- Equality with the authors' implementation ------------------------------------------------------------------------


@pytest.fixture(params=[0, 1])
def training_step(golden, request):
    """One of the authors' training steps, computed by ours: losses and gradients beside what they have to be."""
    expected = {k: v for k, v in golden.t.items() if k.startswith((f"out.train{request.param}", "out.train_"))}
    expected = {k.removeprefix(f"out.train{request.param}."): v for k, v in expected.items()}
    layers = range(golden.c.num_align_layers)
    alignment = ReferenceAlignment(golden.c.dim, golden.c.vfm_dim, layers)
    alignment.load_native_state_dict(golden.projectors)
    timestep, latents, noise = expected["timestep"], golden.t["in.latents"], golden.t["in.noise"]
    output = golden.model(
        add_noise(latents, noise, timestep),
        timestep,
        golden.t["in.prompt_embeds"],
        reference_hidden_states=golden.t["in.reference_latents"],
        output_reference_layers=layers,
    )
    aligned = alignment(output.reference_hidden_states, golden.t["in.vfm_features"].movedim(1, -1))
    timesteps, weights = timestep_table("refalign")
    weight = weights[(timesteps - timestep).abs().argmin()][None]
    weighted_mse, gate = flow_matching_loss(output.sample, noise, latents, weight), timestep_gate(timestep)
    loss = weighted_mse + gate * aligned.total
    loss.sum().backward()
    losses = {"weighted_mse": weighted_mse, "ra_total": aligned.total, "ra_neg": aligned.negative}
    gradients = diffusers_to_native({name: p.grad for name, p in golden.model.named_parameters()})
    gradients |= {
        f"blocks.{i}.input_mlp.{n}": p.grad for i, m in alignment.projectors.items() for n, p in m.named_parameters()
    }
    prefix = f"grad{request.param}.native."
    expected_gradients = {k.removeprefix(prefix): v for k, v in golden.t.items() if k.startswith(prefix)}
    return losses | {"gate": gate, "loss": loss}, expected, gradients, expected_gradients


def test_losses_equal_the_authors(training_step):
    losses, expected, _, _ = training_step
    errors = {name: (value - expected[name]).abs().max().item() for name, value in losses.items()}
    assert max(errors.values()) < 1e-4, errors


def test_gradients_equal_the_authors(training_step):
    _, _, gradients, expected = training_step
    errors = {name: ((gradients[name] - g).norm() / g.norm()).item() for name, g in expected.items()}
    assert any("input_mlp" in name for name in errors) and max(errors.values()) < 2e-3, errors


# -- The alignment ----------------------------------------------------------------------------------------------------


def test_losses_are_means_over_the_layers(hidden_states, features):
    alignment = make_alignment(positive_margin=0.2, negative_margin=0.9, negative_weight=0.5)
    output = alignment(hidden_states, features, subject_ids=[0, 1, 0])
    layers = [
        reference_alignment_loss(
            projector(tokens, (HEIGHT, WIDTH)),
            features.flatten(1, 3),
            HEIGHT * WIDTH,
            positive_margin=0.2,
            negative_margin=0.9,
            negative_weight=0.5,
            subject_ids=[0, 1, 0],
        )
        for projector, tokens in zip(alignment.projectors.values(), hidden_states, strict=True)
    ]
    torch.testing.assert_close(output.total, sum(layer.total for layer in layers) / 2)
    torch.testing.assert_close(output.negative, sum(layer.negative for layer in layers) / 2)
    torch.testing.assert_close(output.cosine, torch.stack([layer.cosine for layer in layers], 1))
    torch.testing.assert_close(output.active_negatives, torch.stack([layer.active_negatives for layer in layers], 1))


def test_the_defaults_are_the_papers():
    alignment = ReferenceAlignment(8, 6)
    assert alignment.layers == tuple(range(9))
    assert alignment.native_state_dict().keys() == {
        f"blocks.{i}.input_mlp.proj.{part}.weight" for i in range(9) for part in (0, 2)
    }


def test_gradients_stop_at_the_last_aligned_block(inputs):
    model = tiny_transformer(RefAlignWanTransformer3DModel, num_layers=3)
    alignment = ReferenceAlignment(24, 6, (0, 1))
    output = model(**inputs, output_reference_layers=(0, 1))
    alignment(output.reference_hidden_states, torch.randn(2, 2, 2, 3, 6)).total.sum().backward()
    with_gradient = [any(p.grad is not None for p in block.parameters()) for block in model.blocks]
    assert with_gradient == [True, True, False]


@pytest.mark.parametrize("projector", ["linear", "conv"])
def test_a_dropped_sample_costs_nothing(hidden_states, features, projector):
    alignment = make_alignment(projector=projector, spatial_norm=True)
    features[1] = 0
    nothing = torch.tensor([[[0.0]], [[torch.nan]]])
    hidden_states = [(tokens.detach() + nothing).requires_grad_() for tokens in hidden_states]
    output = alignment(hidden_states, features, keep=torch.tensor([True, False]))
    gradients = torch.autograd.grad(output.total.sum(), (*hidden_states, *alignment.parameters()))
    assert all((value[1] == 0).all() and (value[0] != 0).all() for value in output)
    assert all(g[1].count_nonzero() == 0 and g[0].count_nonzero() for g in gradients[: len(hidden_states)])
    assert all(g.isfinite().all() for g in gradients)


def test_bfloat16_hidden_states_meet_float32_projectors(hidden_states, features):
    alignment = make_alignment()
    halves = [tokens.detach().bfloat16() for tokens in hidden_states]
    output = alignment(halves, features.bfloat16())
    assert output.total.dtype == torch.float32
    expected = alignment([tokens.float() for tokens in halves], features.bfloat16().float())
    torch.testing.assert_close(output.total, expected.total)


def test_only_hidden_states_and_features_are_held_until_the_backward_pass(hidden_states, features):
    alignment = make_alignment()
    inside = {p.data_ptr() for p in (*alignment.parameters(), *hidden_states, features)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        alignment(hidden_states, features)
    assert sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in inside) == 0


def test_the_conv_projector_sees_neighbours_of_its_own_reference_only(hidden_states):
    projector = make_alignment(projector="conv").projectors["0"]
    tokens = hidden_states[0].detach()
    changed = tokens.clone()
    changed[0, 0] += 1  # the top left corner of the first reference
    before, after = (projector(t, (HEIGHT, WIDTH)) for t in (tokens, changed))
    moved = (before != after).any(-1)[0].reshape(3, HEIGHT, WIDTH)
    assert moved.tolist() == [[[True, True, False]] * 2, [[False] * 3] * 2, [[False] * 3] * 2]


def test_spatial_norm_is_of_each_reference_and_channel(features):
    normalized = normalize_over_grid(5 * features + 3).flatten(2, 3)
    torch.testing.assert_close(normalized.mean(2), torch.zeros(2, 3, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.std(2, correction=0), torch.ones(2, 3, 6), atol=1e-4, rtol=0)


def test_spatial_norm_is_applied_to_the_teacher(hidden_states, features):
    normed = make_alignment(spatial_norm=True)(hidden_states, features).total
    torch.testing.assert_close(normed, make_alignment()(hidden_states, normalize_over_grid(features)).total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, r"`layers` is \(\)"),
        ({"layers": (1, 1)}, r"`layers` is \(1, 1\)"),
        ({"layers": (-1,)}, r"`layers` is \(-1,\)"),
        ({"projector": "mlp"}, "'mlp'; known are linear, conv"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ReferenceAlignment(8, 6, **options)


@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 5), (2, 3, 2, 2, 6), (1, 3, 2, 3, 6), (2, 18, 6)], ids=str)
def test_features_that_do_not_fit_are_named(hidden_states, shape):
    with pytest.raises(ValueError, match="`teacher_features` has shape"):
        make_alignment()(hidden_states, torch.zeros(shape))


def test_a_missing_layer_is_named(hidden_states, features):
    with pytest.raises(ValueError, match=r"of 1 layers, but 2 are aligned.*output_reference_layers=\(0, 3\)"):
        make_alignment()(hidden_states[:1], features)


# -- Native keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["linear", "conv"])
def test_projectors_save_and_load(hidden_states, features, projector, tmp_path):
    alignment = make_alignment(projector=projector)
    save_file(alignment.native_state_dict(), tmp_path / "projectors.safetensors")
    other = ReferenceAlignment(8, 6, (0, 3), projector=projector)
    other.load_native_state_dict(load_file(tmp_path / "projectors.safetensors"))
    assert torch.equal(other(hidden_states, features).total, alignment(hidden_states, features).total)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.3.input_mlp.proj.2.weight": None}, r"\(missing: blocks.3.input_mlp.proj.2.weight\)"),
        ({"blocks.1.input_mlp.proj.0.weight": torch.zeros(4, 8)}, r"not known: blocks.1.input_mlp.proj.0.weight"),
        ({"blocks.0.input_mlp.proj.0.weight": torch.zeros(4, 9)}, r"proj.0.weight \(4, 9\), not \(4, 8\)"),
    ],
)
def test_keys_that_do_not_fit_are_named(changes, message):
    alignment = make_alignment()
    state_dict = {k: v for k, v in {**alignment.native_state_dict(), **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        alignment.load_native_state_dict(state_dict)


# -- The schedule -----------------------------------------------------------------------------------------------------


def test_the_weight_is_constant_by_default():
    assert [alignment_weight(step) for step in (0, 1_000_000)] == [1, 1]


def test_the_weight_falls_along_half_a_cosine():
    steps = (0, 100, 125, 150, 200, 300)
    weights = [alignment_weight(step, weight=2.0, decay_start=100, decay_steps=100) for step in steps]
    assert weights == pytest.approx([2, 2, 1 + 0.5**0.5, 1, 0, 0])


def test_the_weight_stops_at_once():
    assert [alignment_weight(step, decay_start=0, decay_steps=100, stop_step=50) for step in (49, 50)] == [
        pytest.approx(0.5157, abs=1e-4),
        0,
    ]


def test_a_schedule_before_the_start_is_refused():
    with pytest.raises(ValueError, match="`stop_step` is -1"):
        alignment_weight(0, stop_step=-1)
