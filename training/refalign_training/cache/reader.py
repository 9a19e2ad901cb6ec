"""
What lies in a cache's folder, and how training reads it.

    plan.json           what the last `cache` command set out to compute
    samples.parquet     what the last one that came to its end has made
    failed.jsonl        of that one: faults of the dataset, items that failed, references that were lost
    video-1f0c.../      a family made in one way ([`Items`]); another model, size or dtype is another folder

An item's key is a digest of its sample: id, annotation, variant, names, sizes and times of its files (to read millions
of videos takes as long as to encode them). So a dataset may be moved, or copied with its times (`cp -p`, `rsync -a`),
while a file that is touched is encoded again. [`Cache`] reads samples.parquet, which names the folders and items: a
command with other settings that runs, or was killed, changes nothing for it until one comes to its end.
"""

import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import parquet

from refalign.files import read_json
from refalign.pipeline_refalign_wan import normalize_latents
from refalign_training.cache.command import FAMILIES
from refalign_training.cache.items import RECIPE, Items, in_numbers, text_key


logger = logging.getLogger(__name__)

FORMAT = 2  # of samples.parquet
PLAN, INDEX, FAILED = "plan.json", "samples.parquet", "failed.jsonl"
OF_REFERENCES = ("references", "teacher", "pictures")  # families with variants
BUCKET = ("frames", "height", "width", "num_references")
SIZES = "reference_sizes"  # height and width of each reference, where they have sizes of their own

# (frames, height, width, number of references), in pixels of the video
Bucket = tuple[int, int, int, int]


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
    header = json.loads(table.metadata.metadata[b"cache"])
    if header.pop("format", 1) != FORMAT:
        raise ValueError(
            f"{root / INDEX} was written by an earlier version. Remove that file and run `refalign-train cache` "
            "again: items that are computed are kept."
        )
    return header, table


def open_families(root: Path, families: Mapping[str, Any]) -> dict[str, Items]:
    """The items of the families that a header names. ValueError if they lie in other places than a cache's own."""
    opened = {}
    for family, made in families.items():
        if not re.fullmatch(rf"{family}-[0-9a-f]+", str(made["folder"])) or family not in FAMILIES:
            raise ValueError(f"{root} names {made['folder']!r} as a folder of its own. Do not use this cache.")
        opened[family] = Items(root / made["folder"])
    return opened


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
        if SIZES in table.column_names:
            sizes = [own or [] for own in table[SIZES].to_pylist()]
            longest = max(map(len, sizes), default=0)
            padded = np.zeros((len(sizes), longest), np.int32)
            for row, own in zip(padded, sizes, strict=True):
                row[: len(own)] = own
            self.buckets = np.concatenate([self.buckets, padded], axis=1)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        subjects = self.table["subjects"][row].as_py()
        variants = (variant for variant, numbers in enumerate(subjects) if numbers is not None)
        bucket = tuple(self.buckets[row, : len(BUCKET)].tolist())
        return Entry(self.table["id"][row].as_py(), bucket, tuple(variants), row)


def normalized(item: Mapping[str, torch.Tensor], vae_config: Mapping[str, Any]) -> torch.Tensor | list[torch.Tensor]:
    """Normalised latents of an item: one tensor, or one of each reference of its own size."""
    own = [normalize_latents(latents, vae_config) for latents in in_numbers(item, "latents")]
    return own or normalize_latents(item["latents"], vae_config)


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
            `samples.buckets` `(samples, 4)`, and behind that the sizes of the first variant's references, if they have
            sizes of their own.
        excluded (`Counter[str]`): how many are not, by reason.
        recipes (`dict`): what each family was made with.
    """

    def __init__(self, folder: str | Path, families: Sequence[str] | None = None) -> None:
        self.root = Path(folder)
        header, table = open_index(self.root)
        made = header["families"]
        wanted = made if families is None else families
        self.families = tuple(family for family in FAMILIES if family in wanted)
        self.items: dict[str, Items] = {}
        self.recipes: dict[str, dict[str, Any]] = {}
        self.excluded: Counter[str] = Counter()
        for family in self.families:
            if family not in made:
                raise ValueError(f"{folder} has no {family}. Compute it: refalign-train cache --families {family} ...")
            self.items |= open_families(self.root, {family: made[family]})
            self.recipes[family] = read_json(self.items[family].folder / RECIPE)
        self._check_agreement()
        columns = ["id", *BUCKET, "subjects", *self.families]
        columns += [SIZES] if SIZES in table.schema_arrow.names else []  # older caches have none
        self.samples = Samples(self._complete(table.read(columns)))
        self._tell_what_is_left_out()

    def _check_agreement(self) -> None:
        """Families may be computed apart; those of one cache must belong to the same videos and VAE."""
        for a, b in itertools.combinations(self.families, 2):
            own = {"family", "schema", "dtype", "vae_dtype"}
            if b in ("text", "teacher"):
                own.add("model")
            shared = self.recipes[a].keys() & self.recipes[b].keys() - own
            if (a, b) == ("references", "teacher"):
                shared.add("long_edge")
            for name in sorted(shared):
                ours, theirs = self.recipes[a].get(name), self.recipes[b].get(name)
                if ours != theirs:
                    raise ValueError(
                        f"{self.root} has `{a}` of {name} {ours}, but `{b}` of {name} {theirs}. "
                        "Compute one of them again."
                    )

    def _complete(self, table: pa.Table) -> pa.Table:
        """The samples that are complete in all families; the others are counted."""
        for family in self.families:
            self.excluded[f"without `{family}`"] = table[family].null_count
            table = table.filter(pc.field(family).is_valid())
        if set(OF_REFERENCES) & set(self.families):
            count = len(table)
            table = table.filter(pc.field("num_references") > 0)
            self.excluded["references and teacher disagree"] += count - len(table)
        return table

    def _tell_what_is_left_out(self) -> None:
        self.excluded = +self.excluded
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.excluded.items()))
        if not len(self.samples):
            raise ValueError(
                f"{self.root} has no sample that is complete in {', '.join(self.families)}: "
                f"{reasons or 'the dataset is empty'}. {FAILED} has what failed. Finish it: refalign-train cache, "
                "with --retry-failed for that; or ask for fewer families."
            )
        if reasons:
            logger.warning("%s: %d samples; left out: %s.", self.root, len(self.samples), reasons)

    # -- Reading ---------------------------------------------------------------------------------------------------

    def place(self, entry: Entry, family: str, variant: int = 0) -> bytes:
        """Where a sample's item lies among `items[family]`; of video and text, the same for all variants."""
        places = self.samples.table[family][entry.row].as_py()
        return places[variant if family in OF_REFERENCES else 0]

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
            `teacher_features` `(references, rows, columns, dim)`; `pixels`, uint8 `(subjects, side, side, 8)`;
            `subjects` `(references,)`, int64: equal numbers are one subject. Of references of their own sizes, latents
            are a list of `(16, 1, h, w)` and features one of `(rows, columns, dim)`.

        Raises:
            ValueError: if the variant cannot be had, or an item is broken.
        """
        if variant not in entry.variants:
            raise ValueError(f"{entry.sample_id!r} has variants {entry.variants}, not {variant}.")
        values: dict[str, Any] = {}
        for family in self.families:
            tensors = self.items[family].read(self.place(entry, family, variant))
            if family in ("video", "references"):
                name = "latents" if family == "video" else "reference_latents"
                values[name] = normalized(tensors, self.recipes[family]["vae"])
            elif family == "teacher":
                values["teacher_features"] = in_numbers(tensors, "features") or tensors["features"]
            elif family == "pictures":
                values["pixels"] = tensors["pixels"]
            else:
                embeds = in_numbers(tensors, "prompt_embeds")
                values["prompt_embeds"] = embeds if prompt is None else embeds[prompt]
            if family in OF_REFERENCES:
                values["subjects"] = torch.tensor(self.samples.table["subjects"][entry.row].as_py()[variant])
        return values

    @cached_property
    def empty_prompt_embeds(self) -> torch.Tensor:
        """`(tokens, dim)` of the empty prompt, which conditioning dropout puts in a caption's place. ValueError if the
        family `text` was not computed."""
        if "text" not in self.items:
            raise ValueError(
                f"{self.root} has no embeddings of the empty prompt. Compute them: refalign-train cache "
                "--families text ..."
            )
        items = self.items["text"]
        return items.read(items.place(text_key([""])))["prompt_embeds_0"]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that the samples hold, in their order: another one, another dataset."""
        total = hashlib.sha256()
        for name in (*BUCKET, "subjects"):
            total.update(repr(self.samples.table[name].to_pylist()).encode())
        for family, items in self.items.items():
            total.update(items.folder.name.encode())
            for places in self.samples.table[family].to_pylist():
                for place in places:
                    total.update(place[:16] if place else b"-")  # in files or in shards, items are the same
        return total.hexdigest()
