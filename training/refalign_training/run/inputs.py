"""Where a run's samples come from: a cache, or a dataset whose encoders run along with the training."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refalign.convert import CONFIGS
from refalign.files import fetch
from refalign_training.cache.command import OF_VIDEOS
from refalign_training.cache.encoders import (
    Model,
    TeacherEncoder,
    TextEncoder,
    VaeEncoder,
    fetch_models,
    own_long_edge,
    read_index,
    reference_prefix,
    vae_config,
    with_own_long_edge,
)
from refalign_training.cache.holders import READERS, hold
from refalign_training.cache.items import in_numbers
from refalign_training.cache.reader import Cache, normalized, open_index
from refalign_training.data.decoding import Decoded, decode
from refalign_training.data.pixels import draw_prompt
from refalign_training.data.randomness import numpy_generator
from refalign_training.data.sample import Unusable, usable
from refalign_training.data.source import read_source
from refalign_training.run.config import DataOptions, ModelOptions


class Encoders:
    """Frozen encoders by family, each made when it is first needed: never in a worker. `teacher` is its name and its
    revision."""

    def __init__(
        self,
        families: Sequence[str],
        model: ModelOptions,
        device: torch.device,
        teacher: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.families, self.device = families, device
        self._names = (model.base, teacher[0], model.revision, teacher[1])
        self._dtype = getattr(torch, model.precision)
        self._made: dict[str, Any] = {}

    @cached_property
    def models(self) -> dict[str, Model]:
        """Downloaded, if they have to be: a dry run does not ask for them."""
        return fetch_models(self.families, *self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": {}}  # workers that are spawned need none, and each would get 11 GB

    def __call__(self, family: str) -> Any:
        if family not in self._made:
            self._made[family] = self._make(family)
        return self._made[family]

    def _make(self, family: str) -> Any:
        folder = self.models[family].folder
        if family == "text":
            return TextEncoder(folder, self._dtype, self.device)
        if family == "teacher":
            return TeacherEncoder(folder, self._dtype, self.device)
        is_references = family == "references"
        vae = self("video").vae if is_references and "video" in self.families else None
        return VaeEncoder(folder, torch.float32, self.device, references=is_references, vae=vae)

    def empty_prompt_embeds(self) -> torch.Tensor:
        if "empty" not in self._made:
            self._made["empty"] = self("text")([Decoded(prompts=("",))])[0]["prompt_embeds_0"]
        return self._made["empty"]

    def latents(self, family: str, decoded: Decoded) -> torch.Tensor | list[torch.Tensor]:
        """Normalised latents of a video, or of references; a list of those that have sizes of their own."""
        return normalized(self(family)([decoded])[0], vae_config(self.models[family].folder))


class CachedSamples:
    """What `refalign-train cache` computed. Of several variants and captions, one is drawn each epoch. Raises
    ValueError if the cache lacks something that training needs."""

    def __init__(self, folder: Path, needs_teacher: bool) -> None:
        open_index(folder)  # nothing is written into what is not a cache
        self._hold = hold(folder, READERS)
        self.cache = Cache(folder, OF_VIDEOS if needs_teacher else OF_VIDEOS[:-1])
        self.buckets = self.cache.samples.buckets
        self.has_own_sizes = self.cache.recipes["references"].get("long_edge") is not None
        self.prefix = self.cache.recipes["text"].get("prefix", "")
        self.name, self.fingerprint = folder.name, self.cache.fingerprint
        self._empty_prompt_embeds = self.cache.empty_prompt_embeds

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hold": None}  # workers end with this process

    def id(self, row: int) -> str:
        return self.cache.samples[row].sample_id

    def read(self, row: int, seed: int, epoch: int) -> dict[str, torch.Tensor]:
        entry = self.cache.samples[row]
        generator = numpy_generator("variant", seed, epoch, entry.sample_id)
        value = self.cache.read(entry, variant=int(generator.choice(entry.variants)))
        value["prompt_embeds"] = value["prompt_embeds"][generator.integers(len(value["prompt_embeds"]))]
        return value

    def encode(self, read: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return read

    def empty_prompt_embeds(self) -> torch.Tensor:
        return self._empty_prompt_embeds


class OnlineSamples:
    """A dataset, decoded in the workers and encoded by the process that trains, with frames, references and
    augmentation drawn anew each epoch. All its annotations are held in memory. Raises ValueError if the dataset has no
    usable sample, or a model cannot be had."""

    def __init__(
        self,
        options: DataOptions,
        model: ModelOptions,
        needs_teacher: bool,
        device: torch.device,
        fetches: bool = True,
    ) -> None:
        index = read_index(fetch(model.base, CONFIGS, model.revision))
        self.recipe = with_own_long_edge(options.recipe, own_long_edge(index), model.base)
        self.samples = [sample for sample in usable(read_source(options.source)) if sample.prompts]
        self.name = str(options.source.data)
        if not self.samples:
            raise ValueError(f"The dataset ({self.name}) has no usable sample. Look at: refalign-train check.")
        video = (self.recipe.num_frames, self.recipe.height, self.recipe.width)
        self.buckets = np.array([(*video, len(sample.references)) for sample in self.samples], np.int32)
        digest = hashlib.sha256(repr(self.recipe).encode())
        for sample in self.samples:
            digest.update(repr(sample).encode("utf-8", "surrogatepass"))
        self.fingerprint = f"sha256:{digest.hexdigest()}"
        families = OF_VIDEOS if needs_teacher else OF_VIDEOS[:-1]
        self.encoders = Encoders(families, model, device, (options.teacher, options.teacher_revision))
        if fetches:
            vae_config(self.encoders.models["video"].folder)

    def id(self, row: int) -> str:
        return self.samples[row].id

    def read(self, row: int, seed: int, epoch: int) -> dict[str, Decoded]:
        sample = self.samples[row]
        references = decode("references", sample, self.recipe, epoch)
        count = len(references.info["subjects"])
        if count < len(sample.references):
            raise Unusable("no references", f"{count} of {len(sample.references)} can be read")
        prompt = Decoded(prompts=(draw_prompt(sample, self.recipe, epoch),))
        return {"video": decode("video", sample, self.recipe, epoch), "references": references, "text": prompt}

    def encode(self, read: dict[str, Decoded]) -> dict[str, Any]:
        subjects = read["references"].info["subjects"]
        numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
        value = {
            "latents": self.encoders.latents("video", read["video"]),
            "reference_latents": self.encoders.latents("references", read["references"]),
            "prompt_embeds": self.encoders("text")([read["text"]])[0]["prompt_embeds_0"],
            "subjects": torch.tensor([numbers[subject] for subject in subjects]),
        }
        if "teacher" in self.encoders.models:
            features = self.encoders("teacher")([read["references"]])[0]
            value["teacher_features"] = in_numbers(features, "features") or features["features"]
        return value

    def empty_prompt_embeds(self) -> torch.Tensor:
        return self.encoders.empty_prompt_embeds()


def open_samples(
    options: DataOptions, model: ModelOptions, needs_teacher: bool, device: torch.device, fetches: bool = True
) -> CachedSamples | OnlineSamples:
    """The samples that a run is to be trained on; without `fetches`, only to look at how many of which size. Raises
    ValueError if a cache's are not what the base reads."""
    if options.cache is not None:
        samples = CachedSamples(options.cache, needs_teacher)
        check_fits(samples, model)
        return samples
    return OnlineSamples(options, model, needs_teacher, device, fetches)


def check_fits(samples: CachedSamples, model: ModelOptions) -> None:
    """Raises ValueError if a cache was made for a model that reads references or prompts in another way."""
    folder = fetch(model.base, CONFIGS, model.revision)
    expected = (own_long_edge(read_index(folder)) is not None, reference_prefix(folder))
    if (samples.has_own_sizes, samples.prefix) != expected:
        raise ValueError(
            f"The cache {samples.name} was made for a model that reads references or prompts in another way than "
            f"{model.base}. Make one with: refalign-train cache --model {model.base} ..."
        )
