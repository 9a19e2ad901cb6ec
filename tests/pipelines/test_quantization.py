"""Weights in fewer bits: how close they come, what stays in full precision, LoRAs on them, and what is refused."""

import copy

import pytest
import torch
from diffusers import QuantoConfig
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel
from refalign.keys import diffusers_to_native
from refalign.loading import load_pipeline, read_defaults
from refalign.quantization import as_plain, check_quantize, torchao_config, weight_bytes
from refalign.video_options import SpeedOptions
from tests.gguf_files import write_gguf
from tests.tiny_models import TARGETS
from tests.tiny_pipeline import tiny_transformer, tiny_wan_pipeline


# GGUF's blocks are of 32 numbers
WIDE = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128}


@pytest.fixture(scope="module")
def exact() -> RefAlignWanTransformer3DModel:
    return tiny_transformer(RefAlignWanTransformer3DModel, **WIDE)


@pytest.fixture(scope="module")
def folder(exact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization") / "wide"
    parts = {**tiny_wan_pipeline().components, "transformer": exact}
    parts.pop("transformer_2", None)
    RefAlignWanPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def native(exact, tmp_path_factory):
    file = tmp_path_factory.mktemp("quantization") / "native.safetensors"
    save_file(diffusers_to_native(exact.state_dict()), file)
    return file


@pytest.fixture(scope="module")
def q8(exact, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("quantization") / "q8.gguf", diffusers_to_native(exact.state_dict()))


def load(model, base=None, quantize=None, loras=(), dtype="float32", offload="none"):
    options = {"base": base and str(base), "loras": loras, "dtype": dtype, "device": "cpu", "offload": offload}
    return load_pipeline(str(model), **options, speed=SpeedOptions(quantize=quantize and str(quantize)))


def velocity(transformer, inputs):
    inputs = {name: value.to(transformer.dtype) for name, value in inputs.items()}
    with torch.no_grad():
        return transformer(**inputs).sample.float()


def psnr(ours, exact) -> float:
    peak = exact.max() - exact.min()
    return float(10 * torch.log10(peak**2 / (ours - exact).square().mean()))


def is_quantized(weight) -> bool:
    return type(weight).__name__ in ("Int8Tensor", "Float8Tensor", "GGUFParameter")


# -- How close, and what is quantised ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "floor"), [("int8", 45), ("fp8", 34)])
def test_torchao_comes_close(folder, exact, inputs, kind, floor):
    transformer = load(folder, quantize=kind).transformer
    assert floor < psnr(velocity(transformer, inputs), velocity(exact, inputs)) < 100
    assert weight_bytes(transformer.blocks) < 0.4 * weight_bytes(exact.blocks)


def test_gguf_comes_close(folder, q8, exact, inputs):
    transformer = load(q8, base=folder).transformer
    assert 45 < psnr(velocity(transformer, inputs), velocity(exact, inputs)) < 100


@pytest.mark.parametrize("kind", ["int8", "gguf"])
def test_the_blocks_matrices_alone_are_quantised(folder, q8, kind):
    transformer = load(folder, quantize=q8 if kind == "gguf" else kind).transformer
    quantized = {name for name, weight in transformer.named_parameters() if is_quantized(weight)}
    modules = transformer.named_modules()
    matrices = {f"{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}
    assert quantized == {name for name in matrices if name.startswith("blocks.")}
    assert transformer.scale_shift_table.dtype == torch.float32


def test_a_native_checkpoint_is_quantised_as_a_folder_is(folder, native, inputs):
    ours, theirs = load(native, base=folder, quantize="int8"), load(folder, quantize="int8")
    assert torch.equal(velocity(ours.transformer, inputs), velocity(theirs.transformer, inputs))


def test_a_gguf_file_of_diffusers_keys_is_read_too(folder, q8, exact, inputs, tmp_path):
    file = write_gguf(tmp_path / "diffusers.gguf", exact.state_dict())
    ours, theirs = load(file, base=folder), load(q8, base=folder)
    assert torch.equal(velocity(ours.transformer, inputs), velocity(theirs.transformer, inputs))


def test_a_gguf_file_beside_a_pipeline_keeps_its_scheduler(folder, q8):
    kept = load(folder, quantize=q8).scheduler
    assert type(kept) is type(load(folder).scheduler)
    assert load(q8, base=folder).scheduler.config.shift == 5.0


def test_a_quantised_pipeline_makes_a_video(folder, q8):
    for pipeline in (load(folder, quantize="fp8", dtype="bfloat16"), load(q8, base=folder, offload="group")):
        pipeline.set_progress_bar_config(disable=True)
        frames = pipeline("a", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="pt").frames
        assert frames.isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "fp8", "gguf"])
def test_weights_can_be_told_from_others(folder, q8, kind):
    """As `refalign-eval generate` does."""
    weight = load(folder, quantize=q8 if kind == "gguf" else kind).transformer.blocks[0].ffn.net[2].weight
    assert as_plain(weight.detach()).flatten()[::7].float().numpy().any()


# -- Single files in code ---------------------------------------------------------------------------------------------


def test_a_single_file_is_quantised_by_torchao(folder, native):
    model = RefAlignWanTransformer3DModel.from_single_file(
        str(native), config=str(folder), subfolder="transformer", quantization_config=torchao_config("int8")
    )
    assert is_quantized(model.blocks[0].ffn.net[2].weight)
    assert model.dtype == torch.bfloat16


def test_a_single_file_refuses_what_would_quantise_nothing(folder, native):
    with pytest.raises(ValueError, match="but not by QuantoConfig"):
        RefAlignWanTransformer3DModel.from_single_file(
            str(native), config=str(folder), subfolder="transformer", quantization_config=QuantoConfig("int8")
        )


# -- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(exact, tmp_path_factory):
    torch.manual_seed(0)
    transformer = copy.deepcopy(exact)
    transformer.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    layers = get_peft_model_state_dict(transformer)
    file = tmp_path_factory.mktemp("quantization") / "lora"
    RefAlignWanPipeline.save_lora_weights(file, transformer_lora_layers=layers)
    return file / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("kind", ["int8", "fp8", "gguf"])
def test_a_lora_works_on_a_quantised_base(folder, q8, lora, inputs, kind):
    quantize = q8 if kind == "gguf" else kind
    plain = load(folder, loras=[(str(lora), 0.5)]).transformer
    quantized = load(folder, quantize=quantize, loras=[(str(lora), 0.5)]).transformer
    effect = psnr(velocity(load(folder).transformer, inputs), velocity(plain, inputs))
    assert psnr(velocity(quantized, inputs), velocity(plain, inputs)) > effect + 6
    adapters = [weight for name, weight in quantized.named_parameters() if "lora_" in name]
    assert {weight.dtype for weight in adapters} == {torch.float32}
    assert not any(map(is_quantized, adapters))


def test_a_lora_that_changes_biases_is_refused(folder, tmp_path):
    lora = {
        "diffusion_model.blocks.0.ffn.2.lora_A.weight": torch.ones(1, 128),
        "diffusion_model.blocks.0.ffn.2.lora_B.weight": torch.ones(64, 1),
        "diffusion_model.blocks.0.ffn.2.diff_b": torch.ones(64),
    }
    save_file(lora, tmp_path / "biases.safetensors")
    with pytest.raises(ValueError, match="changes biases"):
        load(folder, quantize="int8", loras=[(str(tmp_path / "biases.safetensors"), 1.0)])


# -- What is refused, in one line and before weights are read ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "--quantize int4 is not known"),
        ({"quantize": "none.gguf"}, "none.gguf does not exist"),
        ({"quantize": "fp8", "device": torch.device("mps")}, "mps does not have"),
        ({"model": "a.gguf", "quantize": "int8"}, "is quantised as it is"),
        ({"quantize": "a.gguf", "base": "b"}, "Pass it as --model"),
    ],
)
def test_a_wrong_quantisation_is_told(options, message):
    options = {"quantize": None, "model": "a", "base": None, "device": torch.device("cpu"), **options}
    with pytest.raises(ValueError, match=message) as error:
        check_quantize(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("a.gguf", "gguf")])
def test_a_missing_library_is_told_with_what_installs_it(monkeypatch, kind, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'{package}, which is not installed: `pip install "\.\[quantize\]"`'):
        check_quantize(kind, "a", None, torch.device("cpu"))


def foreign(exact, name):
    """Tensors of a GGUF file of another model, its architecture, and its name."""
    native = diffusers_to_native(exact.state_dict())
    if name == "language model":
        return {"blk.0.attn_q.weight": torch.ones(32, 32)}, "llama", "llama.gguf"
    if name == "another model":
        return {"double_blocks.0.img_attn.qkv.weight": torch.ones(32, 32)}, "flux", "flux.gguf"
    if name == "A14B":
        return native, "wan", "Wan2.2-T2V-A14B-HighNoise-Q8_0.gguf"
    if name == "another size":
        other = tiny_transformer(RefAlignWanTransformer3DModel, **{**WIDE, "ffn_dim": 64})
        return diffusers_to_native(other.state_dict()), "wan", "small.gguf"
    if name == "I2V":
        return {**native, "blocks.0.cross_attn.k_img.weight": torch.ones(64, 64)}, "wan", "i2v.gguf"
    return {**native, "patch_embedding.weight": torch.ones(64, 36, 1, 2, 2)}, "wan", "i2v-22.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("language model", r"a language model \(llama\)"),
        ("another model", r"\(architecture flux\): Key 'double_blocks"),
        ("A14B", "the high-noise half of Wan 2.2's A14B"),
        ("another size", "of the same size, 1.3B or 14B"),
        ("I2V", "of an image-to-video model"),
        ("I2V of Wan 2.2", "an image-to-video"),
    ],
)
def test_a_gguf_file_of_another_model_is_told(folder, exact, tmp_path, name, message):
    tensors, architecture, file = foreign(exact, name)
    write_gguf(tmp_path / file, tensors, architecture=architecture)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / file, base=folder)
    assert "\n" not in str(error.value)


def test_a_damaged_gguf_file_is_told(folder, q8, tmp_path):
    content = q8.read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.gguf is not a whole GGUF file"):
        load(tmp_path / "half.gguf", base=folder)


def test_a_gguf_file_alone_says_what_else_it_needs(q8):
    with pytest.raises(ValueError, match="Pass it as --model, and as --base"):
        read_defaults(str(q8))
