"""The losses against their plain formulas, and the timesteps against the authors'."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign_training.method.losses import (
    add_noise,
    detail,
    flow_matching_loss,
    reference_alignment_loss,
    sample_timesteps,
    timestep_gate,
    timestep_table,
)


def random_tokens(batch=2, references=3, tokens=5, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + 10 * references + 100 * tokens)
    shape = (2, batch, references * tokens, dim)
    student, teacher = torch.randn(shape, generator=generator, dtype=dtype).unbind()
    return student.requires_grad_(), teacher


def plain_loss(student, teacher, subjects, positive_margin=0.0, negative_margin=1.0, negative_weight=1.0):
    """The formula for one sample, written out; `subjects` names each token's."""
    student = student / student.norm(dim=-1, keepdim=True)
    teacher = teacher / teacher.norm(dim=-1, keepdim=True)
    distances = 1 - student @ teacher.T
    positive = (distances.diagonal() - positive_margin).relu().mean()
    is_negative = subjects[:, None] != subjects
    if not is_negative.any():
        return positive
    return positive + negative_weight * (negative_margin - distances[is_negative]).relu().mean()


def assert_equals_the_plain_formula(tokens, subject_ids=None, **options):
    student, teacher = random_tokens(tokens=tokens, references=3)
    ids = torch.tensor([0, 1, 2] if subject_ids is None else subject_ids).expand(2, 3)
    plain = torch.stack(
        [plain_loss(student[i], teacher[i], ids[i].repeat_interleave(tokens), **options) for i in range(len(student))]
    )
    ours = reference_alignment_loss(student, teacher, tokens, subject_ids=subject_ids, **options).total
    weights = torch.tensor([1.0, -2.0])  # a gradient of its own for each sample
    (expected,) = torch.autograd.grad((plain * weights).sum(), student)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


# -- Reference alignment: what it computes ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 9),
    subject_ids=st.none()
    | st.lists(st.integers(0, 2), min_size=3, max_size=3)
    | st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=2, max_size=2),
    positive_margin=st.sampled_from([0.0, 0.4, 1.0]),
    negative_margin=st.sampled_from([0.7, 1.0, 1.3]),
    negative_weight=st.sampled_from([0.0, 1.0, 2.5]),
)
def test_value_and_gradient_equal_the_plain_formula(tokens, **options):
    assert_equals_the_plain_formula(tokens, **options)


def test_gradient_is_the_derivative():
    student, teacher = random_tokens(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: reference_alignment_loss(s, teacher, 5)[:3], (student,))


def test_positive_and_negative_make_the_total():
    loss = reference_alignment_loss(*random_tokens(), 5, negative_weight=0.5)
    torch.testing.assert_close(loss.total, loss.positive + 0.5 * loss.negative)


def test_statistics_are_those_of_the_tokens():
    student, teacher = random_tokens(batch=1, references=2)
    loss = reference_alignment_loss(student, teacher, 5)
    cosines = torch.nn.functional.normalize(student[0], dim=-1) @ torch.nn.functional.normalize(teacher[0], dim=-1).T
    others = torch.cat([cosines[:5, 5:], cosines[5:, :5]])
    torch.testing.assert_close(loss.cosine[0], cosines.diagonal().mean().detach())
    torch.testing.assert_close(loss.active_negatives[0], (others > 0).float().mean())
    assert not loss.cosine.requires_grad and not loss.active_negatives.requires_grad


def test_other_samples_are_no_negatives():
    student, teacher = random_tokens()
    alone = reference_alignment_loss(student[:1], teacher[:1], 5).total
    assert torch.equal(reference_alignment_loss(student, teacher, 5).total[:1], alone)


@pytest.mark.parametrize(("references", "subject_ids"), [(1, None), (3, [4, 4, 4])])
def test_one_subject_has_no_negatives(references, subject_ids):
    student, teacher = random_tokens(references=references)
    loss = reference_alignment_loss(student, teacher, 5, subject_ids=subject_ids)
    loss.total.sum().backward()
    assert torch.equal(loss.negative, torch.zeros(2)) and torch.equal(loss.active_negatives, torch.zeros(2))
    assert student.grad.isfinite().all()


def test_a_dropped_sample_costs_nothing_whatever_it_holds():
    student, teacher = random_tokens()
    with torch.no_grad():
        student[1], teacher[1] = torch.nan, torch.nan
    loss = reference_alignment_loss(student, teacher, 5, keep=[True, False])
    loss.total.sum().backward()
    assert all(value[1] == 0 and value[0] != 0 for value in loss)
    assert student.grad[1].count_nonzero() == 0 and student.grad[0].isfinite().all()


def test_tokens_of_zeros_have_no_gradient():
    student, teacher = random_tokens()
    with torch.no_grad():
        student[0, 3], teacher[0, 4] = 0, 0
    reference_alignment_loss(student, teacher, 5).total.sum().backward()
    assert student.grad.isfinite().all() and student.grad[0, 3].count_nonzero() == 0


def test_a_teachers_token_of_zeros_has_a_cosine_of_zero():
    student, teacher = random_tokens()
    with torch.no_grad():
        student[:], teacher[:] = 1.0, 0.0
    loss = reference_alignment_loss(student, teacher, 5, negative_margin=1.5)
    assert loss.positive.tolist() == [1.0, 1.0] and loss.negative.tolist() == [0.5, 0.5]


def test_no_gradient_reaches_the_teacher():
    student, teacher = random_tokens()
    reference_alignment_loss(student, teacher.requires_grad_(), 5).total.sum().backward()
    assert teacher.grad is None


# -- Reference alignment: how it computes -----------------------------------------------------------------------------


def test_bfloat16_is_computed_in_float32():
    student, teacher = (tokens.detach().bfloat16() for tokens in random_tokens())
    expected = reference_alignment_loss(student.float(), teacher.float(), 5)
    loss = reference_alignment_loss(student.requires_grad_(), teacher, 5)
    loss.total.sum().backward()
    assert all(value.dtype == torch.float32 for value in loss)
    torch.testing.assert_close(loss.total.detach(), expected.total)
    assert student.grad.dtype == torch.bfloat16


def test_autocast_changes_nothing():
    student, teacher = random_tokens()
    expected = reference_alignment_loss(student, teacher, 5).total
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = reference_alignment_loss(student, teacher, 5).total
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.equal(loss, expected) and torch.equal(gradient, expected_gradient)


def test_only_the_tokens_are_held_until_the_backward_pass():
    student, teacher = (tokens.detach().clone() for tokens in random_tokens(batch=1, tokens=200))
    student.requires_grad_()
    saved = {}  # by where they are: many are parts of one tensor

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = reference_alignment_loss(student, teacher, 200)
    assert sum(saved.values()) == student.nbytes + teacher.nbytes and loss.total.requires_grad


def test_no_more_than_a_pair_of_references_is_compared_at_once():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.numel())
            return output

    student, teacher = random_tokens(batch=1, tokens=200)
    with Watch():
        reference_alignment_loss(student, teacher, 200).total.sum().backward()
    assert largest == max(student.numel(), 200 * 200)


def test_compiled_callers_get_the_same():
    student, teacher = random_tokens()
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: reference_alignment_loss(2 * s, teacher, 5).total.sum(), backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(student), student)
    (expected,) = torch.autograd.grad(reference_alignment_loss(2 * student, teacher, 5).total.sum(), student)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": torch.zeros(2, 15, 7)}, r"`student` \(2, 15, 8\), `teacher` \(2, 15, 7\)"),
        ({"tokens_per_reference": 4}, "`tokens_per_reference` = 4"),
        ({"tokens_per_reference": 0}, "`tokens_per_reference` = 0"),
        ({"subject_ids": [0, 1]}, r"`subject_ids` has shape \(2,\), but must be \(3,\) or \(2, 3\)"),
        ({"subject_ids": torch.zeros(1, 3)}, r"`subject_ids` has shape \(1, 3\)"),
        ({"keep": [True]}, r"`keep` has shape \(1,\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    student, teacher = random_tokens()
    with pytest.raises(ValueError, match=message):
        reference_alignment_loss(**{"student": student, "teacher": teacher, "tokens_per_reference": 5, **changes})


# -- Flow matching ----------------------------------------------------------------------------------------------------


def test_noise_is_added_on_a_straight_path():
    latents, noise = torch.randn(2, 3, 16, 2, 4, 4).unbind(1)[:2]
    noisy = add_noise(latents, noise, torch.tensor([0, 250]))
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])


def test_flow_matching_loss_is_one_weighted_mean_a_sample():
    latents, noise = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    velocity = torch.stack([torch.full((4, 3), 3.0), torch.full((4, 3), 1.0)])
    assert flow_matching_loss(velocity, noise, latents).tolist() == [4, 0]
    assert flow_matching_loss(velocity, noise, latents, torch.tensor([0.5, 1.0])).tolist() == [2, 0]


def test_flow_matching_loss_of_bfloat16_is_float32():
    tensors = torch.randn(3, 2, 4, 3).bfloat16()
    loss = flow_matching_loss(*tensors)
    assert torch.equal(loss, flow_matching_loss(*tensors.float()))


def test_tensors_that_do_not_fit_are_named():
    latents = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"`velocity` \(2, 4\), `noise` \(1, 4\), `latents` \(2, 4\)"):
        flow_matching_loss(latents, latents[:1], latents)
    with pytest.raises(ValueError, match=r"`weights` has shape \(3,\)"):
        flow_matching_loss(latents, latents, latents, torch.ones(3))
    with pytest.raises(ValueError, match=r"`timestep` has shape \(\)"):
        add_noise(latents, latents, torch.tensor(500))


def test_gate_is_the_power_of_sigma():
    timestep = torch.tensor([0, 500, 1000])
    assert timestep_gate(timestep).tolist() == [0, 0.125, 1]
    assert timestep_gate(timestep, power=0).tolist() == [1, 1, 1]


# -- Timesteps --------------------------------------------------------------------------------------------------------


def test_timesteps_and_weights_equal_the_authors(golden):
    """To float32's rounding: they are computed in float64 and rounded once."""
    timesteps, weights = timestep_table("refalign")
    torch.testing.assert_close(timesteps, golden.t["out.train_timesteps"], atol=0, rtol=3e-7)
    torch.testing.assert_close(weights, golden.t["out.train_weights"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("preset", ["refalign", "logit_normal"])
def test_a_table_is_drawn_at_evenly_spaced_quantiles(preset):
    timesteps, weights = timestep_table(preset)
    assert timesteps.shape == weights.shape == (1000,) and (timesteps.diff() < 0).all()
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


def test_each_of_the_1000_timesteps_is_as_likely():
    timesteps, _ = sample_timesteps("refalign", (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000)
    assert torch.equal(timesteps, timestep_table("refalign")[0].flip(0).repeat_interleave(3))


def test_logit_normal_is_a_shifted_sigmoid_of_a_normal():
    timesteps, weights = sample_timesteps("logit_normal", torch.tensor([0.0, 0.5, 0.841344746]))
    sigma = torch.tensor(1.0).sigmoid()
    expected = torch.stack([torch.tensor(0.0), torch.tensor(750.0), 1000 * 3 * sigma / (1 + 2 * sigma)])
    torch.testing.assert_close(timesteps, expected)
    assert weights.tolist() == [1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(
    preset=st.sampled_from(["refalign", "logit_normal"]),
    quantiles=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=5),
)
def test_any_quantile_gives_a_timestep_in_range(preset, quantiles):
    timesteps, weights = sample_timesteps(preset, torch.tensor(quantiles))
    assert ((timesteps >= 0) & (timesteps <= 1000)).all() and (weights >= 0).all()


def test_wrong_presets_and_quantiles_are_named():
    with pytest.raises(ValueError, match="'even'; known are refalign, logit_normal, bernini, uniform"):
        timestep_table("even")
    with pytest.raises(ValueError, match=r"from 0\.5 to 1,"):
        sample_timesteps("refalign", torch.tensor([0.5, 1.0]))


# -- Where a loss counts ----------------------------------------------------------------------------------------------


def test_uniform_timesteps_are_unweighted_and_mostly_high():
    timesteps, weights = timestep_table("uniform")
    assert weights.eq(1).all()
    assert 0.42 < (timesteps > 900).float().mean() < 0.46


def test_detail_is_where_neighbours_in_a_row_differ():
    latents = torch.zeros(1, 2, 1, 3, 6)
    latents[:, :, :, 1, 2:4] = 2.0
    latents[:, :, :, 2] = 5.0  # a row of its own is no detail
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[1, 1:5] = True
    assert torch.equal(detail(latents)[0, 0, 0], expected)


def test_position_weights_count_relative_to_each_other():
    velocity = torch.zeros(1, 1, 1, 1, 4)
    noise, latents = torch.zeros_like(velocity), torch.zeros_like(velocity)
    latents[..., 0] = 2.0
    weights = torch.tensor([7.0, 1.0, 1.0, 1.0]).view(1, 1, 1, 1, 4)
    loss = flow_matching_loss(velocity, noise, latents, position_weights=weights)
    assert loss.item() == pytest.approx(4 * 7 / 10)
    assert torch.equal(
        flow_matching_loss(velocity, noise, latents, position_weights=torch.full_like(weights, 3.0)),
        flow_matching_loss(velocity, noise, latents),
    )
