"""From a batch to its losses: the one place that knows what is trained for."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from refalign_training.method.alignment import alignment_weight
from refalign_training.method.losses import AlignmentLoss, add_noise, detail, flow_matching_loss, timestep_gate
from refalign_training.method.options import AlignmentOptions


# Samples of a batch that one pass takes: their places, and their references, `None` where these have no tokens
Group = tuple[slice | list[int], torch.Tensor | list[torch.Tensor] | None]


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
    reference_latents: torch.Tensor | list[list[torch.Tensor]]
    """`(batch, 16, references, h, w)`, zeros where they are dropped; or of each sample each reference's
    `(16, 1, h, w)`, of any size, for models with sources: where they are dropped, they get no tokens."""
    prompt_embeds: torch.Tensor
    """`(batch, max_sequence_length, dim)`, padded with zeros."""
    timesteps: torch.Tensor
    """`(batch,)`, in [0, 1000]. `weights`, w(t), have the same shape."""
    weights: torch.Tensor
    keeps_references: torch.Tensor
    """Booleans `(batch,)`, on the CPU, as are `subjects`, `(batch, references)`."""
    subjects: torch.Tensor
    teacher_features: torch.Tensor | list[list[torch.Tensor]] | None = None
    """`(batch, references, rows, columns, dim)`; or of each sample each reference's `(rows, columns, dim)`. `None`:
    nothing is aligned."""
    unusable: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Samples in whose place another one was taken, and why."""

    def to(self, device: torch.device) -> Self:
        """The batch with what the network needs on a device; what lists are made of stays on the CPU."""
        return dataclasses.replace(super().to(device), keeps_references=self.keeps_references, subjects=self.subjects)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        changed = {}
        for name in ("reference_latents", "teacher_features"):
            if isinstance(samples := getattr(self, name), list):
                changed[name] = [list(map(change, references)) for references in samples]
        return dataclasses.replace(super()._each(change), **changed)

    def groups(self) -> list[Group]:
        """The samples that one pass can take: all, or those whose references are of equal sizes, or dropped."""
        if isinstance(self.reference_latents, torch.Tensor):
            return [(slice(None), self.reference_latents)]
        places: dict[tuple[torch.Size, ...], list[int]] = {}
        kept = self.keeps_references.tolist()
        for place, references in enumerate(self.reference_latents):
            sizes = tuple(latents.shape for latents in references) if kept[place] else ()
            places.setdefault(sizes, []).append(place)
        groups = []
        for sizes, members in places.items():
            groups.append((members, _stacked(self.reference_latents, members) if sizes else None))
        return groups


def _stacked(samples: Sequence[Sequence[torch.Tensor]], members: Sequence[int]) -> list[torch.Tensor]:
    """Of each reference, the tensors of those samples in one batch."""
    chosen = [samples[place] for place in members]
    return [torch.stack(references) for references in zip(*chosen, strict=True)]


def in_order(parts: Sequence[torch.Tensor], groups: Sequence[Group]) -> torch.Tensor:
    """The samples of all groups as they stand in the batch."""
    if len(parts) == 1:
        return parts[0]
    places: list[int] = []
    for members, _ in groups:
        assert isinstance(members, list)
        places += members
    return torch.cat(list(parts))[sorted(range(len(places)), key=places.__getitem__)]


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
        noisy = add_noise(batch.latents, batch.noise, batch.timesteps)
        velocity, aligned = self._predict(batch, noisy, aligns=bool(weight) and batch.teacher_features is not None)
        mse = flow_matching_loss(velocity, batch.noise, batch.latents)
        diffusion = mse * batch.weights
        if (more := self.detail_weight(step)) != 1:
            position_weights = 1 + (more - 1) * detail(batch.latents)
            diffusion = flow_matching_loss(velocity, batch.noise, batch.latents, batch.weights, position_weights)
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

    def _predict(self, batch: Batch, noisy: torch.Tensor, aligns: bool) -> tuple[torch.Tensor, AlignmentLoss | None]:
        """The velocity of all samples, and how well their references are aligned."""
        embeds = batch.prompt_embeds.to(self.dtype)
        groups = batch.groups()
        velocities, losses = [], []
        with self.autocast(noisy.device):
            for places, references in groups:
                output = self.transformer(
                    hidden_states=noisy[places],
                    timestep=batch.timesteps[places],
                    encoder_hidden_states=embeds[places],
                    reference_hidden_states=references,
                    output_reference_layers=self.options.layers if aligns and references is not None else None,
                )
                velocities.append(output.sample)
                if aligns:
                    losses.append(self._align(batch, places, references is None, output))
        if not aligns:
            return in_order(velocities, groups), None
        fields = [in_order(parts, groups) for parts in zip(*losses, strict=True)]
        return in_order(velocities, groups), AlignmentLoss(*fields)

    def _align(self, batch: Batch, places: slice | list[int], is_dropped: bool, output: Any) -> AlignmentLoss:
        """The alignment of a group of samples."""
        assert self.alignment is not None
        # Lists, because a wrapper would bring tensors to the GPU, where they are waited for
        subjects, keep = batch.subjects[places].tolist(), batch.keeps_references[places].tolist()
        if is_dropped:  # the projectors are used nevertheless: other processes may use theirs, and wait for these
            alignment: Any = getattr(self.alignment, "module", self.alignment)
            return self.alignment(*alignment.no_references(len(keep), batch.latents.device), None, keep)
        features = batch.teacher_features
        if isinstance(features, list):
            assert isinstance(places, list)
            features = _stacked(features, places)
        return self.alignment(output.reference_hidden_states, features, subjects, keep)
