"""
The benchmark OpenS2V-Eval (arXiv 2505.20292): a folder with a JSON file for each of its splits, and their images.

A file is `{sample id: {"img_paths": [...], "prompt": "...", "class_label": [...]}}`, the paths relative to the folder.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from refalign.files import read_json
from refalign_training.data import fields
from refalign_training.data.fields import Unusable


Split = Literal["open", "human", "single"]
FILES: dict[Split, tuple[str, ...]] = {
    "open": ("Open-Domain_Eval.json",),
    "human": ("Human-Domain_Eval.json",),
    "single": ("Single-Domain_Eval.json", "SingleObject_Eval.json"),  # the second is its name in older copies
}
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class BenchmarkSample:
    """A video that the benchmark asks for."""

    id: str
    """The name of the video without its suffix, such as `singleface_3`."""
    prompt: str
    images: tuple[Path, ...]
    """The references, of which there is at least one."""
    labels: tuple[str, ...]
    """What each of them shows, such as `Man` or `Dog`."""

    @property
    def category(self) -> str:
        """The kind of the sample, such as `singleface`."""
        return category(self.id)


def category(sample_id: str) -> str:
    """The kind of a sample by its id: `singleface` for `singleface_3`."""
    return sample_id.rpartition("_")[0]


def read_benchmark(folder: Path, split: Split) -> dict[str, BenchmarkSample]:
    """
    The samples of a split by their ids, in the file's order.

    Raises:
        ValueError: if the folder is not a copy of the benchmark, or a sample of it cannot be used.
    """
    file = find_file(folder, split)
    records = read_json(file)
    if not records:
        raise ValueError(f"{file} has no samples. Download it again.")
    samples = {}
    for sample_id, record in records.items():
        try:
            samples[sample_id] = _read_sample(folder, check_sample_id(sample_id), record)
        except Unusable as error:
            raise ValueError(
                f"{file}: the sample {fields.shorten(sample_id)} cannot be used: {error.detail}. Download the "
                "benchmark again, whole and with its images."
            ) from error
    return samples


def digest_split(folder: Path, split: Split) -> str:
    """A digest of a split's file."""
    return f"sha256:{hashlib.sha256(find_file(folder, split).read_bytes()).hexdigest()}"


def digest_images(images: Iterable[Path]) -> str:
    """A digest of what a sample's images hold. OSError if one cannot be read."""
    total = hashlib.sha256()
    for image in images:
        total.update(hashlib.sha256(image.read_bytes()).digest())
    return f"sha256:{total.hexdigest()}"


def find_file(folder: Path, split: Split) -> Path:
    """
    The JSON file of a split.

    Raises:
        ValueError: if there is none.
    """
    for name in FILES[split]:
        if (folder / name).exists():
            fields.check_given(folder / name, "The benchmark's file")
            return folder / name
    there = "there is no such folder"
    if folder.is_dir():
        there = f"it has none of {', '.join(FILES[split])}"
    raise ValueError(
        f"{folder} is not a copy of OpenS2V-Eval with the split {split}: {there}. Download the dataset "
        "BestWishYsh/OpenS2V-Eval from the Hub, and name its folder."
    )


def check_sample_id(sample_id: Any) -> str:
    """The id, if it can name a video in a folder; else raises [`Unusable`]."""
    if "/" in fields.check_id(sample_id) or sample_id.startswith("."):
        raise Unusable("id", f"{sample_id[:300]!r} cannot name a video")
    return sample_id


def _read_sample(folder: Path, sample_id: str, record: Mapping[str, Any]) -> BenchmarkSample:
    paths = fields.required(record, "img_paths", fields.sequence)
    labels = fields.required(record, "class_label", fields.sequence)
    prompt = fields.required(record, "prompt", fields.text).strip()
    if not prompt:
        raise Unusable("no prompt", "its prompt is empty")
    if not paths or len(paths) != len(labels):
        raise Unusable("field", f"it has {len(paths)} img_paths and {len(labels)} class_label")
    images = []
    for path in paths:
        image = fields.path_inside(folder, path)
        fields.check_file(image)
        images.append(image)
    texts = [fields.text(label, "class_label") for label in labels]
    return BenchmarkSample(sample_id, prompt, tuple(images), tuple(texts))
