"""The fields of records, which anyone may have written: each is of the right type, or [`Unusable`] is raised and never
another error."""

import codecs
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar


T = TypeVar("T")

# Every kind of fault, and what it is
FAULTS: dict[str, str] = {
    "not readable": "a file, row or record that is not the format it should be: truncated, not UTF-8, not JSON",
    "field": "a field that is missing or of a wrong type",
    "score": "a score that is not a finite number",
    "duplicate id": "an id that came before; a table may give ids in a column `id`",
    "id": "an id that cannot name a folder",
    "path": "a path that leaves the folder of videos or images",
    "missing file": "a video or image that does not exist, or is no file",
    "name": "a file that looks like a video, reference or caption, but is not named like one",
    "video": "a video that cannot be decoded",
    "no frames": "a video, or a range of one, without frames",
    "image": "an image that cannot be decoded",
    "crop": "a crop that is empty or leaves the frame",
    "box": "a box that is empty or leaves the frame",
    "mask size": "a mask of another size than the frame it was made on",
    "mask": "a mask that cannot be decoded",
    "empty mask": "a mask without a pixel; its box is taken instead",
    "no mask": "a subject without a mask or alpha, which a refinement cannot be trained on",
    "cross pair": "a cross pair that names a clip or a subject that is not there",
    "no references": "a sample without a reference that can be used",
    "no prompt": "a sample without a caption",
}

_TAKEN = re.compile(r"index\.html|video\.mp4|sample\.json|reference_\d+\.png", re.IGNORECASE)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 160
_SHORT.maxlevel = 3
SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST = 2**53  # up to it a float, which numbers of some formats are, holds every integer


class Unusable(ValueError):
    """Something in the data that cannot be used: `kind` of [`FAULTS`], and `detail` with the value that is wrong."""

    def __init__(self, kind: str, detail: str) -> None:
        assert kind in FAULTS, kind
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # else it would not come back whole from a worker process
        return type(self), (self.kind, self.detail)


def shorten(value: Any) -> str:
    """`repr(value)` in 200 characters at most, however large or deep it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: what JSON's `\\ud800` or undecodable bytes leave cannot."""
    return text.isascii() or SURROGATE.search(text) is None


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 1000  # a longer one is no float
    return isinstance(value, float) and math.isfinite(value)


def check_id(sample_id: Any) -> str:
    """The id, if it can name a folder below any other; else raises [`Unusable`]."""
    if not isinstance(sample_id, str) or not sample_id:
        raise Unusable("id", f"{shorten(sample_id)} is not a text of a character or more")
    for part in sample_id.split("/"):
        if part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 200:
            raise Unusable("id", f"{sample_id[:300]!r} cannot name a folder")
        if _TAKEN.fullmatch(part):
            raise Unusable("id", f"{sample_id[:300]!r} has {part!r} in it, the name of a file that previews write")
    if not sample_id.isprintable() or "\\" in sample_id:
        raise Unusable("id", f"{sample_id[:300]!r} has characters that cannot be in a folder's name")
    return sample_id


def path_inside(root: Path, path: Any) -> Path:
    """
    `root / path`, or `path` if that is absolute and below `root`. Symbolic links are followed by whoever opens it:
    people keep their videos on other disks. Raises [`Unusable`] if it is not a path, or leaves `root`.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise Unusable("path", f"{shorten(path)} is not a path")
    relative = PurePosixPath(path)
    if relative.is_absolute():
        try:
            relative = relative.relative_to(root.absolute().as_posix())
        except ValueError:
            raise Unusable("path", f"{path!r} is outside {root}") from None
    if ".." in relative.parts or not relative.parts:
        raise Unusable("path", f"{path!r} leaves {root}")
    return root / relative


def check_file(path: Path) -> None:
    """Raises [`Unusable`] unless it is a file: a pipe or a device could be read for ever."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  (it raises for a name that is too long)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unusable("missing file", f"{path} is not a file: {reason}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        raise Unusable("missing file", f"{path} is not a file but a {kinds.get(stat.S_IFMT(mode), 'device')}")


def check_given(path: Path, what: str) -> None:
    """Raises ValueError unless a file that the user named is one; `what` says what it should be."""
    if not path.exists():
        raise ValueError(f"{what} {path} does not exist.")
    try:
        check_file(path)
    except Unusable as error:
        raise ValueError(f"{what} {error.detail}.") from None


def encoding_of(path: Path) -> str:
    """UTF-16 where a text file begins with its byte order mark, as Windows writes it; else UTF-8."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise Unusable("field", f"{name} is {shorten(value)}, which is not an object")
    return value


def member(record: Any, name: str) -> Any:
    """`record[name]`, of an object that has it."""
    if name not in mapping(record, f"what should hold {name!r}"):
        raise Unusable("field", f"there is no {name!r} among {shorten(list(record))}")
    return record[name]


def required(record: Any, name: str, check: Callable[[Any, str], T]) -> T:
    """`record[name]`, of an object that has it, once it is checked."""
    return check(member(record, name), name)


def sequence(value: Any, name: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise Unusable("field", f"{name} is {shorten(value)}, which is not a list")
    return value


def text(value: Any, name: str) -> str:
    """A text that UTF-8 can hold."""
    if not isinstance(value, str) or not is_unicode(value):
        raise Unusable("field", f"{name} is {shorten(value)}, which is not a text")
    return value


def integer(value: Any, name: str) -> int:
    """A whole number from 0 to 2**53, also one written as `3.0`."""
    if not is_number(value) or value != int(value) or not 0 <= value <= _LARGEST:
        raise Unusable("field", f"{name} is {shorten(value)}, which is not a whole number from 0")
    return int(value)


def number(value: Any, name: str) -> float:
    """A finite number."""
    if not is_number(value):
        raise Unusable("score", f"{name} is {shorten(value)}, which is not a finite number")
    return float(value)


def prompts(value: Any, name: str) -> tuple[str, ...]:
    """The captions that are not blank, of a text or a list of texts."""
    captions = value if isinstance(value, list) else [value]
    stripped = [text(caption, name).strip() for caption in captions]
    if not any(stripped):  # an empty list too
        raise Unusable("no prompt", f"{name} is {shorten(value)}")
    return tuple(filter(None, stripped))
