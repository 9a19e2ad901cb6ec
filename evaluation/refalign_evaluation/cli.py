"""`refalign-eval sprites`: evaluation from the command line.

Nothing heavy is imported before the command line is understood, so that `--help` answers at once.
"""

import logging
import sys

import tyro

from refalign_evaluation.sprites import Sprites


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code. Errors of users are told in one line, without a traceback."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"sprites": Sprites},
        args=arguments,
        prog="refalign-eval",
        description="Evaluation of reference-to-video models.",
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        from refalign_evaluation import sprites

        return sprites.run(command)
    except (ValueError, OSError, ImportError) as error:
        print(f"refalign-eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("refalign-eval: interrupted; no unfinished file is left.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
