"""The frozen parts of the small refining model: a tiny image VAE and a tiny DINOv2, trained on drawn views."""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from refalign_training.data.artifacts import with_stickers
from refalign_training.data.randomness import numpy_generator, seed_of
from refalign_training.run.config import OptimizerOptions
from refalign_training.sprites.subject import PARTS, subjects
from refalign_training.sprites.teacher import normalised
from refalign_training.sprites.training import train_part
from refalign_training.sprites.views import GRID, IMAGE_SIDE, own_places, parts_of_view, random_view


VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": IMAGE_SIDE,
    "mid_block_add_attention": False,
}
VAE_OPTIMIZER = OptimizerOptions(
    name="muon", muon_lr=1e-2, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=20, schedule="linear"
)
VAE_STEPS = 1200
VAE_BATCH = 8  # images of half a batch
DIVERGENCE = 1e-4  # the weight of the latents' divergence from the normal distribution
GREY_SHARE = 0.25  # of the images, which get a grey rectangle: what is masked is encoded too

ENCODER: dict[str, Any] = {
    "hidden_size": 96,
    "mlp_ratio": 4,
    "num_hidden_layers": 2,  # where patches know the whole subject, nothing has to be found
    "num_attention_heads": 4,
    "num_register_tokens": 4,
    "patch_size": IMAGE_SIDE // GRID,
    "image_size": IMAGE_SIDE,
}
ENCODER_OPTIMIZER = OptimizerOptions(lr=1e-3, warmup_steps=40, schedule="linear", weight_decay=0.05)
ENCODER_STEPS = 4_500
ENCODER_BATCH = 16
ENCODER_IMAGES = 10_000
STICKER_SHARE = 0.4  # of the images, which get stickers as the references of the training do
OWN_WEIGHT = 4.0  # of the error of a patch's own pixels
IMAGES = 4_000


class Views(NamedTuple):
    """Drawn views, and what is known about them."""

    images: np.ndarray
    """uint8 `(count, 64, 64, 3)`."""
    parts: torch.Tensor
    """The part that each patch shows, as [`parts_of_view`] gives it `(count, 256)`."""
    places: torch.Tensor
    """Where on the subject it is `(count, 256, 2)`."""


def _draw(
    number: int, held_out: bool, purpose: str, sticker_share: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = numpy_generator("sprites", purpose, number)
    pool = subjects(held_out)
    subject = pool[generator.integers(len(pool))]
    image, pose = random_view(generator, subject)
    pixels, parts = np.asarray(image), parts_of_view(subject, pose)
    if generator.random() < sticker_share and parts.any():
        seen = np.kron(parts > 0, np.ones((IMAGE_SIDE // GRID,) * 2, bool))
        pixels = with_stickers(pixels, seen, generator)
    return pixels, parts.ravel(), own_places(pose).reshape(-1, 2)


def draw_views(count: int, held_out: bool, purpose: str, sticker_share: float = 0.0) -> Views:
    """The first `count` views of that purpose, a share of them with stickers on the subject."""
    draw = functools.partial(_draw, held_out=held_out, purpose=purpose, sticker_share=sticker_share)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(draw, range(count), chunksize=64)
        images, parts, places = zip(*drawn, strict=True)
    known = torch.from_numpy(np.stack(parts)).long(), torch.from_numpy(np.stack(places))
    return Views(np.stack(images), *known)


# -- VAE --------------------------------------------------------------------------------------------------------------


def train_image_vae(folder: Path, steps: int = VAE_STEPS, images: int = IMAGES) -> AutoencoderKL:
    """Trains the VAE, or goes on with it. Its scaling factor is measured, so that latents deviate by 1."""
    views = draw_views(images, held_out=False, purpose="refine vae").images
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE)
    coder: Any = vae  # diffusers' types say that it may lack these parts

    def loss(step: int, half: int) -> torch.Tensor:
        pixels = to_model(_masked_batch(views, numpy_generator("refine vae batch", step, half)))
        noise = torch.Generator().manual_seed(seed_of("refine vae noise", step, half))
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = coder.quant_conv(coder.encoder(pixels)).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=noise)
            decoded = coder.decoder(coder.post_quant_conv(latents))
        difference = decoded.float() - pixels
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return difference.square().mean() + 0.05 * difference.abs().mean() + DIVERGENCE * divergence

    train_part(folder, {"vae": vae}, loss, VAE_OPTIMIZER, steps)
    vae.register_to_config(scaling_factor=1 / _deviation(vae, views[:400]))
    return vae.eval()


def to_model(images: np.ndarray) -> torch.Tensor:
    """uint8 `(batch, height, width, 3)` as the VAE takes it."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def _masked_batch(views: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    images = views[generator.integers(len(views), size=VAE_BATCH)]
    for image in images[: round(GREY_SHARE * VAE_BATCH)]:
        top, left = generator.integers(0, IMAGE_SIDE - 8, 2)
        height, width = generator.integers(8, IMAGE_SIDE // 2, 2)
        image[top : top + height, left : left + width] = 127
    return images


@torch.no_grad()
def _deviation(vae: AutoencoderKL, images: np.ndarray) -> float:
    """The standard deviation of the latents of images."""
    return vae.encode(to_model(images), return_dict=False)[0].mean.std().item()


@torch.no_grad()
def image_psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """The peak signal-to-noise ratio of images encoded and decoded, in decibels: the mean over images."""
    pixels = to_model(images)
    latents: Any = vae.encode(pixels, return_dict=False)[0].mode()
    decoded = vae.decode(latents, return_dict=False)[0].clamp(-1, 1)
    errors = ((decoded - pixels) / 2).square().mean((1, 2, 3))
    return (-10 * errors.log10()).mean().item()


# -- Image encoder ----------------------------------------------------------------------------------------------------


def train_image_encoder(
    folder: Path, steps: int = ENCODER_STEPS, images: int = ENCODER_IMAGES
) -> Dinov2WithRegistersModel:
    """
    Trains the encoder, or goes on with it, so that each patch tells its own pixels, which part of the subject it shows
    and where on it. Such patches can be found again in another picture, as DINOv2's can, and tell little of others.
    """
    views = draw_views(images, held_out=False, purpose="refine encoder", sticker_share=STICKER_SHARE)
    pixels = normalised(views.images)
    torch.manual_seed(0)
    encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**ENCODER))
    dim, size = ENCODER["hidden_size"], ENCODER["patch_size"]
    heads = nn.ModuleDict({"part": nn.Linear(dim, 1 + len(PARTS)), "place": nn.Linear(dim, 2)})
    heads["own"] = nn.Linear(dim, 3 * size * size)

    def loss(step: int, half: int) -> torch.Tensor:
        generator = numpy_generator("refine encoder batch", step, half)
        rows = torch.from_numpy(generator.integers(len(pixels), size=ENCODER_BATCH))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = patches_of(encoder, pixels[rows])
        tokens = tokens.float()
        parts, is_seen = views.parts[rows], (views.parts[rows] > 0).float()
        own = F.unfold(pixels[rows], size, stride=size).transpose(1, 2)
        total = OWN_WEIGHT * F.mse_loss(heads["own"](tokens), own)
        total = total + F.cross_entropy(heads["part"](tokens).transpose(1, 2), parts)
        misplaced = (heads["place"](tokens) - views.places[rows]).square().sum(-1)
        total = total + (misplaced * is_seen).sum() / is_seen.sum()
        return total

    train_part(folder, {"encoder": encoder, "heads": heads}, loss, ENCODER_OPTIMIZER, steps)
    return encoder.eval()


def patches_of(encoder: Dinov2WithRegistersModel, pixels: torch.Tensor) -> torch.Tensor:
    """The patches' tokens `(batch, 256, dim)`, without the class token and the registers."""
    return encoder(pixels).last_hidden_state[:, 1 + encoder.config.num_register_tokens :]


@torch.no_grad()
def correspondence(encoder: Dinov2WithRegistersModel, subjects_drawn: int = 100) -> tuple[float, float]:
    """
    How far off a patch is found in another view of its subject: from where it shows the subject to where the most
    similar patch does.

    Returns:
        `tuple[float, float]`: the mean over the patches of held-out subjects, in the subjects' radii; and the same if
        patches are found by chance.
    """
    pool, found, by_chance = subjects(held_out=True), [], []
    for number in range(subjects_drawn):
        generator = numpy_generator("refine correspondence", number)
        subject = pool[generator.integers(len(pool))]
        tokens, places = [], []
        for kind in ("in a place", "on white"):
            image, pose = random_view(generator, subject, kind)
            is_seen = torch.from_numpy(parts_of_view(subject, pose) > 0).flatten()
            patches = patches_of(encoder, normalised(np.array(image)[None]))[0]
            tokens.append(F.normalize(patches[is_seen], dim=-1))
            places.append(torch.from_numpy(own_places(pose)).reshape(-1, 2)[is_seen])
        distances = torch.cdist(*places)
        nearest = (tokens[0] @ tokens[1].T).argmax(1, keepdim=True)
        found.append(distances.gather(1, nearest).mean().item())
        by_chance.append(distances.mean().item())
    return float(np.mean(found)), float(np.mean(by_chance))
