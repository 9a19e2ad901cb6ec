"""What every dataset becomes: [`Sample`]s, and [`Fault`]s where something is wrong with one.

A sample holds no pixels: it says where they are. [`refalign_training.data.pixels`] reads them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, PlainValidator, TypeAdapter, ValidationError

from refalign_training.data import fields
from refalign_training.data.fields import Unusable
from refalign_training.data.recipe import PAPER_STRIDE


Cost = Literal["sample", "reference", "nothing"]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a sample or a part of it, and what that costs."""

    kind: str
    """One of [`refalign_training.data.fields.FAULTS`]."""
    detail: str
    """What was found, with the value."""
    sample_id: str
    """Empty where the id itself could not be read."""
    source: str
    """The annotation file or folder."""
    row: int
    """The record's place in it, from 0."""
    lost: Cost = "sample"


@dataclass
class Place:
    """Where a record was found, and what is wrong with parts of it."""

    source: str
    row: int
    sample_id: str = ""
    """Empty until it is known."""
    faults: list[Fault] = field(default_factory=list)

    def fault(self, error: Unusable, lost: Cost = "sample") -> Fault:
        """What is wrong here, and what it costs."""
        detail = error.detail[:400].encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8
        return Fault(error.kind, detail, self.sample_id, self.source, self.row, lost)

    def report(self, error: Unusable, lost: Cost) -> None:
        """Adds what is wrong with a part of the record."""
        self.faults.append(self.fault(error, lost))

    @contextmanager
    def losing(self, lost: Cost) -> Iterator[None]:
        """What is [`Unusable`] inside costs no more than this, and is reported."""
        try:
            yield
        except Unusable as error:
            self.report(error, lost)


# -- Fields, as pydantic checks them ----------------------------------------------------------------------------------

# In records that are used as a whole or not at all. Where each part that is wrong costs only itself (OpenS2V-5M,
# Phantom-Data, tables), models of pydantic's were longer, and up to 1.6 times slower


def _field(check: Callable[[Any, str], Any]) -> PlainValidator:
    return PlainValidator(lambda value, info: check(value, info.field_name or ""))


def _frame(value: Any, name: str) -> int | float | None:
    """A frame's number, or its place as a share of all; which of the two, only the type says."""
    if value is None:
        return None
    if not isinstance(value, float):
        return fields.integer(value, name)
    if not 0 <= value <= 1:
        raise Unusable("field", f"{name} is {value}, which as a share must be from 0 to 1")
    return value


Text = Annotated[str, _field(fields.text)]
Count = Annotated[int, _field(fields.integer)]
Number = Annotated[float, _field(fields.number)]
Inside = Annotated[Path, PlainValidator(lambda path, info: fields.path_inside(info.context, path))]
"""A path below the folder that [`check_sample`] is given."""
Crop = tuple[Count, Count, Count, Count]
"""`(left, top, right, bottom)` of a frame, in pixels."""
Box = tuple[Number, Number, Number, Number]
"""`(left, top, right, bottom)` of a cropped frame, in pixels."""


def _above_zero(value: float) -> float:
    if value <= 0:
        raise Unusable("field", f"stride is {value}, which must be above 0")
    return value


def _complete(cls: type) -> BeforeValidator:
    """Refuses a record that lacks a member of a dataclass: without it, a view would silently become another one."""

    def check(record: Any) -> Any:
        for part in dataclasses.fields(cls):
            fields.member(record, part.name)
        return record

    return BeforeValidator(check)


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
    stride: Annotated[Number, AfterValidator(_above_zero)] = PAPER_STRIDE
    """As [`Recipe.stride`], where that is None."""


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


_CompleteView = Annotated[View, _complete(View)]


@dataclass(frozen=True)
class Reference:
    """A subject that a sample's video shows, and the images there are of it."""

    subject: Text
    """References of one sample with equal subjects show the same one."""
    view: _CompleteView | None
    """From the clip itself (*regular*), or an image that came with the sample."""
    cross: Annotated[tuple[_CompleteView, ...], FailFast()] = ()
    """From other clips of the same subject."""
    label: Text = ""
    """What it is, in words, such as a class name."""


@dataclass(frozen=True)
class Sample:
    """One clip with its captions and references, and where it came from."""

    id: Annotated[str, PlainValidator(fields.check_id)]
    prompts: Annotated[tuple[str, ...], _field(fields.prompts)]
    """One of them is drawn each time."""
    clip: Annotated[Clip, _complete(Clip)]
    references: Annotated[tuple[Annotated[Reference, _complete(Reference)], ...], FailFast()]
    source: Text
    """The annotation file or folder."""
    row: Count
    """The record's place in it, from 0."""
    scores: Annotated[Mapping[Text, Number], FailFast()] = field(default_factory=dict)
    """What can be selected by, such as `aesthetic`, `fps` or `references` (their number)."""


_SAMPLE = TypeAdapter(Annotated[Sample, _complete(Sample)])


def check_sample(record: Any, root: Path) -> Sample:
    """
    A sample out of JSON, whose paths start from `root`.

    Raises:
        Unusable: saying where it is wrong first, and the value.
    """
    try:
        return _SAMPLE.validate_python(record, context=root)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the record"
    if isinstance(found := first.get("ctx", {}).get("error"), Unusable):
        raise Unusable(found.kind, f"{place}: {found.detail}")
    raise Unusable("field", f"{place}: {first['msg']}, but found {fields.shorten(first['input'])}")


def usable(items: Iterable[Sample | Fault]) -> Iterator[Sample]:
    """The samples alone."""
    return (item for item in items if isinstance(item, Sample))
