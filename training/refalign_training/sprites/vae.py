"""The small world's VAE: Wan 2.2's layout at tiny size, trained on drawn clips and references."""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from PIL import Image
from torch import nn

from refalign.reference_images import prepare_reference_image
from refalign_training.data.randomness import numpy_generator, seed_of
from refalign_training.run.config import OptimizerOptions
from refalign_training.sprites.subject import SIDE, Subject, draw_reference, subjects
from refalign_training.sprites.training import train_part
from refalign_training.sprites.world import NUM_FRAMES, Scene, draw_scene, random_scene


MODEL_SIDE = SIDE // 2  # pixels of a frame as the models see it
VAE = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "base_dim": 32,
    "dim_mult": [1, 2, 2],
    "temperal_downsample": [True, True],
    "num_res_blocks": 1,
    "z_dim": 16,
}
OPTIMIZER = OptimizerOptions(
    name="muon", muon_lr=1e-2, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=50, schedule="linear"
)
STEPS = 4500
# Frames of a clip, clips of half a batch, and the share of the steps until which it is so: most of what there is to
# learn, pictures teach sooner
STAGES = ((1, 24, 0.6), (17, 2, 1.0))
# The share of the steps until which the encoder is trained too. What it gives is then fixed, and the decoder goes on
ENCODER_UNTIL = 0.85
NOISE = 0.05  # on latents, so that the decoder is smooth where the transformer is not exact
PENALTY = 1e-4  # of latents' squares, else they grow until that noise is nothing


def draw_frames(scene: Scene) -> np.ndarray:
    """A scene's clip as the models see it: uint8 `(frames, 64, 64, 3)`."""
    frames = []
    for frame in draw_scene(scene).frames:
        small = Image.fromarray(frame).resize((MODEL_SIDE, MODEL_SIDE), Image.Resampling.BICUBIC)
        frames.append(np.asarray(small))
    return np.stack(frames)


def draw_random(number: int, held_out: bool, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """The clip of that number, and a reference of its first subject, letterboxed as the models see it."""
    generator = numpy_generator("sprites", purpose, number)
    pool = subjects(held_out)
    who = tuple(pool[i] for i in generator.integers(len(pool), size=1 + number % 2))
    return draw_frames(random_scene(generator, who)), letterboxed_reference(who[0], generator)


def letterboxed_reference(subject: Subject, generator: np.random.Generator) -> np.ndarray:
    """A reference in a random pose and light, as the models see it: uint8 `(64, 64, 3)`."""
    image = draw_reference(subject, generator.uniform(-30, 30), generator.uniform(0.85, 1.1))
    box = Image.eval(image.convert("L"), lambda value: 255 - value).getbbox()
    return np.asarray(prepare_reference_image(image.crop(box), MODEL_SIDE, MODEL_SIDE, cut_out=False))


def draw_many(count: int, held_out: bool, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` clips `(count, 17, 64, 64, 3)` and as many references `(count, 64, 64, 3)`."""
    draw = functools.partial(draw_random, held_out=held_out, purpose=purpose)
    with ProcessPoolExecutor(getattr(os, "process_cpu_count", os.cpu_count)()) as pool:
        clips, references = zip(*pool.map(draw, range(count), chunksize=16), strict=True)
    return np.stack(clips), np.stack(references)


def new_vae(seed: int = 0) -> AutoencoderKLWan:
    """An untrained VAE whose kernels start with the past at zero: a clip begins as a row of pictures."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**VAE)
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1:
            module.weight.data[:, :, :-1] = 0
    return vae


class FirstFrameConv3d(WanCausalConv3d):
    """Without a past, all taps but the last meet zeros: a first frame is convolved in two dimensions."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[2] > 1 or cache_x is not None or self.kernel_size[0] == 1:
            return super().forward(x, cache_x)
        padding = cast(tuple[int, int], (self._padding[2], self._padding[0]))
        return nn.functional.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding)[:, :, None]


class Coder:
    """
    The VAE's `encode` and `decode` for training, without the cut that ends gradients; for pictures compiled, which is
    four times as fast. To compile what clips need takes longer than it saves.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        for module in vae.modules():
            if isinstance(module, WanCausalConv3d):
                module.__class__ = FirstFrameConv3d  # same parameters, another forward
        self.vae = vae
        self.compiled = torch.compile(vae.encoder), torch.compile(vae.decoder)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The posterior's means."""
        vae, pixels = self.vae, patchify(pixels, self.vae.config["patch_size"])
        encoder = self.compiled[0] if pixels.shape[2] == 1 else vae.encoder
        vae.clear_cache()
        chunks = []
        for chunk in (pixels[:, :, :1], *pixels[:, :, 1:].split(4, 2)):
            if chunk.shape[2]:
                vae._enc_conv_idx = [0]
                chunks.append(encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
        return vae.quant_conv(torch.cat(chunks, 2)).chunk(2, dim=1)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae, hidden_states = self.vae, self.vae.post_quant_conv(latents)
        decoder = self.compiled[1] if latents.shape[2] == 1 else vae.decoder
        vae.clear_cache()
        frames = []
        for i in range(latents.shape[2]):
            vae._conv_idx = [0]
            cache = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx, "first_chunk": i == 0}
            frames.append(decoder(hidden_states[:, :, i : i + 1], **cache))
        return unpatchify(torch.cat(frames, 2), vae.config["patch_size"])


def to_model(frames: np.ndarray) -> torch.Tensor:
    """uint8 `(batch, frames, height, width, 3)` as the VAE takes it."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_vae(folder: Path, steps: int = STEPS, clips: int = 3000) -> AutoencoderKLWan:
    """Trains the VAE, or goes on with it."""
    videos, references = draw_many(clips, held_out=False, purpose="vae")
    vae = new_vae()
    coder = Coder(vae)

    def loss(step: int, half: int) -> torch.Tensor:
        length, size = next((length, size) for length, size, until in STAGES if step < until * steps)
        pixels = _draw_batch(videos, references, length, size, numpy_generator("vae batch", step, half))
        generator = torch.Generator().manual_seed(seed_of("vae noise", step, half))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(step < ENCODER_UNTIL * steps):
                latents = coder.encode(pixels)
            noise = torch.randn(latents.shape, generator=generator)
            decoded = coder.decode(latents + NOISE * noise)
        error = (decoded.float() - pixels).square().mean()
        return error + PENALTY * latents.float().square().mean()

    train_part(folder, {"vae": vae}, loss, OPTIMIZER, steps)
    measure_latents(vae, videos[:200], references[:200])
    return vae.eval()


def _draw_batch(
    videos: np.ndarray, references: np.ndarray, length: int, size: int, generator: np.random.Generator
) -> torch.Tensor:
    rows = generator.integers(len(videos), size=size)
    start = 0 if length == NUM_FRAMES else int(generator.integers(NUM_FRAMES - length + 1))
    pixels = videos[rows, start : start + length]
    if length == 1:  # references are encoded too
        pixels[::4, 0] = references[rows[::4]]
    return to_model(pixels).contiguous(memory_format=torch.channels_last_3d)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, videos: np.ndarray, references: np.ndarray) -> None:
    """Stores the latents' mean and standard deviation in the configuration: what the pipelines normalise by."""
    latents = []
    for batch in (*videos[:, None], *references[:, None, None]):
        encoded = vae.encode(to_model(batch), return_dict=False)[0].mode()
        latents.append(encoded.transpose(0, 1).flatten(1))
    values = torch.cat(latents, 1)
    vae.register_to_config(latents_mean=values.mean(1).tolist(), latents_std=values.std(1).tolist())


@torch.no_grad()
def vae_psnr(vae: AutoencoderKLWan, videos: np.ndarray) -> float:
    """The peak signal-to-noise ratio of clips encoded and decoded, in decibels: the mean over clips."""
    values = []
    for video in videos[:, None]:
        pixels = to_model(video)
        decoded = vae.decode(vae.encode(pixels, return_dict=False)[0].mode(), return_dict=False)[0]
        values.append(-10 * torch.log10(((decoded - pixels) / 2).square().mean()).item())
    return float(np.mean(values))
