"""What is estimated against torch's own counts, and against the sizes that the field plans by."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from refalign import RefAlignWanTransformer3DModel
from refalign_training.method.alignment import ReferenceAlignment
from refalign_training.run import estimate as estimates
from refalign_training.run.config import DataOptions, RunCommand
from refalign_training.run.estimate import ASSUMED_TFLOPS, OVERHEAD, SAVED, dry_run, estimate, smallest_setting
from tests.tiny_models import FIXTURES
from tests.tiny_pipeline import TRANSFORMER, tiny_transformer
from tests.training.small_cache import cache_command, write_clips, write_teacher
from tests.training.small_run import changed, run_command


SMALL = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
LARGE = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
BUCKET = (81, 480, 832, 3)
TINY_BUCKET = (9, 32, 48, 2)


pytestmark = pytest.mark.usefixtures("counted_once")


def command(training="full", **changes) -> RunCommand:
    """With other options by their dotted names, dots as `__`."""
    made = RunCommand(Path("run"), training=training, data=DataOptions(cache=Path("cache")))
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        changed = {section: dataclasses.replace(getattr(made, section), **{key: value})} if section else {key: value}
        made = dataclasses.replace(made, **changed)
    return made


# -- Counts -----------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_paper():
    assert estimate(command(), SMALL, BUCKET).tokens == 37_440


@pytest.mark.parametrize(("size", "config"), [("1.3b", SMALL), ("14b", LARGE)])
def test_parameters_are_those_of_the_published_checkpoints(size, config):
    shapes = json.loads((FIXTURES / "native_checkpoint_shapes.json").read_text("utf-8"))[size]
    shapes = {name: shape for name, shape in shapes.items() if "input_mlp" not in name}
    assert estimate(command(), config, BUCKET).parameters == sum(
        torch.Size(shape).numel() for shape in shapes.values()
    )


@pytest.mark.parametrize("changes", [{}, {"cross_attn_norm": False}, {"text_dim": 8, "freq_dim": 16}])
def test_parameters_follow_the_configuration(changes):
    config = {**TRANSFORMER, **changes}
    with init_empty_weights():
        model = RefAlignWanTransformer3DModel(**config)
    assert estimate(command(), config, TINY_BUCKET).parameters == model.num_parameters()


@pytest.mark.parametrize("targets", [None, ("to_q",), ("attn2.to_out.0", "proj_out", "linear_1")])
def test_trained_weights_of_a_lora_are_pefts(transformer, targets):
    changes = {} if targets is None else {"lora__targets": targets}
    asked = command("lora", lora__rank=3, **changes)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=3, target_modules=list(asked.lora.targets)))
    estimated = estimate(asked, TRANSFORMER, TINY_BUCKET)
    assert estimated.trained == transformer.num_parameters(only_trainable=True)


@pytest.mark.parametrize("projector", ["linear", "conv"])
def test_projectors_are_counted(projector):
    alignment = ReferenceAlignment(24, 16, (0, 1), projector=projector)
    asked = command(alignment__layers=(0, 1), alignment__projector=projector)
    estimated = estimate(asked, TRANSFORMER, TINY_BUCKET, teacher_dim=16)
    assert estimated.projectors == sum(parameter.numel() for parameter in alignment.parameters())


def test_without_alignment_there_are_no_projectors():
    assert estimate(command(alignment__weight=0.0), SMALL, BUCKET).projectors == 0


# -- Compute ----------------------------------------------------------------------------------------------------------


def counted_flop(transformer: nn.Module, backward: bool = False) -> int:
    aten = torch.ops.aten
    attention = {  # counted as fused attention of a GPU is
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
            *shapes[:4]
        ),
    }
    sizes = {"hidden_states": (1, 16, 3, 4, 6), "reference_hidden_states": (1, 16, 2, 4, 6)}
    tensors = {name: torch.randn(shape) for name, shape in sizes.items()}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        output = transformer(timestep=torch.tensor([500]), encoder_hidden_states=torch.randn(1, 7, 32), **tensors)
        if backward:
            output.sample.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_a_forward_pass_is_what_torch_counts(num_layers):
    """The FLOPs hold for all blocks, though one and two are counted."""
    config = {**TRANSFORMER, "num_layers": num_layers}
    asked, shape = command(objective__max_sequence_length=7), estimates._Shape(config, TINY_BUCKET)
    whole, _ = estimates._count_weights_and_flop(asked, config, shape)
    with torch.no_grad():
        counted = counted_flop(tiny_transformer(RefAlignWanTransformer3DModel, num_layers=num_layers))
    assert whole.forward == counted


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("training", ["full", "lora"])
def test_a_training_step_is_what_torch_counts(training, checkpointing):
    asked = command(
        training, lora__rank=2, objective__max_sequence_length=7, model__gradient_checkpointing=checkpointing
    )
    transformer = tiny_transformer(RefAlignWanTransformer3DModel, num_layers=8)
    if training == "lora":
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=2, target_modules=list(asked.lora.targets)))
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    counted = counted_flop(transformer.train(), backward=True)
    # In detail, what comes before and after the blocks is not computed again
    estimated = estimate(asked, {**TRANSFORMER, "num_layers": 8}, TINY_BUCKET)
    assert estimated.pflop * 1e15 == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("config", "pflop"), [(SMALL, 1.6), (LARGE, 9.4)])
def test_compute_is_near_what_the_field_plans_by(config, pflop):
    assert estimate(command(), config, BUCKET).pflop == pytest.approx(pflop, rel=0.15)


def test_hours_are_samples_by_compute():
    estimated = estimate(command(steps=100, batch__size=16), LARGE, BUCKET, 8)
    seconds = 100 * 16 * estimated.pflop * 1e15 / (8 * ASSUMED_TFLOPS * 1e12)
    assert estimated.hours == pytest.approx(seconds / 3600)


# -- Memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(block: nn.Module, tokens: int) -> int:
    """What a block saves for its backward pass, without its weights and what is made of them."""
    dim, saved = 256, {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address comes twice
        return tensor

    rope = (torch.ones(1, tokens, 1, 128), torch.ones(1, tokens, 1, 128))
    hidden_states = torch.randn(1, tokens, dim, dtype=torch.bfloat16, requires_grad=True)
    text = torch.randn(1, 4, dim, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(hidden_states, text, torch.randn(1, 6, dim), rope, tokens * 7 // 8)
    assert output.dtype == torch.bfloat16
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("training", ["full", "lora"])
def test_activations_are_what_a_block_saves(training):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 1024, "num_layers": 1}
    dtype = torch.float32 if training == "full" else torch.bfloat16
    transformer = tiny_transformer(RefAlignWanTransformer3DModel, **sizes).to(dtype)
    if training == "lora":
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=2, target_modules=list(command().lora.targets)))
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    block = transformer.blocks[0]
    a_token = (saved_bytes(block, 256) - saved_bytes(block, 128)) / 128
    of_dim, of_ffn = SAVED[training]
    assert of_dim * 256 + of_ffn * 1024 == pytest.approx(a_token, rel=0.15)


PLANS = {  # of spec/TRAINING.md, GB a GPU
    "14B, LoRA": (command("lora"), LARGE, 1, 60),
    "14B, all, 8 GPUs": (command(), LARGE, 8, 69),
    "1.3B, all": (command(), SMALL, 1, 35),
}


@pytest.mark.parametrize("plan", PLANS)
def test_memory_is_near_what_the_field_plans_by(plan):
    asked, config, world_size, size = PLANS[plan]
    estimated = estimate(asked, config, BUCKET, world_size, sharded=world_size > 1)
    assert estimated.memory.total == pytest.approx(size, rel=0.15)


def test_a_small_lora_takes_more_than_the_field_plans_by_for_what_is_ours():
    """Adapters of rank 64 and projectors, 16 bytes a weight, and what is not tensors: their 12 GB have neither."""
    estimated = estimate(command("lora"), SMALL, BUCKET)
    ours = 16 * (estimated.trained + estimated.projectors) + OVERHEAD
    assert estimated.memory.total - ours / 2**30 == pytest.approx(12, rel=0.15)


def test_8_bit_adam_takes_more_than_the_field_plans_by_for_what_is_ours():
    """Weights and gradients in float32, 4 bytes a weight more than in bfloat16: their 18 to 20 GB have neither."""
    estimated = estimate(command(optimizer__name="adamw8bit"), SMALL, BUCKET)
    ours = 4 * estimated.trained
    assert estimated.memory.total - ours / 2**30 == pytest.approx(19, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "part", "bytes_a_weight"),
    [
        ({}, "weights", 4),
        ({}, "gradients", 4),
        ({}, "optimizer", 8),
        ({"optimizer__name": "adamw8bit"}, "optimizer", 2),
        ({"optimizer__name": "muon"}, "optimizer", 4),
        ({}, "average", 0),
        ({"optimizer__ema_decay": 0.9}, "average", 4),
    ],
)
def test_bytes_a_trained_weight(changes, part, bytes_a_weight):
    estimated = estimate(command(alignment__weight=0.0, **changes), SMALL, BUCKET)
    assert getattr(estimated.memory, part) == pytest.approx(bytes_a_weight * estimated.trained / 2**30)


def test_sharding_divides_what_is_of_weights_and_nothing_else():
    one, eight = (estimate(command(), LARGE, BUCKET, 8, sharded=sharded).memory for sharded in (False, True))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8)
    assert eight.activations == one.activations
    assert one.gathered == 0 < eight.gathered


def test_a_frozen_base_takes_two_bytes_a_weight_or_four():
    for precision, size in (("bfloat16", 2), ("float32", 4)):
        estimated = estimate(command("lora", model__precision=precision), SMALL, BUCKET)
        trained = 4 * (estimated.trained + estimated.projectors)
        assert estimated.memory.weights == pytest.approx((size * estimated.parameters + trained) / 2**30)


def test_checkpointing_saves_most_of_the_activations():
    with_it, without = (
        estimate(command(model__gradient_checkpointing=again), SMALL, BUCKET).memory.activations
        for again in (True, False)
    )
    assert without > 10 * with_it


def test_micro_batches_multiply_the_activations():
    one, two = (estimate(command(batch__micro=micro), SMALL, BUCKET).memory for micro in (1, 2))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)  # but for copies of weights
    assert two.weights == one.weights


def test_encoders_take_memory_only_without_a_cache():
    assert estimate(command(), SMALL, BUCKET).memory.encoders == 0
    assert estimate(command(data=DataOptions()), SMALL, BUCKET).memory.encoders > 10


def test_the_table_names_what_matters():
    table = "\n".join(estimate(command(), LARGE, BUCKET, 8, sharded=True).lines())
    for part in (
        "37,440 tokens",
        "14.3B",
        "8 GPUs, sharded",
        "GiB per GPU",
        "optimizer 13.4",
        "PFLOP",
        "assuming 400",
    ):
        assert part in table


def test_dry_run_tells_of_the_largest_samples(tmp_path, wan_folder, capsys):
    from refalign_training.cache import run

    cache = tmp_path / "cache"
    run(cache_command(write_clips(tmp_path / "clips", 2), cache, wan_folder, write_teacher(tmp_path / "teacher")))
    capsys.readouterr()
    asked = command("lora", data=DataOptions(cache=cache), model__base=str(wan_folder), alignment__layers=(0,))
    assert dry_run(asked) == 0
    told = capsys.readouterr().out
    assert "references: 2" in told and "GiB per GPU" in told and "2 samples and 0 held out, of 2 shapes" in told
    assert not asked.output.exists()


# -- What fits --------------------------------------------------------------------------------------------------------


def settings_for(gpu_memory: float, **changes) -> str:
    command = run_command(Path("run"), Path("base"), Path("cache"), **{"model.precision": "bfloat16", **changes})
    asked = changed(command, dry_run=True, gpu_memory=gpu_memory)
    return smallest_setting(asked, SMALL_WAN, (81, 480, 832, 3))


SMALL_WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}


@pytest.mark.parametrize(
    ("gpu_memory", "told"),
    [
        (250.0, "250 GiB as it is"),
        (24.0, "24 GiB with model.gradient_checkpointing True"),
        (18.0, "18 GiB with model.gradient_checkpointing True, model.offload_activations True"),
        (15.5, "model.offload_activations True, model.quantization int8, model.offload_blocks 14"),
        (1.0, "not into 1 GiB, whatever is put elsewhere. Take smaller or shorter videos, fewer references, or more"),
    ],
)
def test_the_smallest_setting_that_fits_is_named(gpu_memory, told):
    assert told in settings_for(gpu_memory)
