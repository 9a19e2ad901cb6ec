"""Weights that the official tools keep as pickles, of which only a safetensors copy is read."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refalign.files import PICKLES, fetch, identity, open_safetensors
from refalign_training.data.fields import check_given


if TYPE_CHECKING:
    import torch

CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "save_file(torch.load(sys.argv[1], map_location='cpu', weights_only=True), sys.argv[2])"
)
PATTERNS = ("*.json", "*.safetensors", "*.txt")


def check_weights(file: Path, what: str) -> None:
    """
    Checks that a file of weights is there and not a pickle.

    Raises:
        ValueError: if it is not; it says the line that converts a pickle.
    """
    check_given(file, what)
    if file.suffix in PICKLES:
        copy = file.with_suffix(".safetensors").name
        raise ValueError(
            f"{what} {file} is a pickle, which can run code when it is opened, and is not read. Convert it yourself, "
            f'if you trust it: python -c "{CONVERT}" {file} {copy}'
        )
    if file.suffix != ".safetensors":
        raise ValueError(f"{what} {file} is not a safetensors file. Pass one.")


def digest(file: Path) -> str:
    """What tells a file's content from another's."""
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def load_weights(network: "torch.nn.Module", file: Path, what: str) -> None:
    """
    Loads all weights of a network from a safetensors file.

    Raises:
        ValueError: if the file is cut, or holds other keys, shapes or numbers than the network has.
    """
    own = network.state_dict()
    with open_safetensors(file) as opened:
        given = {key: opened.get_tensor(key) for key in opened.keys()}
    counters = [key for key in own if key.endswith("num_batches_tracked")]  # training alone needs them
    missing = sorted(own.keys() - given.keys() - set(counters))
    foreign = sorted(given.keys() - own.keys())
    if missing or foreign:
        raise _other(file, what, f"it lacks {_some(missing)} and has {_some(foreign)} besides")
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise _other(file, what, f"{key} has shape {tuple(value.shape)}, not {tuple(own[key].shape)}")
        if not value.isfinite().all():
            raise _other(file, what, f"{key} has values that are not finite")
    network.load_state_dict(given, strict=False)


def _other(file: Path, what: str, detail: str) -> ValueError:
    return ValueError(f"{what} {file} is not what it should be: {detail}. Download and convert it again.")


def _some(keys: list[str]) -> str:
    if not keys:
        return "nothing"
    return f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


def fetch_model(name: str) -> tuple[Path, str]:
    """
    The folder of a transformers model, by name or from the Hub, and a digest of its files.

    Raises:
        ValueError: if there is none, or it has no safetensors weights.
    """
    folder = fetch(name, PATTERNS, ignore_patterns="*/*")
    files = [file for file in folder.iterdir() if file.suffix in (".json", ".safetensors")]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{name} has no safetensors weights. Pass a model that has; pickles are not read.")
    return folder, identity(folder, files)


@contextmanager
def without_reports() -> Iterator[None]:
    """Within it, transformers does not list weights that a file has besides: [`check_loaded`] says what matters."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """
    Checks what `from_pretrained(..., output_loading_info=True)` says: weights that were not found would be random.

    Raises:
        ValueError: if any is missing, or has another shape.
    """
    wrong = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if wrong:
        raise ValueError(f"{name} is not the model that is needed: it lacks {_some(wrong)}. Pass another.")
