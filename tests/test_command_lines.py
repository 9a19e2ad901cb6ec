"""What all programs do alike: help that reads like a manual, the version, and errors that name what was wrong."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import refalign
import refalign.cli
import refalign_evaluation.cli
import refalign_training.cli
from refalign.command_line import Program, description
from refalign_training.bounds import InvalidOption
from refalign_training.data.recipe import Recipe
from refalign_training.run.config import SECTIONS


ROOT = Path(__file__).parents[1]
MAINS = [refalign.cli.main, refalign_training.cli.main, refalign_evaluation.cli.main]
PROGRAMS = [refalign.cli.PROGRAM, refalign.cli.LORA, refalign_training.cli.PROGRAM, refalign_evaluation.cli.PROGRAM]
COMMANDS = [
    pytest.param(program, name, id=f"{program.name} {name}")
    for program in PROGRAMS
    for name, command in program.commands.items()
    if not isinstance(command, Program)
]


def told(capsys, program: Program, *words: str) -> str:
    """What a program prints instead of running a command."""
    with pytest.raises(SystemExit) as exit:
        program.parse(words)
    printed = capsys.readouterr()
    assert exit.value.code == (2 if printed.err else 0)
    return printed.err or printed.out


@pytest.mark.parametrize("main", MAINS)
def test_the_version_is_told(capsys, main):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert re.fullmatch(rf"refalign\S* {re.escape(refalign.__version__)}\n", capsys.readouterr().out)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("main", MAINS, ids=lambda main: main.__module__)
def test_a_reader_that_has_seen_enough_is_no_error(main, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as closed:
        command = [sys.executable, "-m", main.__module__, "--help"]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, env=environment, text=True)
    assert ended.stderr == ""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
class TestProgram:
    def test_its_help_names_every_command(self, capsys, program):
        help = told(capsys, program, "--help")
        assert help.startswith(f"usage: {program.name} COMMAND")
        assert all(re.search(rf"^  {name} +[A-Z]", help, re.MULTILINE) for name in program.commands)

    def test_an_unknown_command_is_named(self, capsys, program):
        error = told(capsys, program, "trian")
        assert error.startswith(f"{program.name}: There is no command 'trian'. The commands are ")
        assert error.count("\n") == 1

    def test_a_misspelt_command_is_corrected(self, capsys, program):
        name = next(iter(program.commands))
        assert f"There is no command '{name}x'. Did you mean {name}?" in told(capsys, program, f"{name}x")

    def test_a_missing_command_is_asked_for(self, capsys, program):
        assert f"{program.name}: Name a command: " in told(capsys, program)


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_help_begins_with_what_is_required_and_ends_with_an_example(capsys, monkeypatch, program, name):
    monkeypatch.setenv("COLUMNS", "200")
    help = told(capsys, program, name, "--help")
    required = re.search(r"^Required: (.*)\.$", help, re.MULTILINE)
    names = required[1].split(", ") if required else []
    assert help.count("(required)") == len(names)
    assert not required or required.start() < help.index("-h, --help")
    assert help.endswith(f"\n\nExample:\n  {program.name} {name} {program.commands[name].example}\n")


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_the_example_is_understood(monkeypatch, program, name):
    monkeypatch.chdir(ROOT)
    command, options = program.parse([name, *shlex.split(program.commands[name].example)])
    assert isinstance(options, command.options)


def test_an_option_out_of_its_bounds_is_told_in_one_line(capsys):
    assert refalign_training.cli.main(["check", "--data", "folder", "--num-frames", "80"]) == 1
    assert capsys.readouterr().err == "refalign-train: num_frames is 80: it must be 4k + 1, such as 81.\n"
    with pytest.raises(InvalidOption, match="num_frames is 80"):
        Recipe(num_frames=80)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_option_of_a_run_is_described_in_sentences(section):
    for field in dataclasses.fields(section):
        text = description(section, field.name)
        if not dataclasses.is_dataclass(field.type):
            assert re.match(r"(?!Of )[A-Z]", text) and text.endswith("."), field.name
