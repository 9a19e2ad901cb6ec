"""What we ask of diffusers that it does not offer. A test that fails here says that one of our own ways can go: those
under "What diffusers 0.42 does not offer" in transformer_refalign_wan.py and pipeline_refalign_wan.py."""

import inspect
import logging

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES, _get_custom_components_and_folders
from safetensors.torch import save_file

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel
from refalign.keys import diffusers_to_native
from refalign.sprites import FOLDER
from tests.tiny_pipeline import tiny_transformer


def without(monkeypatch, cls, name):
    """Takes a class's own way from it: what it inherits from diffusers is left."""
    monkeypatch.delattr(cls, name)


@pytest.fixture
def warnings_of_diffusers():
    """What diffusers logs; its loggers hand nothing on to pytest's."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_wan_fixes_the_class_of_its_blocks():
    """Else `_take_reference_blocks` can go."""
    assert "WanTransformerBlock(" in inspect.getsource(WanTransformer3DModel.__init__)
    own = tiny_transformer(RefAlignWanTransformer3DModel).config.keys()
    assert {name for name in own if "block" in name} == set()


def test_caches_do_not_know_a_subclass_of_a_block():
    """Else `_register_for_caches` can go."""

    class Block(WanTransformerBlock):
        pass

    with pytest.raises(ValueError, match="not registered"):
        TransformerBlockRegistry.get(Block)
    transformer = tiny_transformer(WanTransformer3DModel)
    for block in transformer.blocks:
        block.__class__ = Block
    with pytest.raises(ValueError, match="not registered"):
        transformer.enable_cache(FirstBlockCacheConfig())


@pytest.mark.parametrize("cls", [RefAlignWanTransformer3DModel, RefAlignWanPipeline])
def test_auto_map_is_warned_of(monkeypatch, warnings_of_diffusers, cls):
    """Else `extract_init_dict` can go."""
    folder = FOLDER if cls is RefAlignWanPipeline else FOLDER / "transformer"
    cls.from_pretrained(folder)
    assert not any("auto_map" in warning for warning in warnings_of_diffusers)
    without(monkeypatch, cls, "extract_init_dict")
    cls.from_pretrained(folder)
    assert any("auto_map" in warning for warning in warnings_of_diffusers)


def test_a_single_file_is_cast_as_a_whole(tmp_path):
    """Else `from_single_file` and `cast_weights` can go."""
    transformer = tiny_transformer(WanTransformer3DModel)
    transformer.save_config(tmp_path)
    save_file(diffusers_to_native(transformer.state_dict()), tmp_path / "native.safetensors")
    loaded = WanTransformer3DModel.from_single_file(
        tmp_path / "native.safetensors", config=str(tmp_path), dtype=torch.bfloat16
    )
    assert loaded.scale_shift_table.dtype == torch.bfloat16
    assert "scale_shift_table" in WanTransformer3DModel._keep_in_fp32_modules


def test_the_plan_of_context_parallelism_splits_a_timestep():
    """Else `_cp_plan` can take it over as it is."""
    assert set(WanTransformer3DModel._cp_plan[""]) == {"timestep"}


def test_a_repos_own_classes_need_trust_in_it(monkeypatch):
    """Else `_dict_from_json_file` can go."""
    without(monkeypatch, RefAlignWanPipeline, "_dict_from_json_file")
    with pytest.raises(ValueError, match="trust_remote_code"):
        RefAlignWanPipeline.from_pretrained(FOLDER)


def test_parts_of_packages_that_are_not_entered_are_refused_from_the_hub(monkeypatch):
    """Else the entry in LOADABLE_CLASSES can go."""
    repo = {"transformer": ["refalign", "RefAlignWanTransformer3DModel"]}, ["transformer/config.json"]
    _get_custom_components_and_folders("ORG/NAME", *repo)
    monkeypatch.delitem(LOADABLE_CLASSES, "refalign")
    with pytest.raises(ValueError, match="is not a module in 'diffusers/pipelines'"):
        _get_custom_components_and_folders("ORG/NAME", *repo)


def test_from_pipe_hands_on_the_very_class_alone(monkeypatch, wan_folder):
    """Else `from_pipe` can go."""
    without(monkeypatch, RefAlignWanPipeline, "from_pipe")
    pipeline = RefAlignWanPipeline.from_pretrained(wan_folder)
    with pytest.raises(ValueError, match="transformer"):
        RefAlignWanPipeline.from_pipe(pipeline)


def test_a_broken_call_leaves_its_cache():
    """Else `_reset_caches` can go."""
    assert "_reset_stateful_cache" not in inspect.getsource(WanPipeline.__call__)
