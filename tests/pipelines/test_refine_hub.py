"""A Refine-by-Align pipeline as a Hub repo."""

import ast
import inspect
import re

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from refalign import RefineByAlignPipeline, hub
from tests.tiny_refine import tiny_refine_pipeline


CODE = {"pipeline_refine_by_align.py", "reference_images.py", "reference_projector.py"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refine") / "model"
    tiny_refine_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return hub.export_repo(saved, tmp_path / "repo")


def test_a_repo_has_code_weights_and_a_card(folder):
    assert {file.name for file in folder.glob("*")} > CODE
    assert (folder / "reference_projector/reference_projector.py").is_file()
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-to-image"
    assert "refine-by-align" in card.data.tags
    RefineByAlignPipeline.from_pretrained(folder)
    assert type(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)) is not RefineByAlignPipeline


def test_the_cards_call_fits_the_pipeline(folder):
    blocks = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == "pipe"]
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    inspect.signature(RefineByAlignPipeline.__call__).bind(None, **arguments)


def test_a_dry_push_names_what_would_go(folder):
    (folder / "optimizer.pt").write_bytes(b"state")
    card = (folder / "README.md").read_text("utf-8").replace(hub.UNKNOWN, "mit")
    (folder / "README.md").write_text(card, "utf-8")
    pushed = hub.push(folder, "org/refine", dry_run=True)
    assert pushed.sizes.keys() > CODE
    assert "unet/diffusion_pytorch_model.safetensors" in pushed.sizes
    assert "optimizer.pt" not in pushed.sizes


def test_a_card_must_be_filled_in(folder):
    with pytest.raises(ValueError, match=r"README\.md says FILL-IN"):
        hub.push(folder, "org/refine", dry_run=True)


def test_weights_must_fit_their_configuration(folder):
    file = folder / "reference_projector/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["null_embedding"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*null_embedding"):
        hub.push(folder, "org/refine", dry_run=True)
