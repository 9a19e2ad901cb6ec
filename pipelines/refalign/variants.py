"""Weights with a variant in their names, such as fp16: which of them a component has, and their plain names."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path


# Weights as diffusers and transformers name them, with a variant such as fp16 in one of three places
WEIGHTS_FILE = re.compile(
    r"(?P<stem>model|diffusion_pytorch_model)(\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?(\.(?P<old_variant>\w+))?"
    r"\.safetensors(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)


def plain_names(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """
    The files of a component's weights, each with its name without a variant such as fp16. Weights that have no variant
    are taken alone, otherwise those of the only variant.

    Args:
        folder (`Path`): the component's.
        names (`Iterable[str]`, *optional*): those of its files, if it is not here.

    Raises:
        ValueError: if there are several variants, and no weights without one.
    """
    return _find_weights(folder, names)[1]


def find_variant(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """The `variant` that `from_pretrained` takes for the weights of [`plain_names`]; `None` for those without one."""
    return _find_weights(folder, names)[0] or None


def _find_weights(folder: Path, names: Iterable[str] | None) -> tuple[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    if names is None:
        names = [file.name for file in folder.iterdir()]
    for name in sorted(names):
        if match := WEIGHTS_FILE.fullmatch(name):
            variant = match["variant"] or match["old_variant"] or match["index_variant"] or ""
            end = ".safetensors.index.json" if match["index"] else ".safetensors"
            found[variant][name] = f"{match['stem']}{match['shard'] or ''}{end}"
    if "" not in found and len(found) > 1:
        raise ValueError(f"{folder} has weights in the variants {', '.join(found)}, but none without. Keep one.")
    variant = "" if "" in found else next(iter(found), "")
    return variant, found[variant]


def copy_plain(file: Path, target: Path, names: Mapping[str, str]) -> None:
    """Copies one of [`plain_names`]' files; an index then has the plain names of its shards."""
    if file.suffix != ".json" or file.name == target.name:
        shutil.copyfile(file, target)
        return
    index = json.loads(file.read_text("utf-8"))
    index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
    target.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
