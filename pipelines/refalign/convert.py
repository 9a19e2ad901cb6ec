"""Whole conversions: a native checkpoint to a pipeline folder, shard by shard, and back to one native file."""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm

from refalign.families import FAMILIES, Family
from refalign.files import (
    OTHER_FORMATS,
    StoredTensor,
    fetch,
    find_safetensors,
    list_files,
    naming_component,
    new_file,
    new_folder,
    open_safetensors,
    plain_weights,
    read,
    read_headers,
    read_json,
)
from refalign.hub import PROJECTORS, complete_repo, model_card
from refalign.keys import diffusers_to_native, native_key, native_to_diffusers
from refalign.pipeline_refalign_wan import check_is_wan21_pipeline, check_is_wan21_vae, paper_scheduler
from refalign.transformer_refalign_wan import (
    RefAlignWanTransformer3DModel,
    check_finite,
    check_is_wan21,
    other_model,
)
from refalign.variants import WEIGHTS_FILE, copy_plain


logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model"
BASE_COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler")
CONFIGS = ("model_index.json", "transformer/config.json", "vae/config.json")  # what tells the kind of a pipeline
BERNINI_CONFIGS = ("config.json", *CONFIGS)
BASE_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


def convert(
    checkpoint: str | Path,
    base: str | Path,
    output: str | Path,
    max_shard_size: int | str = "5GB",
    keep_scheduler: bool = False,
    card: str = "template",
    family: str = "refalign",
    revision: str | None = None,
) -> Path:
    """
    Turns a native RefAlign checkpoint, or one of Bernini-R, into a complete pipeline folder that is also a Hub repo
    ([`refalign.hub`]).

    Tensors are written shard by shard as they lie in the checkpoint, in its dtype; at most one shard is in memory.

    Args:
        checkpoint (`str` or `Path`): a safetensors file, a folder of shards, or a Hub id. Of the family bernini also
            a pipeline in diffusers' format, folder or Hub id.
        base (`str` or `Path`): a Wan 2.1 text-to-video pipeline in diffusers' format, folder or Hub id, whose VAE,
            text encoder and tokenizer are taken along, and whose transformer gives the configuration.
        output (`str` or `Path`): a folder that does not exist yet.
        max_shard_size (`int` or `str`, defaults to `"5GB"`): in bytes, or with a unit.
        keep_scheduler (`bool`, defaults to `False`): take the base's scheduler too, instead of the one RefAlign's
            results were made with (Euler, shift 5). A base with `call_defaults` of its own always keeps its scheduler.
        card (`str`, defaults to `"template"`): the model card, of `model_cards/`.
        family (`str`, defaults to `"refalign"`): how the model reads references, of [`FAMILIES`].
        revision (`str`, *optional*): the checkpoint's, if it is a Hub id.

    Returns:
        `Path`: `output`.

    Raises:
        ValueError: if a file is truncated, a key or shape is wrong, or `output` exists. Nothing is left behind.
    """
    with new_folder(output) as folder:  # all that can be wrong is told before weights are downloaded
        config = find_config(base) | FAMILIES[family].transformer
        model_card(config, card)
        if family == "bernini":
            transformer, projectors = read_bernini(checkpoint, revision), {}
        else:
            transformer, projectors = read_native(checkpoint, revision)
        check_shapes(transformer, config, checkpoint)
        plan = _plan_shards(transformer, max_shard_size)
        base = _find_base(base)
        _write_shards(transformer, folder / "transformer", plan)
        if projectors:
            logger.info("%s holds %d projector tensors: written to %s.", checkpoint, len(projectors), PROJECTORS)
            save_file(read(projectors), folder / PROJECTORS, metadata={"format": "pt"})
        (folder / "transformer/config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        for component in BASE_COMPONENTS:
            _copy_component(base / component, folder / component)
        index = read_json(base / "model_index.json")
        kept = ("_diffusers_version", "call_defaults", "prompt_prefix", "first_sigma", *BASE_COMPONENTS)
        index = {name: index[name] for name in kept if name in index} | FAMILIES[family].pipeline
        # A base with settings of its own is not to be sampled as the published models are
        if not keep_scheduler and (FAMILIES[family].pipeline or not index.get("call_defaults")):
            index["scheduler"] = _write_scheduler(folder / "scheduler", FAMILIES[family])
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        complete_repo(folder, card)
    return Path(output)


def check_shapes(tensors: Mapping[str, StoredTensor], config: Mapping, source: object) -> None:
    """
    Checks diffusers keys and shapes against those of a transformer with this configuration.

    Raises:
        ValueError: naming the first keys that are missing, unknown or of another shape.
    """
    with naming_component("transformer's configuration", source), torch.device("meta"):
        model = cast(RefAlignWanTransformer3DModel, RefAlignWanTransformer3DModel.from_config(dict(config)))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(native_key(key) for key in expected.keys() - tensors.keys())
    unknown = sorted(tensors[key].key for key in tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"{source} does not fit the base: {_some('missing', missing)}{_some('not known', unknown)}")
    wrong = []
    for key, tensor in tensors.items():
        if tensor.shape != expected[key]:
            wrong.append(f"{tensor.key} is {tensor.shape}, not {expected[key]}")
    if wrong:
        raise ValueError(
            f"{source} does not fit the base (is it of the same size, 1.3B or 14B?): {_some('wrong shapes', wrong)}"
        )


def _some(what: str, items: list[str]) -> str:
    if not items:
        return ""
    return f"{what} ({len(items)}): {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}. "


def _find_base(base: str | Path) -> Path:
    path = Path(base)
    if not path.is_dir():
        patterns = list(CONFIGS)
        for component in BASE_COMPONENTS:
            patterns += [f"{component}/{pattern}" for pattern in BASE_FILES]
        path = fetch(str(base), patterns)
    needed = ("model_index.json", "transformer/config.json", *BASE_COMPONENTS)
    if missing := [name for name in needed if not (path / name).exists()]:
        raise ValueError(
            f"{base} is not a Wan pipeline in diffusers' format: it has no {', '.join(missing)}. Pass one such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    check_weights(path, ("vae", "text_encoder"))
    for component in BASE_COMPONENTS:
        plain_weights(path / component)
        for file in (path / component).glob("*.safetensors"):
            with open_safetensors(file):
                pass
    return path


def find_config(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """
    The configuration of the transformer of a pipeline, a folder or a Hub id; no weights are downloaded or read.

    Raises:
        ValueError: if there is none, or the pipeline is of another kind than Wan 2.1's text-to-video model.
    """
    return read_config(fetch(str(model), CONFIGS, revision), model)


def read_config(folder: Path, model: str | Path) -> dict[str, Any]:
    """[`find_config`] of a folder that the user calls `model`."""
    index, transformer, vae = (folder / name for name in CONFIGS)
    if index.is_file():
        check_is_wan21_pipeline(read_json(index), str(model))
    if not transformer.is_file():
        raise ValueError(f"{model} is not a pipeline in diffusers' format: it has no transformer/config.json.")
    if vae.is_file():
        check_is_wan21_vae(read_json(vae), f"The VAE of {model}")
    config = read_json(transformer)
    check_is_wan21(config, f"The transformer of {model}")
    return config


def read_native(
    checkpoint: str | Path, revision: str | None = None
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """
    The headers of a native checkpoint, a file, a folder of shards or a Hub id, as [`native_to_diffusers`] gives them.

    Raises:
        ValueError: if it is not a checkpoint of Wan 2.1's text-to-video transformer.
    """
    check_not_half(checkpoint)
    headers = read_headers(find_safetensors(checkpoint, revision))
    try:
        return native_to_diffusers(headers)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def check_not_half(checkpoint: str | Path) -> None:
    """Raises ValueError for one of the two transformers of Wan 2.2's A14B. Keys and shapes are those of Wan 2.1 14B:
    nothing but the name tells it."""
    if half := re.search("(high|low)[-_]?noise", Path(checkpoint).name, re.IGNORECASE):
        raise other_model(str(checkpoint), f"the {half[1].lower()}-noise half of Wan 2.2's A14B, by its name")


def read_bernini(checkpoint: str | Path, revision: str | None = None) -> dict[str, StoredTensor]:
    """
    The headers of a checkpoint of Bernini-R 1.3B under diffusers' keys: of a pipeline in diffusers' format, folder or
    Hub id, whose configuration must fit its weights, or of a native one.

    Raises:
        ValueError: if it is of another kind, such as the 14B, which has two transformers.
    """
    if Path(checkpoint).suffix == ".safetensors":
        transformer, _ = read_native(checkpoint)
        return transformer
    folder = fetch(str(checkpoint), BERNINI_CONFIGS, revision)
    if any(name.startswith("transformer_2/") for name in list_files(str(checkpoint), folder)):
        raise other_model(
            str(checkpoint), "Bernini-R 14B, which has two transformers. The one that converts is Bernini-R 1.3B"
        )
    if not (folder / "transformer/config.json").is_file():
        transformer, _ = read_native(checkpoint, revision)
        return transformer
    config = read_config(folder, checkpoint)
    folder = fetch(str(checkpoint), ["transformer/*.safetensors", "transformer/*.json"], revision)
    transformer = read_headers(find_safetensors(folder / "transformer"))
    try:
        check_shapes(transformer, config, checkpoint)
    except ValueError as error:
        raise ValueError(
            f"The weights of {checkpoint} do not fit its own transformer/config.json, as in early revisions of "
            f"ByteDance/Bernini-R-1.3B-Diffusers: pass a later one as --revision. ({error})"
        ) from error
    return transformer


def check_weights(folder: Path, parts: Sequence[str]) -> None:
    """Raises ValueError unless these parts of a pipeline's folder have weights in safetensors files."""
    for part in parts:
        files = list((folder / part).glob("*"))
        if not any(file.suffix == ".safetensors" for file in files):
            others = sorted(file.name for file in files if file.suffix in OTHER_FORMATS)
            refused = f" {', '.join(others)} is refused: it can run code when it is opened." if others else ""
            raise ValueError(f"{folder / part} has no safetensors weights.{refused} Pass a safetensors release.")


def _copy_component(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    names = plain_weights(source)
    for pattern in BASE_FILES:
        for file in source.glob(pattern):
            if not WEIGHTS_FILE.fullmatch(file.name):
                shutil.copyfile(file, target / file.name)
    for name, plain in names.items():
        copy_plain(source / name, target / plain, names)


def _write_scheduler(folder: Path, family: Family) -> list[str]:
    for file in folder.iterdir():
        file.unlink()
    scheduler = family_scheduler(family)
    scheduler.save_config(folder)
    return ["diffusers", type(scheduler).__name__]


def family_scheduler(family: Family) -> Any:
    """The scheduler that models of a family are sampled with."""
    if family.scheduler is None:
        return paper_scheduler()
    return getattr(diffusers, family.scheduler["_class_name"]).from_config(family.scheduler)


def _plan_shards(tensors: dict[str, StoredTensor], max_shard_size: int | str) -> StateDictSplit:
    # Tensors on the meta device have sizes but no data: enough to plan the shards
    planned = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}
    return split_torch_state_dict_into_shards(
        planned, filename_pattern=WEIGHTS + "{suffix}.safetensors", max_shard_size=max_shard_size
    )


def _write_shards(tensors: dict[str, StoredTensor], folder: Path, plan: StateDictSplit) -> None:
    folder.mkdir()
    for name, keys in tqdm(plan.filename_to_tensors.items(), desc="Writing shards"):
        weights = read({key: tensors[key] for key in keys})
        check_finite(weights.items(), str(tensors[keys[0]].file))
        save_file(weights, folder / name, metadata={"format": "pt"})
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
        raise ValueError(f"`output` is {output}, but must end in .safetensors.")
    with new_file(output) as partial:  # before anything is downloaded
        config = find_config(model)
        folder = fetch(str(model), ["transformer/*.safetensors", "transformer/*.json"])
        tensors = read_headers(find_safetensors(folder / "transformer"))
        check_shapes(tensors, config, model)
        weights = read(diffusers_to_native(tensors))
        check_finite(weights.items(), str(model))
        save_file(weights, partial, metadata={"format": "pt"})
    return output
