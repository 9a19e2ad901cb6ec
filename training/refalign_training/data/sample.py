"""What every dataset becomes: [`Sample`]s, and [`Fault`]s where something is wrong with one.

A sample holds no pixels: it says where they are. [`refalign_training.data.pixels`] reads them.

Anyone may have written the records that samples come from: a field is of the right type, or [`Unusable`] is raised and
never another error.
"""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, TypeAdapter, ValidationError


# Every kind of fault, and what it is
FAULTS: dict[str, str] = {
    "not readable": "a file, row or record that is not the format it should be: truncated, not UTF-8, not JSON",
    "field": "a field that is missing or of a wrong type",
    "score": "a score that is not a finite number",
    "duplicate id": "an id that came before; a table may give ids in a column `id`",
    "id": "an id that cannot name a folder",
    "path": "a path that leaves the folder of videos or images",
    "missing file": "a video or image that does not exist",
    "video": "a video that cannot be decoded",
    "no frames": "a video, or a range of one, without frames",
    "image": "an image that cannot be decoded",
    "crop": "a crop that is empty or leaves the frame",
    "box": "a box that is empty or leaves the frame",
    "mask size": "a mask of another size than the frame it was made on",
    "mask": "a mask that cannot be decoded",
    "empty mask": "a mask without a pixel; its box is taken instead",
    "cross pair": "a cross pair that names a clip or a subject that is not there",
    "no references": "a sample without a reference that can be used",
    "no prompt": "a sample without a caption",
}

_TAKEN = re.compile(r"index\.html|video\.mp4|sample\.json|reference_\d+\.png", re.IGNORECASE)


class Unusable(ValueError):
    """Something in the data that cannot be used: `kind` of [`FAULTS`], and `detail` with the value that is wrong."""

    def __init__(self, kind: str, detail: str) -> None:
        assert kind in FAULTS, kind
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # else it would not come back whole from a worker process
        return type(self), (self.kind, self.detail)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a sample or a part of it, and what that costs."""

    kind: str
    """One of [`FAULTS`]."""
    detail: str
    """What was found, with the value."""
    sample_id: str
    """Empty where the id itself could not be read."""
    source: str
    """The annotation file or folder."""
    row: int
    """The record's place in it, from 0."""
    lost: Literal["sample", "reference", "nothing"] = "sample"

    def __post_init__(self) -> None:
        assert self.kind in FAULTS, self.kind


@dataclass(frozen=True)
class Place:
    """Where a record was found."""

    source: str
    row: int
    sample_id: str = ""

    def fault(self, error: Unusable, lost: Literal["sample", "reference", "nothing"] = "sample") -> Fault:
        """What is wrong here, and what it costs."""
        detail = error.detail[:400].encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8
        return Fault(error.kind, detail, self.sample_id, self.source, self.row, lost)


Report = Callable[[Unusable, Literal["reference", "nothing"]], None]
"""Takes what is wrong with a part of a record, and what that costs."""


# -- Fields -----------------------------------------------------------------------------------------------------------

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 160
_SHORT.maxlevel = 3
SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST = 2**53  # up to it a float, which numbers of some formats are, holds every integer


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
    parts = sample_id.split("/")
    if not all(map(_can_name_a_folder, parts)):
        raise Unusable("id", f"{sample_id[:300]!r} cannot name a folder")
    if taken := list(filter(_TAKEN.fullmatch, parts)):
        raise Unusable("id", f"{sample_id[:300]!r} has {taken[0]!r} in it, the name of a file that previews write")
    if not sample_id.isprintable() or "\\" in sample_id:
        raise Unusable("id", f"{sample_id[:300]!r} has characters that cannot be in a folder's name")
    return sample_id


def _can_name_a_folder(part: str) -> bool:
    return part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 200


def path_inside(root: Path, path: Any) -> Path:
    """
    `root / path`, or `path` if that is absolute and below `root`. Symbolic links are followed by whoever opens it:
    people keep their videos on other disks.

    Raises:
        Unusable: if it is not a path, or leaves `root`.
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
    kept = tuple(filter(None, [text(caption, name).strip() for caption in captions]))
    if not kept:  # an empty list too
        raise Unusable("no prompt", f"{name} is {shorten(value)}")
    return kept


def _frame(value: Any, name: str) -> int | float | None:
    """A frame's number, or its place as a share of all; which of the two, only the type says."""
    if value is None:
        return None
    if not isinstance(value, float):
        return integer(value, name)
    if not 0 <= value <= 1:
        raise Unusable("field", f"{name} is {value}, which as a share must be from 0 to 1")
    return value


# The same for pydantic, in records that are used as a whole or not at all. Where each part that is wrong costs only
# itself (OpenS2V-5M, Phantom-Data, tables), models of pydantic's were longer, and up to 1.6 times slower


def _field(check: Callable[[Any, str], Any]) -> PlainValidator:
    return PlainValidator(lambda value, info: check(value, info.field_name))


Text = Annotated[str, _field(text)]
Count = Annotated[int, _field(integer)]
Number = Annotated[float, _field(number)]
Prompts = Annotated[tuple[str, ...], _field(prompts)]
SampleId = Annotated[str, PlainValidator(check_id)]
Inside = Annotated[Path, PlainValidator(lambda path, info: path_inside(info.context, path))]
"""A path below the folder that [`checked`] is given."""
Crop = tuple[Count, Count, Count, Count]
"""`(left, top, right, bottom)` of a frame, in pixels."""
Box = tuple[Number, Number, Number, Number]
"""`(left, top, right, bottom)` of a cropped frame, in pixels."""


def complete(cls: type) -> BeforeValidator:
    """Refuses a record that lacks a member of a dataclass: without it, a view would silently become another one."""
    names = [part.name for part in fields(cls)]

    def check(record: Any) -> Any:
        for name in names:
            member(record, name)
        return record

    return BeforeValidator(check)


def checked(adapter: TypeAdapter, record: Any, root: Path | None = None) -> Any:
    """
    The record as the adapter's type.

    Args:
        root (`Path`, *optional*): the folder that paths in it start from.

    Raises:
        Unusable: saying where it is wrong first, and the value.
    """
    try:
        return adapter.validate_python(record, context=root)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the record"
    if isinstance(found := first.get("ctx", {}).get("error"), Unusable):
        raise Unusable(found.kind, f"{place}: {found.detail}")
    raise Unusable("field", f"{place}: {first['msg']}, but found {shorten(first['input'])}")


# -- Samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A part of a video file."""

    path: Inside
    start: Count = 0
    """The first frame, counted from 0 in the file."""
    end: Count | None = None
    """One behind the last frame; `None`: the end of the file."""
    crop: Crop | None = None
    """The part of every frame; `None`: the whole frame."""


@dataclass(frozen=True)
class View:
    """An image of a subject: an image file, or a region of a video's frame."""

    path: Inside
    """The image or video file."""
    frame: Annotated[int | float | None, _field(_frame)] = None
    """`None`: `path` is an image. `int`: a frame's number in the video. `float`: its place, as a share of all."""
    crop: Crop | None = None
    """The part of the frame that box and mask are in; `None`: the whole frame."""
    box: Box | None = None
    """The part of the crop that shows the subject; `None`: all of it."""
    box_long_side: Annotated[Count, Field(gt=0)] | None = None
    """The box is in pixels of the frame resized to this long side; `None`: of the frame itself."""
    mask: Mapping[str, Any] | None = None
    """COCO's compressed RLE, `{"size": [height, width], "counts": str}`; the subject is cut out by it."""


CompleteView = Annotated[View, complete(View)]


@dataclass(frozen=True)
class Reference:
    """A subject that a sample's video shows, and the images there are of it."""

    subject: Text
    """References of one sample with equal subjects show the same one."""
    view: CompleteView | None
    """From the clip itself (*regular*), or an image that came with the sample."""
    cross: Annotated[tuple[CompleteView, ...], FailFast()] = ()
    """From other clips of the same subject."""
    label: Text = ""
    """What it is, in words, such as a class name."""


@dataclass(frozen=True)
class Sample:
    """One clip with its captions and references, and where it came from."""

    id: SampleId
    prompts: Prompts
    """One of them is drawn each time."""
    clip: Annotated[Clip, complete(Clip)]
    references: Annotated[tuple[Annotated[Reference, complete(Reference)], ...], FailFast()]
    source: Text
    """The annotation file or folder."""
    row: Count
    """The record's place in it, from 0."""
    scores: Annotated[Mapping[Text, Number], FailFast()] = field(default_factory=dict)
    """What can be selected by, such as `aesthetic`, `fps` or `references` (their number)."""


def usable(items: Iterable[Sample | Fault]) -> Iterator[Sample]:
    """The samples alone."""
    return (item for item in items if isinstance(item, Sample))
