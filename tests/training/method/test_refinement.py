from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from refalign_training.method.options import AlignmentOptions
from refalign_training.method.refinement import RefineBatch, Refinement


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise, masked = torch.randn(3, 2, 4, 8, 8, generator=generator)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :2] = 1
    return RefineBatch(
        ids=["a", "b"],
        seed=0,
        latents=latents,
        noise=noise,
        mask=mask,
        masked_latents=masked,
        patches=torch.zeros(2, 4, 8),
        timesteps=torch.tensor([100.0, 800.0]),
        keeps_references=torch.ones(2, dtype=torch.bool),
        regions=torch.zeros(2, 2, 2),
    )


def loss(prediction, batch, kind: Any = "epsilon", **changes):
    """The losses of a network that predicts this."""
    scheduler = DDIMScheduler(prediction_type=kind)
    network = torch.nn.Module()
    network.forward = lambda *_: prediction
    options = AlignmentOptions(weight=0.0)
    settings = {"alignment": None, "options": options, "dtype": torch.float32, "scheduler": scheduler}
    return Refinement(transformer=network, **settings, **changes)(batch, 0).mse


def test_what_is_predicted_is_what_the_scheduler_says(batch):
    alphas = DDIMScheduler().alphas_cumprod[batch.timesteps.long()].reshape(2, 1, 1, 1)
    velocity = alphas.sqrt() * batch.noise - (1 - alphas).sqrt() * batch.latents
    assert loss(batch.noise, batch).abs().max() == 0
    assert loss(velocity, batch, "v_prediction").max() < 1e-10
    assert loss(batch.noise, batch, "v_prediction").min() > 0.01


def test_errors_outside_the_mask_weigh_as_much_as_wished(batch):
    outside = batch.noise + (1 - batch.mask)
    torch.testing.assert_close(loss(outside, batch), torch.full((2,), 0.75))
    weighted = loss(outside, batch, outside_weight=0.1)
    torch.testing.assert_close(weighted, torch.full((2,), 0.1 * 0.75 / (0.25 + 0.1 * 0.75)))


def test_a_target_that_is_not_known_is_refused(batch):
    with pytest.raises(ValueError, match="the scheduler is 'sample', but must be epsilon or v_prediction"):
        loss(batch.noise, batch, "sample")
