"""Videos that show what a run has learnt: of held-out samples, and of prompts and references of one's own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from diffusers import AutoencoderKLWan
from PIL import Image

from refalign import RefAlignWanPipeline, RefAlignWanTransformer3DModel, prepare_reference_images
from refalign.convert import family_scheduler
from refalign.families import FAMILIES, family_of
from refalign.files import naming_component
from refalign.loading import read_defaults
from refalign.pipeline_refalign_wan import FRAMES_PER_LATENT, denormalize_latents
from refalign.transformer_refalign_wan import WAN_CHANNELS
from refalign.variants import find_variant
from refalign.video import write_video
from refalign_training.data.decoding import Decoded, decoded_references
from refalign_training.method.objective import Objective
from refalign_training.run.batches import pad_prompt_embeds
from refalign_training.run.config import PromptOptions, RunCommand, ValidationOptions
from refalign_training.run.inputs import CachedSamples, Encoders, OnlineSamples
from refalign_training.run.parallel import Parallel


# Latents of a sample's references: (16, references, height / 8, width / 8), or of each of any size (16, 1, h, w)
References = torch.Tensor | list[torch.Tensor]


def batch_of_one(references: References) -> Any:
    """A sample's references, or their features, as a batch."""
    return references[None] if isinstance(references, torch.Tensor) else [references]


@dataclass(frozen=True)
class Shown:
    """What one video is made of."""

    name: str
    """The name of its files, without suffix."""
    prompt_embeds: torch.Tensor
    """`(tokens, dim)`."""
    negative_prompt_embeds: torch.Tensor
    """`(tokens, dim)`."""
    reference_latents: References | None
    noise: torch.Tensor
    """`(16, latent frames, height / 8, width / 8)`."""


def encode_prompts(command: RunCommand, samples: CachedSamples | OnlineSamples, parallel: Parallel) -> list[Shown]:
    """Prompts of one's own, for videos of the samples' commonest size, with the negative prompt and the noise that
    `refalign generate` takes. The main process encodes them for all; encoders that the samples do not need are gone
    afterwards. Raises ValueError, naming the prompt, if a reference cannot be read."""
    prompts, model, shown = command.validation.prompts, command.model, []
    sizes, counts = np.unique(samples.buckets[:, :3], axis=0, return_counts=True)
    if isinstance(samples, OnlineSamples):
        encoders = samples.encoders
    else:
        encoders = Encoders(("references", "text"), model, parallel.device)
    for number, prompt in enumerate(prompts if parallel.is_main else (), 1):
        try:
            shown.append(_encode_prompt(f"prompt_{number}", prompt, model.base, encoders, sizes[counts.argmax()]))
        except ValueError as error:
            raise ValueError(f"validation.prompts, prompt {number} ({prompt.prompt:.40}): {error}") from error
    return broadcast_object_list([shown])[0]


def _encode_prompt(name: str, prompt: PromptOptions, model: str, encoders: Encoders, size: np.ndarray) -> Shown:
    frames, height, width = map(int, size)
    latents, defaults = None, read_defaults(model)
    if prompt.references:
        # As they are: what is to be cut out has been, as in the clips' own references
        long_edge = defaults["reference_long_edge"]
        paths = list(prompt.references)
        images = prepare_reference_images(paths, height, width, cut_out=False, long_edge=long_edge)
        latents = encoders.latents("references", decoded_references(images, long_edge))
    own = Decoded(prompts=(prompt.prompt,), prefix="references" if prompt.references else "no_references")
    negative = Decoded(prompts=(defaults["negative_prompt"],), prefix=None)
    embeds, negative_embeds = encoders("text")([own, negative])
    shape = (1, WAN_CHANNELS, (frames - 1) // FRAMES_PER_LATENT + 1, height // 8, width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed))[0]
    return Shown(name, embeds["prompt_embeds_0"], negative_embeds["prompt_embeds_0"], latents, noise)


@dataclass(frozen=True)
class Videos:
    """Makes videos by the weights of now."""

    options: ValidationOptions
    max_sequence_length: int
    parallel: Parallel

    def write(
        self,
        shown: Sequence[Shown],
        objective: Objective,
        transformer: RefAlignWanTransformer3DModel,
        model: Path | None,
        folder: Path,
    ) -> dict[str, Image.Image]:
        """Writes `<name>.mp4`, a video beside its references, and `<name>.png`, frames of it, in place of existing
        files. All processes compute; the one that gets `model`, a pipeline's folder, decodes by its VAE, writes, and
        returns the pictures by their names. `transformer` is the objective's, not wrapped."""
        latents = [self.generate(one, objective, transformer) for one in shown]
        pictures = {}
        if model is None:
            return pictures
        with naming_component("VAE", model):
            vae = AutoencoderKLWan.from_pretrained(
                model,
                subfolder="vae",
                torch_dtype=torch.float32,
                use_safetensors=True,
                variant=find_variant(Path(model, "vae")),
            )
        vae.to(self.parallel.device)  # pyright: ignore[reportArgumentType]  # diffusers' decorator hides `self`
        for one, video in zip(shown, latents, strict=True):
            images = [_decode(vae, latents)[0] for latents in _each(one.reference_latents)]
            frames = [beside(images, frame) for frame in _decode(vae, video[0])]
            pictures[one.name] = strip(frames)
            path = folder / f"{one.name}.mp4"
            write_video(list(map(np.asarray, frames)), path, overwrite=True)
            pictures[one.name].save(path.with_suffix(".png"))
        return pictures

    def generate(self, shown: Shown, objective: Objective, transformer: RefAlignWanTransformer3DModel) -> torch.Tensor:
        """The latents `(1, 16, latent frames, height / 8, width / 8)` of a video."""
        family = FAMILIES[family_of(transformer.config, "the base")]
        own = {name: family.pipeline.get(name) for name in ("call_defaults", "first_sigma")}
        pipeline = RefAlignWanPipeline(None, None, None, family_scheduler(family), transformer, **own)
        pipeline.set_progress_bar_config(disable=True)
        reference_latents: Any = shown.reference_latents
        if isinstance(reference_latents, list):
            reference_latents = [[latents[None] for latents in reference_latents]]
        elif reference_latents is not None:
            reference_latents = reference_latents[None]
        with evaluating(objective), objective.autocast(self.parallel.device):
            return pipeline(
                prompt_embeds=pad_prompt_embeds([shown.prompt_embeds], self.max_sequence_length),
                negative_prompt_embeds=pad_prompt_embeds([shown.negative_prompt_embeds], self.max_sequence_length),
                reference_latents=reference_latents,
                latents=shown.noise[None],
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


def _each(references: References | None) -> list[torch.Tensor]:
    """The latents `(16, 1, h, w)` of each reference."""
    if isinstance(references, torch.Tensor):
        return list(references.split(1, dim=1))
    return references or []


@torch.no_grad()
def _decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> list[Image.Image]:
    """Normalised latents `(16, frames, h, w)` as images."""
    latents = denormalize_latents(latents.to(vae.device, torch.float32), vae.config)
    video = vae.decode(latents[None], return_dict=False)[0][0]
    pixels = ((video.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    return [Image.fromarray(frame) for frame in pixels]


def beside(references: Sequence[Image.Image], frame: Image.Image) -> Image.Image:
    """A frame with its references at its left, one below the other, all of a size that fits its height."""
    if not references:
        return frame
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
