"""`make demo`: `refalign generate` on four reference sets, offline, with a tiny model of random weights.

Until trained weights are shipped it shows that everything runs, from images to mp4, and nothing about quality.
`REFERENCES=FOLDER make demo` takes a folder of sets (folders of images) instead of drawn ones. Videos that exist are
passed over; remove `demo/` to see them made again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from refalign import checkpoints
from refalign.atomic import new_folder
from refalign.video import read_video
from tests.drawn_references import write_reference_sets
from tests.tiny_pipeline import tiny_wan_pipeline


WARNING = "The model is tiny and its weights are RANDOM: the videos are colourful noise. Only the way to them is real."


def make_model(output: Path) -> None:
    """A RefAlign pipeline folder, by the way that a user goes: base and native checkpoint, then `convert`."""
    with new_folder(output) as folder:
        tiny_wan_pipeline().save_pretrained(folder / "wan")
        native = checkpoints.export_native(folder / "wan", folder / "native.safetensors")
        checkpoints.convert(native, folder / "wan", folder / "refalign")


def write_sheet(output: Path) -> Path:
    """One picture of the references as the model sees them, above frames of the video."""
    references = [Image.open(path) for path in sorted(output.parent.glob(f"{output.stem}.reference_*.png"))]
    video = read_video(output)
    frames = [Image.fromarray(video[i]) for i in np.linspace(0, len(video) - 1, len(references)).astype(int)]
    width, height = references[0].width // 2, references[0].height // 2
    sheet = Image.new("RGB", (len(references) * (width + 8) - 8, 2 * height + 8), "grey")
    for row, images in enumerate((references, frames)):
        for column, image in enumerate(images):
            sheet.paste(image.resize((width, height)), (column * (width + 8), row * (height + 8)))
    sheet.save(output.with_suffix(".png"))
    return output.with_suffix(".png")


def main(folder: Path) -> None:
    print(WARNING, flush=True)
    if not (folder / "model").exists():
        make_model(folder / "model")
    if "REFERENCES" in os.environ:
        source = Path(os.environ["REFERENCES"]).resolve()
        sets = sorted(path for path in source.iterdir() if path.is_dir())
    else:
        source = folder / "drawn"
        sets = write_reference_sets(source)
    videos = folder / f"videos_of_{source.name}"
    videos.mkdir(exist_ok=True)
    jobs = [
        {
            "prompt": "The two of them meet in the open and look into the camera.",
            "reference": [str(path) for path in sorted(references.iterdir())],
            "output": str(videos / f"{references.name}.mp4"),
            "seed": seed,
        }
        for seed, references in enumerate(sets)
    ]
    (videos / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)) + "\n", "utf-8")
    command = [sys.executable, "-m", "refalign.cli", "generate", "--model", folder / "model/refalign"]
    command += ["--batch", videos / "jobs.jsonl", "--num-frames", "17", "--steps", "2", "--preview"]
    subprocess.run(list(map(str, command)), check=True)
    for job in jobs:
        print(f"{job['output']}: see {write_sheet(Path(job['output']))}")
    print(WARNING)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
