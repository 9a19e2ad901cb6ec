"""One step of Bernini-R's training (arXiv 2605.22344) by our loss, against what its authors' code computed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from refalign import RefAlignWanTransformer3DModel
from refalign_training.method.losses import add_noise, flow_matching_loss, sample_timesteps


FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def model() -> RefAlignWanTransformer3DModel:
    file = FIXTURES / "bernini_forward_sample.safetensors"
    with safe_open(file, "pt") as opened:
        sizes = json.loads(opened.metadata()["config"])["transformer"]
        weights = {k.removeprefix("weights."): opened.get_tensor(k) for k in opened.keys() if k.startswith("weights.")}
    model = RefAlignWanTransformer3DModel(**sizes, reference_rope="sources", text_to_references=True)
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def authors() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "bernini_train.safetensors")


@pytest.mark.parametrize("number", [0, 1])
def test_loss_and_gradients_of_a_step_equal_the_authors(model, authors, number):
    latents, noise = authors["in.latents"], authors[f"in.train{number}.noise"]
    timestep, sigma = authors[f"in.train{number}.timestep"], authors[f"in.train{number}.sigma"]
    model.zero_grad()
    velocity = model(
        add_noise(latents, noise, 1000 * sigma),
        timestep,
        authors["in.prompt_embeds"],
        reference_hidden_states=[authors[f"in.reference_{reference}"] for reference in (1, 2, 3)],
    ).sample
    loss = flow_matching_loss(velocity, noise, latents)
    loss.sum().backward()
    torch.testing.assert_close(loss, authors[f"out.train{number}.loss"], atol=1e-5, rtol=1e-5)
    gradients = {f"grad{number}.{name}": parameter.grad for name, parameter in model.named_parameters()}
    expected = {name: gradient for name, gradient in authors.items() if name.startswith(f"grad{number}.")}
    assert len(expected) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_timesteps_are_as_dense_as_the_authors(authors):
    expected = authors["out.train_sigma_quantiles_r2v"]  # of 4000 draws
    quantiles = torch.linspace(0, 1, len(expected), dtype=torch.float64).clamp(max=1 - 1e-9)
    timesteps, weights = sample_timesteps("bernini", quantiles)
    assert (timesteps / 1000 - expected).abs().max() < 0.05
    assert (weights == 1).all()
