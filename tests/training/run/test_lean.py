"""What needs less memory gives the gradients that the plain run gives: exactly, or to the rounding of fewer bits."""

import gc
import weakref

import pytest
import torch

from refalign_training.run import lean, trainer
from refalign_training.run.checks import check
from refalign_training.run.trainer import Trainer, run
from tests.training.small_run import assert_equal_runs, changed, run_command


@pytest.fixture
def command(training_world, tmp_path):
    def make(name: str = "run", **changes):
        changes = {"model.gradient_checkpointing": True, "steps": 2, **changes}
        return run_command(tmp_path / name, training_world.wan, training_world.cache, **changes)

    return make


def gradients(command) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses of a run's first micro-batch, and its gradients."""
    begun = Trainer(command)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in begun.state.parameters.items():
        if "lora_B" in name:  # zero at first, and then lora_A has no gradient
            parameter.data.normal_(std=0.2, generator=generator)
    batch = next(begun.batches)
    torch.manual_seed(batch.seed)
    losses = begun.objective(batch, 0)
    losses.total.mean().backward()
    found = {name: p.grad for name, p in begun.state.parameters.items() if p.grad is not None}
    return losses.total.detach(), found


EXACT = [{"model.offload_blocks": 1}, {"model.offload_blocks": 2}, {"model.offload_activations": True}]


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_what_lies_elsewhere_gives_the_very_gradients(command, options):
    plain = gradients(command("plain", **{"model.precision": "bfloat16"}))
    ours = gradients(command("lean", **{"model.precision": "bfloat16", **options}))
    assert torch.equal(ours[0], plain[0])
    assert ours[1].keys() == plain[1].keys()
    assert all(torch.equal(ours[1][name], plain[1][name]) for name in plain[1])


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("int8", 0.05), ("fp8", 0.15), pytest.param("nf4", 0.3, marks=pytest.mark.slow)]
)
def test_a_quantised_base_gives_the_gradients_to_rounding(command, kind, tolerance):
    plain_losses, plain = gradients(command("plain"))
    losses, ours = gradients(command("lean", **{"model.quantization": kind}))
    torch.testing.assert_close(losses, plain_losses, rtol=tolerance, atol=0)
    assert ours.keys() == plain.keys()
    everything = torch.cat([gradient.flatten() for gradient in plain.values()])
    difference = torch.cat([(ours[name] - plain[name]).flatten() for name in plain])
    assert 0 < difference.norm() < tolerance * everything.norm()


def test_only_frozen_matrices_of_blocks_are_quantised(command):
    transformer = Trainer(command(**{"model.quantization": "int8"})).transformer
    for name, parameter in transformer.named_parameters():
        is_quantised = type(parameter.data) is not torch.Tensor
        is_matrix = name.startswith("blocks.") and name.endswith((".base_layer.weight", "attn2.to_k.weight"))
        assert is_quantised == is_matrix, name


def test_copies_of_weights_end_with_the_backward_pass(command, monkeypatch):
    alive, made = [], lean.nn.Parameter

    def parameter(*arguments, **options):
        weight = made(*arguments, **options)
        alive.append(weakref.ref(weight))
        return weight

    begun = Trainer(command(**{"model.offload_blocks": 2}))
    monkeypatch.setattr(lean.nn, "Parameter", parameter)
    begun.objective(next(begun.batches), 0).total.mean().backward()
    gc.collect()
    assert len(alive) > 50
    assert [reference for reference in alive if reference() is not None] == []
    assert all(hasattr(p, lean.STAYS_ON_HOST) for p in begun.transformer.blocks.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("kind", "offload"),
    [("int8", EXACT[1] | EXACT[2]), pytest.param("nf4", EXACT[2], marks=pytest.mark.slow)],
    ids=["int8", "nf4"],
)
def test_a_run_goes_on_to_the_same_numbers(command, kind, offload):
    options = {"model.quantization": kind, **offload}
    one, other = command("one", steps=4, **options), command("other", **options)
    assert run(one) == run(other) == run(changed(other, steps=4, resume="latest")) == 0
    assert_equal_runs(one.output, other.output)


def test_where_weights_lie_may_change_when_a_run_goes_on(command):
    one, other = command("one", steps=4), command("other", **EXACT[1])
    changes = {"model.offload_blocks": 0, "steps": 4, "resume": "latest"}
    assert run(one) == run(other) == run(changed(other, **changes)) == 0
    assert_equal_runs(one.output, other.output)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": "full", "model.quantization": "int8"}, "model.quantization is for a frozen base"),
        ({"training": "full", "model.offload_blocks": 1}, "model.offload_blocks is for a frozen base"),
        ({"model.quantization": "fp8", "parallel": "fsdp2"}, "model.quantization does not work with fsdp2"),
        ({"model.offload_blocks": 1, "model.compile": True}, "does not work with model.compile"),
        ({"model.offload_activations": True, "model.gradient_checkpointing": False}, "need model.gradient_checkp"),
        ({"gpu_memory": 24.0}, "--gpu-memory goes with --dry-run"),
    ],
)
def test_what_does_not_fit_together_is_told(command, changes, told):
    with pytest.raises(ValueError, match=told):
        check(command(**changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.offload_blocks": 3}, "model.offload_blocks is 3, but the model has 2 blocks"),
        ({"model.attention": "fastest"}, "model.attention is fastest, which diffusers does not know. Known are: "),
        ({"model.attention": "flash_hub"}, "model.attention flash_hub runs code from the Hub"),
        ({"model.attention": "flash"}, "model.attention flash cannot train here"),
    ],
)
def test_what_cannot_be_had_is_told_before_weights_are_read(command, changes, told, monkeypatch):
    monkeypatch.setattr(trainer, "load_transformer", None)
    with pytest.raises(ValueError, match=told):
        Trainer(command(**changes))


@pytest.mark.parametrize(("kind", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_library_is_told(command, monkeypatch, kind, library):
    monkeypatch.setattr(lean.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"model\.quantization {kind} needs {library}: pip install {library}"):
        Trainer(command(**{"model.quantization": kind}))


def test_a_kernel_by_name_is_taken(command):
    transformer = Trainer(command(**{"model.attention": "_native_math"})).transformer
    assert {block.attn1.processor._attention_backend.value for block in transformer.blocks} == {"_native_math"}
