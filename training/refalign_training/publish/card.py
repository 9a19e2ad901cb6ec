"""The model card of a trained model: what the run was, in words, numbers and pictures."""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from refalign.files import HUB_ID
from refalign.hub import NATIVE, PROJECTORS, fill_card
from refalign_training.run.log import METRICS_FILE, read_metrics


logger = logging.getLogger(__name__)

# Formats of datasets that are on the Hub
DATASETS = {"opens2v": "BestWishYsh/OpenS2V-5M", "phantom": "ZhuoweiChen/phantom-data-Koala36M"}
CURVE, SAMPLE, SAMPLE_PICTURE = "assets/loss.png", "assets/sample.mp4", "assets/sample.png"
SHOWN = re.compile(r"(loss|validation)(/[^/]+)?")  # metrics in the card's table


def write_card(
    folder: Path,
    run: Path,
    state: Mapping[str, Any],
    *,
    base: str,
    base_folder: Path | None,
    weights: str,
    licence: str | None = None,
    datasets: Sequence[str] = (),
) -> None:
    """
    Writes `README.md` and `assets/` into a folder that holds exported weights.

    Args:
        run (`Path`): the run's folder. The card goes without what is no longer there (metrics, samples).
        state (`Mapping`): the checkpoint's; nothing of later steps is shown.
        base (`str`): folder or Hub id of what the run started from. Only a folder's last part is named.
        base_folder (`Path`, *optional*): where the base's files are, if they are here.
        weights (`str`): which of the run's weights these are, in words.
        licence (`str`, *optional*): the Hub's name for it; by default the base's.
        datasets (`Sequence[str]`): Hub ids; by default what the run knows.
    """
    options, name = state["options"], state["dataset"]["name"]
    is_lora = options["training"] == "lora"
    datasets = list(datasets)
    # A cache has only its folder's name, which says nothing
    if not datasets and name in DATASETS and options["data.cache"] is None:
        datasets = [DATASETS[name]]
    named = ", ".join(f"[{dataset}](https://huggingface.co/datasets/{dataset})" for dataset in datasets)
    losses = write_curve(run / METRICS_FILE, state["step"], folder / CURVE)
    num_frames, height, width = _sizes(state)[0]
    text = fill_card(
        "trained_lora" if is_lora else "trained",
        base_model=base if is_hub_id(base) else None,
        datasets=datasets or None,
        licence=licence or _base_licence(base, base_folder),
        relation="adapter" if is_lora else "finetune",
        tags=("lora",) if is_lora else (),
        base=_linked(base),
        base_source=public_name(base),
        start=options["model.start"] and public_name(options["model.start"]),
        steps=state["step"],
        rows=training_facts(state, _linked(base), named or f"`{public_name(name)}`", weights),
        aligned=options["alignment.weight"] > 0,
        losses=losses,
        curve=CURVE if (folder / CURVE).is_file() else None,
        sample=write_sample(run / "samples", state["step"], folder),
        native=NATIVE if (folder / NATIVE).is_file() else None,
        projectors=PROJECTORS if (folder / PROJECTORS).is_file() else None,
        height=height,
        width=width,
        num_frames=num_frames,
    )
    (folder / "README.md").write_text(text, "utf-8")


# -- Names --------------------------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """Whether a name is ORG/NAME and not a path here."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".") and not Path(name).exists()


def public_name(name: str) -> str:
    """A Hub id as it is; only the last part of a path, which belongs to this machine."""
    return name if is_hub_id(name) else Path(name).resolve().name


def _linked(name: str) -> str:
    name = public_name(name)
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{name}`"


def _base_licence(base: str, folder: Path | None) -> str:
    """What the base's own card says, else Wan's."""
    file = folder and folder / "README.md"
    if file and file.is_file():
        licence = ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True).data.get("license")
        if isinstance(licence, str):
            return licence
    if not is_hub_id(base):
        logger.warning("The card names the base %s, a folder here. Pass --base ORG/NAME.", public_name(base))
    if not base.startswith("Wan-AI/"):
        logger.warning("The licence of %s is not known: the card says Wan's, apache-2.0. Else pass --licence.", base)
    return "apache-2.0"


# -- What the run was ---------------------------------------------------------------------------------------------


def training_facts(state: Mapping[str, Any], base: str, dataset: str, weights: str) -> list[tuple[str, str]]:
    """The rows of the card's table: names and values in Markdown."""
    o = state["options"]
    seen, count = state["samples"], state["dataset"]["samples"]
    videos = [f"{width}x{height}, {frames} frames" for frames, height, width in _sizes(state)]
    dropped = (o["objective.no_text"], o["objective.no_references"], o["objective.neither"])
    rows = [
        ("Base", f"{base}, revision `{o['model.revision']}`" if o["model.revision"] else base),
        ("Started from", f"`{public_name(o['model.start'])}`" if o["model.start"] else ""),
        ("Trained", _trained(o)),
        ("Weights", weights),
        ("Dataset", f"{dataset}, {count:,} samples"),
        ("Videos", ", ".join(videos)),
        ("Steps", f"{state['step']:,} of {o['steps']:,}, global batch {o['batch.size']}: {seen:,} samples seen"),
        ("Optimiser", _optimiser(o)),
        ("Timesteps", f"`{o['objective.timesteps']}`"),
        ("Dropped", "{:.0%} text, {:.0%} references, {:.0%} both".format(*dropped)),
        ("Reference alignment", _alignment(o, state["dataset"].get("teacher") or o["data.teacher"])),
        ("Precision", f"{o['model.precision']}; trained weights float32"),
        ("Seed", str(o["seed"])),
        ("Made with", ", ".join(f"{name} {version}" for name, version in state["versions"].items())),
    ]
    return [(name, " ".join(value.split()).replace("|", r"\|")) for name, value in rows if value]


def _trained(o: Mapping[str, Any]) -> str:
    if o["training"] == "full":
        return "all weights of the transformer"
    targets = "`, `".join(o["lora.targets"])
    return f"LoRA of rank {o['lora.rank']}, alpha {o['lora.alpha']:g}, dropout {o['lora.dropout']:g}, on `{targets}`"


def _optimiser(o: Mapping[str, Any]) -> str:
    warmup = f" after {o['optimizer.warmup_steps']:,} steps of warm-up" if o["optimizer.warmup_steps"] else ""
    return (
        f"{o['optimizer.name']}, learning rate {o['optimizer.lr']:g}, {o['optimizer.schedule']}{warmup}; "
        f"weight decay {o['optimizer.weight_decay']:g}"
    )


def _alignment(o: Mapping[str, Any], teacher: str | None) -> str:
    if not o["alignment.weight"]:
        return "none"
    parts = [
        f"weight {o['alignment.weight']:g}",
        f"blocks {_ranges(o['alignment.layers'])}, {o['alignment.projector']} projectors",
        f"teacher {_linked(teacher)}" if teacher else "",
        f"margins {o['alignment.positive_margin']:g} and {o['alignment.negative_margin']:g}",
        f"negatives weigh {o['alignment.negative_weight']:g}",
        f"times (t / 1000)^{o['alignment.gate_power']:g}",
        "features normalised over the grid" if o["alignment.spatial_norm"] else "",
    ]
    if o["alignment.decay_start"] is not None:
        parts.append(f"falls from step {o['alignment.decay_start']:,} on for {o['alignment.decay_steps']:,}")
    if o["alignment.stop_step"] is not None:
        parts.append(f"none from step {o['alignment.stop_step']:,} on")
    return "; ".join(filter(None, parts))


def _ranges(numbers: Iterable[int]) -> str:
    """`0 to 8, 11`"""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = []
    for first, last in runs:
        told.append(str(first) if first == last else f"{first} to {last}")
    return ", ".join(told)


def _sizes(state: Mapping[str, Any]) -> list[list[int]]:
    """Frames, height and width of the videos."""
    o = state["options"]
    of_recipe = [o["data.recipe.num_frames"], o["data.recipe.height"], o["data.recipe.width"]]
    return state["dataset"].get("sizes", [of_recipe])


# -- Pictures -----------------------------------------------------------------------------------------------------


def write_curve(metrics: Path, step: int, output: Path) -> list[tuple[str, str, int]]:
    """Draws the losses up to a step, if any is finite, and returns the last value of each, with its step."""
    from refalign_training.run.plots import plot_losses

    lines = [line for line in read_metrics(metrics) if line["step"] <= step] if metrics.is_file() else []
    last: dict[str, tuple[str, str, int]] = {}
    for line in lines:
        for name in filter(SHOWN.fullmatch, line):
            last[name] = (name, "not finite" if line[name] is None else f"{line[name]:.4g}", line["step"])
    # It refuses a file without losses: then there is nothing to show
    with tempfile.TemporaryDirectory() as temporary, suppress(ValueError):
        until_then = Path(temporary) / "metrics.jsonl"
        until_then.write_text("\n".join(map(json.dumps, lines)), "utf-8")
        plot_losses(until_then, output)
    return list(last.values())


def write_sample(samples: Path, step: int, folder: Path) -> str | None:
    """Copies the last video that was made up to a step, with its picture; Markdown that shows it, None if none was."""
    videos: list[Path] = []
    for path in sorted(samples.glob("step-[0-9]*")):
        if int(path.name[5:]) <= step:
            videos += sorted(path.rglob("*.mp4"))[:1]
    if not videos:
        return None
    (folder / "assets").mkdir(exist_ok=True)
    shutil.copyfile(videos[-1], folder / SAMPLE)
    picture = videos[-1].with_suffix(".png")
    if not picture.is_file():
        return f"[The video]({SAMPLE})"
    shutil.copyfile(picture, folder / SAMPLE_PICTURE)
    return f"[![References and frames of the video]({SAMPLE_PICTURE})]({SAMPLE})"
