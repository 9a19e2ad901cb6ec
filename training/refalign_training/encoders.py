"""The frozen encoders whose outputs a cache holds, one a family, and what identifies each.

An encoder takes a list of [`Decoded`] and gives for each what its item holds: tensors by name, on the CPU, in the
dtype that is stored. What they compute is what [`RefAlignWanPipeline`] computes for inference; only the latents are
not normalised yet ([`refalign_training.cache.reader.normalize_latents`]).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, UMT5EncoderModel

from refalign_training.cache.decoding import Decoded


MAX_SEQUENCE_LENGTH = 512  # of RefAlignWanPipeline: longer prompts are cut there
PATCH = 16  # pixels a token spans: the VAE's 8 times the transformer's patch of 2
PARTS = {"video": ("vae",), "references": ("vae",), "text": ("text_encoder", "tokenizer")}
FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


class Encoder(Protocol):
    """A family's encoder. `batch_size`: how many samples it takes at once."""

    batch_size: int

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]: ...


class VaeEncoder:
    """
    Latents of clips, or of references, each of which is encoded as a one-frame video. Means of the posterior.

    Args:
        model (`str`): a Wan or RefAlign pipeline's folder or Hub id.
        dtype (`torch.dtype`): what is stored.
        vae_dtype (`torch.dtype`): what the VAE computes in; the pipelines' is float32.
        references (`bool`): whether pixels are references rather than a clip.
    """

    batch_size = 1  # a clip at 480x832x81 fills the GPU by itself

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        device: torch.device,
        vae_dtype: torch.dtype = torch.float32,
        references: bool = False,
        revision: str | None = None,
    ) -> None:
        self.dtype, self.device, self.references = dtype, device, references
        self.vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=vae_dtype, revision=revision)
        self.vae.to(device).eval()

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]:
        """`latents`, `(16, latent frames or references, height / 8, width / 8)`, not normalised."""
        return [{"latents": self._encode(decoded.pixels)} for decoded in batch]

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        # One by one: a batch of references gives other last bits than the pipeline, which takes them one by one
        clips = pixels.split(1) if self.references else [pixels]
        return torch.cat([self._means(clip) for clip in clips], dim=1).to(self.dtype).cpu()

    @torch.no_grad()
    def _means(self, pixels: torch.Tensor) -> torch.Tensor:
        video = pixels.to(self.device).permute(3, 0, 1, 2)[None].float() / 255
        video = (2.0 * video - 1.0).to(self.vae.dtype)
        return self.vae.encode(video).latent_dist.mode()[0].float()


class TextEncoder:
    """UMT5's embeddings of prompts, cleaned and cut as the pipeline does, without padding."""

    batch_size = 8

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.tokenizer = AutoTokenizer.from_pretrained(model, subfolder="tokenizer", revision=revision)
        self.text_encoder = UMT5EncoderModel.from_pretrained(
            model, subfolder="text_encoder", dtype=dtype, revision=revision
        )
        self.text_encoder.to(device).eval()

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]:
        """`prompt_embeds_0`, ...: one `(tokens, dim)` a prompt."""
        embeds = iter(self._encode([prompt for decoded in batch for prompt in decoded.prompts]))
        return [{f"prompt_embeds_{i}": next(embeds) for i in range(len(decoded.prompts))} for decoded in batch]

    def _encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        batches = [prompts[i : i + self.batch_size] for i in range(0, len(prompts), self.batch_size)]
        return [embeds for batch in batches for embeds in self._encode_batch(batch)]

    @torch.no_grad()
    def _encode_batch(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        # Padded to the longest, not to 512 as diffusers does: padding is masked, so it changes nothing but the time
        tokens = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="longest",
            max_length=MAX_SEQUENCE_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        return [e[:n].to(self.dtype).cpu().clone() for e, n in zip(embeds, lengths, strict=True)]


class TeacherEncoder:
    """The teacher's features of references, on the transformer's own grid of tokens."""

    batch_size = 1

    def __init__(self, teacher: str, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> None:
        from refalign_training.teachers import load_teacher

        self.dtype, self.device = dtype, device
        self.teacher = load_teacher(teacher, dtype=dtype, device=device, revision=revision)

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]:
        """`features`, `(references, height / 16, width / 16, dim)`."""
        return [{"features": self._encode(decoded.pixels)} for decoded in batch]

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        grid = (pixels.shape[1] // PATCH, pixels.shape[2] // PATCH)
        images = pixels.to(self.device).permute(0, 3, 1, 2).float() / 255
        return self.teacher(images, grid=grid).to(self.dtype).cpu().contiguous()


# -- What identifies a model ------------------------------------------------------------------------------------------


def model_identity(model: str, parts: Sequence[str] = (".",), revision: str | None = None) -> str:
    """
    What changes when the model's outputs may: of a Hub id, its commit; of a folder, a digest of its configurations and
    weights, of which large files give 64 samples of 16 KiB and their size rather than all.

    Args:
        model (`str`): a folder or Hub id.
        parts (`Sequence[str]`): the sub-folders that count.
        revision (`str`, *optional*): of a Hub id.

    Raises:
        ValueError: if there is no such model.
    """
    if not Path(model).is_dir():
        return f"{model}@{_snapshot(model, parts, revision).name}"
    files = [f for part in parts for pattern in FILES for f in sorted((Path(model) / part).glob(pattern))]
    if not files:
        raise ValueError(f"{model} holds no model in {', '.join(parts)}. Pass a pipeline's folder or a Hub id.")
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(model).as_posix()}\0".encode())
        total.update(_digest_of_file(file))
    return f"sha256:{total.hexdigest()[:32]}"


def _digest_of_file(file: Path, samples: int = 64, sample_size: int = 16_384) -> bytes:
    size = file.stat().st_size
    total = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= samples * sample_size:
            total.update(opened.read())
        else:
            for i in range(samples):  # a fine-tuned model differs everywhere, so that some places tell
                opened.seek((size - sample_size) * i // (samples - 1))
                total.update(opened.read(sample_size))
    return total.digest()


def vae_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a pipeline's VAE. ValueError if it has none."""
    folder = Path(model) if Path(model).is_dir() else _snapshot(model, ("vae",), revision)
    try:
        return json.loads((folder / "vae/config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} has no VAE that can be read: {error}") from error


def _snapshot(model: str, parts: Sequence[str], revision: str | None) -> Path:
    """The folder of a Hub id's configurations, named by the commit."""
    patterns = ["config.json" if part == "." else f"{part}/*config.json" for part in parts]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{model} is no folder here, and the Hub does not give it: {error}") from error
