"""A pipeline as a Hub repo that opens by four doors, with or without this package; as one community script; and a LoRA
with that script beside it.

1. `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)`, without this package
2. `RefAlignWanPipeline.from_pretrained(repo)`, with it and without `trust_remote_code`
3. `AutoModel.from_pretrained(repo, subfolder="transformer", trust_remote_code=True)`
4. `RefAlignWanTransformer3DModel.from_single_file(file)`, for what `refalign export` writes
"""

import ast
import fnmatch
import json
import logging
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from refalign.files import HUB_ID, fetch, new_file, new_folder, open_safetensors, read_json


logger = logging.getLogger(__name__)

TRANSFORMER_CODE = "transformer_refalign_wan"
PIPELINE_CODE = "pipeline_refalign_wan"
CODE = ("reference_images", TRANSFORMER_CODE, PIPELINE_CODE)
AUTO_MAP = {"AutoModel": f"{TRANSFORMER_CODE}.RefAlignWanTransformer3DModel"}
REPO_PLACEHOLDER = "ORG/NAME"
# The authors' releases, for which we have cards with published results
RELEASES = {"gudaochangsheng/RefAlign-1.3B": "refalign-1.3b", "gudaochangsheng/RefAlign-14B": "refalign-14b"}
PROJECTORS = "projectors.safetensors"  # of the training
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` looks
NATIVE = "refalign-native.safetensors"  # the whole transformer once more, for ComfyUI
COMMUNITY_SCRIPT = "pipeline.py"  # where `custom_pipeline="ORG/NAME"` looks
BASES = {30: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 40: "Wan-AI/Wan2.1-T2V-14B-Diffusers"}  # by number of layers

ROOT_FILES = ("model_index.json", "README.md", "LICENSE*", PROJECTORS, NATIVE, *(f"{name}.py" for name in CODE))
LORA_FILES = (LORA_WEIGHTS, PROJECTORS, "README.md", "LICENSE*", COMMUNITY_SCRIPT)
ASSET_FILES = ("*.png", "*.jpg", "*.webp", "*.gif", "*.mp4")
BINARY_SUFFIXES = (".model", *(pattern[1:] for pattern in ASSET_FILES))
COMPONENT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", f"{TRANSFORMER_CODE}.py")
REPO_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "README.md", "LICENSE*", "assets/*")  # no code
FILLED_CARDS = ("trained", "trained_lora", "sprites")  # by [`fill_card`], with what a run was
TRAINING_STATE = ("*optim*", "*ema_state*", "*random_states*", "trainer_state*")
SECRET = re.compile(
    r"hf_[A-Za-z0-9]{30,}"
    r"|(?<![A-Za-z0-9])(github_pat_\w{20,}|gh[pousr]_\w{30,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})"
)
ABSOLUTE_PATH = re.compile(
    r"((?<![\w.:/])|(?<=file://))/(home|root|Users|mnt|data|workspace|work|tmp|var|scratch|opt)/[^\s\"'`)]+"
    r"|(?<![\w.:/])[A-Za-z]:(\\\\?|/)\w+"
)
WHOLE_PATH = re.compile(r"^/[^/\s]+/\S+$", re.MULTILINE)  # below whatever root; a whole string of a JSON file


def complete_repo(folder: str | Path, card: str = "template") -> None:
    """
    Makes a pipeline folder, as `save_pretrained` or `refalign convert` leaves it, a Hub repo with all doors: code,
    entries that name it, and a model card unless there is one.

    Args:
        folder (`str` or `Path`): the pipeline folder, changed in place.
        card (`str`, defaults to `"template"`): a card of `model_cards/`: `template`, `refalign-1.3b` or
            `refalign-14b`.

    Raises:
        ValueError: if it is not a pipeline folder with a Wan transformer.
    """
    folder = Path(folder)
    index, config = _read_json(folder / "model_index.json"), _read_json(folder / "transformer/config.json")
    index |= {
        "_class_name": [PIPELINE_CODE, "RefAlignWanPipeline"],
        "transformer": [TRANSFORMER_CODE, "RefAlignWanTransformer3DModel"],
        "auto_map": AUTO_MAP,
    }
    for name in ("boundary_ratio", "expand_timesteps", "transformer_2"):  # Wan 2.2's, in every Wan pipeline
        index.pop(name, None)
    config |= {"_class_name": "RefAlignWanTransformer3DModel", "auto_map": AUTO_MAP}
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "transformer/config.json", config)
    for name in ("transformer", "vae", "text_encoder"):
        if name in index and not any((folder / name).glob("*.safetensors")):
            raise ValueError(f"{folder} has no safetensors weights in {name}/. Other formats are not published.")
    for name in CODE:
        (folder / f"{name}.py").write_text(_source(name), "utf-8")
    (folder / f"transformer/{TRANSFORMER_CODE}.py").write_text(_source(TRANSFORMER_CODE), "utf-8")
    for file in folder.rglob("*.json"):
        _forget_local_name(file)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(model_card(config, card), "utf-8")


def export_repo(model: Any, output: str | Path, card: str = "template") -> Path:
    """
    Writes a pipeline, an object, a folder or a Hub id, as a Hub repo with all doors into the new folder `output`.

    Raises:
        ValueError: if `model` is not a pipeline folder, or `output` exists.
    """
    with new_folder(output) as folder:
        if isinstance(model, (str, Path)):
            source = Path(model) if Path(model).is_dir() else fetch(str(model), list(REPO_FILES))
            left_out = _copy_repo(source, folder)
            if left_out:
                logger.info("Not part of a pipeline, left out: %s", ", ".join(left_out))
        else:
            model.save_pretrained(folder)
        complete_repo(folder, card)
    return Path(output)


def complete_lora_repo(folder: str | Path) -> None:
    """
    Makes a LoRA's folder a Hub repo that needs no other code: with it as `custom_pipeline`, a Wan 2.1 repo becomes a
    RefAlign pipeline.

    Raises:
        ValueError: if it has no weights or no model card.
    """
    folder = Path(folder)
    if missing := [name for name in (LORA_WEIGHTS, "README.md") if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is not a LoRA to publish: it has no {', '.join(missing)}.")
    (folder / COMMUNITY_SCRIPT).write_text(community_script(), "utf-8")


def push(
    folder: str | Path, repo_id: str, private: bool = False, dry_run: bool = False, token: str | None = None
) -> list[str]:
    """
    Pushes a pipeline folder as a Hub repo with all doors, or the folder of a LoRA. The folder itself is not changed.

    Only what belongs to a pipeline or LoRA goes: no optimiser state, no code but this package's, no hidden files.

    Args:
        folder (`str` or `Path`): the pipeline folder, or one with `pytorch_lora_weights.safetensors` and a model card.
        repo_id (`str`): `ORG/NAME`; made if it does not exist.
        private (`bool`, defaults to `False`): whether a new repo is private.
        dry_run (`bool`, defaults to `False`): change nothing, connect to nothing, only say what would go.
        token (`str`, *optional*): a token of the Hub, instead of the one from `hf auth login`.

    Returns:
        `list[str]`: the files of the repo.

    Raises:
        ValueError: if it is neither, a file holds a token or an absolute path, or `private` is asked of a
            public repo.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    kind = "LoRA" if _is_lora(folder) else "pipeline"
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        left_out = _copy_repo(folder, stage, link_weights=True)
        complete = complete_lora_repo if kind == "LoRA" else complete_repo
        complete(stage)
        card = stage / "README.md"
        card.write_text(card.read_text("utf-8").replace(REPO_PLACEHOLDER, repo_id), "utf-8")
        check_nothing_private(stage)
        names = sorted(file.relative_to(stage).as_posix() for file in _files_below(stage))
        if left_out:
            logger.warning("Not part of a %s, left out: %s", kind, ", ".join(left_out))
        if not dry_run:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise ValueError(
                    f"{repo_id} exists and is public. Make it private on the Hub, or push without --private."
                )
            api.upload_folder(repo_id=repo_id, folder_path=stage, commit_message=f"Upload RefAlign {kind}")
    return names


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless it is ORG/NAME."""
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"`repo_id` is {repo_id!r}, but must be ORG/NAME.")


def check_nothing_private(folder: Path) -> None:
    """Raises ValueError for a token or an absolute path in a repo's text files or weights' metadata, naming the file
    and, of a token, only its beginning."""
    for file in _files_below(folder):
        if file.suffix in BINARY_SUFFIXES:
            continue
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".safetensors":
            with open_safetensors(file) as opened:
                text = "\n".join(_strings(opened.metadata()))
        elif file.suffix == ".json":
            text = "\n".join(_strings(read_json(file)))
        else:
            text = file.read_text("utf-8", errors="replace")
        if found := SECRET.search(text):
            raise ValueError(f"{name} holds what looks like a token ({found[0][:7]}...). Remove it before pushing.")
        if file.name in ("tokenizer.json", "vocab.json"):  # vocabularies hold slashes of every kind, and no paths
            continue
        found = ABSOLUTE_PATH.search(text)
        if file.suffix in (".json", ".safetensors"):
            found = found or WHOLE_PATH.search(text)
        if found:
            raise ValueError(f"{name} holds a path of this machine ({found[0]}). Remove it before pushing.")


def _files_below(folder: Path) -> list[Path]:
    return sorted(filter(Path.is_file, folder.rglob("*")))


def _strings(content: Any) -> Iterator[str]:
    """All strings in a JSON value, keys too."""
    if isinstance(content, dict):
        content = [*content, *content.values()]
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _strings(part)


def model_card(config: dict[str, Any], card: str = "template") -> str:
    """
    The model card, with `ORG/NAME` for the repo's name.

    Args:
        config (`dict`): the transformer's configuration.
        card (`str`): the name of a card in `model_cards/`.
    """
    names = {Path(file.name).stem for file in files("refalign.model_cards").iterdir() if file.name.endswith(".md")}
    names -= set(FILLED_CARDS)
    if card not in names:
        raise ValueError(f"There is no model card {card!r}. There are: {', '.join(sorted(names))}.")
    if card != "template":
        return _card(card)
    base = BASES.get(config["num_layers"])
    return fill_card(card, base=base, base_model=base, datasets=["BestWishYsh/OpenS2V-5M"])


def fill_card(
    card: str,
    base_model: str | None,
    datasets: list[str] | None,
    licence: str = "apache-2.0",
    relation: str = "finetune",
    tags: tuple[str, ...] = (),
    **facts: Any,
) -> str:
    """
    A template of `model_cards/` with its front matter and `ORG/NAME` for the repo's name.

    Args:
        card (`str`): `template`, `trained` or `trained_lora`.
        base_model (`str`, *optional*): Hub id of the model that training began from.
        datasets (`list[str]`, *optional*): Hub ids of the data.
        licence (`str`, defaults to `"apache-2.0"`): the Hub's name for the licence.
        relation (`str`, defaults to `"finetune"`): the relation to the base: `finetune` or `adapter`.
        tags (`tuple[str]`, defaults to `()`): tags besides those of every card.
        facts: values for what else the template names.
    """
    data = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag="image-to-video",
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=datasets,
        tags=["refalign", "reference-to-video", "subject-to-video", "wan", *tags],
    )
    template = _card(card)
    return ModelCard.from_template(data, template_str=template, repo=REPO_PLACEHOLDER, **facts).content


def _card(name: str) -> str:
    return (files("refalign.model_cards") / f"{name}.md").read_text("utf-8")


def community_script() -> str:
    """
    The whole pipeline as one self-contained script, made from the package's own sources, for
    `DiffusionPipeline.from_pretrained(repo, custom_pipeline=FILE)`.
    """
    imports, bodies = [], []
    for name in CODE:
        source = _source(name)
        module_imports, body = _split_imports(source)
        imports += module_imports
        bodies.append(body)
    header = (
        '"""RefAlign for diffusers as one script. Generated by `refalign export --community`; edit the package.'
        '\n\nDiffusionPipeline.from_pretrained(repo, custom_pipeline="this_file.py")\n"""'
    )
    return "\n".join([header, "", *_merge_imports(imports), "", "\n\n".join(bodies)])


def _merge_imports(imports: list[ast.Import | ast.ImportFrom]) -> list[str]:
    """The imports, one line per module, with each name once."""
    plain, names = set(), defaultdict(set)
    for node in imports:
        if isinstance(node, ast.Import):
            plain.add(ast.unparse(node))
        else:
            names[node.module] |= {ast.unparse(name) for name in node.names}
    lines = sorted(plain)
    for module in sorted(names):
        lines.append(f"from {module} import {', '.join(sorted(names[module]))}")
    return lines


def _split_imports(source: str) -> tuple[list[ast.Import | ast.ImportFrom], str]:
    """Top-level imports from other packages, and the code without imports and docstring."""
    lines, imports = source.splitlines(), []
    docstring, *nodes = ast.parse(source).body
    for node in reversed(nodes):  # from the end, so that the lines before a node keep their numbers
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            del lines[node.lineno - 1 : node.end_lineno]
            if not getattr(node, "level", 0):
                imports.append(node)
    return imports, "\n".join(lines[docstring.end_lineno :]).strip() + "\n"


def write_community_script(output: str | Path) -> Path:
    """Writes [`community_script`] to a new file."""
    with new_file(output, overwrite=True) as file:
        file.write_text(community_script(), "utf-8")
    return Path(output)


def _copy_repo(source: Path, target: Path, link_weights: bool = False) -> list[str]:
    """Copies what belongs to a pipeline, or to a LoRA, and returns the names of what does not."""
    allowed, left_out = _allowed_files(source), []
    for file in _files_below(source):
        name = file.relative_to(source)
        patterns = allowed.get(name.parent.as_posix(), ())
        is_hidden = file.name.startswith(".")
        if is_hidden or not _matches(file.name, patterns) or _matches(file.name, TRAINING_STATE):
            left_out.append(name.as_posix())
            continue
        (target / name).parent.mkdir(exist_ok=True)
        if link_weights and file.suffix == ".safetensors":
            (target / name).symlink_to(file.resolve())
        else:
            shutil.copyfile(file, target / name)
    return left_out


def _allowed_files(source: Path) -> dict[str, tuple[str, ...]]:
    """The patterns of what may be published, by folder."""
    if _is_lora(source):
        return {".": LORA_FILES, "assets": ASSET_FILES}
    index = _read_json(source / "model_index.json")
    allowed: dict[str, tuple[str, ...]] = {".": ROOT_FILES, "assets": ASSET_FILES}
    for name, value in index.items():
        if isinstance(value, list) and name[0] != "_":
            allowed[name] = COMPONENT_FILES
    return allowed


def _is_lora(folder: Path) -> bool:
    return (folder / LORA_WEIGHTS).is_file() and not (folder / "model_index.json").is_file()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _source(name: str) -> str:
    return (files("refalign") / f"{name}.py").read_text("utf-8")


def _forget_local_name(file: Path) -> None:
    """Removes where a model was once loaded from: it says nothing to others, and is often a path."""
    content = _read_json(file)
    if isinstance(content, dict) and content.keys() & {"_name_or_path", "name_or_path"}:
        content.pop("_name_or_path", None)
        content.pop("name_or_path", None)
        _write_json(file, content)


def _read_json(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file.parent} is not a pipeline folder: it has no {file.name}.")
    return read_json(file)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
