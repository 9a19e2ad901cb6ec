"""Published results of OpenS2V-Eval, from `published.json`: cards and comparisons quote no others."""

from dataclasses import dataclass, field
from importlib.resources import as_file, files

from refalign.files import read_json
from refalign_evaluation.benchmark import Split


SPLIT: Split = "open"  # of all rows


@dataclass(frozen=True)
class Published:
    """The published results of a model, in percent."""

    model: str
    total: float
    """TotalScore v1.1."""
    source: str
    """Who published it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """By our names of metrics; empty where only the total is published."""
    closed: bool = False
    """Whether the weights are not to be had."""
    date: str = ""
    """When it was published, where that is known."""
    note: str = ""
    """What must be known to read the figures."""


def published() -> tuple[Published, ...]:
    """All published results, of the open domain."""
    with as_file(files("refalign_evaluation") / "published.json") as file:
        rows = read_json(file)["rows"]
    return tuple(Published(**row) for row in rows)
