"""Your own data in a plain folder: `clip.mp4` with `clip.txt` and `clip.ref0.png`, `clip.ref1.jpg`, ... beside it.

Suffixes and `ref` may be in any case. A file that looks like one of these but is named otherwise is a fault.
"""

import mimetypes
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refalign.privacy import shown
from refalign_training.data.fields import Unusable, check_file, encoding_of, shorten
from refalign_training.data.recipe import DEFAULT_RULE, SelectionRule
from refalign_training.data.records import Record
from refalign_training.data.sample import Cost, Fault, Place, Sample
from refalign_training.data.table import sample_of


_MOVING = (
    ".mp4 .m4v .mov .qt .mkv .webm .avi .divx .mpg .mpeg .mpe .vob .ts .m2ts .mts .m2t .3gp .3g2 .flv .f4v .wmv .asf "
    ".ogv .ogm .gif .dv .mxf .rm .rmvb .ivf .nut .mj2"
)
_STILL = ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .avif .jp2 .tga .ppm .pgm .pbm .pnm"
VIDEOS, IMAGES = frozenset(_MOVING.split()), frozenset(_STILL.split())
TEXTS = frozenset({".txt"})
# What `mimetypes` does not know everywhere
_UNREAD = {
    **dict.fromkeys((".heic", ".heif", ".jxl", ".psd", ".dng", ".cr2", ".nef", ".arw", ".exr", ".eps"), "image"),
    **dict.fromkeys((".m2v", ".h264", ".h265", ".264", ".265", ".hevc", ".y4m", ".braw", ".r3d", ".insv"), "video"),
    **dict.fromkeys((".caption", ".cap", ".text", ".md", ".srt", ".vtt", ".json", ".rtf", ".docx"), "text"),
}
_ABOUT = re.compile(r"read.?me|licen[cs]e|copying|changelog", re.IGNORECASE)
_REFERENCE = re.compile(r"(.+)\.ref(\d{1,9})", re.DOTALL | re.IGNORECASE)
_LONGEST_PROMPT = 1 << 16  # characters


class _NotTaken(NamedTuple):
    """A file that is not taken, why, and what that costs."""

    error: Unusable
    lost: Cost


def read_folder(root: Path, rule: SelectionRule = DEFAULT_RULE) -> Iterator[Sample | Fault]:
    """
    The videos of a folder and the folders in it, in the order of their names; hidden ones are left out. A sample's id
    is its video's path without suffix, its caption all of `clip.txt`, and its references `clip.ref<number>.<suffix>`
    in the order of their numbers. Of the rule only `max_references` matters.

    Raises:
        ValueError: if it is not a folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    return _read(root, rule)


def _read(root: Path, rule: SelectionRule) -> Iterator[Sample | Fault]:
    for row, found in enumerate(_rows(root, root, frozenset())):
        place = Place(str(root), row)
        if isinstance(found, _NotTaken):
            yield place.fault(found.error, found.lost)
            continue
        try:
            item = sample_of(Record(row, found), place, root, rule)
        except Unusable as error:
            item = place.fault(error)
        yield from place.faults
        yield item


def _rows(folder: Path, root: Path, above: frozenset[Path]) -> Iterator[dict[str, Any] | _NotTaken]:
    """A row for each video of a folder and those in it, as of a table; links that lead back to `above` are passed."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        yield _NotTaken(Unusable("not readable", f"{shorten(str(folder))}: {error}"), "sample")
        return
    files = [entry for entry in entries if not entry.is_dir()]
    videos = {entry: _Beside(entry) for entry in files if _kind(entry) == "video"}
    not_taken = list(_assign(files, videos))
    for entry in entries:
        if entry in videos:
            yield _row(videos[entry], root)
        elif entry.is_dir() and (real := entry.resolve()) not in above:
            yield from _rows(entry, root, above | {real})
    yield from not_taken


class _Beside:
    """What lies beside a video."""

    def __init__(self, video: Path) -> None:
        self.video = video
        self.caption: Path | None = None
        self.references: dict[int, Path] = {}


def _row(beside: _Beside, root: Path) -> dict[str, Any] | _NotTaken:
    try:
        check_file(beside.video)
    except Unusable as error:
        return _NotTaken(error, "sample")
    references = [path.relative_to(root).as_posix() for _, path in sorted(beside.references.items())]
    prompt = None if beside.caption is None else _read_caption(beside.caption)
    return {"video": beside.video.relative_to(root).as_posix(), "prompt": prompt, "references": references}


def _kind(entry: Path) -> str | None:
    """What a file is by its name: video, image or text, if we read it."""
    suffix = entry.suffix.lower()
    if suffix in TEXTS:
        return "text"
    if suffix in IMAGES and (suffix not in VIDEOS or _REFERENCE.fullmatch(entry.stem)):
        return "image"
    return "video" if suffix in VIDEOS else None


def _assign(files: list[Path], videos: Mapping[Path, _Beside]) -> Iterator[_NotTaken]:
    """Gives captions and references to their videos, and says which files are not taken."""
    owners: dict[str, list[_Beside]] = {}
    for video, beside in videos.items():
        owners.setdefault(video.stem, []).append(beside)
    folded: dict[str, set[str]] = {}
    for stem in owners:
        folded.setdefault(_fold(stem), set()).add(stem)
    left = []
    for entry in files:
        kind, reference = _kind(entry), _REFERENCE.fullmatch(entry.stem)
        stem = reference[1] if kind == "image" and reference else entry.stem
        alike = folded.get(_fold(stem), set())
        owner = owners.get(stem) or (owners[next(iter(alike))] if len(alike) == 1 else [])
        if kind == "text" and owner:
            yield from _give_caption(entry, owner)
        elif kind == "image" and reference and owner:
            yield from _give_reference(entry, int(reference[2]), owner)
        elif entry not in videos:
            left.append((entry, kind))
    for entry, kind in left:
        stem = _owner_of(entry.stem, folded)
        yield from _not_taken(entry, kind, None if stem is None else owners[stem][0])


def _give_caption(entry: Path, owner: list[_Beside]) -> Iterator[_NotTaken]:
    for beside in owner:
        other = beside.caption
        taken, left = entry, other
        if other is not None and other.stem == beside.video.stem:  # the exact name goes first
            taken, left = other, entry
        beside.caption = taken
        if left is not None and beside is owner[0]:  # videos of one name have all the same
            yield _NotTaken(_name_fault(left, f"{beside.video.name} has the caption {taken.name}"), "nothing")


def _give_reference(entry: Path, number: int, owner: list[_Beside]) -> Iterator[_NotTaken]:
    for beside in owner:
        other = beside.references.setdefault(number, entry)
        if other is not entry and beside is owner[0]:
            free = f"{_free_name(beside)}{entry.suffix}"
            wanted = f"reference {number} is {other.name}; name it, say, {free}"
            yield _NotTaken(_name_fault(entry, wanted), "reference")


def _owner_of(name: str, folded: Mapping[str, set[str]]) -> str | None:
    """The longest name of a video behind which a file's name goes on with a mark, as `clip_1` does behind `clip`."""
    text = _fold(name)
    for end in range(len(text), 0, -1):
        if not text[end : end + 1].isalnum() and text[:end] in folded:
            return min(folded[text[:end]])
    return None


def _not_taken(entry: Path, kind: str | None, owner: _Beside | None) -> Iterator[_NotTaken]:
    """What a file that is not taken should be called, if it looks like one of ours."""
    guess = kind or _UNREAD.get(entry.suffix.lower()) or (mimetypes.guess_type(entry.name)[0] or "").split("/")[0]
    inner = {part.lower() for part in entry.suffixes[:-1]}
    reference = re.search(r"(.+)[._ -]ref", entry.stem, re.IGNORECASE)
    if guess == "image" and reference and owner is None:
        error = Unusable(
            "missing file", f"{shorten(entry.name)} is a reference, but there is no video {shorten(reference[1])}"
        )
        yield _NotTaken(error, "sample")
    elif guess == "image" and owner is not None:
        wanted = f"{_free_name(owner)}{entry.suffix if kind else '.png, in a format that is read'}"
        lost: Cost = "reference" if reference else "nothing"  # a picture of the same name may be for people
        yield _NotTaken(_name_fault(entry, f"a reference is called {wanted}"), lost)
    elif guess == "text" and owner is not None:
        if not kind and owner.caption:  # it is about something else
            return
        yield _NotTaken(_name_fault(entry, f"the caption is called {owner.video.stem}.txt"), "nothing")
    elif kind == "text" and not _ABOUT.match(entry.stem):
        yield _NotTaken(_name_fault(entry, f"there is no video {entry.stem}, whose caption it would be"), "nothing")
    elif guess == "video" or inner & VIDEOS:
        wanted = f"a video is called, say, clip.mp4, and its name ends in one of {' '.join(sorted(VIDEOS))}"
        yield _NotTaken(_name_fault(entry, wanted), "sample")


def _free_name(beside: _Beside) -> str:
    """What a further reference of a video may be called, without suffix."""
    return f"{beside.video.stem}.ref{max(beside.references, default=-1) + 1}"


def _name_fault(entry: Path, wanted: str) -> Unusable:
    return Unusable("name", f"{shorten(entry.name)} is not taken: {shown(wanted)}")


def _fold(stem: str) -> str:
    """Equal for names that Windows and macOS hold for one."""
    return unicodedata.normalize("NFC", stem).casefold()


def _read_caption(path: Path) -> str | Unusable:
    try:
        check_file(path)
        with path.open(encoding=encoding_of(path)) as file:
            return file.read(_LONGEST_PROMPT)
    except Unusable as error:
        return error
    except UnicodeError as error:
        return Unusable("not readable", f"{path.name} is not UTF-8: {error}; save it as UTF-8")
    except OSError as error:
        return Unusable("not readable", f"{path.name}: {error}")
