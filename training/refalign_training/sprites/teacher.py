"""The small world's teacher of the reference alignment: a DINOv3 ViT at tiny size that knows subjects."""

import dataclasses
import functools
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from refalign_training.data.randomness import numpy_generator
from refalign_training.run.config import OptimizerOptions
from refalign_training.sprites import subject
from refalign_training.sprites.training import train_part
from refalign_training.sprites.vae import MODEL_SIDE, letterboxed_reference


CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_register_tokens": 4,
    "patch_size": 16,
    "image_size": MODEL_SIDE,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv3's
STEPS = 2500
IMAGES = 16_000
OPTIMIZER = OptimizerOptions(lr=1e-3, warmup_steps=100, schedule="linear", weight_decay=0.05)
NAMES = (
    subject.SHAPES,
    tuple(subject.COLOURS),
    tuple(subject.COLOURS),
    subject.PATTERNS,
    subject.FACES,
    subject.ACCESSORIES,
)


def _draw(number: int, held_out: bool, purpose: str) -> tuple[np.ndarray, list[int]]:
    generator = numpy_generator("sprites", purpose, number)
    pool = subject.subjects(held_out)
    drawn = pool[generator.integers(len(pool))]
    labels = list(map(tuple.index, NAMES, dataclasses.astuple(drawn)))
    return letterboxed_reference(drawn, generator), labels


def draw_references(count: int, held_out: bool, purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
    """References as the models see them, normalised `(count, 3, 64, 64)`, and their subjects `(count, 6)`."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(functools.partial(_draw, held_out=held_out, purpose=purpose), range(count), chunksize=64)
        images, labels = zip(*drawn, strict=True)
    return normalised(np.stack(images)), torch.tensor(labels)


def normalised(images: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def train_teacher(folder: Path, steps: int = STEPS, images: int = IMAGES) -> tuple[DINOv3ViTModel, float]:
    """
    Trains the teacher so that its patches together, and each by itself, tell the subject, and each its own pixels;
    returns it and the share of 300 held-out subjects whose other picture is the nearest one.
    """
    pixels, labels = draw_references(images, held_out=False, purpose="teacher")
    torch.manual_seed(0)
    teacher = DINOv3ViTModel(DINOv3ViTConfig(**CONFIG))
    dim, skipped = CONFIG["hidden_size"], 1 + CONFIG["num_register_tokens"]
    pooled, single = _heads(dim), _heads(dim)
    local = nn.Linear(dim, 3 * 16)

    def loss(step: int, half: int) -> torch.Tensor:
        rows = torch.from_numpy(numpy_generator("teacher batch", step, half).integers(len(pixels), size=48))
        tokens = teacher(pixels[rows]).last_hidden_state[:, skipped:]
        total = torch.zeros(())
        for i in range(len(NAMES)):
            target = labels[rows, i]
            each = single[i](tokens).transpose(1, 2)
            total = total + F.cross_entropy(pooled[i](tokens.mean(1)), target)
            total = total + 0.3 * F.cross_entropy(each, target[:, None].expand(-1, tokens.shape[1]))
        side = MODEL_SIDE // CONFIG["patch_size"]
        small = F.avg_pool2d(pixels[rows], 4).unflatten(2, (side, 4)).unflatten(4, (side, 4))
        own = small.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return total + F.mse_loss(local(tokens), own)

    modules = {"teacher": teacher, "pooled": pooled, "single": single, "local": local}
    train_part(folder, modules, loss, OPTIMIZER, steps)
    return teacher.eval(), top_1(teacher)


def _heads(dim: int) -> nn.ModuleList:
    """A classifier for each respect of a subject."""
    return nn.ModuleList(nn.Linear(dim, len(names)) for names in NAMES)


@torch.no_grad()
def top_1(teacher: DINOv3ViTModel, count: int = 300) -> float:
    """How often, of so many held-out subjects, a picture is nearest to the other picture of the same subject."""
    pool = subject.subjects(held_out=True)
    chosen = numpy_generator("teacher top 1").permutation(len(pool))[:count]
    views = []
    for view in range(2):
        images = []
        for number in chosen.tolist():
            generator = numpy_generator("teacher top 1", view, number)
            images.append(letterboxed_reference(pool[number], generator))
        tokens = teacher(normalised(np.stack(images))).last_hidden_state[:, 1 + CONFIG["num_register_tokens"] :]
        views.append(F.normalize(tokens.mean(1), dim=-1))
    nearest = (views[0] @ views[1].T).argmax(1)
    return (nearest == torch.arange(count)).float().mean().item()
