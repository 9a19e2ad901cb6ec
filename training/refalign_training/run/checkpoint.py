"""What a run needs to go on, on the disk.

    checkpoints/step-00000500/state.json            step, options, versions, dataset, and a checksum of every file
    checkpoints/step-00000500/*.safetensors         tensors, each process's own part, by torch.distributed.checkpoint
    checkpoints/latest                              the name of the newest one

A checkpoint is written under a hidden name and renamed when it is on the disk, then `latest` is replaced: whenever the
process dies, what has the name of a checkpoint is whole. Tensors are `weights.NAME`, `average.NAME` and
`optimizer.KEY.NAME` of trained parameters alone: of a LoRA, nothing of its base. Any number of processes can read what
any other number wrote. What is read is compared with its checksum before it is used.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from refalign.files import naming_full_disk, new_file, read_json
from refalign.keys import projector_key
from refalign_training.run.parallel import Parallel, local


SCHEMA = 1
STATE = "state.json"
LATEST = "latest"
DIGESTS = "sha256"
PATTERN = "step-[0-9]*"
FILE_BYTES = 1 << 28  # torch makes a whole file in memory before it writes it
STATE_TYPES = {"step": int, "options": dict, "dataset": dict, "files": dict, DIGESTS: dict}
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
    with naming_full_disk(target), _plain():
        numbers = _file_numbers(tensors)
        writer = HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=numbers, save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, no_dist=parallel.world_size == 1)
    parallel.barrier()
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    digests = _digests(partial, list(files), parallel.rank, parallel.world_size)
    if unread := [name for name, digest in digests.items() if not digest]:
        raise OSError(f"{partial / unread[0]} cannot be read again after it was written. Is the disk all right?")
    if parallel.is_main:
        content = {"schema": SCHEMA, **state, "files": files, DIGESTS: digests}
        digests[STATE] = _digest_of_state(content)
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


def _digests(folder: Path, names: list[str], rank: int, world_size: int) -> dict[str, str]:
    """The sha256 of files by name, empty where one cannot be read. All processes call it, each reads a share."""
    mine = {}
    for name in names[rank::world_size]:
        try:
            with (folder / name).open("rb") as file:
                mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:  # told by the caller: all processes go on to the same end
            mine[name] = ""
    if world_size == 1:
        return mine
    together: dict[str, str] = {}
    for share in gather_object([mine]):
        together |= share
    return together


def _digest_of_state(state: Mapping[str, Any]) -> str:
    """The sha256 of what state.json says, without this digest itself."""
    files = {name: digest for name, digest in state[DIGESTS].items() if name != STATE}
    text = json.dumps({**state, DIGESTS: files}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
    name = pointer.read_text("utf-8", errors="replace").strip() if pointer.is_file() else ""
    if NAME.fullmatch(name):  # and not a path to somewhere else
        for place in (folder / name, _replaced(folder / name)):
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
    """The content of state.json. ValueError if it is not a checkpoint's, is damaged, or is of another schema."""
    try:
        return _read_state(checkpoint)
    except ValueError as error:
        raise ValueError(f"{error} {_advice(checkpoint, '')}".rstrip()) from error


def _read_state(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / STATE
    if not file.is_file():
        raise ValueError(f"{checkpoint} is not a checkpoint: it has no {STATE}.")
    state = read_json(file)
    if state.get("schema") != SCHEMA:
        raise ValueError(f"{checkpoint} is a checkpoint of schema {state.get('schema')}; this version reads {SCHEMA}.")
    for name, kind in STATE_TYPES.items():
        if not isinstance(state.get(name, kind()), kind):
            raise ValueError(f"{file} is not what a run writes: {name} is {state[name]!r:.80}.")
    if missing := {"step", "files"} - state.keys():
        raise ValueError(f"{file} is not what a run writes: it has no {', '.join(sorted(missing))}.")
    for name in state["files"]:
        if Path(name).name != name:
            raise ValueError(f"{file} names a file outside of its folder: {name!r:.80}.")
    # Those of earlier versions have no checksums
    if DIGESTS in state and state[DIGESTS].get(STATE) != _digest_of_state(state):
        raise ValueError(f"{file} is damaged: it does not hold what the run wrote.")
    return state


def _advice(checkpoint: Path, otherwise: str = "Copy the checkpoint again, or go on from another.") -> str:
    """What to do about a damaged checkpoint: go on from the newest whole one before it, if there is one."""
    if not NAME.fullmatch(checkpoint.name):
        return otherwise
    for older in reversed(_checkpoints(checkpoint.parent)):
        if _step(older) < _step(checkpoint) and _is_whole(older):
            return f"An older one is whole: go on from it with --resume {older}"
    return otherwise


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = _read_state(checkpoint)["files"]
        _check_sizes(checkpoint, files)
        _check_files(checkpoint, files)
    except (ValueError, OSError):
        return False
    return True


def _check_sizes(checkpoint: Path, files: Mapping[str, int]) -> None:
    """Raises ValueError, naming it, if a file is missing or too short."""
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(f"{file} is not there or not whole.")


def _check_files(checkpoint: Path, names: Iterable[str], rank: int = 0, world_size: int = 1) -> None:
    """Raises ValueError, naming it, if a file is not what the state says; of many processes, each reads its share."""
    state = _read_state(checkpoint)
    expected = state.get(DIGESTS, {})
    names = [name for name in names if name in expected]
    found = _digests(checkpoint, names, rank, world_size)
    for name in names:
        if found[name] != expected[name]:
            raise ValueError(f"{checkpoint / name} is damaged: it does not hold what the run wrote.")


def _read_metadata(checkpoint: Path) -> Metadata:
    """What tensors there are and where. Raises ValueError if a file is missing, damaged, or not the run's."""
    files = read_state(checkpoint)["files"]
    try:
        _check_sizes(checkpoint, files)
    except ValueError as error:
        raise ValueError(f"{error} {_advice(checkpoint)}") from error
    if others := sorted({file.name for file in checkpoint.glob("*.safetensors")} - files.keys()):
        raise ValueError(f"{checkpoint} holds {others[0]}, which is not the run's. Move it away.")
    with _plain():
        try:
            return HuggingFaceStorageReader(str(checkpoint)).read_metadata()
        except Exception:
            _check(checkpoint, files)
            raise


def _check(checkpoint: Path, names: Iterable[str], is_parallel: bool = False) -> None:
    """[`_check_files`], with the advice to go on from an older checkpoint."""
    share = (PartialState().process_index, PartialState().num_processes) if is_parallel else (0, 1)
    try:
        _check_files(checkpoint, names, *share)
    except ValueError as error:
        raise ValueError(f"{error} {_advice(checkpoint)}") from error


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the meta device. Raises ValueError if a file is missing or damaged."""
    return _stored(_read_metadata(checkpoint))


def _stored(metadata: Metadata) -> dict[str, torch.Tensor]:
    stored: Any = metadata.state_dict_metadata
    with torch.device("meta"):
        return {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in stored.items()}


def load_tensors(checkpoint: Path, tensors: Mapping[str, torch.Tensor], is_parallel: bool = False) -> None:
    """Fills tensors, or each process's parts of them, from a checkpoint. Raises ValueError if it lacks one of them or
    has it in another shape, or a file with one of them is damaged; nothing is filled then."""
    metadata = _read_metadata(checkpoint)
    stored = _stored(metadata)
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
    needed = {Path(place.relative_path).name for index, place in metadata.storage_data.items() if index.fqn in tensors}
    _check(checkpoint, sorted(needed), is_parallel)
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
