"""From a batch to its losses: the one place that knows what is trained for."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import nn

from refalign_training.method.alignment import alignment_weight
from refalign_training.method.losses import add_noise, detail, flow_matching_loss, timestep_gate
from refalign_training.method.options import AlignmentOptions


@dataclass
class Moved:
    """Tensors that go together to the device where the networks are."""

    def to(self, device: torch.device) -> Self:
        """The batch with what the network needs on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The batch in memory that a GPU copies from while it computes."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass
class Batch(Moved):
    """What [`Objective`] takes: samples of one shape with their noise, timesteps and dropout."""

    ids: list[str]
    seed: int
    """The seed of dropout in the network."""
    latents: torch.Tensor
    """`(batch, 16, latent frames, h, w)`, float32, normalised. `noise` has the same shape."""
    noise: torch.Tensor
    reference_latents: torch.Tensor
    """`(batch, 16, references, h, w)`; zeros where they are dropped."""
    prompt_embeds: torch.Tensor
    """`(batch, max_sequence_length, dim)`, padded with zeros."""
    timesteps: torch.Tensor
    """`(batch,)`, in [0, 1000]. `weights`, w(t), have the same shape."""
    weights: torch.Tensor
    keeps_references: torch.Tensor
    """Booleans `(batch,)`, on the CPU, as are `subjects`, `(batch, references)`."""
    subjects: torch.Tensor
    teacher_features: torch.Tensor | None = None
    """`(batch, references, rows, columns, dim)`."""
    unusable: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Samples in whose place another one was taken, and why."""

    def to(self, device: torch.device) -> Self:
        """The batch with what the network needs on a device; what lists are made of stays on the CPU."""
        return dataclasses.replace(super().to(device), keeps_references=self.keeps_references, subjects=self.subjects)


class Losses(NamedTuple):
    """
    The losses of a batch, of shape `(batch,)` in float32 unless said otherwise. `total`, which is minimised, is
    `diffusion + gate(t) * weight(step) * alignment` (RefAlign, arXiv 2603.25743, training objective).
    """

    total: torch.Tensor
    diffusion: torch.Tensor
    """w(t) times `mse`."""
    mse: torch.Tensor
    alignment: torch.Tensor
    """The alignment loss before gate and weight; 0 without alignment and for dropped references."""
    kept: torch.Tensor
    """Booleans: whether there is an alignment and the references were not dropped."""
    has_negatives: torch.Tensor
    """Booleans: kept, and of two or more subjects."""
    cosine: torch.Tensor | None = None
    """`(batch, layers)`, for logs, as are `active_negatives`."""
    active_negatives: torch.Tensor | None = None


@dataclass(eq=False)
class Objective:
    """What a step minimises: called with a batch and the step, it gives the [`Losses`]."""

    transformer: nn.Module
    """[`RefAlignWanTransformer3DModel`], perhaps wrapped to run in parallel."""
    alignment: nn.Module | None
    """[`ReferenceAlignment`], perhaps wrapped too."""
    options: AlignmentOptions
    """Layers, gate and schedule of the alignment."""
    dtype: torch.dtype
    """What the networks compute in. Losses are in float32."""
    detail_weight: Callable[[int], float] = lambda step: 1.0
    """By step, how much more positions of [`detail`] count."""

    def alignment_weight(self, step: int) -> float:
        """The weight of the alignment at a step; 0 without alignment."""
        if self.alignment is None:
            return 0.0
        options = self.options
        return alignment_weight(
            step,
            weight=options.weight,
            decay_start=options.decay_start,
            decay_steps=options.decay_steps,
            stop_step=options.stop_step,
        )

    def autocast(self, device: torch.device) -> torch.autocast:
        """What the networks compute in. Each weight is used once, so copies of them are not kept."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The losses of a batch, on the device where the batch and the networks are."""
        weight = self.alignment_weight(step)
        alignment = self.alignment if weight else None
        with self.autocast(batch.latents.device):
            output = self.transformer(
                hidden_states=add_noise(batch.latents, batch.noise, batch.timesteps),
                timestep=batch.timesteps,
                encoder_hidden_states=batch.prompt_embeds.to(self.dtype),
                reference_hidden_states=batch.reference_latents,
                output_reference_layers=None if alignment is None else self.options.layers,
            )
            aligned = None
            if alignment is not None:
                # Lists, because a wrapper would bring tensors to the GPU, where they are waited for
                subjects, keep = batch.subjects.tolist(), batch.keeps_references.tolist()
                aligned = alignment(output.reference_hidden_states, batch.teacher_features, subjects, keep)
        mse = flow_matching_loss(output.sample, batch.noise, batch.latents)
        diffusion = mse * batch.weights
        if (more := self.detail_weight(step)) != 1:
            position_weights = 1 + (more - 1) * detail(batch.latents)
            diffusion = flow_matching_loss(output.sample, batch.noise, batch.latents, batch.weights, position_weights)
        if aligned is None:
            none = torch.zeros_like(mse)
            return Losses(diffusion, diffusion, mse, none, none.bool(), none.bool())
        gate = timestep_gate(batch.timesteps, self.options.gate_power)
        kept = batch.keeps_references
        has_negatives = kept & (batch.subjects != batch.subjects[:, :1]).any(1)
        return Losses(
            total=diffusion + gate * weight * aligned.total,
            diffusion=diffusion,
            mse=mse,
            alignment=aligned.total,
            kept=kept.to(mse.device),
            has_negatives=has_negatives.to(mse.device),
            cosine=aligned.cosine,
            active_negatives=aligned.active_negatives,
        )
