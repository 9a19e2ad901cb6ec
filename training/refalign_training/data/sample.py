"""What every dataset becomes: [`Sample`]s, and [`Fault`]s where something is wrong with one.

A sample holds no pixels: it says where they are. [`refalign_training.data.pixels`] reads them.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal


Box = tuple[float, float, float, float]

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

    def __reduce__(self):  # else it would not come back whole from a worker process
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
class Clip:
    """A part of a video file."""

    path: Path
    start: int = 0
    """The first frame, counted from 0 in the file."""
    end: int | None = None
    """One behind the last frame; `None`: the end of the file."""
    crop: tuple[int, int, int, int] | None = None
    """Of every frame, `(left, top, right, bottom)` in pixels; `None`: the whole frame."""


@dataclass(frozen=True)
class View:
    """An image of a subject: an image file, or a region of a video's frame."""

    path: Path
    """The image or video file."""
    frame: int | float | None = None
    """`None`: `path` is an image. `int`: a frame's number in the video. `float`: its place, as a share of all."""
    crop: tuple[int, int, int, int] | None = None
    """Of the frame, `(left, top, right, bottom)` in pixels. Box and mask are in the cropped frame."""
    box: Box | None = None
    """`(left, top, right, bottom)` in pixels; `None`: all of it."""
    box_long_side: int | None = None
    """The box is in pixels of the frame resized to this long side; `None`: of the frame itself."""
    mask: Mapping[str, Any] | None = None
    """COCO's compressed RLE, `{"size": [height, width], "counts": str}`; the subject is cut out by it."""


@dataclass(frozen=True)
class Reference:
    """A subject that a sample's video shows, and the images there are of it."""

    subject: str
    """References of one sample with equal subjects show the same one."""
    view: View | None
    """From the clip itself (*regular*), or an image that came with the sample."""
    cross: tuple[View, ...] = ()
    """From other clips of the same subject."""
    label: str = ""
    """What it is, in words, such as a class name."""


@dataclass(frozen=True)
class Sample:
    """One clip with its captions and references, and where it came from."""

    id: str
    prompts: tuple[str, ...]
    """One of them is drawn each time."""
    clip: Clip
    references: tuple[Reference, ...]
    source: str
    """The annotation file or folder."""
    row: int
    """The record's place in it, from 0."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What can be selected by, such as `aesthetic`, `fps` or `references` (their number)."""


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 1000  # a longer one is no float
    return isinstance(value, float) and math.isfinite(value)


def check_id(sample_id: Any) -> str:
    """The id, if it can name a folder below any other; else [`Unusable`]."""
    if not isinstance(sample_id, str) or not sample_id:
        raise Unusable("id", f"{sample_id!r} is not a text of a character or more")
    parts = sample_id.split("/")
    if any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > 200 for part in parts):
        raise Unusable("id", f"{sample_id[:300]!r} cannot name a folder")
    if taken := [part for part in parts if _TAKEN.fullmatch(part)]:
        raise Unusable("id", f"{sample_id[:300]!r} has {taken[0]!r} in it, the name of a file that previews write")
    if not sample_id.isprintable() or "\\" in sample_id:
        raise Unusable("id", f"{sample_id[:300]!r} has characters that cannot be in a folder's name")
    return sample_id


def path_inside(root: Path, path: Any) -> Path:
    """
    `root / path`, or `path` if that is absolute and below `root`. Symbolic links are followed by whoever opens it:
    people keep their videos on other disks.

    Raises:
        Unusable: if the path is none, or leaves `root`.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise Unusable("path", f"{path!r} is not a path")
    relative = PurePosixPath(path)
    if relative.is_absolute():
        try:
            relative = relative.relative_to(root.absolute().as_posix())
        except ValueError:
            raise Unusable("path", f"{path!r} is outside {root}") from None
    if ".." in relative.parts or not relative.parts:
        raise Unusable("path", f"{path!r} leaves {root}")
    return root / relative


def usable(items: Iterable[Sample | Fault]) -> Iterator[Sample]:
    """The samples alone."""
    return (item for item in items if isinstance(item, Sample))
