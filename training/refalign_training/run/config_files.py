"""Where the options of a command line come from: a file, a recipe of this package, or the run that goes on.

Nothing heavy is imported.
"""

import argparse
import dataclasses
import logging
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import tyro

from refalign.files import new_file
from refalign_training.cache.command import OF_VIDEOS, CacheCommand, Family
from refalign_training.data.check import Check
from refalign_training.data.source import Source
from refalign_training.run.config import CONFIG_FILE, RunCommand, naming_sections, to_yaml, validated
from refalign_training.run.yaml_file import read_yaml


logger = logging.getLogger(__name__)


def read_command(words: Sequence[str], **told: Any) -> RunCommand:
    """The options that a command line gives. Those of `--config FILE` are its defaults; without one, `--resume` takes
    those of the run that goes on.

    Args:
        told: more arguments of `tyro.cli`, such as the program's name.

    Raises:
        ValueError: if an option is unknown or cannot be used.
        SystemExit: if the command line is not understood, or asks for help.
    """
    given, _ = _FILES.parse_known_args(words)
    path = find_config(given.config) if given.config else _options_of_run(given.resume, given.output)
    defaults = tyro.MISSING_NONPROP if path is None else read_config(path)
    with naming_sections():
        return tyro.cli(RunCommand, args=words, default=defaults, **told)


_FILES = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
"""What of a command line says where other options are; tyro tells what is wrong with it."""
for _name in ("--config", "--resume", "--output"):
    _FILES.add_argument(_name, nargs="?")


def find_config(name: str) -> Path:
    """The file of options that is meant: a path, or the name of a recipe that comes with this package. Raises
    ValueError if there is none."""
    path = Path(name)
    if path.is_file():
        return path
    recipes = {Path(file.name).stem: file for file in files("refalign_training.configs").iterdir()}
    if recipe := recipes.get(name.removesuffix(".yaml")):
        return Path(str(recipe))
    names = ", ".join(sorted(recipes.keys() - {"__init__", "__pycache__", "accelerate"}))
    raise ValueError(f"{path} does not exist. Name a YAML file, or one of this package's recipes: {names}.")


def _options_of_run(resume: str | None, output: str | None) -> Path | None:
    """The options of the run that `--resume` goes on with, as its folder holds them."""
    if resume is None:
        return None
    if resume in ("latest", "auto"):
        folders = [Path(output)] if output else []
    else:
        folders = [Path(resume), *Path(resume).parents[1:2]]  # a run, or one of its checkpoints
    own = (folder / CONFIG_FILE for folder in folders)
    return next(filter(Path.is_file, own), None)


def read_config(path: Path) -> RunCommand:
    """The options of a YAML file, defaults for what it does not name. Where it names no output, tyro asks for it."""
    content = read_yaml(path)
    if "config" in content:
        raise ValueError(f"{path} names another file as config, but a run has one.")
    with naming_sections(f"{path}: "):
        command = validated({"output": ".", **content})
    if "output" not in content:
        vars(command)["output"] = tyro.MISSING
    return command


def keep_options(command: RunCommand) -> None:
    """Writes the options into the run's folder. A user's own file there stays as it is, with its comments."""
    file = command.output / CONFIG_FILE
    if command.config is None or command.config.resolve() != file.resolve():
        with new_file(file, overwrite=True) as unnamed:
            unnamed.write_text(to_yaml(command), "utf-8")
        return
    there = read_config(file)
    vars(there)["output"] = command.output
    vars(there)["objective"] = dataclasses.replace(there.objective, family=command.objective.family).filled()
    if to_yaml(there) != to_yaml(command):
        logger.warning(
            "%s stays as it is: it does not have what the command line says besides. Say that again with --resume.",
            file,
        )


# -- Other commands, which take from a run's file what is theirs ------------------------------------------------------


def taking(defaults: Callable[[RunCommand], Any], otherwise: Callable[..., Any] = tyro.cli) -> Callable[..., Any]:
    """What reads a command that has `--config` too: `defaults` makes it of a run's options. Without `--config`,
    `otherwise` reads it."""

    def read(command: type, args: Sequence[str], **told: Any) -> Any:
        given, _ = _FILES.parse_known_args(args)
        if not given.config:
            return otherwise(command, args=args, **told)
        default = defaults(read_config(find_config(given.config)))
        return tyro.cli(command, args=args, default=default, **told)

    return read


def check_of(command: RunCommand) -> Check:
    """The check of a run's dataset."""
    source = command.data.source
    known = tyro.MISSING_NONPROP if source.data is None else Source(**vars(source))
    return Check(known, command.data.recipe)


def cache_of(command: RunCommand) -> CacheCommand:
    """The cache that a run reads, of its dataset."""
    data, model = command.data, command.model
    return CacheCommand(
        output=tyro.MISSING if data.cache is None else data.cache,
        source=data.source,
        recipe=data.recipe,
        model=None if command.objective.kind == "refine" else model.base,
        revision=model.revision,
        teacher=data.teacher,
        teacher_revision=data.teacher_revision,
        families=_families_of(command),
        device=command.device,
    )


def _families_of(command: RunCommand) -> tuple[Family, ...]:
    if command.objective.kind == "refine":
        return ("pictures",)
    return OF_VIDEOS if command.alignment.weight else OF_VIDEOS[:-1]
