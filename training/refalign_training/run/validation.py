"""What a run measures on samples that it is not trained on. Nothing of it changes the run."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKLWan
from PIL import Image

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel
from refalign.pipeline_refalign_wan import denormalize_latents, paper_scheduler
from refalign.video import write_video
from refalign_training.data.randomness import seed_of
from refalign_training.method.losses import sample_timesteps
from refalign_training.method.objective import Batch, Objective
from refalign_training.method.options import ObjectiveOptions
from refalign_training.run.batches import SampleReader, pad_prompt_embeds
from refalign_training.run.config import ValidationOptions
from refalign_training.run.parallel import Parallel


logger = logging.getLogger(__name__)

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GAIN_QUANTILE = 6  # the place of 0.7: where layout and identity are decided


class Validation:
    """Held-out samples, read once; those that cannot be read are left out."""

    def __init__(
        self,
        samples: SampleReader,
        rows: Sequence[int],
        options: ValidationOptions,
        objective_options: ObjectiveOptions,
        parallel: Parallel,
    ) -> None:
        self.options, self.objective_options, self.parallel = options, objective_options, parallel
        self.values: list[tuple[str, dict[str, torch.Tensor]]] = []
        for row in rows:
            try:
                self.values.append((samples.id(row), samples.encode(samples.read(row, seed=0, epoch=0))))
            except (ValueError, OSError) as error:
                logger.warning("%s cannot be validated on: %s", samples.id(row), error)
        # One that a single process could not read is left out by all: they compute together
        common = set.intersection(*map(set, gather_object([list(dict(self.values))])))
        self.values = [pair for pair in self.values if pair[0] in common]
        self._empty_prompt_embeds = samples.empty_prompt_embeds()

    def losses(self, objective: Objective, step: int) -> dict[str, float]:
        """The unweighted loss at nine fixed quantiles of t, always with the same noise, and their mean; and of the
        alignment, while there is one, its loss and cosine."""
        sums = torch.zeros(len(QUANTILES) + 2, device=self.parallel.device)
        with torch.no_grad(), evaluating(objective):
            for place, counts in self._share(len(self.values) * len(QUANTILES)):
                number, quantile = divmod(place, len(QUANTILES))
                losses = objective(self._batch(number, quantile), step)
                if counts:
                    sums[quantile] += losses.mse[0]
                    sums[-2] += losses.alignment[0]
                    sums[-1] += 0.0 if losses.cosine is None else losses.cosine.mean()
        means = self.parallel.sum(sums) / len(self.values)
        mse, (alignment, cosine) = means[: len(QUANTILES)].tolist(), (means[-2:] / len(QUANTILES)).tolist()
        values = {"validation/mse": sum(mse) / len(mse)}
        for quantile, value in zip(QUANTILES, mse, strict=True):
            values[f"validation/mse_by_quantile/{quantile}"] = value
        if objective.alignment_weight(step):
            values |= {"validation/alignment": alignment, "validation/cosine": cosine}
        return values

    def gains(self, objective: Objective, step: int) -> dict[str, float]:
        """What the loss rises by, at a high t, if a sample gets another one's references (`reference_gain`), or its
        own in reverse order (`order_gain`): early signs that references are followed, and are told from each other."""
        names = ("validation/reference_gain", "validation/order_gain")
        sums = torch.zeros(2, len(names), device=self.parallel.device)  # of the gains, and how many samples have them
        with torch.no_grad(), evaluating(objective):
            for number, counts in self._share(len(self.values)):
                own = self.values[number][1]["reference_latents"]
                exchanged = (self._references_of_another(number), own.flip(1) if own.shape[1] > 1 else own)
                loss = objective(self._batch(number, GAIN_QUANTILE), step).mse[0]
                for index, other in enumerate(exchanged):
                    gain = objective(self._batch(number, GAIN_QUANTILE, other), step).mse[0] - loss
                    if counts and other is not own:
                        sums[0, index] += gain
                        sums[1, index] += 1
        totals = zip(names, *self.parallel.sum(sums).tolist(), strict=True)
        return {name: total / count for name, total, count in totals if count}

    def _share(self, count: int) -> Iterator[tuple[int, bool]]:
        """This process's part of so many items, and whether each counts. Sharded processes compute together, so all of
        them take equally many: some take one that does not count."""
        rank, world_size = self.parallel.rank, self.parallel.world_size
        for place in range(rank, math.ceil(count / world_size) * world_size, world_size):
            yield place % count, place < count

    def _references_of_another(self, number: int) -> torch.Tensor:
        """The references of the next sample with latents of the same shape; its own if there is none."""
        own = self.values[number][1]["reference_latents"]
        for _, value in (*self.values[number + 1 :], *self.values[:number]):
            if value["reference_latents"].shape == own.shape:
                return value["reference_latents"]
        return own

    def _batch(self, number: int, quantile: int, references: torch.Tensor | None = None) -> Batch:
        """A sample at one of the quantiles of t, perhaps with other references."""
        sample_id, value = self.values[number]
        references = value["reference_latents"] if references is None else references
        generator = torch.Generator().manual_seed(seed_of("validation", sample_id, quantile))
        quantiles = torch.tensor([QUANTILES[quantile]], dtype=torch.float64)
        timesteps, weights = sample_timesteps(self.objective_options.timesteps, quantiles)
        return Batch(
            ids=[sample_id],
            seed=0,
            latents=value["latents"][None],
            noise=torch.randn(value["latents"].shape, generator=generator)[None],
            reference_latents=references[None],
            prompt_embeds=pad_prompt_embeds([value["prompt_embeds"]], self.objective_options.max_sequence_length),
            timesteps=timesteps,
            weights=weights,
            keeps_references=torch.tensor([True]),
            subjects=value["subjects"][None],
            teacher_features=value["teacher_features"][None] if "teacher_features" in value else None,
        ).to(self.parallel.device)

    def write_videos(
        self, objective: Objective, transformer: RefAlignWanTransformer3DModel, model: Path | None, folder: Path
    ) -> dict[str, Image.Image]:
        """Writes for the first samples `<id>.mp4`, the video beside its references, and `<id>.png`, frames of it, in
        place of existing files. All processes compute; the one that gets `model`, a pipeline's folder, decodes by its
        VAE, writes, and returns the pictures by their samples' ids. `transformer` is the objective's, not wrapped."""
        count = min(self.options.videos, len(self.values))
        latents = [self._generate(number, objective, transformer) for number in range(count)]
        pictures = {}
        if model is None:
            return pictures
        vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True)
        vae.to(self.parallel.device)  # pyright: ignore[reportArgumentType]  # diffusers' decorator hides `self`
        for (sample_id, value), video in zip(self.values, latents, strict=False):
            references = [_decode(vae, latent[:, None])[0] for latent in value["reference_latents"].unbind(1)]
            frames = [beside(references, frame) for frame in _decode(vae, video[0])]
            pictures[sample_id] = strip(frames)
            path = folder / f"{sample_id}.mp4"
            write_video(list(map(np.asarray, frames)), path, overwrite=True)
            pictures[sample_id].save(path.with_suffix(".png"))
        return pictures

    def _generate(self, number: int, objective: Objective, transformer: RefAlignWanTransformer3DModel) -> torch.Tensor:
        sample_id, value = self.values[number]
        pipeline = RefAlignWanPipeline(None, None, None, paper_scheduler(), transformer)
        pipeline.set_progress_bar_config(disable=True)
        length = self.objective_options.max_sequence_length
        generator = torch.Generator().manual_seed(seed_of("video", sample_id))
        with evaluating(objective), objective.autocast(self.parallel.device):
            return pipeline(
                prompt_embeds=pad_prompt_embeds([value["prompt_embeds"]], length),
                negative_prompt_embeds=pad_prompt_embeds([self._empty_prompt_embeds], length),
                reference_latents=value["reference_latents"][None],
                latents=torch.randn(value["latents"][None].shape, generator=generator),
                num_inference_steps=self.options.video_steps,
                guidance_scale=self.options.guidance_scale,
                image_guidance_scale=self.options.image_guidance_scale,
                output_type="latent",
            ).frames


@contextmanager
def evaluating(objective: Objective) -> Iterator[None]:
    """Inside this context, the transformer works without dropout."""
    objective.transformer.eval()
    try:
        yield
    finally:
        objective.transformer.train()


@torch.no_grad()
def _decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> list[Image.Image]:
    """Normalised latents `(16, frames, h, w)` as images."""
    latents = denormalize_latents(latents.to(vae.device, torch.float32), vae.config)
    video = vae.decode(latents[None], return_dict=False)[0][0]
    pixels = ((video.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    return [Image.fromarray(frame) for frame in pixels]


def beside(references: Sequence[Image.Image], frame: Image.Image) -> Image.Image:
    """A frame with its references at its left, one below the other, all of a size that fits its height."""
    height = frame.height // len(references)
    width = round(frame.width * height / frame.height) // 2 * 2
    picture = Image.new("RGB", (width + frame.width, frame.height), "white")
    for number, reference in enumerate(references):
        picture.paste(reference.resize((width, height)), (0, number * height))
    picture.paste(frame, (width, 0))
    return picture


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """The first, middle and last frame, one below the other."""
    shown = (frames[0], frames[len(frames) // 2], frames[-1])
    return Image.fromarray(np.concatenate(list(map(np.asarray, shown))))
