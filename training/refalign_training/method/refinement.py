"""Refine-by-Align's training: noise is predicted on a masked part of a picture, given a reference (arXiv 2412.00306).

No loss acts on the attention: that the whole reference is given in half of the samples makes it a correspondence.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from refalign.pipeline_refine_by_align import ReferenceProjector, unet_input
from refalign_training.method.losses import velocity_loss
from refalign_training.method.objective import Losses, Moved, Objective


PREDICTIONS = ("epsilon", "v_prediction")


def check_prediction(kind: Any, source: str) -> None:
    """Raises ValueError, naming where it stands, for a `prediction_type` of a scheduler that is not trained here."""
    if kind not in PREDICTIONS:
        raise ValueError(
            f"prediction_type of {source} is {kind!r}, but must be {' or '.join(PREDICTIONS)}. Take a base that "
            "predicts so."
        )


@dataclass
class RefineBatch(Moved):
    """What [`Refinement`] takes: pictures with a masked part, their references, noise, timesteps and dropout."""

    ids: list[str]
    seed: int
    """The seed of dropout in the network."""
    latents: torch.Tensor
    """`(batch, 4, h, w)`, float32, times the VAE's scaling factor. `noise` has the same shape."""
    noise: torch.Tensor
    mask: torch.Tensor
    """`(batch, 1, h, w)`: 1 where the picture is to be made anew."""
    masked_latents: torch.Tensor
    """As `latents`, of the picture with its mask in grey."""
    patches: torch.Tensor
    """The image encoder's tokens of the references, `(batch, tokens, dim)`."""
    timesteps: torch.Tensor
    """`(batch,)`, whole numbers in [0, 1000)."""
    keeps_references: torch.Tensor
    """Booleans `(batch,)`."""
    regions: torch.Tensor
    """The share of each token in the true region, `(batch, rows, columns)`; 0 all over where it is not known."""
    unusable: list[tuple[str, str]] = field(default_factory=list)
    """Samples in whose place another one was taken, and why."""


class Refiner(nn.Module):
    """The trained networks as one: the projector of references and the UNet that attends to them."""

    def __init__(self, unet: UNet2DConditionModel, reference_projector: ReferenceProjector) -> None:
        super().__init__()
        self.unet, self.reference_projector = unet, reference_projector

    @property
    def blocks(self) -> list[nn.Module]:
        """The UNet's blocks, in their order."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, patches: torch.Tensor, keeps: torch.Tensor
    ) -> torch.Tensor:
        """
        The predicted noise, `(batch, 4, h, w)`.

        Args:
            sample (`torch.Tensor`): `(batch, 9, h, w)`, of [`unet_input`].
            patches (`torch.Tensor`): `(batch, tokens, dim)`.
            keeps (`torch.Tensor`): booleans `(batch,)`; the others get the null embedding.
        """
        tokens = self.reference_projector(patches)
        null = self.reference_projector.null(*tokens.shape[:2]).to(tokens)
        tokens = torch.where(keeps[:, None, None], tokens, null)
        return self.unet(sample, timesteps, tokens, return_dict=False)[0]


@dataclass(eq=False, kw_only=True)
class Refinement(Objective):
    """What a step of a refinement minimises: the mean squared error of what is predicted of the noise. Nothing is
    aligned."""

    scheduler: DDIMScheduler
    outside_weight: float = 1.0
    """The weight of the error outside the mask, to 1 inside it."""

    def __post_init__(self) -> None:
        check_prediction(self.scheduler.config["prediction_type"], "the scheduler")

    def __call__(self, batch: RefineBatch, step: int) -> Losses:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The losses of a batch, on the device where the batch and the networks are."""
        timesteps: Any = batch.timesteps.long()  # annotated as an IntTensor
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, timesteps)
        sample = unet_input(noisy, batch.mask, batch.masked_latents)
        with self.autocast(sample.device):
            predicted = self.transformer(sample, batch.timesteps, batch.patches, batch.keeps_references)
        target = batch.noise
        if self.scheduler.config["prediction_type"] == "v_prediction":
            target = self.scheduler.get_velocity(batch.latents, batch.noise, timesteps)
        mse = velocity_loss(predicted, target, batch.mask + self.outside_weight * (1 - batch.mask))
        none = torch.zeros_like(mse)
        return Losses(mse, mse, mse, none, none.bool(), none.bool())
