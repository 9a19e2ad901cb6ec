"""Samples as the model will see them, in a folder to leaf through: videos, references, and a page of them all."""

import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from refalign_training.data.played import Played, describe
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Sample


if TYPE_CHECKING:
    import numpy as np

    from refalign_training.data.pixels import ReferencePixels

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222;
  background: #f2f2f2 }}
article {{ background: #fff; border: 1px solid #ddd; border-radius: 6px; margin: 1rem 0; padding: 1rem }}
h1, .lost h2 {{ font-size: 1.3rem }}
li {{ overflow-wrap: anywhere }}
h2 {{ font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere }}
.row {{ display: flex; flex-wrap: wrap; gap: .75rem; align-items: flex-start }}
figure {{ margin: 0 }}
figcaption, .source {{ color: #666; font-size: .85rem }}
video, img {{ height: 12rem; max-width: 100%; border: 1px solid #ddd; border-radius: 4px }}
</style>
<h1>{title}</h1>
{articles}
{lost}</html>
"""


class Preview:
    """Writes samples into a folder, each as `<id>/video.mp4`, `reference_<k>.png` (k from 1) and `sample.json`."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.articles: list[str] = []

    def __len__(self) -> int:
        return len(self.articles)

    def add(self, sample: Sample, frames: "np.ndarray", references: "list[ReferencePixels]", played: Played) -> None:
        """
        Writes a sample with an id that comes once. `frames` are uint8 `(frames, height, width, 3)`; `played` says how
        they were made.
        """
        from refalign.video import write_video
        from refalign_training.data.pixels import draw_prompt

        folder = self.folder / sample.id
        write_video(frames, folder / "video.mp4")
        for number, reference in enumerate(references, start=1):
            reference.image.save(folder / f"reference_{number}.png")
        labels = {reference.subject: reference.label for reference in sample.references}
        shown = [{"subject": r.subject, "label": labels[r.subject], "origin": r.origin} for r in references]
        record = {
            "id": sample.id,
            "prompt": draw_prompt(sample, self.recipe),
            "references": shown,
            "source": sample.source,
            "row": sample.row,
            "scores": dict(sample.scores),
            "played": dataclasses.asdict(played) | {"path": played.path.name},
            "slowdown": played.slowdown,
            "recipe": dataclasses.asdict(self.recipe),
        }
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / "sample.json").write_text(text + "\n", "utf-8")
        self.articles.append(_article(record, describe(played)))

    def write_index(self, lost: Sequence[str] = ()) -> None:
        """Writes `index.html`, the page of all samples, with a list of those that are `lost` at its end."""
        size = f"{self.recipe.width}x{self.recipe.height}, {self.recipe.num_frames} frames"
        title = f"Samples as the model sees them: {len(self)}, {size}"
        items = "".join(f"<li>{html.escape(line)}</li>\n" for line in lost)
        listed = f'<section class="lost"><h2>Lost clips</h2>\n<ul>\n{items}</ul></section>\n' if lost else ""
        page = PAGE.format(title=title, articles="\n".join(self.articles), lost=listed)
        (self.folder / "index.html").write_text(page, "utf-8")


def _article(record: dict, played: str) -> str:
    folder = quote(record["id"])
    figures = [f'<video src="{folder}/video.mp4#t=0.01" controls loop muted preload="metadata"></video>']
    for number, reference in enumerate(record["references"], start=1):
        words = dict.fromkeys((reference["label"] or reference["subject"], reference["origin"]))
        figures.append(
            f'<figure><img src="{folder}/reference_{number}.png" loading="lazy" alt="reference {number}">'
            f"<figcaption>{html.escape(', '.join(words))}</figcaption></figure>"
        )
    scores = ", ".join(f"{name} {value:.4g}" for name, value in record["scores"].items())
    source = f"{record['source']}, row {record['row']}. {scores}."
    return (
        f'<article><h2>{html.escape(record["id"])}</h2><div class="row">{"".join(figures)}</div>'
        f"<p>{html.escape(record['prompt'])}</p><p>{html.escape(played)}</p>"
        f'<p class="source">{html.escape(source)}</p></article>'
    )
