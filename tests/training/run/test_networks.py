"""The networks of a run: what is trained, in which precision, from which weights; and what cannot be started from."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from safetensors.torch import load_file, save_file

from refalign import RefAlignWanTransformer3DModel
from refalign.hub import LORA_WEIGHTS, PROJECTORS
from refalign.keys import diffusers_to_native
from refalign_training.method.alignment import ReferenceAlignment
from refalign_training.run.checkpoint import save_checkpoint
from refalign_training.run.config import ModelOptions, RunCommand, flatten
from refalign_training.run.lean import take_attention
from refalign_training.run.networks import load_transformer, make_alignment, transformer_config
from refalign_training.run.parallel import Parallel
from refalign_training.run.resume import Start, find_start
from tests.tiny_pipeline import tiny_transformer
from tests.training.small_run import run_command


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TRAININGS = pytest.mark.parametrize("training", ["lora", "full"])


@pytest.fixture
def command(wan_folder, tmp_path):
    """The command of a run, by default of LoRA in bfloat16."""

    def command(**changes) -> RunCommand:
        return run_command(tmp_path / "run", wan_folder, Path("none"), **{"model.precision": "bfloat16", **changes})

    return command


@pytest.fixture
def half_folder(wan_folder, tmp_path) -> Path:
    """The base as releases are: in bfloat16, but for what is kept in float32."""
    folder = shutil.copytree(wan_folder, tmp_path / "half")
    model = RefAlignWanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    save_file(model.cast_weights(torch.bfloat16).state_dict(), folder / WEIGHTS)
    return folder


def load(command: RunCommand) -> RefAlignWanTransformer3DModel:
    return load_transformer(command, find_start(command))


def adapters(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in transformer.named_parameters() if "lora_" in name}


# -- What is trained, and in which precision --------------------------------------------------------------------------


@pytest.mark.parametrize("is_half", [True, False], ids=["bfloat16", "float32"])
def test_the_base_of_adapters_is_as_inference_loads_it(command, wan_folder, half_folder, is_half):
    base = half_folder if is_half else wan_folder
    transformer = load(command(**{"model.base": str(base)}))
    inference = RefAlignWanTransformer3DModel.from_pretrained(base, subfolder="transformer", dtype=torch.bfloat16)
    expected = dict(inference.named_parameters())
    assert {p.dtype for p in expected.values()} == {torch.float32, torch.bfloat16}
    ours = {n.replace(".base_layer.", "."): p for n, p in transformer.named_parameters() if "lora_" not in n}
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == expected[name].dtype and torch.equal(parameter, expected[name]), name
        assert not parameter.requires_grad, name


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_adapters_are_trained_in_float32(command, precision):
    transformer = load(command(**{"model.precision": precision}))
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert trained.keys() == adapters(transformer).keys()
    # 2 blocks of 2 attentions of 4 layers and a feed-forward of 2, with A and B
    assert len(trained) == 2 * (2 * 4 + 2) * 2
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {min(p.shape) for p in trained.values()} == {4}


def test_the_base_in_float32_is_bit_for_bit_the_files(command, wan_folder):
    transformer = load(command(**{"model.precision": "float32"}))
    stored = load_file(wan_folder / WEIGHTS)
    ours = {n.replace(".base_layer.", "."): p for n, p in transformer.named_parameters() if "lora_" not in n}
    assert ours.keys() == stored.keys() and all(torch.equal(p, stored[name]) for name, p in ours.items())


def test_adapters_are_the_same_for_a_seed(command):
    torch.manual_seed(1)
    one = adapters(load(command()))
    torch.manual_seed(2)
    same, other = adapters(load(command())), adapters(load(command(seed=1)))
    assert all(torch.equal(p, same[name]) for name, p in one.items())
    assert not any(torch.equal(p, other[name]) for name, p in one.items() if "lora_A" in name)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_adapters_start_as_no_change(command, inputs, precision):
    transformer = load(command(**{"model.precision": precision}))

    def outputs() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return transformer(**inputs).sample

    transformer.disable_adapters()
    base = outputs()
    transformer.enable_adapters()
    assert torch.equal(outputs(), base)
    for parameter in adapters(transformer).values():
        parameter.data.normal_()
    assert not torch.equal(outputs(), base)


def test_adapters_are_scaled_by_alpha_over_rank(command, inputs):
    """And rank, alpha and dropout are the options'."""
    transformer = load(command(**{"lora.rank": 2, "lora.alpha": 6.0, "lora.dropout": 0.25}))
    layer = transformer.blocks[0].attn1.to_q
    assert layer.scaling == {"default": 3.0} and layer.r == {"default": 2}
    assert layer.lora_dropout["default"].p == 0.25


def test_targets_are_an_option(command):
    transformer = load(command(**{"lora.targets": ("to_v",)}))
    assert {name.split(".lora_")[0].split(".", 2)[2] for name in adapters(transformer)} == {"attn1.to_v", "attn2.to_v"}


@pytest.mark.parametrize("is_half", [True, False], ids=["bfloat16", "float32"])
def test_full_training_is_of_all_weights_in_float32(command, wan_folder, half_folder, is_half):
    base = half_folder if is_half else wan_folder
    transformer = load(command(training="full", **{"model.base": str(base)}))
    stored = load_file(base / WEIGHTS)
    assert {name: p.dtype for name, p in transformer.named_parameters()} == {n: t.dtype for n, t in stored.items()}
    Parallel("ddp", "cpu").wrap(transformer, transformer.blocks, torch.float32)
    for name, parameter in transformer.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad, name
        assert torch.equal(parameter, stored[name].float()), name


@TRAININGS
@pytest.mark.parametrize("is_on", [True, False])
def test_it_is_ready_to_be_trained(command, training, is_on):
    transformer = load(command(training=training, **{"model.gradient_checkpointing": is_on}))
    assert transformer.training and transformer.gradient_checkpointing == is_on
    assert not any(tensor.is_meta for tensor in (*transformer.parameters(), *transformer.buffers()))


# -- Memory -----------------------------------------------------------------------------------------------------------


def mapped(model: torch.nn.Module, file: Path) -> set[str]:
    """The names of the parameters that lie in a mapping of the file rather than in memory of their own."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file.resolve())):
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    return {n for n, p in model.named_parameters() if any(a <= p.data_ptr() < b for a, b in ranges)}


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped on Linux alone")


@needs_proc
@TRAININGS
def test_weights_are_mapped_until_they_are_wrapped(command, wan_folder, training):
    transformer = load(command(training=training, **{"model.precision": "float32"}))
    names = {name for name, _ in transformer.named_parameters() if "lora_" not in name}
    assert mapped(transformer, wan_folder / WEIGHTS) == names
    Parallel("ddp", "cpu").wrap(transformer, transformer.blocks, torch.float32 if training == "full" else None)
    assert not mapped(transformer, wan_folder / WEIGHTS)


@needs_proc
def test_a_frozen_base_is_mapped_where_it_is_stored_as_it_is_needed(command, half_folder):
    transformer = load(command(**{"model.base": str(half_folder)}))
    names = {name for name, _ in transformer.named_parameters() if "lora_" not in name}
    assert mapped(transformer, half_folder / WEIGHTS) == names


# -- What it starts from ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(command, tmp_path):
    """Writes a run's folder with a checkpoint of some training."""

    def checkpoint(training: str) -> Path:
        state = {"step": 5, "options": flatten(command(training=training))}
        return save_checkpoint(tmp_path / "earlier/checkpoints", {"x": torch.ones(1)}, state, Parallel("ddp", "cpu"))

    return checkpoint


@pytest.fixture
def exported(wan_folder, tmp_path) -> Path:
    """A pipeline's folder with projectors, as full training is exported; of other weights than the base."""
    folder = shutil.copytree(wan_folder, tmp_path / "exported")
    save_file(tiny_transformer(seed=7).state_dict(), folder / WEIGHTS)
    save_file(other_projectors(), folder / PROJECTORS)
    return folder


def other_projectors() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return ReferenceAlignment(24, 6, (0, 1)).native_state_dict()


def weights_of(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n.replace(".base_layer.", "."): p for n, p in transformer.named_parameters() if "lora_" not in n}


def assert_starts_from(command: RunCommand, expected: dict[str, torch.Tensor]) -> None:
    weights = weights_of(load(command))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_without_a_start_it_is_the_base(command):
    assert find_start(command()) == Start()


@TRAININGS
@pytest.mark.parametrize("is_run", [True, False], ids=["run", "checkpoint"])
def test_it_starts_from_a_run_or_a_checkpoint(command, checkpoint, training, is_run):
    path = checkpoint(training)
    start = path.parents[1] if is_run else path
    assert find_start(command(training=training, **{"model.start": start})) == Start(path)


@TRAININGS
def test_it_starts_from_an_export(command, exported, training):
    start = command(training=training, **{"model.start": exported, "model.precision": "float32"})
    assert_starts_from(start, load_file(exported / WEIGHTS))
    assert find_start(start).projectors.keys() == other_projectors().keys()


def test_an_export_may_have_no_projectors(command, exported):
    (exported / PROJECTORS).unlink()
    start = find_start(command(**{"model.start": exported}))
    assert start.transformer and not start.projectors


@pytest.mark.parametrize("has_projectors", [True, False], ids=["projectors", "none"])
def test_it_starts_from_a_native_file(command, tmp_path, has_projectors):
    weights, projectors = tiny_transformer(seed=7).state_dict(), other_projectors() if has_projectors else {}
    save_file({**diffusers_to_native(weights), **projectors}, tmp_path / "native.safetensors")
    start = command(**{"model.start": tmp_path / "native.safetensors", "model.precision": "float32"})
    assert_starts_from(start, weights)
    assert find_start(start).projectors.keys() == projectors.keys()


def test_it_starts_from_projectors_alone(command, wan_folder, tmp_path):
    save_file(other_projectors(), tmp_path / "projectors.safetensors")
    start = command(**{"model.start": tmp_path / "projectors.safetensors", "model.precision": "float32"})
    assert_starts_from(start, load_file(wan_folder / WEIGHTS))


@pytest.mark.parametrize(
    ("training", "other", "remedy"),
    [
        ("lora", "full", "is of full training, this run is lora. Export it .* and name that folder as model.start"),
        ("full", "lora", "is of lora training, this run is full. Adapters are not whole weights"),
    ],
)
def test_a_checkpoint_of_the_other_training_is_refused(command, checkpoint, training, other, remedy):
    start = command(training=training, **{"model.start": checkpoint(other)})
    with pytest.raises(ValueError, match=remedy):
        find_start(start)


def test_a_start_that_is_not_there_is_named(command):
    with pytest.raises(ValueError, match=r"model.start is /nowhere, which does not exist"):
        find_start(command(**{"model.start": Path("/nowhere")}))


def test_a_folder_with_nothing_to_start_from_is_named(command, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is neither a checkpoint nor a run's folder with one"):
        find_start(command(**{"model.start": tmp_path / "empty"}))


def test_exported_adapters_are_no_start(command, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / LORA_WEIGHTS)
    save_file(other_projectors(), tmp_path / PROJECTORS)
    with pytest.raises(ValueError, match=r"holds exported adapters. Name the run, or the checkpoint"):
        find_start(command(**{"model.start": tmp_path}))


def test_a_file_of_something_else_is_named(command, tmp_path):
    save_file({"blocks.0.attn.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'blocks.0.attn.weight' is not one of a native Wan 2.1"):
        find_start(command(**{"model.start": tmp_path / "other.safetensors"}))


def test_a_start_of_another_size_is_named(command, tmp_path):
    state_dict = diffusers_to_native(tiny_transformer(ffn_dim=64).state_dict())
    save_file(state_dict, tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=r"large.safetensors does not fit the base \(is it of the same size"):
        load(command(**{"model.start": tmp_path / "large.safetensors"}))


def test_weights_that_are_not_finite_are_refused(half_folder, command):
    tensors = load_file(half_folder / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, half_folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{re.escape(str(half_folder))} holds numbers that are not finite"):
        load(command(**{"model.base": str(half_folder)}))


def test_a_start_of_another_kind_is_refused(half_folder, command):
    index = json.loads((half_folder / "model_index.json").read_text("utf-8")) | {"boundary_ratio": 0.875}
    (half_folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ValueError, match="which has two transformers"):
        load(command(**{"model.start": half_folder, "training": "full"}))


# -- Bases that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_dim": 1280, "in_channels": 36}, "image-to-video WanTransformer3DModel"),
        ({"image_dim": 1280}, "image-to-video WanTransformer3DModel"),
        ({"_class_name": "WanVACETransformer3DModel"}, "a WanVACETransformer3DModel"),
        ({"in_channels": 48, "out_channels": 48}, "Wan 2.2's TI2V-5B"),
        ({"_class_name": "FluxTransformer2DModel", "in_channels": 64}, "a FluxTransformer2DModel"),
    ],
    ids=["image-to-video", "image", "vace", "5b", "flux"],
)
def test_another_transformer_is_named(half_folder, changes, message):
    file = half_folder / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ValueError, match=f"{re.escape(str(half_folder))} is of another kind: .*{message}"):
        transformer_config(ModelOptions(base=str(half_folder)))


@pytest.mark.parametrize("kind", ["WanTransformer3DModel", "RefAlignWanTransformer3DModel"])
def test_plain_wan_and_refalign_are_bases(half_folder, kind):
    file = half_folder / "transformer/config.json"
    config = json.loads(file.read_text("utf-8")) | {"_class_name": kind}
    file.write_text(json.dumps(config), "utf-8")
    assert transformer_config(ModelOptions(base=str(half_folder))) == config


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("/nowhere/wan", "/nowhere/wan is neither a file or folder here nor a Hub id"),
        ("no-one/wan", "no-one/wan is not a file or folder here, and the Hub does not give it"),
    ],
)
def test_a_base_that_cannot_be_had_is_named(base, message):
    with pytest.raises(ValueError, match=message):
        transformer_config(ModelOptions(base=base))


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a pipeline in diffusers' format: it has no transformer/config.json"):
        transformer_config(ModelOptions(base=str(tmp_path)))


def test_a_base_whose_weights_do_not_fit_is_named(command, half_folder):
    save_file(tiny_transformer(num_layers=1).state_dict(), half_folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"half does not fit the base: missing \(27\): blocks.1"):
        load(command(**{"model.base": str(half_folder)}))


def test_a_base_that_is_cut_short_is_named(command, half_folder):
    file = half_folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file"):
        load(command(**{"model.base": str(half_folder)}))


# -- The projectors ---------------------------------------------------------------------------------------------------


CONFIG = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}


def test_projectors_are_the_same_for_a_seed(command):
    options = command().alignment
    torch.manual_seed(1)
    one = make_alignment(options, CONFIG, 6, Start(), seed=0).native_state_dict()
    torch.manual_seed(2)
    same, other = (make_alignment(options, CONFIG, 6, Start(), seed).native_state_dict() for seed in (0, 1))
    assert all(torch.equal(tensor, same[key]) and not torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_projectors_that_came_with_the_weights_go_on(command, exported):
    start = find_start(command(**{"model.start": exported}))
    projectors = make_alignment(command().alignment, CONFIG, 6, start, seed=0).native_state_dict()
    expected = other_projectors()
    assert projectors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in projectors.items())


def test_projectors_are_trained_in_float32(command, exported):
    halves = {key: tensor.bfloat16() for key, tensor in other_projectors().items()}
    save_file(halves, exported / PROJECTORS)
    alignment = make_alignment(command().alignment, CONFIG, 6, find_start(command(**{"model.start": exported})), 0)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in alignment.parameters())
    key = "blocks.0.input_mlp.proj.0.weight"
    assert torch.equal(alignment.native_state_dict()[key], halves[key].float())


def test_the_alignments_options_reach_it(command):
    changes = {"projector": "conv", "spatial_norm": True, "positive_margin": 0.1}
    changes |= {"negative_margin": 0.7, "negative_weight": 0.3, "layers": (1,)}
    options = command(**{f"alignment.{name}": value for name, value in changes.items()}).alignment
    alignment = make_alignment(options, CONFIG, 6, Start(), seed=0)
    margins = {name: changes[name] for name in ("positive_margin", "negative_margin", "negative_weight")}
    assert alignment.layers == (1,) and alignment.spatial_norm and alignment.loss_options == margins
    assert alignment.native_state_dict()["blocks.1.input_mlp.conv.weight"].shape == (6, 24, 3, 3)


def test_layers_outside_the_blocks_are_named(command):
    options = command(**{"alignment.layers": (0, 2, 5)}).alignment
    with pytest.raises(ValueError, match=r"alignment.layers names \[2, 5\], but the blocks are 0 to 1"):
        make_alignment(options, CONFIG, 6, Start(), seed=0)


@pytest.mark.parametrize(
    ("changes", "teacher_dim"), [({"alignment.layers": (0,)}, 6), ({"alignment.projector": "conv"}, 6), ({}, 7)]
)
def test_projectors_that_do_not_fit_are_named(command, exported, changes, teacher_dim):
    start = find_start(command(**{"model.start": exported}))
    with pytest.raises(ValueError, match="The projectors do not fit layers"):
        make_alignment(command(**changes).alignment, CONFIG, teacher_dim, start, seed=0)


def test_plain_attention_computes_the_same_and_is_this_models_alone():
    ours, theirs = (tiny_transformer(RefAlignWanTransformer3DModel) for _ in range(2))
    inputs = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.ones(1, 3, 32)}
    before = ours(inputs, **arguments).sample
    take_attention(ours, AttentionBackendName._NATIVE_MATH)
    assert (ours(inputs, **arguments).sample - before).abs().max() < 1e-5
    assert ours.blocks[0].attn1.processor._attention_backend is not None
    assert theirs.blocks[0].attn1.processor._attention_backend is None
    assert torch.equal(theirs(inputs, **arguments).sample, before)
