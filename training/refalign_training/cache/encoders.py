"""The frozen encoders whose outputs a cache holds, one a family, and where their models come from.

An encoder takes a list of [`Decoded`] and gives for each what its item holds: tensors by name, on the CPU, in the
dtype that is stored. What they compute is what [`RefAlignWanPipeline`] computes for inference; only the latents are
not normalised yet ([`refalign.pipeline_refalign_wan.normalize_latents`]).
"""

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5EncoderModel

from refalign.convert import CONFIGS, check_weights, read_config
from refalign.devices import find_device
from refalign.files import fetch, identity, naming_component, read_json
from refalign.pipeline_refalign_wan import TOKEN_PIXELS
from refalign.transformer_refalign_wan import check_finite
from refalign.variants import find_variant
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.items import Outcome, numbered
from refalign_training.data.decoding import Decoded, Task
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Unusable


logger = logging.getLogger(__name__)

MAX_SEQUENCE_LENGTH = 512  # of RefAlignWanPipeline: longer prompts are cut there
PADDING = 64  # tokens: prompts are padded to multiples of it
BATCH_SIZES = {
    "video": 1,
    "references": 1,
    "text": 8,
    "teacher": 1,
    "pictures": 1,
}  # a clip at 480x832x81 fills the GPU by itself
NOT_FINITE = {"video": "video", "references": "image", "teacher": "image", "text": "not readable", "pictures": "image"}
PARTS = {"video": ("vae",), "references": ("vae",), "text": ("text_encoder", "tokenizer")}
FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


class Encoder(Protocol):
    """A family's encoder."""

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]: ...


class VaeEncoder:
    """
    Latents of clips, or of references, each of which is encoded as a one-frame video. Means of the posterior.

    Args:
        model (`Path`): the folder of a Wan or RefAlign pipeline.
        dtype (`torch.dtype`): what is stored.
        vae_dtype (`torch.dtype`): what the VAE computes in; the pipelines' is float32.
        references (`bool`): whether pixels are references rather than a clip.
        vae (`AutoencoderKLWan`, *optional*): one that is loaded already.
    """

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype,
        device: torch.device,
        vae_dtype: torch.dtype = torch.float32,
        references: bool = False,
        vae: AutoencoderKLWan | None = None,
    ) -> None:
        self.dtype, self.device, self.references = dtype, device, references
        with naming_component("VAE", model):
            self.vae = vae or AutoencoderKLWan.from_pretrained(
                model,
                subfolder="vae",
                torch_dtype=vae_dtype,
                use_safetensors=True,
                variant=find_variant(model / "vae"),
            )
        check_finite(self.vae.named_parameters(), f"The VAE of {model}")
        self.vae.to(device).eval()  # pyright: ignore[reportArgumentType]  (diffusers wraps `to`)

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]:
        """`latents`, `(16, latent frames or references, height / 8, width / 8)`, not normalised; of references of
        their own sizes `latents_0`, ...: one `(16, 1, height / 8, width / 8)` each."""
        items = []
        for decoded in batch:
            if decoded.own_sizes:
                items.append(numbered("latents", map(self._encode, decoded.own_sizes)))
            else:
                items.append({"latents": self._encode(decoded.pixels)})
        return items

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        # One by one: a batch of references gives other last bits than the pipeline, which takes them one by one
        clips = pixels.split(1) if self.references else [pixels]
        return torch.cat([self._means(clip) for clip in clips], dim=1).to(self.dtype).cpu()

    @torch.no_grad()
    def _means(self, pixels: torch.Tensor) -> torch.Tensor:
        video = pixels.to(self.device).permute(3, 0, 1, 2)[None].float() / 255
        video = (2.0 * video - 1.0).to(self.vae.dtype)
        return self.vae.encode(video, return_dict=False)[0].mode()[0].float()


class TextEncoder:
    """UMT5's embeddings of prompts, with what the model wants before them, cleaned and cut as the pipeline does,
    without padding."""

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        with naming_component("text encoder or tokenizer", model):
            self.tokenizer = AutoTokenizer.from_pretrained(model, subfolder="tokenizer")
            self.text_encoder = UMT5EncoderModel.from_pretrained(
                model,
                subfolder="text_encoder",
                dtype=dtype,
                use_safetensors=True,
                variant=find_variant(model / "text_encoder"),
            )
        self._has_told = False
        self._prefixes = read_index(model).get("prompt_prefix") or {}
        check_finite(self.text_encoder.named_parameters(), f"The text encoder of {model}")
        self.text_encoder.to(device).eval()  # pyright: ignore[reportArgumentType]  (transformers wraps `to`)

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]:
        """`prompt_embeds_0`, ...: one `(tokens, dim)` a prompt."""
        prompts: list[str] = []
        for decoded in batch:
            prefix = self._prefixes.get(decoded.prefix, "")
            prompts += [prefix + prompt_clean(prompt) for prompt in decoded.prompts]
        embeds = self._encode(prompts)
        return [numbered("prompt_embeds", itertools.islice(embeds, len(decoded.prompts))) for decoded in batch]

    def _encode(self, prompts: Sequence[str]) -> Iterator[torch.Tensor]:
        for start in range(0, len(prompts), BATCH_SIZES["text"]):
            yield from self._encode_batch(prompts[start : start + BATCH_SIZES["text"]])

    @torch.no_grad()
    def _encode_batch(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        cleaned = list(map(prompt_clean, prompts))
        tokens = self.tokenizer(cleaned, max_length=MAX_SEQUENCE_LENGTH, truncation=True)
        # Padding is masked and adds nothing but time, so it is not to 512 as in diffusers. But there always is some:
        # without a mask, other kernels run, whose last bits differ
        longest = max(map(len, tokens.input_ids))
        if longest == MAX_SEQUENCE_LENGTH:
            self._tell_what_is_not_read(cleaned)
        length = min((longest // PADDING + 1) * PADDING, MAX_SEQUENCE_LENGTH)
        tokens = self.tokenizer.pad(tokens, padding="max_length", max_length=length, return_tensors="pt")
        tokens = tokens.to(self.device)
        embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        return [e[:n].to(self.dtype).cpu().clone() for e, n in zip(embeds, lengths, strict=True)]

    def _tell_what_is_not_read(self, prompts: Sequence[str]) -> None:
        """Once: a dataset may have millions of them."""
        for prompt in prompts:
            count = len(self.tokenizer(prompt).input_ids)
            if count > MAX_SEQUENCE_LENGTH and not self._has_told:
                self._has_told = True
                message = "The caption %r has %d tokens. Of this and other long ones, only the first %d are read."
                logger.warning(message, f"{prompt[:40]}...", count, MAX_SEQUENCE_LENGTH)


class TeacherEncoder:
    """The teacher's features of references, on the transformer's own grid of tokens."""

    def __init__(self, teacher: Path, dtype: torch.dtype, device: torch.device) -> None:
        from refalign_training.method.teachers import load_teacher

        self.dtype, self.device = dtype, device
        self.teacher = load_teacher(teacher, dtype=dtype, device=device)

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]:
        """`features`, `(references, height / 16, width / 16, dim)`; of references of their own sizes `features_0`,
        ...: one `(height / 16, width / 16, dim)` each."""
        items = []
        for decoded in batch:
            own = (self._encode(pixels)[0] for pixels in decoded.own_sizes)
            items.append(
                numbered("features", own) if decoded.own_sizes else {"features": self._encode(decoded.pixels)}
            )
        return items

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        grid = (pixels.shape[1] // TOKEN_PIXELS, pixels.shape[2] // TOKEN_PIXELS)
        images = pixels.to(self.device).permute(0, 3, 1, 2).float() / 255
        return self.teacher(images, grid=grid).to(self.dtype).cpu().contiguous()


class PictureEncoder:
    """Subjects as they are: what a refinement sees of them is drawn anew in each epoch, before it is encoded."""

    def __call__(self, batch: Sequence[Decoded]) -> list[dict[str, torch.Tensor]]:
        """`pixels`, uint8 `(subjects, side, side, 8)`."""
        return [{"pixels": decoded.pixels} for decoded in batch]


# -- Where the models come from ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The folder of a model, of one commit where it comes from the Hub."""

    folder: Path
    identity: str
    """What changes when the model's outputs may, and only then."""


def fetch_models(
    families: Sequence[str],
    model: str | None,
    teacher: str | None,
    revision: str | None = None,
    teacher_revision: str | None = None,
) -> dict[str, Model]:
    """
    The models of the families, downloaded if need be.

    Raises:
        ValueError: if there is no such model.
    """
    from refalign_training.method.teachers import teacher_files

    models = {}
    of_pipeline = [family for family in families if family in PARTS]
    if of_pipeline and model is not None:
        configs = fetch(model, CONFIGS, revision)
        read_config(configs, model)
        commit = None if Path(model).is_dir() else configs.name
        parts = set(itertools.chain(*map(PARTS.__getitem__, of_pipeline)))
        patterns = [f"{part}/{pattern}" for part, pattern in itertools.product(sorted(parts), FILES)]
        folder = fetch(model, patterns, commit)
        check_weights(folder, sorted(parts - {"tokenizer"}))
        for family in of_pipeline:
            models[family] = Model(folder, model_identity(folder, PARTS[family]))
    if "pictures" in families:
        models["pictures"] = Model(Path(), "")
    if "teacher" in families and teacher is not None:
        files = teacher_files(teacher, teacher_revision)
        models["teacher"] = Model(files[0].parent, identity(files[0].parent, files))
    return models


def model_identity(folder: Path, parts: Sequence[str]) -> str:
    """The identity of those sub-folders of a pipeline. ValueError if there is nothing in them."""
    files: list[Path] = []
    for part, pattern in itertools.product(parts, FILES):
        files += (folder / part).glob(pattern)
    if not files:
        raise ValueError(f"{folder} holds no model in {', '.join(parts)}. Pass a pipeline's folder or a Hub id.")
    return identity(folder, files)


def vae_config(model: str | Path) -> dict[str, Any]:
    """The configuration of the VAE in a pipeline's folder. ValueError if it has none."""
    try:
        return json.loads((Path(model) / "vae/config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} has no VAE that can be read: {error}") from error


def read_index(model: str | Path) -> dict[str, Any]:
    """What the `model_index.json` in a pipeline's folder says; nothing if it has none."""
    file = Path(model) / "model_index.json"
    return read_json(file) if file.is_file() else {}


def own_long_edge(index: Mapping[str, Any]) -> int | None:
    """The longer side of the references that a pipeline of this index reads in their own aspect; `None` for one that
    reads them in the video's size."""
    return (index.get("call_defaults") or {}).get("reference_long_edge")


def reference_prefix(model: str | Path) -> str:
    """What stands before the prompts of samples with references, by a pipeline's folder."""
    return (read_index(model).get("prompt_prefix") or {}).get("references", "")


def with_long_edge(command: CacheCommand) -> CacheCommand:
    """The command with its model's own longer side of references, if it says none. Raises ValueError if it says one
    for a model that reads them in the video's size."""
    if command.model is None:
        return command
    own = own_long_edge(read_index(fetch(command.model, CONFIGS, command.revision)))
    return replace(command, recipe=with_own_long_edge(command.recipe, own, command.model))


def with_own_long_edge(recipe: Recipe, own: int | None, model: str) -> Recipe:
    """The recipe with a model's own longer side of references, if it says none. Raises ValueError if it says one for a
    model without."""
    if recipe.long_edge is not None and own is None:
        raise ValueError(
            f"long_edge is {recipe.long_edge}, but {model} reads references in the video's size. Leave it out, or "
            "name a Bernini-R model."
        )
    return recipe if recipe.long_edge is not None else replace(recipe, long_edge=own)


# -- Their use --------------------------------------------------------------------------------------------------------


def make_encoder(family: str, command: CacheCommand, model: Model) -> Encoder:
    """A family's encoder, on this process's device."""
    if family == "pictures":
        return PictureEncoder()
    device = find_device(command.device)
    dtype = getattr(torch, command.dtype)
    if family == "teacher":
        return TeacherEncoder(model.folder, dtype, device)
    if family == "text":
        return TextEncoder(model.folder, dtype, device)
    vae_dtype = getattr(torch, command.vae_dtype)
    return VaeEncoder(model.folder, dtype, device, vae_dtype, references=family == "references")


def encode(
    family: str, encoder: Encoder, batch: Sequence[tuple[Task, Decoded | Unusable]]
) -> Iterator[tuple[Task, Outcome]]:
    """What becomes of decoded tasks."""
    tasks, usable = [], []
    for task, decoded in batch:
        if isinstance(decoded, Unusable):
            yield task, decoded
        else:
            tasks.append(task)
            usable.append(decoded)
    for task, decoded, tensors in zip(tasks, usable, encoder(usable), strict=True):
        if all(tensor.isfinite().all() for tensor in tensors.values()):
            yield task, (tensors, decoded.info)
        else:
            yield task, Unusable(NOT_FINITE[family], "what the encoder gives of it is not finite")
