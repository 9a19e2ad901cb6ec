"""A pipeline as a Hub repo: every door gives what the package gives, from a folder and from a Hub; and what is pushed.

The doors are opened in child processes, each once for all its tests: one in which `import refalign` fails, and one in
which it does not. Both are forks, but for slow tests.
"""

import ast
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel, cli, hub
from refalign.convert import export_native
from tests.mock_hub import MockHub
from tests.programs import FORGET, call_script
from tests.tiny_pipeline import tiny_transformer, tiny_wan_pipeline


TOKEN = "hf_" + "pushingTokenOfTheMockHub" + "0123456789"
SECRET = "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"
EMBEDS = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
IMAGES = {**EMBEDS, "prompt": "A dog.", "negative_prompt": "rain", "max_sequence_length": 16, "output_type": "np"}

CHILD = """
import contextlib, io, json, sys
from pathlib import Path
folder, images, embeds_call, images_call = json.loads(sys.argv[1])
folder = Path(folder)
results, notes = {}, {}
"""
CALLS = """
import torch
from safetensors.torch import load_file, save_file
tensors = load_file(folder / "inputs.safetensors")
latents = {"latents": tensors["latents"]}

def from_embeds(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**tensors, **embeds_call).frames

def from_images(pipeline):
    return torch.from_numpy(pipeline(**latents, reference_images=images, **images_call).frames)

def velocity(model):
    with torch.no_grad():
        return model(
            hidden_states=tensors["latents"],
            timestep=torch.tensor([500]),
            encoder_hidden_states=tensors["prompt_embeds"],
            reference_hidden_states=tensors["reference_latents"],
        )[0]
"""
WITHOUT_PACKAGE = (
    FORGET
    + CHILD
    + """
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "refalign":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    import refalign
except ImportError as error:
    notes["import refalign"] = str(error)
"""
    + CALLS
    + """
from diffusers import AutoModel, DiffusionPipeline

try:
    DiffusionPipeline.from_pretrained(folder / "repo")
except ValueError as error:
    notes["without trust_remote_code"] = str(error)

trusted = {"trust_remote_code": True}
community = {**trusted, "custom_pipeline": str(folder / "community.py")}
local = DiffusionPipeline.from_pretrained(folder / "repo", **trusted)
results["door 1, folder"] = from_embeds(local)
results["door 1, folder, images"] = from_images(local)
results["door 1, Hub"] = from_embeds(DiffusionPipeline.from_pretrained("org/refalign", **trusted))
results["door 1, pushed"] = from_embeds(DiffusionPipeline.from_pretrained("tester/model", **trusted))
results["door 1, pushed plain Wan"] = from_embeds(DiffusionPipeline.from_pretrained("tester/wan", **trusted))
results["door 1, exported object"] = from_embeds(DiffusionPipeline.from_pretrained(folder / "object", **trusted))
for name, repo in (("folder", f"{folder}/repo"), ("Hub", "org/refalign"), ("exported object", f"{folder}/object")):
    model = AutoModel.from_pretrained(repo, subfolder="transformer", **trusted)
    results[f"door 3, {name}"] = velocity(model)
model = AutoModel.from_pretrained(f"{folder}/repo/transformer", **trusted)
results["door 3, the transformer's own folder"] = velocity(model)
wan = DiffusionPipeline.from_pretrained(str(folder / "wan"), **community)
for door, pipeline in (("door 1", local), ("door 5", wan)):
    saved, end = folder / f"saved by {door}", " plain Wan folder" * (door == "door 5")
    pipeline.save_pretrained(saved)
    results[f"door 1, saved by {door}{end}"] = from_embeds(DiffusionPipeline.from_pretrained(saved, **trusted))
    AutoModel.from_pretrained(str(saved), subfolder="transformer", **trusted)
local.push_to_hub("tester/by-diffusers")
results["door 5, plain Wan folder"] = from_embeds(wan)
results["door 5, plain Wan folder, images"] = from_images(wan)
results["door 5, plain Wan on the Hub"] = from_embeds(DiffusionPipeline.from_pretrained("org/wan", **community))
results["door 5, folder"] = from_embeds(DiffusionPipeline.from_pretrained(str(folder / "repo"), **community))
results["door 5, Hub"] = from_embeds(DiffusionPipeline.from_pretrained("org/refalign", **community))
notes["modules"] = [name for name in sys.modules if name.partition(".")[0] == "refalign"]
save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / "without.safetensors")
print(json.dumps(notes))
"""
)
WITH_PACKAGE = (
    FORGET
    + CHILD
    + """
from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel
from refalign.loading import load_pipeline
"""
    + CALLS
    + """
results["door 2, Hub"] = from_embeds(RefAlignWanPipeline.from_pretrained("org/refalign"))
results["door 2, pushed"] = from_embeds(RefAlignWanPipeline.from_pretrained("tester/model"))
results["door 2, pushed by diffusers"] = from_embeds(RefAlignWanPipeline.from_pretrained("tester/by-diffusers"))
results["door 2, saved by door 1"] = from_embeds(RefAlignWanPipeline.from_pretrained(folder / "saved by door 1"))
end = "saved by door 5 plain Wan folder"
results[f"door 2, {end}"] = from_embeds(RefAlignWanPipeline.from_pretrained(folder / "saved by door 5"))
results["door 2, pushed plain Wan"] = from_embeds(RefAlignWanPipeline.from_pretrained("tester/wan"))
model = RefAlignWanTransformer3DModel.from_single_file(
    "https://huggingface.co/org/native/blob/main/native.safetensors", config="org/refalign", subfolder="transformer"
)
results["door 4, Hub"] = velocity(model)
fp16 = load_pipeline("org/fp16", base=None, loras=(), dtype="float32", device="cpu", offload="none")
results["text encoder of org/fp16"] = torch.cat([weight.flatten() for weight in fp16.text_encoder.parameters()])
save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / "with.safetensors")
notes["modules"] = [name for name in sys.modules if name.startswith("diffusers_modules.")]
print(json.dumps(notes))
"""
)
COMMANDS = (
    CHILD
    + """
from refalign import cli

for name, arguments in json.loads(sys.argv[2]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    notes[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
print(json.dumps(notes))
"""
)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


OWN_CARD = "---\nlicense: mit\n---\n\n# My own card\n"


def fill_in_card(folder: Path) -> Path:
    """Fills in what the template of a card leaves to the user."""
    card = folder / "README.md"
    card.write_text(card.read_text("utf-8").replace(hub.UNKNOWN, "mit"), "utf-8")
    return folder


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


# What the doors have to give: the package's classes around the models themselves, never saved nor loaded


def package_pipeline(**components) -> RefAlignWanPipeline:
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    wan = tiny_wan_pipeline()
    pipeline = RefAlignWanPipeline(**{name: getattr(wan, name) for name in names} | components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def converted() -> RefAlignWanPipeline:
    """What `repo_folder` holds: the weights of `native_file`, the paper's scheduler, the rest of the base."""
    transformer = tiny_transformer(RefAlignWanTransformer3DModel, seed=5)
    return package_pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0))


@pytest.fixture(scope="module")
def plain() -> RefAlignWanPipeline:
    """What `wan_folder` holds."""
    return package_pipeline()


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "latents": (1, 16, 2, 4, 4),
        "reference_latents": (1, 16, 2, 4, 4),
        "prompt_embeds": (1, 6, 32),
        "negative_prompt_embeds": (1, 4, 32),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    """A cut-out and a photograph, neither of the video's shape."""
    folder = tmp_path_factory.mktemp("images")
    cut_out = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    cut_out.paste((200, 30, 30, 255), (10, 5, 30, 15))
    cut_out.save(folder / "cut_out.png")
    Image.linear_gradient("L").resize((24, 48)).convert("RGB").save(folder / "photograph.png")
    return [str(folder / "cut_out.png"), str(folder / "photograph.png")]


def from_embeds(pipeline, tensors):
    return pipeline(**tensors, **EMBEDS).frames


def from_images(pipeline, tensors, images):
    return torch.from_numpy(pipeline(latents=tensors["latents"], reference_images=images, **IMAGES).frames)


def velocity(model, tensors):
    with torch.no_grad():
        return model(
            hidden_states=tensors["latents"],
            timestep=torch.tensor([500]),
            encoder_hidden_states=tensors["prompt_embeds"],
            reference_hidden_states=tensors["reference_latents"],
        ).sample


@pytest.fixture(scope="module")
def expected(converted, plain, tensors, images) -> dict[str, torch.Tensor]:
    """By what a door's name ends with: the first that fits."""
    return {
        "plain Wan folder, images": from_images(plain, tensors, images),
        "images": from_images(converted, tensors, images),
        "plain Wan folder": from_embeds(plain, tensors),
        "plain Wan on the Hub": from_embeds(plain, tensors),
        "pushed plain Wan": from_embeds(plain, tensors),
        "": from_embeds(converted, tensors),
        "velocity": velocity(converted.transformer, tensors),
    }


def assert_door(name, actual, expected):
    velocities = name.startswith(("door 3", "door 4"))
    key = "velocity" if velocities else next(end for end in expected if name.endswith(end))
    torch.testing.assert_close(actual, expected[key], rtol=0, atol=1e-5)


# The folders, the Hub and the children

JUNK = [
    "optimizer.pt",
    "optimizer.safetensors",
    "transformer/optimizer.safetensors",
    "transformer/diffusion_pytorch_model.bin",
    "random_states_0.pkl",
    "trainer_state.json",
    "training_args.bin",
    "events.out.tfevents.1700000000.host",
    "logs/events.out.tfevents.1700000000.host",
    "checkpoint-100/model.safetensors",
    ".env",
    ".netrc.json",
    ".cache/huggingface/token.json",
    "transformer/.settings.json",
    "vae/._diffusion_pytorch_model.safetensors",
    "run.py",
    "notes.txt",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory, repo_folder, wan_folder, converted, tensors) -> Path:
    """Every folder that the children open."""
    work = tmp_path_factory.mktemp("hub")
    save_file(tensors, work / "inputs.safetensors")
    fill_in_card(shutil.copytree(repo_folder, work / "repo"))
    shutil.copytree(wan_folder, work / "wan")
    (work / "wan/README.md").write_text(OWN_CARD, "utf-8")
    hub.export_repo(converted, work / "object")
    shutil.copytree(repo_folder, work / "hub/org/refalign")
    shutil.copytree(wan_folder, work / "hub/org/wan")
    tiny_wan_pipeline().save_pretrained(work / "hub/org/fp16", variant="fp16", max_shard_size="20KB")
    export_native(repo_folder, work / "hub/org/native/native.safetensors")

    shutil.copytree(work / "repo", work / "trained")
    for name in JUNK:
        (work / "trained" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "trained" / name).write_text(json.dumps({"secret": SECRET}), "utf-8")
    (work / "trained/assets").mkdir()
    Image.new("RGB", (8, 8)).save(work / "trained/assets/teaser.png")
    edit_json(work / "trained/text_encoder/config.json", _name_or_path="/home/me/umt5")
    edit_json(work / "trained/transformer/config.json", _name_or_path="/home/me/runs/7")
    shutil.copytree(work / "wan", work / "carded")
    shutil.copytree(repo_folder, work / "leaking")
    (work / "leaking/README.md").write_text(f"Log in with {SECRET}.\n", "utf-8")
    return work


@pytest.fixture(scope="module")
def mock_hub(work):
    with MockHub(work / "hub") as mock_hub:
        yield mock_hub


@pytest.fixture(scope="module")
def run_child(work, mock_hub, images):
    """Runs a script that prints JSON in the end, with the mock Hub for its only Hub."""

    def run(script: str, *arguments: str, is_fresh: bool = False) -> SimpleNamespace:
        words = [json.dumps([str(work), images, EMBEDS, IMAGES]), *arguments]
        environment = mock_hub.environment(work / "home", TOKEN)
        if is_fresh:
            command = [sys.executable, "-c", script, *words]
            child = subprocess.run(command, env=environment, capture_output=True, text=True)
        else:
            child = call_script(script, *words, environment=environment)
        assert child.returncode == 0, child.stderr[-4000:]
        return json.loads(child.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def pushes(work, run_child, mock_hub) -> dict[str, dict]:
    """Exit code and output of `refalign` with these arguments, in this order; and what they changed in the folder."""
    before = digests(work / "trained")
    commands = {
        "public": ["push", work / "trained", "--repo", "tester/model"],
        "private": ["push", work / "carded", "--repo", "tester/carded", "--private"],
        "plain Wan": ["push", work / "wan", "--repo", "tester/wan"],
        "private to public": ["push", work / "carded", "--repo", "tester/model", "--private"],
        "leaking": ["push", work / "leaking", "--repo", "tester/leaking"],
        "native": ["export", "--model", "org/refalign", "--output", work / "native.safetensors"],
        "repo": ["export", "--model", "org/wan", "--output", work / "exported"],
        "community": ["export", "--community", work / "community.py"],
    }
    results = run_child(COMMANDS, json.dumps({k: [str(a) for a in v] for k, v in commands.items()}))
    return {**results, "folder is unchanged": digests(work / "trained") == before}


@pytest.fixture(scope="module", params=["fork", pytest.param("fresh", marks=pytest.mark.slow)])
def without_package(request, run_child, work, pushes) -> SimpleNamespace:
    notes = run_child(WITHOUT_PACKAGE, is_fresh=request.param == "fresh")
    return SimpleNamespace(notes=notes, results=load_file(work / "without.safetensors"))


@pytest.fixture(scope="module")
def with_package(run_child, work, without_package) -> SimpleNamespace:
    """Opens what was saved and pushed without the package too."""
    notes = run_child(WITH_PACKAGE)
    return SimpleNamespace(notes=notes, results=load_file(work / "with.safetensors"))


# The doors


def test_the_doors_outputs_can_be_told_apart(expected):
    """Else the tests of the doors could not fail: references, weights and scheduler all change what comes out."""
    assert (expected[""] - expected["plain Wan folder"]).abs().max() > 1e-2
    assert (expected["images"] - expected["plain Wan folder, images"]).abs().max() > 1e-4


def test_the_outputs_depend_on_the_references(converted, tensors, expected):
    other = from_embeds(converted, {**tensors, "reference_latents": -tensors["reference_latents"]})
    assert (other - expected[""]).abs().max() > 1e-3


def test_the_package_really_is_missing(without_package):
    assert without_package.notes["import refalign"] == "No module named 'refalign'"


def test_nothing_of_the_package_was_imported(without_package):
    assert without_package.notes["modules"] == []


@pytest.mark.parametrize(
    "door",
    [
        "door 1, folder",
        "door 1, folder, images",
        "door 1, Hub",
        "door 1, pushed",
        "door 1, pushed plain Wan",
        "door 1, exported object",
        "door 1, saved by door 1",
        "door 1, saved by door 5 plain Wan folder",
        "door 3, folder",
        "door 3, Hub",
        "door 3, exported object",
        "door 3, the transformer's own folder",
        "door 5, folder",
        "door 5, Hub",
        "door 5, plain Wan folder",
        "door 5, plain Wan folder, images",
        "door 5, plain Wan on the Hub",
    ],
)
def test_a_door_without_the_package_gives_what_the_package_gives(door, without_package, expected):
    assert_door(door, without_package.results[door], expected)


@pytest.mark.parametrize("door", ["door 2, Hub", "door 2, pushed", "door 2, pushed plain Wan", "door 4, Hub"])
def test_a_door_of_the_package_on_the_hub_gives_what_the_package_gives(door, with_package, expected):
    assert_door(door, with_package.results[door], expected)


def test_a_base_on_the_hub_that_has_a_variant_alone_is_loaded_for_generate(with_package):
    expected = torch.cat([weight.flatten() for weight in tiny_wan_pipeline().text_encoder.parameters()])
    assert torch.equal(with_package.results["text encoder of org/fp16"], expected)


def test_the_packages_doors_run_no_code_of_the_repo(with_package):
    assert with_package.notes["modules"] == []


def test_without_the_package_and_without_trust_the_error_says_what_to_pass(without_package):
    assert "trust_remote_code=True" in without_package.notes["without trust_remote_code"]


@pytest.mark.parametrize("name", ["repo", "object"])
def test_door_2_from_a_folder_gives_what_the_package_gives(name, work, tensors, expected):
    pipeline = RefAlignWanPipeline.from_pretrained(work / name)
    assert_door("door 2, folder", from_embeds(pipeline, tensors), expected)


def test_door_2_from_a_folder_with_images_gives_what_the_package_gives(work, tensors, images, expected):
    pipeline = RefAlignWanPipeline.from_pretrained(work / "repo")
    assert_door("door 2, images", from_images(pipeline, tensors, images), expected)


def test_door_4_from_a_file_gives_what_the_package_gives(work, tensors, expected):
    model = RefAlignWanTransformer3DModel.from_single_file(
        str(work / "hub/org/native/native.safetensors"), config=str(work / "repo"), subfolder="transformer"
    )
    assert_door("door 4, file", velocity(model, tensors), expected)


def test_a_pipeline_loaded_from_a_repo_and_exported_again_opens(work, tmp_path, tensors, expected):
    hub.export_repo(RefAlignWanPipeline.from_pretrained(work / "repo"), tmp_path / "again")
    pipeline = RefAlignWanPipeline.from_pretrained(tmp_path / "again")
    assert_door("door 2, again", from_embeds(pipeline, tensors), expected)


# The repo folder


def test_a_repo_holds_exactly_this(repo_folder):
    folders = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    files = {
        "README.md",
        "model_index.json",
        "pipeline_refalign_wan.py",
        "reference_images.py",
        "transformer_refalign_wan.py",
    }
    assert {path.name for path in repo_folder.iterdir()} == folders | files


def test_a_repo_carries_the_packages_very_code(repo_folder):
    package = Path(hub.__file__).parent
    copies = [*repo_folder.glob("*.py"), *repo_folder.glob("transformer/*.py")]
    assert [file.name for file in copies if file.read_bytes() != (package / file.name).read_bytes()] == []


def test_completing_a_complete_repo_changes_nothing(repo_folder, tmp_path):
    folder = shutil.copytree(repo_folder, tmp_path / "repo")
    hub.complete_repo(folder)
    assert digests(folder) == digests(repo_folder)


def test_completing_keeps_a_card_of_ones_own(wan_folder, tmp_path):
    folder = shutil.copytree(wan_folder, tmp_path / "wan")
    (folder / "README.md").write_text("# Mine\n", "utf-8")
    hub.complete_repo(folder)
    assert (folder / "README.md").read_text("utf-8") == "# Mine\n"


def test_an_exported_folder_equals_the_folder(repo_folder, tmp_path):
    assert digests(hub.export_repo(repo_folder, tmp_path / "copy")) == digests(repo_folder)


def test_an_export_leaves_out_what_is_no_part_of_a_pipeline(work, tmp_path):
    hub.export_repo(work / "trained", tmp_path / "copy")
    assert digests(tmp_path / "copy").keys() == digests(work / "repo").keys() | {"assets/teaser.png"}


def test_an_export_does_not_touch_a_folder_that_exists(repo_folder, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="copy exists already"):
        hub.export_repo(repo_folder, tmp_path / "copy")
    assert digests(tmp_path / "copy").keys() == {"mine.txt"}


def test_an_export_that_fails_leaves_nothing(wan_folder, tmp_path):
    folder = shutil.copytree(wan_folder, tmp_path / "wan")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="no safetensors weights in vae/"):
        hub.export_repo(folder, tmp_path / "here/copy")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_repo_on_the_hub_is_exported_as_one_native_file(pushes, work):
    assert (work / "native.safetensors").read_bytes() == (work / "hub/org/native/native.safetensors").read_bytes()


def test_a_plain_wan_repo_on_the_hub_is_exported_as_a_repo_with_all_doors(pushes, work, tmp_path):
    assert digests(work / "exported") == digests(hub.export_repo(work / "hub/org/wan", tmp_path / "exported"))


# Push


def test_every_command_ended_as_it_should(pushes):
    ends = {name: push["code"] for name, push in pushes.items() if isinstance(push, dict)}
    assert [name for name, code in ends.items() if code != 0] == ["private to public", "leaking"]


def test_only_what_belongs_to_a_pipeline_is_pushed(pushes, mock_hub, work):
    assert mock_hub.uploads["tester/model"].keys() == digests(work / "repo").keys() | {"assets/teaser.png"}


def test_the_command_lists_what_it_pushed(pushes, mock_hub):
    *lines, summary = pushes["public"]["out"].splitlines()
    uploads = mock_hub.uploads["tester/model"]
    assert lines == [f"{len(uploads[name]) / 1e6:12,.3f} MB  {name}" for name in sorted(uploads)]
    total = sum(map(len, uploads.values())) / 1e6
    url = f"{mock_hub.url}/tester/model"
    assert summary == f"Pushed {len(lines)} files, {total:,.3f} MB, to {url} (public)."


def test_a_push_leaves_the_folder_as_it_was(pushes):
    assert pushes["folder is unchanged"]


def test_weights_are_pushed_as_they_are(pushes, mock_hub, work):
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert mock_hub.uploads["tester/model"][name] == (work / "trained" / name).read_bytes()


def test_the_pushing_token_is_used_but_never_pushed(pushes, mock_hub):
    contents = [content for files in mock_hub.uploads.values() for content in files.values()]
    assert f"Bearer {TOKEN}" in mock_hub.tokens
    assert [content for content in contents if TOKEN.encode() in content] == []


def test_the_path_a_model_was_loaded_from_is_dropped(pushes, mock_hub):
    files = mock_hub.uploads["tester/model"]
    assert [name for name, content in files.items() if b"/home/me" in content] == []


@pytest.mark.parametrize(("repo", "private"), [("tester/model", False), ("tester/carded", True)])
def test_a_repo_is_private_if_wanted(repo, private, pushes, mock_hub):
    assert mock_hub.private[repo] is private


def test_private_is_not_pushed_to_a_public_repo(pushes, mock_hub):
    assert "tester/model exists and is public" in pushes["private to public"]["err"]
    assert b"My own card" not in mock_hub.uploads["tester/model"]["README.md"]


def test_the_card_names_the_repo_it_is_pushed_to(pushes, mock_hub):
    card = mock_hub.uploads["tester/model"]["README.md"].decode()
    assert 'from_pretrained("tester/model"' in card and "ORG/NAME" not in card


def test_a_card_of_ones_own_is_pushed_as_it_is(pushes, mock_hub, work):
    assert mock_hub.uploads["tester/carded"]["README.md"] == (work / "carded/README.md").read_bytes()


def test_a_folder_with_a_token_is_told_in_a_line_and_not_pushed(pushes, mock_hub):
    assert pushes["leaking"]["err"].splitlines()[-1].startswith("refalign: README.md holds what looks like a token")
    assert "Traceback" not in pushes["leaking"]["err"] and SECRET not in str(pushes["leaking"])
    assert not (mock_hub.root / "tester/leaking").exists()


def test_a_dry_run_makes_no_request_and_says_every_file(work, capsys):
    """These tests' own process is offline: a request would raise."""
    assert cli.main(["push", str(work / "trained"), "--repo", "tester/model", "--dry-run"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == sorted([*digests(work / "repo"), "assets/teaser.png"])
    assert summary.startswith(f"Would push {len(lines)} files, ") and summary.endswith(" (public, if it is new).")


@pytest.fixture
def folder(repo_folder, tmp_path) -> Path:
    """A repo folder to put something into that must not be pushed. (A push would raise another error: no network.)"""
    return fill_in_card(shutil.copytree(repo_folder, tmp_path / "repo"))


def put_into_weights(file: Path, text: str) -> None:
    save_file(load_file(file), file, metadata={"format": "pt", "note": text})


def put_into_config(file: Path, text: str) -> None:
    edit_json(file, note={"deeper": [text]})


def put_into_text(file: Path, text: str) -> None:
    file.write_text((file.read_text("utf-8") if file.exists() else "") + f"\nSee {text} for more.\n", "utf-8")


def test_the_folder_of_the_next_tests_would_be_pushed(folder):
    put_into_config(folder / "vae/config.json", "hf_")
    put_into_text(folder / "README.md", "1/2 and/or https://example.com/home/me/data or reference_images/woman.png")
    assert "README.md" in hub.push(folder, "tester/model", dry_run=True).sizes


@pytest.mark.parametrize(
    ("put", "name"),
    [
        (put_into_text, "README.md"),
        (put_into_text, "LICENSE"),
        (put_into_text, "LICENSE.rst"),
        (put_into_config, "transformer/config.json"),
        (put_into_config, "model_index.json"),
        (put_into_config, "tokenizer/tokenizer.json"),
        (put_into_weights, "vae/diffusion_pytorch_model.safetensors"),
    ],
)
@pytest.mark.parametrize("text", [SECRET, f"TOKEN_{SECRET}_old", f"first line\n{SECRET}"], ids=["", "inside", "line"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_token_is_refused_by_file_and_not_repeated(put, name, text, dry_run, folder):
    put(folder / name, text)
    with pytest.raises(ValueError, match=f"^{re.escape(name)} holds") as error:
        hub.push(folder, "tester/model", dry_run=dry_run)
    assert SECRET[:12] not in str(error.value)


@pytest.mark.parametrize(
    ("put", "name", "path"),
    [
        (put_into_text, "README.md", "/data/me/references"),
        (put_into_text, "README.md", "file:///home/me/references"),
        (put_into_text, "LICENSE", "/home/me/LICENSE"),
        (put_into_config, "transformer/config.json", "/mnt/share/runs/7"),
        (put_into_config, "text_encoder/config.json", "/apdcephfs/share/me/umt5"),
        (put_into_config, "model_index.json", "C:\\Users\\me\\models"),
        (put_into_config, "vae/config.json", "D:/models/vae"),
        (put_into_config, "vae/config.json", "first line\n/home/me/vae"),
        (put_into_weights, "transformer/diffusion_pytorch_model.safetensors", "/root/runs/7"),
        (put_into_weights, "vae/diffusion_pytorch_model.safetensors", "/gpfs/me/vae"),
    ],
)
def test_a_path_of_this_machine_is_refused_by_file(put, name, path, folder):
    put(folder / name, path)
    with pytest.raises(ValueError, match=f"^{re.escape(name)} holds a path"):
        hub.push(folder, "tester/model")


def write_picture(file: Path, **options) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(file, **options)


def write_video(file: Path, **tags: str) -> None:
    file.parent.mkdir(exist_ok=True)
    with av.open(str(file), "w") as container:
        container.metadata.update(tags)
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])


def text_of_png(text: str) -> PngInfo:
    info = PngInfo()
    info.add_text("workflow", text)
    return info


def exif_of(tag: int, value: object) -> Image.Exif:
    exif = Image.Exif()
    exif[tag] = value
    return exif


def exif_with_place() -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif


def test_pictures_and_videos_without_a_trace_are_pushed(folder):
    write_picture(folder / "assets/a.png", pnginfo=text_of_png("a woman and/or her dog"))
    write_picture(folder / "assets/b.jpg", exif=exif_of(ExifTags.Base.Software, "an editor"))
    write_video(folder / "assets/c.mp4", comment="a walk")
    assert {"assets/a.png", "assets/b.jpg", "assets/c.mp4"} < hub.push(folder, "a/b", dry_run=True).sizes.keys()


def test_results_of_benchmarks_are_pushed(folder):
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results/opens2v-eval.yaml").write_text("[]")
    (folder / ".eval_results/notes.txt").write_text("not ours")
    sizes = hub.push(folder, "a/b", dry_run=True).sizes
    assert [name for name in sizes if name.startswith(".")] == [".eval_results/opens2v-eval.yaml"]


def test_a_path_in_the_text_of_a_png_is_refused(folder):
    write_picture(folder / "assets/a.png", pnginfo=text_of_png('{"ckpt": "/home/me/models/x.ckpt"}'))
    with pytest.raises(ValueError, match=r"^assets/a\.png holds a path of this machine \(/home/me/models/x"):
        hub.push(folder, "tester/model")


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png"])
def test_a_path_in_exif_is_refused(name, folder):
    write_picture(folder / "assets" / name, exif=exif_of(ExifTags.Base.ImageDescription, "/home/me/woman.png"))
    with pytest.raises(ValueError, match=f"^assets/{name} holds a path"):
        hub.push(folder, "tester/model")


def test_the_place_where_a_picture_was_taken_is_refused(folder):
    write_picture(folder / "assets/a.jpg", exif=exif_with_place())
    with pytest.raises(ValueError, match=r"^assets/a\.jpg says where it was taken"):
        hub.push(folder, "tester/model")


def test_a_path_in_the_metadata_of_a_video_is_refused(folder):
    write_video(folder / "assets/a.mp4", comment="/home/me/runs/7")
    with pytest.raises(ValueError, match=r"^assets/a\.mp4 holds a path of this machine \(/home/me/runs/7"):
        hub.push(folder, "tester/model")


def test_half_a_video_is_refused(folder):
    write_video(folder / "assets/a.mp4")
    (folder / "assets/a.mp4").write_bytes((folder / "assets/a.mp4").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"^assets/a\.mp4 cannot be read"):
        hub.push(folder, "tester/model")


@pytest.mark.parametrize("name", ["LICENSE", "assets/a.png", "vae"])
def test_a_link_out_of_the_folder_is_refused_by_push_and_export(name, folder, tmp_path):
    target = tmp_path / "elsewhere"
    if name == "vae":
        shutil.move(folder / name, target)
    else:
        target.write_text("private")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(target)
    for write in (hub.push, hub.export_repo):
        with pytest.raises(ValueError, match=f"{name} is a link to .*elsewhere, outside the folder"):
            write(folder, str(tmp_path / "new") if write is hub.export_repo else "tester/model")


def test_a_snapshot_in_the_hubs_cache_can_be_pushed_and_exported(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(digests(folder)):
        shutil.copyfile(folder / name, blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    assert hub.push(snapshot, "tester/model", dry_run=True).sizes.keys() == digests(folder).keys()
    assert digests(hub.export_repo(snapshot, tmp_path / "copy")) == digests(folder)


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_truncated_weights_are_refused_by_file(part, folder):
    file = folder / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        hub.push(folder, "tester/model")


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_weights_of_other_names_or_shapes_than_the_models_are_refused(part, folder):
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {f"{name}.lora_A": tensors[name].clone()}, file)
    with pytest.raises(ValueError, match=rf"{part} should not have 1 tensors .* such as {name}\.lora_A"):
        hub.push(folder, "tester/model")
    save_file(tensors | {name: tensors[name][None].contiguous()}, file)
    with pytest.raises(ValueError, match=rf"{part} lacks 1 tensors .* such as {name} "):
        hub.push(folder, "tester/model")


@pytest.mark.parametrize(
    ("file", "values", "kind"),
    [
        ("model_index.json", {"boundary_ratio": 0.9}, "Wan 2.2's A14B"),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "a WanVACEPipeline"),
        ("transformer/config.json", {"in_channels": 36}, "an image-to-video"),
    ],
)
def test_a_model_of_another_kind_is_refused(file, values, kind, folder):
    edit_json(folder / file, **values)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.* is of another kind: {kind}"):
        hub.push(folder, "tester/model", dry_run=True)


def test_a_card_that_is_not_filled_in_is_refused(repo_folder):
    with pytest.raises(ValueError, match=rf"README\.md says {hub.UNKNOWN} in the lines 3, \d+, \d+: fill in"):
        hub.push(repo_folder, "tester/model", dry_run=True)


def test_a_folder_without_a_card_is_refused(wan_folder):
    with pytest.raises(ValueError, match=r"wan has no README\.md\. Write one, or fill in"):
        hub.push(wan_folder, "tester/model", dry_run=True)


# Saved by diffusers' own way


def test_a_saved_pipeline_is_the_repo_that_export_writes(converted, work, tmp_path):
    converted.save_pretrained(tmp_path / "saved")
    assert digests(tmp_path / "saved") == {
        name: digest for name, digest in digests(work / "object").items() if name != "README.md"
    }


def test_a_pipeline_is_not_saved_as_a_pickle(converted, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        converted.save_pretrained(tmp_path / "saved", safe_serialization=False)


STATES = {
    "active": (),
    "disabled": ("disable_lora",),
    "fused": ("fuse_lora",),
    "deleted": (("delete_adapters", "first"),),
}


@pytest.mark.parametrize("state", STATES)
def test_a_pipeline_with_a_lora_is_not_saved_until_it_is_unloaded(state, pipeline, lora_folder, tmp_path):
    pipeline.load_lora_weights(lora_folder / "first", adapter_name="first")
    for call in STATES[state]:
        name, *arguments = (call,) if isinstance(call, str) else call
        getattr(pipeline, name)(*arguments)
    with pytest.raises(ValueError, match=r"The transformer has a LoRA's layers.*`unload_lora_weights\(\)`"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved")
    hub.push(fill_in_card(hub.export_repo(tmp_path / "saved", tmp_path / "repo")), "tester/model", dry_run=True)


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "tester/", "https://huggingface.co/tester/model"])
def test_a_repo_name_is_checked(repo_id, folder):
    with pytest.raises(ValueError, match="ORG/NAME"):
        hub.push(folder, repo_id)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        hub.push(tmp_path, "tester/model")


# Model cards

CARDS = {
    "template of 1.3B": ({"num_layers": 30}, "template"),
    "template of 14B": ({"num_layers": 40}, "template"),
    "refalign-1.3b": ({"num_layers": 30}, "refalign-1.3b"),
    "refalign-14b": ({"num_layers": 40}, "refalign-14b"),
}
PUBLISHED = ("refalign-1.3b", "refalign-14b")  # tests/evaluation/test_total.py reads their figures


@pytest.fixture(params=CARDS)
def card(request) -> ModelCard:
    return ModelCard(hub.model_card(*CARDS[request.param]), ignore_metadata_errors=False)


def python_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.+?)```", card.text, re.DOTALL)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("pipeline_tag", ["image-text-to-video"]),
        ("library_name", ["diffusers"]),
        ("base_model", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"]),
        ("base_model_relation", ["finetune"]),
        ("license", ["mit", hub.UNKNOWN]),
    ],
)
def test_a_cards_front_matter_has(field, values, card):
    assert card.data.to_dict()[field] in values


def test_a_cards_front_matter_lists_its_tags(card):
    assert {"refalign", "reference-to-video", "subject-to-video"} <= set(card.data.to_dict()["tags"])


@pytest.mark.parametrize(("name", "known"), [("refalign-1.3b", True), ("refalign-14b", True), ("template", False)])
def test_a_card_names_the_data_and_the_licence_of_known_weights_alone(name, known):
    card = ModelCard(hub.model_card({"num_layers": 30}, name))
    assert ("BestWishYsh/OpenS2V-5M" in (card.data.to_dict().get("datasets") or ())) is known
    assert ("OpenS2V-5M" in card.text) is ("Phantom-Data" in card.text) is known
    assert (hub.UNKNOWN not in card.content) is known


@pytest.mark.parametrize(
    ("checkpoint", "card"),
    [
        ("gudaochangsheng/RefAlign-14B", "refalign-14b"),
        ("/cache/models--gudaochangsheng--RefAlign-1.3B/snapshots/abc/model.safetensors", "refalign-1.3b"),
        ("someone/RefAlign-14B", None),
        ("RefAlign-14B", None),
    ],
)
def test_a_release_is_recognised_by_its_name_on_the_hub(checkpoint, card):
    assert hub.find_release(checkpoint) == card


def test_a_copy_of_a_release_is_recognised_by_its_sha256(native_file, tmp_path, monkeypatch):
    """As far as it is known here: of what the Hub's client has downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(native_file.read_bytes()).hexdigest()
    copy = shutil.copyfile(native_file, tmp_path / "downloaded.safetensors")
    assert hub.find_release(str(copy)) is None
    blobs = tmp_path / "cache/models--gudaochangsheng--RefAlign-14B/blobs"
    blobs.mkdir(parents=True)
    shutil.copyfile(native_file, blobs / digest)
    assert hub.find_release(str(copy)) == "refalign-14b"
    changed = bytearray(native_file.read_bytes())
    changed[-1] ^= 1  # of the same size
    copy.write_bytes(changed)
    assert hub.find_release(str(copy)) is None


@pytest.mark.parametrize(
    ("name", "base"), [(name, "1.3B" if "1.3" in name else "14B") for name in CARDS], ids=lambda value: value
)
def test_a_card_names_the_base_of_its_size(name, base):
    assert ModelCard(hub.model_card(*CARDS[name])).data.base_model == f"Wan-AI/Wan2.1-T2V-{base}-Diffusers"


def test_a_card_of_another_size_names_no_base():
    assert "base_model" not in ModelCard(hub.model_card({"num_layers": 2})).data.to_dict()


@pytest.mark.parametrize("heading", ["## Use", "## Training", "## Limits", "## Licence and citation"])
def test_a_card_has_its_sections(heading, card):
    assert heading in card.text.splitlines()


def test_a_card_shows_how_to_load_with_and_without_the_package(card):
    """Each block is whole Python and names the repo by the placeholder that `push` fills in."""
    calls = [
        node for block in python_blocks(card) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)
    ]
    loads = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith("from_pretrained")]
    assert loads == [
        "DiffusionPipeline.from_pretrained('ORG/NAME', dtype=torch.bfloat16, trust_remote_code=True)",
        "RefAlignWanPipeline.from_pretrained('ORG/NAME', dtype=torch.bfloat16)",
    ]


def test_a_card_begins_with_a_whole_snippet_that_needs_nothing_of_ours(card):
    """The Hub's own leaves out trust_remote_code and the references."""
    before, _, after = card.text.partition("```")
    assert after.startswith("python\n") and re.findall("^## .*", before, re.MULTILINE) == ["## Use"]
    assert "trust_remote_code=True" in after and "reference_images=" in after.partition("```")[0]


def test_a_cards_call_fits_the_pipelines_arguments(card):
    trees = [ast.parse(block) for block in python_blocks(card)]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == "pipe"]
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    inspect.signature(RefAlignWanPipeline.__call__).bind(None, *call.args, **arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_releases_card_says_where_its_scores_are_from(name):
    section = hub.model_card({}, name).partition("## Published results")[2].partition("\n## ")[0]
    assert "OpenS2V-Eval" in section and "arXiv 2603.25743" in section and "not measured again here" in section


def test_an_unknown_card_is_told_with_those_there_are():
    with pytest.raises(ValueError, match=r"'mine'.+refalign-1\.3b, refalign-14b, template"):
        hub.model_card({"num_layers": 30}, "mine")


# The community script


@pytest.fixture(scope="module")
def script() -> ast.Module:
    return ast.parse(hub.community_script())


def test_the_community_script_imports_nothing_of_the_package(script):
    imports = [node for node in ast.walk(script) if isinstance(node, ast.ImportFrom | ast.Import)]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    modules = [f"{'.' * node.level}{node.module or ''}" for node in imports if isinstance(node, ast.ImportFrom)]
    assert [name for name in names + modules if name.startswith((".", "refalign"))] == [] != modules


def test_the_community_script_defines_each_name_once(script):
    names = [node.name for node in script.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    names += [ast.unparse(t) for node in script.body if isinstance(node, ast.Assign) for t in node.targets]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_community_script_uses_no_name_it_does_not_define(work, pushes):
    """Ruff's rules for undefined (F821) and redefined (F811) names."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F811", work / "community.py"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout


def test_the_community_script_is_the_same_in_every_process(work, pushes):
    assert (work / "community.py").read_text("utf-8") == hub.community_script()


def test_the_community_script_may_be_written_again(tmp_path):
    (tmp_path / "community.py").write_text("old")
    assert cli.main(["export", "--community", str(tmp_path / "community.py")]) == 0
    assert (tmp_path / "community.py").read_text("utf-8") == hub.community_script()
