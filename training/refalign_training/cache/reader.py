"""
What lies in a cache's folder, and how training reads it.

    plan.json                            what the last `cache` command set out to compute
    samples.parquet                      what the last one that came to its end has made
    failed.jsonl                         faults of the dataset, items that failed, references that were lost
    video-1f0c.../recipe.json            a family made in one way; another model, size or dtype is another folder
    video-1f0c.../ab/<key>.safetensors   an item

An item's key is a digest of its sample: id, annotation, variant, names, sizes and times of its files (to read millions
of videos takes as long as to encode them). So a dataset may be moved, or copied with its times (`cp -p`, `rsync -a`),
while a file that is touched is encoded again. Every file is written beside its place and renamed: an item that exists
is done. [`Cache`] reads samples.parquet, which names the folders and items: a command with other settings that runs,
or was killed, changes nothing for it until one comes to its end.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.torch import load

from refalign.files import read_json
from refalign.pipeline_refalign_wan import normalize_latents
from refalign_training.cache.command import FAMILIES


logger = logging.getLogger(__name__)

PLAN, INDEX, FAILED, RECIPE = "plan.json", "samples.parquet", "failed.jsonl", "recipe.json"
BUCKET = ("frames", "height", "width", "num_references")

# (frames, height, width, number of references), in pixels of the video
Bucket = tuple[int, int, int, int]


# -- Files ------------------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """128 bits of the sha256 of the value as JSON, in hexadecimal digits. Paths count by their name alone."""
    text = json.dumps(value, sort_keys=True, default=lambda path: path.name)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def text_key(prompts: Sequence[str]) -> str:
    """The key of an item of the family `text`, which depends on the captions alone."""
    return digest([list(prompts), 0])


def item_path(folder: Path, key: str) -> Path:
    """The file of an item in its family's folder."""
    return folder / key[:2] / f"{key}.safetensors"


def read_item(path: Path) -> dict[str, torch.Tensor]:
    """An item's tensors. Raises ValueError if it is not there, or not whole."""
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). `refalign-train cache --verify` finds all such items."
        ) from error


def check_format(root: Path) -> None:
    """Raises ValueError for a cache of an earlier version."""
    if (root / "cache.json").exists():
        raise ValueError(
            f"{root} is a cache of an earlier version, which this one cannot read. Make a new cache in another folder."
        )


def open_index(root: Path) -> tuple[dict[str, Any], parquet.ParquetFile]:
    """
    What all samples have in common, and the table of them: `families`, by name the folder and the number of variants,
    and the `digest` of the plan. Raises ValueError if the folder is not a cache.
    """
    check_format(root)
    try:
        table = parquet.ParquetFile(root / INDEX)
    except FileNotFoundError:
        raise ValueError(
            f"{root} is not a cache, or not a finished one: it has no {INDEX}. Run `refalign-train cache` to its end."
        ) from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{root / INDEX} is damaged ({error}). Remove it and run `refalign-train cache`.") from None
    return json.loads(table.metadata.metadata[b"cache"]), table


# -- Samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample of a cache."""

    sample_id: str
    bucket: Bucket
    """Frames, height and width of the video in pixels, and the number of references; 0 for what was not computed."""
    variants: tuple[int, ...]
    """Those that can be read: of as many references as the first one."""
    row: int
    """Its place among the samples."""


class Samples(Sequence[Entry]):
    """A cache's samples in the dataset's order, each made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        columns = [table[name].to_numpy() for name in BUCKET]
        self.buckets = np.stack(columns, axis=1)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        subjects = self.table["subjects"][row].as_py()
        variants = tuple(variant for variant, numbers in enumerate(subjects) if numbers is not None)
        return Entry(self.table["id"][row].as_py(), tuple(self.buckets[row].tolist()), variants, row)


class Cache:
    """
    A cache made by `refalign-train cache`. It takes some 250 bytes of memory per sample, and can be pickled.

    Args:
        folder (`str` or `Path`): its folder.
        families (`Sequence[str]`, *optional*): the ones needed; by default all that were computed.

    Raises:
        ValueError: if it is not a cache, a family was not computed, families do not belong together, or no sample is
            left.

    Attributes:
        samples (`Samples`): those that are complete in all needed families, in the dataset's order; also as an array,
            `samples.buckets` `(samples, 4)`.
        excluded (`Counter[str]`): how many are not, by reason.
        recipes (`dict`): what each family was made with.
    """

    def __init__(self, folder: str | Path, families: Sequence[str] | None = None) -> None:
        self.root = Path(folder)
        header, table = open_index(self.root)
        made = header["families"]
        wanted = made if families is None else families
        self.families = tuple(family for family in FAMILIES if family in wanted)
        if missing := [family for family in self.families if family not in made]:
            raise ValueError(f"{folder} has no {', '.join(missing)}. Compute it: refalign-train cache --families ...")
        self.folders = {family: self.root / made[family]["folder"] for family in self.families}
        self.recipes = {family: read_json(path / RECIPE) for family, path in self.folders.items()}
        self._check_agreement()
        self.excluded: Counter[str] = Counter()
        missing = [f"{family}_missing" for family in self.families]
        self.samples = Samples(self._complete(table.read(["id", *BUCKET, "subjects", *self.families, *missing])))
        self._tell_what_is_left_out()

    def _check_agreement(self) -> None:
        """Families may be computed apart; those of one cache must belong to the same videos and VAE."""
        for a, b in itertools.combinations(self.families, 2):
            own = {"family", "schema", "dtype", "vae_dtype"}
            if b in ("text", "teacher"):
                own.add("model")
            for name in sorted(self.recipes[a].keys() & self.recipes[b].keys() - own):
                ours, theirs = self.recipes[a][name], self.recipes[b][name]
                if ours != theirs:
                    raise ValueError(
                        f"{self.root} has `{a}` of {name} {ours}, but `{b}` of {name} {theirs}. "
                        "Compute one of them again."
                    )

    def _complete(self, table: pa.Table) -> pa.Table:
        """The samples that are complete in all families; the others are counted."""
        for family in self.families:
            reasons = table[f"{family}_missing"]
            for reason in pc.unique(reasons.drop_null()).to_pylist():
                self.excluded[f"{reason} in `{family}`"] = pc.sum(pc.equal(reasons, reason)).as_py()
            table = table.filter(pc.is_null(reasons))
        if {"references", "teacher"} & set(self.families):
            count = len(table)
            table = table.filter(pc.greater(table["num_references"], 0))
            self.excluded["references and teacher disagree"] += count - len(table)
        return table

    def _tell_what_is_left_out(self) -> None:
        self.excluded = +self.excluded
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.excluded.items()))
        if not len(self.samples):
            raise ValueError(
                f"{self.root} has no sample that is complete in {', '.join(self.families)}: "
                f"{reasons or 'the dataset is empty'}. Finish it: refalign-train cache, with --retry-failed for what "
                "failed; or ask for fewer families."
            )
        if reasons:
            logger.warning("%s: %d samples; left out: %s.", self.root, len(self.samples), reasons)

    # -- Reading ---------------------------------------------------------------------------------------------------

    def item(self, entry: Entry, family: str, variant: int = 0) -> Path:
        """The file of a sample's item; of video and text, the same for all variants."""
        keys = self.samples.table[family][entry.row].as_py()
        key = keys[variant if family in ("references", "teacher") else 0]
        return item_path(self.folders[family], key.hex())

    def read(self, entry: Entry, variant: int = 0, prompt: int | None = None) -> dict[str, Any]:
        """
        What training needs of a sample, as far as the families give it.

        Args:
            entry ([`Entry`]): one of `samples`.
            variant (`int`): one of `entry.variants`.
            prompt (`int`, *optional*): the caption to give; `None`: all.

        Returns:
            `dict`: `latents` `(16, latent frames, h, w)` and `reference_latents` `(16, references, h, w)`, float32 and
            normalised; `prompt_embeds`, a list of `(tokens, dim)`, or with `prompt` that one;
            `teacher_features` `(references, rows, columns, dim)`; `subjects` `(references,)`, int64: equal numbers are
            one subject.

        Raises:
            ValueError: if the variant cannot be had, or an item is broken.
        """
        if variant not in entry.variants:
            raise ValueError(f"{entry.sample_id!r} has variants {entry.variants}, not {variant}.")
        values: dict[str, Any] = {}
        for family in self.families:
            tensors = read_item(self.item(entry, family, variant))
            if family in ("video", "references"):
                name = "latents" if family == "video" else "reference_latents"
                values[name] = normalize_latents(tensors["latents"], self.recipes[family]["vae"])
            elif family == "teacher":
                values["teacher_features"] = tensors["features"]
            else:
                embeds = [tensors[f"prompt_embeds_{number}"] for number in range(len(tensors))]
                values["prompt_embeds"] = embeds if prompt is None else embeds[prompt]
            if family in ("references", "teacher"):
                values["subjects"] = torch.tensor(self.samples.table["subjects"][entry.row].as_py()[variant])
        return values

    @cached_property
    def empty_prompt_embeds(self) -> torch.Tensor:
        """`(tokens, dim)` of the empty prompt, which conditioning dropout puts in a caption's place. ValueError if the
        family `text` was not computed."""
        if "text" not in self.folders:
            raise ValueError(
                f"{self.root} has no embeddings of the empty prompt. Compute them: refalign-train cache "
                "--families text ..."
            )
        return read_item(item_path(self.folders["text"], text_key([""])))["prompt_embeds_0"]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that the samples hold, in their order: another one, another dataset."""
        folders = [path.name for path in self.folders.values()]
        total = hashlib.sha256(repr(folders).encode())
        for name in (*BUCKET, "subjects", *self.families):
            total.update(repr(self.samples.table[name].to_pylist()).encode())
        return total.hexdigest()
