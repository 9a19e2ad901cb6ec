"""What a run needs to go on, on the disk.

    checkpoints/step-00000500/state.json            step, options, versions, dataset: nothing but what JSON knows
    checkpoints/step-00000500/*.safetensors         tensors, each process's own part, by torch.distributed.checkpoint
    checkpoints/latest                              the name of the newest one

A checkpoint is written under a hidden name and renamed when it is on the disk, then `latest` is replaced: whenever the
process dies, what has the name of a checkpoint is whole. Tensors are `weights.NAME`, `average.NAME` and
`optimizer.KEY.NAME` of trained parameters alone: of a LoRA, nothing of its base. Any number of processes can read what
any other number wrote.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from refalign.files import new_file, read_json
from refalign.keys import projector_key
from refalign_training.run.parallel import Parallel, local


SCHEMA = 1
STATE = "state.json"
LATEST = "latest"
PATTERN = "step-[0-9]*"
FILE_BYTES = 1 << 28  # torch makes a whole file in memory before it writes it
NAME = re.compile(r"step-\d+|\.step-\d+\.(partial|replaced|removed)")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


# -- Writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], parallel: Parallel
) -> Path:
    """Writes tensors, and a state that JSON knows with its `step`, into a run's folder of checkpoints. All processes
    call it; those that hold parts of a sharded tensor write them."""
    target = folder / checkpoint_name(state["step"])
    partial = folder / f".{target.name}.partial"
    if parallel.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        partial.mkdir()
    parallel.barrier()
    with _plain():
        numbers = _file_numbers(tensors)
        writer = HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=numbers, save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, no_dist=parallel.world_size == 1)
    if parallel.is_main:
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        content = {"schema": SCHEMA, **state, "files": files}
        (partial / STATE).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
        _sync(partial / STATE)
        _sync(partial)
        if target.exists():  # a run that went on from an earlier step, and has come here again
            target.rename(_replaced(target))
        partial.rename(target)
        _sync(folder)
        with new_file(folder / LATEST, overwrite=True) as file:
            file.write_text(f"{target.name}\n", "utf-8")
            _sync(file)
        _sync(folder)
        _clear(folder)
    parallel.barrier()
    return target


def _file_numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Which file each tensor's part goes into, from 1 on, by the parts of the main process."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        length = local(tensor).nbytes
        if size and size + length > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + length
    return numbers


def _clear(folder: Path) -> None:
    """Removes what a process that was killed has left; what it was about to replace gets its name back."""
    for replaced in _named_as_ours(folder, f".{PATTERN}.replaced"):
        if not _named(replaced).exists():
            replaced.rename(_named(replaced))
    for left_over in (*folder.glob(f".{LATEST}.*"), *_named_as_ours(folder, f".{PATTERN}")):
        shutil.rmtree(left_over)


def _named_as_ours(folder: Path, pattern: str) -> list[Path]:
    """The folders that a run made, without a person's own copies, such as `step-00000500.bak`."""
    return [path for path in folder.glob(pattern) if NAME.fullmatch(path.name)]


def _replaced(checkpoint: Path) -> Path:
    """Where a checkpoint is while another one takes its name."""
    return checkpoint.with_name(f".{checkpoint.name}.replaced")


def _named(hidden: Path) -> Path:
    """The checkpoint that a hidden folder is of."""
    return hidden.with_name(hidden.name.strip(".").split(".")[0])


def remove_old_checkpoints(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Removes checkpoints but the newest ones and those at multiples of `keep_every` steps. Those of later steps than
    the latest one are older: the run went back to before them."""
    latest = _step(find_checkpoint(folder))
    newest = [checkpoint for checkpoint in _checkpoints(folder) if _step(checkpoint) <= latest][-keep_last:]
    for checkpoint in _checkpoints(folder):
        if checkpoint not in newest and (keep_every is None or _step(checkpoint) % keep_every):
            hidden = checkpoint.with_name(f".{checkpoint.name}.removed")  # half of it must not look like a checkpoint
            checkpoint.rename(hidden)
            shutil.rmtree(hidden)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- Finding ----------------------------------------------------------------------------------------------------------


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at a path: itself, or the newest one of a run's folder. Raises ValueError if there is none."""
    if (path / STATE).is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    pointer = folder / LATEST
    if pointer.is_file():
        named = folder / pointer.read_text("utf-8", errors="replace").strip()
        for place in (named, _replaced(named)):
            if (place / STATE).is_file():
                return place
    # The pointer is behind by what was written last if the process died before it, or if a user moved folders
    if checkpoints := _checkpoints(folder):
        return checkpoints[-1]
    raise ValueError(f"{path} is neither a checkpoint nor a run's folder with one.")


def has_checkpoint(output: Path) -> bool:
    """Whether a run's folder holds a checkpoint."""
    return bool(_checkpoints(output / "checkpoints"))


def _checkpoints(folder: Path) -> list[Path]:
    """A folder's checkpoints by step. One that was being replaced when the process died counts by its hidden name."""
    found = []
    for path in _named_as_ours(folder, PATTERN) + _named_as_ours(folder, f".{PATTERN}.replaced"):
        if (path / STATE).is_file() and (path == _named(path) or not _named(path).exists()):
            found.append(path)
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(_named(checkpoint).name.partition("-")[2])


# -- Reading ----------------------------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of state.json. ValueError if it is not a checkpoint's, or is of another schema."""
    if not (checkpoint / STATE).is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint: it has no {STATE}.")
    state = read_json(checkpoint / STATE)
    if not isinstance(state, dict):
        raise ValueError(f"{checkpoint / STATE} is not what a run writes: {state!r:.80}")
    if state.get("schema") != SCHEMA:
        raise ValueError(f"{checkpoint} is a checkpoint of schema {state.get('schema')}; this version reads {SCHEMA}.")
    return state


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the meta device. Raises ValueError if a file is missing or damaged."""
    for name, size in read_state(checkpoint)["files"].items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{file} is not there or not whole. Copy the checkpoint again, or go on from another.")
    with _plain():
        metadata: Any = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    with torch.device("meta"):
        return {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in metadata.items()}


def load_tensors(checkpoint: Path, tensors: Mapping[str, torch.Tensor], is_parallel: bool = False) -> None:
    """Fills tensors, or each process's parts of them, from a checkpoint. Raises ValueError if it lacks one of them or
    has it in another shape."""
    stored = stored_tensors(checkpoint)
    problems: dict[str, list[str]] = {"missing": [], "of another shape": []}
    for name, tensor in tensors.items():
        if name not in stored:
            problems["missing"].append(name)
        elif stored[name].shape != tensor.shape:
            problems["of another shape"].append(name)
    told = [f"{what} ({len(names)}): {', '.join(names[:3])}" for what, names in problems.items() if names]
    if told:
        told = "; ".join(told)
        raise ValueError(f"{checkpoint} does not fit this run: {told}. Check model, lora, alignment and ema_decay.")
    with _plain():
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=not is_parallel)


def read_tensors(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint whose names begin with a prefix, on the CPU, without it."""
    stored = stored_tensors(checkpoint)
    tensors = {name: torch.empty_like(stored[name], device="cpu") for name in stored if name.startswith(prefix)}
    load_tensors(checkpoint, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_weights(checkpoint: Path, average: bool) -> dict[str, torch.Tensor]:
    """The transformer's trained tensors, by diffusers' names; a LoRA's as `blocks.0.attn1.to_q.lora_A.weight`.
    `average` gives the moving average instead of the last weights. Raises ValueError if the run kept none."""
    tensors = read_tensors(checkpoint, f"{'average' if average else 'weights'}.transformer.")
    if average and not tensors:
        raise ValueError(f"{checkpoint} holds no average: its run had no optimizer.ema_decay. Take the last weights.")
    return {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}


def read_projectors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The alignment's projectors under their native keys; empty if the run had none."""
    tensors = read_tensors(checkpoint, "weights.alignment.projectors.")
    return {projector_key(name): tensor for name, tensor in tensors.items()}


@contextmanager
def _plain() -> Iterator[None]:
    """Without torch's warning that a single process is used, which was asked for; errors are raised as they were."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(no_dist|single process).*")
        try:
            yield
        except CheckpointException as error:  # not an Exception; hides a full disk and Ctrl-C in a traceback
            raise next(iter(error.failures.values()))[0] from None
        except SafetensorError as error:
            raise ValueError(f"A checkpoint's tensors are damaged: {error}") from error
