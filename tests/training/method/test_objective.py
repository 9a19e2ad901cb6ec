"""From a batch to its losses: against the authors' training steps, and what samples may not do to each other."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from refalign import RefAlignWanTransformer3DModel
from refalign.keys import diffusers_to_native
from refalign_training.method.alignment import ReferenceAlignment
from refalign_training.method.losses import add_noise, timestep_gate, timestep_table
from refalign_training.method.objective import Batch, Objective
from refalign_training.method.options import AlignmentOptions, ObjectiveOptions
from refalign_training.run.batches import load_batches
from refalign_training.run.inputs import CachedSamples
from refalign_training.run.networks import load_transformer, make_alignment
from refalign_training.run.order import Order
from refalign_training.run.parallel import Parallel
from refalign_training.run.resume import find_start
from tests.training.small_run import World, run_command


NO_DROPOUT = ObjectiveOptions(no_text=0, no_references=0, neither=0, max_sequence_length=64)


def make_objective(world: World, **changes) -> Objective:
    """That of a run, whose adapters do something already."""
    command = run_command(Path("unused"), world.wan, world.cache, **changes)
    start = find_start(command)
    transformer = load_transformer(command, start)
    alignment = make_alignment(command.alignment, transformer.config, 24, start, command.seed)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    dtype = torch.float32 if command.training == "full" else None
    transformer = Parallel("ddp", "cpu").wrap(transformer, transformer.blocks, dtype)
    return Objective(transformer, alignment, command.alignment, getattr(torch, command.model.precision))


@pytest.fixture
def batch(training_world) -> Batch:
    """Four samples of two references, at rather different timesteps; those of the second are dropped."""
    return batch_of(training_world, [1, 3, 5, 7])


def batch_of(world: World, rows: list[int]) -> Batch:
    samples = CachedSamples(world.cache, needs_teacher=True)
    order = Order(samples.buckets, np.array(rows), len(rows), len(rows), seed=0)
    sizes = {"rank": 0, "world_size": 1, "first_step": 0, "steps": 1, "workers": 0, "encodes": False}
    (batch,) = load_batches(samples, order, NO_DROPOUT, **sizes)
    batch.keeps_references[1], batch.reference_latents[1] = False, 0
    return batch


def pick(batch: Batch, *places: int) -> Batch:
    """Some samples of a batch, as a batch."""
    tensors = {name: value[list(places)] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, ids=[batch.ids[place] for place in places], **tensors)


def gradients_of(objective: Objective) -> dict[str, torch.Tensor]:
    """The gradients that there are, which are taken away."""
    gradients = {}
    for module in (objective.transformer, objective.alignment):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                gradients[name], parameter.grad = parameter.grad, None
    return gradients


def gradients_after(objective: Objective, batch: Batch, step: int = 0, part: str = "total") -> dict[str, torch.Tensor]:
    torch.manual_seed(batch.seed)
    getattr(objective(batch, step), part).mean().backward()
    return gradients_of(objective)


# -- Equality with the authors' implementation ------------------------------------------------------------------------


@pytest.fixture(params=[0, 1])
def training_step(golden, request):
    """One of the authors' training steps: our objective and batch, and what the losses and gradients have to be."""
    layers = tuple(range(golden.c.num_align_layers))
    alignment = ReferenceAlignment(golden.c.dim, golden.c.vfm_dim, layers)
    alignment.load_native_state_dict(golden.projectors)
    objective = Objective(golden.model, alignment, AlignmentOptions(layers=layers), torch.float32)
    prefix = f"out.train{request.param}."
    expected = {key.removeprefix(prefix): value for key, value in golden.t.items() if key.startswith(prefix)}
    timesteps, weights = timestep_table("refalign")
    features = golden.t["in.vfm_features"].movedim(1, -1)
    batch = Batch(
        ids=["golden"],
        seed=0,
        latents=golden.t["in.latents"],
        noise=golden.t["in.noise"],
        reference_latents=golden.t["in.reference_latents"],
        prompt_embeds=golden.t["in.prompt_embeds"],
        timesteps=expected["timestep"],
        weights=weights[(timesteps - expected["timestep"]).abs().argmin()][None],
        keeps_references=torch.tensor([True]),
        subjects=torch.arange(features.shape[1])[None],
        teacher_features=features,
    )
    prefix = f"grad{request.param}.native."
    gradients = {key.removeprefix(prefix): value for key, value in golden.t.items() if key.startswith(prefix)}
    return objective, batch, expected, gradients


def test_losses_equal_the_authors(training_step):
    objective, batch, expected, _ = training_step
    losses = objective(batch, 0)
    ours = {"loss": losses.total, "weighted_mse": losses.diffusion, "ra_total": losses.alignment}
    errors = {name: (value - expected[name]).abs().max().item() for name, value in ours.items()}
    assert max(errors.values()) < 1e-4, errors


def test_gradients_equal_the_authors(training_step):
    objective, batch, _, expected = training_step
    objective(batch, 0).total.mean().backward()
    ours = diffusers_to_native({name: p.grad for name, p in objective.transformer.named_parameters()})
    parameters = objective.alignment.native_state_dict().keys()
    ours |= {key: p.grad for key, p in zip(parameters, objective.alignment.parameters(), strict=True)}
    assert any("input_mlp" in key for key in expected)
    errors = {key: ((ours[key] - gradient).norm() / gradient.norm()).item() for key, gradient in expected.items()}
    assert max(errors.values()) < 2e-3, errors


# -- Samples of a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_batch_of_4_is_4_batches_of_1(training_world, batch, training):
    objective = make_objective(training_world, training=training)
    together = objective(batch, 0)
    together.total.mean().backward()
    gradients = gradients_of(objective)
    alone = [objective(pick(batch, place), 0) for place in range(4)]
    for losses in alone:
        (losses.total.mean() / 4).backward()
    for name in together._fields:
        values = torch.cat([getattr(losses, name) for losses in alone])
        torch.testing.assert_close(getattr(together, name), values, rtol=1e-5, atol=1e-6)
    theirs = gradients_of(objective)
    assert gradients.keys() == theirs.keys()
    errors = {name: ((g - theirs[name]).norm() / g.norm().clamp(min=1e-6)).item() for name, g in gradients.items()}
    assert max(errors.values()) < 1e-4, errors


def test_samples_of_a_batch_have_losses_of_their_own(training_world, batch):
    losses = make_objective(training_world)(batch, 0)
    assert len(losses.total.unique()) == len(losses.mse.unique()) == 4
    assert len(losses.alignment.unique()) == 4  # one of them is 0


@pytest.mark.parametrize("changed", ["teacher_features", "reference_latents", "latents", "prompt_embeds", "subjects"])
def test_another_sample_changes_nothing_of_a_samples_losses(training_world, batch, changed):
    objective = make_objective(training_world)
    before = objective(batch, 0)
    tensor = getattr(batch, changed).clone()
    tensor[2] = 0 if changed == "subjects" else torch.randn(tensor[2].shape)
    after = objective(dataclasses.replace(batch, **{changed: tensor}), 0)
    for name in before._fields:
        assert torch.equal(getattr(before, name)[[0, 1, 3]], getattr(after, name)[[0, 1, 3]]), name
    assert before.total[2] != after.total[2]


def test_negatives_are_a_samples_own_other_subjects(training_world, batch):
    objective = make_objective(training_world)
    batch = dataclasses.replace(batch, subjects=torch.tensor([[0, 0], [0, 1], [0, 0], [0, 1]]))
    losses = objective(batch, 0)
    assert losses.has_negatives.tolist() == [False, False, False, True]  # the second's references are dropped
    assert losses.kept.tolist() == [True, False, True, True]
    assert (losses.active_negatives[[0, 2]] == 0).all() and (losses.active_negatives[3] > 0).all()


def test_one_reference_has_no_negatives(training_world):
    losses = make_objective(training_world)(batch_of(training_world, [0, 2, 4]), 0)
    assert not losses.has_negatives.any() and not losses.active_negatives.any()
    assert losses.alignment[0] > 0


def test_dropped_references_cost_nothing(training_world, batch):
    objective = make_objective(training_world)
    losses = objective(batch, 0)
    assert losses.alignment[1] == 0 and losses.total[1] == losses.diffusion[1] > 0
    assert not losses.cosine[1].any()
    gradients = gradients_after(objective, pick(batch, 1))
    projectors = {name: gradient for name, gradient in gradients.items() if name.startswith("projectors")}
    assert len(projectors) == 4 and not any(gradient.any() for gradient in projectors.values())


# -- What is minimised ------------------------------------------------------------------------------------------------


def test_the_total_is_the_diffusion_and_the_gated_alignment(training_world, batch):
    changes = {"alignment.weight": 0.5, "alignment.decay_start": 10, "alignment.decay_steps": 20}
    objective = make_objective(training_world, **changes)
    for step, weight in ((0, 0.5), (20, 0.25)):
        losses = objective(batch, step)
        expected = losses.mse * batch.weights + (batch.timesteps / 1000) ** 3 * weight * losses.alignment
        torch.testing.assert_close(losses.total, expected)
        assert torch.equal(losses.diffusion, losses.mse * batch.weights)
    assert not torch.allclose(losses.total, losses.diffusion)


def test_the_gates_power_is_an_option(training_world, batch):
    losses = make_objective(training_world, **{"alignment.gate_power": 1.0})(batch, 0)
    gate = timestep_gate(batch.timesteps, 1.0)
    torch.testing.assert_close(losses.total - losses.diffusion, gate * losses.alignment)


def test_the_model_sees_noise_by_its_timestep(training_world, batch):
    objective = make_objective(training_world)
    seen = {}
    objective.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    losses = objective(batch, 0)
    sigma = batch.timesteps.view(-1, 1, 1, 1, 1) / 1000
    torch.testing.assert_close(seen["hidden_states"], (1 - sigma) * batch.latents + sigma * batch.noise)
    assert torch.equal(seen["timestep"], batch.timesteps)
    assert torch.equal(seen["reference_hidden_states"], batch.reference_latents)
    with torch.no_grad():
        velocity = objective.transformer(**seen).sample
    torch.testing.assert_close(losses.mse, (velocity - (batch.noise - batch.latents)).square().flatten(1).mean(1))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_alignments_gradients_reach_blocks_up_to_the_last_aligned_one(training_world, batch, training):
    objective = make_objective(training_world, training=training, **{"alignment.layers": (0,)})
    reached = {name for name, g in gradients_after(objective, batch, part="alignment").items() if g.any()}
    assert any(name.startswith("blocks.0.") for name in reached)
    assert any(name.startswith("projectors.0.") for name in reached)
    assert not any(name.startswith(("blocks.1.", "proj_out.")) for name in reached)
    reached = {name for name, g in gradients_after(objective, batch).items() if g.any()}
    assert any(name.startswith("blocks.1.") for name in reached)  # by the diffusion's


@pytest.mark.parametrize(
    ("changes", "step"),
    [({"alignment.stop_step": 3}, 3), ({"alignment.decay_start": 0, "alignment.decay_steps": 2}, 2)],
    ids=["stopped", "decayed"],
)
def test_where_alignment_has_ended_it_is_not_computed(training_world, batch, changes, step):
    objective = make_objective(training_world, **changes)
    asked = []
    objective.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["output_reference_layers"]), with_kwargs=True
    )
    losses = objective(batch, step)
    losses.total.mean().backward()
    assert asked == [None] and objective.alignment_weight(step) == 0
    assert torch.equal(losses.total, losses.diffusion)
    assert losses.cosine is None and not losses.alignment.any() and not losses.kept.any()
    assert all(parameter.grad is None for parameter in objective.alignment.parameters())
    objective(batch, 0)
    assert asked == [None, (0, 1)]


def test_without_alignment_no_teacher_is_needed(training_world, batch):
    objective = make_objective(training_world)
    diffusion = objective(batch, 0).diffusion
    without = Objective(objective.transformer, None, objective.options, torch.float32)
    losses = without(dataclasses.replace(batch, teacher_features=None), 0)
    assert torch.equal(losses.total, diffusion) and torch.equal(losses.diffusion, diffusion)
    assert without.alignment_weight(0) == 0


# -- Memory and precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_no_gradient(training_world, batch, precision):
    gradients = []
    for is_on in (False, True):
        changes = {"lora.dropout": 0.3, "model.gradient_checkpointing": is_on, "model.precision": precision}
        objective = make_objective(training_world, **changes)
        assert objective.transformer.gradient_checkpointing == is_on
        gradients.append(gradients_after(objective, batch))
    without, with_checkpoints = gradients
    assert without.keys() == with_checkpoints.keys() and len(without) > 40
    assert all(torch.equal(gradient, with_checkpoints[name]) for name, gradient in without.items())
    other = gradients_after(objective, dataclasses.replace(batch, seed=batch.seed + 1))
    assert not any(torch.equal(g, other[name]) for name, g in without.items() if "lora_B" in name)  # by dropout


def recorded(module: nn.Module) -> list:
    """What will come out of a module."""
    outputs = []
    module.register_forward_hook(lambda _, args, output: outputs.append(output))
    return outputs


@pytest.fixture
def inference(training_world) -> RefAlignWanTransformer3DModel:
    """The base as a pipeline in bfloat16 loads it."""
    folder = training_world.wan / "transformer"
    return RefAlignWanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def outputs_of(objective: Objective, inference, batch: Batch) -> tuple[dict, dict]:
    """What time embedder, its projection and the whole model give, in training and in inference."""
    outputs = []
    for model in (objective.transformer, inference):
        embedder = model.condition_embedder
        modules = {"time": embedder.time_embedder, "projected": embedder.time_proj, "whole": model}
        outputs.append({name: recorded(module) for name, module in modules.items()})
    with torch.no_grad():
        objective(batch, 0)
        noisy = add_noise(batch.latents, batch.noise, batch.timesteps)
        inputs = (noisy, batch.reference_latents, batch.prompt_embeds)
        noisy, references, embeds = (tensor.bfloat16() for tensor in inputs)
        inference(noisy, batch.timesteps, embeds, reference_hidden_states=references)
    return tuple({name: values[0] for name, values in of_model.items()} for of_model in outputs)


@pytest.fixture(params=["lora", "full"])
def beside_inference(request, training_world, inference, batch):
    """An untrained run in bfloat16, and the pipeline's model."""
    objective = make_objective(training_world, training=request.param, **{"model.precision": "bfloat16"})
    for name, parameter in objective.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return outputs_of(objective, inference, batch)


def test_timesteps_are_embedded_in_float32_as_in_inference(beside_inference):
    training, inference = beside_inference
    assert training["time"].dtype == inference["time"].dtype == torch.float32
    assert torch.equal(training["time"], inference["time"])
    assert training["projected"].dtype == torch.bfloat16 and torch.equal(training["projected"], inference["projected"])


def test_the_velocity_is_inferences(beside_inference):
    training, inference = (outputs["whole"].sample.float() for outputs in beside_inference)
    assert (training - inference).norm() / inference.norm() < 0.02


def test_bfloat16_is_close_to_float32(training_world, batch):
    half, full = (
        make_objective(training_world, **{"model.precision": precision}) for precision in ("bfloat16", "float32")
    )
    losses, expected = half(batch, 0), full(batch, 0)
    floats = ("total", "diffusion", "mse", "alignment", "cosine", "active_negatives")
    assert all(getattr(losses, name).dtype == torch.float32 for name in floats)
    torch.testing.assert_close(losses.total, expected.total, rtol=0.02, atol=1e-3)
    assert not torch.equal(losses.mse, expected.mse)
    ours, theirs = gradients_after(half, batch), gradients_after(full, batch)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    ours, theirs = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (ours, theirs))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_float32_computes_nothing_in_bfloat16(training_world, batch):
    objective = make_objective(training_world)
    losses = objective(batch, 0)
    with torch.autocast("cpu", torch.bfloat16):  # which would be another's
        assert torch.equal(objective(batch, 0).total, losses.total)
