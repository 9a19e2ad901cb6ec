"""RefAlign's pipeline: reference images and a prompt become a video (RefAlign, arXiv 2603.25743).

A Hub repo carries this file at its root, with `reference_images.py` and `transformer_refalign_wan.py` beside it.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import AutoTokenizer, UMT5EncoderModel

from .reference_images import prepare_reference_image
from .transformer_refalign_wan import RefAlignWanTransformer3DModel


# Wan's own, with which RefAlign's results were made
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"  # noqa: RUF001
    "杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


def guidance_passes(
    guidance_scale: float, image_guidance_scale: float, has_references: bool = True
) -> list[tuple[str, float]]:
    """
    The forward passes a step needs, in order, each with its weight in [`combine_passes`].

    `"null"` is the negative prompt with null references, `"reference"` the negative prompt with the references,
    `"full"` the prompt with the references: `v = null + g_ref (reference - null) + g_text (full - reference)`. A pass
    whose coefficient in that sum is zero is left out. Without references it is Wan's text guidance.
    """
    if not has_references:
        return [("null", 1.0), ("full", guidance_scale)] if guidance_scale > 1 else [("full", 1.0)]
    passes = [
        ("null", 1.0, 1 - image_guidance_scale),
        ("reference", image_guidance_scale, image_guidance_scale - guidance_scale),
        ("full", guidance_scale, guidance_scale),
    ]
    return [(name, weight) for name, weight, coefficient in passes if coefficient != 0]


def combine_passes(predictions: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """`p_0 + sum_i w_i (p_i - p_(i-1))` in float32: RefAlign's guidance for the passes of [`guidance_passes`]."""
    predictions = [prediction.float() for prediction in predictions]
    velocity = predictions[0]
    for previous, prediction, weight in zip(predictions, predictions[1:], weights[1:], strict=False):
        velocity = velocity + weight * (prediction - previous)
    return velocity


class RefAlignWanPipeline(WanPipeline):
    r"""
    Reference-to-video generation with RefAlign on Wan 2.1: the subjects of the reference images act out the prompt.

    Without references it is Wan's text-to-video pipeline. LoRAs are loaded as for [`WanPipeline`].

    Args:
        tokenizer ([`T5TokenizerFast`]): of `google/umt5-xxl`.
        text_encoder ([`UMT5EncoderModel`]): `google/umt5-xxl`.
        vae ([`AutoencoderKLWan`]): encodes references and decodes videos.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]): with shift 5 it is the paper's schedule. Others of diffusers
            for flow matching work too, such as [`UniPCMultistepScheduler`].
        transformer ([`RefAlignWanTransformer3DModel`]): a plain [`WanTransformer3DModel`] is given the reference
            branch, sharing its weights.
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
    ):
        DiffusionPipeline.__init__(self)  # not WanPipeline's: it registers Wan 2.2's second transformer
        # `type is`, not `isinstance`: RefAlign's own class is one too, and each load from the Hub makes a new one
        if type(transformer) is WanTransformer3DModel:
            transformer = RefAlignWanTransformer3DModel.from_wan(transformer)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal if vae is not None else 4
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial if vae is not None else 8
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """Reads `model_index.json`. A Hub repo names classes of the code it carries; the installed package takes its
        own classes for them, so that it needs no `trust_remote_code`."""
        config = super()._dict_from_json_file(json_file)
        if not _is_installed_package(cls.__module__):
            return config
        for name, value in config.items():
            if isinstance(value, list) and value[-1:] == ["RefAlignWanPipeline"]:
                config[name] = "RefAlignWanPipeline"
            elif isinstance(value, list) and value[-1:] == ["RefAlignWanTransformer3DModel"]:
                config[name] = ["refalign", "RefAlignWanTransformer3DModel"]
        return config

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # `auto_map` is there for AutoModel; diffusers would warn of it at every load
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @property
    def image_guidance_scale(self) -> float:
        return self._image_guidance_scale

    def check_inputs(
        self,
        prompt,
        negative_prompt,
        height,
        width,
        num_frames,
        num_inference_steps,
        guidance_scale,
        image_guidance_scale,
        num_videos_per_prompt=1,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        reference_images=None,
        reference_latents=None,
        output_type="np",
        callback_on_step_end_tensor_inputs=None,
    ) -> None:
        """Raises ValueError for the first argument that is wrong, with its value and what would be right."""
        _, patch_height, patch_width = self.transformer.config.patch_size
        for name, value, multiple in (
            ("height", height, self.vae_scale_factor_spatial * patch_height),
            ("width", width, self.vae_scale_factor_spatial * patch_width),
        ):
            _check_whole_number(name, value)
            if value <= 0 or value % multiple:
                nearest = max(multiple, round(value / multiple) * multiple)
                raise ValueError(f"`{name}` has to be divisible by {multiple}, but is {value}. Nearest: {nearest}.")
        _check_whole_number("num_frames", num_frames)
        step = self.vae_scale_factor_temporal
        if num_frames < 1 or num_frames % step != 1 % step:
            nearest = max(1, round((num_frames - 1) / step) * step + 1)
            raise ValueError(f"`num_frames` has to be {step}k + 1, but is {num_frames}. Nearest: {nearest}.")
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_videos_per_prompt", num_videos_per_prompt),
        ):
            _check_whole_number(name, value)
            if value < 1:
                raise ValueError(f"`{name}` has to be 1 or more, but is {value}.")
        for name, value in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)):
            if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
                raise ValueError(f"`{name}` has to be a number from 0 up, but is {value!r}. 1 switches it off.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be 'pil', 'np', 'pt' or 'latent', but is {output_type!r}.")
        if reference_images is not None and reference_latents is not None:
            raise ValueError("Pass either `reference_images` or `reference_latents`, not both.")
        self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        unknown = [k for k in callback_on_step_end_tensor_inputs or () if k not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; it can have {self._callback_tensor_inputs}."
            )

    def _check_prompts(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass exactly one of `prompt` and `prompt_embeds`.")
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            is_list = isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)
            if value is not None and not isinstance(value, str) and not is_list:
                raise ValueError(f"`{name}` has to be a string or a list of strings, but is {value!r}.")
        if negative_prompt_embeds is not None and negative_prompt not in (None, DEFAULT_NEGATIVE_PROMPT):
            raise ValueError("Pass either `negative_prompt` or `negative_prompt_embeds`, not both.")
        batch_size = _batch_size(prompt, prompt_embeds)
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(
                f"`negative_prompt` has {len(negative_prompt)} entries for {batch_size} prompts. Pass one string for "
                "all prompts, or one a prompt."
            )
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            dim = self.transformer.config.text_dim
            if embeds is not None and (embeds.ndim != 3 or embeds.shape[0] != batch_size or embeds.shape[2] != dim):
                raise ValueError(
                    f"`{name}` has shape {tuple(embeds.shape)}, but has to be (batch, text_tokens, dim) = "
                    f"({batch_size}, any, {dim})."
                )

    def prepare_latents(self, shape, generator, latents, device) -> torch.Tensor:
        """Noise in float32, drawn on the CPU (so that a seed gives the same video on every device) unless the
        generator is on another device; or the given `latents`, checked against `shape`."""
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(
                    f"`latents` has shape {tuple(latents.shape)}, but this size and number of videos needs "
                    f"(batch, channels, frames, height, width) = {shape}."
                )
            return latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"`generator` has {len(generator)} entries for {shape[0]} videos. Pass one, or one each.")
        first = generator[0] if isinstance(generator, list) else generator
        noise_device = torch.device("cpu") if first is None else first.device
        return randn_tensor(shape, generator=generator, device=noise_device, dtype=torch.float32).to(device)

    def encode_reference(self, image, height: int, width: int) -> torch.Tensor:
        """
        A reference image as latents of shape `(1, channels, 1, height / 8, width / 8)`, float32, normalised as the
        video's are: letterboxed on white, encoded as a one-frame video (RefAlign, section 3).
        """
        image = prepare_reference_image(image, height, width, cut_out=False)
        pixels = self.video_processor.preprocess(image)[:, :, None]
        pixels = pixels.to(get_module_execution_device(self.vae), self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        mean, std = self._latents_mean_and_std(latents)
        return (latents - mean) / std

    def _latents_mean_and_std(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.tensor(self.vae.config.latents_mean, device=latents.device, dtype=latents.dtype)
        std = torch.tensor(self.vae.config.latents_std, device=latents.device, dtype=latents.dtype)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def prepare_references(
        self, reference_images, reference_latents, batch_size: int, height: int, width: int
    ) -> list[torch.Tensor | None]:
        """One entry a prompt: its references' latents, `(1, channels, references, h, w)` in float32, or `None`."""
        latent_size = (height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial)
        if reference_latents is not None:
            return _split_reference_latents(
                reference_latents, batch_size, (self.transformer.config.in_channels, *latent_size)
            )
        references = []
        for index, images in enumerate(split_reference_images(reference_images, batch_size)):
            latents = []
            for number, image in enumerate(images):
                try:
                    latents.append(self.encode_reference(image, height, width))
                except ValueError as error:
                    raise ValueError(f"Reference {number + 1} of prompt {index + 1}: {error}") from error
            references.append(torch.cat(latents, dim=2) if latents else None)
        return references

    def _predict_velocity(
        self, latents, timestep, prompt_embeds, negative_prompt_embeds, references, context_suffix, context
    ) -> torch.Tensor:
        """The guided velocity, float32, for samples with the same number of references."""
        dtype = self.transformer.dtype
        passes = guidance_passes(self.guidance_scale, self.image_guidance_scale, references is not None)
        predictions = []
        for name, _ in passes:
            if references is None or name != "null":
                pass_references = references
            else:
                pass_references = torch.zeros_like(references)  # the null reference is zeros, not a blank image
            # A context of its own for each pass and group of samples, else caches mix them
            with self.transformer.cache_context(name + context_suffix, **context):
                prediction = self.transformer(
                    hidden_states=latents.to(dtype),
                    timestep=timestep.expand(latents.shape[0]),
                    encoder_hidden_states=prompt_embeds if name == "full" else negative_prompt_embeds,
                    attention_kwargs=self.attention_kwargs,
                    return_dict=False,
                    reference_hidden_states=pass_references,
                )[0]
            predictions.append(prediction)
        return combine_passes(predictions, [weight for _, weight in passes])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = DEFAULT_NEGATIVE_PROMPT,
        reference_images: Any = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 5.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        reference_latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' own signature)
        max_sequence_length: int = 512,
    ) -> WanPipelineOutput | tuple:
        r"""
        Makes a video of the references' subjects acting out the prompt.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What happens. Or pass `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to `DEFAULT_NEGATIVE_PROMPT`):
                What should not be seen. The default is Wan's, in Chinese; `None` or `""` stands for an empty one.
            reference_images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, `list`, *optional*):
                One image, or a list of them, each a PIL image, an array `(height, width, channels)`, a tensor
                `(channels, height, width)`, a path or a URL. For a list of prompts, a list with one such list a
                prompt; their lengths may differ. Letterboxed on white to the video's size. `None`: text-to-video.
            height (`int`, defaults to `480`):
                Of the video, in pixels, a multiple of 16.
            width (`int`, defaults to `832`):
                Of the video, in pixels, a multiple of 16.
            num_frames (`int`, defaults to `81`):
                4k + 1. The model was trained on 81 frames at 16 a second.
            num_inference_steps (`int`, defaults to `50`):
                Denoising steps.
            guidance_scale (`float`, defaults to `7.5`):
                How closely the prompt is followed: `g_text` of [`guidance_passes`].
            image_guidance_scale (`float`, defaults to `5.0`):
                How closely the references are followed: `g_ref` of [`guidance_passes`]. With both scales at 1 a step
                takes one forward pass (for distilled LoRAs), else two or three.
            num_videos_per_prompt (`int`, defaults to `1`):
                Videos of each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                For repeatable noise; a list has one a video.
            latents (`torch.Tensor` of shape `(batch, channels, frames, height / 8, width / 8)`, *optional*):
                The noise to start from.
            prompt_embeds (`torch.Tensor` of shape `(batch, text_tokens, text_dim)`, *optional*):
                In place of `prompt`.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch, text_tokens, text_dim)`, *optional*):
                In place of `negative_prompt`.
            reference_latents (`torch.Tensor`, *optional*):
                Of shape `(batch, channels, references, height / 8, width / 8)`, in place of `reference_images`:
                normalised as by [`~RefAlignWanPipeline.encode_reference`].
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
                Text tokens; Wan was trained with 512.

        Returns:
            [`WanPipelineOutput`] or `tuple`: the videos, as `frames`.

        Raises:
            ValueError: for a wrong argument, before anything is computed.

        Examples:
            ```python
            >>> import torch
            >>> from diffusers.utils import export_to_video
            >>> from refalign import RefAlignWanPipeline

            >>> pipe = RefAlignWanPipeline.from_pretrained("org/refalign-14b", dtype=torch.bfloat16).to("cuda")
            >>> video = pipe("A woman walks her dog on a beach.", reference_images=["woman.png", "dog.png"]).frames[0]
            >>> export_to_video(video, "walk.mp4", fps=16)
            ```
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            guidance_scale,
            image_guidance_scale,
            num_videos_per_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            reference_images,
            reference_latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._image_guidance_scale = image_guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device
        batch_size = _batch_size(prompt, prompt_embeds)

        # 2. References, and the samples that have the same number of them
        references = self.prepare_references(reference_images, reference_latents, batch_size, height, width)
        groups = group_by_references(references, num_videos_per_prompt, device, self.transformer.dtype)

        # 3. Prompts
        needs_negative = any(
            name != "full"
            for _, group in groups
            for name, _ in guidance_passes(guidance_scale, image_guidance_scale, group is not None)
        )
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt if negative_prompt_embeds is None else None,
            do_classifier_free_guidance=needs_negative,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        prompt_embeds, negative_prompt_embeds = (
            embeds if embeds is None else _repeat(embeds.to(device, self.transformer.dtype), num_videos_per_prompt)
            for embeds in (prompt_embeds, negative_prompt_embeds)
        )

        # 4. Timesteps
        self._set_timesteps(num_inference_steps, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)

        # 5. Noise
        shape = (
            batch_size * num_videos_per_prompt,
            self.transformer.config.in_channels,
            (num_frames - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )
        latents = self.prepare_latents(shape, generator, latents, device)

        # 6. Denoise
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                context = {
                    "step_index": i,
                    "sigma": float(self.scheduler.sigmas[i]),
                    "num_inference_steps": self._num_timesteps,
                }
                velocity = torch.empty_like(latents)
                for number, (samples, group_references) in enumerate(groups):
                    velocity[samples] = self._predict_velocity(
                        latents[samples],
                        t,
                        prompt_embeds[samples],
                        negative_prompt_embeds[samples] if negative_prompt_embeds is not None else None,
                        group_references,
                        f"_{number}" if number else "",
                        context,
                    )
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    values = locals()
                    callback_kwargs = {name: values[name] for name in callback_on_step_end_tensor_inputs}
                    outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = outputs.pop("latents", latents)
                    prompt_embeds = outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = outputs.pop("negative_prompt_embeds", negative_prompt_embeds)

                if i == len(timesteps) - 1 or (i + 1 > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
        self._current_timestep = None

        # 7. Decode
        video = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (video,)
        return WanPipelineOutput(frames=video)

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # The paper's schedule (the scheduler applies its shift); the scheduler's own default ends at another sigma
            sigmas = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
            self.scheduler.set_timesteps(sigmas=sigmas.numpy(), device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)  # spares a copy from the device at each step

    def _decode(self, latents: torch.Tensor, output_type: str):
        latents = latents.to(get_module_execution_device(self.vae))
        mean, std = self._latents_mean_and_std(latents)
        video = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)


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
                "two things. Pass a list of lists, one a prompt: [[a, b], [c]]. The same for all: [[a, b]] * "
                f"{batch_size}."
            )
        return [images] * batch_size
    if not all(nested):
        raise ValueError("`reference_images` mixes images and lists of images. Pass a list of lists, one a prompt.")
    if len(images) != batch_size:
        raise ValueError(
            f"`reference_images` has {len(images)} lists for {batch_size} prompts. Pass one list a prompt, an empty "
            "one for a prompt without references."
        )
    return [list(entry or ()) for entry in images]


def group_by_references(
    references: Sequence[torch.Tensor | None], repeats: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[torch.Tensor | slice, torch.Tensor | None]]:
    """
    Groups samples by their number of references, so that none is padded.

    Args:
        references (`Sequence[torch.Tensor]`): one entry a prompt, `(1, channels, references, h, w)` or `None`.
        repeats (`int`): videos of each prompt; they lie next to each other in the batch.
        device (`torch.device`): of the result.
        dtype (`torch.dtype`): of the result's references.

    Returns:
        `list[tuple]`: the samples' places in the batch, and their references, `(samples, channels, references, h, w)`
        or `None`, in the order in which the numbers first occur.
    """
    groups: dict[int, list[int]] = {}
    for index, latents in enumerate(references):
        groups.setdefault(0 if latents is None else latents.shape[2], []).append(index)
    result = []
    for count, indices in groups.items():
        samples = torch.tensor([index * repeats + r for index in indices for r in range(repeats)], device=device)
        latents = torch.cat([references[index] for index in indices]).to(device, dtype) if count else None
        # The usual single group is the batch as it is: a slice spares copies of it at every step
        result.append((slice(None) if len(groups) == 1 else samples, _repeat(latents, repeats)))
    return result


def _split_reference_latents(reference_latents, batch_size: int, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    channels, height, width = shape
    given = tuple(reference_latents.shape)
    if len(given) != 5 or given[0] != batch_size or given[1] != channels or given[2] == 0 or given[3:] != shape[1:]:
        raise ValueError(
            f"`reference_latents` has shape {given}, but this size and number of prompts needs (batch, channels, "
            f"references, height, width) = ({batch_size}, {channels}, 1 or more, {height}, {width})."
        )
    return list(reference_latents.split(1))


def _repeat(tensor: torch.Tensor | None, repeats: int) -> torch.Tensor | None:
    return tensor if tensor is None or repeats == 1 else tensor.repeat_interleave(repeats, dim=0)


def _batch_size(prompt, prompt_embeds) -> int:
    if prompt is None:
        return prompt_embeds.shape[0]
    return 1 if isinstance(prompt, str) else len(prompt)


def _check_whole_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` has to be a whole number, but is {value!r}.")


def _is_installed_package(module: str) -> bool:
    # This file is also part of Hub repos and of the community script, where there is no package `refalign`
    return module.partition(".")[0] == "refalign"


if _is_installed_package(__name__):
    LOADABLE_CLASSES["refalign"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
