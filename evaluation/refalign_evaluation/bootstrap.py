"""How sure a difference of two runs is: paired bootstrap intervals (Efron, 1979) over the samples that both have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refalign_evaluation.results import Results
from refalign_evaluation.scores import METRICS, Metric
from refalign_evaluation.totals import WEIGHTS


if TYPE_CHECKING:
    import numpy as np

TOTAL = "total"
FEWEST = 2  # samples that an interval can be of
COVERED = (2.5, 97.5)  # percent: the interval is of 95 %


@dataclass(frozen=True)
class Difference:
    """How much more a run has than another one, as a fraction, over the samples that both have."""

    value: float
    low: float
    """Where the 95% interval begins."""
    high: float
    """Where it ends."""
    samples: int
    """The number of samples that both runs have: with a raw score of the metric, or, for the total, at all."""


def differences(first: Results, other: Results, resamples: int = 10_000, seed: int = 0) -> dict[str, Difference]:
    """
    By how much `other` differs from `first`, by our names of metrics and as `total`.

    Samples are drawn anew with all their scores, `resamples` times. A metric is left out of which either run counts
    fewer than two of the shared videos, and then the total is too.

    Args:
        resamples (`int`, defaults to 10,000): the number of draws.
        seed (`int`, defaults to 0): of the draws. The same seed gives the same intervals.
    """
    import numpy as np

    shared = [sample_id for sample_id in first.samples if sample_id in set(other.samples)]
    if len(shared) < FEWEST:
        return {}
    draws = np.random.default_rng(seed).multinomial(len(shared), np.full(len(shared), 1 / len(shared)), resamples)
    weights = np.concatenate([np.ones((1, len(shared))), draws])  # the first row gives the difference itself
    found, total = {}, np.zeros(resamples + 1)
    for name, weight in WEIGHTS[first.split].items():
        raws = first.measured[name].raw, other.measured[name].raw
        both = [sample_id for sample_id in shared if sample_id in raws[0] and sample_id in raws[1]]
        clipped = [_clipped(METRICS[name], raw, both) for raw in raws]
        if min(np.isfinite(values).sum() for values in clipped) < FEWEST:
            continue
        places = [shared.index(sample_id) for sample_id in both]
        before, after = (_scores(METRICS[name], values, weights[:, places]) for values in clipped)
        found[name] = _difference(after - before, len(both))
        total += weight * (after - before)
    if found.keys() == WEIGHTS[first.split].keys():
        found = {TOTAL: _difference(total, len(shared)), **found}
    return found


def mean_interval(values: "np.ndarray", resamples: int = 10_000, seed: int = 0) -> dict[str, float | int]:
    """The mean of samples' values `(samples,)`, with its 95 % interval: `value`, `low`, `high`, `samples`."""
    import numpy as np

    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), COVERED)
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "samples": len(values)}


def _clipped(metric: Metric, raw: Mapping[str, float], samples: Sequence[str]) -> "np.ndarray":
    """What enters the mean of each sample, nan for a video that does not count."""
    import numpy as np

    values = [metric.clip(raw[sample_id]) for sample_id in samples]
    return np.array(values, dtype=float)


def _scores(metric: Metric, clipped: "np.ndarray", weights: "np.ndarray") -> "np.ndarray":
    """The score of each draw `(draws,)`, nan for one without a video that counts."""
    import numpy as np

    counts = np.isfinite(clipped)
    numbers = weights @ counts
    with np.errstate(invalid="ignore"):
        means = weights @ np.where(counts, clipped, 0.0) / numbers
    return (means - metric.low) / (metric.high - metric.low)


def _difference(drawn: "np.ndarray", samples: int) -> Difference:
    import numpy as np

    low, high = np.nanpercentile(drawn[1:], COVERED)
    return Difference(float(drawn[0]), float(low), float(high), samples)
