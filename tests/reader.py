"""A reader of our pages, who runs what they show: the folder the reader works in, and what is changed to run it fast.

The folder holds tiny models, pictures and data sets under the names that the pages use, so that commands run word by
word. `SMALL_OPTIONS` and `SMALL_PYTHON` say what is changed about them. Programs of others are checked, but not run.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from huggingface_hub.cli.hf import app as hub_program
from tensorboard.program import TensorBoard
from torch.distributed.run import get_args_parser

import refalign.cli
import refalign_evaluation.cli
import refalign_training.cli
from refalign.command_line import Program
from refalign.files import read_json
from refalign.video import write_video
from refalign_evaluation.run_folder import SCORES
from refalign_evaluation.scores import METRICS
from refalign_evaluation.totals import WEIGHTS, upload_json, write_upload
from refalign_training.run.checks import check
from refalign_training.run.config import RunCommand
from tests.drawn_references import draw_face, draw_pet, draw_place
from tests.evaluation.small_benchmark import write_benchmark
from tests.evaluation.small_results import PERFECT, write_official, write_results
from tests.pages import ROOT, Block, read_commands
from tests.tiny_refine import mask_of, picture, reference, tiny_refine_pipeline
from tests.training.data import test_phantom as phantom
from tests.training.opens2v_files import write_opens2v
from tests.training.small_cache import write_clips, write_teacher


PROGRAMS: dict[str, Program] = {
    "refalign": refalign.cli.PROGRAM,
    "refalign-train": refalign_training.cli.PROGRAM,
    "refalign-eval": refalign_evaluation.cli.PROGRAM,
}
MODULES = {  # as launchers name them
    "refalign.cli": "refalign",
    "refalign_training.cli": "refalign-train",
    "refalign_evaluation.cli": "refalign-eval",
}
PIXELS = "--height 32 --width 48 --num-frames 5"
# What is added to a command, as the sizes that it takes by itself are for a GPU
SMALL_OPTIONS = {
    "refalign generate": f"{PIXELS} --steps 2",
    "refalign-train check": PIXELS,
    "refalign-train cache": f"{PIXELS} --dtype float32 --workers 0",
    "refalign-train run": "--steps 2 --device cpu --model.precision float32 --alignment.layers 0 1 --data.workers 0 "
    "--batch.size 2 --validation.every 0 --log.gradients-every 0 --optimizer.warmup-steps 0 "
    "--data.recipe.height 32 --data.recipe.width 48 --data.recipe.num-frames 5",
    # On the Hub, the base is no folder, and its licence is known
    "refalign-train export": "--base Wan-AI/Wan2.1-T2V-1.3B-Diffusers --datasets ORG/CLIPS --licence apache-2.0",
    "refalign-eval generate": f"{PIXELS} --steps 2 --limit 2",
    "refalign-eval references": "--size 32 48 --num-frames 5 --tokens 4 --timesteps 900 --blocks 0 --projection pca",
}
SMALL_PYTHON = {
    '"cuda"': '"cpu"',
    "height=480": "height=32",
    "width=832": "width=48",
    "num_frames=81": "num_frames=5, num_inference_steps=2",
    "cut_out=[True, False]": "cut_out=[False, False]",  # True needs BiRefNet's weights
}


# -- The folder -------------------------------------------------------------------------------------------------------


def write_readers_folder(folder: Path, wan: Path, native: Path, repo: Path) -> Path:
    """
    Writes all that a reader has who goes through a page: models under their Hub ids, pictures, clips, data sets.

    Args:
        wan, native, repo (`Path`): a tiny Wan pipeline, a native checkpoint, and what `refalign convert` makes of them
            if they are the authors'.
    """
    for name in ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"):
        shutil.copytree(wan, folder / name)
    for name in ("ORG/NAME", "org/refalign-1.3b", "refalign-1.3b", "refalign-14b"):
        shutil.copytree(repo, folder / name)
        set_defaults(folder / name, height=32, width=48, num_frames=5, num_inference_steps=2)
    (folder / "gudaochangsheng/RefAlign-1.3B").mkdir(parents=True)
    shutil.copy(native, folder / "gudaochangsheng/RefAlign-1.3B/diffusion_pytorch_model-refalign.safetensors")
    write_teacher(folder / "facebook/dinov3-vitb16-pretrain-lvd1689m")
    draw_face(0.1).save(folder / "woman.png")
    draw_pet(0.4).save(folder / "dog.png")
    draw_place(0.3).save(folder / "beach.jpg")
    _write_training_data(folder)
    _write_evaluation_data(folder)
    _write_refining_data(folder)
    return folder


def set_defaults(pipeline: Path, **defaults: int) -> None:
    """Changes what a pipeline's folder takes for settings that are not given."""
    index = read_json(pipeline / "model_index.json")
    (pipeline / "model_index.json").write_text(json.dumps({**index, "call_defaults": defaults}), "utf-8")


def _write_training_data(folder: Path) -> None:
    write_clips(folder / "CLIPS", 4)
    (annotations,) = write_opens2v(folder / "OpenS2V-5M", clips=2).annotations
    records = annotations.read_text("utf-8")
    annotations.write_text(records.replace('"aesthetic": 5.07', '"aesthetic": 6.0'), "utf-8")  # pages ask for > 5.5
    for name in ("Jsons", "Videos"):
        (folder / name).symlink_to(folder / "OpenS2V-5M" / name)
    shutil.copytree(folder / "OpenS2V-5M/Videos/total_part1", folder / "Koala-36M")
    videos = sorted(file.stem for file in (folder / "Koala-36M").iterdir())
    rows = [_phantom_row(*pair) for pair in itertools.permutations(videos, 2)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "koala36M_multi_ref_merged_filtered.parquet")


def _write_refining_data(folder: Path) -> None:
    pipeline = tiny_refine_pipeline(num_inference_steps=1, alignment_seeds=1)
    pipeline.save_pretrained(folder / "refine-model")
    for name in ("unet", "vae", "scheduler"):
        getattr(pipeline, name).save_pretrained(folder / "stable-diffusion-v1-5/stable-diffusion-inpainting" / name)
    pipeline.image_encoder.save_pretrained(folder / "facebook/dinov2-with-registers-large")
    picture().save(folder / "mug.png")
    mask_of((30, 20, 50, 45)).save(folder / "logo.png")
    reference().save(folder / "mug-right.png")
    (folder / "logo-masks").mkdir()
    for number in range(2):
        mask_of((30, 20, 50, 45)).save(folder / f"logo-masks/{number}.png")
    write_video([picture()] * 2, folder / "clip.mp4")


def _phantom_row(clip: str, other: str) -> dict[str, Any]:
    """A subject of two clips, which fills most of the frame."""
    box = [50.0, 50.0, 700.0, 500.0]
    return phantom.row(clip, **{"a brick": phantom.pair([phantom.target(clip, box)], [phantom.other(other, box)])})


def _write_evaluation_data(folder: Path) -> None:
    write_benchmark(folder / "OpenS2V-Eval")
    for name in ("run-a", "run-b"):
        write_results(folder / name)
    for name in ("motion_smoothness", "nexus", "naturalness"):
        write_official(folder / "official-tools", name, {"singleface_1": PERFECT[name]})
    for name in WEIGHTS["human"]:
        write_official(folder / "their-scores", name, {"singlehuman_1": PERFECT[name]})
    scores = dict.fromkeys(WEIGHTS["open"], 0.5)
    write_upload(folder / "their-total.json", upload_json("open", scores))
    for hue, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir()
        for view in range(2):
            draw_pet(hue / 3 + view / 20).convert("RGB").save(folder / name / f"{view}.png")
    for pickle in ("aesthetic-model.pth", "glint360k_curricular_face_r101_backbone.bin"):
        torch.save({"weight": torch.zeros(1)}, folder / pickle)


# -- The reader -------------------------------------------------------------------------------------------------------


class Reader:
    """Goes through a page in the folder that is the working directory."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {}

    def run(self, block: Block) -> None:
        """Runs a block of commands or of Python; raises AssertionError or what the Python raises."""
        if block.language == "python":
            code = block.text
            for shown, small in SMALL_PYTHON.items():
                code = code.replace(shown, small)
            exec(compile(code, block.name, "exec"), self.namespace)
            return
        for words in read_commands(block.text):
            if words[0] in PROGRAMS:
                prepare(words)
                call(*words)
            else:
                check_program_of_others(words)

    def check(self, block: Block) -> None:
        """Checks of a block that is not run that its programs know the options, and modules the names."""
        if block.language == "python":
            check_imports(block)
            return
        for words in read_commands(block.text):
            if words[0] in PROGRAMS:
                understand(*words)
            elif words[0] in OTHERS and words[0] != "python":
                OTHERS[words[0]](words[1:])


def prepare(words: Sequence[str]) -> None:
    """What a reader does between two commands."""
    if words[:2] == ["refalign", "convert"]:  # of which other pages have the result already
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
    if words[:2] == ["refalign-eval", "total"]:
        complete_scores(Path(words[2]), words[3:])


def complete_scores(run: Path, others: Sequence[str]) -> None:
    """Writes into a run with videos the official tools' scores that are in no other folder."""
    samples = [video.stem for video in run.glob("*.mp4")]
    for name, metric in METRICS.items():
        file = metric.files[0]
        if samples and not any((Path(folder) / file).exists() for folder in (run / SCORES, *others)):
            write_official(run / SCORES, name, dict.fromkeys(filter(metric.applies, samples), PERFECT[name]))


def call(program: str, *words: str) -> None:
    """Runs a command of ours in this process, in small."""
    small = SMALL_OPTIONS.get(f"{program} {words[0]}", "").split()
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = PROGRAMS[program].main([*words, *small])
    assert code == 0, f"{program} {' '.join(words)}\n{told.getvalue()[-2000:]}"


def understand(program: str, *words: str) -> object:
    """What a program of ours makes of its options; SystemExit or ValueError if it does not understand them."""
    _, options = PROGRAMS[program].parse(words)
    if isinstance(options, RunCommand) and options.resume is None:  # else its folder has the rest
        check(options)
    return options


def check_imports(block: Block) -> None:
    """The code compiles, and the modules that it imports of ours have what it names."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refalign"):
            module = importlib.import_module(node.module or "")
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{block.name}: {node.module} has no {', '.join(missing)}"


# -- Programs of others: what is checked of their commands ------------------------------------------------------------


def check_program_of_others(words: Sequence[str]) -> None:
    assert words[0] in OTHERS, f"nobody knows how to run or check `{words[0]}`: mark the block as not run"
    OTHERS[words[0]](words[1:])


def check_make(words: Sequence[str]) -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    assert set(words) <= set(targets)


def check_pip(words: Sequence[str]) -> None:
    """The extras that are installed exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"\[([\w,]+)\]", " ".join(words))
    assert words[0] == "install"
    assert {extra for group in named for extra in group.split(",")} <= set(extras)


def check_hub_program(words: Sequence[str]) -> None:
    """`hf` knows the command and its options."""
    command, context = hub_program, hub_program.make_context("hf", list(words))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def check_launcher(parser: Any, words: Sequence[str]) -> None:
    """A launcher starts one of our programs, which understands the rest."""
    launch = parser.parse_args(words)
    assert launch.module
    understand(MODULES[launch.training_script], *launch.training_script_args)


def check_python(words: Sequence[str]) -> None:
    """Code on the command line is run; a module of ours exists."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
        return
    assert words[0] == "-c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *words[2:]])
        exec(words[1], {})


OTHERS: dict[str, Callable[[Sequence[str]], object]] = {
    "accelerate": lambda words: check_launcher(launch_command_parser(), words[1:]),
    "hf": check_hub_program,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "tensorboard": lambda words: TensorBoard().configure(["tensorboard", *words]),
    "torchrun": lambda words: check_launcher(get_args_parser(), words),
}
