"""Guidance distillation: its target is the pipeline's guided velocity, its teacher the network without adapters."""

import pytest
import torch

from refalign import RefAlignWanPipeline
from refalign.pipeline_refalign_wan import _GroupTexts, paper_scheduler
from refalign_training.method.distillation import GuidanceDistillation, without_adapters
from refalign_training.method.losses import add_noise
from refalign_training.run.trainer import Trainer
from tests.training.small_run import run_command


SCALES = {"objective.guidance_scale": 4.0, "objective.image_guidance_scale": 2.5}
DISTIL = {
    "objective.kind": "distil",
    "objective.no_text": 0.0,
    "objective.no_references": 0.0,
    "objective.neither": 0.0,
    "alignment.weight": 0.0,
    "validation.guidance_scale": 1.0,
    "validation.image_guidance_scale": 1.0,
}


@pytest.fixture
def command(training_world, tmp_path):
    return run_command(tmp_path / "run", training_world.wan, training_world.cache, steps=4, **DISTIL, **SCALES)


@pytest.fixture
def trainer(command) -> Trainer:
    return Trainer(command)


def shake_adapters(trainer: Trainer) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)


def pipeline_velocity(transformer, batch, noisy, negative) -> torch.Tensor:
    """The pipeline's own, at the timestep of the batch's first sample."""
    pipeline = RefAlignWanPipeline(None, None, None, paper_scheduler(), transformer)
    pipeline._guidance_scale, pipeline._image_guidance_scale, pipeline._attention_kwargs = 4.0, 2.5, None
    references, embeds = batch.reference_latents[:1], batch.prompt_embeds[:1]
    context = {"step_index": 0, "sigma": 1.0, "num_inference_steps": 1}
    with torch.no_grad():
        texts = _GroupTexts(embeds, negative[None])
        gate, projection = None, None
        call = (noisy[:1], batch.timesteps[0], texts, references, "", context, False, gate, {}, projection, {})
        return pipeline._predict_velocity(*call)


def test_the_target_is_what_the_pipeline_makes_without_adapters(trainer):
    batch, objective = next(trainer.batches), trainer.objective
    noisy = add_noise(batch.latents, batch.noise, batch.timesteps)
    negative = objective.negative_prompt_embeds
    expected = pipeline_velocity(trainer.transformer, batch, noisy, negative)
    shake_adapters(trainer)
    assert isinstance(objective, GuidanceDistillation)
    torch.testing.assert_close(objective.guided_velocity(batch, noisy)[:1], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(pipeline_velocity(trainer.transformer, batch, noisy, negative), expected, atol=1e-2)


def test_the_loss_is_the_mean_squared_difference_to_the_target(trainer):
    shake_adapters(trainer)
    batch, objective = next(trainer.batches), trainer.objective
    noisy = add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        velocity = trainer.transformer(
            noisy, batch.timesteps, batch.prompt_embeds, reference_hidden_states=batch.reference_latents
        ).sample
        losses = objective(batch, 0)
    expected = (velocity - objective.guided_velocity(batch, noisy)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.total, expected)
    assert torch.equal(losses.total, losses.mse)


def test_only_adapters_learn_and_they_are_on_again(trainer):
    trainer.objective(next(trainer.batches), 0).total.mean().backward()
    learning = {name for name, parameter in trainer.transformer.named_parameters() if parameter.grad is not None}
    assert learning and all(".lora_" in name for name in learning)
    assert learning == {name for name, parameter in trainer.transformer.named_parameters() if parameter.requires_grad}


def test_adapters_are_on_again_after_an_error(trainer):
    with pytest.raises(KeyError), without_adapters(trainer.transformer):
        raise KeyError
    assert any(parameter.requires_grad for parameter in trainer.transformer.parameters())
    assert not trainer.transformer.blocks[0].attn1.to_q.disable_adapters
