"""`refalign-train check | cache | run | export | sprites`: training from the command line.

Nothing heavy is imported before the command line is understood, so that `--help` answers at once.
"""

import logging
import signal
import sys
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from refalign_training import cache
from refalign_training.bounds import InvalidOption
from refalign_training.cache.command import CacheCommand
from refalign_training.data import check
from refalign_training.data.check import Check
from refalign_training.publish import export
from refalign_training.publish.export import ExportCommand
from refalign_training.run.config import RunCommand, read_command
from refalign_training.sprites import command as sprites
from refalign_training.sprites.recipe import SpritesCommand


Command = (
    Annotated[Check, subcommand("check")]
    | Annotated[CacheCommand, subcommand("cache")]
    | Annotated[RunCommand, subcommand("run")]
    | Annotated[ExportCommand, subcommand("export")]
    | Annotated[SpritesCommand, subcommand("sprites")]
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code. Errors of users are told in one line, without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of an exception, so that nothing half is left
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        runners = {
            Check: check.run,
            CacheCommand: cache.run,
            RunCommand: _train,
            ExportCommand: export.run,
            SpritesCommand: sprites.run,
        }
        return runners[type(command)](command)
    except (InvalidOption, ValueError, OSError, ImportError) as error:
        print(f"refalign-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("refalign-train: interrupted; no unfinished file is left.", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> Any:
    """The command and its options that a command line gives."""
    if arguments[:1] == ["run"]:
        return read_command(arguments[1:])
    return tyro.cli(Command, args=arguments, prog="refalign-train", description="Training for RefAlign.")


def _train(command: RunCommand) -> int:
    from refalign_training.run import trainer

    return trainer.run(command)


if __name__ == "__main__":
    sys.exit(main())
