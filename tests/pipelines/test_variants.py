"""A base whose weights have a variant such as fp16 in their names, as some repos have them alone, opens everywhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refalign import RefAlignWanPipeline, hub
from refalign.cli import main
from refalign.convert import convert, export_native
from refalign.loading import load_pipeline
from refalign.variants import plain_names
from refalign_training.cache.encoders import TextEncoder, VaeEncoder
from tests.tiny_pipeline import tiny_wan_pipeline


HOW = {"base": None, "loras": (), "dtype": "float32", "device": "cpu", "offload": "none"}


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> Path:
    """Plain Wan saved as fp16 alone, in shards, in shards of the names of old, and in both ways."""
    folder, wan = tmp_path_factory.mktemp("variants"), tiny_wan_pipeline()
    wan.save_pretrained(folder / "whole", variant="fp16")
    wan.save_pretrained(folder / "sharded", variant="fp16", max_shard_size="20KB")
    wan.save_pretrained(folder / "both")
    wan.save_pretrained(folder / "both", variant="fp16")
    write_old_names(shutil.copytree(folder / "sharded", folder / "old"))
    return folder


def write_old_names(folder: Path) -> None:
    """`model.fp16-00001-of-00002.safetensors` becomes `model-00001-of-00002.fp16.safetensors`."""
    for index in folder.glob("*/*.index.fp16.json"):
        content = json.loads(index.read_text())
        for key, name in content["weight_map"].items():
            stem, variant, _ = name.split(".")
            new = f"{stem}{variant.removeprefix('fp16')}.fp16.safetensors"
            content["weight_map"][key] = new
            if (index.parent / name).exists():
                (index.parent / name).rename(index.parent / new)
        index.write_text(json.dumps(content))


def weights_of(model: torch.nn.Module) -> float:
    return float(sum(weights.detach().abs().sum() for weights in model.parameters()))


@pytest.fixture(scope="module")
def wanted() -> dict[str, float]:
    """The sums of the weights of each component."""
    wan = tiny_wan_pipeline()
    return {name: weights_of(getattr(wan, name)) for name in ("vae", "text_encoder", "transformer")}


@pytest.mark.parametrize("name", ["whole", "sharded", "old", "both"])
def test_a_base_of_a_variant_is_loaded_with_all_its_weights(name, variants, wanted, caplog):
    pipeline = load_pipeline(str(variants / name), **HOW)
    found = {part: weights_of(getattr(pipeline, part)) for part in ("vae", "text_encoder")}
    assert found == {part: pytest.approx(wanted[part]) for part in found}
    assert ("has weights of the variant fp16 alone" in caplog.text) == (name != "both")


def test_components_without_the_variant_are_loaded_too(variants, wanted, tmp_path):
    model = shutil.copytree(variants / "whole", tmp_path / "wan")
    weights = model / "vae/diffusion_pytorch_model.fp16.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.safetensors"))
    assert weights_of(load_pipeline(str(model), **HOW).vae) == pytest.approx(wanted["vae"])


def test_two_variants_alone_are_refused(variants, tmp_path, capsys):
    model = shutil.copytree(variants / "whole", tmp_path / "wan")
    weights = model / "vae/diffusion_pytorch_model.fp16.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bf16.safetensors"))
    arguments = ["generate", "--model", str(model), "--prompt", "a", "--output", str(tmp_path / "a.mp4")]
    assert main(arguments) == 1
    assert "has weights of the variants bf16, fp16 alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["whole", "sharded", "both"])
def test_a_base_of_a_variant_is_cached_with(name, variants, wanted):
    assert weights_of(VaeEncoder(variants / name, torch.float32, torch.device("cpu")).vae) == wanted["vae"]
    text = TextEncoder(variants / name, torch.float32, torch.device("cpu"))
    assert weights_of(text.text_encoder) == pytest.approx(wanted["text_encoder"])


@pytest.mark.parametrize("name", ["sharded", "old", "both"])
def test_its_transformer_is_exported(name, variants, wanted, tmp_path):
    file = export_native(variants / name, tmp_path / "native.safetensors")
    total = sum(float(tensor.abs().sum()) for tensor in load_file(file).values())
    assert total == pytest.approx(wanted["transformer"])


# -- Under plain names, once ------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


@pytest.mark.parametrize("name", ["whole", "sharded", "old", "both"])
def test_weights_of_a_variant_are_exported_under_plain_names_once(name, variants, wanted, tmp_path):
    hub.export_repo(variants / name, tmp_path / "repo")
    files = names(tmp_path / "repo")
    assert [file for file in files if "fp16" in file] == []
    shards = len([file for file in files if file.startswith("vae/diffusion")])
    assert shards == (3 if name in ("sharded", "old") else 1)
    pipeline = RefAlignWanPipeline.from_pretrained(tmp_path / "repo")
    assert {part: weights_of(getattr(pipeline, part)) for part in ("vae", "text_encoder")} == {
        part: pytest.approx(wanted[part]) for part in ("vae", "text_encoder")
    }


@pytest.mark.parametrize("name", ["whole", "sharded", "both"])
def test_weights_of_a_variant_of_the_base_are_converted_under_plain_names_once(name, variants, native_file, tmp_path):
    convert(native_file, variants / name, tmp_path / "repo")
    assert [file for file in names(tmp_path / "repo") if "fp16" in file] == []
    assert RefAlignWanPipeline.from_pretrained(tmp_path / "repo").vae is not None


def test_several_variants_and_none_without_are_refused(variants, tmp_path):
    folder = shutil.copytree(variants / "whole", tmp_path / "wan")
    weights = folder / "vae/diffusion_pytorch_model.fp16.safetensors"
    shutil.copyfile(weights, weights.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(ValueError, match="vae has weights in the variants bf16, fp16, but none without"):
        plain_names(folder / "vae")


@pytest.mark.parametrize("use", [lambda wan, out: hub.export_repo(wan, out), lambda wan, _: load_pipeline(wan, **HOW)])
def test_a_missing_shard_of_a_variant_is_told(use, variants, tmp_path):
    folder = shutil.copytree(variants / "sharded", tmp_path / "wan")
    next((folder / "text_encoder").glob("*-00001-of-*")).unlink()
    with pytest.raises(ValueError, match="names shards that are missing"):
        use(str(folder), tmp_path / "repo")
