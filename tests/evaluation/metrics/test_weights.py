import contextlib
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from refalign_evaluation.metrics.weights import check_weights, fetch_model, load_weights
from tests.programs import call_script


def test_a_pickle_is_not_read_and_the_line_that_converts_it_works(tmp_path):
    weights = {"a": torch.arange(3.0)}
    torch.save(weights, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="is a pickle, which can run code") as told:
        check_weights(tmp_path / "head.pth", "The head")
    assert "\n" not in str(told.value)
    python, option, code, *words = shlex.split(str(told.value).partition("if you trust it: ")[2])
    assert (python, option) == ("python", "-c")
    with contextlib.chdir(tmp_path):
        assert call_script(code, *words).returncode == 0
    assert torch.equal(load_file(tmp_path / "head.safetensors")["a"], weights["a"])


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"weight": torch.ones(2, 3)}, "it lacks bias and has nothing besides"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "x": torch.ones(1)}, "lacks nothing and has x besides"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"weight has shape \(3, 2\), not \(2, 3\)"),
        ({"weight": torch.ones(2, 3), "bias": torch.full((2,), torch.nan)}, "bias has values that are not finite"),
    ],
)
def test_other_weights_are_refused(tmp_path, weights, told):
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=told):
        load_weights(nn.Linear(3, 2), tmp_path / "a.safetensors", "The head")


def test_counters_of_training_may_be_missing(tmp_path):
    weights = {key: value + 2 for key, value in nn.BatchNorm1d(3).state_dict().items() if "num_batches" not in key}
    save_file(weights, tmp_path / "a.safetensors")
    norm = nn.BatchNorm1d(3)
    load_weights(norm, tmp_path / "a.safetensors", "The network")
    assert torch.equal(norm.running_var, weights["running_var"])


def test_a_cut_file_is_told(tmp_path):
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_weights(nn.Linear(3, 2), tmp_path / "a.safetensors", "The head")


def test_a_folder_with_pickles_alone_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has no safetensors weights"):
        fetch_model(str(tmp_path))
