"""`refalign push-space`: a Space of Hugging Face that runs our app. Its repo carries this package, which no index need
have:

    app.py  README.md  requirements.txt  refalign/...
"""

import logging
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, SpaceCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from refalign import __version__, hub
from refalign.files import HUB_ID, without_breaks
from refalign.privacy import check_nothing_private
from refalign.sprites import FOLDER


logger = logging.getLogger(__name__)

MODEL_VARIABLE = "REFALIGN_MODEL"  # read by the app
SPACE_FILES = ("app.py", "README.md", "requirements.txt")
PACKAGE = Path(hub.__file__).parent
# And the embedded model of videos; the app refines nothing
PACKAGE_FILES = (
    (".", "*.py"),
    ("sprites", "*.py"),
    ("sprites", "*.safetensors"),
    ("sprites/subjects", "*.png"),
)


def push_space(
    repo_id: str, model: str | None = None, private: bool = False, dry_run: bool = False, token: str | None = None
) -> hub.Pushed:
    """
    Makes a Space, or updates one, with the app and this very version of the package.

    Args:
        repo_id (`str`): `ORG/NAME`; made if it does not exist.
        model (`str`, *optional*): Hub id of the model to show. By default an existing Space keeps its model, and a new
            one shows the embedded model.
        private (`bool`, defaults to `False`): whether a new Space is private.
        dry_run (`bool`, defaults to `False`): change nothing, connect to nothing, only say what would go.
        token (`str`, *optional*): a token of the Hub, instead of the one from `hf auth login`.

    Returns:
        [`refalign.hub.Pushed`]: the files of the Space with their sizes, and where they are.

    Raises:
        ValueError: if a name is not ORG/NAME, the Hub does not give the model, a file holds what is private
            ([`refalign.privacy`]), or `private` is asked of a public Space.
    """
    hub.check_repo_id(repo_id)
    if model is not None:
        _check_model(model)
    api = HfApi(token=token)
    named = model if dry_run else model or _model_of_space(api, repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        write_space(stage)
        if named is not None:
            _name_model(stage / "README.md", named, is_open=dry_run or _is_open(api, named))
        check_nothing_private(stage)
        visibility = hub.visibility_if_new(private)
        if not dry_run:
            with hub.naming_refusal(repo_id):
                visibility = hub.open_repo(api, repo_id, private, "space", space_sdk="gradio")
                if model is not None:
                    api.add_space_variable(repo_id, MODEL_VARIABLE, model)
                _upload(api, stage, repo_id)
        return hub.Pushed(hub.sizes_of(stage), f"{api.endpoint}/spaces/{repo_id}", visibility, dry_run)


def write_space(folder: Path) -> None:
    """Writes the files of a Space into an empty folder: the app, the package and the embedded model."""
    for name in SPACE_FILES:
        (folder / name).write_bytes((files("refalign.space") / name).read_bytes())
    package = folder / PACKAGE.name
    for place, pattern in PACKAGE_FILES:
        (package / place).mkdir(exist_ok=True)
        for file in (PACKAGE / place).glob(pattern):
            if not file.name.startswith("."):
                shutil.copyfile(file, package / place / file.name)
    hub.copy_repo(FOLDER, package / "sprites" / FOLDER.name)


def _check_model(model: str) -> None:
    if Path(model).exists():
        raise ValueError(
            f"{model} is on this machine, where a Space cannot read it. `refalign push` it, then name its repo."
        )
    if not HUB_ID.fullmatch(model):
        raise ValueError(f"`model` is {model!r}, but must be ORG/NAME, the Hub id of a model.")


def _model_of_space(api: HfApi, repo_id: str) -> str | None:
    """The Hub id that a Space's variable holds; None if there is no such Space or variable."""
    try:
        with hub.naming_refusal(repo_id):
            variable = api.get_space_variables(repo_id).get(MODEL_VARIABLE)
    except RepositoryNotFoundError:
        return None
    if variable is None or HUB_ID.fullmatch(variable.value or "") is None:
        return None
    return variable.value


def _is_open(api: HfApi, model: str) -> bool:
    """Whether everyone may read a model; ValueError if the Hub does not give it."""
    try:
        info = api.model_info(model)
    except HfHubHTTPError as error:
        raise ValueError(
            f"The Hub does not give the model {model}, which the Space is to show. Name another by --model. The Hub "
            f"says: {without_breaks(error)}"
        ) from error
    if info.private or info.gated:
        logger.warning("%s is not open to everyone: give the Space a secret HF_TOKEN that may read it.", model)
    return not (info.private or info.gated)


def _name_model(readme: Path, model: str, is_open: bool) -> None:
    """Names the model in the Space's front matter, and has it downloaded while the Space is built, if it may be."""
    card = SpaceCard.load(readme)
    data: Any = card.data
    data.models = [model]
    if is_open:
        data.preload_from_hub = [model]
    card.save(readme)


def _upload(api: HfApi, stage: Path, repo_id: str) -> None:
    stale = f"{PACKAGE.name}/*"  # modules of an earlier version, which this one does not have
    message = f"Upload RefAlign {__version__} and its app"
    api.upload_folder(
        repo_id=repo_id, repo_type="space", folder_path=stage, commit_message=message, delete_patterns=stale
    )
