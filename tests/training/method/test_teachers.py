"""Teachers: tiny random models of the real classes, saved as their checkpoints are and held against a direct run."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from refalign.files import identity
from refalign_training.method.teachers import load_teacher, teacher_files
from tests.mock_hub import Answer, MockHub, refuse


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
ATTENTION_OUTPUT = re.compile(r"o_proj|attention\.output\.dense|self_attn\.out_proj|attn\.proj")
VIT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DINOV2 = {"hidden_size": 24, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
TEXT = {**VIT, "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
QWEN_TEXT = {**TEXT, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
# windows of 2x2 merged tokens, so that a grid has several, and ragged ones
QWEN = {"hidden_size": 32, "intermediate_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 20}
QWEN |= {"window_size": 56, "fullatt_block_indexes": [1]}


def dinov3() -> nn.Module:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT, num_register_tokens=4))


def dinov2() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, patch_size=14))


def dinov2_with_registers() -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**DINOV2, patch_size=14, num_register_tokens=4)
    return transformers.Dinov2WithRegistersModel(config)


def siglip() -> nn.Module:
    vision = {**VIT, "patch_size": 14, "image_size": 56}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=vision))


def siglip2() -> nn.Module:
    vision = {**VIT, "patch_size": 16, "num_patches": 16}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))


def qwen() -> nn.Module:
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=QWEN)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


MODELS = {f.__name__: f for f in (dinov3, dinov2, dinov2_with_registers, siglip, siglip2, qwen)}
CELL = {"dinov3": 16, "siglip2": 16, "dinov2": 14, "dinov2_with_registers": 14, "siglip": 14, "qwen": 28}
DIM = dict.fromkeys(MODELS, 24) | {"qwen": 20}
FINAL_NORM = {"dinov3": "norm", "siglip": "vision_model.post_layernorm", "siglip2": "vision_model.post_layernorm"}
FINAL_NORM |= {"dinov2": "layernorm", "dinov2_with_registers": "layernorm"}


def random_model(kind: str) -> nn.Module:
    """With weights so large that a token or a channel in the wrong place shows."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], SimpleNamespace]:
    """A model of a kind (`model`) and the checkpoint it is saved as (`folder`); made when asked for, then kept."""
    made = {}

    def get(kind: str) -> SimpleNamespace:
        if kind not in made:
            model, folder = random_model(kind), tmp_path_factory.mktemp("teachers") / kind
            model.save_pretrained(folder)
            made[kind] = SimpleNamespace(model=model, folder=folder)
        return made[kind]

    return get


def pictures(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


def normalised(images: torch.Tensor, mean: tuple = IMAGENET[0], std: tuple = IMAGENET[1]) -> torch.Tensor:
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(images / 255, (height, width), mode="bicubic", antialias=True).clamp(0, 1) * 255


@torch.no_grad()
def run(model: nn.Module, *args: object, **kwargs: object) -> object:
    return model(*args, **kwargs)


def test_dinov3_sees_the_letterboxed_image_as_it_is(saved):
    model, images = saved("dinov3").model, pictures(480, 832, batch=1)
    teacher = load_teacher(saved("dinov3").folder)
    assert (teacher.dim, teacher.patch_size) == (24, 16)
    features = teacher(images)
    assert features.shape == (1, 30, 52, 24)
    hidden = run(model, pixel_values=normalised(images)).last_hidden_state
    torch.testing.assert_close(features, hidden[:, 1 + 4 :].reshape(1, 30, 52, 24))


@pytest.mark.parametrize(("kind", "registers"), [("dinov2", 0), ("dinov2_with_registers", 4)])
def test_dinov2_sees_the_image_at_14_pixels_a_token(saved, kind, registers):
    images = pictures(48, 80)
    features = load_teacher(saved(kind).folder)(images)
    hidden = run(saved(kind).model, pixel_values=normalised(resized(images, 42, 70))).last_hidden_state
    torch.testing.assert_close(features, hidden[:, 1 + registers :].reshape(2, 3, 5, 24), atol=1e-5, rtol=1e-4)


def test_siglip_interpolates_its_positions(saved):
    images = pictures(48, 80)
    features = load_teacher(saved("siglip").folder)(images)
    pixels = normalised(resized(images, 42, 70), *HALF)
    hidden = run(saved("siglip").model.vision_model, pixel_values=pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(features, hidden.last_hidden_state.reshape(2, 3, 5, 24), atol=1e-5, rtol=1e-4)


def test_siglip2_agrees_with_transformers_own_patches(saved):
    images = pictures(48, 80)
    features = load_teacher(saved("siglip2").folder)(images)
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=15)
    inputs = processor(list(images.numpy()), return_tensors="pt", input_data_format="channels_first")
    assert inputs["spatial_shapes"].tolist() == [[3, 5], [3, 5]]
    hidden = run(saved("siglip2").model.vision_model, **inputs).last_hidden_state
    torch.testing.assert_close(features, hidden.reshape(2, 3, 5, 24), atol=1e-5, rtol=1e-4)


def test_qwen_agrees_with_transformers_own_patches(saved):
    images = pictures(3 * 28, 5 * 28)
    features = load_teacher(saved("qwen").folder)(images, grid=(3, 5))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 100})
    inputs = processor(list(images.numpy()), return_tensors="pt", input_data_format="channels_first")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 10], [1, 6, 10]]
    visual = saved("qwen").model.model.visual
    output = run(visual, inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    torch.testing.assert_close(features, output.pooler_output.reshape(2, 3, 5, 20), atol=1e-5, rtol=1e-4)


def test_qwen_sees_the_image_at_28_pixels_a_token(saved):
    teacher, images = load_teacher(saved("qwen").folder), pictures(48, 80)
    larger = resized(images, 3 * 28, 5 * 28) / 255
    torch.testing.assert_close(teacher(images), teacher(larger, grid=(3, 5)))


@pytest.mark.parametrize("kind", MODELS)
def test_a_cell_of_the_image_is_the_feature_in_its_row_and_column(kind, tmp_path):
    model = random_model(kind)
    for name, parameter in model.named_parameters():
        if ATTENTION_OUTPUT.search(name):
            nn.init.zeros_(parameter)  # then no token sees another
    model.save_pretrained(tmp_path)
    side = CELL[kind]
    images = pictures(5 * side, 7 * side, batch=2)
    changed = images.clone()
    changed[1, :, 3 * side : 4 * side, 4 * side : 5 * side] = (
        255 - changed[1, :, 3 * side : 4 * side, 4 * side : 5 * side]
    )
    teacher = load_teacher(tmp_path)
    moved = (teacher(images, (5, 7)) - teacher(changed, (5, 7))).abs().amax(-1) > 1e-4
    assert moved.nonzero().tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("kind", FINAL_NORM)
def test_features_are_those_after_the_final_norm(kind, tmp_path):
    model = random_model(kind)
    norm = model.get_submodule(FINAL_NORM[kind])
    nn.init.zeros_(norm.weight)
    model.save_pretrained(tmp_path)
    features = load_teacher(tmp_path)(pictures(32, 48))
    torch.testing.assert_close(features, norm.bias.detach().expand_as(features))


@pytest.mark.parametrize("kind", MODELS)
def test_an_image_does_not_depend_on_its_neighbours_or_type(saved, kind):
    teacher, images = load_teacher(saved(kind).folder), pictures(48, 80)
    features = teacher(images)
    assert features.shape == (2, 3, 5, DIM[kind])
    assert features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(teacher(images[1:])[0], features[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(teacher(images / 255), features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16(saved, kind):
    images = pictures(48, 80)
    teacher = load_teacher(saved(kind).folder, dtype=torch.bfloat16)
    features = teacher(images)
    assert features.dtype == teacher.dtype == torch.bfloat16
    exact = load_teacher(saved(kind).folder)(images)
    assert F.cosine_similarity(features.float(), exact, dim=-1).mean() > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(load_teacher(saved(kind).folder)(images), exact)


def test_a_teacher_stays_frozen(saved):
    teacher = load_teacher(saved("dinov3").folder)
    images = pictures(32, 48)
    before = teacher(images)
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    student = nn.ModuleDict({"teacher": teacher, "other": nn.Linear(2, 2)}).train()
    assert student["other"].training and not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(teacher(images), before)
    assert not teacher((images / 255).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("images", "grid", "message"),
    [
        (torch.zeros(2, 3, 48, 70), None, r"48x70 pixels have no 3x4 grid of square cells.*multiples of 16"),
        (torch.zeros(2, 3, 8, 8), None, "8x8 pixels have no 0x0 grid"),
        (torch.zeros(2, 3, 48, 80), (5, 3), "48x80 pixels have no 5x3 grid"),
        (torch.zeros(3, 48, 80), None, r"shape \(3, 48, 80\)"),
        (torch.zeros(2, 48, 80, 3), None, r"shape \(2, 48, 80, 3\)"),
        (torch.zeros(0, 3, 48, 80), None, r"shape \(0, 3, 48, 80\)"),
        (torch.zeros(2, 3, 48, 80, dtype=torch.int64), None, "dtype torch.int64"),
        (torch.full((2, 3, 48, 80), -1.0), None, "ranges from -1 to -1"),
        (torch.full((2, 3, 48, 80), 255.0), None, "ranges from 255 to 255"),
        (torch.full((2, 3, 48, 80), torch.nan), None, "ranges from nan"),
    ],
)
def test_wrong_images_are_named(saved, images, grid, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(saved("dinov3").folder)(images, grid)


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_the_checkpoints_own_normalisation_is_used(saved, tmp_path):
    folder = copy_of(saved("dinov3").folder, tmp_path)
    mean, std = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    images = pictures(32, 48)
    hidden = run(saved("dinov3").model, pixel_values=normalised(images, mean, std)).last_hidden_state
    torch.testing.assert_close(load_teacher(folder)(images), hidden[:, 5:].reshape(2, 2, 3, 24))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": std}))
    with pytest.raises(ValueError, match=r"preprocessor_config.json has image_mean \[0.5\]"):
        load_teacher(folder)


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "qwen"])
def test_a_vision_tower_saved_by_itself_is_the_same_teacher(saved, kind, tmp_path):
    tower = saved(kind).model.model.visual if kind == "qwen" else saved(kind).model.vision_model
    tower.save_pretrained(tmp_path)
    images = pictures(48, 80)
    torch.testing.assert_close(load_teacher(tmp_path)(images), load_teacher(saved(kind).folder)(images))


@pytest.mark.parametrize(
    ("kind", "old", "new"), [("qwen", "visual.", "model.visual."), ("dinov3", "layer.", "model.layer.")]
)
def test_checkpoints_with_transformers_other_keys(saved, kind, old, new, tmp_path):
    folder = copy_of(saved(kind).folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert any(key.startswith(old) for key in weights)
    renamed = {re.sub(f"^{re.escape(old)}", new, key): tensor for key, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    images = pictures(48, 80)
    torch.testing.assert_close(load_teacher(folder)(images), load_teacher(saved(kind).folder)(images))


@pytest.mark.parametrize("kind", ["siglip2", "qwen"])
def test_the_language_model_is_not_read(saved, kind):
    whole = sum(parameter.numel() for parameter in saved(kind).model.parameters())
    teacher = load_teacher(saved(kind).folder)
    assert sum(parameter.numel() for parameter in teacher.parameters()) < whole
    assert not any("embed_tokens" in name or "text" in name for name, _ in teacher.named_parameters())


def test_identity_follows_the_files_not_the_place(saved, tmp_path):
    folder = copy_of(saved("dinov3").folder, tmp_path)
    (folder / "README.md").write_text("not read")
    first = identity(folder, teacher_files(str(folder)))
    assert re.fullmatch("sha256:[0-9a-f]{64}", first)
    moved = copy_of(folder, tmp_path / "elsewhere")
    (moved / "README.md").write_text("another")
    assert identity(moved, teacher_files(str(moved))) == first
    weights = load_file(moved / "model.safetensors")
    weights["norm.weight"] += 1  # same header, same size
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert identity(moved, teacher_files(str(moved))) != first
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    assert identity(folder, teacher_files(str(folder))) != first


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_an_unknown_model_type_names_the_known(saved, tmp_path):
    folder = copy_of(saved("dinov3").folder, tmp_path)
    edit_config(folder, model_type="dinov3_convnext")
    with pytest.raises(ValueError, match=r"'dinov3_convnext', which is not a teacher's.*dinov3_vit, .*qwen2_5_vl"):
        load_teacher(folder)


def test_weights_that_are_not_finite_are_refused(saved, tmp_path):
    folder = copy_of(saved("dinov3").folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not finite \(NaN or infinite\), first in norm.weight"):
        load_teacher(folder)


def test_incomplete_or_unsafe_folders_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match="no revision 'main'"):
        load_teacher(tmp_path, revision="main")
    folder = copy_of(saved("dinov3").folder, tmp_path)
    weights = load_file(folder / "model.safetensors")

    del weights["norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its vision model: norm.weight"):
        load_teacher(folder)

    edit_config(folder, intermediate_size=40)
    with pytest.raises(ValueError, match=r"do not fit its config.json"):
        load_teacher(folder)

    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_teacher(folder)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"has no model.safetensors.*are refused"):
        load_teacher(folder)

    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"norm.weight": "../x.safetensors"}})
    )
    with pytest.raises(ValueError, match="outside its own folder"):
        load_teacher(folder)


NAME = "facebook/dinov3-tiny"


class GatedHub(MockHub):
    """Lists its repos, and refuses their files, as the Hub does with a gated one; `refusal` is (status, code)."""

    refusal: tuple[int, str] | None = None

    def answer(self, method: str, target: str, token: str, body: bytes) -> Answer:
        if self.refusal and "/resolve/" in target:
            return refuse(*self.refusal, f"Access to model {NAME} is restricted.")
        return super().answer(method, target, token, body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of its own for this process, with an empty cache and no token."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "repos" / NAME).mkdir(parents=True)
    with GatedHub(tmp_path / "repos") as running:
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        huggingface_hub.close_session()  # it keeps the environment's proxies
        yield running
    huggingface_hub.close_session()


def test_a_teacher_comes_from_the_hub_and_then_from_its_cache(hub, saved, monkeypatch):
    shutil.copytree(saved("dinov3").folder, hub.root / NAME, dirs_exist_ok=True)
    (hub.root / NAME / "pytorch_model.bin").write_bytes(b"a pickle")
    files = teacher_files(NAME)
    teacher = load_teacher(files[0].parent)
    here = saved("dinov3").folder
    assert identity(files[0].parent, files) == identity(here, teacher_files(str(here)))
    paths = [path for _, path in hub.requests]
    assert not any(path.endswith(".bin") for path in paths)
    assert len([path for path in paths if path.endswith("/revision/main")]) == 1  # then it is the commit it was
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again = load_teacher(NAME)
    images = pictures(32, 48)
    assert torch.equal(again(images), teacher(images))
    with pytest.raises(ValueError, match=f"{NAME}2 is not a file or folder here, and the Hub does not give it"):
        load_teacher(f"{NAME}2")


def test_shards_of_the_language_model_are_not_downloaded(hub, saved):
    saved("qwen").model.save_pretrained(hub.root / NAME, max_shard_size="8KB")
    weight_map = json.loads((hub.root / NAME / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {shard for key, shard in weight_map.items() if key.startswith("visual.")}
    assert wanted < set(weight_map.values())
    features = load_teacher(NAME)(pictures(48, 80))
    downloaded = {Path(path).name for _, path in hub.requests if path.endswith(".safetensors")}
    assert downloaded == wanted
    torch.testing.assert_close(features, load_teacher(saved("qwen").folder)(pictures(48, 80)))


@pytest.mark.parametrize("refusal", [(401, "GatedRepo"), (403, "GatedRepo"), (403, ""), (401, "")])
def test_a_gated_teacher_says_how_to_get_access(hub, saved, refusal):
    shutil.copytree(saved("dinov3").folder, hub.root / NAME, dirs_exist_ok=True)
    hub.refusal = refusal
    with pytest.raises(ValueError, match=f"https://huggingface.co/{NAME}, accept its licence.*hf auth login.*folder"):
        load_teacher(NAME)


def test_an_absent_repo_or_revision_is_named(hub, saved):
    with pytest.raises(
        ValueError, match="facebook/nothing is not a file or folder here, and the Hub does not give it"
    ):
        load_teacher("facebook/nothing")
    with pytest.raises(ValueError, match=r"\./nothing/at/all is neither a file or folder here nor a Hub id"):
        load_teacher("./nothing/at/all")
    shutil.copytree(saved("dinov3").folder, hub.root / NAME, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=f"{NAME} is not a file or folder here.*Check the name and revision"):
        load_teacher(NAME, revision="v9")
    hub.private[NAME] = True  # what the Hub says of an absent repo too, to those who are not logged in
    with pytest.raises(ValueError, match=r"hf auth login.*If there is no such page, check the name"):
        load_teacher(NAME)
