"""The command line, as its users call it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import refalign.generate as generate_module
from refalign import RefAlignWanPipeline, video
from refalign.cli import main
from refalign.generate import Generate, kept_settings, load_for
from refalign.loading import parse_lora
from refalign.reference_images import prepare_reference_image
from refalign.video import read_settings, read_video
from tests.drawn_references import write_reference_sets
from tests.programs import started


SMALL = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "1"]


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    """Reference sets: real photographs where the environment names a folder of them, else drawn ones."""
    if "REFERENCES" in os.environ:
        return Path(os.environ["REFERENCES"]).resolve()
    folder = tmp_path_factory.mktemp("references")
    write_reference_sets(folder)
    return folder


@pytest.fixture
def images(references) -> list[str]:
    return [str(path) for path in sorted((references / "set4").iterdir())]


@pytest.fixture
def generate(repo_folder, tmp_path, images):
    """Runs `refalign generate` at a small size and returns its exit code."""

    def run(*arguments, model=repo_folder, prompt="a cat", reference=images, output=tmp_path / "out.mp4"):
        words = ["generate", "--model", str(model), *SMALL]
        words += ["--prompt", prompt] if prompt is not None else []
        words += ["--reference", *reference] if reference else []
        words += ["--output", str(output)] if output is not None else []
        return main([*words, *map(str, arguments)])

    return run


@pytest.fixture
def frames(monkeypatch) -> list[np.ndarray]:
    """The videos as they come from the pipeline, in order: H.264's encoder does not repeat itself bit for bit."""
    seen = []
    write = video.write_video

    def keep(images, *args, **kwargs):
        images = list(images)
        seen.append(np.stack(images).astype(int))
        return write(images, *args, **kwargs)

    monkeypatch.setattr(video, "write_video", keep)
    return seen


def assert_same(first: np.ndarray, second: np.ndarray) -> None:
    """Up to the last digit, which depends on where in memory a file's weights lie."""
    assert np.abs(first - second).max() <= 1


# -- Start-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["generate"], ["convert"], ["push"], ["lora", "convert"]], ids=str)
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom refalign.cli import main\n"
        f"try: main({[*command, '--help']})\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'huggingface_hub', 'PIL', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: refalign" in result.stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, refalign; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- The main job -----------------------------------------------------------------------------------------------------


def test_every_reference_set_becomes_a_video(repo_folder, references, tmp_path):
    """A face, a pet or object, and a place each; one process, as a user with four jobs would."""
    sets = sorted(path for path in references.iterdir() if path.is_dir())
    assert len(sets) == 4
    jobs = [
        {
            "prompt": "They meet in the open.",
            "reference": [str(path) for path in sorted(folder.iterdir())],
            "output": str(tmp_path / f"{folder.name}.mp4"),
        }
        for folder in sets
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)), "utf-8")
    words = ["generate", "--model", repo_folder, "--batch", tmp_path / "jobs.jsonl", "--num-frames", 5, "--steps", 1]
    words += ["--height", 112, "--width", 208]
    assert main(list(map(str, words))) == 0
    for job in jobs:
        with av.open(job["output"]) as container:
            frames = list(container.decode(video=0))
            assert container.streams.video[0].codec_context.name == "h264"
        assert [(f.width, f.height) for f in frames] == [(208, 112)] * 5


# -- generate ---------------------------------------------------------------------------------------------------------


def test_it_says_what_it_will_do(generate, capsys):
    assert generate() == 0
    plan = capsys.readouterr().out
    assert "frames: 5 of 48x32, references: 3, tokens: 30 (12 of the video, 18 of references)" in plan
    assert "steps: 1, passes per step: 3" in plan


def test_without_references_it_is_text_to_video(generate, capsys):
    assert generate(reference=[]) == 0
    assert "references: 0, tokens: 12" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_frames(generate, tmp_path, frames):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate("--seed", seed, output=tmp_path / f"{name}.mp4") == 0
    assert np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])


@pytest.mark.parametrize(
    ("value", "kept"), [(None, {}), (True, {"batch_passes": True}), (False, {"batch_passes": False})]
)
def test_what_was_chosen_by_hand_is_kept(value, kept):
    settings = kept_settings(Generate(prompt="a", output=Path("a.mp4"), batch_passes=value))
    assert {
        name: settings[name] for name in settings.keys() & {"batch_passes", "compile", "cache", "vae_tiling"}
    } == kept


def test_the_file_holds_its_settings_and_no_folder_of_this_machine(generate, tmp_path, images):
    assert generate("--guidance-scale", 3, "--seed", 9) == 0
    settings = read_settings(tmp_path / "out.mp4")
    assert (settings["prompt"], settings["guidance_scale"], settings["seed"]) == ("a cat", 3.0, 9)
    assert settings["reference"] == [Path(image).name for image in images]
    assert "/" not in json.dumps(settings)


def test_the_file_holds_no_secret_of_a_url(tmp_path):
    command = Generate(
        model="org/model", prompt="a", reference=("https://user:pass@example.com/cat.png?token=SECRET",)
    )
    text = json.dumps(kept_settings(command))
    assert "https://example.com/cat.png" in text and "SECRET" not in text and "pass" not in text


def test_preview_shows_what_the_model_sees(generate, tmp_path, images):
    assert generate("--preview") == 0
    for number, image in enumerate(images, start=1):
        seen = Image.open(tmp_path / f"out.reference_{number}.png")
        expected = prepare_reference_image(image, 32, 48, cut_out=False)
        assert np.array_equal(np.asarray(seen), np.asarray(expected))


def test_preview_overwrites_nothing_unasked(generate, tmp_path, images, capsys):
    own = tmp_path / "out.reference_1.png"
    own.write_bytes(Path(images[0]).read_bytes())
    assert generate("--preview", reference=[str(own)]) == 1
    assert "out.reference_1.png exists already" in capsys.readouterr().err
    assert own.read_bytes() == Path(images[0]).read_bytes()


@pytest.fixture
def native_folder(native_file, tmp_path) -> Path:
    """The native checkpoint as two shards with their index, the form of the 14B release."""
    tensors = load_file(native_file)
    folder = tmp_path / "native"
    folder.mkdir()
    shards = {f"model-0000{n + 1}-of-00002.safetensors": list(tensors)[n::2] for n in range(2)}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return folder


@pytest.mark.parametrize("form", ["native_file", "native_folder"])
def test_a_native_checkpoint_on_a_wan_base_equals_the_converted_pipeline(
    generate, request, form, wan_folder, tmp_path, frames
):
    native = request.getfixturevalue(form)
    assert generate("--steps", 3) == 0
    assert generate("--steps", 3, "--base", wan_folder, model=native, output=tmp_path / "native.mp4") == 0
    assert_same(*frames)


def test_loras_are_applied_at_their_scale(generate, lora_folder, tmp_path, frames):
    lora = lora_folder / "first/pytorch_lora_weights.safetensors"
    assert generate() == 0
    assert generate("--lora", f"{lora}:0", output=tmp_path / "zero.mp4") == 0
    assert generate("--lora", f"{lora}:30", output=tmp_path / "thirty.mp4") == 0
    plain, zero, thirty = frames
    assert_same(plain, zero)
    assert np.abs(plain - thirty).max() > 5


@pytest.mark.parametrize(
    ("lora", "source", "scale"),
    [
        ("org/Wan2.1-Distill-Loras", "org/Wan2.1-Distill-Loras", 1.0),
        ("org/name-v1.0:0.5", "org/name-v1.0", 0.5),
        ("org/name:-1", "org/name", -1.0),
    ],
)
def test_a_lora_may_be_a_hub_id(lora, source, scale):
    assert parse_lora(lora) == (source, scale)


def test_group_offload_makes_the_same_video(generate, tmp_path, frames):
    assert generate() == 0
    assert generate("--offload", "group", output=tmp_path / "offloaded.mp4") == 0
    assert_same(*frames)


def test_half_precision_on_demand(generate):
    assert generate("--dtype", "bfloat16") == 0


def test_overwrite_is_asked_for(generate, tmp_path, capsys):
    (tmp_path / "out.mp4").write_bytes(b"precious")
    assert generate() == 1
    assert "out.mp4 exists already" in capsys.readouterr().err
    assert (tmp_path / "out.mp4").read_bytes() == b"precious"
    assert generate("--overwrite") == 0
    assert len(read_video(tmp_path / "out.mp4")) == 5


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((), {"prompt": None}, "the prompt is missing"),
        ((), {"output": None}, "the output is missing"),
        ((), {"output": Path("out.avi")}, "must end in .mp4"),
        ((), {"output": Path(__file__) / "out.mp4"}, "cannot be written"),
        (("--height", 40), {}, "`height` must be divisible by 16, but is 40"),
        (("--num-frames", 6), {}, "`num_frames` must be 4k + 1"),
        (("--steps", 0), {}, "num_inference_steps"),
        (("--seed", 2**64), {}, "more than 64 bits"),
        ((), {"reference": ["nowhere.png"]}, "nowhere.png does not exist"),
        ((), {"reference": [__file__]}, "the format is unknown"),
        (("--cut-out", "true", "false"), {}, "2 words for 3 references"),
        (("--lora", "nowhere.safetensors"), {}, "nowhere.safetensors does not exist"),
        (("--lora", "nowhere"), {}, "nowhere does not exist"),
        (("--lora", "a.safetensors:0.8x"), {}, "not a number"),
        (("--lora", "a.safetensors:nan"), {}, "not a number"),
        (("--lora", "weights.pt"), {}, "not a .safetensors file"),
        (("--offload", "model"), {}, "the device is cpu"),
        (("--device", "toaster"), {}, "--device toaster cannot be used here"),
        (("--device", "cuda"), {}, "--device cuda cannot be used here"),
        (("--device", "meta"), {}, "--device meta cannot be used here"),
        ((), {"model": "nowhere"}, "nowhere is neither a file or folder here nor a Hub id"),
        ((), {"model": "./nowhere"}, "./nowhere is neither a file or folder here"),
        ((), {"model": "org/nowhere.safetensors"}, "neither a file or folder here"),
        (("--base", "nowhere"), {"model": "native"}, "nowhere"),
        (("--batch", "jobs.jsonl"), {}, "stand in the file's lines"),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(
    generate, native_file, tmp_path, capsys, arguments, keywords, message
):
    if keywords.get("model") == "native":
        keywords = {**keywords, "model": native_file}
    before = sorted(tmp_path.rglob("*"))
    assert generate(*arguments, **keywords) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def not_loaded(monkeypatch):
    """Weights must not be read."""
    monkeypatch.setattr("refalign.pipeline_refalign_wan.RefAlignWanPipeline.from_pretrained", None)


@pytest.mark.parametrize(
    "words",
    [
        ("--steps", 0),
        ("--steps", -1),
        ("--guidance-scale", "nan"),
        ("--image-guidance-scale", -1),
        ("--num-frames", 6),
        ("--guidance-gate", 0.6, 0.5),
        ("--guidance-gate", 0, 1.5),
        ("--device", "toaster"),
        ("--lora", "nowhere.safetensors"),
        ("--lora", "wide.safetensors"),
    ],
    ids=lambda words: "-".join(map(str, words)).strip("-"),
)
def test_what_can_be_checked_is_checked_before_the_model_is_loaded(
    generate, tmp_path, monkeypatch, capsys, not_loaded, words
):
    pair = {"lora_A": torch.zeros(1, 1536), "lora_B": torch.zeros(1536, 1)}
    layer = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{layer}.{name}.weight": tensor for name, tensor in pair.items()}, tmp_path / "wide.safetensors")
    monkeypatch.chdir(tmp_path)
    assert generate(*words) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_batch_of_mistakes_alone_loads_no_model(batch, not_loaded, capsys):
    assert batch({"prompt": "a", "output": "a.mp4", "steps": 0}, {"prompt": "b", "output": "b.mp4", "height": 33}) == 1
    error = capsys.readouterr().err
    assert "jobs.jsonl:1: `num_inference_steps`" in error and "jobs.jsonl:2: `height`" in error
    assert "2 of 2 videos failed" in error


@pytest.mark.parametrize(("name", "is_told"), [("runs/mistyped", True), ("noorg/mistyped", False)])
def test_a_mistyped_path_is_told_before_the_hub_is_asked(
    generate, tmp_path, monkeypatch, caplog, capsys, name, is_told
):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert generate(model=name) == 1
    assert caplog.text.count(f"There is no folder {name} here") == is_told
    assert f"{name} is not a file or folder here, and the Hub does not give it" in capsys.readouterr().err


def test_a_lora_for_another_model_is_told(generate, tmp_path, capsys):
    save_file({"unet.down.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    assert generate("--lora", tmp_path / "other.safetensors") == 1
    assert "other.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_stopping_leaves_no_half_file(repo_folder, images, tmp_path, sent, code):
    words = ["generate", "--model", str(repo_folder), *SMALL[:-1], "100000", "--prompt", "a"]
    words += ["--reference", *images, "--output", str(tmp_path / "out.mp4")]
    with started(partial(main, words)) as (process, told):
        assert any("tokens" in line for line in told)
        os.kill(process.pid, sent)
        assert "Traceback" not in told.read()
        process.join(60)
        assert process.exitcode == code
    assert list(tmp_path.iterdir()) == []


# -- generate --batch -------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(repo_folder, tmp_path):
    """Runs a batch of the given lines and returns its exit code."""

    def run(*lines, extra=()):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "jobs.jsonl").write_text(text, "utf-8")
        words = ["generate", "--model", repo_folder, *SMALL, "--batch", tmp_path / "jobs.jsonl", *extra]
        return main(list(map(str, words)))

    return run


def test_references_may_be_called_reference_and_the_other_way_round(batch, generate, frames, tmp_path, images):
    lines = [
        {"prompt": "a", key: images[0], "output": str(tmp_path / f"{key}.mp4")} for key in ("reference", "references")
    ]
    assert batch(*lines) == 0
    assert generate("--references", images[0], prompt="a", reference=[]) == 0
    assert_same(frames[0], frames[1])
    assert_same(frames[0], frames[2])


def test_a_batch_tells_which_of_how_many_it_makes(batch, tmp_path, capsys):
    lines = [{"prompt": "a", "output": str(tmp_path / f"{i}.mp4")} for i in range(2)]
    assert batch(*lines) == 0
    told = capsys.readouterr().out
    assert f"1 of 2: {tmp_path / '0.mp4'}: " in told and f"2 of 2: {tmp_path / '1.mp4'}: " in told


def test_each_stage_of_a_video_is_shown_as_progress(generate, capsys, images):
    assert generate(reference=images[:2]) == 0
    told = capsys.readouterr().err
    stages = {"Encoding references": 2, "Encoding text": 2, "Denoising": 1, "Decoding": 2, "Writing": 5}
    # A bar may show its end twice: at the last item, and when it is closed
    counts = {name: set(re.findall(rf"{name}: 100%\|[^|]*\| (\d+)/\d+ ", told)) for name in stages}
    assert counts == {name: {str(count)} for name, count in stages.items()}
    places = [told.index(f"{name}: 100%") for name in stages]
    assert places == sorted(places)


def test_a_batch_makes_each_line_with_its_own_settings(batch, tmp_path, images):
    first = {"prompt": "a", "reference": images[0], "output": str(tmp_path / "a.mp4"), "num_frames": 9, "seed": 4}
    second = {"prompt": "b", "reference": images, "output": str(tmp_path / "b.mp4"), "cut_out": [False, "auto", False]}
    assert batch(first, "", second) == 0
    assert len(read_video(tmp_path / "a.mp4")) == 9
    assert read_settings(tmp_path / "b.mp4")["cut_out"] == ["false", "auto", "false"]


def test_a_bad_line_is_told_and_the_others_are_made(batch, tmp_path, capsys):
    lines = [{"prompt": "a", "output": str(tmp_path / f"{i}.mp4")} for i in range(3)]
    lines[1]["reference"] = "nowhere.png"
    assert batch(*lines) == 1
    error = capsys.readouterr().err
    assert "jobs.jsonl:2" in error and "nowhere.png" in error and "1 of 3 videos failed" in error
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["0.mp4", "2.mp4"]


def test_a_job_that_fails_unexpectedly_does_not_end_the_others(batch, tmp_path, capsys, monkeypatch):
    prepare = generate_module.prepare

    def fails_for_a(command):
        if command.prompt == "a":
            raise OverflowError("too large\nby far")
        return prepare(command)

    monkeypatch.setattr(generate_module, "prepare", fails_for_a)
    assert batch(*[{"prompt": prompt, "output": str(tmp_path / f"{prompt}.mp4")} for prompt in "ab"]) == 1
    assert "refalign: jobs.jsonl:1: too large by far (OverflowError, generate.py line" in capsys.readouterr().err
    assert (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", b"{"),
        ("text_encoder/config.json", b"\xff"),
        ("vae/diffusion_pytorch_model.safetensors", b"\x08\0\0\0\0\0\0\0{}"),
        ("tokenizer/tokenizer_config.json", b"[" * 100_000),
    ],
)
def test_a_damaged_file_of_a_pipeline_is_named(generate, repo_folder, tmp_path, capsys, name, content):
    model = shutil.copytree(repo_folder, tmp_path / "model")
    assert (model / name).exists()
    (model / name).write_bytes(content)
    assert generate(model=model) == 1
    error = capsys.readouterr().err
    assert str(model / name) in error and "Traceback" not in error


def test_a_line_may_hold_any_character_and_the_file_a_byte_order_mark(batch, tmp_path):
    assert (
        batch(
            "\ufeff" + json.dumps({"prompt": "a\u2028b\u0085c", "output": str(tmp_path / "a.mp4")}, ensure_ascii=False)
        )
        == 0
    )
    assert read_settings(tmp_path / "a.mp4")["prompt"] == "a\u2028b\u0085c"


def test_a_batch_run_again_passes_over_what_exists(batch, tmp_path, capsys):
    lines = [{"prompt": "a", "output": str(tmp_path / f"{i}.mp4")} for i in range(2)]
    assert batch(lines[0]) == 0
    before = (tmp_path / "0.mp4").read_bytes()
    assert batch(*lines) == 0
    assert "passed over" in capsys.readouterr().out
    assert (tmp_path / "0.mp4").read_bytes() == before and (tmp_path / "1.mp4").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{prompt}"], "jobs.jsonl:1 is not JSON"),
        (["[1]"], "jobs.jsonl:1 must be an object"),
        ([{"prompt": "a", "output": "a.mp4", "hight": 32}], "unknown settings ['hight']"),
        ([{"prompt": "a"}], "jobs.jsonl:1: the output is missing"),
        ([{"prompt": 3, "output": "a.mp4"}], "jobs.jsonl:1: prompt is 3, of a wrong type"),
        ([{"prompt": "a", "output": ["a.mp4"]}], "output is"),
        ([{"prompt": "a", "output": "a.mp4", "height": "480"}], "height is"),
        ([{"prompt": "a", "output": "a.mp4", "seed": True}], "seed is true"),
        ([{"prompt": "a", "output": "a.mp4", "seed": 1.5}], "seed is 1.5"),
        ([{"prompt": "a", "output": "a.mp4", "reference": None}], "reference is null"),
        ([{"prompt": "a", "output": "a.mp4", "reference": "b", "references": "b"}], "both references and reference"),
        ([{"prompt": "a", "output": "a.mp4", "reference": [1]}], "references are paths or URLs"),
        (["[" * 100_000], "jobs.jsonl:1 is not JSON"),
        ([{"prompt": "a", "output": "a.mp4"}] * 2, "same output more than once: a.mp4"),
        ([{"prompt": "a", "output": "a.mp4", "cut_out": "maybe"}], "cut_out is maybe"),
        ([""], "has no lines"),
    ],
    ids=range(16),
)
def test_a_batch_is_checked_before_a_model_is_loaded(batch, capsys, monkeypatch, lines, message):
    monkeypatch.setattr(RefAlignWanPipeline, "from_pretrained", None)
    assert batch(*lines) == 1
    assert message in capsys.readouterr().err


# -- convert, export, push --------------------------------------------------------------------------------------------


def test_convert_and_export_are_inverse(native_file, wan_folder, tmp_path, capsys):
    words = ["convert", "--checkpoint", native_file, "--base", wan_folder, "--output", tmp_path / "repo"]
    assert main(list(map(str, words))) == 0
    words = ["export", "--model", tmp_path / "repo", "--output", tmp_path / "native.safetensors"]
    assert main(list(map(str, words))) == 0
    before, after = load_file(native_file), load_file(tmp_path / "native.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_export_writes_a_repo_folder_and_the_community_script(repo_folder, tmp_path, capsys):
    words = ["export", "--model", repo_folder, "--output", tmp_path / "copy", "--community", tmp_path / "script.py"]
    assert main(list(map(str, words))) == 0
    assert (tmp_path / "copy/transformer/transformer_refalign_wan.py").is_file()
    compile((tmp_path / "script.py").read_text("utf-8"), "script.py", "exec")


@pytest.mark.parametrize("words", [[], ["--model", "a"], ["--output", "a"], ["--model", "a", "--community", "b"]])
def test_export_without_enough_to_do_says_so(words, capsys):
    assert main(["export", *words]) == 1
    assert "--community FILE" in capsys.readouterr().err


def test_push_dry_run_lists_files(repo_folder, tmp_path, capsys):
    folder = shutil.copytree(repo_folder, tmp_path / "repo")
    (folder / "README.md").write_text("# Mine\n", "utf-8")
    assert main(["push", str(folder), "--repo", "org/name", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "transformer/transformer_refalign_wan.py" in out and "Would push" in out


def test_plain_wan_takes_the_schedule_that_loras_are_trained_with(wan_folder):
    scheduler = load_for(Generate(model=str(wan_folder), device="cpu")).scheduler
    assert (type(scheduler).__name__, scheduler.config.shift) == ("FlowMatchEulerDiscreteScheduler", 5.0)
