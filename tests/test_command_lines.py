"""What all programs do alike: help that reads like a manual, the version, and errors that name what was wrong."""

import dataclasses
import errno
import logging
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

import refalign
import refalign.cli
import refalign_evaluation.cli
import refalign_training.cli
from refalign.command_line import Command, Program, description
from refalign_training.bounds import InvalidOption
from refalign_training.data.recipe import Recipe
from refalign_training.run.config import SECTIONS


ROOT = Path(__file__).parents[1]
MAINS = [refalign.cli.main, refalign_training.cli.main, refalign_evaluation.cli.main]
GROUPS = [refalign.cli.LORA, refalign.cli.REFINE]
PROGRAMS = [refalign.cli.PROGRAM, *GROUPS, refalign_training.cli.PROGRAM, refalign_evaluation.cli.PROGRAM]
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


@pytest.mark.parametrize(
    ("program", "words", "option", "values"),
    [
        (refalign.cli, "generate --lora a --seed 3 --lora b c", "lora", ("a", "b", "c")),
        (refalign.cli, "generate --reference a --references=b", "reference", ("a", "b")),
        (refalign.cli, "generate --cut_out true --prompt - --cut-out false", "cut_out", ("true", "false")),
        (refalign_evaluation.cli, "references --output o --blocks 0 --blocks 3", "blocks", (0, 3)),
        (refalign_evaluation.cli, "compare a b --output o", "others", (Path("b"),)),
    ],
)
def test_a_list_that_is_given_twice_adds_up(program, words, option, values):
    _, options = program.PROGRAM.parse(words.split())
    assert getattr(options, option) == values


def test_an_option_out_of_its_bounds_is_told_in_one_line(capsys):
    assert refalign_training.cli.main(["check", "--data", "folder", "--num-frames", "80"]) == 1
    assert capsys.readouterr().err == "refalign-train: num_frames is 80: it must be 4k + 1, such as 81.\n"
    with pytest.raises(InvalidOption, match="num_frames is 80"):
        Recipe(num_frames=80)


NASTY = "cat\x1b[2J\x9b2J\nrefalign: all is well\r\u202e\ud800 https://me:pass@example.com/x"
SHOWN = r"cat\x1b[2J\x9b2J\nrefalign: all is well\r\u202e\ud800 https://example.com/x"


@dataclasses.dataclass(frozen=True)
class Say:
    """Say a thing."""

    where: str
    """Where to say it."""


def say(command: Say) -> int:
    if command.where == "error":
        raise ValueError(NASTY)
    if command.where == "log":
        logging.getLogger("refalign.test").warning("%s is here", NASTY)
    else:
        print(NASTY.replace("\n", ""), "is here\nand done")
    return 0


@pytest.mark.parametrize(
    ("where", "code", "out", "err"),
    [
        ("error", 1, "", f"refalign: {SHOWN}\n".replace(r"\n", " ").replace(r"\r", " ")),
        ("log", 0, "", f"{SHOWN} is here\n"),
        ("output", 0, SHOWN.replace(r"\n", "") + " is here\nand done\n", ""),
    ],
)
def test_names_and_texts_of_others_command_no_terminal_and_tell_no_password(where, code, out, err):
    script = "import tests.test_command_lines as t; raise SystemExit(t.Program('refalign', '', t.SAY).main())"
    command = [sys.executable, "-c", script, "say", "--where", where]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, out, err)


SAY = {"say": Command(Say, say, "--where log")}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_option_of_a_run_is_described_in_sentences(section):
    for field in dataclasses.fields(section):
        text = description(section, field.name)
        if not dataclasses.is_dataclass(field.type):
            assert re.match(r"(?!Of )[A-Z]", text) and text.endswith("."), field.name


# -- Errors -----------------------------------------------------------------------------------------------------------


def ended_by(error: BaseException, *words: str) -> int:
    """The exit code of a program whose command raises an error."""

    def run(options: object) -> int:
        raise error

    return Program("tool", "A tool.", {"work": Command(Nothing, run, "")}).main(["work", *words])


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Options of a command that has none."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("a.yaml:\n  in line 3\tof it"), "a.yaml: in line 3 of it"),
        (KeyError("weights"), "'weights' (KeyError, command_line.py line "),
        (AssertionError(), "AssertionError (AssertionError, "),
        (OSError(errno.ENOSPC, "No space left on device", "out"), "device: 'out'. Free some space, or name an output"),
        (SafetensorError("I/O error: File too large (os error 27)"), "(os error 27). Free some space"),
        (sqlite3.OperationalError("database or disk is full"), "disk is full. Free some space"),
        (MemoryError(), "MemoryError. There is not enough memory: take a smaller size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory. There is not enough memory: "),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."), "2 GiB. There is not enough memory: "),
        (OverflowError("int too large"), "int too large (OverflowError, "),
        (RuntimeError("x" * 10_000), "x ... (RuntimeError, "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_is_told_in_one_line(capsys, error, told):
    assert ended_by(error) == 1
    line = capsys.readouterr().err
    assert line.startswith("tool: ") and told in line
    assert line.count("\n") == 1 and len(line) < 1500


def test_with_debug_the_traceback_is_shown_too(capsys):
    assert ended_by(ValueError("wrong"), "--debug") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("\nValueError: wrong\ntool: wrong\n")


def test_ctrl_c_while_options_are_read_is_told_in_one_line(capsys):
    def read(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert Program("tool", "A tool.", {"work": Command(Nothing, print, "", read)}).main(["work"]) == 130
    assert capsys.readouterr().err == "tool: interrupted; no unfinished file is left.\n"
