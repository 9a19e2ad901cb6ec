"""Names of projectors. Weights are held against real checkpoints in test_convert.py, LoRAs in test_lora.py."""

import pytest

from refalign.keys import is_projector_key, projector_key, projector_name


@pytest.mark.parametrize("name", ["0.proj.0.weight", "27.conv.bias"])
def test_a_projectors_key_comes_back(name):
    key = projector_key(name)
    assert key == "blocks.{}.input_mlp.{}".format(*name.split(".", 1))
    assert is_projector_key(key) and projector_name(key) == name


@pytest.mark.parametrize("key", ["blocks.0.ffn.0.weight", "input_mlp.proj.0.weight", "blocks.0.input_mlp."])
def test_other_keys_are_not_a_projectors(key):
    assert not is_projector_key(key)
    with pytest.raises(ValueError, match="is not one of a projector"):
        projector_name(key)
