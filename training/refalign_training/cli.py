"""`refalign-train check | cache`: what a training run is made of, from the command line.

Nothing heavy is imported before the command line is understood, so that `--help` answers at once.
"""

import logging
import signal
import sys
from typing import Annotated

import tyro
from tyro.conf import subcommand

from refalign_training import cache, check
from refalign_training.cache import CacheCommand
from refalign_training.check import Check


Command = Annotated[Check, subcommand("check")] | Annotated[CacheCommand, subcommand("cache")]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code. Errors of users are told in one line, without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of an exception, so that nothing half is left
    try:
        command = tyro.cli(Command, args=arguments, prog="refalign-train", description="Training for RefAlign.")
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        return {Check: check.run, CacheCommand: cache.run}[type(command)](command)
    except (ValueError, OSError, ImportError) as error:
        print(f"refalign-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("refalign-train: interrupted; no unfinished file is left.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
