"""Reads a cache for training."""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from refalign_training.cache.files import FAMILIES, CacheFolder, Item, Outcome, digest, done, read_outcomes
from refalign_training.cache.items import find_item, read_item
from refalign_training.cache.plan import item_ingredients, text_digests


logger = logging.getLogger(__name__)

# (frames, height, width, number of references), in pixels of the video
Bucket = tuple[int, int, int, int]
# An item in 52 bytes: there may be millions
ITEM = np.dtype([("key", "V32"), ("size", "i8"), ("offset", "i8"), ("shard", "i4")])
NO_SHARD = -1
NOT_USABLE = -1
_NONE = np.empty((0, 1), np.int32)


def normalize_latents(latents: torch.Tensor, vae_config: Mapping[str, Sequence[float]]) -> torch.Tensor:
    """
    The VAE's means as the transformer sees them, `(latents - mean) / std` by channel, in float32.

    Args:
        latents (`torch.Tensor`): `([batch,] channels, frames, height, width)`.
        vae_config (`Mapping`): with `latents_mean` and `latents_std`, as [`AutoencoderKLWan`]'s config.
    """
    latents = latents.float()
    mean, std = (latents.new_tensor(vae_config[n]).view(-1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    return (latents - mean) / std


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample of a cache."""

    sample_id: str
    bucket: Bucket
    """Frames, height and width of the video in pixels, 0 without the family `video`; references, 0 without them."""
    variants: tuple[int, ...]
    """Those that can be read: of as many references as the first one."""
    row: int
    """Its place among the samples."""


class Samples(Sequence[Entry]):
    """A cache's samples in the dataset's order, each made when it is asked for."""

    def __init__(self, ids: pa.ChunkedArray, buckets: np.ndarray, subjects: np.ndarray) -> None:
        self.ids, self.buckets, self.subjects = ids, buckets, subjects

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        variants = tuple(np.flatnonzero(self.subjects[row] != NOT_USABLE).tolist())
        return Entry(self.ids[row].as_py(), tuple(self.buckets[row].tolist()), variants, row)


class Cache:
    """
    A cache made by `refalign-train cache`. It takes some 250 bytes of memory a sample, and can be pickled.

    Args:
        folder (`str` or `Path`): its folder.
        families (`Sequence[str]`, *optional*): the ones needed; by default all that were computed.

    Raises:
        ValueError: if it is none, a family was not computed, families do not belong together, or no sample is left.

    Attributes:
        samples (`Samples`): those that are complete in all needed families, in the dataset's order; also as arrays,
            `samples.ids`, and `samples.buckets` `(samples, 4)`.
        excluded (`Counter[str]`): how many are not, by reason.
        settings (`dict`): what it was made with.
    """

    def __init__(self, folder: str | Path, families: Sequence[str] | None = None) -> None:
        self._folder = CacheFolder(Path(folder))
        self.settings = self._folder.read_settings()
        made = self.settings["families"]
        self.families = tuple(family for family in FAMILIES if family in (made if families is None else families))
        if missing := [family for family in self.families if family not in made]:
            raise ValueError(f"{folder} has no {', '.join(missing)}. Compute it: refalign-train cache --families ...")
        self._check_agreement()
        self._shards: list[str] = []
        self._subjects: list[tuple[int, ...]] = []
        self.excluded: Counter[str] = Counter()
        self._read_records()
        self._tell_what_is_left_out()

    def _check_agreement(self) -> None:
        """Families may be rebuilt alone; those of one cache have to belong to the same videos and VAE."""
        ingredients = {family: self.settings["families"][family]["ingredients"] for family in self.families}
        for (a, of_a), (b, of_b) in itertools.combinations(ingredients.items(), 2):
            own = {"family", "schema", "dtype", "vae_dtype"} | ({"model"} if b in ("text", "teacher") else set())
            for name in sorted((set(of_a) & set(of_b)) - own):
                if of_a[name] != of_b[name]:
                    raise ValueError(
                        f"{self._folder.root} has `{a}` of {name} {of_a[name]}, but `{b}` of {name} {of_b[name]}. "
                        "Compute one of them again."
                    )

    # -- Records to columns ----------------------------------------------------------------------------------------

    def _read_records(self) -> None:
        self._codes: dict[Any, int] = {}  # of shards and of subjects, while records are read
        units = [columns for unit, plan in self._folder.units().items() if (columns := self._unit(unit, plan))]
        del self._codes
        ids, buckets, subjects, *items = zip(*units, strict=True) if units else ([], [_NONE], [_NONE])
        self.samples = Samples(pa.chunked_array(ids, pa.string()), np.concatenate(buckets), np.concatenate(subjects))
        self._items = {family: np.concatenate(arrays) for family, arrays in zip(self.families, items, strict=False)}

    def _unit(self, unit: str, plan: str) -> list[Any]:
        """The columns of a unit: ids, buckets, subjects by variant, and each family's items."""
        rows = []
        for outcomes in self._complete(unit, plan):
            if usable := self._usable(outcomes):
                rows.append((outcomes[0].id, *usable, *([self._packed(i) for i in o.items] for o in outcomes)))
        types = [None, np.int32, np.int32, *(ITEM for _ in self.families)]
        columns = zip(types, zip(*rows, strict=True), strict=True) if rows else ()
        return [pa.array(c, pa.string()) if kind is None else np.array(list(c), kind) for kind, c in columns]

    def _complete(self, unit: str, plan: str) -> list[tuple[Outcome, ...]]:
        """What became of a unit's samples in each family, of those that are complete."""
        made = self.settings["families"]
        for family in self.families:
            if done(self._folder, family, unit, plan, made[family]) is None:
                with self._folder.plan(unit).open("rb") as lines:
                    self.excluded[f"not computed yet in `{family}`"] += sum(1 for _ in lines)
                return []
        complete = []
        records = (read_outcomes(self._folder.record(family, unit)) for family in self.families)
        for outcomes in zip(*records, strict=True):  # all in the plan's order
            failed = [f for f, outcome in zip(self.families, outcomes, strict=True) if not outcome.items]
            if failed:
                self.excluded[f"failed in `{failed[0]}`"] += 1
            else:
                complete.append(outcomes)
        return complete

    def _usable(self, outcomes: Sequence[Outcome]) -> tuple[Bucket, list[int]] | None:
        """The bucket, and by variant the code of its subjects; nothing if references and teacher disagree."""
        items = {family: outcome.items for family, outcome in zip(self.families, outcomes, strict=True)}
        by_variant = _subjects(items.get("references"), items.get("teacher"))
        first = next((subjects for subjects in by_variant if subjects is not None), None)
        if first is None:
            self.excluded["references and teacher disagree"] += 1
            return None
        usable = [s is not None and len(s) == len(first) for s in by_variant]
        codes = [self._code(s, self._subjects) if u else NOT_USABLE for s, u in zip(by_variant, usable, strict=True)]
        video = items["video"][0].info if "video" in items else {"frames": 0, "size": (0, 0)}
        return (video["frames"], *video["size"], len(first)), codes

    def _packed(self, item: Item) -> tuple[bytes, int, int, int]:
        shard = NO_SHARD if item.shard is None else self._code(item.shard, self._shards)
        return bytes.fromhex(item.key), item.size, item.offset, shard

    def _code(self, value: Any, values: list[Any]) -> int:
        if value not in self._codes:
            self._codes[value] = len(values)
            values.append(value)
        return self._codes[value]

    def _tell_what_is_left_out(self) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.excluded.items()))
        if not self.samples:
            raise ValueError(
                f"{self._folder.root} has no sample that is complete in {', '.join(self.families)}: "
                f"{reasons or 'the dataset is empty'}. Finish it: refalign-train cache, with --retry-quarantined for "
                "what failed; or ask for fewer families."
            )
        if reasons:
            logger.warning("%s: %d samples; left out: %s.", self._folder.root, len(self.samples), reasons)

    # -- Reading ---------------------------------------------------------------------------------------------------

    def item(self, entry: Entry, family: str, variant: int = 0) -> Item:
        """Where an item of a sample is; of video and text, the same for all variants."""
        packed = self._items[family][entry.row, variant if family in ("references", "teacher") else 0]
        shard = None if packed["shard"] == NO_SHARD else self._shards[packed["shard"]]
        return Item(packed["key"].tobytes().hex(), int(packed["size"]), 0, {}, shard, int(packed["offset"]))

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
            item = self.item(entry, family, variant)
            tensors = read_item(self._folder.item(family, item), item)
            if family in ("video", "references"):
                name = "latents" if family == "video" else "reference_latents"
                values[name] = normalize_latents(tensors["latents"], self.settings["families"][family]["vae"])
            elif family == "teacher":
                values["teacher_features"] = tensors["features"]
            else:
                embeds = [tensors[f"prompt_embeds_{i}"] for i in range(len(tensors))]
                values["prompt_embeds"] = embeds if prompt is None else embeds[prompt]
            if family in ("references", "teacher"):
                values["subjects"] = torch.tensor(self._subjects[self.samples.subjects[entry.row, variant]])
        return values

    @cached_property
    def empty_prompt_embeds(self) -> torch.Tensor:
        """`(tokens, dim)` of the empty prompt, which conditioning dropout puts in a caption's place. ValueError if the
        family `text` was not computed."""
        made = self.settings["families"].get("text")
        key = made and empty_prompt_key(made["ingredients"])
        item = key and find_item(self._folder.empty_prompt, key)
        if not item:
            raise ValueError(
                f"{self._folder.root} has no embeddings of the empty prompt. Compute them: refalign-train cache "
                "--families text ..."
            )
        return read_item(self._folder.empty_prompt, item)["prompt_embeds_0"]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that the samples hold, in their order: another one, another dataset."""
        total = hashlib.sha256(repr((self.families, self._subjects)).encode())
        for array in (self.samples.buckets, self.samples.subjects, *(a["key"] for a in self._items.values())):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


def empty_prompt_key(ingredients: Mapping[str, Any]) -> str:
    """The key of the item that holds the empty prompt alone."""
    return digest(item_ingredients(ingredients, *text_digests([""]), 0))


def _subjects(references: Sequence[Item] | None, teacher: Sequence[Item] | None) -> list[tuple[int, ...] | None]:
    """By variant, numbers of the references' subjects; `None` where the two families saw different references."""
    if references is None and teacher is None:
        return [()]
    pairs = list(zip(references or teacher, teacher or references, strict=False))  # the variants that both have
    names = ("subjects", "origins")
    return [_numbers(a.info["subjects"]) if all(a.info[n] == b.info[n] for n in names) else None for a, b in pairs]


def _numbers(subjects: Sequence[str]) -> tuple[int, ...]:
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
    return tuple(numbers[subject] for subject in subjects)
