"""Files: written whole or not at all; JSON and safetensors read with errors that name them; models from the Hub.

Only safetensors is read or written; nothing is unpickled.
"""

import errno
import hashlib
import json
import logging
import os
import re
import reprlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign.owner import owned, short
from refalign.variants import WEIGHTS_FILE, plain_names


# torch and the Hub's client are imported where they are needed: command lines that write a file answer at once
if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
OTHER_FORMATS = (*PICKLES, ".gguf")
# Keys of weights that mean nothing without the scales beside them (ComfyUI's fp8_scaled files)
SCALED = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}  # torch's names
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # not ./folder


# -- Written whole or not at all: beside its place, then renamed ------------------------------------------------------


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder to fill, beside `output`, that becomes `output` when the block ends well and vanishes when it does not.

    Raises:
        ValueError: if `output` exists and is not an empty folder, cannot be replaced, or is another process's.
    """
    output = Path(output)
    check_free(output)
    with owned(output), _beside(output) as folder:
        check_free(output)  # its last owner may just have made it
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            _open_to_others(file)
        folder.rename(output)


@contextmanager
def new_file(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write, beside `output`, that becomes `output` when the block ends well and vanishes when it does not.

    With `overwrite`, processes may write the same output at once, and the last one counts. Who wants it for itself
    writes it within [`owned`].

    Raises:
        ValueError: if `output` is a folder; without `overwrite`, also if it exists or is another process's.
    """
    output = Path(output)
    check_new_file(output, overwrite)
    with nullcontext() if overwrite else owned(output), _beside(output) as file:
        check_new_file(output, overwrite)
        yield file
        _open_to_others(file)
        file.replace(output)


def check_free(output: str | Path) -> None:
    """Raises ValueError if `output` exists and is not an empty folder that a new one can take the place of."""
    output = Path(output)
    _check_not_a_link(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists already. Name another output, or move it away.")
    if os.path.ismount(output) or output.resolve() == Path.cwd():
        raise ValueError(f"{output} is a mount point, or the folder you are in: name a new folder inside of it.")


def check_new_file(output: Path, overwrite: bool = False) -> None:
    """Raises ValueError if `output` is a folder or, without `overwrite`, exists."""
    if output.is_dir() or (output.exists() and not overwrite):
        raise ValueError(f"{output} exists already. Name another output, or move it away.")
    if not overwrite:
        _check_not_a_link(output)


def _check_not_a_link(output: Path) -> None:
    if output.is_symlink():
        raise ValueError(f"{output} is a symbolic link, which would be replaced: name {output.resolve()} instead.")


def _open_to_others(path: Path) -> None:
    """Gives a file the mode that new files have: safetensors makes its own readable by nobody else."""
    umask = os.umask(0o077)
    os.umask(umask)
    if path.is_file() and not path.is_symlink():
        path.chmod(0o666 & ~umask)


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    hidden = tempfile.TemporaryDirectory(".partial", f".{short(output.name)}.", output.parent)
    with naming_full_disk(output), hidden as folder:
        yield Path(folder) / output.name


@contextmanager
def naming_full_disk(output: Path) -> Iterator[None]:
    """Within it, the error that a disk is full names what was written."""
    try:
        yield
    except Exception as error:
        if (number := os_error_number(error)) in FULL:
            raise OSError(number, os.strerror(number), str(output)) from error
        raise


@contextmanager
def naming_component(component: str, source: object) -> Iterator[None]:
    """Within it, a library makes a component; what it raises becomes a ValueError that names the component."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        raise ValueError(
            f"The {component} of {source} cannot be loaded ({type(error).__name__}: {text}). Download it again, or "
            "name another."
        ) from error


def os_error_number(error: BaseException) -> int:
    """The operating system's number of an error, which safetensors gives in words alone; 0 if it has none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


# -- JSON and safetensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its key there, its shape and dtype. Its data is read only by [`read`]."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: "torch.dtype"


def find_safetensors(checkpoint: str | Path, revision: str | None = None) -> list[Path]:
    """
    The safetensors files of a checkpoint: a file, a folder (with all shards of its index), or a Hub id, downloaded.

    Raises:
        ValueError: if there is none, a shard is missing, or the file is of a format that must be unpickled.
    """
    path = Path(checkpoint)
    if path.is_file():
        if path.suffix == ".gguf":
            raise ValueError(
                f"{path} is a GGUF file, whose weights are quantised for llama.cpp and ComfyUI. Pass the safetensors "
                "release of the model; `refalign generate --model FILE.gguf --base REPO` alone takes it as it is."
            )
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is not a safetensors file. Formats that run code when they are opened "
                f"({', '.join(PICKLES)}) are refused; ask for a safetensors release, or convert it in a place you "
                "trust."
            )
        return [path]
    if not path.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index*.json"]
        path = fetch(str(checkpoint), patterns, revision, ignore_patterns="*/*")
    indices = _of_one_variant(path, "*.safetensors.index*.json")
    if len(indices) > 1:
        raise ValueError(f"{path} has {len(indices)} checkpoints: {_names(indices)}. Keep one, or name a file.")
    if indices:
        return find_shards(indices[0])
    files = _of_one_variant(path, "*.safetensors")
    if len(files) != 1:
        others = _names(file for file in path.iterdir() if file.suffix in OTHER_FORMATS)
        refused = f" Other formats are refused, some can run code when they are opened: {others}." if others else ""
        raise ValueError(
            f"{path} has {len(files)} safetensors files and no index: {_names(files)}. Name the file.{refused}"
        )
    return files


def _of_one_variant(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match; of weights that are there in several variants, those of [`plain_names`]."""
    names = plain_names(folder)
    files = sorted(folder.glob(pattern))
    return [file for file in files if file.name in names or not WEIGHTS_FILE.fullmatch(file.name)]


def _names(files: Iterable[Path]) -> list[str]:
    return sorted(file.name for file in files)


def find_shards(index: Path) -> list[Path]:
    """The files that an index of shards names; ValueError if one is missing or lies in another folder."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index} is not an index of shards: it has no `weight_map`. Download it again.")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:  # a downloaded index may name any file of ours
        raise ValueError(f"{index} names shards outside its own folder: {outside}. Do not use it.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names shards that are missing: {missing}. Download them again.")
    return [index.parent / name for name in names]


def plain_weights(folder: Path) -> dict[str, str]:
    """[`plain_names`] of a component's folder; ValueError if a shard is missing."""
    names = plain_names(folder)
    for name in names:
        if name.endswith(".json"):
            find_shards(folder / name)
    return names


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and its folders, sorted."""
    return sorted(filter(Path.is_file, folder.rglob("*")))


def read_json(file: Path, kind: type = dict) -> Any:
    """The content of a JSON file, an object unless another `kind` is named; ValueError, naming the file, if it is not
    whole JSON or of another kind."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a whole JSON file: {error}. Download or write it again.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} holds {reprlib.repr(content)}, not an object of names and values. Write it again.")
    return content


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """
    What tensors the files hold, by key; no data is read.

    Raises:
        ValueError: for a file that is truncated or not safetensors, and for a key that two files hold.
    """
    import torch

    tensors = {}
    for file in files:
        with open_safetensors(file) as opened:
            if scaled := next(filter(SCALED.fullmatch, opened.keys()), None):
                raise ValueError(
                    f"{file} is a scaled-fp8 checkpoint, whose weights mean nothing without scales that ComfyUI alone "
                    f"applies ({scaled}). Pass the model's release in bfloat16 or float16."
                )
            for key in opened.keys():
                part = opened.get_slice(key)
                if key in tensors:
                    raise ValueError(f"Key {key!r} is in both {tensors[key].file} and {file}.")
                name = DTYPES.get(part.get_dtype())
                if name is None:
                    raise ValueError(f"{file}: {key!r} has dtype {part.get_dtype()}; known are {', '.join(DTYPES)}.")
                tensors[key] = StoredTensor(file, key, tuple(part.get_shape()), getattr(torch, name))
    return tensors


@contextmanager
def open_safetensors(file: Path) -> Iterator:
    """`safe_open`; ValueError, naming the file and its size, if it is truncated or not safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file} ({size:,} bytes) is not a whole safetensors file: {error}. Download or write it again."
        ) from error
    except OSError as error:
        if error.filename is None:  # as when there is no memory to map it
            raise OSError(error.errno, error.strerror or str(error), str(file)) from error
        raise


def read(tensors: Mapping[str, StoredTensor]) -> dict[str, "torch.Tensor"]:
    """The tensors' data under the mapping's keys, mapped from the disk and not copied."""
    result = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        with open_safetensors(file) as opened:
            result |= {name: opened.get_tensor(t.key) for name, t in tensors.items() if t.file == file}
    return result


# -- Models from the Hub ----------------------------------------------------------------------------------------------


def fetch(name: str, patterns: Sequence[str], revision: str | None = None, ignore_patterns: str | None = None) -> Path:
    """
    The folder `name`, or the snapshot of one commit of the Hub's repo, with those files that match.

    Raises:
        ValueError: if there is none, its licence is not accepted yet, or a folder is given with a revision.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder, which has no revision {revision!r}. Pass it for Hub names only.")
        return Path(name).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # A file's name would be a Hub id too
    if not HUB_ID.fullmatch(name) or Path(name).suffix in (".safetensors", *OTHER_FORMATS):
        raise ValueError(f"{name} is neither a file or folder here nor a Hub id (ORG/NAME).")
    tell_of_hub(name)
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignore_patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        if _refuses_access(error):
            raise ValueError(
                f"The Hub gives {name} only to those who have access (DINOv3, for one, is gated by Meta's licence). "
                f"Open https://huggingface.co/{name}, accept its licence, run `hf auth login` and try again; or pass "
                f"a local folder. If there is no such page, check the name. The Hub says: {without_breaks(error)}"
            ) from error
        raise ValueError(
            f"{name} is not a file or folder here, and the Hub does not give it. Check the name and revision, or pass "
            f"a local folder. The Hub's client says: {without_breaks(error)}"
        ) from error


def list_files(name: str, folder: Path) -> list[str]:
    """The names, with slashes, of all files of a folder, or of the Hub's repo that [`fetch`] gave `folder` of."""
    if not Path(name).is_dir():
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        with suppress(CachedRepoTreeNotFoundError):  # an old download, and offline: what it has is all there is
            return [file.path for file in get_cached_repo_tree(name, revision=folder.name)]
    return [file.relative_to(folder).as_posix() for file in files_below(folder)]


@cache
def tell_of_hub(name: str) -> None:
    """Says, once, that what may be meant as a folder is looked for on the Hub."""
    if Path(name).parent.is_dir():
        logger.warning("There is no folder %s here: the Hub is asked for it.", name)


def without_breaks(error: BaseException) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split())


def _refuses_access(error: BaseException | None) -> bool:
    """Whether the Hub's answer was a refusal; the client may wrap it into the complaint that its cache is empty."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    while error is not None:
        if isinstance(error, GatedRepoError):
            return True
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            return True
        error = error.__cause__
    return False


def identity(folder: Path, files: Iterable[Path]) -> str:
    """
    A digest of the names and whole contents of a model's files below `folder`: it is the same here and on the Hub, and
    another commit of the Hub's that changes none of them changes nothing.
    """
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(folder).as_posix()}\0{digest_of_file(file)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def digest_of_file(file: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    blob = file.resolve()
    # The Hub's client names large files by their sha256, and has checked it: 11 GB need not be read again
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
