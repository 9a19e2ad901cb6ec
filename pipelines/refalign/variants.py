"""Weights with a variant in their names, such as fp16: copied under plain names, since nothing asks for a variant."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from refalign.files import find_shards, read_json


# Weights as diffusers and transformers name them, with a variant such as fp16 in one of three places
WEIGHTS_FILE = re.compile(
    r"(?P<stem>model|diffusion_pytorch_model)(\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?(\.(?P<old_variant>\w+))?"
    r"\.safetensors(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)


def plain_names(folder: Path) -> dict[str, str]:
    """
    The files of a component's weights, each with its name without a variant such as fp16. Weights that have no variant
    are taken alone, otherwise those of the only variant.

    Raises:
        ValueError: if there are several variants, or a shard is missing.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in sorted(file.name for file in folder.iterdir()):
        if match := WEIGHTS_FILE.fullmatch(name):
            variant = match["variant"] or match["old_variant"] or match["index_variant"] or ""
            end = ".safetensors.index.json" if match["index"] else ".safetensors"
            found[variant][name] = f"{match['stem']}{match['shard'] or ''}{end}"
    if "" not in found and len(found) > 1:
        raise ValueError(f"{folder} has weights in the variants {', '.join(found)}, but none without. Keep one.")
    names = found[""] if "" in found else next(iter(found.values()), {})
    for name in names:
        if name.endswith(".json"):
            find_shards(folder / name)
    return names


def copy_plain(file: Path, target: Path, names: Mapping[str, str]) -> None:
    """Copies one of [`plain_names`]' files; an index then has the plain names of its shards."""
    if file.suffix != ".json" or file.name == target.name:
        shutil.copyfile(file, target)
        return
    index = read_json(file)
    index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
    target.write_text(json.dumps(index, indent=2) + "\n", "utf-8")
