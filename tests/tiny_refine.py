"""A tiny random Refine-by-Align pipeline, and pictures for it."""

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from refalign.pipeline_refine_by_align import ReferenceProjector, RefineByAlignPipeline


def tiny_refine_pipeline(seed: int = 0, **settings) -> RefineByAlignPipeline:
    """Images of 64 pixels, a VAE of factor 4, references of 16 x 16 tokens, a UNet of three levels."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=9,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=24,
    )
    encoder_config = Dinov2WithRegistersConfig(
        image_size=64, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_register_tokens=4
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    pipeline = RefineByAlignPipeline(
        vae=vae.eval(),
        unet=unet.eval(),
        image_encoder=Dinov2WithRegistersModel(encoder_config).eval(),
        reference_projector=ReferenceProjector(16, 24).eval(),
        scheduler=scheduler,
        **{"image_size": 64, "reference_size": 64, "num_inference_steps": 2, "alignment_seeds": 2, **settings},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(size: tuple[int, int] = (96, 80), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask_of(box: tuple[int, int, int, int], size: tuple[int, int] = (96, 80)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def reference(size: tuple[int, int] = (72, 48)) -> Image.Image:
    """A cut-out subject with a pattern on it."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 8, 51, 39), fill=(200, 40, 40, 255))
    draw.ellipse((38, 14, 47, 23), fill=(40, 40, 220, 255))
    return image
