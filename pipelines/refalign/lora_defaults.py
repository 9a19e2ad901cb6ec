"""What a LoRA's file says of how it is called: one that was distilled wants both guidance scales at 1.

It stands in the metadata of the safetensors file, as `call_defaults` stands in a pipeline's `model_index.json`. Others
pass it over.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from refalign.files import HUB_ID, fetch, open_safetensors
from refalign.hub import LORA_WEIGHTS


KEY = "call_defaults"
NAMES = ("guidance_scale", "image_guidance_scale")
ONE_PASS: dict[str, float] = dict.fromkeys(NAMES, 1.0)  # of what `refalign-train` distilled


def as_metadata(defaults: Mapping[str, float]) -> dict[str, str]:
    """What a file's metadata holds of it; nothing if nothing is stated."""
    return {KEY: json.dumps(dict(defaults))} if defaults else {}


def read_file_defaults(file: Path) -> dict[str, float]:
    """
    What a LoRA's file states; empty if it states nothing.

    Raises:
        ValueError: if the file is not whole, or states something else than scales.
    """
    with open_safetensors(file) as opened:
        text = (opened.metadata() or {}).get(KEY)
    if text is None:
        return {}
    try:
        stated = json.loads(text)
    except ValueError:
        stated = None
    if not isinstance(stated, dict) or not stated.keys() <= set(NAMES) or not all(map(_is_scale, stated.values())):
        raise ValueError(f"{file}: its {KEY} is {text:.80}, but must give numbers for {' or '.join(NAMES)}.")
    return {name: float(value) for name, value in stated.items()}


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def read_lora_defaults(source: str) -> dict[str, float]:
    """What a LoRA states, named as for `refalign generate`: a file, a folder or a Hub id. Raises ValueError as
    [`read_file_defaults`], or if the Hub does not give it."""
    path = Path(source)
    if not path.exists() and HUB_ID.fullmatch(source):
        path = fetch(source, [LORA_WEIGHTS])
    if path.is_dir():
        path = path / LORA_WEIGHTS
    return read_file_defaults(path) if path.is_file() else {}


def told(defaults: Mapping[str, float]) -> str:
    """`guidance_scale 1, image_guidance_scale 1`"""
    return ", ".join(f"{name} {value:g}" for name, value in defaults.items())
