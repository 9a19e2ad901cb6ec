"""
`refalign-eval artifacts`: does a Refine-by-Align model find the region of the reference, and does that help?

The folder is in the form of the paper's benchmark (arXiv 2412.00306), which is not public: `<id>/image.png`,
`mask.png`, `reference.png` and `reference_mask.png`, the true region. With `truth.png`, the right image, beside them,
errors are measured too.
Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign.files import check_new_file, new_file
from refalign_evaluation.bootstrap import mean_interval


if TYPE_CHECKING:
    from PIL import Image

    from refalign.pipeline_refine_by_align import RefineByAlignPipeline
    from refalign_evaluation.similarity import Features
    from refalign_evaluation.triplets import Task

GRID_STEPS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the timesteps, from clean to noise
BATCH = 16
ARMS = ("input", "whole", "predicted", "true")  # whose error and similarity are measured
# What is subtracted from what: above 0, the second is the better one
STEPS_DOWN = (("input", "whole"), ("whole", "predicted"), ("predicted", "true"))


@dataclass(frozen=True)
class Artifacts:
    """Measure a Refine-by-Align model: the region that it finds in the reference, and what it makes of it."""

    benchmark: Path
    """The folder of the triplets: in each of its folders image.png, mask.png, reference.png, reference_mask.png (the
    region that corresponds to the mask) and, if there is one, truth.png (what the image should be)."""
    model: str | None = None
    """The model to measure, as a pipeline folder or a Hub id. The default is the tiny one of this package."""
    sprites: int | None = None
    """The number of triplets of the small world to draw into --benchmark, if there is no such folder yet."""
    seen: bool = False
    """Let --sprites draw subjects that were trained on, to choose settings by. By default they never were."""
    grid: bool = False
    """Search the step and the block whose attention finds the region best, and print both curves of the paper."""
    plot: Path | None = None
    """The PNG file for the curves of --grid. It is replaced if it exists."""
    choose: bool = False
    """Write what --grid found into the configuration of --model, a folder: step, block, threshold and blur."""
    similarity: str | None = None
    """The model that says how similar the refined part is to the true region, as a folder or a Hub name of a DINOv2,
    DINOv3, SigLIP or CLIP. The default is the model's own image encoder."""
    limit: int | None = None
    """Measure the first so many triplets alone."""
    steps: int | None = None
    """The number of denoising steps. By default it is the model's own."""
    guidance_scale: float | None = None
    """How strongly the reference guides. By default it is the model's own."""
    align_only: bool = False
    """Measure the alignment alone, and refine nothing."""
    seed: int = 0
    """The seed of the noise."""
    json: Path | None = None
    """The file to write the figures to. It is replaced if it exists."""
    sheet: Path | None = None
    """The PNG file to draw the first triplets to, with the regions and the results. It is replaced if it exists."""
    device: str = "auto"
    """The device to compute on: cuda, cuda:1, mps or cpu. auto takes this machine's accelerator if it has one."""


def run(command: Artifacts) -> int:
    """
    Measures the model, prints the figures and returns the exit code.

    Raises:
        ValueError: if options do not fit, no triplet can be read, or there is no such model.
    """
    _check(command)
    from refalign.refine import load_refine_pipeline
    from refalign_evaluation.triplets import read_benchmark

    if command.sprites is not None and not command.benchmark.exists():
        from refalign_training.sprites.artifacts import write_benchmark

        write_benchmark(command.benchmark, command.sprites, seed=int(command.seen), held_out=not command.seen)
    tasks = read_benchmark(command.benchmark, command.limit)
    pipeline = load_refine_pipeline(command.model, command.device)
    pipeline.set_progress_bar_config(disable=True)
    figures = search(command, pipeline, tasks) if command.grid else measure(command, pipeline, tasks)
    print(describe_grid(figures) if command.grid else describe(figures))
    if command.json is not None:
        with new_file(command.json, overwrite=True) as file:
            file.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return 0


def _check(command: Artifacts) -> None:
    for name in ("sprites", "limit", "steps"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}: pass 1 or more.")
    for name in ("plot", "choose"):
        if getattr(command, name) and not command.grid:
            raise ValueError(f"--{name} is of the search by --grid. Pass that too, or leave --{name} out.")
    if command.choose and not (command.model and Path(command.model).is_dir()):
        raise ValueError("--choose writes into the model's folder. Pass it by --model.")
    for file in filter(None, (command.json, command.plot, command.sheet)):
        check_new_file(file, overwrite=True)


# -- Alignment and refinement -----------------------------------------------------------------------------------------


def measure(command: Artifacts, pipeline: "RefineByAlignPipeline", tasks: "Sequence[Task]") -> dict[str, Any]:
    """The figures of a model, each with its 95 % interval, beside those of simpler means."""
    import numpy as np

    from refalign_evaluation.alignment import best_constant, best_matching, overlaps
    from refalign_evaluation.similarity import load_features
    from refalign_evaluation.triplets import batches

    features = load_features(command.similarity, pipeline)
    alignments, rows, shown = [], [], []
    for batch in batches(tasks, BATCH):
        found = _align(pipeline, batch, command.seed)
        alignments += found
        if not command.align_only:
            images = refine(command, pipeline, batch, found)
            rows += _judge(batch, images, features)
            shown += list(zip(batch, found, images["predicted"], strict=True))
    guesses = {"model": overlaps(tasks, [alignment.mask for alignment in alignments])}
    guesses |= {"best_constant": best_constant(tasks), "best_matching": best_matching(pipeline, tasks)}
    figures: dict[str, Any] = {"triplets": len(tasks), "alignment": {}}
    for name, values in guesses.items():
        figures["alignment"][name] = {"mask": mean_interval(values.mask), "box": mean_interval(values.box)}
    figures["uses_whole"] = float(np.mean([alignment.uses_whole for alignment in alignments]))
    if rows:
        figures |= _summarise(rows)
    if command.sheet is not None and shown:
        with new_file(command.sheet, overwrite=True) as file:
            draw_sheet(shown[:8]).save(file)
    return figures


def _align(pipeline: "RefineByAlignPipeline", tasks: "Sequence[Task]", seed: int) -> list[Any]:
    from refalign_evaluation.triplets import generators_of, inputs_of

    return pipeline.align(*inputs_of(tasks), generator=generators_of(tasks, seed))


def refine(
    command: Artifacts, pipeline: "RefineByAlignPipeline", tasks: "Sequence[Task]", alignments: list[Any]
) -> "dict[str, list[Image.Image]]":
    """The images of each of [`ARMS`]: as they are, and refined from three regions with the same noise."""
    from refalign_evaluation.triplets import generators_of, inputs_of

    images: dict[str, list[Any]] = {"input": [task.image for task in tasks]}
    regions = {"whole": ["whole"] * len(tasks), "predicted": alignments, "true": [task.region for task in tasks]}
    for arm, region in regions.items():
        noise = generators_of(tasks, command.seed)
        settings = {"num_inference_steps": command.steps, "guidance_scale": command.guidance_scale}
        images[arm] = pipeline(*inputs_of(tasks), region=region, generator=noise, **settings).images
    return images


def _judge(
    tasks: "Sequence[Task]", images: "dict[str, list[Image.Image]]", features: "Features"
) -> list[dict[str, float]]:
    """A row of figures for each task."""
    import numpy as np

    from refalign.pipeline_refine_by_align import cut_square, on_white, square_around
    from refalign.reference_images import bounding_box

    side = 224
    regions = [cut_square(task.reference, square_around(bounding_box(task.region), 1.0), side) for task in tasks]
    wanted = features(regions)
    rows: list[dict[str, float]] = [{"outside": 0.0} for _ in tasks]
    for arm in ARMS:
        crops = []
        for task, image, row in zip(tasks, images[arm], rows, strict=True):
            square = square_around(bounding_box(task.mask), 1.0, task.image.size)
            crops.append(cut_square(image, square, side))
            change = np.abs(np.asarray(image).astype(int) - np.asarray(task.image))
            row["outside"] = max(row["outside"], float(change[~task.mask].max(initial=0)))
            if task.truth is not None:
                difference = np.abs(np.asarray(on_white(image)).astype(int) - np.asarray(task.truth))
                row[f"error_{arm}"] = float(difference[task.mask].mean() / 255)
        similarities = (features(crops) * wanted).sum(dim=-1)
        for row, value in zip(rows, similarities.tolist(), strict=True):
            row[f"similarity_{arm}"] = value
    return rows


def _summarise(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over the tasks, and how much better each arm is than the one before."""
    import numpy as np

    columns = {name: np.array([row[name] for row in rows if name in row]) for name in rows[0] | rows[-1]}
    figures: dict[str, Any] = {"error": {}, "similarity": {}, "less_error": {}}
    figures["outside"] = float(columns["outside"].max())
    for arm in ARMS:
        for kind in ("error", "similarity"):
            if f"{kind}_{arm}" in columns:
                figures[kind][arm] = mean_interval(columns[f"{kind}_{arm}"])
    for first, second in STEPS_DOWN:
        if f"error_{first}" in columns:
            less = columns[f"error_{first}"] - columns[f"error_{second}"]
            figures["less_error"][f"{second} than {first}"] = mean_interval(less)
    return figures


def describe(figures: dict[str, Any]) -> str:
    """The figures as a table for a terminal."""
    lines = [f"{figures['triplets']} triplets. IoU with the true region, with its 95 % interval:"]
    for name, both in figures["alignment"].items():
        lines.append(f"  {name:14} mask {_shown(both['mask'])}   box {_shown(both['box'])}")
    lines.append(f"  the whole reference was used for {figures['uses_whole']:.1%}")
    titles = {
        "error": "Error inside the mask, of 1, by the region that guides",
        "less_error": "How much less error that is",
        "similarity": "Similarity to the true region",
    }
    for kind, title in titles.items():
        if figures.get(kind):
            lines.append(f"{title}:")
            lines += [f"  {name:24} {_shown(value)}" for name, value in figures[kind].items()]
    if "outside" in figures:
        lines.append(f"Largest change outside the mask: {figures['outside']:g} of 255.")
    return "\n".join(lines)


def _shown(value: dict[str, Any]) -> str:
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def draw_sheet(shown: "Sequence[tuple[Task, Any, Image.Image]]") -> "Image.Image":
    """A row for each triplet: the image with its mask, the reference with map and box, the result."""
    from PIL import Image

    from refalign import refine

    rows = []
    for task, alignment, image in shown:
        rows.append(refine.draw_sheet(task.image, task.mask, task.reference, alignment, image))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height + 8 for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 8
    return sheet


# -- Step and block ---------------------------------------------------------------------------------------------------


def search(command: Artifacts, pipeline: "RefineByAlignPipeline", tasks: "Sequence[Task]") -> dict[str, Any]:
    """The IoU by step and block, the best of both, then of threshold and blur. With `--choose`, they are stored."""
    import numpy as np

    from refalign.pipeline_refine_by_align import cross_attention_blocks
    from refalign_evaluation.alignment import BLURS, THRESHOLDS, grid_overlaps, overlaps_of_maps, search_grid

    size = pipeline.config["reference_size"]
    threshold, blur = pipeline.config["map_threshold"], pipeline.config["map_blur"]
    maps = search_grid(pipeline, tasks, GRID_STEPS, command.seed, BATCH)
    found = grid_overlaps(tasks, maps, size, threshold, blur)
    step, block = map(int, np.unravel_index(found["mask"].argmax(), found["mask"].shape))
    by_level = {}
    for level in product(sorted({*THRESHOLDS, threshold}), sorted({*BLURS, blur})):
        by_level[level] = float(overlaps_of_maps(tasks, list(maps[step, block]), size, *level).mask.mean())
    chosen = {"alignment_step": GRID_STEPS[step], "alignment_block": block}
    chosen |= dict(zip(("map_threshold", "map_blur"), max(by_level, key=by_level.__getitem__), strict=True))
    figures = {
        "triplets": len(tasks),
        "steps": list(GRID_STEPS),
        "blocks": [name for name, _ in cross_attention_blocks(pipeline.unet)],
        "mask": found["mask"].tolist(),
        "box": found["box"].tolist(),
        "by_threshold_and_blur": {f"{value:g} {deviation:g}": iou for (value, deviation), iou in by_level.items()},
        "best": chosen,
    }
    if command.plot is not None:
        with new_file(command.plot, overwrite=True) as file:
            draw_curves(figures).savefig(file, dpi=100, format="png")
    if command.choose:
        store_choice(Path(str(command.model)), chosen)
    return figures


def store_choice(folder: Path, chosen: dict[str, Any]) -> None:
    """Writes the chosen settings into a pipeline folder's configuration."""
    from refalign.files import read_json

    index = folder / "model_index.json"
    content = read_json(index) | chosen
    with new_file(index, overwrite=True) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def describe_grid(figures: dict[str, Any]) -> str:
    """Both curves of the paper as tables for a terminal."""
    import numpy as np

    mask, box, best = np.array(figures["mask"]), np.array(figures["box"]), figures["best"]
    lines = [f"{figures['triplets']} triplets. IoU by block, the mean over steps:", "block   mask    box"]
    for number, name in enumerate(figures["blocks"]):
        lines.append(f"{number:5}  {mask[:, number].mean():.3f}  {box[:, number].mean():.3f}  {name}")
    block = best["alignment_block"]
    lines += [f"By step, at block {block}:", " step   mask    box"]
    for number, step in enumerate(figures["steps"]):
        lines.append(f"{step:5g}  {mask[number, block]:.3f}  {box[number, block]:.3f}")
    told = f"The best is block {block} at step {best['alignment_step']:g}, threshold {best['map_threshold']:g}"
    lines.append(f"{told}, blur {best['map_blur']:g}.")
    return "\n".join(lines)


def draw_curves(figures: dict[str, Any]) -> Any:
    """IoU by block, the mean over steps, and by step at the best block: the paper's two curves."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    by_block, by_step = figure.subplots(1, 2, sharey=True)
    block = figures["best"]["alignment_block"]
    for name in ("mask", "box"):
        values = np.array(figures[name])
        by_block.plot(values.mean(axis=0), marker="o", label=name)
        by_step.plot(figures["steps"], values[:, block], marker="o", label=name)
    by_block.set(xlabel="block, in forward order", ylabel="mean IoU", title="By block, the mean over steps", ylim=0)
    by_step.set(xlabel="step, from clean to noise", title=f"By step, at block {block}")
    by_block.legend()
    return figure
