"""Guidance distillation: one pass learns to equal the guided passes of its teacher (arXiv 2210.03142, section 3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from refalign.pipeline_refalign_wan import combine_passes, guidance_passes
from refalign_training.method.losses import add_noise, velocity_loss
from refalign_training.method.objective import Batch, Losses, Objective


@dataclass(eq=False, kw_only=True)
class GuidanceDistillation(Objective):
    """What a step of a distillation minimises: the squared difference of the student's one pass and the teacher's
    guided velocity, at fixed scales, unweighted. Nothing is aligned."""

    teacher: nn.Module
    """The frozen network, not wrapped: the student's own, whose adapters are then off, or another one."""
    negative_prompt_embeds: torch.Tensor
    """`(max_sequence_length, dim)`, padded with zeros, on the device of the batches."""
    guidance_scale: float
    image_guidance_scale: float

    def __call__(self, batch: Batch, step: int) -> Losses:
        noisy = add_noise(batch.latents, batch.noise, batch.timesteps)
        target = self.guided_velocity(batch, noisy)
        with self.autocast(noisy.device):
            velocity = self.transformer(
                hidden_states=noisy,
                timestep=batch.timesteps,
                encoder_hidden_states=batch.prompt_embeds.to(self.dtype),
                reference_hidden_states=batch.reference_latents,
            ).sample
        mse = velocity_loss(velocity, target)
        none = torch.zeros_like(mse)
        return Losses(mse, mse, mse, none, none.bool(), none.bool())

    @torch.no_grad()
    def guided_velocity(self, batch: Batch, noisy: torch.Tensor) -> torch.Tensor:
        """The teacher's velocity at noisy latents `(batch, 16, latent frames, h, w)`, of the same shape in float32: by
        the passes and the formula of the pipeline."""
        embeds = batch.prompt_embeds.to(self.dtype)
        negative = self.negative_prompt_embeds.to(self.dtype).expand_as(embeds)
        passes = guidance_passes(self.guidance_scale, self.image_guidance_scale)
        predictions = []
        with without_adapters(self.teacher), self.autocast(noisy.device):
            for name, _ in passes:
                references = batch.reference_latents
                assert isinstance(references, torch.Tensor)  # models of other families are not distilled
                output = self.teacher(
                    hidden_states=noisy,
                    timestep=batch.timesteps,
                    encoder_hidden_states=embeds if name == "full" else negative,
                    reference_hidden_states=torch.zeros_like(references) if name == "null" else references,
                )
                predictions.append(output.sample)
        return combine_passes(predictions, [weight for _, weight in passes])


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside this context, a network computes as if it had no adapters."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        # Not peft's `enable_adapters`, which lets them require no gradient: FSDP2 remembers that of its first pass
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
