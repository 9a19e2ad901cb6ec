"""
`refalign-train export`: a run's weights for others, with a model card of what the run was; and onto the Hub.

    refalign-train export RUN --output my-lora
    refalign-train export RUN/checkpoints/step-00005000 --output my-model --push ORG/NAME

A LoRA run gives its adapters, as diffusers and ComfyUI read them. A full run gives a whole pipeline and, beside it,
its transformer as one native file; a refinement gives a whole pipeline of its own. Nothing heavy is imported before it
is needed, so that `--help` answers at once.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from refalign.files import new_folder, read_json
from refalign.lora_defaults import ONE_PASS, as_metadata


if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExportCommand:
    """Write a run's weights for others, with a model card: its adapters, or a whole pipeline. --push pushes them."""

    checkpoint: Positional[Path]
    """The folder of a run, whose latest checkpoint is taken, or of a checkpoint."""
    output: Path
    """The folder to write. It must not exist."""
    config: Path | None = None
    """A YAML file of `refalign-train run`, or the name of a recipe, whose run is meant. The command line
    overrides it."""
    weights: Literal["auto", "average", "last"] = "auto"
    """Which weights to write: the moving average, or those of the last step. auto is the average, if the run has
    one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The type of the weights. auto is float32 for adapters, which are small and then exactly what was trained,
    float16 for a refinement, else bfloat16. What a video model computes in float32 (norms, modulation) stays so."""
    base: str | None = None
    """The base, as a folder or a Hub id, if it is no longer where the run had it, or if the card must name its Hub
    id."""
    native: bool = True
    """After full training, also write the transformer as one native file (ComfyUI). It doubles the size."""
    licence: str | None = None
    """The licence, as the Hub names it, such as cc-by-nc-4.0. By default it is the base's."""
    datasets: tuple[str, ...] = ()
    """The Hub ids of the datasets that were trained on, if the run does not know them."""
    sample: bool = False
    """Show the last validation sample in the model card: others then see it, and the references it was made from."""
    push: str | None = None
    """Push the folder to this repo on the Hub, ORG/NAME. It is made if it does not exist."""
    private: bool = False
    """Make the repo private, if it is new."""
    dry_run: bool = False
    """With --push, only say which files would be pushed. The folder is written."""


def run(command: ExportCommand) -> int:
    """
    Writes the folder, pushes it if that was asked for, and returns the exit code.

    Raises:
        ValueError: if there is no checkpoint, options do not fit it, the base cannot be had, or the output exists.
            Nothing is left behind then.
    """
    from refalign import hub

    if command.push is None and (command.private or command.dry_run):
        raise ValueError("--private and --dry-run go with --push ORG/NAME.")
    if command.push is not None:
        hub.check_repo_id(command.push)
    export(command)
    print(f"Wrote {command.output}. Read its README.md before you publish it.")
    if command.push is not None:
        print(hub.push(command.output, command.push, command.private, command.dry_run))
    return 0


def export(command: ExportCommand) -> None:
    """Writes the folder; ValueError as in [`run`]."""
    from refalign.hub import PROJECTORS
    from refalign.privacy import check_nothing_private
    from refalign_training.publish.card import write_card
    from refalign_training.run.checkpoint import find_checkpoint, read_projectors, read_state, read_weights

    with new_folder(command.output) as folder:
        checkpoint = find_checkpoint(command.checkpoint).resolve()
        state = read_state(checkpoint)
        options = state["options"]
        base = command.base or state.get("base", options["model.base"])
        has_average = options["optimizer.ema_decay"] is not None
        average = command.weights == "average" or (command.weights == "auto" and has_average)
        defaults = ONE_PASS if options.get("objective.kind") == "distil" else {}  # older runs have no such option
        revision = options["model.revision"] if base == options["model.base"] else None
        if options.get("objective.kind") == "refine":
            base_folder = Path(base) if Path(base).is_dir() else None
            _write_refiner(folder, checkpoint, base, revision, average, command.dtype)
        elif options["training"] == "lora":
            base_folder = Path(base) if Path(base).is_dir() else None
            scale = options["lora.alpha"] / options["lora.rank"]
            _write_lora(folder, read_weights(checkpoint, average), scale, command.dtype, defaults)
        else:
            base_folder = _fetch_base(base, revision)
            _write_pipeline(folder, read_weights(checkpoint, average), base_folder, command)
            _add_call_defaults(folder / "model_index.json", defaults)
        if projectors := read_projectors(checkpoint):
            _save(projectors, folder / PROJECTORS)
        weights = f"moving average, decay {options['optimizer.ema_decay']:g}" if average else "of the last step"
        run_folder = checkpoint.parent.parent
        write_card(
            folder,
            run_folder,
            state,
            base=base,
            base_folder=base_folder,
            weights=weights,
            licence=command.licence,
            datasets=command.datasets,
            shows_sample=command.sample,
        )
        check_nothing_private(folder)


def _write_lora(
    folder: Path, weights: dict[str, "torch.Tensor"], scale: float, dtype: str, defaults: Mapping[str, float]
) -> None:
    from refalign.community_script import write_community_script
    from refalign.hub import COMMUNITY_SCRIPT, LORA_WEIGHTS
    from refalign.lora import native_lora, write_lora

    dtype = "float32" if dtype == "auto" else dtype
    layers = _cast(native_lora(weights, scale), dtype)
    write_lora(layers, folder / LORA_WEIGHTS, "native", metadata=as_metadata(defaults))
    write_community_script(folder / COMMUNITY_SCRIPT)


def _write_refiner(folder: Path, checkpoint: Path, base: str, revision: str | None, average: bool, dtype: str) -> None:
    import torch

    from refalign_training.publish.refiner import write_refiner

    dtype = "float16" if dtype == "auto" else dtype
    write_refiner(folder, checkpoint, base, revision, average=average, dtype=getattr(torch, dtype))


def _write_pipeline(folder: Path, weights: dict[str, "torch.Tensor"], base: Path, command: ExportCommand) -> None:
    from refalign import RefAlignWanTransformer3DModel
    from refalign.convert import convert
    from refalign.hub import NATIVE
    from refalign.keys import diffusers_to_native

    dtype = "bfloat16" if command.dtype == "auto" else command.dtype
    weights = _cast(weights, dtype, RefAlignWanTransformer3DModel._keep_in_fp32_modules)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:  # on the same disk: then it is only renamed
        native = Path(beside) / NATIVE
        _save(diffusers_to_native(weights), native)
        del weights  # 14B are 28 GB
        convert(native, base, folder)
        if command.native:
            native.rename(folder / NATIVE)


def _add_call_defaults(file: Path, defaults: Mapping[str, float]) -> None:
    """Adds what a call takes by default to a pipeline's `model_index.json`."""
    if defaults:
        index = read_json(file)
        index["call_defaults"] = {**(index.get("call_defaults") or {}), **defaults}
        file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _fetch_base(base: str, revision: str | None) -> Path:
    """The base's folder, without the transformer's weights."""
    from refalign.convert import BASE_COMPONENTS, BASE_FILES
    from refalign.files import fetch

    patterns = ["model_index.json", "transformer/config.json", "README.md"]
    for component in BASE_COMPONENTS:
        patterns += [f"{component}/{pattern}" for pattern in BASE_FILES]
    return fetch(base, patterns, revision)


def _cast(tensors: dict[str, "torch.Tensor"], dtype: str, kept: Sequence[str] = ()) -> dict[str, "torch.Tensor"]:
    """The tensors in a dtype, but in float32 those of the modules `kept`. `tensors` is emptied on the way."""
    import torch

    result = {}
    for name in list(tensors):
        is_kept = not set(kept).isdisjoint(name.split("."))
        result[name] = tensors.pop(name).to(torch.float32 if is_kept else getattr(torch, dtype))
        if not result[name].isfinite().all():
            raise ValueError(f"{name} has values that are not finite in {dtype}. Pass another --dtype or checkpoint.")
    return result


def _save(tensors: Mapping[str, "torch.Tensor"], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
