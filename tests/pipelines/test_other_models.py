"""Models of another kind, damaged weights and pickles are refused in a line, if possible before weights are read."""

import json
import shutil

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVACEPipeline, WanVACETransformer3DModel
from safetensors.torch import load_file, save_file

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel
from refalign.cli import main
from refalign.convert import find_config
from refalign.pipeline_refalign_wan import paper_scheduler
from refalign.transformer_refalign_wan import check_finite
from tests.tiny_pipeline import TRANSFORMER, tiny_transformer, tiny_wan_pipeline


NOWHERE = [None, None]
# The changes of model_index.json, transformer/config.json and vae/config.json, and what the error says
KINDS = {
    "wan22_a14b": (
        {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875},
        {},
        {},
        "Wan 2.2's A14B",
    ),
    "a14b_by_its_boundary": ({"boundary_ratio": 0.9}, {}, {}, "Wan 2.2's A14B"),
    "wan22_5b": ({"expand_timesteps": True}, {}, {}, "Wan 2.2's TI2V-5B"),
    "5b_by_its_channels": ({}, {"in_channels": 48, "out_channels": 48}, {}, "Wan 2.2's TI2V-5B"),
    "5b_by_its_vae": ({}, {}, {"z_dim": 48}, "Wan 2.2's TI2V-5B"),
    "image_to_video": ({"_class_name": "WanImageToVideoPipeline"}, {}, {}, "a WanImageToVideoPipeline"),
    "image_to_video_by_its_channels": ({}, {"in_channels": 36}, {}, "image-to-video"),
    "image_to_video_by_its_embedder": ({}, {"image_dim": 1280}, {}, "image-to-video"),
    "vace": ({"transformer": ["diffusers", "WanVACETransformer3DModel"]}, {}, {}, "a WanVACETransformer3DModel"),
    "vace_by_its_transformer": ({}, {"_class_name": "WanVACETransformer3DModel"}, {}, "a WanVACETransformer3DModel"),
    "animate": ({"_class_name": "WanAnimatePipeline"}, {}, {}, "a WanAnimatePipeline"),
    "flux": (
        {"transformer": ["diffusers", "FluxTransformer2DModel"]},
        {},
        {},
        "a pipeline with",
    ),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def other(request, wan_folder, tmp_path):
    """A pipeline's folder of another kind, without weights, and what is said of it."""
    *changes, message = request.param
    names = ("model_index.json", "transformer/config.json", "vae/config.json")
    for name, change in zip(names, changes, strict=True):
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.loads((wan_folder / name).read_text("utf-8")) | change
        (tmp_path / "other" / name).write_text(json.dumps(content), "utf-8")
    return tmp_path / "other", message


def test_every_command_says_what_it_is_in_a_line(other, native_file, tmp_path, capsys):
    folder, message = other
    out = ["--output", str(tmp_path / "out.mp4")]
    base = ["--base", str(folder)]
    commands = [
        ["generate", "--model", str(folder), "--prompt", "a", *out],
        ["generate", "--model", str(native_file), *base, "--prompt", "a", *out],
        ["convert", "--checkpoint", str(native_file), *base, *out],
        ["export", "--model", str(folder), "--output", str(tmp_path / "out.safetensors")],
    ]
    for words in commands:
        assert main(words) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{folder} is of another kind: " in error and message in error
        assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in error
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_python_is_told_before_weights_are_read(other):
    folder, message = other
    is_told_by_the_index = json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"] != "WanPipeline"
    if is_told_by_the_index:
        with pytest.raises(ValueError, match=message):
            RefAlignWanPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"in_channels": 36}, "image-to-video"), ({"in_channels": 48, "out_channels": 48}, "TI2V-5B")],
    ids=["image-to-video", "5b"],
)
def test_the_pipeline_takes_no_other_transformer(changes, message):
    with pytest.raises(ValueError, match=message):
        RefAlignWanPipeline(None, None, None, paper_scheduler(), tiny_transformer(**changes))


def vace() -> WanVACETransformer3DModel:
    return WanVACETransformer3DModel(**TRANSFORMER, vace_layers=[0, 1], vace_in_channels=96)


def test_the_pipeline_takes_no_other_class():
    with pytest.raises(ValueError, match="a WanVACETransformer3DModel"):
        RefAlignWanPipeline(None, None, None, paper_scheduler(), vace())


def test_a_compiled_transformer_is_looked_into(transformer):
    compiled = torch.nn.Module()  # as torch.compile makes it, which takes seconds
    compiled._orig_mod = transformer
    assert RefAlignWanPipeline(None, None, None, paper_scheduler(), compiled).transformer is compiled


@pytest.mark.parametrize("kind", ["a14b", "5b", "image-to-video", "vace"])
def test_from_pipe_refuses(kind):
    wan = tiny_wan_pipeline()
    parts = {name: getattr(wan, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    if kind == "a14b":
        pipeline = WanPipeline(**parts, transformer_2=tiny_transformer(seed=1), boundary_ratio=0.875)
    elif kind == "5b":
        pipeline = WanPipeline(**parts, expand_timesteps=True)
    elif kind == "vace":
        pipeline = WanVACEPipeline(**parts | {"transformer": vace()})
    else:
        pipeline = WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)
    with pytest.raises(ValueError, match="is of another kind"):
        RefAlignWanPipeline.from_pipe(pipeline)


@pytest.mark.parametrize("name", ["wan2.2_t2v_high_noise_14B_fp16.safetensors", "Wan22-Low-Noise.safetensors"])
def test_a_half_of_wan22_is_told_by_its_name(native_file, wan_folder, tmp_path, capsys, name):
    shutil.copy(native_file, tmp_path / name)
    words = ["convert", "--checkpoint", tmp_path / name, "--base", wan_folder, "--output", tmp_path / "out"]
    assert main(list(map(str, words))) == 1
    assert "half of Wan 2.2's A14B" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("blocks.0.cross_attn.k_img.weight", "of an image-to-video model"),
        ("vace_blocks.0.after_proj.weight", "of VACE"),
        ("motion_encoder.enc.fc.0.weight", "of Wan-Animate"),
        ("blocks.0.self_attn.q.lora_A.weight", "of a LoRA. Pass that as --lora"),
        ("blocks.0.self_attn.q.scale_weight", "a scaled-fp8 checkpoint"),
        ("model.diffusion_model.blocks.0.ffn.0.weight_scale", "a scaled-fp8 checkpoint"),
        ("scaled_fp8", "a scaled-fp8 checkpoint"),
    ],
)
def test_a_native_file_of_another_kind_is_named(native_file, wan_folder, tmp_path, capsys, key, message):
    save_file({**load_file(native_file), key: torch.zeros(1)}, tmp_path / "other.safetensors")
    words = ["convert", "--checkpoint", tmp_path / "other.safetensors", "--base", wan_folder, "--output"]
    assert main(list(map(str, [*words, tmp_path / "out"]))) == 1
    error = capsys.readouterr().err
    assert message in error and "other.safetensors" in error and error.count("\n") == 1


# -- Other formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--model", "wan.pth", "run code when they are"),
        ("--model", "wan.gguf", "is a native checkpoint: only the transformer"),  # which --base completes
        ("--checkpoint", "wan.pth", "run code when they are"),
        ("--checkpoint", "wan.gguf", "is a GGUF file"),
    ],
)
def test_other_formats_are_named(wan_folder, tmp_path, capsys, name, message, option):
    (tmp_path / name).write_bytes(b"GGUF")
    words = ["generate", "--prompt", "a", "--output", str(tmp_path / "out.mp4"), "--model", str(tmp_path / name)]
    if option == "--checkpoint":
        words = ["convert", "--checkpoint", str(tmp_path / name), "--base", str(wan_folder), "--output", "out"]
    assert main(words) == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def folder(wan_folder, tmp_path):
    return shutil.copytree(wan_folder, tmp_path / "wan")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer/diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("vae/diffusion_pytorch_model", "diffusion_pytorch_model.bin"),
        ("text_encoder/model", "pytorch_model.bin"),
    ],
)
def test_pickled_parts_are_refused(folder, tmp_path, capsys, part, name):
    file = folder / f"{part}.safetensors"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()
    words = ["generate", "--model", str(folder), "--prompt", "a", "--output", str(tmp_path / "out.mp4")]
    assert main(words) == 1
    assert f"{name} is refused" in capsys.readouterr().err
    with pytest.raises((OSError, ValueError)):
        RefAlignWanPipeline.from_pretrained(folder, use_safetensors=False)


def test_the_transformer_alone_reads_no_pickle(folder):
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"\.bin is of a format that runs code"):
        RefAlignWanTransformer3DModel.from_single_file(file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(OSError):
        RefAlignWanTransformer3DModel.from_pretrained(folder, subfolder="transformer", use_safetensors=False)


# -- Weights that are not numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_weights_that_are_not_finite_are_refused(folder, tmp_path, capsys, part):
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    words = ["generate", "--model", str(folder), "--prompt", "a", "--output", str(tmp_path / "out.mp4")]
    assert main(words) == 1
    assert f"not finite (NaN or infinite), first in {name}" in capsys.readouterr().err


def test_native_weights_that_are_not_finite_are_refused(native_file, wan_folder, tmp_path, capsys):
    tensors = load_file(native_file)
    tensors["head.head.bias"][0] = float("inf")
    save_file(tensors, tmp_path / "nan.safetensors")
    base = ["--base", str(wan_folder)]
    out = ["--output", str(tmp_path / "out.mp4")]
    for words in (
        ["convert", "--checkpoint", str(tmp_path / "nan.safetensors"), *base, *out],
        ["generate", "--model", str(tmp_path / "nan.safetensors"), *base, "--prompt", "a", *out],
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "nan.safetensors holds numbers that are not finite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_dtype_is_looked_at(dtype):
    tensor = torch.full((8,), float("nan")).to(dtype)
    check_finite({"empty": tensor[:0], "whole": torch.zeros(2, dtype=torch.int8)}.items(), "a")
    check_finite({"good": torch.full((8,), 440.0).to(dtype)}.items(), "a")
    with pytest.raises(ValueError, match="first in bad"):
        check_finite({"bad": tensor}.items(), "a")


def test_a_plain_base_passes(wan_folder, repo_folder):
    assert find_config(wan_folder)["num_layers"] == find_config(repo_folder)["num_layers"] == 2
