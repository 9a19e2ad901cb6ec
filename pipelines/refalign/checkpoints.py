"""Checkpoints: Wan's native keys <-> diffusers' keys, and whole conversions between the two, shard by shard.

*Native* is the format of the authors' release and of ComfyUI: `blocks.0.self_attn.q.weight`, `head.modulation`, ...
Only safetensors is read or written; nothing is unpickled.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from refalign.atomic import check_free, new_file, new_folder


logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model"
PROJECTORS = "projectors.safetensors"
BASE_COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler")
BASE_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}

# native name -> diffusers name; each also has `.weight` and mostly `.bias` behind it
_TOP_PARTS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_BLOCK_PARTS = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"}
for _native, _diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    _BLOCK_PARTS |= {f"{_native}.{part}": f"{_diffusers}.to_{part}" for part in "qkv"}
    _BLOCK_PARTS |= {f"{_native}.norm_{part}": f"{_diffusers}.norm_{part}" for part in "qk"}
    _BLOCK_PARTS[f"{_native}.o"] = f"{_diffusers}.to_out.0"


def _with_parameters(parts: dict[str, str], modulation: str) -> dict[str, str]:
    names = {f"{a}.{p}": f"{b}.{p}" for a, b in parts.items() for p in ("weight", "bias")}
    names = {a: b for a, b in names.items() if not a.endswith(("norm_q.bias", "norm_k.bias"))}  # RMS norms have none
    return {**names, modulation: "scale_shift_table"}


_NATIVE_TO_DIFFUSERS = _with_parameters(_TOP_PARTS, "head.modulation")
_NATIVE_BLOCK_TO_DIFFUSERS = _with_parameters(_BLOCK_PARTS, "modulation")
_DIFFUSERS_TO_NATIVE = {b: a for a, b in _NATIVE_TO_DIFFUSERS.items()}
_DIFFUSERS_BLOCK_TO_NATIVE = {b: a for a, b in _NATIVE_BLOCK_TO_DIFFUSERS.items()}
_BLOCK_KEY = re.compile(r"(blocks\.\d+\.)(.+)")
_PROJECTOR_KEY = re.compile(r"blocks\.\d+\.input_mlp\..+")
_COMFYUI_PREFIX = "model.diffusion_model."


def native_to_diffusers(
    state_dict: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    A native state dict as diffusers' one, and the projectors of a training checkpoint, apart.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): native keys, with or without the prefix `model.diffusion_model.`.

    Returns:
        `tuple[dict, dict]`: the transformer's tensors under diffusers' keys, and the projectors under their native
        keys `blocks.{i}.input_mlp.*` (empty for a released checkpoint). No tensor is copied.

    Raises:
        ValueError: for a key that Wan's text-to-video transformer does not have, or that comes twice.
    """
    transformer, projectors = {}, {}
    for key, tensor in state_dict.items():
        key = key.removeprefix(_COMFYUI_PREFIX)
        part, name = (projectors, key) if is_projector_key(key) else (transformer, diffusers_key(key))
        if name in part:
            raise ValueError(f"Key {key!r} comes twice, with and without the prefix {_COMFYUI_PREFIX!r}.")
        part[name] = tensor
    return transformer, projectors


def diffusers_to_native(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A diffusers state dict as a native one: the inverse of [`native_to_diffusers`]. Projector keys stay as they are.

    Raises:
        ValueError: for a key that [`RefAlignWanTransformer3DModel`] does not have.
    """
    return {key if is_projector_key(key) else native_key(key): tensor for key, tensor in state_dict.items()}


def is_projector_key(key: str) -> bool:
    """Whether a native key is one of the training projectors' (`blocks.{i}.input_mlp.*`)."""
    return _PROJECTOR_KEY.fullmatch(key) is not None


def diffusers_key(native: str) -> str:
    """The diffusers key of a native one, or ValueError."""
    return _rename(native, _NATIVE_TO_DIFFUSERS, _NATIVE_BLOCK_TO_DIFFUSERS, "a native Wan 2.1 text-to-video")


def native_key(diffusers: str) -> str:
    """The native key of a diffusers one, or ValueError."""
    return _rename(diffusers, _DIFFUSERS_TO_NATIVE, _DIFFUSERS_BLOCK_TO_NATIVE, "a diffusers Wan 2.1 text-to-video")


def _rename(key: str, names: dict[str, str], block_names: dict[str, str], kind: str) -> str:
    match = _BLOCK_KEY.fullmatch(key)
    prefix, name = match.groups() if match else ("", key)
    try:
        return prefix + (block_names if match else names)[name]
    except KeyError:
        raise ValueError(
            f"Key {key!r} is not one of {kind} checkpoint. Check that the file is that, and not a LoRA, an "
            "image-to-video model or another format."
        ) from None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its key there, its shape and dtype. Its data is read only by [`read`]."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_safetensors(checkpoint: str | Path) -> list[Path]:
    """
    The safetensors files of a checkpoint: a file, a folder (with all shards of its index), or a Hub id, downloaded.

    Raises:
        ValueError: if there is none, a shard is missing, or the file is of a format that has to be unpickled.
    """
    path = Path(checkpoint)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is not a safetensors file. Formats that run code when they are opened "
                f"({', '.join(PICKLES)}) are refused; ask for a safetensors release, or convert it in a place you "
                "trust."
            )
        return [path]
    if not path.is_dir():
        path = download(str(checkpoint), ["*.safetensors", "*.safetensors.index.json"], ignore_patterns="*/*")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(
            f"{path} has {len(indices)} checkpoints: {[i.name for i in indices]}. Keep one, or name a file."
        )
    if indices:
        return _find_shards(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        raise ValueError(
            f"{path} has {len(files)} safetensors files and no index: {[f.name for f in files]}. Name the file."
            + (f" Formats that run code when they are opened are refused: {pickles}." if pickles else "")
        )
    return files


def _find_shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index} is no index of shards: it has no `weight_map`. Download it again.")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:  # a downloaded index may name any file of ours
        raise ValueError(f"{index} names shards outside its own folder: {outside}. Do not use it.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names shards that are missing: {missing}. Download them again.")
    return [index.parent / name for name in names]


def read_json(file: Path) -> Any:
    """The content of a JSON file; ValueError, naming it, if it is none."""
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a whole JSON file: {error}. Download or write it again.") from error


def download(repo_id: str, patterns: list[str], ignore_patterns: str | None = None) -> Path:
    """The folder of a Hub repo's files of these patterns; ValueError, naming the repo, if there is none."""
    try:
        if Path(repo_id).suffix in (".safetensors", *PICKLES):  # would be a Hub id too, but is meant as a file
            raise ValueError
        validate_repo_id(repo_id)
    except ValueError:
        raise ValueError(f"{repo_id} is neither a file or folder here nor a Hub id (ORG/NAME).") from None
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=ignore_patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{repo_id} is no file or folder here, and the Hub does not give it: {error}") from error


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """
    What tensors the files hold, by key; no data is read.

    Raises:
        ValueError: for a file that is truncated or no safetensors, and for a key that two files hold.
    """
    tensors = {}
    for file in files:
        with open_safetensors(file) as opened:
            for key in opened.keys():
                part = opened.get_slice(key)
                if key in tensors:
                    raise ValueError(f"Key {key!r} is in both {tensors[key].file} and {file}.")
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(f"{file}: {key!r} has dtype {part.get_dtype()}; known are {', '.join(DTYPES)}.")
                tensors[key] = StoredTensor(file, key, tuple(part.get_shape()), dtype)
    return tensors


@contextmanager
def open_safetensors(file: Path) -> Iterator:
    """`safe_open`; ValueError, naming the file and its size, if it is truncated or no safetensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file} ({size:,} bytes) is not a whole safetensors file: {error}. Download or write it again."
        ) from error


def read(tensors: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The tensors' data under the mapping's keys, mapped from the disk and not copied."""
    result = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        with open_safetensors(file) as opened:
            result |= {name: opened.get_tensor(t.key) for name, t in tensors.items() if t.file == file}
    return result


def check_shapes(tensors: Mapping[str, StoredTensor], config: Mapping, source: object) -> None:
    """
    Holds diffusers keys and shapes against those of a transformer of `config`.

    Raises:
        ValueError: naming the first keys that are missing, unknown or of another shape.
    """
    from refalign.transformer_refalign_wan import RefAlignWanTransformer3DModel

    with torch.device("meta"):
        model = RefAlignWanTransformer3DModel.from_config(dict(config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(native_key(key) for key in expected.keys() - tensors.keys())
    unknown = sorted(tensors[key].key for key in tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{source} does not fit the base: {_some('missing', missing)}{_some('not known', unknown)}")
    wrong = [
        f"{tensor.key} is {tensor.shape}, not {expected[key]}"
        for key, tensor in tensors.items()
        if tensor.shape != expected[key]
    ]
    if wrong:
        raise ValueError(
            f"{source} does not fit the base (is it of the same size, 1.3B or 14B?): {_some('wrong shapes', wrong)}"
        )


def _some(what: str, items: list[str]) -> str:
    if not items:
        return ""
    return f"{what} ({len(items)}): {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}. "


def convert(
    checkpoint: str | Path,
    base: str | Path,
    output: str | Path,
    max_shard_size: int | str = "5GB",
    keep_scheduler: bool = False,
    card: str = "template",
) -> Path:
    """
    Turns a native RefAlign checkpoint into a complete pipeline folder that is also a Hub repo ([`refalign.hub`]).

    Tensors are written shard by shard as they lie in the checkpoint, in its dtype; at most one shard is in memory.

    Args:
        checkpoint (`str` or `Path`): a safetensors file, a folder of shards, or a Hub id.
        base (`str` or `Path`): a Wan 2.1 text-to-video pipeline in diffusers' format, folder or Hub id, whose VAE,
            text encoder and tokenizer are taken along, and whose transformer gives the configuration.
        output (`str` or `Path`): a folder that does not exist yet.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): in bytes, or with a unit.
        keep_scheduler (`bool`, defaults to `False`): take the base's scheduler too, instead of the one RefAlign's
            results were made with (Euler, shift 5). A base with `call_defaults` of its own always keeps its scheduler.
        card (`str`, defaults to `"template"`): the model card, of `model_cards/`.

    Returns:
        `Path`: `output`.

    Raises:
        ValueError: if a file is truncated, a key or shape is wrong, or `output` exists. Nothing is left behind.
    """
    from refalign.hub import complete_repo

    check_free(output)  # before anything is downloaded
    files = find_safetensors(checkpoint)
    transformer, projectors = native_to_diffusers(read_headers(files))
    base = _find_base(base)
    config = _read_config(base)
    check_shapes(transformer, config, checkpoint)
    with new_folder(output) as folder:
        _write_shards(transformer, folder / "transformer", max_shard_size)
        if projectors:
            logger.info("%s holds %d projector tensors: written to %s.", checkpoint, len(projectors), PROJECTORS)
            save_file(read(projectors), folder / PROJECTORS, metadata={"format": "pt"})
        (folder / "transformer/config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for component in BASE_COMPONENTS:
            _copy_component(base / component, folder / component)
        index = read_json(base / "model_index.json")
        kept = ("_diffusers_version", "call_defaults", *BASE_COMPONENTS)
        index = {name: index[name] for name in kept if name in index}
        # A base with settings of its own is not to be sampled as the published models are
        if not keep_scheduler and not index.get("call_defaults"):
            index["scheduler"] = _write_paper_scheduler(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        complete_repo(folder, card)
    return Path(output)


def _find_base(base: str | Path) -> Path:
    path = Path(base)
    if not path.is_dir():
        patterns = [f"{component}/{pattern}" for component in BASE_COMPONENTS for pattern in BASE_FILES]
        path = download(str(base), [*patterns, "model_index.json", "transformer/config.json"])
    missing = [
        name
        for name in ("model_index.json", "transformer/config.json", *BASE_COMPONENTS)
        if not (path / name).exists()
    ]
    missing += [
        f"{name}/*.safetensors" for name in ("vae", "text_encoder") if not any((path / name).glob("*.safetensors"))
    ]
    if missing:
        raise ValueError(
            f"{base} is not a Wan pipeline in diffusers' format with safetensors weights: it has no "
            f"{', '.join(missing)}. Pass one such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    for component in BASE_COMPONENTS:
        for index in (path / component).glob("*.safetensors.index.json"):
            _find_shards(index)
        for file in (path / component).glob("*.safetensors"):
            with open_safetensors(file):
                pass
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a pipeline folder's transformer; ValueError unless it is Wan's text-to-video one."""
    file = folder / "transformer/config.json"
    config = read_json(file)
    kind = config.get("_class_name")
    if kind not in ("WanTransformer3DModel", "RefAlignWanTransformer3DModel") or config.get("image_dim") is not None:
        kind = f"image-to-video {kind}" if config.get("image_dim") is not None else kind
        raise ValueError(f"{file} is of a {kind}, not of Wan 2.1's text-to-video transformer (WanTransformer3DModel).")
    return config


def _copy_component(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for pattern in BASE_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _write_paper_scheduler(folder: Path) -> list[str]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    for file in folder.iterdir():
        file.unlink()
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_config(folder)
    return ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def _write_shards(tensors: dict[str, StoredTensor], folder: Path, max_shard_size: int | str) -> None:
    folder.mkdir()
    # Tensors on the meta device have sizes but no data: enough to plan the shards
    planned = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        planned, filename_pattern=WEIGHTS + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in tqdm(plan.filename_to_tensors.items(), desc="Writing shards"):
        save_file(read({key: tensors[key] for key in keys}), folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def export_native(model: str | Path, output: str | Path) -> Path:
    """
    Writes the transformer of a pipeline folder (or Hub id) as one native safetensors file, as ComfyUI and Wan's own
    code read it. Projectors are left out.

    Raises:
        ValueError: if the folder holds no transformer, or `output` exists or does not end in .safetensors.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"`output` is {output}, but has to end in .safetensors.")
    folder = Path(model)
    if not folder.is_dir():
        folder = download(str(model), ["transformer/*.safetensors", "transformer/*.json"])
    if not (folder / "transformer/config.json").is_file():
        raise ValueError(f"{model} is not a pipeline folder: it has no transformer/config.json.")
    tensors = read_headers(find_safetensors(folder / "transformer"))
    check_shapes(tensors, _read_config(folder), model)
    with new_file(output) as partial:
        save_file(read(diffusers_to_native(tensors)), partial, metadata={"format": "pt"})
    return output
