"""`refalign-eval`: evaluation from the command line.

Nothing heavy is imported before the command line is understood, so that `--help` answers at once.
"""

import sys

from refalign.command_line import Command, Program
from refalign_evaluation import artifacts, card, compare, generate, references, score, sprites, total
from refalign_evaluation.artifacts import Artifacts
from refalign_evaluation.card import Card
from refalign_evaluation.compare import Compare
from refalign_evaluation.generate import Generate
from refalign_evaluation.references import References
from refalign_evaluation.score import Score
from refalign_evaluation.sprites import Sprites
from refalign_evaluation.total import Total


PROGRAM = Program(
    "refalign-eval",
    "Measure models that make videos of reference images.",
    {
        "generate": Command(Generate, generate.run, "--benchmark OpenS2V-Eval --model org/refalign-14b --output run"),
        "score": Command(Score, score.run, "--videos run --benchmark OpenS2V-Eval --metrics motion_amplitude"),
        "total": Command(Total, total.run, "run"),
        "compare": Command(Compare, compare.run, "run-a run-b --published --output report"),
        "card": Command(Card, card.run, "run --model refalign-14b"),
        "references": Command(References, references.run, "--references cat dog owl --output tokens"),
        "sprites": Command(Sprites, sprites.run, "--model sprites/model --json figures.json --sheet clips.png"),
        "artifacts": Command(Artifacts, artifacts.run, "--benchmark triplets --sprites 200 --model sprites/refine"),
    },
)


def main(words: list[str] | None = None) -> int:
    """Runs a command, by default that of the command line, and returns its exit code."""
    return PROGRAM.main(words)


if __name__ == "__main__":
    sys.exit(main())
