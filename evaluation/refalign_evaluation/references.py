"""
`refalign-eval references`: do a model's tokens of reference images go by the subject?

This is what the reference alignment loss claims to change (RefAlign, arXiv 2603.25743). What is measured, and how,
says [`refalign_evaluation.separability`]. Nothing heavy is imported before it is needed, so that `--help` answers at
once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refalign.files import check_free, new_folder
from refalign.sprites import FOLDER


if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from PIL import Image

    from refalign_evaluation.separability import Setting, View


RESULTS = "references.json"
ALIGNED = 9  # blocks that the paper aligns, from the first
SPRITE_VIEWS = 8
SPRITE_TILTS = (-40.0, 40.0)  # degrees
SPRITE_LIGHTS = (0.75, 1.1)


@dataclass(frozen=True, kw_only=True)
class References:
    """Show how well a model's tokens of reference images tell subjects apart: cosines, a linear probe, a picture."""

    model: tuple[str, ...] = ()
    """The models to compare, as pipeline folders or Hub ids. By default it is the tiny one of this package."""
    references: tuple[Path, ...] = ()
    """The folders of images, one for each subject, each with two views of it or more. Nothing else may lie there."""
    sprites: int | None = None
    """For a first try: draw so many figures of the small world, eight views each, instead of --references."""
    output: Path
    """The new folder to write references.json and a picture for each timestep to."""
    blocks: tuple[int, ...] = ()
    """The transformer's blocks, counted from 0, behind which tokens are read. By default they are the first, the last
    that the paper aligns, the one half way and the last."""
    timesteps: tuple[float, ...] = (900.0, 500.0, 100.0)
    """The timesteps, above 0 and up to 1000, of which 1000 is noise alone."""
    prompt: str = ""
    """The prompt beside the references."""
    size: tuple[int, int] | None = None
    """The height and width of the video in pixels, multiples of 16. By default they are the first model's own."""
    num_frames: int | None = None
    """The number of frames of the video, 4k + 1. By default it is the first model's own."""
    tokens: int = 64
    """The most tokens of an image that are taken, drawn at random. Tokens of nothing but white are left out."""
    cut_out: bool = False
    """Cut subjects out and put them on white (needs rembg). Else images are taken as they are."""
    projection: Literal["tsne", "pca"] = "tsne"
    """How the picture brings tokens to the plane."""
    seed: int = 0
    """The seed of noise, choice of tokens, folds and t-SNE."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The dtype of the text encoder and the transformer. auto is bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """The device to compute on: cuda, mps or cpu. auto is a GPU if there is one."""


def run(command: References) -> int:
    """
    Reads the models' tokens, writes figures and pictures, prints the figures and returns the exit code.

    Raises:
        ValueError: if options do not fit, a model is of another kind, or a folder or image cannot be used.
    """
    from refalign_evaluation.separability import project, read_tokens, separability

    check_free(command.output)
    _check(command)
    models = name_models(command.model or (str(FOLDER),))
    setting, (height, width) = _setting(command, list(models.values()))
    images = _drawn(command) if command.sprites else read_subjects(command.references)
    views = _views(command, images, (height, width))
    subjects = [view.subject for view in views]
    rows, points = [], {}
    for name, model in models.items():
        found = read_tokens(_load(command, model), views, setting)
        for (block, timestep), tokens in found.items():
            figures = separability(tokens, subjects, command.seed)
            rows.append({"model": name, "block": block, "timestep": timestep, **figures})
            points[name, block, timestep] = project(tokens, command.projection, command.seed)
    rows.sort(key=lambda row: (list(models).index(row["model"]), row["block"], -row["timestep"]))
    print(describe(rows))
    with new_folder(command.output) as folder:
        content = {"figures": rows, "settings": _settings(command, setting, views, list(images))}
        (folder / RESULTS).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        for timestep in setting.timesteps:
            some = [row for row in rows if row["timestep"] == timestep]
            draw(some, points, views, list(images)).savefig(folder / f"{command.projection}-{timestep:g}.png", dpi=80)
    return 0


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as a table for a terminal."""
    from refalign.privacy import shown

    lines = ["block  timestep  within  between     gap   probe  model"]
    for row in rows:
        cosines = f"{row['within']:6.3f}  {row['between']:7.3f}  {row['gap']:6.3f}"
        lines.append(f"{row['block']:5}  {row['timestep']:8g}  {cosines}  {row['probe']:6.1%}  {shown(row['model'])}")
    return "\n".join([*lines, f"A probe that is told nothing gets {rows[0]['chance']:.1%}."])


# -- What is asked for ------------------------------------------------------------------------------------------------


def _check(command: References) -> None:
    if bool(command.references) == (command.sprites is not None):
        raise ValueError("Pass either --references, a folder for each subject, or --sprites with a number of figures.")
    if command.sprites is not None and not 2 <= command.sprites <= 100:
        raise ValueError(f"--sprites is {command.sprites}: pass 2 to 100 figures.")
    if command.tokens < 1:
        raise ValueError(f"--tokens is {command.tokens}: pass 1 or more.")
    if command.seed < 0:
        raise ValueError(f"--seed is {command.seed}: pass 0 or more.")
    if not command.timesteps:
        raise ValueError("--timesteps names none. Pass numbers above 0 and up to 1000, or leave it out.")
    for timestep in command.timesteps:
        if not 0 < timestep <= 1000:
            raise ValueError(f"--timesteps has {timestep:g}: pass numbers above 0 and up to 1000.")
    for option, values in (("--timesteps", command.timesteps), ("--blocks", command.blocks)):
        if len(set(values)) < len(values):
            raise ValueError(f"{option} has a number twice: {' '.join(map(str, values))}.")


def name_models(models: Sequence[str]) -> dict[str, str]:
    """
    What to call each model in table and picture: a folder by its name, if no other has the same.

    Raises:
        ValueError: if a model is named twice.
    """
    from collections import Counter

    names: dict[str, str] = {}
    for model in models:
        folder = Path(model).resolve()
        if not folder.is_dir():
            names[model] = model
        else:
            names[str(folder)] = "refalign-sprites" if folder == FOLDER.resolve() else folder.name
    if len(names) < len(models):
        raise ValueError(f"--model has a model twice: {' '.join(models)}.")
    twice = Counter(names.values())
    labels = []
    for name, model in zip(names.values(), models, strict=True):
        labels.append(model if twice[name] > 1 else name)
    return dict(zip(labels, models, strict=True))


def default_blocks(count: int) -> tuple[int, ...]:
    """The first of so many blocks, the last that the paper aligns (nine, or a third of fewer), half way, the last."""
    aligned = max(min(ALIGNED, count // 3), 1) - 1
    return tuple(sorted({0, aligned, count // 2, count - 1}))


def _setting(command: References, models: Sequence[str]) -> "tuple[Setting, tuple[int, int]]":
    """What all models are called with, and the video's height and width, checked before weights are read."""
    from refalign.convert import find_config
    from refalign.loading import read_defaults
    from refalign.pipeline_refalign_wan import check_size
    from refalign_evaluation.separability import Setting

    counts = [find_config(model)["num_layers"] for model in models]
    blocks = command.blocks or default_blocks(min(counts))
    for model, count in zip(models, counts, strict=True):
        for block in blocks:
            if not 0 <= block < count:
                raise ValueError(f"--blocks has {block}, but the blocks of {model} are 0 to {count - 1}.")
    defaults = list(map(read_defaults, models))  # of each, which is so checked
    height, width = command.size or (defaults[0]["height"], defaults[0]["width"])
    num_frames = defaults[0]["num_frames"] if command.num_frames is None else command.num_frames
    check_size(height, width, num_frames)
    return Setting(command.prompt, num_frames, blocks, command.timesteps, command.seed), (height, width)


def _settings(command: References, setting: "Setting", views: "Sequence[View]", names: list[str]) -> dict[str, Any]:
    """What the figures were measured with; of folders, the names alone."""
    from dataclasses import asdict

    width, height = views[0].image.size
    subjects = [view.subject for view in views]
    counts = {name: subjects.count(number) for number, name in enumerate(names)}
    tokens = sum(len(view.tokens) for view in views)
    return {**asdict(setting), "height": height, "width": width, "dtype": command.dtype} | {
        "images": counts,
        "tokens": tokens,
        "cut_out": command.cut_out,
        "projection": command.projection,
    }


def _load(command: References, model: str) -> Any:
    from refalign.loading import load_pipeline

    return load_pipeline(model, base=None, loras=(), dtype=command.dtype, device=command.device, offload="none")


# -- Images -----------------------------------------------------------------------------------------------------------


def read_subjects(folders: Sequence[Path]) -> "dict[str, dict[str, Image.Image]]":
    """
    The images of each subject, by the folder's name and the file's path.

    Raises:
        ValueError: naming folder or file, if there are fewer than two subjects, or than two images of one, or a file
            is no image.
    """
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ValueError(f"--references has a folder twice: {' '.join(map(str, folders))}.")
    if len(folders) < 2:
        raise ValueError(f"{folders[0]} is one subject, and there is none to tell it from. Pass a folder for each.")
    names = [place.name for place in places]
    if len(set(names)) < len(names):
        names = [f"{place.parent.name}/{place.name}" for place in places]
    if len(set(names)) < len(names):
        raise ValueError(f"Two folders of --references are both called {max(names, key=names.count)}. Rename one.")
    subjects = {}
    for name, folder in zip(names, folders, strict=True):
        subjects[name] = _read_folder(folder)
    return subjects


def _read_folder(folder: Path) -> "dict[str, Image.Image]":
    from refalign.reference_images import load_reference_image

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Pass a folder of images for each subject.")
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if len(files) < 2:
        held = f"one image alone, {files[0].name}" if files else "no images"
        raise ValueError(f"{folder} holds {held}. Put two views of its subject or more into it.")
    return {str(file): load_reference_image(file) for file in files}


def _drawn(command: References) -> "dict[str, dict[str, Image.Image]]":
    """Views of held-out figures of the small world, turned and lit at random, by name."""
    import numpy as np

    from refalign_training.sprites.subject import draw_reference, subjects

    generator = np.random.default_rng(command.seed)
    pool = subjects(held_out=True)
    drawn = {}
    for number in generator.choice(len(pool), command.sprites, replace=False):
        who = pool[number]
        name = f"{who.body}-{who.second} {who.shape}, {who.pattern}"
        tilts = generator.uniform(*SPRITE_TILTS, SPRITE_VIEWS).tolist()
        lights = generator.uniform(*SPRITE_LIGHTS, SPRITE_VIEWS).tolist()
        pairs = enumerate(zip(tilts, lights, strict=True))
        drawn[name] = {f"{name} {view}": draw_reference(who, tilt, light) for view, (tilt, light) in pairs}
    return drawn


def _views(command: References, subjects: "dict[str, dict[str, Image.Image]]", size: tuple[int, int]) -> "list[View]":
    """
    The images as models see them, with the tokens to read.

    Raises:
        ValueError: naming the image, if it is white all over, or one that comes twice.
    """
    import numpy as np

    from refalign.pipeline_refalign_wan import TOKEN_PIXELS
    from refalign.reference_images import prepare_reference_image
    from refalign_evaluation.separability import View, subject_tokens

    generator = np.random.default_rng(command.seed)
    views, seen = [], {}
    for number, images in enumerate(subjects.values()):
        for name, image in images.items():
            prepared = prepare_reference_image(image, *size, cut_out=command.cut_out)
            tokens = subject_tokens(prepared, TOKEN_PIXELS)
            if not len(tokens):
                raise ValueError(f"{name} is white all over: it shows no subject. Take it out.")
            # The probe would be tested by what it was trained on
            if (other := seen.setdefault(prepared.tobytes(), name)) != name:
                raise ValueError(f"{name} is the same image as {other}. Take one of them out.")
            some = generator.permutation(tokens)[: command.tokens]
            views.append(View(number, prepared, np.sort(some)))
    return views


# -- The picture ------------------------------------------------------------------------------------------------------


def draw(
    rows: Sequence[dict[str, Any]],
    points: "dict[tuple[str, int, float], np.ndarray]",
    views: "Sequence[View]",
    names: Sequence[str],
) -> Any:
    """
    The tokens of one timestep, coloured by subject: a row for each model, a column for each block.

    Args:
        rows: the figures to draw, all of one timestep.
        points: by model, block and timestep, the tokens of all views in the plane.
        views: the images, in the order of their tokens.
        names: what the subjects are called.
    """
    import numpy as np
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    subjects = np.repeat([view.subject for view in views], [len(view.tokens) for view in views])
    figure = Figure(figsize=(max(2.6 * len(blocks), 6) + 0.4, 2.9 * len(models) + 1.2), layout="constrained")
    panels = figure.subplots(len(models), len(blocks), squeeze=False)
    for row in rows:
        panel = panels[models.index(row["model"])][blocks.index(row["block"])]
        _scatter(panel, points[row["model"], row["block"], row["timestep"]], subjects, names)
        told = f"probe {row['probe']:.0%}   cosine {row['within']:.2f} / {row['between']:.2f}"
        panel.set_title(f"block {row['block']}\n{told}", fontsize=9)
    for model, line in zip(models, panels, strict=True):
        line[0].set_ylabel(model if len(model) < 40 else f"…{model[-38:]}")
    told = (
        f"Tokens of reference images at timestep {rows[0]['timestep']:g}, coloured by subject. Probe: tokens of",
        f"unseen images whose subject is told (by chance {rows[0]['chance']:.0%}). Cosine: within / between subjects.",
    )
    figure.suptitle("\n".join(told), fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, markerscale=2.5, frameon=False)
    return figure


def _scatter(panel: "Axes", points: "np.ndarray", subjects: "np.ndarray", names: Sequence[str]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(names) <= 10 else "turbo"]
    for number, name in enumerate(names):
        colour = colours(number if len(names) <= 10 else number / (len(names) - 1))
        some = points[subjects == number]
        panel.scatter(*some.T, s=5, color=colour, label=name, linewidths=0)
    panel.set(xticks=[], yticks=[])
