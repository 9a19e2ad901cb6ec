"""Reads a cache for training."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from refalign_training.cache.checks import done
from refalign_training.cache.files import EMPTY, FAMILIES, CacheFolder, Item, family_units, read_item, read_outcomes


# (frames, height, width, number of references), in pixels of the video
Bucket = tuple[int, int, int, int]


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
    items: Mapping[str, tuple[Item, ...]]
    """By family; of references and teacher, one for each variant."""
    variants: tuple[int, ...]
    """Those that can be read: of as many references as the first one."""


class Cache:
    """
    A cache made by `refalign-train cache`.

    Args:
        folder (`str` or `Path`): its folder.
        families (`Sequence[str]`, *optional*): the ones needed; by default all that were computed.

    Raises:
        ValueError: if it is none, a family was not computed, or families are made for different videos.

    Attributes:
        samples (`list[Entry]`): those that are complete in all needed families, in the dataset's order.
        settings (`dict`): what it was made with, and the VAE's `latents_mean` and `latents_std`.
    """

    def __init__(self, folder: str | Path, families: Sequence[str] | None = None) -> None:
        self._folder = CacheFolder(Path(folder))
        self.settings = self._folder.read_settings()
        made = self.settings["families"]
        self.families = tuple(families if families is not None else (f for f in FAMILIES if f in made))
        if missing := [family for family in self.families if family not in made]:
            raise ValueError(f"{folder} has no {', '.join(missing)}. Compute it: refalign-train cache --families ...")
        self._check_agreement()
        self._plans = family_units("text", self._folder.read_summary())  # of all families: it has one more than others
        self.samples = list(self._read_samples())

    def _check_agreement(self) -> None:
        """Families may be rebuilt alone; those of one cache have to belong to the same videos."""
        ingredients = {family: self.settings["families"][family]["ingredients"] for family in self.families}
        for (a, of_a), (b, of_b) in itertools.combinations(ingredients.items(), 2):
            for name in sorted((set(of_a) & set(of_b)) - {"family", "schema", "model", "dtype", "vae_dtype"}):
                if of_a[name] != of_b[name]:
                    raise ValueError(
                        f"{self._folder.root} has `{a}` of {name} {of_a[name]}, but `{b}` of {name} {of_b[name]}. "
                        "Compute one of them again."
                    )

    def _read_samples(self) -> Iterator[Entry]:
        for unit in (unit for unit in self._plans if unit != EMPTY):
            outcomes = [self._outcomes(family, unit) for family in self.families]
            for sample_id in outcomes[0] if outcomes else ():
                if all(sample_id in of_family for of_family in outcomes):
                    items = {f: o[sample_id] for f, o in zip(self.families, outcomes, strict=True)}
                    yield self._entry(sample_id, items)

    def _outcomes(self, family: str, unit: str) -> dict[str, tuple[Item, ...]]:
        """The items of a unit by sample, of those that did not fail."""
        if done(self._folder, family, unit, self._plans[unit], self.settings["families"][family]) is None:
            return {}
        outcomes = read_outcomes(self._folder.record(family, unit))
        return {outcome.id: outcome.items for outcome in outcomes if outcome.items}

    def _entry(self, sample_id: str, items: Mapping[str, tuple[Item, ...]]) -> Entry:
        video = items["video"][0].info if "video" in items else {"frames": 0, "size": (0, 0)}
        by_variant = items.get("references", items.get("teacher", ()))
        counts = [len(item.info["subjects"]) for item in by_variant] or [0]
        variants = tuple(variant for variant, count in enumerate(counts) if count == counts[0])
        return Entry(sample_id, (video["frames"], *video["size"], counts[0]), items, variants)

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
        for family, items in entry.items.items():
            item = items[variant if family in ("references", "teacher") else 0]
            tensors, _ = read_item(self._folder, family, item)
            if family == "video":
                values["latents"] = normalize_latents(tensors["latents"], self.settings["vae"])
            elif family == "references":
                values["reference_latents"] = normalize_latents(tensors["latents"], self.settings["vae"])
            elif family == "teacher":
                values["teacher_features"] = tensors["features"]
            else:
                embeds = [tensors[f"prompt_embeds_{i}"] for i in range(len(tensors))]
                values["prompt_embeds"] = embeds if prompt is None else embeds[prompt]
            if "subjects" in item.info:
                values["subjects"] = _numbers(item.info["subjects"])
        return values

    @cached_property
    def empty_prompt_embeds(self) -> torch.Tensor:
        """`(tokens, dim)` of the empty prompt, which conditioning dropout puts in a caption's place."""
        (items,) = self._outcomes("text", EMPTY).values()
        return read_item(self._folder, "text", items[0])[0]["prompt_embeds_0"]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that the samples hold: another one, another dataset."""
        keys = sorted(item.key for entry in self.samples for items in entry.items.values() for item in items)
        return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _numbers(subjects: Sequence[str]) -> torch.Tensor:
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
    return torch.tensor([numbers[subject] for subject in subjects])
