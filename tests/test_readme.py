"""README is true: its Python runs and its commands are understood."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from refalign.cli import Command
from refalign.video import read_video
from refalign_training.cli import Command as TrainingCommand
from tests.drawn_references import draw_face, draw_pet, draw_place


README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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


COMMANDS = {"refalign ": Command, "refalign-train ": TrainingCommand}


def commands() -> list[str]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(tuple(COMMANDS))]


@pytest.mark.parametrize("line", commands())
def test_its_commands_are_understood(line):
    program, *arguments = shlex.split(line, comments=True)
    assert tyro.cli(COMMANDS[f"{program} "], args=arguments)


OPTIONS = re.findall(r"^\| [^|]* \| ([^|]*`--[^|]*) \|$", README, flags=re.MULTILINE)
DATASETS = re.findall(r"^\| [^|]* \| (`--data [^|]* \| [^|]*) \|$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("row", OPTIONS)
def test_its_table_of_options_is_understood(row):
    for options in re.findall(r"`(--[^`]*)`", row):
        assert tyro.cli(Command, args=["generate", "--model", "m", *shlex.split(options.partition(",")[0])])


@pytest.mark.parametrize("row", DATASETS)
def test_its_table_of_datasets_is_understood(row):
    options = [word for options in re.findall(r"`(--[^`]* [^`]*)`", row) for word in shlex.split(options)]
    assert tyro.cli(TrainingCommand, args=["check", *options])
