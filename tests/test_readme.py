"""README and the guides are true: README's Python runs, and commands are understood by their programs."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import refalign.cli
import refalign_evaluation.cli
import refalign_training.cli
from refalign.video import read_video
from refalign_training.run.config import RunCommand, check, flatten
from tests.drawn_references import draw_face, draw_pet, draw_place


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
TRAINING = (ROOT / "docs/training.md").read_text("utf-8")
SPRITES = (ROOT / "docs/sprites.md").read_text("utf-8")
PROGRAMS = {
    "refalign": refalign.cli.PROGRAM,
    "refalign-train": refalign_training.cli.PROGRAM,
    "refalign-eval": refalign_evaluation.cli.PROGRAM,
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """README's images, in the folder where its snippets run."""
    monkeypatch.chdir(tmp_path)
    draw_face(0.1).save("woman.png")
    draw_pet(0.4).save("dog.png")
    draw_place(0.3).save("beach.jpg")


def test_the_python_of_a_user_writes_a_video(repo_folder, images):
    (code,) = (block for block in blocks("python") if "write_video(" in block)
    small = {"height=480": "height=32", "width=832": "width=48", "num_frames=81": "num_frames=5", '"cuda"': '"cpu"'}
    for shown, run in {**small, '"refalign-1.3b"': repr(str(repo_folder))}.items():
        assert shown in code  # else the full size would be computed
        code = code.replace(shown, run)
    exec(code, {})
    assert read_video("walk.mp4").shape == (5, 32, 48, 3)


def test_the_snippet_about_references_runs(images):
    (code,) = (block for block in blocks("python") if "prepare_reference_images" in block)
    exec(code.replace("cut_out=[True, False]", "cut_out=[False, False]"), {})  # True wants BiRefNet's weights


def commands() -> list[str]:
    lines = "".join(blocks("bash", README + TRAINING + SPRITES)).replace("\\\n", " ").splitlines()
    programs = ("refalign ", "refalign-train ", "refalign-eval ", "accelerate ", "torchrun ")
    return [line for line in dict.fromkeys(map(" ".join, map(str.split, lines))) if line.startswith(programs)]


def understand(program: str, arguments: list[str]) -> object:
    """What a program makes of its arguments; SystemExit or ValueError if it does not understand them."""
    if program in PROGRAMS:
        _, options = PROGRAMS[program].parse(arguments)
        if isinstance(options, RunCommand) and options.resume is None:  # else its folder has the rest
            check(options)
        return options
    parser = launch_command_parser() if program == "accelerate" else get_args_parser()
    launch = parser.parse_args(arguments[program == "accelerate" :])
    assert launch.module and launch.training_script == "refalign_training.cli"
    return understand("refalign-train", launch.training_script_args)


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    made = tmp_path / "refalign.yaml"  # by `refalign-train init`
    made.write_text("output: runs/a\ndata: {source: {data: folder, videos: CLIPS}, cache: cache/a}")
    program, *arguments = shlex.split(line.replace("--config refalign.yaml", f"--config {made}"), comments=True)
    assert understand(program, arguments)
    assert [word for word in arguments if word.endswith(".yaml") and not Path(word).is_file()] == []


def test_options_that_are_named_exist():
    options = flatten(RunCommand(Path()))
    sections = {name.partition(".")[0] for name in options if "." in name}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_.]+)`", TRAINING)
    assert len(named) > 10
    assert [name for name in named if name not in options] == []


LINKS = re.findall(r"\]\(([^):]+)\)", TRAINING)
HEADINGS = re.findall(r"^##+ (.*)$", TRAINING, flags=re.MULTILINE)


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link):
    path, _, heading = link.partition("#")
    assert (ROOT / "docs" / path).exists()
    assert not heading or heading in [re.sub("[^a-z0-9-]", "", line.lower().replace(" ", "-")) for line in HEADINGS]


OPTIONS = re.findall(r"^\| [^|]* \| ([^|]*`--[^|]*) \|$", README, flags=re.MULTILINE)
DATASETS = re.findall(r"^\| [^|]* \| (`--data [^|]* \| [^|]*) \|$", TRAINING, flags=re.MULTILINE)


@pytest.mark.parametrize("row", OPTIONS)
def test_its_table_of_options_is_understood(row):
    for options in re.findall(r"`(--[^`]*)`", row):
        words = ["generate", "--model", "m", *shlex.split(options.partition(",")[0])]
        assert understand("refalign", words)


@pytest.mark.parametrize("row", DATASETS)
def test_its_table_of_datasets_is_understood(row):
    options = [word for options in re.findall(r"`(--[^`]* [^`]*)`", row) for word in shlex.split(options)]
    assert understand("refalign-train", ["check", *options])
