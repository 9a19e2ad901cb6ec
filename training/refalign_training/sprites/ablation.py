"""
`refalign-train sprites --ablation`: what the parts of the reference alignment loss do in the small world.

Each arm is trained by the recipe with one thing changed, measured, and added to `ablation.json`. Called again, it goes
on with the arm that was broken off; table and pictures are made of what is done.
"""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refalign.files import new_file


if TYPE_CHECKING:
    from refalign_training.sprites.recipe import SpritesCommand


logger = logging.getLogger(__name__)

# What differs from the recipe
ARMS: dict[str, list[str]] = {
    "no RA loss": ["--alignment.weight", "0"],
    "positive and negative": [],
    "positive only": ["--alignment.negative-weight", "0"],
    "gate off": ["--alignment.gate-power", "0"],
    "1 layer": ["--alignment.layers", "0"],
    "3 layers": ["--alignment.layers", "0", "1", "2"],
    "all layers": ["--alignment.layers", "0", "1", "2", "3", "4", "5"],
}
SEEDS = (0, 1, 2)
STEPS = 4_000  # past the point where references are bound to places
MEASURES = ("identity", "identity_same_colours", "motion", "both_right", "swapped", "doubled", "missing", "copy_paste")
RESULTS = "ablation.json"


def run(command: "SpritesCommand") -> int:
    """Trains the arms that are missing, all with one seed before the next, and returns the exit code."""
    from refalign_training.sprites.recipe import make_model, train

    folder = command.output / "ablation"
    folder.mkdir(parents=True, exist_ok=True)
    steps = command.steps or STEPS
    results = _read(folder / RESULTS)
    done = [(result["name"], result["steps"]) for result in results]
    for seed in SEEDS:
        for arm, options in ARMS.items():
            name = f"{arm.replace(' ', '-')}-{seed}"
            if (name, steps) in done:
                continue
            logger.info("Arm %s, seed %d", arm, seed)
            schedule = ["--steps", str(steps), "--objective.detail-steps", str(steps * 4 // 5)]
            train(command, folder / name, [*options, *schedule, "--seed", str(seed)])
            if not (folder / name / "model").is_dir():
                make_model(command, folder / name, folder / name / "model")
            figures = json.loads((folder / name / "model.json").read_text("utf-8"))
            results.append({"name": name, "arm": arm, "seed": seed, "steps": steps, "figures": figures})
            _write(results, folder)
    return 0


def _read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else []


def _write(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    with new_file(folder / RESULTS, overwrite=True) as file:
        file.write_text(json.dumps(list(results), indent=2) + "\n", "utf-8")
    with new_file(folder / "ablation.md", overwrite=True) as file:
        file.write_text(table(results), "utf-8")
    plot(results, folder / "ablation.png")
    plot_features(results, folder, folder / "features.png")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The means over seeds as a Markdown table, with the spread from the lowest to the highest."""
    lines = [f"| arm | seeds | {' | '.join(MEASURES)} |", "|---" * (2 + len(MEASURES)) + "|"]
    for arm in ARMS:
        columns = {name: _values(results, arm, name) for name in MEASURES}
        if count := len(columns[MEASURES[0]]):
            lines.append(f"| {arm} | {count} | {' | '.join(map(_cell, columns.values()))} |")
    return "\n".join(lines) + "\n"


def _values(results: Sequence[Mapping[str, Any]], arm: str, name: str) -> list[float]:
    """An arm's figures of that name, one for each seed that is done."""
    return [result["figures"][name] for result in results if result["arm"] == arm]


def _cell(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.0f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.0f}-{100 * max(values):.0f})"


def plot(results: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Each arm's measures, with a dot for each seed."""
    from matplotlib.figure import Figure

    arms = [arm for arm in ARMS if _values(results, arm, "identity")]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(arms)), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for panel, name in zip(panels, ("identity", "identity_same_colours", "motion", "both_right"), strict=True):
        for row, arm in enumerate(arms):
            values = _values(results, arm, name)
            panel.plot(values, [row] * len(values), "o", color="#0072B2", alpha=0.7)
        panel.set(title=name.replace("_", " "), xlim=(0, 1), ylim=(len(arms) - 0.5, -0.5))
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(arms)), arms)
    with new_file(output, overwrite=True) as file:
        figure.savefig(file, format="png", dpi=120)


def plot_features(results: Sequence[Mapping[str, Any]], folder: Path, output: Path, count: int = 6) -> None:
    """
    Reference tokens of the second block, and the teacher's, by their first three principal components as colours: of
    held-out figures, in each arm's first seed.
    """
    from matplotlib.figure import Figure

    from refalign_training.cache.reader import Cache

    cache = Cache(folder.parent / "cache-held-out", ("video", "references", "text", "teacher"))
    values = [cache.read(cache.samples[row], prompt=0) for row in range(count)]
    rows = {"teacher": [value["teacher_features"][0].flatten(0, 1) for value in values]}
    for result in results:
        if result["seed"] == 0:
            rows[result["arm"]] = _reference_tokens(folder / result["name"] / "model", values)
    figure = Figure(figsize=(1.3 * count + 1.6, 1.3 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, tokens) in enumerate(rows.items()):
        colours = _principal_colours(torch.stack(tokens))
        for column, picture in enumerate(colours):
            side = round(len(picture) ** 0.5)
            panels[row][column].imshow(picture.view(side, side, 3).numpy())
            panels[row][column].set(xticks=[], yticks=[])
        panels[row][0].set_ylabel(name, rotation=0, ha="right", va="center")
    with new_file(output, overwrite=True) as file:
        figure.savefig(file, format="png", dpi=120)


@torch.no_grad()
def _reference_tokens(model: Path, values: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    from refalign import RefAlignWanTransformer3DModel

    transformer = RefAlignWanTransformer3DModel.from_pretrained(model, subfolder="transformer")
    tokens = []
    for value in values:
        output = transformer(
            hidden_states=torch.randn(value["latents"][None].shape, generator=torch.Generator().manual_seed(0)),
            timestep=torch.tensor([900.0]),
            encoder_hidden_states=value["prompt_embeds"][None],
            reference_hidden_states=value["reference_latents"][None],
            output_reference_layers=[1],
        )
        count = output.reference_hidden_states[0].shape[1] // value["reference_latents"].shape[1]
        tokens.append(output.reference_hidden_states[0][0, :count])
    return tokens


def _principal_colours(tokens: torch.Tensor) -> torch.Tensor:
    """`(pictures, tokens, dim)` to `(pictures, tokens, 3)` in [0, 1]."""
    flat = tokens.float().flatten(0, 1)
    flat = flat - flat.mean(0)
    _, _, directions = torch.pca_lowrank(flat, q=3, niter=4)
    values = flat @ directions
    low, high = values.quantile(0.02, 0), values.quantile(0.98, 0)
    return ((values - low) / (high - low)).clamp(0, 1).view(*tokens.shape[:2], 3)
