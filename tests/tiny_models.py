"""Fixtures: tiny random models of real classes, made without network, and the authors' golden tensors."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel
from refalign.convert import convert
from refalign.keys import diffusers_to_native, native_to_diffusers
from tests.tiny_pipeline import tiny_transformer, tiny_wan_pipeline


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN_FILES = sorted(FIXTURES.glob("dit_*.safetensors"))


@pytest.fixture(params=GOLDEN_FILES, ids=lambda file: file.stem)
def golden(request) -> SimpleNamespace:
    """What the authors' implementation computed (`t`), its configuration (`c`), and our model with its weights."""
    tensors = load_file(request.param)
    with safe_open(request.param, "pt") as opened:
        config = SimpleNamespace(**json.loads(opened.metadata()["config"]))
    native = {k.removeprefix("native."): v for k, v in tensors.items() if k.startswith("native.")}
    state_dict, projectors = native_to_diffusers(native)
    model = RefAlignWanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
    )
    model.load_state_dict(state_dict)
    return SimpleNamespace(t=tensors, c=config, model=model.eval(), native=native, projectors=projectors)


@pytest.fixture
def transformer() -> RefAlignWanTransformer3DModel:
    return tiny_transformer(RefAlignWanTransformer3DModel)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Arguments of the transformer: 2 samples, 3 latent frames of 4x6, 2 references each."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 3, 4, 6, generator=generator),
        "timestep": torch.tensor([700, 300]),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator),
        "reference_hidden_states": torch.randn(2, 16, 2, 4, 6, generator=generator),
    }


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory) -> Path:
    """A plain Wan text-to-video pipeline folder, as a base."""
    folder = tmp_path_factory.mktemp("models") / "wan"
    tiny_wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def native_file(tmp_path_factory) -> Path:
    """A native checkpoint with other weights than the base's."""
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("models") / "native.safetensors"
    save_file(diffusers_to_native(tiny_transformer(seed=5).state_dict()), file)
    return file


@pytest.fixture(scope="session")
def repo_folder(tmp_path_factory, native_file, wan_folder) -> Path:
    """What `refalign convert` makes of the two: a pipeline folder that is a Hub repo."""
    return convert(native_file, wan_folder, tmp_path_factory.mktemp("models") / "repo")


@pytest.fixture(scope="session")
def loaded_pipeline(repo_folder) -> RefAlignWanPipeline:
    pipeline = RefAlignWanPipeline.from_pretrained(repo_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded_pipeline) -> RefAlignWanPipeline:
    """A copy, which takes a quarter of the time that loading it does."""
    return copy.deepcopy(loaded_pipeline)


@pytest.fixture
def lora_folder(pipeline, tmp_path):
    """Two random LoRAs, saved by diffusers' own way as `first` and `second`."""
    for number, name in enumerate(("first", "second")):
        torch.manual_seed(number)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False)
        pipeline.transformer.add_adapter(config, adapter_name=name)
        layers = get_peft_model_state_dict(pipeline.transformer, adapter_name=name)
        RefAlignWanPipeline.save_lora_weights(tmp_path / name, transformer_lora_layers=layers)
        pipeline.transformer.delete_adapters(name)
    return tmp_path
