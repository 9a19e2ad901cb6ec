"""A pipeline as a Hub repo that opens by four doors, with or without this package; as one community script; and a LoRA
with that script beside it.

1. `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)`, without this package
2. `RefAlignWanPipeline.from_pretrained(repo)`, with it and without `trust_remote_code`
3. `AutoModel.from_pretrained(repo, subfolder="transformer", trust_remote_code=True)`
4. `RefAlignWanTransformer3DModel.from_single_file(file)`, for what `refalign export` writes
"""

import fnmatch
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from refalign.calibration import RATIOS
from refalign.community_script import CODE, community_script
from refalign.files import (
    HUB_ID,
    digest_of_file,
    fetch,
    files_below,
    find_safetensors,
    new_folder,
    plain_weights,
    read_headers,
    read_json,
    without_breaks,
)
from refalign.privacy import check_links, check_nothing_private, shown
from refalign.variants import WEIGHTS_FILE, copy_plain


logger = logging.getLogger(__name__)

REPO_PLACEHOLDER = "ORG/NAME"
# The Hub has none for reference-to-video. With `image-to-video` it shows `pipe(image=...)`, which is not our call
PIPELINE_TAG, REFINE_PIPELINE_TAG = "image-text-to-video", "image-to-image"
TAGS = {
    PIPELINE_TAG: ("refalign", "reference-to-video", "subject-to-video", "wan"),
    REFINE_PIPELINE_TAG: ("refine-by-align", "inpainting", "stable-diffusion"),
}
UNKNOWN = "FILL-IN"  # what a card leaves to the user: `push` refuses it
# The authors' releases, for which we have cards with published results
RELEASES = {
    "gudaochangsheng/RefAlign-1.3B": "refalign-1.3b",
    "gudaochangsheng/RefAlign-14B": "refalign-14b",
    "ByteDance/Bernini-R-1.3B-Diffusers": "bernini-r-1.3b",
}
PROJECTORS = "projectors.safetensors"  # of the training
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` looks
NATIVE = "refalign-native.safetensors"  # the whole transformer once more, for ComfyUI
COMMUNITY_SCRIPT = "pipeline.py"  # where `custom_pipeline="ORG/NAME"` looks
BASES = {30: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 40: "Wan-AI/Wan2.1-T2V-14B-Diffusers"}  # by number of layers

REFINE_CODE = ("reference_projector", "pipeline_refine_by_align")
ROOT_FILES = (
    "model_index.json",
    RATIOS,
    "README.md",
    "LICENSE*",
    PROJECTORS,
    NATIVE,
    *(f"{name}.py" for name in (*CODE, *REFINE_CODE)),
)
LORA_FILES = (LORA_WEIGHTS, PROJECTORS, "README.md", "LICENSE*", COMMUNITY_SCRIPT)
RESULTS = ".eval_results"  # of benchmarks, as the Hub reads them
RESULT_FILES = ("*.yaml",)
ASSET_FILES = ("*.png", "*.jpg", "*.webp", "*.gif", "*.mp4")
COMPONENT_CODE = ("transformer_refalign_wan.py", "reference_projector.py")
COMPONENT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", *COMPONENT_CODE)
REPO_FOLDERS = ("assets/*", f"{RESULTS}/*.yaml")
REPO_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "README.md", "LICENSE*", *REPO_FOLDERS)  # no code
FILLED_CARDS = (
    "trained",
    "trained_lora",
    "trained_refine",
    "sprites",
    "refine",
    "refine-sprites",
)  # by [`fill_card`], with what a run was
TRAINING_STATE = ("*optim*", "*ema_state*", "*random_states*", "trainer_state*")


def find_release(checkpoint: str) -> str | None:
    """The card of a release of the authors', named by its Hub id or as a folder or file of it in the Hub's cache, or
    equal to one there. Anything else claims nothing."""
    for name, card in RELEASES.items():
        if checkpoint == name or _cache_name(name) in Path(checkpoint).absolute().parts:
            return card
        if _is_cached(Path(checkpoint), name):
            return card
    return None


def _cache_name(repo: str) -> str:
    return f"models--{repo.replace('/', '--')}"


def _is_cached(checkpoint: Path, repo: str) -> bool:
    """Whether a file, or all weights in a folder, equal some of a repo that were downloaded. The Hub's client names
    these by their sha256, which the Hub told it and it has checked; the Hub is not asked anew."""
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = list((Path(HF_HUB_CACHE) / _cache_name(repo) / "blobs").glob("?" * 64))
    names, sizes = {blob.name for blob in blobs}, {blob.stat().st_size for blob in blobs}
    files = [checkpoint] if checkpoint.is_file() else list(checkpoint.rglob("*.safetensors"))
    return bool(files) and all(file.stat().st_size in sizes and digest_of_file(file) in names for file in files)


def complete_repo(folder: str | Path, card: str = "template") -> None:
    """
    Makes a pipeline folder, as `save_pretrained` or `refalign convert` leaves it, a Hub repo with all doors: code,
    entries that name it, and a model card unless there is one.

    Args:
        folder (`str` or `Path`): the pipeline folder, changed in place.
        card (`str`, defaults to `"template"`): a card of `model_cards/`: `template`, `refalign-1.3b` or
            `refalign-14b`.

    Raises:
        ValueError: if it is not a pipeline folder with Wan 2.1's text-to-video transformer, or Refine-by-Align's.
    """
    from refalign import pipeline_refalign_wan, pipeline_refine_by_align  # load torch

    folder = Path(folder)
    index = _read_json(folder / "model_index.json")
    if _is_refine(index):
        _check_has_weights(folder, index, ("unet", "vae", "image_encoder", "reference_projector"))
        pipeline_refine_by_align.write_code(folder)
        text = fill_card("refine", None, None, UNKNOWN, pipeline_tag=REFINE_PIPELINE_TAG, unknown=UNKNOWN)
    else:
        config = _read_json(folder / "transformer/config.json")
        _check_has_weights(folder, index, ("transformer", "vae", "text_encoder"))
        pipeline_refalign_wan.write_code(folder)
        text = model_card(config, card)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(text, "utf-8")


def _is_refine(index: dict[str, Any]) -> bool:
    """Whether a `model_index.json` is of Refine-by-Align's pipeline."""
    return "RefineByAlignPipeline" in (index.get("_class_name") or "")


def _check_has_weights(folder: Path, index: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if name in index and not any((folder / name).glob("*.safetensors")):
            raise ValueError(f"{folder} has no safetensors weights in {name}/. Other formats are not published.")


def export_repo(model: Any, output: str | Path, card: str = "template") -> Path:
    """
    Writes a pipeline, an object, a folder or a Hub id, as a Hub repo with all doors into the new folder `output`.

    Raises:
        ValueError: if `model` is not a pipeline folder, or `output` exists.
    """
    with new_folder(output) as folder:
        if isinstance(model, (str, Path)):
            source = Path(model) if Path(model).is_dir() else fetch(str(model), list(REPO_FILES))
            left_out = copy_repo(source, folder)
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


@dataclass(frozen=True)
class Pushed:
    """What a push sent, or would send."""

    sizes: dict[str, int]
    """Bytes of each file."""
    url: str
    visibility: str
    is_dry_run: bool

    def __str__(self) -> str:
        lines = [f"{size / 1e6:12,.3f} MB  {shown(name)}" for name, size in self.sizes.items()]
        done = "Would push" if self.is_dry_run else "Pushed"
        total = f"{len(self.sizes)} files, {sum(self.sizes.values()) / 1e6:,.3f} MB"
        return "\n".join([*lines, f"{done} {total}, to {self.url} ({self.visibility})."])


def push(
    folder: str | Path, repo_id: str, private: bool = False, dry_run: bool = False, token: str | None = None
) -> Pushed:
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
        [`Pushed`]: the files of the repo with their sizes, and where they are.

    Raises:
        ValueError: if it is neither, weights do not fit their configuration, the card is not filled in, a file holds
            what is private ([`refalign.privacy`]), or `private` is asked of a public repo.
    """
    check_repo_id(repo_id)
    folder = Path(folder)
    kind = "LoRA" if _is_lora(folder) else "pipeline"
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        try:
            _fill_stage(stage, folder, kind, repo_id)
        except ValueError as error:
            raise ValueError(str(error).replace(str(stage), str(folder))) from error
        api = HfApi(token=token)
        visibility = visibility_if_new(private)
        if not dry_run:
            with naming_refusal(repo_id):
                visibility = open_repo(api, repo_id, private)
                api.upload_folder(repo_id=repo_id, folder_path=stage, commit_message=f"Upload RefAlign {kind}")
        return Pushed(sizes_of(stage), f"{api.endpoint}/{repo_id}", visibility, dry_run)


@contextmanager
def naming_refusal(repo_id: str) -> Iterator[None]:
    """Within it, the Hub is written to; that it does not let us becomes a ValueError that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 402, 403):
            raise
        raise ValueError(
            f"The Hub does not let you write to {repo_id}. Run `hf auth login` with a token that may write there. The "
            f"Hub says: {without_breaks(error)}"
        ) from error


def sizes_of(stage: Path) -> dict[str, int]:
    """Bytes of each file that is to be pushed."""
    return {file.relative_to(stage).as_posix(): file.stat().st_size for file in files_below(stage)}


def visibility_if_new(private: bool) -> str:
    """What a dry run can say."""
    return f"{'private' if private else 'public'}, if it is new"


def open_repo(api: HfApi, repo_id: str, private: bool, repo_type: str = "model", **options: Any) -> str:
    """Makes a repo unless it exists, and returns its visibility; ValueError if it is public, but must be private."""
    api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, **options)
    visibility = "private" if api.repo_info(repo_id, repo_type=repo_type).private else "public"
    if private and visibility == "public":
        raise ValueError(f"{repo_id} exists and is public. Make it private on the Hub, or push without --private.")
    return visibility


def _fill_stage(stage: Path, folder: Path, kind: str, repo_id: str) -> None:
    """Makes what is to be pushed of a folder; ValueError if it may not."""
    left_out = copy_repo(folder, stage, link_weights=True)
    if kind == "LoRA":
        complete_lora_repo(stage)
    else:
        _check_kind(stage, folder)
        complete_repo(stage)
    check_nothing_private(stage)
    if kind == "pipeline":
        _check_weights(stage)
    _fill_in_repo(stage / "README.md", folder, repo_id)
    if left_out:
        logger.warning("Not part of a %s, left out: %s", kind, ", ".join(left_out))


def _check_kind(stage: Path, folder: Path) -> None:
    if _is_refine(_read_json(stage / "model_index.json")):
        return
    from refalign.pipeline_refalign_wan import check_is_wan21_pipeline  # loads torch
    from refalign.transformer_refalign_wan import check_is_wan21

    check_is_wan21_pipeline(_read_json(stage / "model_index.json"), str(folder))
    check_is_wan21(_read_json(stage / "transformer/config.json"), f"The transformer of {folder}")


def _fill_in_repo(card: Path, folder: Path, repo_id: str) -> None:
    """Puts the repo's name into the card; ValueError if it leaves other things to fill in."""
    text = card.read_text("utf-8").replace(REPO_PLACEHOLDER, repo_id)
    lines = [str(number) for number, line in enumerate(text.splitlines(), start=1) if UNKNOWN in line]
    if lines and not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no README.md. Write one, or fill in the one that `refalign export` makes.")
    if lines:
        raise ValueError(f"README.md says {UNKNOWN} in the lines {', '.join(lines)}: fill in what is true, then push.")
    card.write_text(text, "utf-8")


def _check_weights(folder: Path) -> None:
    """Raises ValueError unless the networks have the very tensors that their configurations ask for."""
    import torch

    for part, kind in _networks(folder).items():
        if not (folder / part).is_dir():
            continue
        with torch.device("meta"):
            model: Any = kind.from_config(_read_json(folder / part / "config.json"))
        wanted = {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
        found = {(name, tensor.shape) for name, tensor in read_headers(find_safetensors(folder / part)).items()}
        for what, names in (("lacks", wanted - found), ("should not have", found - wanted)):
            if names:
                name, shape = min(names)
                raise ValueError(
                    f"{folder / part} {what} {len(names)} tensors of its config.json, such as {name} {shape}. Was it "
                    "saved with a LoRA loaded, or without all shards? Save it anew."
                )


def _networks(folder: Path) -> dict[str, Any]:
    """The classes of a pipeline's networks that are diffusers' or ours, by their folders."""
    from diffusers import AutoencoderKL, AutoencoderKLWan, UNet2DConditionModel

    from refalign.reference_projector import ReferenceProjector
    from refalign.transformer_refalign_wan import RefAlignWanTransformer3DModel

    if _is_refine(_read_json(folder / "model_index.json")):
        return {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "reference_projector": ReferenceProjector}
    return {"transformer": RefAlignWanTransformer3DModel, "vae": AutoencoderKLWan}


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError unless it is ORG/NAME."""
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"`repo_id` is {repo_id!r}, but must be ORG/NAME.")


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
    return fill_card(card, base=base, base_model=base, datasets=None, licence=UNKNOWN, unknown=UNKNOWN)


def fill_card(
    card: str,
    base_model: str | None,
    datasets: list[str] | None,
    licence: str = "apache-2.0",
    relation: str = "finetune",
    tags: tuple[str, ...] = (),
    widget: list[dict[str, Any]] | None = None,
    pipeline_tag: str = PIPELINE_TAG,
    **facts: Any,
) -> str:
    """
    A template of `model_cards/` with its front matter and `ORG/NAME` for the repo's name.

    Args:
        card (`str`): `template`, `trained`, `trained_lora`, `trained_refine`, ...
        base_model (`str`, *optional*): Hub id of the model that training began from.
        datasets (`list[str]`, *optional*): Hub ids of the data.
        licence (`str`, defaults to `"apache-2.0"`): the Hub's name for the licence.
        relation (`str`, defaults to `"finetune"`): the relation to the base: `finetune` or `adapter`.
        tags (`tuple[str]`, defaults to `()`): tags besides those of every card.
        widget (`list[dict]`, *optional*): what `<Gallery />` shows, as the Hub reads it.
        pipeline_tag (`str`): the Hub's name for what the model does.
        facts: values for what else the template names.
    """
    data = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag=pipeline_tag,
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=datasets,
        tags=[*TAGS[pipeline_tag], *tags],
        widget=widget,
    )
    template = _card(card)
    return ModelCard.from_template(data, template_str=template, repo=REPO_PLACEHOLDER, **facts).content


def _card(name: str) -> str:
    return (files("refalign.model_cards") / f"{name}.md").read_text("utf-8")


def copy_repo(source: Path, target: Path, link_weights: bool = False) -> list[str]:
    """Copies what belongs to a pipeline, or to a LoRA, and returns the names of what does not."""
    check_links(source)
    allowed, left_out = _allowed_files(source), []
    plain = {folder: plain_weights(source / folder) for folder in allowed if (source / folder).is_dir()}
    for file in files_below(source):
        name = file.relative_to(source)
        place = name.parent.as_posix()
        names = plain.get(place, {})
        is_variant = WEIGHTS_FILE.fullmatch(file.name) is not None and file.name not in names
        is_allowed = _matches(file.name, allowed.get(place, ())) and not _matches(file.name, TRAINING_STATE)
        if file.name.startswith(".") or is_variant or not is_allowed:
            left_out.append(name.as_posix())
            continue
        copy = target / place / names.get(file.name, file.name)
        copy.parent.mkdir(exist_ok=True)
        if link_weights and file.suffix == ".safetensors":
            copy.symlink_to(file.resolve())
        else:
            copy_plain(file, copy, names)
    return left_out


def _allowed_files(source: Path) -> dict[str, tuple[str, ...]]:
    """The patterns of what may be published, by folder."""
    if _is_lora(source):
        return {".": LORA_FILES, "assets": ASSET_FILES, RESULTS: RESULT_FILES}
    index = _read_json(source / "model_index.json")
    allowed: dict[str, tuple[str, ...]] = {".": ROOT_FILES, "assets": ASSET_FILES, RESULTS: RESULT_FILES}
    for name, value in index.items():
        if isinstance(value, list) and name[0] != "_":
            allowed[name] = COMPONENT_FILES
    return allowed


def _is_lora(folder: Path) -> bool:
    return (folder / LORA_WEIGHTS).is_file() and not (folder / "model_index.json").is_file()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _read_json(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file.parent} is not a pipeline folder: it has no {file.name}.")
    return read_json(file)
