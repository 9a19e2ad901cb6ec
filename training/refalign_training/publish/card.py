"""The model card of a trained model: what the run was, in words, numbers and pictures."""

import json
import logging
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from refalign.files import HUB_ID
from refalign.hub import NATIVE, PIPELINE_TAG, PROJECTORS, REFINE_PIPELINE_TAG, UNKNOWN, fill_card
from refalign.privacy import shown
from refalign_training.run.log import METRICS_FILE, read_metrics


logger = logging.getLogger(__name__)

# Formats of datasets that are on the Hub
DATASETS = {"opens2v": "BestWishYsh/OpenS2V-5M", "phantom": "ZhuoweiChen/phantom-data-Koala36M"}
CURVE, SAMPLE, SAMPLE_PICTURE = "assets/loss.png", "assets/sample.mp4", "assets/sample.png"
SHOWN = re.compile(r"(loss|validation)(/[\w.-]+)?")  # metrics in the card's table


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
    shows_sample: bool = False,
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
        shows_sample (`bool`): whether to publish the last validation sample, with the references it was made from.
    """
    options, name = state["options"], state["dataset"]["name"]
    is_lora = options["training"] == "lora"
    datasets = list(datasets)
    # A cache has only its folder's name, which says nothing
    if not datasets and name in DATASETS and options["data.cache"] is None:
        datasets = [DATASETS[name]]
    named = ", ".join(f"[{dataset}](https://huggingface.co/datasets/{dataset})" for dataset in datasets)
    dataset = named or code(public_name(name))
    losses = write_curve(run / METRICS_FILE, state["step"], folder / CURVE)
    num_frames, height, width = _sizes(state)[0]
    rows = training_facts(state, _linked(base), dataset, weights)
    refines = options.get("objective.kind") == "refine"
    text = fill_card(
        "trained_refine" if refines else "trained_lora" if is_lora else "trained",
        pipeline_tag=REFINE_PIPELINE_TAG if refines else PIPELINE_TAG,
        base_model=base if is_hub_id(base) else None,
        datasets=datasets or None,
        licence=licence or _base_licence(base, base_folder),
        relation="adapter" if is_lora else "finetune",
        tags=("lora",) if is_lora else (),
        base=_linked(base),
        base_in_python=json.dumps(public_name(base), ensure_ascii=False),
        base_in_shell=shlex.quote(shown(public_name(base))),
        start=options["model.start"] and code(public_name(options["model.start"])),
        steps=int(state["step"]),
        rows=rows,
        aligned=options["alignment.weight"] > 0,
        distilled=_distilled(options),
        losses=losses,
        curve=CURVE if (folder / CURVE).is_file() else None,
        sample=write_sample(run / "samples", state["step"], folder) if shows_sample else None,
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
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else code(name)


def code(text: str) -> str:
    """A text as a code span of Markdown, in which nothing means anything."""
    return "`" + shown(text).replace("`", "'") + "`"


def plain(text: str) -> str:
    """A text in which nothing of Markdown or HTML means anything."""
    return re.sub(r"([\\`<>\[\]])", r"\\\1", shown(text))


def _base_licence(base: str, folder: Path | None) -> str:
    """What the base's own card says, or Wan's; else it is left to the user."""
    file = folder and folder / "README.md"
    if file and file.is_file():
        licence = ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True).data.to_dict().get("license")
        if isinstance(licence, str):
            return licence
    if not is_hub_id(base):
        logger.warning("The card names the base %s, a folder here. Pass --base ORG/NAME.", public_name(base))
    if is_hub_id(base) and base.startswith("Wan-AI/"):
        return "apache-2.0"
    logger.warning("The licence of %s is not known: the card says %s. Pass --licence.", public_name(base), UNKNOWN)
    return UNKNOWN


# -- What the run was ---------------------------------------------------------------------------------------------


def training_facts(state: Mapping[str, Any], base: str, dataset: str, weights: str) -> list[tuple[str, str]]:
    """The rows of the card's table: names and values in Markdown."""
    given = state["options"]
    o = dict(given)
    for name, value in given.items():
        if isinstance(value, str):
            o[name] = plain(value)
    revision, start = given["model.revision"], given["model.start"]
    versions = [f"{plain(name)} {plain(version)}" for name, version in state["versions"].items()]
    seen, count = state["samples"], state["dataset"]["samples"]
    videos = [f"{width}x{height}, {frames} frames" for frames, height, width in _sizes(state)]
    teacher = state["dataset"].get("teacher") or given["data.teacher"]
    dropped = (o["objective.no_text"], o["objective.no_references"], o["objective.neither"])
    refines = given.get("objective.kind") == "refine"
    rows = [
        ("Base", f"{base}, revision {code(revision)}" if revision else base),
        ("Started from", code(public_name(start)) if start else ""),
        ("Trained", _trained(o)),
        ("Weights", weights),
        ("Dataset", f"{dataset}, {count:,} samples"),
        ("Videos", "" if refines else ", ".join(videos)),
        ("Trained on", _refined(o) if refines else ""),
        ("Steps", f"{state['step']:,} of {o['steps']:,}, global batch {o['batch.size']}: {seen:,} samples seen"),
        ("Optimiser", _optimiser(o)),
        ("Distilled", f"guidance at the scales {_distilled(given)}, into one pass" if _distilled(given) else ""),
        ("Timesteps", "evenly drawn" if refines else f"`{o['objective.timesteps']}`"),
        ("Dropped", "{:.0%} text, {:.0%} references, {:.0%} both".format(*dropped)),
        ("Reference alignment", "" if refines else _alignment(o, teacher)),
        ("Precision", f"{o['model.precision']}; trained weights float32"),
        ("Seed", str(o["seed"])),
        ("Made with", ", ".join(versions)),
    ]
    return [(name, " ".join(value.split()).replace("|", r"\|")) for name, value in rows if value]


def _trained(o: Mapping[str, Any]) -> str:
    if o.get("objective.kind") == "refine":
        return "all weights of the UNet and the projector of references"
    if o["training"] == "full":
        return "all weights of the transformer"
    targets = "`, `".join(o["lora.targets"])
    return f"LoRA of rank {o['lora.rank']}, alpha {o['lora.alpha']:g}, dropout {o['lora.dropout']:g}, on `{targets}`"


def _refined(o: Mapping[str, Any]) -> str:
    """What a refinement was trained on."""
    low, high = o["refine.mask_area"]
    return (
        f"masks of {low:.0%} to {high:.0%} of a subject; the whole subject as the reference in "
        f"{o['refine.alignment_share']:.0%}, else the region alone"
    )


def _optimiser(o: Mapping[str, Any]) -> str:
    warmup = f" after {o['optimizer.warmup_steps']:,} steps of warm-up" if o["optimizer.warmup_steps"] else ""
    return (
        f"{o['optimizer.name']}, learning rate {o['optimizer.lr']:g}, {o['optimizer.schedule']}{warmup}; "
        f"weight decay {o['optimizer.weight_decay']:g}"
    )


def _distilled(o: Mapping[str, Any]) -> str:
    """The scales that a distillation taught; empty for another run, or one of an older version."""
    if o.get("objective.kind") != "distil":
        return ""
    return f"{o['objective.guidance_scale']:g} (prompt) and {o['objective.image_guidance_scale']:g} (references)"


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
    return [list(map(int, size)) for size in state["dataset"].get("sizes", [of_recipe])]


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
            whole = (file for file in path.rglob("*.mp4") if "/." not in file.as_posix().removeprefix(path.as_posix()))
            videos += sorted(whole)[:1]
    if not videos:
        return None
    (folder / "assets").mkdir(exist_ok=True)
    shutil.copyfile(videos[-1], folder / SAMPLE)
    picture = videos[-1].with_suffix(".png")
    if not picture.is_file():
        return f"[The video]({SAMPLE})"
    shutil.copyfile(picture, folder / SAMPLE_PICTURE)
    return f"[![References and frames of the video]({SAMPLE_PICTURE})]({SAMPLE})"
