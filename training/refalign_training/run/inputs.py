"""Where a run's samples come from: a cache, or a dataset whose encoders run along with the training."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refalign.pipeline_refalign_wan import normalize_latents
from refalign_training.cache.encoders import Model, TeacherEncoder, TextEncoder, VaeEncoder, fetch_models, vae_config
from refalign_training.cache.reader import Cache, hold
from refalign_training.data.decoding import Decoded, decode
from refalign_training.data.pixels import draw_prompt
from refalign_training.data.randomness import numpy_generator
from refalign_training.data.sample import Unusable, usable
from refalign_training.data.source import read_source
from refalign_training.run.config import DataOptions, ModelOptions


FAMILIES = ("video", "references", "text", "teacher")


class CachedSamples:
    """What `refalign-train cache` computed. Of several variants and captions, one is drawn each epoch. Raises
    ValueError if the cache lacks something that training needs."""

    def __init__(self, folder: Path, needs_teacher: bool) -> None:
        self._hold = hold(folder)
        self.cache = Cache(folder, FAMILIES if needs_teacher else FAMILIES[:-1])
        self.buckets = self.cache.samples.buckets
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
        self.recipe, self.device = options.recipe, device
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
        self._families = FAMILIES if needs_teacher else FAMILIES[:-1]
        self._names = (model.base, options.teacher, model.revision, options.teacher_revision)
        self._dtype = getattr(torch, model.precision)
        self._encoders: dict[str, Any] = {}
        if fetches:
            vae_config(self._models["video"].folder)

    @cached_property
    def _models(self) -> dict[str, Model]:
        """Downloaded, if they have to be: a dry run does not ask for them."""
        return fetch_models(self._families, *self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_encoders": {}}  # workers that are spawned need none, and each would get 11 GB

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

    def encode(self, read: dict[str, Decoded]) -> dict[str, torch.Tensor]:
        subjects = read["references"].info["subjects"]
        numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
        value = {
            "latents": self._latents("video", read),
            "reference_latents": self._latents("references", read),
            "prompt_embeds": self._encoder("text")([read["text"]])[0]["prompt_embeds_0"],
            "subjects": torch.tensor([numbers[subject] for subject in subjects]),
        }
        if "teacher" in self._models:
            value["teacher_features"] = self._encoder("teacher")([read["references"]])[0]["features"]
        return value

    def _latents(self, family: str, read: dict[str, Decoded]) -> torch.Tensor:
        latents = self._encoder(family)([read[family]])[0]["latents"]
        return normalize_latents(latents, vae_config(self._models[family].folder))

    def empty_prompt_embeds(self) -> torch.Tensor:
        if "empty" not in self._encoders:
            self._encoders["empty"] = self._encoder("text")([Decoded(prompts=("",))])[0]["prompt_embeds_0"]
        return self._encoders["empty"]

    def _encoder(self, family: str) -> Any:
        """Made when it is first needed: never in a worker."""
        if family not in self._encoders:
            folder = self._models[family].folder
            if family == "text":
                encoder = TextEncoder(folder, self._dtype, self.device)
            elif family == "teacher":
                encoder = TeacherEncoder(folder, self._dtype, self.device)
            else:
                is_references = family == "references"
                vae = self._encoder("video").vae if is_references else None
                encoder = VaeEncoder(folder, torch.float32, self.device, references=is_references, vae=vae)
            self._encoders[family] = encoder
        return self._encoders[family]


def open_samples(
    options: DataOptions, model: ModelOptions, needs_teacher: bool, device: torch.device, fetches: bool = True
) -> CachedSamples | OnlineSamples:
    """The samples that a run is to be trained on; without `fetches`, only to look at how many of which size."""
    if options.cache is not None:
        return CachedSamples(options.cache, needs_teacher)
    return OnlineSamples(options, model, needs_teacher, device, fetches)
