"""Fields of records that anyone may have written: of the right type, or [`Unusable`] and never another error."""

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refalign_training.data.sample import Fault, Unusable, is_number


Report = Callable[[Unusable, Literal["reference", "nothing"]], None]
"""Takes what is wrong with a part of a record, and what that costs."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 160
_SHORT.maxlevel = 3
_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST = 2**53  # up to it a float, which numbers of some formats are, holds every integer


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


def shorten(value: Any) -> str:
    """`repr(value)` in 200 characters at most, however large or deep it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: what JSON's `\\ud800` or undecodable bytes leave cannot."""
    return text.isascii() or _SURROGATE.search(text) is None


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise Unusable("field", f"{name} is {shorten(value)} and no object")
    return value


def member(record: Any, name: str) -> Any:
    """`record[name]`, of an object that has it."""
    if name not in mapping(record, f"what should hold {name!r}"):
        raise Unusable("field", f"there is no {name!r} among {shorten(list(record))}")
    return record[name]


def sequence(value: Any, name: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise Unusable("field", f"{name} is {shorten(value)} and no list")
    return value


def text(value: Any, name: str) -> str:
    """A text that UTF-8 can hold."""
    if not isinstance(value, str) or not is_unicode(value):
        raise Unusable("field", f"{name} is {shorten(value)} and no text")
    return value


def integer(value: Any, name: str) -> int:
    """A whole number from 0 to 2**53, also one written as `3.0`."""
    if not is_number(value) or value != int(value) or not 0 <= value <= _LARGEST:
        raise Unusable("field", f"{name} is {shorten(value)} and no whole number from 0")
    return int(value)


def number(value: Any, name: str) -> float:
    """A finite number."""
    if not is_number(value):
        raise Unusable("score", f"{name} is {shorten(value)} and no finite number")
    return float(value)


def prompts(value: Any, name: str) -> tuple[str, ...]:
    """The captions that are not blank, of a text or a list of texts."""
    captions = [text(caption, name) for caption in (value if isinstance(value, list) else [value])]
    kept = tuple(caption.strip() for caption in captions if caption.strip())
    if not kept:  # an empty list too
        raise Unusable("no prompt", f"{name} is {shorten(value)}")
    return kept
