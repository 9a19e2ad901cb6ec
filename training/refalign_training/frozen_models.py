"""The files of a frozen model: where they come from, and what identifies them."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id


def fetch_model(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """
    The folder `name`, or the snapshot of one commit of the Hub's repo, with those files that match.

    Raises:
        ValueError: if there is none, its licence is not accepted yet, or a folder is given with a revision.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder, which has no revision {revision!r}. Pass it for Hub names only.")
        return Path(name).resolve()
    try:
        validate_repo_id(name)
    except ValueError:
        raise ValueError(f"{name} is neither a folder here nor a Hub name (ORG/NAME).") from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        if _refuses_access(error):
            raise ValueError(
                f"The Hub gives {name} only to those who have access (DINOv3, for one, is gated by Meta's licence). "
                f"Open https://huggingface.co/{name}, accept its licence, run `hf auth login` and try again; or pass "
                f"a local folder. If there is no such page, check the name. The Hub says: {error}"
            ) from error
        raise ValueError(
            f"{name} is no folder here, and the Hub does not give it. Check the name and revision, or pass a local "
            f"folder. The Hub's client says: {error}"
        ) from error


def _refuses_access(error: BaseException | None) -> bool:
    """Whether the Hub's answer was a refusal; the client may wrap it into the complaint that its cache is empty."""
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
        total.update(f"{file.relative_to(folder).as_posix()}\0{_digest_of_file(file)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _digest_of_file(file: Path) -> str:
    blob = file.resolve()
    # The Hub's client names large files by their sha256, and has checked it: 11 GB need not be read again
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
