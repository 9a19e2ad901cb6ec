"""From a batch to its losses: the one place that knows what is trained for."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from refalign_training.alignment import alignment_weight
from refalign_training.batches import Batch
from refalign_training.config import AlignmentOptions
from refalign_training.losses import add_noise, detail, flow_matching_loss, timestep_gate


class Losses(NamedTuple):
    """
    Of a batch, each of shape `(batch,)` in float32 unless it says otherwise. What is minimised is `total`:
    `diffusion + gate(t) * weight(step) * alignment` (RefAlign, arXiv 2603.25743, training objective).
    """

    total: torch.Tensor
    diffusion: torch.Tensor
    """w(t) times `mse`."""
    mse: torch.Tensor
    alignment: torch.Tensor
    """Before gate and weight; 0 without alignment and for dropped references."""
    kept: torch.Tensor
    """Booleans: whether there is an alignment and the references were not dropped."""
    has_negatives: torch.Tensor
    """Booleans: kept, and of two or more subjects."""
    cosine: torch.Tensor | None
    """`(batch, layers)`, for logs; so `active_negatives`."""
    active_negatives: torch.Tensor | None


class Objective:
    """
    Args:
        transformer (`nn.Module`): [`RefAlignWanTransformer3DModel`], perhaps wrapped to run in parallel.
        alignment (`nn.Module`, *optional*): [`ReferenceAlignment`], so too.
        options ([`AlignmentOptions`]): gate and schedule of the alignment.
        dtype (`torch.dtype`): what is computed in. Losses are in float32.
        detail_weight (`Callable`, *optional*): by step, how much more positions of [`detail`] count.
    """

    def __init__(
        self,
        transformer: nn.Module,
        alignment: nn.Module | None,
        options: AlignmentOptions,
        dtype: torch.dtype,
        detail_weight: Callable[[int], float] = lambda step: 1.0,
    ) -> None:
        self.transformer, self.alignment, self.options, self.dtype = transformer, alignment, options, dtype
        self.detail_weight = detail_weight

    def alignment_weight(self, step: int) -> float:
        """The weight of the alignment at a step; 0 without alignment."""
        if self.alignment is None:
            return 0.0
        names = ("weight", "decay_start", "decay_steps", "stop_step")
        return alignment_weight(step, **{name: getattr(self.options, name) for name in names})

    def autocast(self, device: torch.device) -> torch.autocast:
        """What the networks compute in. Each weight is used once, so copies of them are not kept."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The losses of a batch, on the device where the batch and the networks are."""
        weight = self.alignment_weight(step)
        layers = self.options.layers if weight else None
        with self.autocast(batch.latents.device):
            output = self.transformer(
                hidden_states=add_noise(batch.latents, batch.noise, batch.timesteps),
                timestep=batch.timesteps,
                encoder_hidden_states=batch.prompt_embeds.to(self.dtype),
                reference_hidden_states=batch.reference_latents,
                output_reference_layers=layers,
            )
            aligned = None
            if layers is not None:
                # Lists, because a wrapper would bring tensors to the GPU, where they are waited for
                subjects, keep = batch.subjects.tolist(), batch.keeps_references.tolist()
                aligned = self.alignment(output.reference_hidden_states, batch.teacher_features, subjects, keep)
        mse = flow_matching_loss(output.sample, batch.noise, batch.latents)
        diffusion = mse * batch.weights
        if (more := self.detail_weight(step)) != 1:
            position_weights = 1 + (more - 1) * detail(batch.latents)
            diffusion = flow_matching_loss(output.sample, batch.noise, batch.latents, batch.weights, position_weights)
        if aligned is None:
            none = torch.zeros_like(mse)
            return Losses(diffusion, diffusion, mse, none, none.bool(), none.bool(), None, None)
        gate = timestep_gate(batch.timesteps, self.options.gate_power)
        kept = batch.keeps_references
        has_negatives = kept & (batch.subjects != batch.subjects[:, :1]).any(1)
        return Losses(
            diffusion + gate * weight * aligned.loss,
            diffusion,
            mse,
            aligned.loss,
            kept.to(mse.device),
            has_negatives.to(mse.device),
            aligned.cosine,
            aligned.active_negatives,
        )
