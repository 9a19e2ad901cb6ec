"""What the training is measured with: models of random weights, clips of noise, and their cache."""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from transformers import DINOv3ViTConfig, DINOv3ViTModel, UMT5Config, UMT5EncoderModel

from refalign.video import write_video
from refalign_training import cache
from refalign_training.cache.command import CacheCommand
from refalign_training.data.recipe import Recipe
from refalign_training.data.source import Dataset
from tests.tiny_pipeline import TRANSFORMER, tiny_tokenizer


REFERENCES = 2


@dataclass(frozen=True)
class Size:
    """The sizes of the models, as arguments of their configurations, and of the clips: (frames, height, width)."""

    transformer: dict[str, int]
    aligned_blocks: int
    checkpoint: dict[str, int]
    """What is other of the transformer whose checkpoints are measured."""
    vae: dict[str, Any]
    text_encoder: dict[str, int]
    teacher: dict[str, int]
    clips: tuple[int, int, int]
    memory_clips: tuple[int, int, int]


VAE = {"base_dim": 2, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
TEXT_ENCODER = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
TEACHER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {
    "tiny": Size(TRANSFORMER, 1, {}, VAE, TEXT_ENCODER, TEACHER, (5, 32, 48), (5, 64, 96)),
    # Wan's size of a head, 1.3b's share of aligned blocks; a VAE of a sixth of the real one's width, DINOv3 ViT-S
    "mid": Size(
        {"num_attention_heads": 3, "ffn_dim": 1536, "num_layers": 10, "text_dim": 256},
        3,
        {"num_attention_heads": 6, "ffn_dim": 3072},
        {"base_dim": 16},
        {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 8},
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
        (17, 96, 160),
        (17, 240, 416),
    ),
    # The real ones, but for the text encoder's vocabulary, which costs no time; DINOv3 ViT-B
    "1.3b": Size(
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
        9,
        {},
        {},
        {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        (81, 480, 832),
        (81, 480, 832),
    ),
}


def write_models(folder: Path, size: Size) -> None:
    """A Wan pipeline's parts and a teacher, of random weights, and perhaps another transformer for checkpoints."""
    torch.manual_seed(0)
    WanTransformer3DModel(**size.transformer).save_pretrained(folder / "model/transformer")
    if size.checkpoint:
        WanTransformer3DModel(**size.transformer | size.checkpoint).save_pretrained(folder / "larger/transformer")
    AutoencoderKLWan(**size.vae).save_pretrained(folder / "model/vae")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model/tokenizer")
    config = UMT5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **size.text_encoder)
    UMT5EncoderModel._from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model/text_encoder")
    DINOv3ViTModel(DINOv3ViTConfig(**size.teacher, num_register_tokens=4)).save_pretrained(folder / "teacher")


def write_clips(folder: Path, count: int, frames: int, height: int, width: int) -> None:
    """Clips of noise with captions and references, in the format `folder`."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        pixels = generator.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        write_video(list(pixels), folder / f"{number:02d}.mp4")
        (folder / f"{number:02d}.txt").write_text(f"clip {number} of noise, and what is to be seen in it", "utf-8")
        for reference in range(REFERENCES):
            Image.fromarray(pixels[reference]).save(folder / f"{number:02d}.ref{reference + 1}.png")


def write_cache(folder: Path, name: str, count: int, clips: tuple[int, int, int], device: str) -> None:
    """The clips `name`, and their cache `name-cache`."""
    write_clips(folder / name, count, *clips)
    arguments = {"source": Dataset("folder", videos=folder / name), "recipe": Recipe(clips[1], clips[2], clips[0])}
    models = {"model": str(folder / "model"), "teacher": str(folder / "teacher")}
    command = CacheCommand(folder / f"{name}-cache", **arguments, **models, workers=0, device=device)
    with redirect_stdout(sys.stderr):  # which is kept for the tables
        cache.run(command)
