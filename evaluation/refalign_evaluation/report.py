"""What `refalign-eval compare` writes: a picture of the scores, and a page of table, picture and videos."""

import base64
import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign_evaluation.benchmark import Split, category
from refalign_evaluation.entries import Entry, percent, shown, title_of
from refalign_evaluation.results import listed
from refalign_evaluation.run_folder import video_of
from refalign_evaluation.totals import WEIGHTS


if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "scores.png"
PAGE = "index.html"
VIDEOS = "videos"
POSTER_SIZE = (480, 480)  # pixels at most


def write_report(folder: Path, split: Split, entries: Sequence[Entry], with_videos: bool = True) -> list[str]:
    """
    Writes the picture, the page and copies of the videos into a folder.

    The page asks nothing of any host: its picture is part of it, and the videos are copies beside it, which are read
    when they are played; their first frames when they are scrolled to.

    Returns:
        `list[str]`: lines that say which videos cannot be shown.
    """
    import jinja2

    draw_scores(folder / PICTURE, split, entries)
    picture = base64.b64encode((folder / PICTURE).read_bytes()).decode()
    samples, problems = _samples(folder, split, entries) if with_videos else ([], [])
    text = (files("refalign_evaluation") / "compare.html").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    page = template.render(
        split=split,
        titles=list(map(title_of, ("total", *WEIGHTS[split]))),
        rows=[_row(entry, split) for entry in entries],
        first=entries[0].name,
        notes=[entry for entry in entries if entry.notes],
        picture=picture,
        categories=sorted({sample["category"] for sample in samples}),
        samples=samples,
    )
    (folder / PAGE).write_text(page, "utf-8")
    return problems


def _row(entry: Entry, split: Split) -> dict[str, Any]:
    cells = []
    for name, value in {"total": entry.total, **dict.fromkeys(WEIGHTS[split]), **entry.scores}.items():
        difference = entry.differences.get(name)
        change, _, interval = "".partition(" ") if difference is None else shown(difference).partition(" ")
        number = "" if value is None else value
        cells.append({"text": percent(value), "value": number, "difference": change, "interval": interval})
    return {"title": entry.title, "cells": cells, "source": entry.source, "is_published": entry.is_published}


# -- Videos -----------------------------------------------------------------------------------------------------------


def _samples(folder: Path, split: Split, entries: Sequence[Entry]) -> tuple[list[dict[str, Any]], list[str]]:
    """What the page says of each sample, and lines that say which videos cannot be shown."""
    runs = [entry for entry in entries if entry.results is not None]
    ids = dict.fromkeys(sample_id for entry in runs for sample_id in _ids(entry))
    samples, problems = [], defaultdict(list)
    for sample_id in ids:
        clips = []
        for number, entry in enumerate(runs, start=1):
            clip, problem = _clip(folder, f"{VIDEOS}/{number}", entry, sample_id)
            clips.append(clip)
            if problem:
                problems[f"{entry.name}: {problem}"].append(sample_id)
        samples.append({"id": sample_id, "category": category(sample_id), "clips": clips})
    return samples, [f"{problem}: {listed(some)}" for problem, some in problems.items()]


def _ids(entry: Entry) -> tuple[str, ...]:
    return () if entry.results is None else entry.results.samples


def _clip(folder: Path, place: str, entry: Entry, sample_id: str) -> tuple[dict[str, Any], str]:
    """Copies a video, draws its first frame, and says what the page shows of it, and what is wrong."""
    assert entry.results is not None and entry.results.folder is not None
    scores = []
    for name, measured in entry.results.measured.items():
        if sample_id in measured.raw:
            scores.append((title_of(name), f"{measured.raw[sample_id]:.4g}"))
    clip = {"name": entry.name, "scores": scores, "video": "", "poster": "", "problem": ""}
    source = video_of(entry.results.folder, sample_id)
    try:
        (folder / place).mkdir(parents=True, exist_ok=True)
        _draw_poster(source, folder / place / f"{sample_id}.jpg")
        shutil.copyfile(source, folder / place / f"{sample_id}.mp4")
    except FileNotFoundError:
        clip["problem"] = "there is no video"
    except ValueError as error:
        clip["problem"] = f"the video cannot be shown ({error})".replace(str(source), source.name)
    else:
        clip |= {"video": f"{place}/{sample_id}.mp4", "poster": f"{place}/{sample_id}.jpg"}
    return clip, clip["problem"]


def _draw_poster(video: Path, poster: Path) -> None:
    """Writes a video's first frame; FileNotFoundError or ValueError if there is none."""
    from refalign_training.data.video import open_video

    if not video.is_file():
        raise FileNotFoundError(video)
    with open_video(video) as frames:
        _, image = next(iter(frames.read([0])))
        image.thumbnail(POSTER_SIZE)
        image.convert("RGB").save(poster, quality=85)


# -- The picture ------------------------------------------------------------------------------------------------------


def draw_scores(file: Path, split: Split, entries: Sequence[Entry]) -> None:
    """Writes a PNG with the scores of all rows in percent: as a radar, and as bars with the totals."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.5), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 1.9))
    palette = matplotlib.colormaps["tab20"]
    colours = [palette(number % 20) for number in range(len(entries))]
    _draw_radar(figure.add_subplot(grid[0], projection="polar"), split, entries, colours)
    bars = figure.add_subplot(grid[1])
    _draw_bars(bars, split, entries, colours)
    handles, labels = bars.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(f"OpenS2V-Eval, split {split}, TotalScore v1.1, in percent")
    figure.savefig(file, dpi=110)


def _draw_radar(axes: "Axes", split: Split, entries: Sequence[Entry], colours: Sequence[Any]) -> None:
    """Those rows that have all scores; the published ones are thin."""
    names = list(WEIGHTS[split])
    angles = [2 * math.pi * place / len(names) for place in range(len(names))]
    for entry, colour in zip(entries, colours, strict=True):
        if set(names) <= entry.scores.keys():
            values = [100 * entry.scores[name] for name in (*names, names[0])]
            style = (0.8, 0.6) if entry.is_published else (2.2, 1.0)
            axes.plot([*angles, angles[0]], values, color=colour, linewidth=style[0], alpha=style[1])
    axes.set_xticks(angles, list(map(title_of, names)), fontsize=8)
    axes.set_ylim(0, 100)
    axes.tick_params(axis="y", labelsize=7)


def _draw_bars(axes: "Axes", split: Split, entries: Sequence[Entry], colours: Sequence[Any]) -> None:
    names = ["total", *WEIGHTS[split]]
    width = 0.85 / len(entries)
    for number, (entry, colour) in enumerate(zip(entries, colours, strict=True)):
        scores = {"total": entry.total, **entry.scores}
        values = [100 * (scores.get(name) or 0.0) for name in names]
        places = [place + (number - (len(entries) - 1) / 2) * width for place in range(len(names))]
        # matplotlib takes $ for mathematics, and leaves out of legends what begins with an underscore
        label = entry.title.replace("$", r"\$").lstrip("_") or "run"
        axes.bar(places, values, width, color=colour, label=label)
    axes.set_xticks(range(len(names)), list(map(title_of, names)), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
