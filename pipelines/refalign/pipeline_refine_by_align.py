"""Refine-by-Align's pipeline: a region of an image that went wrong is made anew from a reference (arXiv 2412.00306).

No code or weight of the paper is public. What it says is marked [P] here, what its precedents do (Paint-by-Example,
ObjectStitch, AnyDoor) [Q], and our own choices [O]. A Hub repo carries this file at its root, with
`reference_images.py` and `reference_projector.py` beside it.
"""

import contextlib
import json
import logging
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from transformers import Dinov2Model, Dinov2WithRegistersModel

from .reference_images import WHITE, Box, bounding_box, load_reference_image
from .reference_projector import ReferenceProjector


logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUBJECT_MARGIN = 1.1  # a reference's square against its subject's box
NEARLY_WHITE = 250  # of 255: the background of a reference without alpha
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


# -- Squares of images ------------------------------------------------------------------------------------------------


class Square(NamedTuple):
    """A square of an image, in its pixels. It may reach beyond the image."""

    left: int
    top: int
    side: int


def square_around(box: Box, scale: float, size: tuple[int, int] | None = None) -> Square:
    """
    The square around a box's centre, `scale` times its longer side.

    Args:
        box (`tuple`): left, top, right, bottom.
        scale (`float`): 1 or more.
        size (`tuple[int, int]`, *optional*): width and height of an image. The square then has its shorter side at
            most, or the box's longer one, and is moved into it as far as it fits.
    """
    left, top, right, bottom = box
    longest = max(right - left, bottom - top)
    side = math.ceil(longest * scale)
    if size is not None:
        side = max(longest, min(side, *size))
    corner = [(left + right - side) // 2, (top + bottom - side) // 2]
    for axis, length in enumerate(size or ()):
        free = length - side
        corner[axis] = min(max(corner[axis], 0), free) if free >= 0 else free // 2
    return Square(corner[0], corner[1], side)


def mask_square(mask: np.ndarray, crop_scale: float = 2.5) -> Square:
    """Where the network works: the square of an image around its mask, bool `(height, width)` [O]."""
    height, width = mask.shape
    return square_around(bounding_box(mask), crop_scale, (width, height))


def cut_square(image: Image.Image, square: Square, size: int) -> Image.Image:
    """A square of an image, RGB, `size` pixels: white where the image is transparent, and beyond it."""
    canvas = Image.new("RGB", (square.side, square.side), WHITE)
    canvas.paste(on_white(image), (-square.left, -square.top))
    return canvas.resize((size, size), Image.Resampling.BICUBIC)


def cut_surroundings(image: Image.Image, square: Square, size: int) -> Image.Image:
    """A square of an image as the UNet sees it, RGB, `size` pixels: beyond the image its outermost pixels go on, as
    they do in training [O]."""
    rows = np.arange(square.top, square.top + square.side).clip(0, image.height - 1)
    columns = np.arange(square.left, square.left + square.side).clip(0, image.width - 1)
    values = np.asarray(on_white(image))[rows[:, None], columns]
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def cut_mask(mask: np.ndarray, square: Square, size: int) -> torch.Tensor:
    """A square of a mask, bool `(height, width)`, as float `(1, size, size)`: 1 where some pixel of it is in the mask,
    so that a small one is not lost."""
    canvas = Image.new("L", (square.side, square.side), 0)
    canvas.paste(Image.fromarray(mask.astype(np.uint8) * 255), (-square.left, -square.top))
    values = torch.from_numpy(np.array(canvas)).float()[None]
    return F.adaptive_max_pool2d(values, size).gt(0).float()


def grown(mask: torch.Tensor, reach: int) -> torch.Tensor:
    """A mask, `(..., height, width)` of 0 and 1, that is `reach` pixels wider at each side."""
    return F.max_pool2d(mask, 2 * reach + 1, stride=1, padding=reach)


def feathered(mask: np.ndarray, width: int) -> np.ndarray:
    """How much of what is new shows, float32 `(height, width)`: 0 outside the mask, 1 from `width` pixels inside it
    on."""
    inside = torch.from_numpy(mask.astype(np.float32))[None, None]
    total = inside.clone()
    for _ in range(width):
        inside = 1 - grown(1 - inside, 1)
        total += inside
    return (total / total.max())[0, 0].numpy()


def put_square(values: torch.Tensor, square: Square, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """The way back: values of a square, `(height, width)`, at their place in an image of zeros, whose `size` is width
    and height."""
    width, height = size
    large = F.interpolate(values[None, None].float(), (square.side, square.side), mode=mode)[0, 0]
    left, top = max(square.left, 0), max(square.top, 0)
    right, bottom = min(square.left + square.side, width), min(square.top + square.side, height)
    image = torch.zeros(height, width)
    inside = large[top - square.top : bottom - square.top, left - square.left : right - square.left]
    image[top:bottom, left:right] = inside
    return image


# -- References -------------------------------------------------------------------------------------------------------


def subject_mask(image: Image.Image) -> np.ndarray:
    """Where a reference shows its subject, bool `(height, width)`: its alpha from half on; without alpha the box of
    what is not white, so that white parts of the subject stay."""
    if image.mode == "RGBA":
        mask = np.asarray(image.getchannel("A")) >= 128
    else:
        mask = np.asarray(image).min(axis=-1) < NEARLY_WHITE
    if not mask.any():
        raise ValueError("The reference shows no subject: it is white, or transparent. Pass another one.")
    if image.mode == "RGBA":
        return mask
    left, top, right, bottom = bounding_box(mask)
    box = np.zeros_like(mask)
    box[top:bottom, left:right] = True
    return box


def on_white(image: Image.Image) -> Image.Image:
    """RGB of RGB or RGBA, white behind what is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")


def with_mask(reference: Image.Image, mask: Any) -> Image.Image:
    """A reference cut out by a mask of its size, as [`load_mask`] takes it."""
    alpha = load_mask(mask, reference.size, "The reference's mask")
    cut_out = reference.convert("RGB")
    cut_out.putalpha(Image.fromarray(alpha.astype(np.uint8) * 255))
    return cut_out


def reference_square(foreground: np.ndarray) -> Square:
    """The square of a reference that the image encoder sees, around its subject, bool `(height, width)`."""
    return square_around(bounding_box(foreground), SUBJECT_MARGIN)


def prepare_reference(image: Image.Image, size: int) -> tuple[Image.Image, torch.Tensor]:
    """
    A whole reference as the image encoder sees it: the square around the subject, on white [O].

    Args:
        image (`PIL.Image.Image`): RGB, with the subject on white or on any background; or RGBA, cut out.
        size (`int`): the side of the result, in pixels.

    Returns:
        `tuple`: the square, RGB, and where it shows the subject, float `(1, size, size)`.

    Raises:
        ValueError: if it is white or transparent all over.
    """
    foreground = subject_mask(image)
    square = reference_square(foreground)
    return cut_square(image, square, size), cut_mask(foreground, square, size)


def reference_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 `(batch, size, size, 3)` to float32 `(batch, 3, size, size)`, normalised as DINOv2 wants it."""
    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def encode_patches(image_encoder: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """
    The patch tokens of references, without CLS and registers [O].

    Args:
        image_encoder (`Dinov2Model` or `Dinov2WithRegistersModel`): which takes images of any size.
        pixels (`torch.Tensor`): `(batch, 3, size, size)`, of [`reference_pixels`].

    Returns:
        `torch.Tensor`: `(batch, (size / patch) ** 2, dim)`.
    """
    tokens = image_encoder(pixel_values=pixels).last_hidden_state
    return tokens[:, 1 + getattr(image_encoder.config, "num_register_tokens", 0) :]


# -- The network's attention ------------------------------------------------------------------------------------------


def unet_input(latents: torch.Tensor, mask: torch.Tensor, masked_latents: torch.Tensor) -> torch.Tensor:
    """`(batch, 4 + 1 + 4, height, width)`, in `StableDiffusionInpaintPipeline`'s order. The mask is 1 where the image
    is made anew."""
    return torch.cat([latents, mask.to(latents), masked_latents.to(latents)], dim=1)


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """A mask `(batch, 1, height, width)` at the VAE's size: 1 where any of its pixels is in the mask."""
    return F.max_pool2d(mask, factor)


def cross_attention_blocks(unet: UNet2DConditionModel) -> list[tuple[str, Any]]:
    """All cross-attentions by name, in the order in which a forward pass meets them (`attn_processors` has another).
    Stable Diffusion 1.x has 16; number 9 is in `up_blocks[1].attentions[2]`."""
    places = [(f"down_blocks.{number}", block) for number, block in enumerate(unet.down_blocks)]
    places.append(("mid_block", unet.mid_block))
    places += [(f"up_blocks.{number}", block) for number, block in enumerate(unet.up_blocks)]
    found = []
    for place, block in places:
        for number, attention in enumerate(getattr(block, "attentions", ())):
            for depth, layer in enumerate(getattr(attention, "transformer_blocks", ())):
                found.append((f"{place}.attentions.{number}.transformer_blocks.{depth}.attn2", layer.attn2))
    return found


@contextlib.contextmanager
def record_attention(module: Any) -> Iterator[list[torch.Tensor]]:
    """
    Within it, each call of a cross-attention adds to the list it gives: softmax(QK^T), the mean over heads, float32
    `(batch, pixels, tokens)`. Fused attention does not return it, so it is computed beside, for this module alone.
    """
    recorded: list[torch.Tensor] = []

    @torch.no_grad()
    def record(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        tokens = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        query = module.head_to_batch_dim(module.to_q(hidden_states)).float()
        key = module.head_to_batch_dim(module.to_k(tokens)).float()
        scores = (query @ key.transpose(1, 2) * module.scale).softmax(dim=-1)
        recorded.append(scores.unflatten(0, (-1, module.heads)).mean(dim=1))

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield recorded
    finally:
        handle.remove()


def attention_map(attention: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Where the pixels of a mask look at the reference: the sum of their attention (Algorithm 1 [P]).

    Args:
        attention (`torch.Tensor`): `(batch, pixels, tokens)` of [`record_attention`], of a square of pixels.
        mask (`torch.Tensor`): `(batch, 1, height, width)`, 0..1. It is resized by area; one that is smaller than a
            pixel of the attention counts as a whole one [O].
        grid (`tuple[int, int]`): rows and columns of the tokens.

    Returns:
        `torch.Tensor`: float32 `(batch, rows, columns)`.
    """
    side = math.isqrt(attention.shape[1])
    weights = F.adaptive_avg_pool2d(mask.float(), side).flatten(1).to(attention)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(max=1)
    return (weights[:, None] @ attention)[:, 0].unflatten(1, grid)


# -- From a map to a region -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """A region of a reference as the image encoder sees it."""

    mask: np.ndarray
    """bool `(size, size)`."""
    box: Box
    """Around the mask, with its margin, in pixels."""
    confidence: float
    """0..1: how much more of the map's mass lies in the box than if it were spread evenly over the subject."""
    map: np.ndarray
    """float32 `(size, size)`, 0..1."""


def find_region(
    map: torch.Tensor,
    foreground: torch.Tensor | None,
    size: int,
    threshold: float = 0.4,
    blur: float = 0.0,
    mass: float = 0.7,
    margin: float = 0.15,
    smallest: float = 0.2,
) -> Region:
    """
    The region of a reference that a map means [O].

    Args:
        map (`torch.Tensor`): `(rows, columns)`, one of [`attention_map`].
        foreground (`torch.Tensor`, *optional*): `(rows, columns)`, the share of each token that shows the subject; the
            others do not count.
        size (`int`): the side of the result, in pixels.
        threshold (`float`): share of the map's maximum from which on a pixel belongs to the mask.
        blur (`float`): standard deviation in tokens of the Gaussian that the map is blurred by.
        mass (`float`): the largest connected parts that have this share of the mask's mass stay.
        margin (`float`): share of the box's sides that is added at each of its ends.
        smallest (`float`): share of `size` that the box's sides have at least.
    """
    map = blurred(map.detach().float().cpu(), blur)
    foreground = torch.ones_like(map) if foreground is None else foreground.float().cpu()
    map = map * foreground
    spread = (map - map.min()) / (map.max() - map.min()).clamp(min=1e-12)
    pixels = F.interpolate(spread[None, None], (size, size), mode="bilinear")[0, 0]
    mask = largest_parts(pixels >= threshold * pixels.max(), pixels, mass)
    box = _widened(bounding_box(mask), margin, smallest, size)
    return Region(mask.numpy(), box, _confidence(map, foreground, box, size), pixels.numpy())


def blurred(map: torch.Tensor, deviation: float) -> torch.Tensor:
    """A map, `(rows, columns)`, blurred by a Gaussian of so many tokens; what lies beyond its edges does not count."""
    if not deviation:
        return map
    rows, columns = (_gaussian(size, deviation) for size in map.shape)
    return rows @ map @ columns.T


def _gaussian(size: int, deviation: float) -> torch.Tensor:
    """What each of so many places takes of each, `(size, size)`."""
    places = torch.arange(size)
    weights = torch.exp(-(((places[:, None] - places) / deviation) ** 2) / 2)
    return weights / weights.sum(dim=1, keepdim=True)


def largest_parts(mask: torch.Tensor, values: torch.Tensor, share: float) -> torch.Tensor:
    """The fewest connected parts of a mask, bool `(height, width)`, that hold a share of the values' sum in it."""
    labels = torch.arange(1, mask.numel() + 1).reshape(mask.shape) * mask
    while True:  # the largest number of each part spreads over it
        spread = F.max_pool2d(labels[None, None].double(), 3, stride=1, padding=1)[0, 0].long() * mask
        if torch.equal(spread, labels):
            break
        labels = spread.flatten()[spread - 1] * mask  # a label is a pixel's number: what that pixel has by now
    sums = torch.bincount(labels.flatten(), weights=(values * mask).flatten().double())
    ordered, numbers_of_parts = sums.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    kept = numbers_of_parts[before < share * ordered.sum()]
    return torch.isin(labels, kept) & mask if len(kept) else mask


def _widened(box: Box, margin: float, smallest: float, size: int) -> Box:
    """A box with its margin, moved into `size` x `size` pixels."""
    ends = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        length = min(max(math.ceil((high - low) * (1 + 2 * margin)), math.ceil(smallest * size)), size)
        start = min(max((low + high - length) // 2, 0), size - length)
        ends.append((start, start + length))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def _confidence(map: torch.Tensor, foreground: torch.Tensor, box: Box, size: int) -> float:
    inside = torch.zeros(1, 1, size, size)
    inside[..., box[1] : box[3], box[0] : box[2]] = 1
    inside = F.adaptive_avg_pool2d(inside, (map.shape[0], map.shape[1]))[0, 0]
    found = float((map * inside).sum() / map.sum().clamp(min=1e-12))
    expected = float((foreground * inside).sum() / foreground.sum().clamp(min=1e-12))
    return 0.0 if expected >= 1 else max(0.0, (found - expected) / (1 - expected))


# -- The pipeline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """Which region of a reference is used for a masked one, at the reference's size."""

    box: Box
    """Left, top, right, bottom, in the reference's pixels."""
    uses_whole: bool
    """Whether the whole reference is used: the confidence was too low, or the call asked for it."""
    confidence: float | None = None
    """0..1, of [`Region`]; `None` where the region was given."""
    map: np.ndarray | None = None
    """float32 `(height, width)`, 0..1; `None` where the region was given."""
    mask: np.ndarray | None = None
    """bool `(height, width)`; `None` where a box was given."""


@dataclass
class RefineByAlignPipelineOutput(BaseOutput):
    """
    Args:
        images (`list`): the refined images, each of its input's size.
        alignments (`list[Alignment]`): what was used of each reference.
    """

    images: Any
    alignments: list[Alignment]


@dataclass(frozen=True)
class _Sample:
    """One image to refine, its reference, and the square of each that the networks see."""

    image: Image.Image
    mask: np.ndarray
    square: Square
    reference: Image.Image
    foreground: np.ndarray
    reference_square: Square


class RefineByAlignPipeline(DiffusionPipeline):
    """
    Makes a masked region of an image anew, so that it looks as in a reference (Refine-by-Align, arXiv 2412.00306).
    First it finds which region of the reference corresponds, by the cross-attention of one block; then it fills the
    mask, guided by that region alone. Outside the mask nothing changes.

    Args:
        vae (`AutoencoderKL`): Stable Diffusion 1.x's.
        unet (`UNet2DConditionModel`): with 9 input channels, as Stable Diffusion 1.x's for inpainting.
        image_encoder (`Dinov2Model` or `Dinov2WithRegistersModel`): frozen.
        reference_projector ([`ReferenceProjector`]): from the image encoder's tokens to what the UNet attends to.
        scheduler (`DDIMScheduler`): of the UNet.
        image_size (`int`, defaults to 512): the side of the square that the UNet works at, in pixels.
        reference_size (`int`, defaults to 224): the side of the square that the image encoder sees, in pixels [P].
        alignment_block (`int`, defaults to 9): the cross-attention that aligns, in forward order from 0 [P].
        alignment_step (`float`, defaults to 0.8): how noisy the image is while it is aligned, as a share of the
            scheduler's timesteps, from 0 (clean) to 1 (noise) [O].
        alignment_seeds (`int`, defaults to 4): over how many noises the map is averaged [O].
        map_threshold (`float`, defaults to 0.4): the share of the map's maximum from which on it is the region [O].
        map_blur (`float`, defaults to 0): the standard deviation, in tokens, of a Gaussian over the map [O].
        min_confidence (`float`, defaults to 0.1): below it the whole reference is used [O].
        crop_scale (`float`, defaults to 2.5): the side of the square against the mask's box [O].
        mask_dilation (`float`, defaults to 0.02): by how much the mask grows for the network, as a share of
            `image_size` [O].
        feather (`float`, defaults to 0.01): the width of the seam inside the mask, as a share of the square [O].
        num_inference_steps (`int`, defaults to 50): what a call takes by default [Q].
        guidance_scale (`float`, defaults to 5.0): what a call takes by default [Q].
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"
    _exclude_from_cpu_offload = ["reference_projector"]  # small, and its null embedding is read outside its forward
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        image_encoder: Dinov2Model | Dinov2WithRegistersModel,
        reference_projector: ReferenceProjector,
        scheduler: DDIMScheduler,
        image_size: int = 512,
        reference_size: int = 224,
        alignment_block: int = 9,
        alignment_step: float = 0.8,
        alignment_seeds: int = 4,
        map_threshold: float = 0.4,
        map_blur: float = 0.0,
        min_confidence: float = 0.1,
        crop_scale: float = 2.5,
        mask_dilation: float = 0.02,
        feather: float = 0.01,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            image_encoder=image_encoder,
            reference_projector=reference_projector,
            scheduler=scheduler,
        )
        self.register_to_config(
            image_size=image_size,
            reference_size=reference_size,
            alignment_block=alignment_block,
            alignment_step=alignment_step,
            alignment_seeds=alignment_seeds,
            map_threshold=map_threshold,
            map_blur=map_blur,
            min_confidence=min_confidence,
            crop_scale=crop_scale,
            mask_dilation=mask_dilation,
            feather=feather,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        _check_kept_settings(self.config)
        _check_parts(vae, unet, image_encoder, reference_projector)
        _check_scheduler(scheduler)
        _check_sizes(self.config, self.vae_scale_factor, image_encoder)

    @torch.no_grad()
    def align(
        self,
        image: Any,
        mask_image: Any,
        reference_image: Any,
        reference_mask: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        one_region: bool = False,
    ) -> Any:
        """
        Finds the region of a reference that corresponds to a masked one.

        Args:
            image: the image, as [`load_reference_image`] takes it; or a list.
            mask_image: what went wrong in it, white on black, of its size; or a list.
            reference_image: the reference; cut out (RGBA) or on white is best; or a list.
            reference_mask (*optional*): where the reference shows the subject, white on black; or a list.
            generator (`torch.Generator` or a list, *optional*): of the noise. With a list, one each, a batch gives
                what single calls give.
            one_region (`bool`, defaults to `False`): whether all images show the same region, as the frames of a video
                do: their maps are averaged, for one [`Alignment`] with the first reference.

        Returns:
            `Alignment`: or a list of them, if any of the arguments is a list.
        """
        samples = self._samples(image, mask_image, reference_image, reference_mask)
        _check_generator(generator, len(samples))
        maps = self._maps(samples, generator)
        if one_region:
            maps = (maps / maps.sum(dim=(1, 2), keepdim=True)).mean(dim=0, keepdim=True)
        found = [self._alignment(sample, map) for sample, map in zip(samples, maps, strict=False)]
        self.maybe_free_model_hooks()
        given = (image, mask_image, reference_image, reference_mask)
        is_batch = any(isinstance(argument, list) for argument in given)
        return found if is_batch and not one_region else found[0]

    @torch.no_grad()
    def attention_maps(
        self,
        image: Any,
        mask_image: Any,
        reference_image: Any,
        reference_mask: Any = None,
        steps: Sequence[float] | None = None,
        blocks: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        The maps of Algorithm 1 [P] for several steps and blocks, the mean over `alignment_seeds` noises.

        Args:
            image, mask_image, reference_image, reference_mask, generator: as in `align`.
            steps (`Sequence[float]`, *optional*): shares of the timesteps; by default the configuration's.
            blocks (`Sequence[int]`, *optional*): cross-attentions in forward order; by default all.

        Returns:
            `torch.Tensor`: float32 `(steps, blocks, batch, rows, columns)`, on the reference as the image encoder sees
            it ([`prepare_reference`]).
        """
        samples = self._samples(image, mask_image, reference_image, reference_mask)
        _check_generator(generator, len(samples))
        steps = [self.config["alignment_step"]] if steps is None else steps
        blocks = range(len(cross_attention_blocks(self.unet))) if blocks is None else blocks
        maps = self._attention_maps(samples, steps, blocks, generator)
        self.maybe_free_model_hooks()
        return maps

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        mask_image: Any,
        reference_image: Any,
        reference_mask: Any = None,
        region: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        strength: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """
        Refines a masked region of an image from a reference.

        Args:
            image, mask_image, reference_image, reference_mask: as in `align`.
            region (*optional*): skips the alignment: a box (left, top, right, bottom) in the reference's pixels, a
                mask of the reference's size, an [`Alignment`], or `"whole"`; or a list of these.
            num_inference_steps (`int`, *optional*): by default the configuration's, 50.
            guidance_scale (`float`, *optional*): by default the configuration's, 5; up to 1 there is none.
            strength (`float`, defaults to 1.0): how much of what is in the mask is replaced: 1 all of it; less begins
                from it with so much noise.
            generator (`torch.Generator` or a list, *optional*): as in `align`.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"`, float `(height, width, channels)` in 0..1;
                `"pt"`, `(channels, height, width)`; each in a list; or `"latent"`, the square's latents.
            return_dict (`bool`, defaults to `True`): whether to return an output with names, not a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `f(pipe, step, timestep, {"latents": latents})`
                after each step; what it returns under `"latents"` is taken.
            callback_on_step_end_tensor_inputs (`Sequence[str]`): the names of what it is given.

        Returns:
            [`RefineByAlignPipelineOutput`]: `images`, RGB, or RGBA with the input's alpha, and `alignments`. Pixels
            outside the mask are the input's.
        """
        steps = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        self._guidance_scale = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        _check_settings(steps, self._guidance_scale, strength, output_type, callback_on_step_end_tensor_inputs)
        most = self.scheduler.config["num_train_timesteps"] - self.scheduler.config.get("steps_offset", 0)
        if steps > most:  # the offset would lead behind the last timestep
            raise ValueError(f"`num_inference_steps` is {steps}, but the scheduler has {most} timesteps. Pass fewer.")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        samples = self._samples(image, mask_image, reference_image, reference_mask)
        _check_generator(generator, len(samples))
        if region is None:
            alignments = [self._alignment(*pair) for pair in zip(samples, self._maps(samples, generator), strict=True)]
        else:
            alignments = _given_regions(region, samples)
        tokens = self._encode_references([self._region_of(*pair) for pair in zip(samples, alignments, strict=True)])
        latents = self._denoise(
            samples, tokens, steps, strength, generator, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        images: Any = latents
        if output_type != "latent":
            decoded = self._decode(latents)
            images = [self._paste(*pair, output_type) for pair in zip(samples, decoded, strict=True)]
        self.maybe_free_model_hooks()
        return RefineByAlignPipelineOutput(images, alignments) if return_dict else (images, alignments)

    # -- What goes in --

    def _samples(self, image: Any, mask_image: Any, reference_image: Any, reference_mask: Any) -> list[_Sample]:
        given = {"image": image, "mask_image": mask_image, "reference_image": reference_image}
        given["reference_mask"] = reference_mask
        lengths = {name: len(value) for name, value in given.items() if isinstance(value, list)}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"The lists have different lengths, or none: {lengths}. Pass one entry for each image.")
        count = next(iter(lengths.values()), 1)
        rows = [value if isinstance(value, list) else [value] * count for value in given.values()]
        return [self._sample(*row) for row in zip(*rows, strict=True)]

    def _sample(self, image: Any, mask_image: Any, reference_image: Any, reference_mask: Any) -> _Sample:
        image, reference = load_reference_image(image), load_reference_image(reference_image)
        mask = load_mask(mask_image, image.size)
        check_mask(mask)
        if reference_mask is not None:
            reference = with_mask(reference, reference_mask)
        square = mask_square(mask, self.config["crop_scale"])
        foreground = subject_mask(reference)
        return _Sample(image, mask, square, reference, foreground, reference_square(foreground))

    def _pixels(self, samples: Sequence[_Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """The squares, `(batch, 3, size, size)` in -1..1, and their masks, `(batch, 1, size, size)`."""
        size, images, masks = self.config["image_size"], [], []
        for sample in samples:
            images.append(torch.from_numpy(np.array(cut_surroundings(sample.image, sample.square, size))))
            masks.append(cut_mask(sample.mask, sample.square, size))
        pixels = torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels.to(self._execution_device), torch.stack(masks).to(self._execution_device)

    def _encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        return latents.float() * self.vae.config.scaling_factor

    def _known(self, samples: Sequence[_Sample]) -> tuple[torch.Tensor, ...]:
        """Latents of the squares and of the squares without their masked part, both float32, the mask at their size,
        and the mask in pixels."""
        pixels, mask = self._pixels(samples)
        reach = math.ceil(self.config["mask_dilation"] * self.config["image_size"])
        wide = grown(mask, reach)
        masked = self._encode_images(pixels * (1 - wide))
        return self._encode_images(pixels), masked, latent_mask(wide, self.vae_scale_factor), mask

    def _encode_references(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """`(batch, tokens, cross_attention_dim)` of squares as the image encoder sees them."""
        arrays = [torch.from_numpy(np.array(image)) for image in images]
        pixels = reference_pixels(torch.stack(arrays)).to(self._execution_device, self.image_encoder.dtype)
        patches = encode_patches(self.image_encoder, pixels)
        return self.reference_projector(patches.to(self.reference_projector.dtype))

    def _noise(self, shape: tuple[int, ...], generator: Any) -> torch.Tensor:
        """float32, drawn on the CPU unless the generator is on another device."""
        first = generator[0] if isinstance(generator, list) else generator
        device = torch.device("cpu") if first is None else first.device
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(self._execution_device)

    def _predict(
        self, latents: torch.Tensor, timestep: Any, mask: torch.Tensor, masked: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        inputs = unet_input(latents, mask, masked).to(self.unet.dtype)
        return self.unet(inputs, timestep, encoder_hidden_states=tokens.to(self.unet.dtype), return_dict=False)[0]

    # -- Alignment --

    def _attention_maps(
        self, samples: Sequence[_Sample], steps: Sequence[float], blocks: Sequence[int], generator: Any
    ) -> torch.Tensor:
        modules = [module for _, module in cross_attention_blocks(self.unet)]
        if unknown := [block for block in blocks if not 0 <= block < len(modules)]:
            raise ValueError(f"This UNet has no cross-attention {unknown[0]}: they are 0 to {len(modules) - 1}.")
        size = self.config["reference_size"]
        references = [cut_square(sample.reference, sample.reference_square, size) for sample in samples]
        tokens = self._encode_references(references)
        latents, masked, small_mask, mask = self._known(samples)
        seeds = self.config["alignment_seeds"]
        noises = self._noise((len(samples), seeds, *latents.shape[1:]), generator)
        last = self.scheduler.config.num_train_timesteps - 1
        side = math.isqrt(tokens.shape[1])
        maps = torch.zeros(len(steps), len(blocks), len(samples), side, side)
        for place, step in enumerate(steps):
            timestep = torch.full((len(samples),), round(step * last), device=latents.device)
            for seed in range(seeds):
                noisy = self.scheduler.add_noise(latents, noises[:, seed], timestep)
                with contextlib.ExitStack() as stack:
                    recorded = [stack.enter_context(record_attention(modules[block])) for block in blocks]
                    self._predict(noisy, timestep, small_mask, masked, tokens)
                for number, (attention,) in enumerate(recorded):
                    maps[place, number] += attention_map(attention, mask, (side, side)).cpu() / seeds
        return maps

    def _maps(self, samples: Sequence[_Sample], generator: Any) -> torch.Tensor:
        """The maps of the configuration's step and block, `(batch, rows, columns)`."""
        steps, blocks = [self.config["alignment_step"]], [self.config["alignment_block"]]
        return self._attention_maps(samples, steps, blocks, generator)[0, 0]

    def _alignment(self, sample: _Sample, map: torch.Tensor) -> Alignment:
        """The region that a map, `(rows, columns)`, means, at the reference's size."""
        size, square = self.config["reference_size"], sample.reference_square
        shown = cut_mask(sample.foreground, square, size)
        foreground = F.adaptive_avg_pool2d(shown, (map.shape[0], map.shape[1]))[0]
        region = find_region(map, foreground, size, self.config["map_threshold"], self.config["map_blur"])
        scale, corner, ends = square.side / size, (square.left, square.top) * 2, sample.reference.size * 2
        box = []
        for value, start, end in zip(region.box, corner, ends, strict=True):
            box.append(min(max(round(value * scale) + start, 0), end))
        full_map = put_square(torch.from_numpy(region.map), square, sample.reference.size).numpy()
        mask = put_square(torch.from_numpy(region.mask), square, sample.reference.size, "nearest-exact").numpy() > 0
        uses_whole = region.confidence < self.config["min_confidence"]
        if uses_whole:
            logger.warning(
                "The region was not found in the reference (confidence %.2f, below %.2f), so the whole reference is "
                "used. Does it show the subject? Pass `region` to choose one.",
                *(region.confidence, self.config["min_confidence"]),
            )
            box = [0, 0, *sample.reference.size]
        left, top, right, bottom = box
        return Alignment((left, top, right, bottom), uses_whole, region.confidence, full_map, mask)

    # -- Refinement --

    def _region_of(self, sample: _Sample, alignment: Alignment) -> Image.Image:
        """What the image encoder sees of a reference."""
        square = sample.reference_square if alignment.uses_whole else square_around(alignment.box, 1.0)
        return cut_square(sample.reference, square, self.config["reference_size"])

    def _denoise(
        self,
        samples: Sequence[_Sample],
        tokens: torch.Tensor,
        num_inference_steps: int,
        strength: float,
        generator: Any,
        callback: Callable[..., dict[str, Any] | None] | None,
        callback_inputs: Sequence[str],
    ) -> torch.Tensor:
        """The squares' latents, float32."""
        known, masked, mask, _ = self._known(samples)
        self.scheduler.set_timesteps(num_inference_steps, device=known.device)
        made = max(1, round(num_inference_steps * strength))
        timesteps = self.scheduler.timesteps[-made:]
        noise = self._noise(tuple(known.shape), generator)
        latents = noise * self.scheduler.init_noise_sigma
        if strength < 1:
            latents = self.scheduler.add_noise(known, noise, timesteps[:1])
        null = self.reference_projector.null(*tokens.shape[:2]).to(tokens)
        bar: Any = self.progress_bar
        for number, timestep in enumerate(bar(timesteps)):
            scaled = self.scheduler.scale_model_input(latents, timestep)
            prediction = self._predict(scaled, timestep, mask, masked, tokens).float()
            if self._guidance_scale > 1:
                without = self._predict(scaled, timestep, mask, masked, null).float()
                prediction = without + self._guidance_scale * (prediction - without)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            kept = known  # outside the mask the latents are the image's, as noisy as those inside
            if number + 1 < len(timesteps):
                kept = self.scheduler.add_noise(known, noise, timesteps[number + 1 : number + 2])
            latents = mask * latents + (1 - mask) * kept
            if callback is not None:
                tensors = {"latents": latents} if "latents" in callback_inputs else {}
                latents = (callback(self, number, timestep, tensors) or {}).get("latents", latents)
        return latents

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]
        if not pixels.isfinite().all():  # as an image it would be black, without a word
            raise ValueError(
                "The image holds numbers that are not finite (NaN or infinite): its guidance is too high, or its "
                f"precision ({self.unet.dtype}, VAE {self.vae.dtype}) too low. Lower `guidance_scale`, or load the "
                "model in bfloat16 or float32."
            )
        values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]

    def _paste(self, sample: _Sample, refined: Image.Image, output_type: str) -> Any:
        """The image with the refined square inside its mask, bit for bit as it was outside."""
        values, square = np.array(sample.image), sample.square
        side = (square.side, square.side)
        canvas = on_white(sample.image)
        canvas.paste(refined.resize(side, Image.Resampling.BICUBIC), (square.left, square.top))
        seam = feathered(sample.mask, max(1, round(self.config["feather"] * square.side)))[..., None]
        mixed = np.rint(values[..., :3] * (1 - seam) + np.asarray(canvas) * seam).astype(np.uint8)
        values[..., :3] = np.where(sample.mask[..., None], mixed, values[..., :3])
        if output_type == "pil":
            return Image.fromarray(values)
        array = values.astype(np.float32) / 255
        return array if output_type == "np" else torch.from_numpy(array).permute(2, 0, 1)

    # -- Doors --

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "RefineByAlignPipeline":
        """Loads as diffusers' own does, but from safetensors files alone: others run code when they are opened.
        ValueError for a pipeline of another kind."""
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Reads `model_index.json`, and checks what it is of. The installed package takes its own classes for those of
        the code that a Hub repo carries, so that it needs no `trust_remote_code`."""
        config = super()._dict_from_json_file(json_file)
        check_is_refine_pipeline(config, os.fspath(json_file))
        if _is_installed_package(__name__):
            config["_class_name"] = "RefineByAlignPipeline"
            config["reference_projector"] = ["refalign", "ReferenceProjector"]
        return config

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """
        Saves the pipeline as diffusers' own does, with the code and entries by which it opens again, with and without
        the package `refalign`.

        Raises:
            ValueError: if another format than safetensors is asked for.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization=False` writes files that run code when opened. Leave it out.")
        is_pushed = kwargs.pop("push_to_hub", False)
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        write_code(Path(save_directory))
        if is_pushed:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub})


def _is_installed_package(module: str) -> bool:
    # This file is also part of Hub repos, where there is no package `refalign`
    return module.partition(".")[0] == "refalign"


if _is_installed_package(__name__):
    # diffusers/pipelines/pipeline_loading_utils.py: a Hub repo may name parts of a package only if it is entered here
    LOADABLE_CLASSES["refalign"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}

_CODE = {
    "reference_images": load_reference_image,
    "reference_projector": ReferenceProjector,
    "pipeline_refine_by_align": RefineByAlignPipeline,
}


def write_code(folder: Path) -> None:
    """Makes a folder as diffusers saves it one that opens with and without the package `refalign`: this code goes in,
    and entries that name it. Where its parts were once loaded from is forgotten."""
    for name, part in _CODE.items():
        source = Path(str(sys.modules[part.__module__].__file__)).read_text("utf-8")
        (folder / f"{name}.py").write_text(source, "utf-8")
        if name == "reference_projector":
            (folder / f"reference_projector/{name}.py").write_text(source, "utf-8")
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict):
            continue
        for key in ("_name_or_path", "name_or_path"):
            content.pop(key, None)
        if file == folder / "model_index.json":
            content["_class_name"] = ["pipeline_refine_by_align", "RefineByAlignPipeline"]
            content["reference_projector"] = ["reference_projector", "ReferenceProjector"]
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


# -- Checks -----------------------------------------------------------------------------------------------------------


def check_is_refine_pipeline(index: Mapping[str, Any], source: str) -> None:
    """Raises ValueError, naming what it is instead, unless a `model_index.json` is of Refine-by-Align's pipeline."""
    entry = index.get("_class_name")
    name = entry[-1] if isinstance(entry, list) and entry else entry
    if name == "RefineByAlignPipeline":
        return
    remedy = "Pass a folder that `refalign refine init` or `refalign-train export` wrote."
    if name == "RefAlignWanPipeline":
        remedy = "It makes videos: `refalign generate` takes it."
    if name == "StableDiffusionInpaintPipeline":
        remedy = "`refalign refine init --inpainting` makes one of it, to be trained."
    raise ValueError(f"{source} is of a {name}, not of Refine-by-Align's pipeline. {remedy}")


def load_mask(mask: Any, size: tuple[int, int], name: str = "The mask") -> np.ndarray:
    """
    A mask, bool `(height, width)`: white is inside. Grey counts as white from half on, which a line tells.

    Args:
        mask: a bool array, or what [`load_reference_image`] takes. What is transparent is outside.
        size (`tuple[int, int]`): width and height that it must have.
        name (`str`): what errors name.
    """
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        mask = mask.numpy(force=True)
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = mask.squeeze().astype(np.uint8) * 255
    loaded = load_reference_image(mask)
    if loaded.size != size:
        raise ValueError(
            f"{name} is {loaded.width}x{loaded.height}, but its image {size[0]}x{size[1]} pixels: make them one size."
        )
    grey = np.asarray(loaded.convert("L"))
    if loaded.mode == "RGBA":
        grey = np.minimum(grey, np.asarray(loaded.getchannel("A")))
    if ((grey > 0) & (grey < 255)).any():
        logger.warning("%s has grey values: from half of white on they count as white.", name)
    return grey >= 128


def check_mask(mask: np.ndarray) -> None:
    """Raises ValueError for a mask, bool `(height, width)`, that is empty or leaves nothing of the image."""
    if not mask.any():
        raise ValueError("The mask is empty, so nothing would be refined. Paint what went wrong white, on black.")
    if mask.all():
        raise ValueError("The mask covers the whole image: nothing of it would be left. Mask what went wrong only.")


def _given_regions(region: Any, samples: Sequence[_Sample]) -> list[Alignment]:
    regions = region if isinstance(region, list) else [region] * len(samples)
    if len(regions) != len(samples):
        raise ValueError(f"`region` has {len(regions)} entries for {len(samples)} images. Pass one for each.")
    return [_given_region(*pair) for pair in zip(regions, samples, strict=True)]


def _given_region(region: Any, sample: _Sample) -> Alignment:
    width, height = sample.reference.size
    if isinstance(region, Alignment):
        return region
    if isinstance(region, str) and region == "whole":
        return Alignment((0, 0, width, height), uses_whole=True)
    if not isinstance(region, tuple):
        mask = load_mask(region, (width, height), "The region's mask")
        return Alignment(bounding_box(mask), uses_whole=False, mask=mask)
    whole_numbers = all(isinstance(value, numbers.Integral) for value in region)
    if (
        len(region) != 4
        or not whole_numbers
        or not (0 <= region[0] < region[2] <= width and 0 <= region[1] < region[3] <= height)
    ):
        raise ValueError(
            f"`region` is {region}, but must be (left, top, right, bottom) inside the reference's {width}x{height} "
            "pixels."
        )
    return Alignment(region, uses_whole=False)


def _check_generator(generator: Any, count: int) -> None:
    entries = generator if isinstance(generator, list) else [generator]
    if not all(isinstance(entry, torch.Generator | None) for entry in entries):
        raise ValueError(f"`generator` must be a torch.Generator or a list of them, but is {generator!r}.")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` has {len(generator)} entries for {count} images. Pass one, or one each.")


def _check_settings(steps: Any, scale: Any, strength: Any, output_type: str, callback_inputs: Sequence[str]) -> None:
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"`num_inference_steps` must be a whole number from 1 up, but is {steps!r}.")
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale) or scale < 0:
        raise ValueError(f"`guidance_scale` must be a number from 0 up, but is {scale!r}.")
    if not isinstance(strength, numbers.Real) or not 0 < float(strength) <= 1:
        raise ValueError(f"`strength` must be a number above 0, at most 1, but is {strength!r}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, but is {output_type!r}.")
    if unknown := [name for name in callback_inputs if name not in RefineByAlignPipeline._callback_tensor_inputs]:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}; it can have ['latents'].")


# What a repo's files may say, as whole numbers from the first or as numbers between both
_WHOLE = {"image_size": 8, "reference_size": 8, "alignment_block": 0, "alignment_seeds": 1, "num_inference_steps": 1}
_SHARES = ("alignment_step", "map_threshold", "min_confidence", "mask_dilation", "feather")


def _check_kept_settings(config: Any) -> None:
    """Raises ValueError, naming it, for a setting of a repo's files that cannot be."""
    for name, least in _WHOLE.items():
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} of model_index.json is {value!r}: it must be a whole number of {least} or more.")
    ranges = {**dict.fromkeys(_SHARES, (0, 1)), **dict.fromkeys(("map_blur", "guidance_scale"), (0, math.inf))}
    ranges["crop_scale"] = (1, math.inf)
    for name, (low, high) in ranges.items():
        value = config[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            bounds = f"from {low} to {high}" if high < math.inf else f"of {low} or more"
            raise ValueError(f"{name} of model_index.json is {value!r}: it must be a number {bounds}.")


def _check_sizes(config: Any, vae_scale_factor: int, image_encoder: Any) -> None:
    """Raises ValueError for a size of a repo's files whose edge a part would cut without a word."""
    patch = image_encoder.config.patch_size
    steps = {"image_size": ("VAE", vae_scale_factor), "reference_size": ("image encoder", patch)}
    for name, (part, step) in steps.items():
        value = config[name]
        if value % step:
            nearest = max(1, round(value / step)) * step
            raise ValueError(
                f"{name} of model_index.json is {value}, but the {part} takes steps of {step} pixels and would cut "
                f"the rest. Make it a multiple, such as {nearest}."
            )


def _check_parts(vae: Any, unet: Any, image_encoder: Any, reference_projector: Any) -> None:
    """Raises ValueError for parts that do not fit each other."""
    channels = unet.config["in_channels"]
    if channels != 9:
        raise ValueError(f"The UNet has {channels} input channels, but Refine-by-Align needs 9, an inpainting UNet's.")
    latents, predicted = vae.config["latent_channels"], unet.config["out_channels"]
    if latents != 4 or predicted != 4:
        raise ValueError(f"The VAE has {latents} latent channels, and the UNet predicts {predicted}: both must be 4.")
    wanted = (image_encoder.config.hidden_size, unet.config["cross_attention_dim"])
    found = (reference_projector.config["image_dim"], reference_projector.config["cross_attention_dim"])
    if found != wanted:
        raise ValueError(
            f"The reference projector goes from {found[0]} to {found[1]} channels, but the image encoder and the UNet "
            f"have {wanted[0]} and {wanted[1]}."
        )


def _check_scheduler(scheduler: Any) -> None:
    """Tells of a scheduler that cuts what it denoises, as is right for pixels alone."""
    if scheduler.config.get("clip_sample"):
        logger.warning(
            "The scheduler has clip_sample, which cuts latents at %g. Set it to false in "
            "scheduler/scheduler_config.json.",
            scheduler.config.get("clip_sample_range", 1.0),
        )
