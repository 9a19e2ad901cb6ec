"""Teachers of the reference alignment: frozen vision foundation models, read out on the transformer's own token grid.

| name on the Hub                                             | dim                     | a cell's pixels, for it |
|-------------------------------------------------------------|-------------------------|-------------------------|
| facebook/dinov3-vitb16-pretrain-lvd1689m (RefAlign-1.3B's)  | 768                     | 16, the image as it is  |
| facebook/dinov3-vitl16-pretrain-lvd1689m (RefAlign-14B's)   | 1024                    | 16, the image as it is  |
| facebook/dinov3-{vits16,vith16plus,vit7b16}-pretrain-...    | 384, 1280, 4096         | 16, the image as it is  |
| facebook/dinov2-{base,large,giant}                          | 768, 1024, 1536         | 14                      |
| facebook/dinov2-with-registers-{base,large,giant}           | 768, 1024, 1536         | 14                      |
| google/siglip2-so400m-patch16-naflex, -patch14-384          | 1152                    | 16, 14                  |
| Qwen/Qwen2.5-VL-{3B,7B}-Instruct (the vision tower alone)   | 2048, 3584              | 28: patch 14, 2x2 merged|

DINOv3 is gated on the Hub: accept Meta's licence there first.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from refalign.files import fetch, open_safetensors, read_json
from refalign.pipeline_refalign_wan import TOKEN_PIXELS
from refalign.transformer_refalign_wan import check_finite


if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

Channels = Sequence[float]  # three
Grid = tuple[int, int]


class Teacher(nn.Module):
    """
    A frozen vision model, made by [`load_teacher`]. It has no gradient, and [`train`] leaves it in evaluation mode.

    Attributes:
        dim (`int`): size of a feature.
        patch_size (`int`): side of the model's own patch, in pixels of its input.
    """

    def __init__(self, model: "PreTrainedModel", family: "_Family", mean: Channels, std: Channels) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.dim: int = getattr(model.config, "out_hidden_size", model.config.hidden_size)
        self.patch_size: int = model.config.patch_size
        self._cell_pixels = self.patch_size * getattr(model.config, "spatial_merge_size", 1)
        self._run, self._mean, self._std = family.run, mean, std
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Evaluation mode, whatever `mode` says: a trainer that calls it on all its models changes nothing here."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def forward(self, images: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """
        The features of images, one for each token that the transformer makes of them: the last hidden state after the
        final norm, without CLS and registers; with Qwen2.5-VL, what its merger hands to the language model.

        An image whose size is not the grid's for this model is resized (bicubic, antialiased); none is cropped.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): RGB, uint8 or floating point in [0, 1], on
                any device; references letterboxed to the video's size.
            grid (`tuple[int, int]`, *optional*, defaults to `(height // 16, width // 16)`): rows and columns of the
                transformer's tokens; 480x832 has (30, 52).

        Returns:
            `torch.Tensor` of shape `(batch, rows, columns, dim)`, from the top left, in the model's dtype and on its
            device; not normalised. Autocast does not reach it.

        Raises:
            ValueError: if `images` is of another shape, type or range, or the grid's cells are not square in it.
        """
        rows, columns = _check(images, grid)
        weight = next(self.model.parameters())
        pixels = images.to(weight.device, torch.float32)
        if images.dtype == torch.uint8:
            pixels = pixels / 255
        size = (rows * self._cell_pixels, columns * self._cell_pixels)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)  # it overshoots at edges
        mean, std = pixels.new_tensor([self._mean, self._std])[:, :, None, None]
        with torch.autocast(weight.device.type, enabled=False):
            features = self._run(self.model, ((pixels - mean) / std).to(weight.dtype), (rows, columns))
        return features.unflatten(1, (rows, columns))


def _check(images: torch.Tensor, grid: Grid | None) -> Grid:
    """The grid, if it and the images can be used."""
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"`images` has shape {tuple(images.shape)}; pass (batch, 3, height, width).")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"`images` has dtype {images.dtype}; pass uint8, or floating point in [0, 1].")
    low, high = torch.aminmax(images)
    if images.dtype != torch.uint8 and not (low >= 0 and high <= 1):  # so, and NaN does not pass
        raise ValueError(f"`images` ranges from {low:.4g} to {high:.4g}; pass uint8, or floating point in [0, 1].")
    height, width = images.shape[2:]
    rows, columns = grid or (height // TOKEN_PIXELS, width // TOKEN_PIXELS)
    if rows < 1 or columns < 1 or height * columns != width * rows:
        raise ValueError(
            f"Images of {height}x{width} pixels have no {rows}x{columns} grid of square cells. Letterbox them to the "
            f"video's size, whose sides are multiples of {TOKEN_PIXELS}, and pass (rows, columns) in this order."
        )
    return rows, columns


# Each of these runs a model on normalised pixels (batch, 3, height, width) that have the grid's size for it, and
# returns features (batch, rows * columns, dim).


def _run_dino(model: "PreTrainedModel", pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
    not_patches = 1 + getattr(model.config, "num_register_tokens", 0)
    return model(pixel_values=pixels).last_hidden_state[:, not_patches:]


def _run_siglip(model: "PreTrainedModel", pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
    return model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state


def _run_siglip2(model: "PreTrainedModel", pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
    patch = model.config.patch_size
    cells = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (batch, 3, rows, patch, columns, patch)
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([grid] * len(pixels), device=pixels.device)
    return model(pixel_values=patches, pixel_attention_mask=None, spatial_shapes=shapes).last_hidden_state


def _run_qwen(model: "PreTrainedModel", pixels: torch.Tensor, grid: Grid) -> torch.Tensor:
    (rows, columns), config = grid, model.config
    patch, merge, frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    # The patches that are merged into one token lie together; an image is a video of one frame, repeated.
    cells = pixels.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (batch, rows, columns, merge, merge, 3, patch, patch)
    patches = cells.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1).flatten(5).flatten(0, 4)
    sizes = torch.tensor([(1, rows * merge, columns * merge)] * len(pixels), device=pixels.device)
    # `last_hidden_state` is unmerged and ordered by attention windows; the pooler's output is back in rows.
    return model(patches, grid_thw=sizes).pooler_output.unflatten(0, (len(pixels), -1))


class _Family(NamedTuple):
    """A kind of teacher: transformers' class, its training's normalisation, where its tower lies in a checkpoint."""

    model_class: str
    mean: Channels
    std: Channels
    run: "Callable[[PreTrainedModel, torch.Tensor, Grid], torch.Tensor]"
    prefixes: tuple[str, ...] = ()


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SIGLIP = _Family("SiglipVisionModel", *_HALF, _run_siglip, ("vision_model.",))
_SIGLIP2 = _Family("Siglip2VisionModel", *_HALF, _run_siglip2, ("vision_model.",))
_QWEN = _Family("Qwen2_5_VisionTransformerPretrainedModel", *_CLIP, _run_qwen, ("model.visual.", "visual."))
_FAMILIES = {  # by a configuration's `model_type`
    "dinov3_vit": _Family("DINOv3ViTModel", *_IMAGENET, _run_dino),
    "dinov2": _Family("Dinov2Model", *_IMAGENET, _run_dino),
    "dinov2_with_registers": _Family("Dinov2WithRegistersModel", *_IMAGENET, _run_dino),
    "siglip": _SIGLIP,  # SigLIP2 of fixed resolution too
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,  # NaFlex alone
    "siglip2_vision_model": _SIGLIP2,
    "qwen2_5_vl": _QWEN,
    "qwen2_5_vl_vision": _QWEN,
}


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> Teacher:
    """
    A teacher from the Hub or a local folder. If a checkpoint also holds a language model, the vision tower alone is
    read, and only those files are downloaded that hold a part of it. No code but transformers' own is run.

    Args:
        name_or_path (`str` or `PathLike`): a folder in transformers' format, or a Hub name, of a DINOv3, DINOv2 (with
            or without registers), SigLIP, SigLIP2 or Qwen2.5-VL.
        dtype (`torch.dtype`, defaults to `torch.float32`): the type of weights, computation and features.
        device (`str` or `torch.device`, defaults to `"cpu"`): where it runs.
        revision (`str`, *optional*): branch, tag or commit on the Hub; not for folders.

    Returns:
        [`Teacher`]: frozen. Images are normalised by the `preprocessor_config.json` beside the weights (`image_mean`,
        `image_std`), or as the family was trained if there is none.

    Raises:
        ValueError: if there is no such folder or Hub repo, its licence is not accepted yet, it is of another kind,
            or its files are incomplete or not safetensors.
    """
    name = os.fspath(name_or_path)
    config, *files = teacher_files(name, revision)
    family = _family_of(config, name)
    weights = [file for file in files if file.name != PROCESSOR]
    model = _load_model(config.parent, family, dtype, weights)
    return Teacher(model, family, *_read_normalisation(config.with_name(PROCESSOR), family)).to(device)


def teacher_files(name: str, revision: str | None = None) -> list[Path]:
    """
    All that [`load_teacher`] reads, and its errors: the configuration first, the processor's if there is one, the
    weights. A Hub name's files are of one commit, downloaded if need be; their folder can be loaded in its place.
    """
    folder = fetch(name, [CONFIG, PROCESSOR, INDEX], revision)
    commit = None if Path(name).is_dir() else folder.name
    family = _family_of(_existing(folder / CONFIG), name)
    if not (folder / INDEX).is_file():
        fetch(name, [WEIGHTS], commit)
    weight_map = _read_weight_map(folder)
    prefix = _prefix(weight_map, family)
    files = {file for key, file in weight_map.items() if key.startswith(prefix)}
    fetch(name, list(files), commit)
    processor = [folder / PROCESSOR] if (folder / PROCESSOR).is_file() else []
    return [folder / CONFIG, *processor, *(_existing(folder / file) for file in sorted(files))]


def _family_of(config: Path, name: str) -> _Family:
    model_type = read_json(config).get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(
            f"{name} has model type {model_type!r}, which is not a teacher's. Choose one of {', '.join(_FAMILIES)}."
        )
    return _FAMILIES[model_type]


def _prefix(keys: Iterable[str], family: _Family) -> str:
    """The prefix of the vision tower's weights in the checkpoint."""
    keys = list(keys)
    for prefix in family.prefixes:
        if any(key.startswith(prefix) for key in keys):
            return prefix
    return ""


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(
            f"{file.parent} has no {file.name}. A teacher is a complete model in transformers' format, its weights in "
            "safetensors; formats that run code when they are opened are refused."
        )
    return file


def _load_model(folder: Path, family: _Family, dtype: torch.dtype, files: list[Path]) -> "PreTrainedModel":
    """The vision model, complete."""
    import transformers  # slow, and no other part of training needs it to start

    weights = {}
    for file in files:  # each of which holds a part of the tower
        with open_safetensors(file) as opened:
            prefix = _prefix(opened.keys(), family)
            for key in opened.keys():
                if key.startswith(prefix):
                    weights[key.removeprefix(prefix)] = opened.get_tensor(key)
    check_finite(weights.items(), f"The teacher in {folder}")
    model_class = getattr(transformers, family.model_class)
    config = model_class.config_class.from_pretrained(folder)
    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(f"The weights in {folder} do not fit its {CONFIG}: {error}") from error
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers
        raise ValueError(f"{folder} lacks {len(missing)} weights of its vision model: {', '.join(missing[:3])}, ...")
    return model


def _read_weight_map(folder: Path) -> dict[str, str]:
    """Which file of the folder holds which weight."""
    if not (folder / INDEX).is_file():
        with open_safetensors(_existing(folder / WEIGHTS)) as opened:
            return dict.fromkeys(opened.keys(), WEIGHTS)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not weight_map:
        raise ValueError(f"{folder / INDEX} is not an index of shards: it has no `weight_map`. Download it again.")
    if outside := sorted(file for file in set(weight_map.values()) if Path(file).name != file):
        raise ValueError(f"{folder / INDEX} names shards outside its own folder: {outside}. Do not use it.")
    return weight_map


def _read_normalisation(file: Path, family: _Family) -> tuple[Channels, Channels]:
    """Mean and standard deviation by channel, of pixels in [0, 1]."""
    content = read_json(file) if file.is_file() else {}
    mean, std = content.get("image_mean") or family.mean, content.get("image_std") or family.std
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"{file} has image_mean {mean} and image_std {std}; three numbers each, std above 0, are needed."
        )
    return mean, std
