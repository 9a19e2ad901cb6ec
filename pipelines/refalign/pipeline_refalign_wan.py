"""RefAlign's pipeline: reference images and a prompt become a video (RefAlign, arXiv 2603.25743).

A Hub repo carries this file at its root, with `reference_images.py` and `transformer_refalign_wan.py` beside it.
"""

import importlib
import inspect
import json
import logging
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKLWan,
    ContextParallelConfig,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from diffusers.video_processor import VideoProcessor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer, UMT5EncoderModel

from .reference_images import prepare_reference_image
from .transformer_refalign_wan import (
    WAN_CHANNELS,
    WAN_CLASSES,
    KeptOverSteps,
    RefAlignWanTransformer3DModel,
    check_finite,
    check_is_wan21,
    other_model,
)


# Wan's own, with which RefAlign's results were made
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"  # noqa: RUF001
    "杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


# What a call takes for arguments that neither it nor the model's repo gives: the settings of the published models
CALL_DEFAULTS = {
    "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
    "height": 480,
    "width": 832,
    "num_frames": 81,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "image_guidance_scale": 5.0,
    "max_sequence_length": 512,
    "guidance_projection": None,
    "reference_long_edge": None,
}
TOKEN_PIXELS = 16  # the side of a token in pixels: the VAE's 8 times the transformer's patch of 2
TRAINED_REFERENCES = {"frames": 3, "sources": 5}  # the most in a sample, of RefAlign and of Bernini-R
FEW_TOKENS = 1000  # of a video: up to so many, its text is a large part of a step's work
FRAMES_PER_LATENT = 4  # frames of the video in a latent frame, except for the first, which has one


def guidance_passes(
    guidance_scale: float, image_guidance_scale: float, has_references: bool = True, is_projected: bool = False
) -> list[tuple[str, float]]:
    """
    The forward passes that a step needs, in order, each with its weight in [`combine_passes`].

    `"null"` is the negative prompt with null references, `"reference"` the negative prompt with the references,
    `"full"` the prompt with the references: `v = null + g_ref (reference - null) + g_text (full - reference)`. A pass
    whose coefficient in that sum is zero is left out, but not with [`project_guidance`], where no difference is as it
    was. Without references it is Wan's text guidance.
    """
    if not has_references:
        return [("null", 1.0), ("full", guidance_scale)] if guidance_scale > 1 else [("full", 1.0)]
    passes = [
        ("null", 1.0, 1 - image_guidance_scale),
        ("reference", image_guidance_scale, image_guidance_scale - guidance_scale),
        ("full", guidance_scale, guidance_scale),
    ]
    return [(name, weight) for name, weight, coefficient in passes if is_projected or coefficient != 0]


def combine_passes(predictions: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """`p_0 + sum_i w_i (p_i - p_(i-1))` in float32: RefAlign's guidance for the passes of [`guidance_passes`]."""
    predictions = [prediction.float() for prediction in predictions]
    velocity = predictions[0]
    for previous, prediction, weight in zip(predictions, predictions[1:], weights[1:], strict=False):
        velocity = velocity + weight * (prediction - previous)
    return velocity


def project_guidance(
    predictions: Sequence[torch.Tensor],
    weights: Sequence[float],
    latents: torch.Tensor,
    sigma: float,
    projection: Mapping[str, Any],
    running: dict[int, torch.Tensor],
) -> torch.Tensor:
    """
    [`combine_passes`] by adaptive projected guidance (arXiv 2410.02416), as Bernini-R does it (arXiv 2605.22344):
    between denoised latents, each latent frame by itself, the part of each difference that is parallel to its target
    is scaled by `eta`.

    Args:
        predictions (`Sequence[torch.Tensor]`): velocities `(batch, channels, frames, height, width)`, as in
            [`combine_passes`].
        weights (`Sequence[float]`): of the passes, as in [`combine_passes`].
        latents (`torch.Tensor`): the noisy latents.
        sigma (`float`): their noise level.
        projection (`Mapping`): `eta` (1: nothing is projected), `momentum` (0: none) and `thresholds` of the image's
            and the text's difference (the largest norm of a frame; 0: any), all optional.
        running (`dict[int, torch.Tensor]`): the differences of earlier steps, for the momentum; written to.
    """
    latents = latents.float()
    denoised = [latents - sigma * prediction.float() for prediction in predictions]
    thresholds = projection.get("thresholds", (0, 0))[-(len(denoised) - 1) :]
    guided = denoised[0]
    for number, threshold in enumerate(thresholds[: len(denoised) - 1], 1):
        difference = denoised[number] - denoised[number - 1]
        if momentum := projection.get("momentum", 0):
            difference = difference + momentum * running.get(number, 0)
            running[number] = difference
        projected = _projected(difference, denoised[number], projection.get("eta", 1), threshold)
        guided = guided + weights[number] * projected
    return (latents - guided) / sigma


def _projected(difference: torch.Tensor, target: torch.Tensor, eta: float, threshold: float) -> torch.Tensor:
    dims = (1, 3, 4)  # of a latent frame
    if threshold > 0:
        norm = difference.norm(p=2, dim=dims, keepdim=True)
        difference = difference * (threshold / norm.clamp(min=1e-12)).clamp(max=1)
    target = target.double()
    unit = target / target.norm(p=2, dim=dims, keepdim=True).clamp(min=1e-12)
    parallel = ((difference.double() * unit).sum(dims, keepdim=True) * unit).to(difference)
    return difference - parallel + eta * parallel


def passes_made(names: Sequence[str], guidance_gate: Sequence[float] | None, step: int, num_steps: int) -> list[str]:
    """
    Which passes a step makes with a guidance gate: from its share of the steps on, the null pass and then the
    reference pass are left out. The last pass of a step is always made, and so are all of the first step.

    Args:
        names (`Sequence[str]`): the step's passes, in the order of [`guidance_passes`].
        guidance_gate (`Sequence[float]`, *optional*): the shares of the steps that make a null pass, and a reference
            pass. `None` leaves nothing out.
        step (`int`): counted from 0.
        num_steps (`int`): of how many.
    """
    if guidance_gate is None or step == 0:
        return list(names)
    ends = {"null": round(guidance_gate[0] * num_steps), "reference": round(guidance_gate[1] * num_steps)}
    return [name for name in names if name == names[-1] or step < ends[name]]


def gate_closes(guidance_gate: Sequence[float] | None, step: int, num_steps: int) -> bool:
    """Whether a step is the last one to make a pass that later steps leave out."""
    names = ("null", "reference", "full")
    this, following = (passes_made(names, guidance_gate, step + later, num_steps) for later in (0, 1))
    return step + 1 < num_steps and this != following


def count_passes(names: Sequence[str], guidance_gate: Sequence[float] | None, num_steps: int) -> int:
    """How many passes all steps of a video take together."""
    return sum(len(passes_made(names, guidance_gate, step, num_steps)) for step in range(num_steps))


def complete_passes(
    names: Sequence[str], made: Mapping[str, torch.Tensor], differences: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """
    The predictions of all passes, float32, of those that a gated step has made: one that is left out is as far from
    the next one as it was when it was last made (Adaptive Guidance, arXiv 2312.12487, for two levels of guidance).

    Args:
        names (`Sequence[str]`): the step's passes, in the order of [`guidance_passes`].
        made (`Mapping[str, torch.Tensor]`): the predictions of those that were made; the last one is among them.
        differences (`dict[str, torch.Tensor]`): of each pass, how far the next one is from it. Those of the passes
            that were made are put in.
    """
    following = made[names[-1]].float()
    predictions = [following]
    for name in reversed(names[:-1]):
        if name in made:
            prediction = made[name].float()
            differences[name] = following - prediction
        else:
            prediction = following - differences[name]
        predictions.insert(0, prediction)
        following = prediction
    return predictions


def processes_per_pass(processes: int, passes: int) -> int:
    """
    How many processes share the tokens of a pass; with fewer processes than passes, each makes whole ones.

    Raises:
        ValueError: if there are more processes than passes, which do not divide into them.
    """
    if processes <= passes:
        return 1
    if processes % passes:
        raise ValueError(
            f"{processes} processes do not divide into the {passes} passes of a step. Start {passes} processes, or a "
            "multiple of that."
        )
    return processes // passes


def paper_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of RefAlign's results: Euler, shift 5 (arXiv 2603.25743)."""
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def normalize_latents(latents: torch.Tensor, vae_config: Mapping[str, Any]) -> torch.Tensor:
    """
    The VAE's latents as the transformer sees them: `(latents - mean) / std` by channel, in float32.

    Args:
        latents (`torch.Tensor`): `([batch,] channels, frames, height, width)`.
        vae_config (`Mapping`): the configuration of an [`AutoencoderKLWan`], with `latents_mean` and `latents_std`.
    """
    latents = latents.float()
    return (latents - _by_channel(latents, vae_config["latents_mean"])) / _by_channel(
        latents, vae_config["latents_std"]
    )


def denormalize_latents(latents: torch.Tensor, vae_config: Mapping[str, Any]) -> torch.Tensor:
    """The inverse of [`normalize_latents`], in the dtype of `latents`."""
    return latents * _by_channel(latents, vae_config["latents_std"]) + _by_channel(latents, vae_config["latents_mean"])


def _by_channel(latents: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return latents.new_tensor(values).view(-1, 1, 1, 1)


class RefAlignWanPipeline(WanPipeline):
    r"""
    Reference-to-video generation with RefAlign on Wan 2.1: the subjects of the reference images act out the prompt.

    Without references it is Wan's text-to-video pipeline. LoRAs are loaded as for [`WanPipeline`].

    Args:
        tokenizer ([`T5TokenizerFast`]): the tokenizer of `google/umt5-xxl`.
        text_encoder ([`UMT5EncoderModel`]): `google/umt5-xxl`.
        vae ([`AutoencoderKLWan`]): encodes references and decodes videos.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]): with shift 5 it is the paper's schedule. Others of diffusers
            for flow matching work too, such as [`UniPCMultistepScheduler`].
        transformer ([`RefAlignWanTransformer3DModel`]): a plain [`WanTransformer3DModel`] is given the reference
            branch, sharing its weights.
        call_defaults (`dict`, *optional*): arguments of a call that suit this model better than the published models'
            ([`CALL_DEFAULTS`]); kept in `model_index.json`, as what follows is.
        prompt_prefix (`dict`, *optional*): what stands before every prompt, `{"references": ..., "no_references":
            ...}`, for models that were trained so.
        first_sigma (`float`, *optional*): the noise level of the first step, before the scheduler's shift; the
            others follow in equal steps. `None`: the scheduler's own, or 1 with [`FlowMatchEulerDiscreteScheduler`].
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _optional_components = []

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: WanTransformer3DModel,
        call_defaults: dict[str, Any] | None = None,
        prompt_prefix: dict[str, str] | None = None,
        first_sigma: float | None = None,
    ) -> None:
        if unknown := sorted((call_defaults or {}).keys() - CALL_DEFAULTS.keys()):
            raise ValueError(f"`call_defaults` names {unknown}; it can name {sorted(CALL_DEFAULTS)}.")
        _check_kept_settings(prompt_prefix, first_sigma)
        DiffusionPipeline.__init__(self)  # not WanPipeline's: it registers Wan 2.2's second transformer
        _check_parts(transformer, vae)
        # `type is`, not `isinstance`: RefAlign's own class is one too, and each load from the Hub makes a new one
        if type(transformer) is WanTransformer3DModel:
            transformer = RefAlignWanTransformer3DModel.from_wan(transformer)
            logging.getLogger(__name__).warning(
                "This transformer is plain Wan's: without a RefAlign LoRA it hardly follows references."
            )
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )
        self.register_to_config(call_defaults=call_defaults, prompt_prefix=prompt_prefix, first_sigma=first_sigma)
        self._pass_group: dist.ProcessGroup | None = None  # over which the guidance passes are spread
        self.vae_scale_factor_temporal = vae.config["scale_factor_temporal"] if vae is not None else 4
        self.vae_scale_factor_spatial = vae.config["scale_factor_spatial"] if vae is not None else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @property
    def call_defaults(self) -> dict[str, Any]:
        """What a call of this model takes for arguments that are not given."""
        return CALL_DEFAULTS | (self.config.get("call_defaults") or {})

    @property
    def has_sources(self) -> bool:
        """Whether each reference has a size of its own, and a pass without references has no tokens of them."""
        return self.transformer.config.get("reference_rope", "frames") == "sources"

    @property
    def image_guidance_scale(self) -> float:
        return self._image_guidance_scale

    def enable_guidance_parallel(self, passes: int = 3) -> None:
        """
        Spreads the guidance passes over the processes of `torch.distributed`, which must be initialised: pass i of a
        step is made by process i mod M, and all get all of them by one all-gather per step. The video is the same bit
        for bit, in every process, as that of one process with `batch_passes=False`.

        Every process must make the same calls, with the same noise. Where there are more processes than passes, those
        of a pass share its tokens (diffusers' context parallelism), which is equal up to rounding.

        Args:
            passes (`int`, defaults to `3`): the most passes that a step of these calls makes ([`guidance_passes`]).

        Raises:
            ValueError: if the processes do not divide into the passes, or the heads of attention into them.
        """
        degree = processes_per_pass(dist.get_world_size(), passes)
        self._pass_group = dist.group.WORLD
        if degree == 1:
            return
        if torch.accelerator.device_count() == 0:
            raise ValueError(f"On a CPU, processes cannot share the tokens of a pass. Start {passes} at most.")
        heads = self.transformer.config.num_attention_heads
        if heads % degree:
            raise ValueError(
                f"{degree} processes would share a pass, but this model's {heads} heads of attention do not divide by "
                f"{degree}. Start {passes} processes."
            )
        shape, names = (dist.get_world_size() // degree, 1, degree), ("passes", "ring", "ulysses")
        mesh = init_device_mesh(self.transformer.device.type, shape, mesh_dim_names=names)
        self._pass_group = mesh.get_group("passes")
        self.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, mesh=mesh))

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        reference_images: Any = None,
        reference_latents: Any = None,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = (),
        max_sequence_length: int = 512,
        guidance_gate: Sequence[float] | None = None,
        guidance_projection: Mapping[str, Any] | None = None,
        reference_long_edge: int | None = None,
        batch_passes: bool | None = None,
    ) -> None:
        """Raises ValueError for the first argument that is wrong, with its value and what would be right."""
        _, patch_height, patch_width = self.transformer.config.patch_size
        multiples = (self.vae_scale_factor_spatial * patch_height, self.vae_scale_factor_spatial * patch_width)
        check_size(height, width, num_frames, multiples, self.vae_scale_factor_temporal)
        check_settings(num_inference_steps, guidance_scale, image_guidance_scale, guidance_gate)
        check_projection(guidance_projection)
        if reference_long_edge is not None and not self.has_sources:
            raise ValueError(
                f"`reference_long_edge` is {reference_long_edge!r}, but this model reads references in the video's "
                "size: its `reference_rope` is 'frames'. Leave it out."
            )
        _check_count("num_videos_per_prompt", num_videos_per_prompt)
        _check_count("max_sequence_length", max_sequence_length)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', but is {output_type!r}.")
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise ValueError(
                f'`attention_kwargs` must be a dict such as {{"scale": 0.5}}, but is {attention_kwargs!r}.'
            )
        self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        batch_size = _batch_size(prompt, prompt_embeds)
        self._check_references(reference_images, reference_latents, batch_size, height, width)
        shape = self._latents_shape(batch_size * num_videos_per_prompt, num_frames, height, width)
        _check_noise(generator, latents, shape)
        if self.transformer._parallel_config is not None and self.transformer.is_cache_enabled:
            raise ValueError(
                "A cache cannot be used where processes share the tokens of a pass: each would decide by its own "
                "tokens what to compute. Start as many processes as passes at most, or use no cache."
            )
        if batch_passes and (reason := self._apart()) is not None:
            raise ValueError(f"`batch_passes` is True, but {reason}. Leave it out.")
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if prompt is not None:
            self._check_part("text_encoder")
        if output_type != "latent" or reference_images is not None:
            self._check_part("vae")

    def _apart(self) -> str | None:
        """Why passes cannot be one batch, if so."""
        if self._pass_group is not None:
            return "processes share the passes"
        if self.transformer.is_cache_enabled:
            return "a cache keeps what it reuses for each pass"
        return "this model has no tokens of references in its null pass" if self.has_sources else None

    def _check_part(self, name: str) -> None:
        if getattr(self, name) is None:
            raise ValueError(f"This call needs the pipeline's `{name}`, but it was loaded without one.")

    def _check_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass exactly one of `prompt` and `prompt_embeds`.")
        _check_text("prompt", prompt)
        _check_text("negative_prompt", negative_prompt)
        if negative_prompt_embeds is not None and negative_prompt not in (None, self.call_defaults["negative_prompt"]):
            raise ValueError("Pass either `negative_prompt` or `negative_prompt_embeds`, not both.")
        text_dim = self.transformer.config.text_dim
        if prompt_embeds is not None:
            _check_tensor("prompt_embeds", prompt_embeds, (None, None, text_dim))
        batch_size = _batch_size(prompt, prompt_embeds)
        if negative_prompt_embeds is not None:
            _check_tensor("negative_prompt_embeds", negative_prompt_embeds, (batch_size, None, text_dim))
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(
                f"`negative_prompt` has {len(negative_prompt)} entries for {batch_size} prompts. Pass one string for "
                "all prompts, or one per prompt."
            )

    def _check_references(
        self, reference_images: Any, reference_latents: torch.Tensor | None, batch_size: int, height: int, width: int
    ) -> None:
        if reference_images is not None and reference_latents is not None:
            raise ValueError("Pass either `reference_images` or `reference_latents`, not both.")
        split_reference_images(reference_images, batch_size)
        if self.has_sources:
            self._check_sources(reference_latents, batch_size)
        elif reference_latents is not None:
            _, channels, _, height, width = self._latents_shape(batch_size, 1, height, width)
            _check_tensor("reference_latents", reference_latents, (batch_size, channels, None, height, width))

    def _check_sources(self, reference_latents: Any, batch_size: int) -> None:
        channels = self.transformer.config.in_channels
        for latents in split_reference_images(reference_latents, batch_size):
            for one in latents:
                _check_tensor("reference_latents", one, (1, channels, 1, None, None))

    def _check_callback(
        self, callback_on_step_end: Callable | None, callback_on_step_end_tensor_inputs: Sequence[str] | None
    ) -> None:
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be callable, but is {callback_on_step_end!r}.")
        unknown = [k for k in callback_on_step_end_tensor_inputs or () if k not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; it can have {self._callback_tensor_inputs}."
            )

    def _default_size(self, latents: torch.Tensor | None, reference_latents: Any) -> tuple[int, int, int]:
        """(height, width, frames) of given latents, else those that the model was trained at"""
        defaults = self.call_defaults
        height, width, num_frames = defaults["height"], defaults["width"], defaults["num_frames"]
        for tensor in (None if self.has_sources else reference_latents, latents):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 5:
                height = tensor.shape[3] * self.vae_scale_factor_spatial
                width = tensor.shape[4] * self.vae_scale_factor_spatial
        if isinstance(latents, torch.Tensor) and latents.ndim == 5:
            num_frames = (latents.shape[2] - 1) * self.vae_scale_factor_temporal + 1
        return height, width, num_frames

    def _latents_shape(self, num_videos: int, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """(videos, channels, latent frames, latent height, latent width)"""
        return (
            num_videos,
            self.transformer.config.in_channels,
            (num_frames - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Noise in float32, drawn on the CPU (so that a seed gives the same video on every device) unless the
        generator is on another device; or the given `latents`."""
        if latents is not None:
            return latents.to(device, torch.float32)
        first = generator[0] if isinstance(generator, list) else generator
        noise_device = torch.device("cpu") if first is None else first.device
        return randn_tensor(shape, generator=generator, device=noise_device, dtype=torch.float32).to(device)

    @torch.no_grad()
    def encode_reference(self, image: Any, height: int, width: int, long_edge: int | None = None) -> torch.Tensor:
        """
        A reference image as latents of shape `(1, channels, 1, height / 8, width / 8)`, float32, normalised as the
        video's are: letterboxed on white, encoded as a one-frame video (RefAlign, section 3). With
        `long_edge` its size is the reference's own, at most so many pixels long (Bernini-R).
        """
        image = prepare_reference_image(image, height, width, cut_out=False, long_edge=long_edge)
        pixels = self.video_processor.preprocess(image)[:, :, None]
        pixels = pixels.to(get_module_execution_device(self.vae), self.vae.dtype)
        return normalize_latents(self.vae.encode(pixels).latent_dist.mode(), self.vae.config)

    def prepare_references(
        self,
        reference_images: Any,
        reference_latents: Any,
        batch_size: int,
        height: int,
        width: int,
        long_edge: int | None = None,
    ) -> list[torch.Tensor | list[torch.Tensor] | None]:
        """One entry per prompt: its references' latents, `(1, channels, references, h, w)` in float32, or `None`. For
        a model with sources a list of `(1, channels, 1, h, w)`, each of its own size."""
        if reference_latents is not None and not self.has_sources:
            return list(reference_latents.float().split(1))
        if reference_latents is not None:
            prompts = split_reference_images(reference_latents, batch_size)
            return [[one.float() for one in latents] or None for latents in prompts]
        references = []
        for index, images in enumerate(split_reference_images(reference_images, batch_size)):
            latents = []
            for number, image in enumerate(images):
                try:
                    latents.append(self.encode_reference(image, height, width, long_edge))
                except ValueError as error:
                    raise ValueError(f"Reference {number + 1} of prompt {index + 1}: {error}") from error
            if not self.has_sources and latents:
                latents = torch.cat(latents, dim=2)
            references.append(None if len(latents) == 0 else latents)
        return references

    def _with_prefix(self, prompt: str | list[str] | None, references: Sequence[Any]) -> str | list[str] | None:
        """The prompts with what this model wants before them."""
        prefix = self.config.get("prompt_prefix")
        if prompt is None or not prefix:
            return prompt
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prefixed = []
        for text, own in zip(prompts, references, strict=True):
            prefixed.append(prefix["no_references" if own is None else "references"] + prompt_clean(text))
        return prefixed

    def _tell_cut_text(self, name: str, texts: str | list[str] | None, max_sequence_length: int) -> None:
        """Logs which end of a text the model does not read."""
        for text in [texts] if isinstance(texts, str) else texts or []:
            tokens = self.tokenizer(prompt_clean(text), verbose=False).input_ids
            if len(tokens) > max_sequence_length:  # the last one read stands for the end
                unread = self.tokenizer.decode(tokens[max_sequence_length - 1 :], skip_special_tokens=True)
                logging.getLogger(__name__).warning(
                    "`%s` has %d tokens, but the model reads %d: what begins with %r is not read. Shorten it.",
                    *(name, len(tokens), max_sequence_length, unread[:60]),
                )

    def _predict_velocity(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        texts: "_GroupTexts",
        references: torch.Tensor | list[torch.Tensor] | None,
        context_suffix: str,
        context: dict[str, Any],
        batches_passes: bool,
        guidance_gate: Sequence[float] | None,
        differences: dict[str, torch.Tensor],
        guidance_projection: Mapping[str, Any] | None,
        running: dict[int, torch.Tensor],
    ) -> torch.Tensor:
        """The guided velocity, float32, for samples with the same number of references. `differences` are those of
        [`complete_passes`], without any if all passes must be made; `running` those of [`project_guidance`]."""
        scales = (self.guidance_scale, self.image_guidance_scale)
        passes = guidance_passes(*scales, references is not None, bool(guidance_projection))
        names = [name for name, _ in passes]
        gate = guidance_gate if differences else None
        made: dict[str, torch.Tensor] = {}
        asked = passes_made(names, gate, context["step_index"], context["num_inference_steps"])
        own = [name for name in asked if self._pass_group is None or self._makes(names.index(name))]
        for batch in [own] if batches_passes and texts.are_alike else [[name] for name in own]:
            # A context of its own for each pass and group of samples, else caches mix them
            with self.transformer.cache_context(batch[0] + context_suffix, **context):
                predictions = self.transformer(
                    hidden_states=torch.cat(len(batch) * [latents.to(self.transformer.dtype)]),
                    timestep=timestep.expand(len(batch) * latents.shape[0]),
                    encoder_hidden_states=texts.of(batch),
                    attention_kwargs=self.attention_kwargs,
                    return_dict=False,
                    reference_hidden_states=_references_of(batch, references),
                )[0]
            made |= dict(zip(batch, predictions.chunk(len(batch)), strict=True))
        if self._pass_group is not None:
            made = self._gather_passes(names, asked, made, latents)
        weights = [weight for _, weight in passes]
        predictions = list(made.values())
        if guidance_gate is not None:
            predictions = complete_passes(names, made, differences)
        if guidance_projection and len(predictions) > 1:
            sigma = context["sigma"]
            return project_guidance(predictions, weights, latents, sigma, guidance_projection, running)
        return combine_passes(predictions, weights)

    def _makes(self, number: int) -> bool:
        """Whether this process makes a step's pass of this number. It does so in all steps, for the caches' sake."""
        return number % dist.get_world_size(self._pass_group) == dist.get_rank(self._pass_group)

    def _gather_passes(
        self, names: Sequence[str], asked: Sequence[str], made: Mapping[str, torch.Tensor], latents: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """All predictions that were asked for, float32, from the processes that made them, by one all-gather."""
        processes = dist.get_world_size(self._pass_group)
        shares: list[list[str]] = [[] for _ in range(processes)]
        for name in asked:
            shares[names.index(name) % processes].append(name)
        own = latents.new_zeros(max(map(len, shares)), *latents.shape, dtype=torch.float32)
        for place, prediction in enumerate(made.values()):
            own[place] = prediction
        gathered = [torch.empty_like(own) for _ in shares]
        dist.all_gather(gathered, own, group=self._pass_group)
        everything = {}
        for share, predictions in zip(shares, gathered, strict=True):
            everything |= dict(zip(share, predictions, strict=False))
        return {name: everything[name] for name in asked}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = DEFAULT_NEGATIVE_PROMPT,
        reference_images: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        reference_latents: torch.Tensor | list[Any] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' own signature)
        max_sequence_length: int | None = None,
        guidance_gate: tuple[float, float] | None = None,
        guidance_projection: Mapping[str, Any] | None = None,
        reference_long_edge: int | None = None,
        batch_passes: bool | None = None,
    ) -> WanPipelineOutput | tuple:
        r"""
        Makes a video of the references' subjects acting out the prompt.

        Defaults are the published models'; a repo's own `call_defaults` go before them.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What happens. Or pass `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to `DEFAULT_NEGATIVE_PROMPT`):
                What should not be seen. The default is Wan's, in Chinese; `None` or `""` stands for an empty one.
            reference_images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, `list`, *optional*):
                One image, or a list of them, each a PIL image, an array `(height, width, channels)`, a tensor
                `(channels, height, width)`, a path or a URL. For a list of prompts, a list with one such list per
                prompt; their lengths may differ. Letterboxed on white to the video's size. `None`: text-to-video.
            height (`int`, *optional*, defaults to that of `latents` or `reference_latents`, else to `480`):
                The video's height in pixels, a multiple of 16.
            width (`int`, *optional*, defaults to that of `latents` or `reference_latents`, else to `832`):
                The video's width in pixels, a multiple of 16.
            num_frames (`int`, *optional*, defaults to that of `latents`, else to `81`):
                The video's frames, 4k + 1. The model was trained on 81 frames at 16 per second.
            num_inference_steps (`int`, defaults to `50`):
                The number of denoising steps.
            guidance_scale (`float`, defaults to `7.5`):
                How closely the prompt is followed: `g_text` of [`guidance_passes`]. With references, 0 leaves the
                prompt out; without them, anything up to 1 is Wan's "no guidance".
            image_guidance_scale (`float`, defaults to `5.0`):
                How closely the references are followed: `g_ref` of [`guidance_passes`]. With both scales at 1 a step
                takes one forward pass (for distilled LoRAs), else two or three.
            num_videos_per_prompt (`int`, defaults to `1`):
                How many videos to make of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the noise repeatable; a list has one per video.
            latents (`torch.Tensor` of shape `(batch, channels, frames, height / 8, width / 8)`, *optional*):
                The noise to start from.
            prompt_embeds (`torch.Tensor` of shape `(batch, text_tokens, text_dim)`, *optional*):
                In place of `prompt`.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch, text_tokens, text_dim)`, *optional*):
                In place of `negative_prompt`.
            reference_latents (`torch.Tensor`, *optional*):
                Latents of shape `(batch, channels, references, height / 8, width / 8)` in place of `reference_images`,
                as [`~RefAlignWanPipeline.encode_reference`] makes them. For a model with sources a list of
                `(1, channels, 1, h, w)`, or a list of such lists, one per prompt.
            output_type (`str`, defaults to `"np"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`WanPipelineOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*):
                `{"scale": s}` scales the LoRAs.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipeline, step, timestep, callback_kwargs)`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Which tensors `callback_kwargs` holds: of `latents`, `prompt_embeds`, `negative_prompt_embeds`.
            max_sequence_length (`int`, defaults to `512`):
                The number of text tokens; Wan was trained with 512.
            guidance_gate (`tuple[float, float]`, *optional*):
                `(null_until, reference_until)`, shares of the steps from 0 to 1, for speed: after the first the null
                pass is left out, after the second the reference pass too, and the guidance that each added when it
                was last made is added again ([`complete_passes`]). The first step makes all passes. A callback that
                changes the scales or the embeddings lets one more step make all passes. `None` is exact.

            guidance_projection (`dict`, *optional*, defaults to the model's own):
                `eta`, `thresholds` and `momentum` of [`project_guidance`], such as `{"eta": 0.5, "thresholds": [50,
                50]}`: less of what makes colours burn at high scales. `{}` is plain guidance.
            reference_long_edge (`int`, *optional*, defaults to the model's own):
                The longer side of a reference at most, in pixels, for models that read references in their own
                aspect (Bernini-R: 848).
            batch_passes (`bool`, *optional*, defaults to whether videos are small):
                Whether a step makes its passes as one batch: the same up to rounding, with more memory. By default up
                to 1,000 tokens of all videos, where it is faster, and not with caches, compiled or offloaded blocks,
                processes that share the passes, or references in sizes of their own. Embeddings of unequal lengths
                are never one batch.

        Returns:
            [`WanPipelineOutput`] or `tuple`: the videos, as `frames`.

        Raises:
            ValueError: for a wrong argument, before anything is computed.

        Examples:
            ```python
            >>> import torch
            >>> from refalign import RefAlignWanPipeline, write_video

            >>> dtypes = {"default": torch.bfloat16, "vae": torch.float32}
            >>> pipe = RefAlignWanPipeline.from_pretrained("ORG/NAME", dtype=dtypes).to("cuda")
            >>> video = pipe("A woman walks her dog on a beach.", reference_images=["woman.png", "dog.png"]).frames[0]
            >>> write_video(video, "walk.mp4")
            ```
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Defaults of the model, and checks
        defaults = self.call_defaults
        if negative_prompt == DEFAULT_NEGATIVE_PROMPT:
            negative_prompt = defaults["negative_prompt"]
        default_height, default_width, default_frames = self._default_size(latents, reference_latents)
        height = _given_or(default_height, height)
        width = _given_or(default_width, width)
        num_frames = _given_or(default_frames, num_frames)
        num_inference_steps = _given_or(defaults["num_inference_steps"], num_inference_steps)
        guidance_scale = _given_or(defaults["guidance_scale"], guidance_scale)
        image_guidance_scale = _given_or(defaults["image_guidance_scale"], image_guidance_scale)
        max_sequence_length = _given_or(defaults["max_sequence_length"], max_sequence_length)
        guidance_projection = _given_or(defaults["guidance_projection"], guidance_projection)
        reference_long_edge = _given_or(defaults["reference_long_edge"], reference_long_edge)
        self.check_inputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            reference_images=reference_images,
            reference_latents=reference_latents,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            guidance_gate=guidance_gate,
            guidance_projection=guidance_projection,
            reference_long_edge=reference_long_edge,
            batch_passes=batch_passes,
        )
        if self._pass_group is not None and generator is None and latents is None:
            raise ValueError("Processes that share the passes need the same noise: pass a `generator`, or `latents`.")
        self._guidance_scale = guidance_scale
        self._image_guidance_scale = image_guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        device, dtype = self._execution_device, self.transformer.dtype
        batch_size = _batch_size(prompt, prompt_embeds)

        # 2. References, and the samples that have the same number of them
        references = self.prepare_references(
            reference_images, reference_latents, batch_size, height, width, reference_long_edge
        )
        groups = group_by_references(references, num_videos_per_prompt, device, dtype)
        _tell_untrained_numbers(groups, TRAINED_REFERENCES["sources" if self.has_sources else "frames"])

        # 3. Prompts
        prompt = self._with_prefix(prompt, references)
        self._tell_cut_text("prompt", prompt, max_sequence_length)
        if negative_prompt_embeds is None:
            self._tell_cut_text("negative_prompt", negative_prompt, max_sequence_length)
        # A callback may raise the guidance
        needs_negative = callback_on_step_end is not None and self.text_encoder is not None
        for _, group in groups:
            scales = (guidance_scale, image_guidance_scale)
            passes = guidance_passes(*scales, group is not None, bool(guidance_projection))
            needs_negative = needs_negative or any(name != "full" for name, _ in passes)
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt=prompt,  # pyright: ignore[reportArgumentType] (None beside embeddings)
            negative_prompt=negative_prompt if negative_prompt_embeds is None else None,
            do_classifier_free_guidance=needs_negative,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        prompt_embeds = _repeat(prompt_embeds.to(device, dtype), num_videos_per_prompt)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = _repeat(negative_prompt_embeds.to(device, dtype), num_videos_per_prompt)

        # 4. Timesteps and noise
        self._set_timesteps(num_inference_steps, device)
        shape = self._latents_shape(batch_size * num_videos_per_prompt, num_frames, height, width)
        latents = self.prepare_latents(shape, generator, latents, device)

        # 5. Denoise
        latents = self._denoise(
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            groups=groups,
            generator=generator,
            callback=callback_on_step_end and partial(callback_on_step_end, self),
            callback_tensors=callback_on_step_end_tensor_inputs or (),
            guidance_gate=guidance_gate,
            guidance_projection=guidance_projection,
            batch_passes=batch_passes,
        )

        # 6. Decode
        video = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (video,)
        return WanPipelineOutput(frames=video)

    def _denoise(
        self,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        groups: list[tuple[torch.Tensor | slice, torch.Tensor | list[torch.Tensor] | None]],
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable | None,
        callback_tensors: Sequence[str],
        guidance_gate: Sequence[float] | None,
        guidance_projection: Mapping[str, Any] | None,
        batch_passes: bool | None,
    ) -> torch.Tensor:
        """Makes latents of noise; `groups` come from [`group_by_references`]."""
        differences: list[dict[str, torch.Tensor]] = [{} for _ in groups]
        running: list[dict[int, torch.Tensor]] = [{} for _ in groups]
        texts = _texts_of_groups(prompt_embeds, negative_prompt_embeds, groups)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_arguments = {"generator": generator} if takes_generator else {}
        self._reset_caches()
        tokens = latents[:, 0].numel() // 4  # a patch is two by two
        kept = KeptOverSteps(self.transformer, is_small=tokens // len(latents) <= FEW_TOKENS)
        if batch_passes is None:
            batch_passes = tokens <= FEW_TOKENS and bool(kept.modules) and self._apart() is None
        bar = self.progress_bar(total=len(timesteps))  # pyright: ignore[reportCallIssue]
        with kept, bar as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                if gate_closes(guidance_gate, i, len(timesteps)):
                    # What is added again in all later steps must not be a cache's approximation
                    self._reset_caches()
                context = {
                    "step_index": i,
                    "sigma": float(self.scheduler.sigmas[i]),
                    "num_inference_steps": len(timesteps),
                }
                velocity = torch.empty_like(latents)
                for number, (samples, references) in enumerate(groups):
                    velocity[samples] = self._predict_velocity(
                        latents=latents[samples],
                        timestep=t,
                        texts=texts[number],
                        references=references,
                        context_suffix=f"_{number}" if number else "",
                        context=context,
                        batches_passes=batch_passes,
                        guidance_gate=guidance_gate,
                        differences=differences[number],
                        guidance_projection=guidance_projection,
                        running=running[number],
                    )
                latents = self.scheduler.step(velocity, t, latents, **step_arguments, return_dict=False)[0]
                if callback is not None:
                    tensors: dict[str, Any] = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    asked = {name: tensors[name] for name in callback_tensors}
                    guidance = self._copy_guidance(prompt_embeds, negative_prompt_embeds)
                    tensors |= callback(i, t, asked) or {}
                    latents = tensors["latents"]
                    prompt_embeds = tensors["prompt_embeds"]
                    negative_prompt_embeds = tensors["negative_prompt_embeds"]
                    texts = _texts_of_groups(prompt_embeds, negative_prompt_embeds, groups)
                    kept.forget()  # a callback may also change weights, such as a LoRA's scale
                    if not _are_equal(guidance, self._copy_guidance(prompt_embeds, negative_prompt_embeds)):
                        differences = [{} for _ in groups]
                        running = [{} for _ in groups]
                        if guidance_gate is not None:
                            self._reset_caches()  # those of passes that were left out are of long ago
                progress_bar.update()
        self._current_timestep = None
        return latents

    def _copy_guidance(self, *embeds: torch.Tensor | None) -> list[torch.Tensor]:
        """What a callback may change of the guidance, also in place."""
        scales = torch.tensor([self._guidance_scale, self._image_guidance_scale])
        return [scales, *(tensor.clone() for tensor in embeds if tensor is not None)]

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        if (first_sigma := self.config.get("first_sigma")) is not None:
            steps = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)[:-1]
            self.scheduler.set_timesteps(sigmas=(first_sigma * steps).numpy(), device=device)  # it applies its shift
        elif isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # The paper's schedule, in its own precision; the scheduler's own default ends at another sigma
            steps = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
            self.scheduler.set_timesteps(sigmas=steps.tolist(), device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)  # spares a copy from the device at each step

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        latents = latents.to(get_module_execution_device(self.vae))
        latents = denormalize_latents(latents, self.vae.config).to(self.vae.dtype)
        video = self.vae.decode(latents, return_dict=False)[0]
        if not video.isfinite().all():  # as pixels it would be black, without a word
            raise ValueError(
                "The video holds numbers that are not finite (NaN or infinite): its guidance is too high, or its "
                f"precision ({self.transformer.dtype}, VAE {self.vae.dtype}) too low. Lower the scales, or load the "
                "model in bfloat16 or float32."
            )
        return self.video_processor.postprocess_video(video, output_type=output_type)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "RefAlignWanPipeline":
        """
        Loads as diffusers' own does, but from safetensors files alone: others run code when they are opened.

        Raises:
            ValueError: if the model is of another kind than Wan 2.1's text-to-video one (told before its weights are
                downloaded or read), or its weights are not finite numbers.
        """
        pipeline = super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                check_finite(part.named_parameters(), f"The {name} of {args[0] if args else 'the model'}")
        return pipeline

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Loads a LoRA as diffusers' own does, from safetensors alone. With the package `refalign` it takes every style
        of keys in use for Wan, and changes of whole weights and biases too; a line tells what is not applied.

        Raises:
            ValueError: if the LoRA is of another kind, damaged, or for a model of another size.
        """
        source: Any = pretrained_model_name_or_path_or_dict
        if _is_installed_package(__name__):
            lora_loading = importlib.import_module("refalign.lora_loading")
            source = lora_loading.prepare_lora(source, self.transformer.config, **kwargs)
        super().load_lora_weights(source, adapter_name, hotswap, **{**kwargs, "use_safetensors": True})

    # -- What diffusers 0.42 does not offer; tests/pipelines/test_diffusers.py tells which of it can go ---------------

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Reads `model_index.json`, and checks what it is of. A Hub repo names classes of the code it carries; the
        installed package takes its own classes for them, so that it needs no `trust_remote_code`."""
        # diffusers/configuration_utils.py: `load_config` has no other place where classes can be named anew, and none
        # else is passed before weights are downloaded
        config = super()._dict_from_json_file(json_file)
        check_is_wan21_pipeline(config, os.fspath(json_file))
        if not _is_installed_package(__name__):
            return config
        for name, value in config.items():
            named = value[-1] if isinstance(value, list) and value else None
            if named == "RefAlignWanPipeline":
                config[name] = named
            elif named == "RefAlignWanTransformer3DModel":
                config[name] = ["refalign", named]
        return config

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # diffusers/configuration_utils.py: warns at every load of `auto_map`, which its own AutoModel reads
        config_dict = dict(config_dict)
        config_dict.pop("auto_map", None)
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "RefAlignWanPipeline":
        """Makes the pipeline from another one's parts, as diffusers' own does. A [`WanPipeline`]'s transformer is
        given the reference branch, sharing its weights. ValueError if it is another model than Wan 2.1's."""
        second = pipeline.components.get("transformer_2")
        index = {**pipeline.config, "_class_name": type(pipeline).__name__, "transformer_2": second}
        check_is_wan21_pipeline(index, "The pipeline")
        # diffusers/pipelines/pipeline_utils.py: hands on only parts of the very class of the annotation
        transformer = pipeline.components.get("transformer")
        if isinstance(transformer, WanTransformer3DModel):
            kwargs.setdefault("transformer", transformer)
        return super().from_pipe(pipeline, **kwargs)  # pyright: ignore[reportReturnType] (typed as any pipeline)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Saves the pipeline as diffusers' own does, with the code and entries by which it opens again, with and without
        the package `refalign`. `push_to_hub` pushes what is so saved.

        Raises:
            ValueError: if a LoRA is loaded, or another format than safetensors is asked for.
        """
        # diffusers/pipelines/pipeline_utils.py: writes no code, and a LoRA's layers as if they were the model's own
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` writes files that run code when opened. Leave it out.")
        self._check_part("transformer")
        self._check_no_lora()
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size, **kwargs)
        write_code(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, "variant": variant, **hub})

    def _check_no_lora(self) -> None:
        for name, part in self.components.items():
            modules = part.named_modules() if isinstance(part, torch.nn.Module) else ()
            if any(module.endswith(".base_layer") for module, _ in modules):
                raise ValueError(
                    f"The {name} has a LoRA's layers, which would be saved as its own. Call `unload_lora_weights()` "
                    "to save it without, or `fuse_lora()` and then `unload_lora_weights()` to save it with the LoRA."
                )

    def _reset_caches(self) -> None:
        # diffusers/models/cache_utils.py: what a cache holds of an earlier call, or of a pass that was left out for a
        # while, is wrong, and only this removes it
        if hasattr(self.transformer, "_reset_stateful_cache"):
            self.transformer._reset_stateful_cache()


def _is_installed_package(module: str) -> bool:
    # This file is also part of Hub repos and of the community script, where there is no package `refalign`
    return module.partition(".")[0] == "refalign"


if _is_installed_package(__name__):
    # diffusers/pipelines/pipeline_loading_utils.py: a Hub repo may name parts of a package only if it is entered here
    LOADABLE_CLASSES["refalign"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}


# -- A saved pipeline as a Hub repo -----------------------------------------------------------------------------------


def write_code(folder: Path) -> None:
    """
    Makes a folder as diffusers saves it one that opens with and without the package `refalign`: this code goes in, and
    entries that name it. Where its parts were once loaded from is forgotten.
    """
    auto_map = {"AutoModel": "transformer_refalign_wan.RefAlignWanTransformer3DModel"}
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    for name in ("boundary_ratio", "expand_timesteps", "transformer_2"):  # Wan 2.2's, in every Wan pipeline
        index.pop(name, None)
    index["_class_name"] = ["pipeline_refalign_wan", "RefAlignWanPipeline"]
    index["transformer"] = ["transformer_refalign_wan", "RefAlignWanTransformer3DModel"]
    _write_json(folder / "model_index.json", index | {"auto_map": auto_map})
    config = json.loads((folder / "transformer/config.json").read_text("utf-8"))
    config["_class_name"] = "RefAlignWanTransformer3DModel"
    _write_json(folder / "transformer/config.json", config | {"auto_map": auto_map})
    # Of the community script, which is one file, each of the three is a copy
    for name, part in _CODE.items():
        source = Path(str(sys.modules[part.__module__].__file__)).read_text("utf-8")
        (folder / f"{name}.py").write_text(source, "utf-8")
        if name == "transformer_refalign_wan":
            (folder / f"transformer/{name}.py").write_text(source, "utf-8")
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text("utf-8"))
        if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
            kept = {key: value for key, value in content.items() if key not in ("_name_or_path", "name_or_path")}
            _write_json(file, kept)


_CODE = {
    "reference_images": prepare_reference_image,
    "transformer_refalign_wan": RefAlignWanTransformer3DModel,
    "pipeline_refalign_wan": RefAlignWanPipeline,
}


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


# -- Checks, and what belongs together --------------------------------------------------------------------------------


def check_is_wan21_pipeline(index: Mapping[str, Any], source: str) -> None:
    """
    Raises ValueError, naming what it is instead, unless a pipeline is of Wan 2.1's text-to-video model, or RefAlign's.

    Args:
        index (`Mapping`): what its `model_index.json` holds.
        source (`str`): what the error names.
    """
    kind = _class_named(index.get("_class_name"))
    if kind == "RefineByAlignPipeline":
        raise ValueError(f"{source} is Refine-by-Align's, which makes no videos: `refalign refine` takes it.")
    if kind.startswith("Wan") and kind not in ("WanPipeline", "WanVideoToVideoPipeline"):
        raise other_model(source, f"a {kind}")
    if index.get("transformer_2") not in (None, [None, None]) or index.get("boundary_ratio") is not None:
        raise other_model(source, "Wan 2.2's A14B, which has two transformers")
    if index.get("expand_timesteps"):
        raise other_model(source, "Wan 2.2's TI2V-5B")
    transformer = index.get("transformer")
    if transformer is None:
        raise other_model(source, f"a {kind or 'model'} without a transformer")
    if _class_named(transformer) not in ("", *WAN_CLASSES):
        raise other_model(source, f"a pipeline with a {_class_named(transformer)}")


def _class_named(entry: Any) -> str:
    """The class that an entry of `model_index.json` names; empty if it names none."""
    name = entry[-1] if isinstance(entry, (list, tuple)) and entry else entry
    return name if isinstance(name, str) else ""


def _check_parts(transformer: Any, vae: Any) -> None:
    """Raises ValueError for a transformer or VAE of another model than Wan 2.1's text-to-video one."""
    if transformer is not None:
        model = getattr(transformer, "_orig_mod", transformer)  # which torch.compile wraps
        if not isinstance(model, WanTransformer3DModel):
            raise other_model("`transformer`", f"a {type(model).__name__}")
        check_is_wan21(model.config, "`transformer`")
    if vae is not None:
        check_is_wan21_vae(vae.config, "`vae`")


def check_is_wan21_vae(config: Mapping[str, Any], source: str) -> None:
    """Raises ValueError unless a VAE's configuration has the channels of Wan 2.1's."""
    channels = config.get("z_dim", WAN_CHANNELS)
    if channels != WAN_CHANNELS:
        known = {48: "the VAE of Wan 2.2's TI2V-5B"}
        raise other_model(source, known.get(channels, f"a VAE of {channels} channels, not {WAN_CHANNELS}"))


def check_size(
    height: int,
    width: int,
    num_frames: int,
    multiples: tuple[int, int] = (TOKEN_PIXELS, TOKEN_PIXELS),
    frame_step: int = FRAMES_PER_LATENT,
) -> None:
    """Raises ValueError, naming the nearest valid number, unless height and width are `multiples` and the number of
    frames is `frame_step` k + 1. The defaults are Wan 2.1's."""
    for name, value, multiple in (("height", height, multiples[0]), ("width", width, multiples[1])):
        _check_whole_number(name, value)
        if value <= 0 or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ValueError(f"`{name}` must be divisible by {multiple}, but is {value}. Nearest: {nearest}.")
    _check_whole_number("num_frames", num_frames)
    if num_frames < 1 or num_frames % frame_step != 1 % frame_step:
        nearest = max(1, round((num_frames - 1) / frame_step) * frame_step + 1)
        raise ValueError(f"`num_frames` must be {frame_step}k + 1, but is {num_frames}. Nearest: {nearest}.")


def check_settings(
    num_inference_steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
    guidance_gate: Sequence[float] | None = None,
) -> None:
    """Raises ValueError unless there is a step to make, scales are numbers from 0 up, and a gate is of shares."""
    _check_count("num_inference_steps", num_inference_steps)
    _check_scale("guidance_scale", guidance_scale)
    _check_scale("image_guidance_scale", image_guidance_scale)
    _check_gate(guidance_gate)


def _check_kept_settings(prompt_prefix: Any, first_sigma: Any) -> None:
    """Raises ValueError for what a model's `model_index.json` holds that is not as the pipeline takes it."""
    names = {"references", "no_references"}
    is_mapping = isinstance(prompt_prefix, Mapping) and prompt_prefix.keys() == names
    if prompt_prefix and not (is_mapping and all(isinstance(text, str) for text in prompt_prefix.values())):
        raise ValueError(f"`prompt_prefix` must have a text for each of {sorted(names)}, but is {prompt_prefix!r}.")
    is_number = isinstance(first_sigma, numbers.Real) and not isinstance(first_sigma, bool)
    if first_sigma is not None and not (is_number and 0 < float(first_sigma) <= 1):
        raise ValueError(f"`first_sigma` must be a number above 0, at most 1, but is {first_sigma!r}.")


def check_projection(projection: Any) -> None:
    """Raises ValueError unless it is `None`, or a mapping as [`project_guidance`] takes."""
    if projection is None:
        return
    known = {"eta", "thresholds", "momentum"}
    if not isinstance(projection, Mapping) or not projection.keys() <= known:
        raise ValueError(f"`guidance_projection` must be a dict with some of {sorted(known)}, but is {projection!r}.")
    thresholds = projection.get("thresholds", (0, 0))
    if not isinstance(thresholds, (list, tuple)) or len(thresholds) != 2:
        raise ValueError(
            "`guidance_projection` needs two `thresholds`, for the references' difference and the prompt's, but has "
            f"{thresholds!r}."
        )
    for value in (*thresholds, projection.get("eta", 1)):
        _check_scale("guidance_projection", value)
    momentum: Any = projection.get("momentum", 0)
    is_number = isinstance(momentum, numbers.Real) and not isinstance(momentum, bool)
    if not is_number or not -1 < float(momentum) < 1:
        raise ValueError(f"`guidance_projection` needs a `momentum` between -1 and 1, but has {momentum!r}.")


def split_reference_images(reference_images: Any, batch_size: int) -> list[list[Any]]:
    """
    The reference images of each prompt, from any form that [`RefAlignWanPipeline`] takes.

    Raises:
        ValueError: if the lists do not fit the number of prompts, or could mean two things.
    """
    if reference_images is None:
        return [[]] * batch_size
    if not isinstance(reference_images, (list, tuple)):
        return [[reference_images]] * batch_size
    images = list(reference_images)
    nested = [entry is None or isinstance(entry, (list, tuple)) for entry in images]
    if not any(nested):
        if batch_size > 1 and images:
            raise ValueError(
                f"`reference_images` is one list of {len(images)} images for {batch_size} prompts, which could mean "
                "two things. Pass a list of lists, one per prompt: [[a, b], [c]]. The same for all: [[a, b]] * "
                f"{batch_size}."
            )
        return [images] * batch_size
    if not all(nested):
        raise ValueError("`reference_images` mixes images and lists of images. Pass a list of lists, one per prompt.")
    if len(images) != batch_size:
        raise ValueError(
            f"`reference_images` has {len(images)} lists for {batch_size} prompts. Pass one list per prompt, an empty "
            "one for a prompt without references."
        )
    return [list(entry or ()) for entry in images]


def group_by_references(
    references: Sequence[torch.Tensor | list[torch.Tensor] | None],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[tuple[torch.Tensor | slice, torch.Tensor | list[torch.Tensor] | None]]:
    """
    Groups samples by their number of references, and by the sizes of these, so that none is padded.

    Args:
        references (`Sequence`): one entry per prompt, `(1, channels, references, h, w)`, a list of
            `(1, channels, 1, h, w)` or `None`.
        repeats (`int`): how many videos of each prompt; they lie next to each other in the batch.
        device (`torch.device`): the result's device.
        dtype (`torch.dtype`): the dtype of the result's references.

    Returns:
        `list[tuple]`: the samples' places in the batch, and their references, `(samples, channels, references, h, w)`,
        a list of `(samples, channels, 1, h, w)` or `None`, in the order in which the sizes first occur.
    """
    groups: dict[tuple, list[int]] = {}
    for index, latents in enumerate(references):
        groups.setdefault(_sizes(latents), []).append(index)
    result = []
    for indices in groups.values():
        latents = _joined([references[index] for index in indices])
        if isinstance(latents, torch.Tensor):
            latents = _repeat(latents.to(device, dtype), repeats)
        elif latents is not None:
            latents = [_repeat(source.to(device, dtype), repeats) for source in latents]
        samples = slice(None)  # the usual single group is the batch as it is: a slice spares copies at every step
        if len(groups) > 1:
            first = torch.tensor(indices, device=device)[:, None] * repeats
            samples = (first + torch.arange(repeats, device=device)).flatten()
        result.append((samples, latents))
    return result


def _sizes(references: torch.Tensor | list[torch.Tensor] | None) -> tuple:
    """What samples of a group have in common."""
    if references is None:
        return ()
    if isinstance(references, torch.Tensor):
        return tuple(references.shape)
    return tuple(tuple(latents.shape) for latents in references)


def _joined(members: Sequence[Any]) -> torch.Tensor | list[torch.Tensor] | None:
    """The references of a group's samples in one batch."""
    if members[0] is None:
        return None
    if isinstance(members[0], torch.Tensor):
        return torch.cat(list(members))
    return [torch.cat(sources) for sources in zip(*members, strict=True)]


def _tell_untrained_numbers(
    groups: Sequence[tuple[Any, torch.Tensor | list[torch.Tensor] | None]], trained: int
) -> None:
    numbers_of_references = []
    for _, references in groups:
        is_tensor = isinstance(references, torch.Tensor)
        numbers_of_references.append(references.shape[2] if is_tensor else len(references or ()))
    if (most := max(numbers_of_references)) > trained:
        logging.getLogger(__name__).warning(
            "A prompt has %d references, but %s was trained with %d at most: some may be mixed or left out.",
            *(most, "RefAlign" if trained == TRAINED_REFERENCES["frames"] else "Bernini-R", trained),
        )


def _check_tensor(name: str, tensor: Any, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError unless it is a tensor of this shape, in which `None` stands for any size but 0."""
    wanted = str(shape).replace("None", "any")
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor of shape {wanted}, but is a {type(tensor).__name__}.")
    fits = all(size == given or (size is None and given > 0) for size, given in zip(shape, tensor.shape, strict=False))
    if tensor.ndim != len(shape) or not fits:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, but this call needs {wanted}.")


def _check_noise(generator: Any, latents: Any, shape: tuple[int, ...]) -> None:
    generators = generator if isinstance(generator, list) else [generator]
    if not all(isinstance(entry, torch.Generator | None) for entry in generators):
        raise ValueError(f"`generator` must be a torch.Generator or a list of them, but is {generator!r}.")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"`generator` has {len(generator)} entries for {shape[0]} videos. Pass one, or one each.")
    if latents is not None:
        _check_tensor("latents", latents, shape)


def _repeat(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=0)


class _GroupTexts:
    """The embeddings of a group's prompts and negative prompts: the same tensors for all steps."""

    def __init__(self, prompt: torch.Tensor, negative: torch.Tensor | None) -> None:
        self._by_pass = {"null": negative, "reference": negative, "full": prompt}
        self._batches: dict[tuple[str, ...], Any] = {}
        self.are_alike = negative is None or prompt.shape == negative.shape
        """Else, as embeddings that were passed may be, they are not one batch."""

    def of(self, names: Sequence[str]) -> torch.Tensor:
        """What passes read, one after the other in the batch."""
        key = tuple(names)
        if key not in self._batches:
            texts: list[Any] = [self._by_pass[name] for name in names]
            if any(text is None for text in texts):
                raise ValueError(
                    "A callback raised the guidance, which needs a negative prompt: pass `negative_prompt_embeds`."
                )
            self._batches[key] = texts[0] if len(texts) == 1 else torch.cat(texts)
        return self._batches[key]


def _texts_of_groups(
    prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor | None, groups: Sequence[tuple[Any, Any]]
) -> list[_GroupTexts]:
    texts = []
    for samples, _ in groups:
        negative = None if negative_prompt_embeds is None else negative_prompt_embeds[samples]
        texts.append(_GroupTexts(prompt_embeds[samples], negative))
    return texts


def _references_of(
    names: Sequence[str], references: torch.Tensor | list[torch.Tensor] | None
) -> torch.Tensor | list[torch.Tensor] | None:
    """What passes see, one after the other in the batch."""
    if not isinstance(references, torch.Tensor):
        return None if names[0] == "null" else references  # a model with sources was trained without tokens of them
    null = torch.zeros_like(references)  # the null reference is zeros, not a blank image
    return torch.cat([null if name == "null" else references for name in names])


def _are_equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return False
    return all(bool((one == other).all()) for one, other in zip(first, second, strict=True))


Value = TypeVar("Value")


def _given_or(default: Any, given: Value | None) -> Value:
    return default if given is None else given


def _batch_size(prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    if prompt_embeds is not None:
        return prompt_embeds.shape[0]
    return len(prompt) if isinstance(prompt, list) else 1


def _check_whole_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number, but is {value!r}.")


def _check_count(name: str, value: Any) -> None:
    _check_whole_number(name, value)
    if value < 1:
        raise ValueError(f"`{name}` must be 1 or more, but is {value}.")


def _check_scale(name: str, value: Any) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be a number from 0 up, but is {value!r}.")


def _check_gate(gate: Any) -> None:
    if gate is None:
        return
    shares = list(gate) if isinstance(gate, (tuple, list)) else []
    are_numbers = all(isinstance(share, numbers.Real) and not isinstance(share, bool) for share in shares)
    if len(shares) != 2 or not are_numbers or not 0 <= shares[0] <= shares[1] <= 1:
        raise ValueError(
            "`guidance_gate` must be two shares of the steps, (null_until, reference_until), from 0 to 1, the first "
            f"not above the second, but is {gate!r}."
        )


def _check_text(name: str, value: Any) -> None:
    is_list = isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)
    if value is not None and not isinstance(value, str) and not is_list:
        raise ValueError(f"`{name}` must be a string or a list of strings, but is {value!r}.")
