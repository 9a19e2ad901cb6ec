"""`refalign-train init | check | cache | run | export | sprites`: training from the command line.

Nothing heavy is imported before the command line is understood, so that `--help` answers at once.
"""

import sys
from typing import Any

import tyro

from refalign.command_line import Command, Program
from refalign_training import cache
from refalign_training.bounds import InvalidOption
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.command import read_command as read_cache
from refalign_training.data import check
from refalign_training.data.check import Check
from refalign_training.publish import export
from refalign_training.publish.export import ExportCommand
from refalign_training.run import init
from refalign_training.run.config import RunCommand
from refalign_training.run.config_files import cache_of, check_of, read_command, taking
from refalign_training.run.init import InitCommand
from refalign_training.sprites import command as sprites
from refalign_training.sprites.recipe import SpritesCommand


def _train(command: RunCommand) -> int:
    from refalign_training.run import refine_trainer, trainer

    return (refine_trainer if command.objective.kind == "refine" else trainer).run(command)


def _read_run(_: type, args: list[str], **told: Any) -> RunCommand:
    return read_command(args, **told)


def _export_of(command: RunCommand) -> ExportCommand:
    return ExportCommand(checkpoint=command.output, output=tyro.MISSING)


PROGRAM = Program(
    "refalign-train",
    "Train RefAlign, or adapters of it: check a dataset, cache what is computed once, train, export.",
    {
        "init": Command(InitCommand, init.run, "CLIPS --gpu-memory 24"),
        "check": Command(Check, check.run, "--data folder --videos CLIPS --preview preview", taking(check_of)),
        "cache": Command(
            CacheCommand,
            cache.run,
            "--data folder --videos CLIPS --output cache/mine --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers "
            "--teacher facebook/dinov3-vitb16-pretrain-lvd1689m",
            taking(cache_of, otherwise=read_cache),
        ),
        "run": Command(RunCommand, _train, "--config lora-1.3b --output runs/lora --steps 2000", _read_run),
        "export": Command(ExportCommand, export.run, "runs/lora --output my-lora", taking(_export_of)),
        "sprites": Command(SpritesCommand, sprites.run, "--output sprites"),
    },
    errors=(InvalidOption, ValueError, OSError, ImportError),
)


def main(words: list[str] | None = None) -> int:
    """Runs a command, by default that of the command line, and returns its exit code."""
    return PROGRAM.main(words)


if __name__ == "__main__":
    sys.exit(main())
