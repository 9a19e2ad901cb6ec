"""Pictures of a run: its losses, and the timesteps that are drawn. PNG files, written as a whole."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refalign.files import new_file


if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart too
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
TRAINING_LOSSES = {
    "loss": ("total", PURPLE),
    "loss/diffusion": ("diffusion: w(t) · MSE", BLUE),
    "loss/mse": ("MSE", GREEN),
}
VALIDATION_LOSSES = {"validation/mse": ("validation: MSE", GREEN)}
BINS = 50


def plot_losses(metrics_file: Path, output: Path) -> None:
    """Draws the losses in a run's `metrics.jsonl` over its steps, as they were logged and smoothed; below them the
    alignment's, if there is one. Raises ValueError if the file cannot be read, or holds no loss."""
    from refalign_training.run.log import read_metrics

    lines = read_metrics(metrics_file)
    if not any(_series(lines, name)[0] for name in (*TRAINING_LOSSES, *VALIDATION_LOSSES)):
        raise ValueError(f"{metrics_file} holds no loss yet. The first line comes after log.every steps.")
    has_alignment = bool(_series(lines, "loss/alignment")[0])
    figure = _figure(height=7.5 if has_alignment else 4.5)
    panels = figure.subplots(1 + has_alignment, 1, sharex=True, squeeze=False)[:, 0]
    _draw_losses(panels[0], lines)
    if has_alignment:
        _draw_alignment(panels[1], lines)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _save(figure, output)


def _draw_losses(axes: "Axes", lines: Sequence[Mapping[str, Any]]) -> None:
    for name, (label, color) in TRAINING_LOSSES.items():
        if name != "loss" or _series(lines, "loss") != _series(lines, "loss/diffusion"):  # alike without alignment
            _draw(axes, *_series(lines, name), label, color)
    for name, (label, color) in VALIDATION_LOSSES.items():
        steps, values = _series(lines, name)
        if steps:
            axes.plot(steps, values, "o--", color=color, markersize=5, markeredgecolor="white", label=label)
    axes.set_ylabel("loss")
    _limit(axes)
    _finish(axes, "Losses", axes.get_lines())


def _draw_alignment(axes: "Axes", lines: Sequence[Mapping[str, Any]]) -> None:
    _draw(axes, *_series(lines, "loss/alignment"), "alignment loss, before gate and weight", RED)
    right = axes.twinx()
    _draw(right, *_series(lines, "alignment/cosine"), "mean cosine to the teacher", ORANGE)
    axes.set_ylabel("alignment loss")
    right.set_ylabel("cosine")
    right.spines[["top", "left"]].set_visible(False)
    _limit(axes)
    _finish(axes, "Reference alignment", [*axes.get_lines(), *right.get_lines()], spines=("top",))


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it is a number."""
    steps, values = [], []
    for line in lines:
        if line.get(name) is not None:
            steps.append(line["step"])
            values.append(line[name])
    return steps, values


def _draw(axes: "Axes", steps: Sequence[int], values: Sequence[float], label: str, color: str) -> None:
    """A metric as logged, light, and smoothed; a single point as a point."""
    if len(steps) > 1:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    if steps:
        marker = "o" if len(steps) == 1 else ""
        axes.plot(steps, _smooth(values), color=color, linewidth=2, marker=marker, label=label)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of the middle half of the values around each: no lag, and no spike of one bad batch."""
    reach = min(math.ceil(len(values) / 40), 50)
    smoothed = []
    for i in range(len(values)):
        around = sorted(values[max(0, i - reach) : i + reach + 1])
        middle = around[len(around) // 4 : len(around) - len(around) // 4]
        smoothed.append(math.fsum(middle) / len(middle))
    return smoothed


def _limit(axes: "Axes") -> None:
    """Lets the few highest values leave the panel, so that a spike does not press the rest flat."""
    heights = np.concatenate([np.asarray(line.get_ydata()) for line in axes.get_lines()])
    low, high = np.quantile(heights, (0, 0.995), method="inverted_cdf")
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    axes.set_ylim(low - margin, high + 3 * margin)


def plot_timesteps(preset: str, output: Path, gate_power: float = 3.0) -> None:
    """Draws how often a preset of [`timestep_table`] draws each timestep, and what its losses weigh, with
    [`timestep_gate`]'s power. Raises ValueError for an unknown preset."""
    from refalign_training.method.losses import timestep_gate, timestep_table

    timesteps, weights = timestep_table(preset)
    gate = timestep_gate(timesteps, gate_power)
    figure = _figure(height=6.5)
    top, bottom = figure.subplots(2, 1, sharex=True)
    bins = {"bins": BINS, "range": (0, 1000)}
    drawn = [100 / len(timesteps)] * len(timesteps)
    top.hist(timesteps.tolist(), weights=drawn, color=BLUE, alpha=0.35, label="samples", **bins)
    for values, label, color in ((weights, "samples · w(t)", BLUE), (gate, "samples · gate(t)", RED)):
        share = 100 * values / values.sum()
        style = {"histtype": "step", "linewidth": 2}
        top.hist(timesteps.tolist(), weights=share.tolist(), color=color, label=label, **style, **bins)
    bottom.plot(timesteps, weights, color=BLUE, linewidth=2, label="w(t), of the diffusion loss")
    bottom.plot(timesteps, gate, color=RED, linewidth=2, label=f"gate(t) = (t/1000)^{gate_power:g}, of the alignment")
    bottom.set(xlabel="timestep t (1000: noise alone)", ylabel="weight", xlim=(0, 1000))
    bottom.set_ylim(bottom=0)
    top.set_ylabel(f"% in {1000 // BINS} timesteps")
    _finish(top, f"Timesteps: {preset}", top.get_legend_handles_labels()[0])
    _finish(bottom, "Weights", bottom.get_lines())
    _save(figure, output)


def describe_timesteps(preset: str) -> str:
    """Two lines about a preset's timesteps and weights. Raises ValueError for an unknown preset."""
    from refalign_training.method.losses import timestep_table

    timesteps, weights = timestep_table(preset)
    timesteps, weights = timesteps.flip(0), weights.flip(0)
    count = len(timesteps)
    low, middle, high = timesteps[[count // 10, count // 2, count * 9 // 10]].tolist()
    shares = (weights / weights.sum()).cumsum(0)
    half = timesteps[(shares < 0.5).sum()].item()
    return (
        f"Timesteps ({preset}): a tenth below {low:.0f}, half below {middle:.0f}, a tenth above {high:.0f}.\n"
        f"Weights w(t): {weights.min():.2f} to {weights.max():.2f}, mean {weights.mean():.2f}; half of all weight "
        f"below {half:.0f}."
    )


def _figure(height: float) -> "Figure":
    """A figure of its own, without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), dpi=120, layout="constrained")


def _finish(axes: "Axes", title: str, handles: Sequence["Artist"], spines: Sequence[str] = ("top", "right")) -> None:
    """Title and legend above the panel, where they hide no data; a light grid."""
    axes.set_title(title, loc="left", fontweight="bold", fontsize="medium")
    named = [handle for handle in handles if not str(handle.get_label()).startswith("_")]
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    axes.legend(handles=named, ncols=len(named), frameon=False, fontsize="small", **place)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[list(spines)].set_visible(False)


def _save(figure: "Figure", output: Path) -> None:
    with new_file(output, overwrite=True) as file:
        figure.savefig(file, format="png")
