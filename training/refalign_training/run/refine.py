"""What a run of the objective `refine` has of its own: samples, frozen encoders, batches and validation."""

import copy
import dataclasses
import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from refalign.files import fetch, read_json
from refalign.pipeline_refine_by_align import (
    RefineByAlignPipeline,
    attention_map,
    check_is_refine_pipeline,
    cross_attention_blocks,
    encode_patches,
    latent_mask,
    record_attention,
    reference_pixels,
)
from refalign_training.cache.holders import READERS, hold
from refalign_training.cache.reader import Cache, open_index
from refalign_training.data.artifacts import Example, draw_example
from refalign_training.data.randomness import numpy_generator, seed_of
from refalign_training.data.recipe import RefineOptions
from refalign_training.data.sample import usable
from refalign_training.data.source import read_source
from refalign_training.data.subjects import CHANNELS, load_subjects, picture_side
from refalign_training.method.losses import shifted
from refalign_training.method.options import ObjectiveOptions
from refalign_training.method.refinement import RefineBatch, Refinement, Refiner, check_prediction
from refalign_training.run.batches import Read
from refalign_training.run.config import DataOptions, ModelOptions
from refalign_training.run.order import Order, draw_dropout, draw_noise, draw_quantiles, network_seed
from refalign_training.run.videos import evaluating


logger = logging.getLogger(__name__)

FILES = ("*.json", "*/*.json", "*/*.safetensors", "*.py")
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the timesteps that are validated at
MAP_QUANTILE = 0.7  # at which attention is compared with the true region
MAP_THRESHOLD = 0.4  # of the map's maximum
TRAIN_TIMESTEPS = 1000  # of the noise schedule


def load_base(options: ModelOptions) -> RefineByAlignPipeline:
    """The pipeline that is trained, downloaded if need be, in float32 on the CPU. Raises ValueError as [`read_base`]
    does."""
    folder = fetch(options.base, FILES, options.revision)
    read_base(folder, options.base)
    return RefineByAlignPipeline.from_pretrained(folder, dtype=torch.float32)


def read_base(folder: Path, name: str) -> dict[str, Any]:
    """The `model_index.json` of a base's folder. Raises ValueError, naming the base, if it is of another pipeline, or
    predicts what is not trained here."""
    index = read_json(folder / "model_index.json")
    check_is_refine_pipeline(index, name)
    scheduler = read_json(folder / "scheduler/scheduler_config.json")
    check_prediction(scheduler.get("prediction_type", "epsilon"), f"scheduler/scheduler_config.json of {name}")
    return index


# -- Samples ----------------------------------------------------------------------------------------------------------


class SubjectSamples(ABC):
    """Subjects in their surroundings, of which an example is drawn anew in each epoch. Attributes are as a
    [`RowReader`]'s."""

    name: str
    fingerprint: str

    def __init__(self, options: RefineOptions, side: int, reference_side: int, count: int) -> None:
        self.options, self.side, self.reference_side = options, side, reference_side
        self.buckets = np.tile(np.array([1, side, side, 1], np.int32), (count, 1))

    @abstractmethod
    def id(self, row: int) -> str: ...

    @abstractmethod
    def subjects(self, row: int, epoch: int, generator: np.random.Generator) -> np.ndarray:
        """A sample's subjects, uint8 `(subjects, side, side, 8)`."""

    def read(self, row: int, seed: int, epoch: int) -> Example:
        """An example of one of the sample's subjects. Raises ValueError or OSError if it cannot be used."""
        generator = numpy_generator("artifact", seed, epoch, self.id(row))
        subjects = self.subjects(row, epoch, generator)
        subject = subjects[generator.integers(len(subjects))]
        return draw_example(subject, self.side, self.reference_side, self.options, generator)


class CachedSubjects(SubjectSamples):
    """What `refalign-train cache --families pictures` has cut out. Raises ValueError if it was made for a model of
    another size."""

    def __init__(self, folder: Path, options: RefineOptions, side: int, reference_side: int) -> None:
        open_index(folder)  # nothing is written into what is not a cache
        self._hold = hold(folder, READERS)
        self.cache = Cache(folder, ("pictures",))
        if (made := self.cache.recipes["pictures"]["height"]) != side:
            raise ValueError(
                f"{folder} was made for a height of {made}, but the model refines pictures of {side} pixels. "
                f"Make another one: refalign-train cache --height {side} --width {side} ..."
            )
        super().__init__(options, side, reference_side, len(self.cache.samples))
        self.name, self.fingerprint = folder.name, self.cache.fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hold": None}  # workers end with this process

    def id(self, row: int) -> str:
        return self.cache.samples[row].sample_id

    def subjects(self, row: int, epoch: int, generator: np.random.Generator) -> np.ndarray:
        entry = self.cache.samples[row]
        variant = int(generator.choice(entry.variants))
        pixels = self.cache.read(entry, variant)["pixels"].numpy()
        room = picture_side(self.side)
        if pixels.dtype != np.uint8 or not len(pixels) or pixels.shape[1:] != (room, room, CHANNELS):
            told = f"{pixels.dtype} {pixels.shape}, not uint8 (subjects, {room}, {room}, {CHANNELS})"
            raise ValueError(f"its item in the cache holds {told}: `refalign-train cache` makes another")
        return pixels


class OnlineSubjects(SubjectSamples):
    """A dataset, read along with the training. Raises ValueError if it has no usable sample."""

    def __init__(self, data: DataOptions, options: RefineOptions, side: int, reference_side: int) -> None:
        self.samples = [sample for sample in usable(read_source(data.source)) if sample.references]
        self.name = str(data.source.data)
        if not self.samples:
            raise ValueError(f"The dataset ({self.name}) has no usable sample. Look at: refalign-train check.")
        super().__init__(options, side, reference_side, len(self.samples))
        self.recipe = dataclasses.replace(data.recipe, height=side, width=side)
        digest = hashlib.sha256(repr(self.recipe).encode())
        for sample in self.samples:
            digest.update(repr(sample).encode("utf-8", "surrogatepass"))
        self.fingerprint = f"sha256:{digest.hexdigest()}"

    def id(self, row: int) -> str:
        return self.samples[row].id

    def subjects(self, row: int, epoch: int, generator: np.random.Generator) -> np.ndarray:
        return load_subjects(self.samples[row], self.recipe, epoch)[0]


def open_subjects(data: DataOptions, options: RefineOptions, side: int, reference_side: int) -> SubjectSamples:
    """The samples that a run is to be trained on, or that it is validated on, for a model of these sizes in pixels."""
    if data.cache is not None:
        return CachedSubjects(data.cache, options, side, reference_side)
    return OnlineSubjects(data, options, side, reference_side)


# -- Batches ----------------------------------------------------------------------------------------------------------


class RefineEncoders:
    """The frozen VAE and image encoder of a pipeline, on a device."""

    def __init__(self, base: RefineByAlignPipeline, device: torch.device) -> None:
        # Another layout of the same numbers, in which a CPU convolves faster
        self.vae = base.vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.image_encoder = base.image_encoder.to(device).eval().requires_grad_(False)
        self.device = device
        self.factor = base.vae_scale_factor

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """What [`RefineBatch`] has of so many examples: `latents`, `mask`, `masked_latents`, `patches`, `regions`."""

        def stacked(name: str) -> torch.Tensor:
            arrays = [getattr(example, name) for example in examples]
            return torch.from_numpy(np.stack(arrays)).to(self.device)

        images = stacked("image").permute(0, 3, 1, 2).float() / 127.5 - 1
        mask = stacked("mask")[:, None].float()
        latents = self.vae.encode(torch.cat([images, images * (1 - mask)])).latent_dist.mode()
        latents, masked_latents = (latents.contiguous() * self.vae.config.scaling_factor).chunk(2)
        patches = encode_patches(self.image_encoder, reference_pixels(stacked("reference")))
        grid = math.isqrt(patches.shape[1])
        return {
            "latents": latents,
            "mask": latent_mask(mask, self.factor),
            "masked_latents": masked_latents,
            "patches": patches,
            "regions": F.adaptive_avg_pool2d(stacked("region")[:, None].float(), grid)[:, 0],
        }


def make_refine_batch(
    read: Read, samples: SubjectSamples, order: Order, options: ObjectiveOptions, encoders: RefineEncoders
) -> RefineBatch:
    """The examples of a micro-batch with their noise, timesteps and dropout."""
    micro_batch, values = read.micro_batch, encoders(read.values)
    ids = [samples.id(row) for row in micro_batch.rows]
    step, seed, device = micro_batch.step, order.seed, encoders.device
    noise, keeps = [], []
    for place, sample_id in zip(micro_batch.places, ids, strict=True):
        noise.append(draw_noise(seed, step, place, sample_id, values["latents"].shape[1:]))
        keeps.append(draw_dropout(seed, step, place, sample_id, options)[1])
    quantiles = draw_quantiles(seed, step, order.batch_size)[list(micro_batch.places)]
    return RefineBatch(
        ids=ids,
        seed=network_seed(seed, micro_batch),
        noise=torch.stack(noise).to(device),
        timesteps=timesteps_at(quantiles, samples.options.timestep_shift).to(device),
        keeps_references=torch.tensor(keeps).to(device),
        unusable=read.unusable,
        **values,
    )


def timesteps_at(quantiles: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    """Timesteps of a schedule of 1000, evenly distributed but for the shift."""
    return (shifted(quantiles, shift) * TRAIN_TIMESTEPS).floor().clamp(max=TRAIN_TIMESTEPS - 1)


# -- Validation -------------------------------------------------------------------------------------------------------


class RefineValidation:
    """Held-out examples with whole references, drawn and encoded once; those that cannot be read are left out. Every
    process computes all of it."""

    def __init__(self, samples: SubjectSamples, rows: Sequence[int], encoders: RefineEncoders) -> None:
        samples = copy.copy(samples)
        samples.options = dataclasses.replace(samples.options, alignment_share=1.0)
        examples = []
        for row in rows:
            try:
                examples.append(samples.read(row, seed=0, epoch=0))
            except (ValueError, OSError) as error:
                logger.warning("%s cannot be validated on: %s", samples.id(row), error)
        self.count, self.device = len(examples), encoders.device
        self.values: dict[str, Any] = encoders(examples) if examples else {}

    def batch(self, quantile: float) -> RefineBatch:
        """All examples at a quantile of the timesteps, always with the same noise."""
        latents = self.values["latents"]
        generator = torch.Generator().manual_seed(seed_of("refine validation"))
        return RefineBatch(
            ids=[""] * self.count,
            seed=0,
            noise=torch.randn(latents.shape, generator=generator).to(self.device),
            timesteps=timesteps_at(torch.full((self.count,), quantile)).to(self.device),
            keeps_references=torch.ones(self.count, dtype=torch.bool, device=self.device),
            **self.values,
        )

    @torch.no_grad()
    def losses(self, objective: Refinement, step: int) -> dict[str, float]:
        """The loss at fixed quantiles of t, and their mean."""
        values = {}
        with evaluating(objective):
            for quantile in QUANTILES:
                mse = objective(self.batch(quantile), step).mse.mean()
                values[f"validation/mse_by_quantile/{quantile}"] = mse.item()
        return {"validation/mse": sum(values.values()) / len(values), **values}

    @torch.no_grad()
    def maps(self, objective: Refinement, refiner: Refiner) -> dict[str, float]:
        """How well each block's attention finds the true region, as mean intersection over union with it, and the
        best of them: the sign that the alignment is learnt."""
        regions = self.values["regions"] >= 0.5
        rows, columns = regions.shape[1:]
        known = regions.flatten(1).any(1)
        values = {}
        for number, attention in enumerate(self._attention(objective, refiner)):
            map = attention_map(attention, self.values["mask"], (rows, columns))
            found = map >= MAP_THRESHOLD * map.amax((1, 2), keepdim=True)
            shared = (found & regions).sum((1, 2)) / (found | regions).sum((1, 2)).clamp(min=1)
            values[f"validation/miou_by_block/{number}"] = shared[known].mean().item()
        return {"validation/miou": max(values.values()), **values} if known.any() else {}

    def _attention(self, objective: Refinement, refiner: Refiner) -> list[torch.Tensor]:
        """Of each block, in their order, `(batch, pixels, tokens)`."""
        batch = self.batch(MAP_QUANTILE)
        with ExitStack() as stack:
            stack.enter_context(evaluating(objective))
            blocks = cross_attention_blocks(refiner.unet)
            recorded = [stack.enter_context(record_attention(block)) for _, block in blocks]
            objective(batch, 0)
        return [calls[0] for calls in recorded]
