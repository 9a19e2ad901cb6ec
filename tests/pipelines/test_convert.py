"""Checkpoints: every key and shape of the authors' formats, whole conversions, and what happens when they fail."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import refalign.convert as convert_module
from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel, cli
from refalign.convert import convert, export_native
from refalign.files import find_safetensors
from refalign.keys import diffusers_to_native, native_to_diffusers
from tests.mock_hub import MockHub
from tests.programs import call_script
from tests.tiny_pipeline import TRANSFORMER


REPOSITORY = Path(__file__).parent.parent.parent
SHAPES = json.loads((REPOSITORY / "tests/fixtures/native_checkpoint_shapes.json").read_text("utf-8"))
REAL_SIZES = {
    "1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
PROJECTOR = "blocks.0.input_mlp.proj.0.weight"
PREFIX = "model.diffusion_model."


# The mapping of keys


@pytest.fixture(scope="module", params=REAL_SIZES)
def real_size(request) -> SimpleNamespace:
    """The native keys with tensors of the authors' shapes, and our transformer's: both of full size, without data."""
    native = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[request.param].items()}
    projectors = {key: native.pop(key) for key in list(native) if "input_mlp" in key}
    with torch.device("meta"):
        model = RefAlignWanTransformer3DModel(attention_head_dim=128, **REAL_SIZES[request.param])
    return SimpleNamespace(native=native, projectors=projectors, model=model.state_dict())


def shapes(state_dict):
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def test_every_native_key_and_shape_of_a_real_size_becomes_the_models(real_size):
    transformer, _ = native_to_diffusers({**real_size.projectors, **real_size.native})
    assert shapes(transformer) == shapes(real_size.model)


def test_every_key_and_shape_of_a_real_sized_model_becomes_native(real_size):
    assert shapes(diffusers_to_native(real_size.model)) == shapes(real_size.native)


def test_all_projectors_of_a_real_size_are_split_off(real_size):
    _, projectors = native_to_diffusers({**real_size.projectors, **real_size.native})
    assert len(projectors) == 18 and shapes(projectors) == shapes(real_size.projectors)


def test_every_key_is_renamed_as_diffusers_itself_does(real_size):
    """The values are the native names, so two keys that changed places would show."""
    names = {key: key for key in real_size.native}
    assert native_to_diffusers(names)[0] == convert_wan_transformer_to_diffusers(dict(names))


@settings(max_examples=50, deadline=None)
@given(keys=st.sets(st.sampled_from(sorted(SHAPES["14b"]))))
def test_any_native_state_dict_survives_the_round_trip(keys):
    names = {key: key for key in keys}
    transformer, projectors = native_to_diffusers(names)
    assert diffusers_to_native({**transformer, **projectors}) == names


@settings(max_examples=50, deadline=None)
@given(keys=st.sets(st.sampled_from(sorted(SHAPES["14b"]))))
def test_no_key_is_lost_between_transformer_and_projectors(keys):
    transformer, projectors = native_to_diffusers({key: key for key in keys})
    assert sorted([*transformer.values(), *projectors.values()]) == sorted(keys)


def test_projectors_are_split_off_under_their_native_keys():
    transformer, projectors = native_to_diffusers({PROJECTOR: 1, "head.modulation": 2})
    assert (transformer, projectors) == ({"scale_shift_table": 2}, {PROJECTOR: 1})


def test_comfyuis_prefix_is_taken_off():
    state_dict = {PREFIX + PROJECTOR: 1, PREFIX + "blocks.3.modulation": 2}
    assert native_to_diffusers(state_dict) == ({"blocks.3.scale_shift_table": 2}, {PROJECTOR: 1})


def test_tensors_are_not_copied():
    tensor = torch.zeros(1)
    assert native_to_diffusers({"head.modulation": tensor})[0]["scale_shift_table"] is tensor


@pytest.mark.parametrize(
    "key",
    [
        "unknown.weight",
        "modulation",
        "self_attn.q.weight",
        "head.head.scale",
        "blocks.modulation",
        "blocks.0.head.modulation",
        "blocks.0.patch_embedding.weight",
        "blocks.0.self_attn.norm_q.bias",
        "blocks.0.norm1.weight",
        "blocks.0.cross_attn.k_img.weight",
        "blocks.0.input_mlp",
        "img_emb.proj.0.weight",
        "vace_blocks.0.after_proj.bias",
        "module.head.modulation",
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "blocks.0.attn1.to_q.weight",
    ],
)
def test_a_key_that_is_not_native_is_named(key):
    with pytest.raises(ValueError, match=f"'{key}'"):
        native_to_diffusers({"head.modulation": 0, key: 1})


@pytest.mark.parametrize(
    "key", ["proj_in.weight", "blocks.0.attn2.add_k_proj.weight", "blocks.0.proj_out.weight", "head.modulation"]
)
def test_a_key_that_is_not_diffusers_is_named(key):
    with pytest.raises(ValueError, match=f"'{key}'"):
        diffusers_to_native({"scale_shift_table": 0, key: 1})


@pytest.mark.parametrize("key", ["head.modulation", PROJECTOR])
def test_a_key_that_comes_twice_is_named_instead_of_lost(key):
    with pytest.raises(ValueError, match=f"'{key}'"):
        native_to_diffusers({key: 1, PREFIX + key: 2})


# Conversion


@pytest.fixture(scope="module")
def native(native_file) -> dict[str, torch.Tensor]:
    return load_file(native_file)


@pytest.fixture
def here(tmp_path) -> Path:
    """An empty folder to convert into, whose whole content can be looked at afterwards."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def copy_base(wan_folder: Path, target: Path, **config) -> Path:
    """A base without transformer weights, which a conversion does not need; its transformer's config changed."""
    shutil.copytree(
        wan_folder,
        target,
        ignore=lambda folder, names: (
            {"diffusion_pytorch_model.safetensors"} & {name for name in names if Path(folder).name == "transformer"}
        ),
    )
    file = target / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | config), "utf-8")
    return target


def write_shards(tensors: dict[str, torch.Tensor], folder: Path, count: int = 3) -> Path:
    """A folder of `count` shards and their index."""
    folder.mkdir()
    keys = sorted(tensors)
    names = {key: f"model-{number % count + 1:05}-of-{count:05}.safetensors" for number, key in enumerate(keys)}
    for name in sorted(set(names.values())):
        save_file({key: tensors[key] for key in keys if names[key] == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files of a folder."""
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [key for key in expected if actual[key].dtype != expected[key].dtype]
    assert different == []
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def one_file(native, tmp_path):
    save_file(native, tmp_path / "release.safetensors")
    return tmp_path / "release.safetensors"


def folder_of_one_file(native, tmp_path):
    (tmp_path / "release").mkdir()
    one_file(native, tmp_path / "release")
    return tmp_path / "release"


def folder_of_shards(native, tmp_path):
    return write_shards(native, tmp_path / "release")


def file_for_comfyui(native, tmp_path):
    return one_file({PREFIX + key: tensor for key, tensor in native.items()}, tmp_path)


@pytest.mark.parametrize("layout", [one_file, folder_of_one_file, folder_of_shards, file_for_comfyui])
def test_every_layout_of_a_release_gives_the_same_transformer(layout, native, wan_folder, tmp_path, here):
    convert(layout(native, tmp_path), wan_folder, here / "model")
    assert_same_tensors(read_folder(here / "model/transformer"), convert_wan_transformer_to_diffusers(dict(native)))


def test_the_converted_transformer_computes_what_the_native_weights_compute(repo_folder, native, inputs):
    """The reference is diffusers' own model with diffusers' own reading of the native weights."""
    wan = WanTransformer3DModel(**TRANSFORMER).eval()
    wan.load_state_dict(convert_wan_transformer_to_diffusers(dict(native)))
    converted = RefAlignWanTransformer3DModel.from_pretrained(repo_folder, subfolder="transformer")
    inputs.pop("reference_hidden_states")
    with torch.no_grad():
        assert torch.equal(converted(**inputs).sample, wan(**inputs).sample)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_the_bases_models_are_taken_along(component, repo_folder, wan_folder):
    assert_same_tensors(read_folder(repo_folder / component), read_folder(wan_folder / component))


def test_the_bases_tokenizer_is_taken_along(pipeline, wan_folder):
    tokenizer = type(pipeline.tokenizer).from_pretrained(wan_folder / "tokenizer")
    assert pipeline.tokenizer("A dog.").input_ids == tokenizer("A dog.").input_ids


def test_the_scheduler_is_the_papers(pipeline):
    assert (type(pipeline.scheduler), pipeline.scheduler.config.shift) == (FlowMatchEulerDiscreteScheduler, 5.0)


def test_the_bases_scheduler_is_kept_if_wanted(native_file, wan_folder, here):
    folder = convert(native_file, wan_folder, here / "model", keep_scheduler=True)
    scheduler = RefAlignWanPipeline.from_pretrained(folder).scheduler
    assert (type(scheduler), scheduler.config.flow_shift) == (UniPCMultistepScheduler, 3.0)


def test_the_checkpoints_dtype_is_kept(native, wan_folder, tmp_path, here):
    release = one_file({key: tensor.to(torch.bfloat16) for key, tensor in native.items()}, tmp_path)
    tensors = read_folder(convert(release, wan_folder, here / "model") / "transformer")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_projectors_are_written_beside_the_models(native, wan_folder, tmp_path, here):
    projectors = {f"blocks.{i}.input_mlp.proj.0.weight": torch.randn(4, 24) for i in range(2)}
    folder = convert(one_file({**native, **projectors}, tmp_path), wan_folder, here / "model")
    assert_same_tensors(load_file(folder / "projectors.safetensors"), projectors)


def test_a_release_without_projectors_gives_no_projector_file(repo_folder):
    assert not (repo_folder / "projectors.safetensors").exists()


@pytest.fixture(scope="module")
def sharded_folder(native_file, wan_folder, tmp_path_factory) -> Path:
    """What `refalign convert --max-shard-size 20KB` writes."""
    output = tmp_path_factory.mktemp("sharded") / "model"
    options = ["--checkpoint", native_file, "--base", wan_folder, "--output", output, "--max-shard-size", "20KB"]
    assert cli.main(["convert", *map(str, options)]) == 0
    return output


def test_shards_are_no_larger_than_asked_for(sharded_folder):
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in (sharded_folder / "transformer").glob("*.safet*s")]
    assert len(sizes) > 2 and max(sizes) <= 20_000


def test_shards_load_as_one_transformer(sharded_folder, native):
    model = RefAlignWanTransformer3DModel.from_pretrained(sharded_folder, subfolder="transformer")
    assert_same_tensors(dict(model.state_dict()), convert_wan_transformer_to_diffusers(dict(native)))


def test_an_empty_folder_may_be_the_output(native_file, wan_folder, here):
    (here / "model").mkdir()
    convert(native_file, wan_folder, here / "model")
    assert (here / "model/model_index.json").is_file()


def test_a_conversion_leaves_only_its_output(native_file, wan_folder, here):
    convert(native_file, wan_folder, here / "model")
    assert os.listdir(here) == ["model"]


def test_a_converted_golden_checkpoint_samples_the_authors_latents(golden, wan_folder, tmp_path, here):
    """The authors' native weights, with projectors, through the folder, against latents of their implementation."""
    base = copy_base(
        wan_folder,
        tmp_path / "base",
        num_attention_heads=golden.c.num_heads,
        attention_head_dim=golden.c.dim // golden.c.num_heads,
        **{name: getattr(golden.c, name) for name in ("ffn_dim", "num_layers", "text_dim", "freq_dim")},
    )
    pipeline = RefAlignWanPipeline.from_pretrained(convert(one_file(golden.native, tmp_path), base, here / "model"))
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        prompt_embeds=golden.t["in.prompt_embeds"],
        negative_prompt_embeds=golden.t["in.negative_prompt_embeds"],
        reference_latents=golden.t["in.reference_latents"],
        latents=golden.t["in.noise"],
        height=golden.c.latent_height * 8,
        width=golden.c.latent_width * 8,
        num_frames=golden.c.latent_frames * 4 - 3,
        num_inference_steps=4,
        output_type="latent",
    ).frames
    expected = golden.t["out.sample_4_steps"]
    assert (latents - expected).abs().max() / expected.abs().max() < 2e-3


# From the Hub

FROM_HUB = """
import json, sys
from refalign import cli

codes = [cli.main(["convert", *line.split()]) for line in sys.argv[1:]]
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def from_hub(native, wan_folder, tmp_path_factory) -> SimpleNamespace:
    """`refalign convert` of releases on the Hub with a base on the Hub: exit codes, outputs, what was asked for."""
    folder = tmp_path_factory.mktemp("hub")
    authors, shards = "gudaochangsheng/RefAlign-1.3B", "org/sharded"
    (folder / "repos" / authors).mkdir(parents=True)
    save_file(native, folder / "repos" / authors / "diffusion_pytorch_model-refalign.safetensors")
    (folder / "repos" / authors / "extra").mkdir()
    save_file({"unused": torch.zeros(1)}, folder / "repos" / authors / "extra/other.safetensors")
    (folder / "repos/org").mkdir()
    write_shards(native, folder / "repos" / shards)
    shutil.copytree(wan_folder, folder / "repos/org/wan")
    with MockHub(folder / "repos") as hub:
        lines = [
            f"--checkpoint {checkpoint} --base org/wan --output {folder / output}"
            for checkpoint, output in ((authors, "authors"), (shards, "shards"), ("org/nothing", "nothing"))
        ]
        child = call_script(FROM_HUB, *lines, environment=hub.environment(folder / "home"))
    assert child.returncode == 0, child.stderr
    return SimpleNamespace(
        codes=json.loads(child.stdout.splitlines()[-1]),
        folder=folder,
        requests=[path for _, path in hub.requests],
        errors=child.stderr,
    )


@pytest.mark.parametrize("output", ["authors", "shards"])
def test_a_release_on_the_hub_is_converted(output, from_hub, native):
    assert_same_tensors(
        read_folder(from_hub.folder / output / "transformer"), convert_wan_transformer_to_diffusers(dict(native))
    )


def test_a_base_on_the_hub_is_taken_along(from_hub, wan_folder):
    assert_same_tensors(read_folder(from_hub.folder / "authors/vae"), read_folder(wan_folder / "vae"))


def test_the_bases_transformer_is_not_downloaded(from_hub):
    paths = [path for path in from_hub.requests if "org/wan/resolve" in path and path.endswith(".safetensors")]
    assert [path for path in paths if "/transformer/" in path] == [] != paths


def test_nothing_but_the_checkpoint_is_downloaded_from_a_release(from_hub):
    assert [path for path in from_hub.requests if path.endswith("other.safetensors")] == []


def test_the_authors_release_gets_its_own_card(from_hub):
    assert "| 56.30 |" in (from_hub.folder / "authors/README.md").read_text("utf-8")


def test_another_release_gets_a_card_without_scores(from_hub):
    assert "56.30" not in (from_hub.folder / "shards/README.md").read_text("utf-8")


def test_a_repo_that_does_not_exist_is_named_without_a_traceback(from_hub):
    assert from_hub.codes == [0, 0, 1]
    assert "org/nothing" in from_hub.errors and "Traceback" not in from_hub.errors


# Memory

MEASURE = """
import json, sys
from pathlib import Path
import diffusers
from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel, hub
from refalign.convert import convert

def memory(name):  # of this process alone: getrusage's peak starts at that of the process which started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

base, *checkpoints = sys.argv[1:]
diffusers.FlowMatchEulerDiscreteScheduler()
before = memory("VmRSS")
for number, checkpoint in enumerate(checkpoints):
    convert(checkpoint, base, f"{base}-{number}", max_shard_size="100MB")
print(json.dumps(memory("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_stays_below_twice_the_largest_shard(wan_folder, tmp_path):
    """400 MB of weights, in one file and in 100 MB shards. Pages mapped from the disk count too."""
    config = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 12}
    base = copy_base(wan_folder, tmp_path / "base", **config)
    with torch.device("meta"):
        expected = RefAlignWanTransformer3DModel(**{**TRANSFORMER, **config}).state_dict()
    noise = torch.randn(max(tensor.numel() for tensor in expected.values())).to(torch.bfloat16)
    tensors = {key: noise[: t.numel()].view(t.shape).clone() for key, t in diffusers_to_native(expected).items()}
    release = one_file(tensors, tmp_path)
    shards = write_shards(tensors, tmp_path / "shards", count=4)
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, base, release, shards], capture_output=True, text=True, check=True
    )
    written = [file.stat().st_size for file in tmp_path.glob("base-*/transformer/*.safetensors")]
    growth = json.loads(child.stdout.splitlines()[-1])
    shutil.rmtree(tmp_path)
    assert sum(written) > 800e6
    assert growth < 2 * max(written)


# Failures: each is a function that spoils a release or a base, and returns what the error has to name


def truncate(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def truncated_file(case):
    return truncate(case.checkpoint)


def file_cut_in_its_header(case):
    case.checkpoint.write_bytes(case.checkpoint.read_bytes()[:50])
    return case.checkpoint.name


def empty_file(case):
    case.checkpoint.write_bytes(b"")
    return case.checkpoint.name


def error_page_instead_of_a_file(case):
    case.checkpoint.write_bytes(b"<!doctype html><title>404</title>")
    return case.checkpoint.name


def unknown_key(case):
    save_file({**case.native, "img_emb.proj.0.weight": torch.zeros(1)}, case.checkpoint)
    return "'img_emb.proj.0.weight'"


def key_of_a_layer_too_many(case):
    save_file({**case.native, "blocks.2.modulation": torch.zeros(1, 6, 24)}, case.checkpoint)
    return "blocks.2.modulation"


def missing_key(case):
    save_file({key: t for key, t in case.native.items() if key != "blocks.1.ffn.2.bias"}, case.checkpoint)
    return "blocks.1.ffn.2.bias"


def wrong_shape(case):
    save_file({**case.native, "head.modulation": torch.zeros(1, 2, 25)}, case.checkpoint)
    return "head.modulation is (1, 2, 25), not (1, 2, 24)"


def key_with_and_without_prefix(case):
    save_file({**case.native, PREFIX + "head.modulation": torch.zeros(1, 2, 24)}, case.checkpoint)
    return "'head.modulation'"


def dtype_nobody_uses(case):
    save_file({**case.native, "head.modulation": torch.zeros(1, 2, 24, dtype=torch.int32)}, case.checkpoint)
    return "'head.modulation' has dtype I32"


def mistyped_file(case):
    case.checkpoint = case.checkpoint.with_name("relaese.safetensors")
    return "relaese.safetensors"


def mistyped_short_name(case):
    case.checkpoint = "relaese.safetensors"
    return "relaese.safetensors"


def mistyped_file_in_a_folder(case):
    case.checkpoint = "checkpoints/relaese.safetensors"
    return "checkpoints/relaese.safetensors"


def mistyped_folder(case):
    case.checkpoint = "checkpoints/relaese"
    return "checkpoints/relaese"


def empty_folder(case):
    case.checkpoint = case.folder / "nothing"
    case.checkpoint.mkdir()
    return "nothing"


def folder_of_pickles(case):
    case.checkpoint = case.folder / "pickles"
    case.checkpoint.mkdir()
    (case.checkpoint / "refalign.pth").write_bytes(pickle.dumps({}))
    return "refalign.pth"


def folder_of_two_checkpoints(case):
    folder = write_shards(case.native, case.folder / "two")
    shutil.copyfile(folder / "model.safetensors.index.json", folder / "other.safetensors.index.json")
    case.checkpoint = folder
    return "other.safetensors.index.json"


def shards_without_index(case):
    case.checkpoint = write_shards(case.native, case.folder / "shards")
    (case.checkpoint / "model.safetensors.index.json").unlink()
    return "model-00002-of-00003.safetensors"


def missing_shard(case):
    case.checkpoint = write_shards(case.native, case.folder / "shards")
    (case.checkpoint / "model-00002-of-00003.safetensors").unlink()
    return "model-00002-of-00003.safetensors"


def truncated_shard(case):
    case.checkpoint = write_shards(case.native, case.folder / "shards")
    return truncate(case.checkpoint / "model-00002-of-00003.safetensors")


def truncated_index(case):
    case.checkpoint = write_shards(case.native, case.folder / "shards")
    return truncate(case.checkpoint / "model.safetensors.index.json")


def index_without_weights(case):
    case.checkpoint = write_shards(case.native, case.folder / "shards")
    (case.checkpoint / "model.safetensors.index.json").write_text("{}", "utf-8")
    return "model.safetensors.index.json"


def key_in_two_shards(case):
    case.checkpoint = write_shards(case.native, case.folder / "shards")
    for file in case.checkpoint.glob("*.safetensors"):
        save_file({**load_file(file), "head.modulation": torch.zeros(1, 2, 24)}, file)
    return "'head.modulation'"


def base_of_another_size(case):
    case.base = copy_base(case.base, case.folder / "large", num_attention_heads=4)
    return "wrong shapes"


def base_of_another_kind(case):
    case.base = copy_base(case.base, case.folder / "vace", _class_name="WanVACETransformer3DModel", vace_layers=[0])
    return "WanVACETransformer3DModel"


def image_to_video_base(case):
    case.base = copy_base(case.base, case.folder / "i2v", image_dim=32, added_kv_proj_dim=24)
    return "image-to-video"


def base_of_pickles(case):
    (case.base / "vae/diffusion_pytorch_model.safetensors").rename(case.base / "vae/diffusion_pytorch_model.bin")
    return "diffusion_pytorch_model.bin is refused"


def base_without_tokenizer(case):
    shutil.rmtree(case.base / "tokenizer")
    return "tokenizer"


def base_that_is_no_pipeline(case):
    (case.base / "model_index.json").unlink()
    return "model_index.json"


def mistyped_base(case):
    case.base = case.folder / "no/such/base"
    return "no/such/base"


def base_with_a_truncated_config(case):
    truncate(case.base / "transformer/config.json")
    return "transformer/config.json"


def base_with_a_truncated_index(case):
    truncate(case.base / "model_index.json")
    return "model_index.json"


def base_with_a_missing_shard(case):
    index = {"weight_map": {"shared.weight": "model-00002-of-00002.safetensors"}}
    (case.base / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return "model-00002-of-00002.safetensors"


def base_with_a_truncated_vae(case):
    truncate(case.base / "vae/diffusion_pytorch_model.safetensors")
    return "vae/diffusion_pytorch_model.safetensors"


FAILURES = [
    truncated_file,
    file_cut_in_its_header,
    empty_file,
    error_page_instead_of_a_file,
    unknown_key,
    key_of_a_layer_too_many,
    missing_key,
    wrong_shape,
    key_with_and_without_prefix,
    dtype_nobody_uses,
    mistyped_file,
    mistyped_short_name,
    mistyped_file_in_a_folder,
    mistyped_folder,
    empty_folder,
    folder_of_pickles,
    folder_of_two_checkpoints,
    shards_without_index,
    missing_shard,
    truncated_shard,
    truncated_index,
    index_without_weights,
    key_in_two_shards,
    base_of_another_size,
    base_of_another_kind,
    image_to_video_base,
    base_of_pickles,
    base_without_tokenizer,
    base_that_is_no_pipeline,
    mistyped_base,
    base_with_a_truncated_config,
    base_with_a_truncated_index,
    base_with_a_missing_shard,
    base_with_a_truncated_vae,
]


@pytest.fixture
def case(native, wan_folder, tmp_path) -> SimpleNamespace:
    """A release and a base that convert, to be spoiled."""
    base = copy_base(wan_folder, tmp_path / "base")
    return SimpleNamespace(native=native, folder=tmp_path, checkpoint=one_file(native, tmp_path), base=base)


def test_what_the_failures_spoil_does_convert(case, here):
    convert(case.checkpoint, case.base, here / "model")


@pytest.mark.parametrize("spoil", FAILURES)
def test_a_failure_is_named_and_leaves_nothing(spoil, case, here):
    named = spoil(case)
    with pytest.raises(ValueError) as error:
        convert(case.checkpoint, case.base, here / "model")
    assert named in str(error.value)
    assert os.listdir(here) == []


def test_the_command_tells_a_failure_in_one_line(case, here, capsys):
    truncate(case.checkpoint)
    options = ["--checkpoint", case.checkpoint, "--base", case.base, "--output", here / "model"]
    assert cli.main(["convert", *map(str, options)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and str(case.checkpoint) in errors[0]


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_bomb_of_the_next_test_goes_off_when_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "unpickled")))
    assert (tmp_path / "unpickled").is_dir()


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.ckpt", "a.safetensors"])
def test_a_pickle_is_refused_unopened_whatever_its_name(name, case, here):
    (case.folder / name).write_bytes(pickle.dumps(Bomb(case.folder / "unpickled")))
    with pytest.raises(ValueError, match=rf"{name}\b"):
        convert(case.folder / name, case.base, here / "model")
    assert not (case.folder / "unpickled").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_a_conversion_stopped_while_it_writes_leaves_nothing(error, case, here, monkeypatch):
    files = []

    def stop_at_the_second(tensors, file, metadata=None):
        if files:
            raise error
        files.append(file)
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(convert_module, "save_file", stop_at_the_second)
    with pytest.raises(type(error)):
        convert(case.checkpoint, case.base, here / "model", max_shard_size="20KB")
    assert len(files) == 1 and os.listdir(here) == []


def test_a_folder_that_exists_is_not_touched(case, here):
    (here / "model").mkdir()
    (here / "model/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="model exists already"):
        convert(case.checkpoint, case.base, here / "model")
    assert {file.relative_to(here).as_posix() for file in here.rglob("*")} == {"model", "model/mine.txt"}


def test_an_output_that_exists_is_told_before_anything_is_looked_for(here):
    (here / "model").write_text("mine")
    with pytest.raises(ValueError, match="model exists already"):
        convert("org/nothing", "org/nothing", here / "model")


def test_a_file_that_exists_is_not_touched(case, here):
    (here / "model").write_text("mine")
    with pytest.raises(ValueError, match="model exists already"):
        convert(case.checkpoint, case.base, here / "model")
    assert os.listdir(here) == ["model"] and (here / "model").read_text() == "mine"


# Export


@pytest.mark.parametrize("source", ["repo_folder", "sharded_folder"])
def test_an_export_is_the_native_checkpoint_bit_by_bit(source, request, native, here):
    export_native(request.getfixturevalue(source), here / "native.safetensors")
    assert_same_tensors(load_file(here / "native.safetensors"), native)


def test_an_export_leaves_only_its_file(repo_folder, here):
    export_native(repo_folder, here / "native.safetensors")
    assert os.listdir(here) == ["native.safetensors"]


def test_an_export_keeps_bfloat16(native, wan_folder, tmp_path, here):
    release = {key: tensor.to(torch.bfloat16) for key, tensor in native.items()}
    convert(one_file(release, tmp_path), wan_folder, tmp_path / "model")
    export_native(tmp_path / "model", here / "native.safetensors")
    assert_same_tensors(load_file(here / "native.safetensors"), release)


def test_an_export_has_no_projectors(native, wan_folder, tmp_path, here):
    convert(one_file({**native, PROJECTOR: torch.zeros(2, 24)}, tmp_path), wan_folder, tmp_path / "model")
    export_native(tmp_path / "model", here / "native.safetensors")
    assert_same_tensors(load_file(here / "native.safetensors"), native)


def test_an_export_says_nothing_of_where_it_was_made(repo_folder, here):
    export_native(repo_folder, here / "native.safetensors")
    with safe_open(here / "native.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_command_exports_a_native_file(repo_folder, native, here):
    options = ["--model", repo_folder, "--output", here / "native.safetensors"]
    assert cli.main(["export", *map(str, options)]) == 0
    assert_same_tensors(load_file(here / "native.safetensors"), native)


def test_an_export_does_not_touch_a_file_that_exists(repo_folder, here):
    (here / "native.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"native\.safetensors exists already"):
        export_native(repo_folder, here / "native.safetensors")
    assert os.listdir(here) == ["native.safetensors"] and (here / "native.safetensors").read_text() == "mine"


def test_an_export_wants_a_safetensors_name(repo_folder, here):
    with pytest.raises(ValueError, match=r"native\.pth"):
        export_native(repo_folder, here / "native.pth")


def test_an_export_of_no_pipeline_says_so(tmp_path, here):
    with pytest.raises(ValueError, match=r"transformer/config\.json"):
        export_native(tmp_path, here / "native.safetensors")


def test_an_export_of_truncated_weights_names_the_file_and_leaves_nothing(repo_folder, tmp_path, here):
    folder = shutil.copytree(repo_folder, tmp_path / "model")
    name = truncate(folder / "transformer/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=name):
        export_native(folder, here / "native.safetensors")
    assert os.listdir(here) == []


def test_an_export_stopped_while_it_writes_leaves_nothing(repo_folder, here, monkeypatch):
    def stop(tensors, file, metadata=None):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        export_native(repo_folder, here / "native.safetensors")
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    "name", ["../private.safetensors", "{folder}/private.safetensors"], ids=["relative", "absolute"]
)
def test_an_index_that_names_files_outside_its_folder_is_refused(tmp_path, name):
    save_file({"head.modulation": torch.zeros(1)}, tmp_path / "private.safetensors")
    release = tmp_path / "release"
    release.mkdir()
    weight_map = {"head.modulation": name.format(folder=tmp_path)}
    (release / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    with pytest.raises(ValueError, match="outside its own folder"):
        find_safetensors(release)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_json_of_another_kind_names_its_file(native_file, wan_folder, tmp_path, name):
    base = shutil.copytree(wan_folder, tmp_path / "base")
    (base / name).write_text("[1, 2]")
    with pytest.raises(ValueError, match=rf"{name} holds \[1, 2\], not an object"):
        convert(native_file, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_makes_no_transformer_is_told_with_its_base(native_file, wan_folder, tmp_path):
    base = shutil.copytree(wan_folder, tmp_path / "base")
    config = json.loads((base / "transformer/config.json").read_text("utf-8"))
    (base / "transformer/config.json").write_text(json.dumps({**config, "num_layers": "two"}), "utf-8")
    with pytest.raises(ValueError, match=r"The transformer's configuration of .* cannot be loaded \(TypeError: "):
        convert(native_file, base, tmp_path / "out")
