"""A folder of tiny clips with captions and references, a tiny teacher, and the command that caches them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load

from refalign.video import write_video
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.reader import Cache
from refalign_training.data.recipe import Recipe
from refalign_training.data.source import Dataset


HEIGHT, WIDTH, FRAMES = 32, 48, 5


def write_clip(folder: Path, name: str, seed: int, references: int = 1) -> None:
    """A clip of noise, its caption and so many references."""
    generator = np.random.default_rng(seed)
    frames = generator.integers(0, 256, (9, HEIGHT, WIDTH, 3), dtype=np.uint8)
    write_video(list(frames), folder / f"{name}.mp4", overwrite=True)
    (folder / f"{name}.txt").write_text(f"clip {name}, a {'very ' * (seed % 5)}small one", "utf-8")
    for number in range(1, references + 1):
        pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.ref{number}.png")


def write_clips(folder: Path, count: int) -> Path:
    """The clips `clip00`, `clip01`, ...; each second one has two references."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_clip(folder, f"clip{number:02d}", number, references=1 + number % 2)
    return folder


def write_teacher(folder: Path, seed: int = 0) -> Path:
    """A DINOv3 of random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, num_register_tokens=4)).save_pretrained(folder)
    return folder


def cache_command(clips: Path, output: Path, model: Path, teacher: Path | None = None, **changes: Any) -> CacheCommand:
    """The command that caches the clips, exactly and in this process."""
    values = {
        "source": Dataset(data="folder", videos=clips),
        "output": output,
        "model": str(model),
        "teacher": teacher and str(teacher),
        "families": ("video", "references", "text", "teacher") if teacher else ("video", "references", "text"),
        "recipe": Recipe(height=HEIGHT, width=WIDTH, num_frames=FRAMES),
        "dtype": "float32",
        "workers": 0,
        "allow_changes": True,
        "device": "cpu",
    }
    return change(CacheCommand(**values), **changes)


def change(command: CacheCommand, **changes: Any) -> CacheCommand:
    """The command with other options, its recipe's among them."""
    recipe = {name: changes.pop(name) for name in list(changes) if hasattr(command.recipe, name)}
    return dataclasses.replace(command, recipe=dataclasses.replace(command.recipe, **recipe), **changes)


def all_items(cache: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of all items of a cache of files, by path."""
    files = sorted(cache.glob("*/*/[!.]*.safetensors"))
    return {str(file.relative_to(cache)): load(file.read_bytes()) for file in files}  # a copy: no mapped file


def stamps(cache: Path, pattern: str = "[!.]*/[!.]*/[!.]*.safetensors") -> dict[str, tuple[int, int]]:
    """Inode and time of each file: what was written again has others."""
    return {
        str(file.relative_to(cache)): (file.stat().st_ino, file.stat().st_mtime_ns) for file in cache.glob(pattern)
    }


def item_file(cache: Path, sample_id: str, family: str, variant: int = 0) -> Path:
    """The file of a sample's item."""
    opened = Cache(cache)
    entry = next(entry for entry in opened.samples if entry.sample_id == sample_id)
    return opened.items[family].path(opened.place(entry, family, variant))


def failures(cache: Path) -> list[dict[str, Any]]:
    """The lines of failed.jsonl."""
    return [json.loads(line) for line in (cache / "failed.jsonl").read_text("utf-8").splitlines()]


def assert_same_items(one: Path, other: Path) -> None:
    """Two caches hold the same, sample by sample."""
    ours, theirs = Cache(one), Cache(other)
    assert ours.fingerprint == theirs.fingerprint
    for mine, its in zip(ours.samples, theirs.samples, strict=True):
        a, b = ours.read(mine), theirs.read(its)
        assert torch.equal(a["latents"], b["latents"])
        assert torch.equal(a["reference_latents"], b["reference_latents"])
        torch.testing.assert_close(a["prompt_embeds"], b["prompt_embeds"], atol=1e-5, rtol=1e-5)  # other batches
