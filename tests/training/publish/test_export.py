"""What a run's checkpoint becomes for others: weights that load and do what was trained, and a card that is true."""

import ast
import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel, hub, write_video
from refalign.generate import Generate
from refalign_training.method.alignment import ReferenceAlignment
from refalign_training.publish import export
from refalign_training.publish.export import ExportCommand
from refalign_training.run.checkpoint import save_checkpoint
from refalign_training.run.config import LoraOptions, ModelOptions, OptimizerOptions, RunCommand, flatten
from refalign_training.run.parallel import Parallel
from tests.mock_hub import MockHub
from tests.programs import WITHOUT_PACKAGE, call_script
from tests.tiny_models import TARGETS
from tests.tiny_pipeline import tiny_transformer


RANK, ALPHA = 2, 6.0
STEP = 500
NUMBERS = {"height": 32, "width": 48, "num_frames": 5}
METRICS = [
    {"step": 100, "loss": 1.5, "loss/diffusion": 1.25, "lr": 5e-5},
    {"step": 500, "loss": 0.7512, "loss/diffusion": None, "validation/mse": 0.3125, "lr": 5e-5},
    {"step": 600, "loss": 0.1234},
]


def noisy(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with random values added to what is trained of it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def lora_transformer(wan_folder: Path, seed: int) -> RefAlignWanTransformer3DModel:
    """The base with a random adapter of alpha / rank = 3."""
    model = RefAlignWanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    model.requires_grad_(False)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False))
    return model


def trained(model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {f"{prefix}.transformer.{name}": p.detach() for name, p in named if p.requires_grad}


def write_run(folder: Path, tensors: dict, options: RunCommand, **changes) -> Path:
    """A run's folder as the trainer leaves it; `dataset.NAME` and others change the state."""
    options = dataclasses.replace(options, objective=options.objective.filled())
    state = {
        "step": STEP,
        "samples": 4000,
        "options": flatten(options),
        "versions": {"refalign": "0.1", "torch": "2.13.0"},
        "dataset": {"name": "opens2v", "samples": 1234, "fingerprint": "sha256:0", "sizes": [[5, 32, 48]]},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (state[section] if section else state)[key] = value
    save_checkpoint(folder / "checkpoints", tensors, state, Parallel("ddp", "cpu"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS), "utf-8")
    for step in (400, 600):
        sample = folder / f"samples/step-{step:08d}/clip.mp4"
        sample.parent.mkdir(parents=True)
        write_video(np.full((5, 16, 16, 3), step % 256, np.uint8), sample)
        Image.new("RGB", (8, 8)).save(sample.with_suffix(".png"))
        half = sample.with_name(".clip.mp4.x1") / "clip.mp4"  # as a killed validation leaves it
        half.parent.mkdir()
        half.write_bytes(sample.read_bytes()[:100])
    return folder


def run_options(wan_folder: Path, training: str, **changes) -> RunCommand:
    return RunCommand(
        output=Path("/home/me/runs/7"),
        training=training,
        model=ModelOptions(base=str(wan_folder)),
        lora=LoraOptions(rank=RANK, alpha=ALPHA),
        **changes,
    )


@pytest.fixture(scope="session")
def projectors() -> ReferenceAlignment:
    torch.manual_seed(3)
    return ReferenceAlignment(24, 16, layers=(0, 1))


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, wan_folder, projectors) -> Path:
    """Last weights of seed 1, their average of seed 2."""
    last, average = (trained(lora_transformer(wan_folder, seed), "weights") for seed in (1, 2))
    average = {name.replace("weights.", "average.", 1): tensor for name, tensor in average.items()}
    of_projectors = {f"weights.alignment.{name}": p.detach() for name, p in projectors.named_parameters()}
    options = run_options(wan_folder, "lora", optimizer=OptimizerOptions(ema_decay=0.999))
    return write_run(tmp_path_factory.mktemp("runs") / "lora", {**last, **average, **of_projectors}, options)


@pytest.fixture(scope="session")
def full_model() -> RefAlignWanTransformer3DModel:
    return noisy(tiny_transformer(RefAlignWanTransformer3DModel), seed=4)


@pytest.fixture(scope="session")
def full_run(tmp_path_factory, wan_folder, full_model) -> Path:
    options = run_options(wan_folder, "full")
    return write_run(tmp_path_factory.mktemp("runs") / "full", trained(full_model, "weights"), options)


@pytest.fixture(scope="session")
def lora_export(tmp_path_factory, lora_run) -> Path:
    output = tmp_path_factory.mktemp("exports") / "lora"
    assert export.run(ExportCommand(lora_run, output, sample=True)) == 0
    return output


@pytest.fixture(scope="session")
def full_export(tmp_path_factory, full_run) -> Path:
    output = tmp_path_factory.mktemp("exports") / "full"
    assert export.run(ExportCommand(full_run, output, dtype="float32", sample=True)) == 0
    return output


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def velocity(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample


def read_card(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text("utf-8"), ignore_metadata_errors=False)


# -- LoRA -------------------------------------------------------------------------------------------------------------

ASSETS = {"assets/loss.png", "assets/sample.mp4", "assets/sample.png"}
LORA_FILES = {"README.md", "pipeline.py", "projectors.safetensors", "pytorch_lora_weights.safetensors", *ASSETS}
PUSHED_FILES = LORA_FILES - {"assets/sample.mp4", "assets/sample.png"}


def test_a_lora_folder_holds_exactly_this(lora_export):
    assert names(lora_export) == LORA_FILES


@pytest.mark.parametrize(("weights", "seed"), [("auto", 2), ("average", 2), ("last", 1)])
def test_a_lora_loads_as_what_was_trained(weights, seed, lora_run, wan_folder, inputs, tmp_path):
    export.run(ExportCommand(lora_run, tmp_path / "out", weights=weights))
    pipeline = RefAlignWanPipeline.from_pretrained(wan_folder)
    pipeline.load_lora_weights(tmp_path / "out")
    expected = velocity(lora_transformer(wan_folder, seed), inputs)
    torch.testing.assert_close(velocity(pipeline.transformer, inputs), expected, rtol=0, atol=1e-5)


def test_the_adapters_of_the_tests_change_what_comes_out(wan_folder, inputs):
    base = RefAlignWanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    first, second = (velocity(lora_transformer(wan_folder, seed), inputs) for seed in (1, 2))
    assert min((first - second).abs().max(), (first - velocity(base, inputs)).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_a_loras_dtype(dtype, lora_run, tmp_path):
    export.run(ExportCommand(lora_run, tmp_path / "out", dtype=dtype))
    tensors = load_file(tmp_path / "out/pytorch_lora_weights.safetensors").values()
    assert {str(tensor.dtype) for tensor in tensors} == {f"torch.{dtype}".replace("auto", "float32")}


def test_projectors_have_a_file_of_their_own(lora_export, projectors):
    expected = projectors.native_state_dict()
    actual = load_file(lora_export / "projectors.safetensors")
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_projectors_are_not_among_the_weights(lora_export):
    keys = load_file(lora_export / "pytorch_lora_weights.safetensors")
    assert [key for key in keys if "input_mlp" in key] == [] != list(keys)


# -- All weights ------------------------------------------------------------------------------------------------------


def test_a_full_folder_is_a_hub_repo_with_a_native_file(full_export, repo_folder):
    assert names(full_export) == names(repo_folder) | ASSETS | {"refalign-native.safetensors"}


def test_a_full_folder_loads_as_what_was_trained(full_export, full_model):
    actual = RefAlignWanPipeline.from_pretrained(full_export).transformer.state_dict()
    expected = full_model.state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_native_file_holds_the_same_weights(full_export, full_model):
    model = RefAlignWanTransformer3DModel.from_single_file(
        str(full_export / "refalign-native.safetensors"), config=str(full_export), subfolder="transformer"
    )
    actual, expected = model.state_dict(), full_model.state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_rest_is_the_bases_but_the_scheduler_the_papers(full_export, wan_folder):
    name = "vae/diffusion_pytorch_model.safetensors"
    scheduler = RefAlignWanPipeline.from_pretrained(full_export).scheduler
    assert (full_export / name).read_bytes() == (wan_folder / name).read_bytes()
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.config.shift == 5.0


@pytest.fixture(scope="session")
def half_export(tmp_path_factory, full_run) -> Path:
    output = tmp_path_factory.mktemp("exports") / "half"
    export.run(ExportCommand(full_run / f"checkpoints/step-{STEP:08d}", output, native=False))
    return output


def test_full_weights_are_bfloat16_but_where_the_model_computes_in_float32(half_export):
    tensors = load_file(half_export / "transformer/diffusion_pytorch_model.safetensors")
    kept = {re.sub(r"blocks\.\d+", "blocks.N", name) for name, t in tensors.items() if t.dtype == torch.float32}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32}
    assert {name for name in kept if not re.search("norm2|scale_shift_table|time_embedder", name)} == set() != kept


def test_mixed_weights_load_in_bfloat16_as_they_are(half_export, full_model):
    model = RefAlignWanTransformer3DModel.from_pretrained(half_export, subfolder="transformer", dtype=torch.bfloat16)
    stored, expected = model.state_dict(), full_model.state_dict()
    assert [name for name, t in stored.items() if not torch.equal(t, expected[name].to(t.dtype))] == []
    assert stored["scale_shift_table"].dtype == torch.float32 and stored["proj_out.weight"].dtype == torch.bfloat16


def test_without_native_there_is_none(half_export, full_export):
    assert names(full_export) - names(half_export) - ASSETS == {"refalign-native.safetensors"}
    assert "ComfyUI" in read_card(full_export).text and "ComfyUI" not in read_card(half_export).text


def test_weights_too_large_for_a_dtype_are_told_and_nothing_is_left(full_model, wan_folder, tmp_path):
    tensors = trained(full_model, "weights")
    tensors["weights.transformer.proj_out.weight"] = torch.full_like(full_model.proj_out.weight, 1e5)
    write_run(tmp_path / "run", tensors, run_options(wan_folder, "full"))
    with pytest.raises(ValueError, match=r"proj_out\.weight has values that are not finite in float16"):
        export.run(ExportCommand(tmp_path / "run", tmp_path / "out", dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_base_that_is_gone_is_told_and_nothing_is_left(full_model, tmp_path):
    write_run(tmp_path / "run", trained(full_model, "weights"), run_options(tmp_path / "gone", "full"))
    with pytest.raises(ValueError, match="gone is neither a file or folder here nor a Hub id"):
        export.run(ExportCommand(tmp_path / "run", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_base_that_has_moved_can_be_named(full_model, wan_folder, tmp_path):
    write_run(tmp_path / "run", trained(full_model, "weights"), run_options(tmp_path / "gone", "full"))
    assert export.run(ExportCommand(tmp_path / "run", tmp_path / "out", base=str(wan_folder))) == 0


# -- What is refused --------------------------------------------------------------------------------------------------


def test_a_folder_that_exists_is_left_as_it_is(lora_run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export.run(ExportCommand(lora_run, tmp_path))
    assert names(tmp_path) == {"mine.txt"}


def test_an_average_that_the_run_did_not_keep_is_told(full_run, tmp_path):
    with pytest.raises(ValueError, match="no average"):
        export.run(ExportCommand(full_run, tmp_path / "out", weights="average"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(ValueError, match="neither a checkpoint nor a run's folder"):
        export.run(ExportCommand(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize("option", ["private", "dry_run"])
def test_options_of_a_push_want_one(option, lora_run, tmp_path):
    with pytest.raises(ValueError, match="--push"):
        export.run(ExportCommand(lora_run, tmp_path / "out", **{option: True}))


def test_a_bad_repo_name_is_told_before_anything_is_written(lora_run, tmp_path):
    with pytest.raises(ValueError, match="ORG/NAME"):
        export.run(ExportCommand(lora_run, tmp_path / "out", push="mine"))
    assert list(tmp_path.iterdir()) == []


# -- The card ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_copy(lora_run, tmp_path) -> Path:
    """A LoRA run whose state can be changed."""
    return shutil.copytree(lora_run, tmp_path / "run")


def change_state(run: Path, **changes) -> None:
    """`options__NAME` is the option NAME, with `.` for `__`."""
    file = run / f"checkpoints/step-{STEP:08d}/state.json"
    state = json.loads(file.read_text("utf-8"))
    del state["sha256"]  # as an earlier version wrote it
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            state[section][key.replace("__", ".")] = value
        else:
            state[section] = value
    file.write_text(json.dumps(state), "utf-8")


def exported_card(run: Path, **options) -> ModelCard:
    output = run.parent / f"out{len(list(run.parent.iterdir()))}"
    export.run(ExportCommand(run, output, **options))
    return read_card(output)


def row(card: ModelCard, name: str) -> str | None:
    found = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card.text, re.MULTILINE)
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize(
    ("name", "change", "before", "after"),
    [
        ("Steps", {"samples": 4321}, "4,000 samples seen", "4,321 samples seen"),
        ("Steps", {"step": 499}, "500 of 10,000", "499 of 10,000"),
        ("Steps", {"options__batch__size": 16}, "global batch 8", "global batch 16"),
        ("Dataset", {"dataset__samples": 5_000_000}, "1,234 samples", "5,000,000 samples"),
        ("Dataset", {"dataset__name": "my-cache"}, "OpenS2V-5M", "`my-cache`"),
        ("Optimiser", {"options__optimizer__lr": 1e-5}, "learning rate 5e-05", "learning rate 1e-05"),
        ("Trained", {"options__lora__dropout": 0.1}, "dropout 0,", "dropout 0.1,"),
        ("Videos", {"dataset__sizes": [[81, 480, 832]]}, "48x32, 5 frames", "832x480, 81 frames"),
        ("Precision", {"options__model__precision": "float32"}, "bfloat16", "float32;"),
        ("Reference alignment", {"options__alignment__weight": 0.5}, "weight 1;", "weight 0.5;"),
        ("Reference alignment", {"options__alignment__weight": 0}, "weight 1;", "none"),
        ("Reference alignment", {"options__alignment__layers": [0, 1, 5]}, "blocks 0 to 8", "blocks 0 to 1, 5"),
        ("Reference alignment", {"options__alignment__stop_step": 300}, "t / 1000", "none from step 300 on"),
        ("Reference alignment", {"dataset__teacher": "/models/dinov3"}, "t / 1000", "teacher `dinov3`"),
        ("Weights", {"options__optimizer__ema_decay": 0.5}, "decay 0.999", "decay 0.5"),
    ],
)
def test_the_cards_facts_are_the_runs(name, change, before, after, lora_export, run_copy):
    change_state(run_copy, **change)
    assert before in row(read_card(lora_export), name) and after in row(exported_card(run_copy), name)


def test_the_size_of_an_online_run_is_its_recipes(run_copy):
    state = json.loads((run_copy / f"checkpoints/step-{STEP:08d}/state.json").read_text("utf-8"))
    del state["dataset"]["sizes"]
    change_state(run_copy, dataset=state["dataset"], options__data__recipe__height=240)
    assert row(exported_card(run_copy), "Videos") == "832x240, 81 frames"


def test_the_last_losses_up_to_the_checkpoint_are_shown(lora_export):
    rows = re.findall(r"^\| `(.+)` \| (.+) \| (\d+) \|$", read_card(lora_export).text, re.MULTILINE)
    assert rows == [
        ("loss", "0.7512", "500"),
        ("loss/diffusion", "not finite", "500"),
        ("validation/mse", "0.3125", "500"),
    ]


def test_losses_that_are_not_finite_are_told_and_not_drawn(run_copy):
    (run_copy / "metrics.jsonl").write_text('{"step": 10, "loss": null}\n', "utf-8")
    text = exported_card(run_copy).text
    assert "| `loss` | not finite | 10 |" in text and "loss.png" not in text


def test_a_run_without_alignment_says_nothing_of_projectors(run_copy, full_export):
    change_state(run_copy, options__alignment__weight=0)
    assert (
        "The alignment is used" in read_card(full_export).text and "The alignment" not in exported_card(run_copy).text
    )


def test_a_card_that_a_run_fills_is_none_to_choose():
    with pytest.raises(ValueError, match="There is no model card 'trained'"):
        hub.model_card({"num_layers": 30}, "trained")


def test_the_sample_is_the_last_whole_one_up_to_the_checkpoint(lora_export, lora_run):
    sample = (lora_run / "samples/step-00000400/clip.mp4").read_bytes()
    assert (lora_export / "assets/sample.mp4").read_bytes() == sample


def test_a_sample_is_published_only_if_it_is_asked_for(run_copy):
    card = exported_card(run_copy)
    assert "assets/loss.png" in card.text and "assets/sample" not in card.text


def test_a_damaged_sample_is_not_published(run_copy):
    sample = run_copy / "samples/step-00000400/clip.mp4"
    sample.write_bytes(sample.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"^assets/sample\.mp4 cannot be read"):
        exported_card(run_copy, sample=True)


@pytest.mark.parametrize("export_folder", ["lora_export", "full_export"])
def test_every_picture_and_video_that_a_card_shows_is_there(export_folder, request):
    folder = request.getfixturevalue(export_folder)
    shown = set(re.findall(r"\]\((assets/[^)]+)\)", read_card(folder).text))
    assert shown == ASSETS and shown <= names(folder)


def test_a_checkpoint_without_its_run_is_exported_without_pictures(lora_run, tmp_path):
    checkpoint = shutil.copytree(lora_run / f"checkpoints/step-{STEP:08d}", tmp_path / "a/b/moved")
    export.run(ExportCommand(checkpoint, tmp_path / "out"))
    assert names(tmp_path / "out") == LORA_FILES - ASSETS and "assets/" not in read_card(tmp_path / "out").text


@pytest.mark.parametrize(("export_folder", "relation"), [("lora_export", "adapter"), ("full_export", "finetune")])
def test_the_front_matter_of_a_local_base(export_folder, relation, request):
    tags = ["refalign", "reference-to-video", "subject-to-video", "wan", *(["lora"] if relation == "adapter" else [])]
    assert read_card(request.getfixturevalue(export_folder)).data.to_dict() == {
        "license": hub.UNKNOWN,
        "library_name": "diffusers",
        "pipeline_tag": "image-text-to-video",
        "datasets": ["BestWishYsh/OpenS2V-5M"],
        "tags": tags,
    }


def test_the_front_matter_names_a_base_of_the_hub(run_copy):
    card = exported_card(run_copy, base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert card.data.base_model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.license == "apache-2.0"


def test_the_front_matter_names_only_datasets_of_the_hub(run_copy):
    change_state(run_copy, dataset__name="my-cache")
    assert "datasets" not in exported_card(run_copy).data.to_dict()
    assert exported_card(run_copy, datasets=("me/clips",)).data.datasets == ["me/clips"]


def test_the_licence_can_be_told(run_copy):
    assert exported_card(run_copy, licence="cc-by-nc-4.0").data.license == "cc-by-nc-4.0"


def test_a_card_without_a_licence_is_not_pushed(run_copy, tmp_path):
    export.run(ExportCommand(run_copy, tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"README\.md says {hub.UNKNOWN} in the lines"):
        hub.push(tmp_path / "out", "tester/lora", dry_run=True)


NASTY = 'my `<img src=x>` | "$(touch x)"'


@pytest.mark.parametrize("option", ["model.start", "model.revision", "data.teacher", "dataset.name", "model.base"])
def test_names_of_a_run_cannot_write_into_its_card(option, run_copy):
    changes = {"dataset__name": NASTY} if option == "dataset.name" else {f"options__{option}": NASTY}
    change_state(run_copy, **changes)
    text = exported_card(run_copy).text
    words = re.sub(r"```.+?```|`[^`\n]*`", "", text, flags=re.DOTALL)  # code says nothing to Markdown
    assert "`my '<img src=x>' " in text and "<img" not in words


def test_versions_of_a_run_cannot_write_into_its_card(run_copy):
    change_state(run_copy, versions__torch="1.0 <script>[x](http://example.com)`")
    assert row(exported_card(run_copy), "Made with").endswith(r"torch 1.0 \<script\>\[x\](http://example.com)\`")


@pytest.mark.parametrize("name", ['it"s', "a$(touch x)b", "a\nb"])
def test_code_in_a_card_names_a_base_of_any_name_and_does_nothing_else(name, run_copy, wan_folder, tmp_path):
    base = shutil.copytree(wan_folder, tmp_path / name)
    card = exported_card(run_copy, base=str(base))
    assert f"from_pretrained({name!r}, " in " ".join(map(ast.unparse, calls(card)))
    (command,) = re.findall(r"```bash\n(.+?)```", card.text, re.DOTALL)
    assert shlex.split(command.replace("\\\n", ""))[3] == name.replace("\n", r"\n")


def test_the_licence_is_the_bases(run_copy, wan_folder, tmp_path):
    base = shutil.copytree(wan_folder, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n\n# A base\n", "utf-8")
    assert exported_card(run_copy, base=str(base)).data.license == "mit"


def calls(card: ModelCard) -> list[ast.Call]:
    blocks = re.findall(r"```python\n(.+?)```", card.text, re.DOTALL)
    return [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]


def test_a_full_card_shows_how_to_load_with_and_without_the_package(full_export):
    loads = [
        ast.unparse(call) for call in calls(read_card(full_export)) if "from_pretrained" in ast.unparse(call.func)
    ]
    assert loads == [
        "DiffusionPipeline.from_pretrained('ORG/NAME', dtype=torch.bfloat16, trust_remote_code=True)",
        "RefAlignWanPipeline.from_pretrained('ORG/NAME', dtype=torch.bfloat16)",
    ]


def test_a_lora_card_shows_how_to_load_with_and_without_the_package(lora_export, wan_folder):
    shown = [ast.unparse(call) for call in calls(read_card(lora_export))]
    base = wan_folder.name
    assert [call for call in shown if "from_pretrained" in call or "load_lora" in call] == [
        f"DiffusionPipeline.from_pretrained('{base}', custom_pipeline='ORG/NAME', dtype=torch.bfloat16, "
        "trust_remote_code=True)",
        "pipe.load_lora_weights('ORG/NAME')",
        f"RefAlignWanPipeline.from_pretrained('{base}', dtype=torch.bfloat16)",
        "pipe.load_lora_weights('ORG/NAME')",
    ]


@pytest.mark.parametrize("export_folder", ["lora_export", "full_export"])
def test_a_card_begins_with_a_whole_snippet_that_needs_nothing_of_ours(export_folder, request):
    before, _, after = read_card(request.getfixturevalue(export_folder)).text.partition("```")
    assert after.startswith("python\n") and re.findall("^## .*", before, re.MULTILINE) == ["## Use"]
    assert "trust_remote_code=True" in after and "reference_images=" in after.partition("```")[0]


@pytest.mark.parametrize("export_folder", ["lora_export", "full_export"])
def test_a_cards_command_is_one_of_the_command_line_in_the_runs_size(export_folder, request):
    (block,) = re.findall(r"```bash\n(.+?)```", read_card(request.getfixturevalue(export_folder)).text, re.DOTALL)
    program, name, *arguments = shlex.split(block.replace("\\\n", " "))
    command = tyro.cli(Generate, args=arguments)
    assert (program, name) == ("refalign", "generate")
    assert {key: getattr(command, key) for key in NUMBERS} == NUMBERS


@pytest.mark.parametrize("export_folder", ["lora_export", "full_export"])
def test_a_cards_call_fits_the_pipeline_in_the_runs_size(export_folder, request):
    (call,) = [c for c in calls(read_card(request.getfixturevalue(export_folder))) if ast.unparse(c.func) == "pipe"]
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert {name: arguments[name] for name in NUMBERS} == NUMBERS


# -- Nothing private --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export_folder", ["lora_export", "full_export"])
def test_nothing_names_a_path_of_this_machine(export_folder, request, wan_folder, lora_run):
    folder = request.getfixturevalue(export_folder)
    private = [str(path).encode() for path in (wan_folder.parent, lora_run.parent, Path("/home/me"))]
    assert [name for name in names(folder) for path in private if path in (folder / name).read_bytes()] == []


@pytest.mark.parametrize("name", ["dataset__name", "options__model__start", "dataset__teacher"])
def test_of_a_path_only_the_last_part_is_shown(name, run_copy):
    change_state(run_copy, **{name: "/home/me/secret/last-part"})
    text = exported_card(run_copy).text
    assert "last-part" in text and "secret" not in text


def test_a_token_is_refused_and_nothing_is_left(run_copy):
    change_state(run_copy, dataset__name="hf_" + "aBcDeFgHiJ" * 4)
    with pytest.raises(ValueError, match=r"README\.md holds what looks like a token"):
        export.run(ExportCommand(run_copy, run_copy.parent / "out"))
    assert [path.name for path in run_copy.parent.iterdir()] == ["run"]


# -- Push -------------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "tokenOfTheMockHub" * 2
CHILD = """
import json, sys
from pathlib import Path

from refalign_training.publish import export

for arguments in json.loads(sys.argv[1]):
    paths = {name: Path(arguments.pop(name)) for name in ("checkpoint", "output")}
    export.run(export.ExportCommand(**paths, **arguments))
"""
BY_DIFFUSERS = """
import sys

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

base, repo, inputs, output = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=repo, trust_remote_code=True)
pipe.load_lora_weights(repo)
with torch.no_grad():
    save_file({"velocity": pipe.transformer(**load_file(inputs)).sample.contiguous()}, output)
"""


@pytest.fixture(scope="module")
def mock_hub(tmp_path_factory):
    with MockHub(tmp_path_factory.mktemp("hub")) as mock_hub:
        yield mock_hub


@pytest.fixture(scope="module")
def pushed(mock_hub, lora_run, full_run, wan_folder, tmp_path_factory) -> Path:
    """What the exports of three pushes left; each told its files. The base of the last one is on the Hub."""
    folder = tmp_path_factory.mktemp("pushed")
    shutil.copytree(wan_folder, mock_hub.root / "org/wan")
    commands = [
        ExportCommand(lora_run, folder / "dry", push="tester/dry", dry_run=True, licence="mit"),
        ExportCommand(lora_run, folder / "lora", push="tester/lora", private=True, licence="mit"),
        ExportCommand(full_run, folder / "full", push="tester/full", base="org/wan", licence="mit"),
    ]
    commands = [{k: str(v) if isinstance(v, Path) else v for k, v in vars(command).items()} for command in commands]
    child = call_script(CHILD, json.dumps(commands), environment=mock_hub.environment(folder / "home", TOKEN))
    assert child.returncode == 0, child.stderr[-4000:]
    (folder / "told.txt").write_text(child.stdout, "utf-8")
    return folder


def test_a_lora_is_pushed_with_exactly_its_files(pushed, mock_hub):
    assert mock_hub.uploads["tester/lora"].keys() == PUSHED_FILES


def test_a_pipeline_is_pushed_with_its_native_file(pushed, mock_hub):
    assert mock_hub.uploads["tester/full"].keys() == names(pushed / "full") >= {"refalign-native.safetensors"}


def test_a_push_is_private_if_wanted(pushed, mock_hub):
    assert mock_hub.private == {"tester/lora": True, "tester/full": False}


def test_a_base_on_the_hub_is_named_and_its_transformer_not_downloaded(pushed, mock_hub):
    fetched = [path for _, path in mock_hub.requests if path.startswith("/org/wan/resolve/")]
    assert [path for path in fetched if "transformer" in path and path.endswith(".safetensors")] == [] != fetched
    assert read_card(pushed / "full").data.base_model == "org/wan"


@pytest.mark.parametrize("repo", ["tester/lora", "tester/full"])
def test_a_pushed_card_names_its_repo(repo, pushed, mock_hub):
    card = mock_hub.uploads[repo]["README.md"].decode()
    assert f'"{repo}"' in card and "ORG/NAME" not in card


def test_a_dry_run_tells_the_files_and_pushes_nothing(pushed, mock_hub):
    told = (pushed / "told.txt").read_text("utf-8").splitlines()
    (end,) = [number for number, line in enumerate(told) if line.startswith("Would push ") and "tester/dry" in line]
    assert {line.split("  ")[-1] for line in told[1:end]} == PUSHED_FILES and not (
        mock_hub.root / "tester/dry"
    ).exists()


def test_a_pushed_lora_works_without_the_package(pushed, mock_hub, wan_folder, inputs, tmp_path):
    save_file(inputs, tmp_path / "inputs.safetensors")
    words = [str(wan_folder), "tester/lora", str(tmp_path / "inputs.safetensors"), str(tmp_path / "out.safetensors")]
    environment = mock_hub.environment(tmp_path / "home", TOKEN)
    child = call_script(WITHOUT_PACKAGE + BY_DIFFUSERS, *words, environment=environment)
    assert child.returncode == 0, child.stderr[-4000:]
    expected = velocity(lora_transformer(wan_folder, 2), inputs)
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["velocity"], expected, rtol=0, atol=1e-5)


def test_only_what_belongs_to_a_lora_is_pushed(lora_export, tmp_path):
    folder = shutil.copytree(lora_export, tmp_path / "lora")
    for name in ("optimizer.safetensors", "notes.txt", "run.py", ".env", "adapter_model.bin"):
        (folder / name).write_text("mine", "utf-8")
    card = folder / "README.md"
    card.write_text(card.read_text("utf-8").replace(hub.UNKNOWN, "mit"), "utf-8")
    assert hub.push(folder, "tester/lora", dry_run=True).sizes.keys() == LORA_FILES


def test_a_lora_without_a_card_is_not_pushed(lora_export, tmp_path):
    folder = shutil.copytree(lora_export, tmp_path / "lora")
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"no README\.md"):
        hub.push(folder, "tester/lora", dry_run=True)
