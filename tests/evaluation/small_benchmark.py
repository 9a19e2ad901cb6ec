"""A benchmark of six samples in OpenS2V-Eval's own format, with drawn images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from refalign_evaluation.benchmark import FILES, Split
from tests.drawn_references import draw_face


MAN = "Images/humanobj/human/crop_man/commoner/5.jpg"
WOMAN = "Images/singlehuman/woman/1.jpg"
DOG = "Images/humanobj/thing/animal/dog/4.jpg"
CAT = "Images/multiobject/cat/2.png"
SCHOOL = "Images/humanobj/environment/school/6.jpg"
SAMPLES: dict[str, dict[str, Any]] = {
    "singleface_1": {"img_paths": [MAN], "prompt": "a man laughs in a garden", "class_label": ["Man"]},
    "singlehuman_1": {"img_paths": [WOMAN], "prompt": "a woman walks to the left", "class_label": ["Woman"]},
    "singleobj_1": {"img_paths": [DOG], "prompt": "a dog jumps", "class_label": ["Dog"]},
    "humanobj_1": {
        "img_paths": [MAN, DOG, SCHOOL],
        "prompt": "a man playing with his dog in front of a school",
        "class_label": ["Man", "Dog", "School"],
    },
    "multiobject_1": {"img_paths": [DOG, CAT], "prompt": "a dog and a cat run", "class_label": ["Dog", "Cat"]},
    "multihuman_1": {"img_paths": [MAN, WOMAN], "prompt": "two people dance", "class_label": ["Man", "Woman"]},
}


def write_benchmark(folder: Path, split: Split = "open", samples: dict[str, dict[str, Any]] | None = None) -> Path:
    """Writes the benchmark's file and images, and returns the folder."""
    records = {}
    for sample_id, record in (SAMPLES if samples is None else samples).items():
        records[sample_id] = {"synthesis_flag": "Wrong", **record}
        for path in record["img_paths"]:
            _draw(folder / path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILES[split][0]).write_text(json.dumps(records, indent=4), "utf-8")
    return folder


def _draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    hue = sum(path.as_posix().encode()[-12:]) % 97 / 97
    if "man/" in path.as_posix():  # a woman too
        draw_face(hue).save(path)
        return
    image = Image.new("RGB", (160, 120), "white")
    ImageDraw.Draw(image).ellipse((30, 20, 130, 100), fill=(int(255 * hue), 120, 60))
    image.save(path)
