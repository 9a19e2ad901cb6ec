"""What must not get out: with a model tokens, keys, paths of this machine, places, and files behind links; to a
terminal or log what commands it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refalign.credentials import find_credential
from refalign.files import files_below, open_safetensors, read_json


ABSOLUTE_PATH = re.compile(
    r"((?<![\w.:/])|(?<=file://))/(home|root|Users|mnt|data|workspace|work|tmp|var|scratch|opt)/[^\s\"'`)]+"
    r"|(?<![\w.:/])[A-Za-z]:(\\\\?|/)\w+"
)
WHOLE_PATH = re.compile(r"^/[^/\s]+/\S+$", re.MULTILINE)  # below whatever root; a whole string of a JSON file
IMAGES = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
MAKER_NOTE = 0x927C  # of cameras, in EXIF: not text


# Commands of a terminal, ends of lines, characters that turn the direction of text, and bytes that are no text
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
URL_USER = re.compile(r"(?<=://)[^\s/@]+@")


def shown(text: object) -> str:
    """A text as a terminal or a log may have it: on one line, control characters escaped, no user in a URL."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], URL_USER.sub("", str(text)))


def source_name(source: str) -> str:
    """A reference, model or LoRA as others may read of it: no folders of this machine, no secrets of a URL."""
    from refalign.reference_images import redacted_url

    if "://" in source:
        return redacted_url(source)
    return Path(source).name if Path(source).exists() else source


def check_nothing_private(folder: Path) -> None:
    """
    Raises ValueError for a token, a key or an absolute path in a repo's text files, or in the metadata of its weights,
    images and videos, and for the place where one of these was taken. It names the file and, of a token, only the
    beginning.
    """
    for file in files_below(folder):
        name = file.relative_to(folder).as_posix()
        text = _text(file, name)
        if found := find_credential(text):
            raise ValueError(f"{name} holds what looks like a token or key ({found}). Remove it before pushing.")
        if file.name in ("tokenizer.json", "vocab.json"):  # vocabularies hold slashes of every kind, and no paths
            continue
        found = ABSOLUTE_PATH.search(text)
        if file.suffix in (".json", ".safetensors"):
            found = found or WHOLE_PATH.search(text)
        if found:
            raise ValueError(f"{name} holds a path of this machine ({found[0]}). Remove it before pushing.")


def check_links(folder: Path) -> None:
    """Raises ValueError for a link that leads out of the folder, unless a snapshot in the Hub's cache is so linked."""
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append((folder.parent.parent / "blobs").resolve())
    for path in sorted(folder.rglob("*")):
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
            raise ValueError(f"{path} is a link to {target}, outside the folder. Put the file itself there.")


def _text(file: Path, name: str) -> str:
    """What a file says in words."""
    if file.suffix == ".model":  # SentencePiece's vocabularies
        return ""
    if file.suffix == ".safetensors":
        with open_safetensors(file) as opened:
            return "\n".join(_strings(opened.metadata()))
    if file.suffix == ".json":
        return "\n".join(_strings(read_json(file, object)))
    if file.suffix in IMAGES or file.suffix == ".mp4":
        read = _video_metadata if file.suffix == ".mp4" else _image_metadata
        try:
            metadata = read(file)
        except Exception as error:  # decoders raise whatever they like
            raise ValueError(f"{name} cannot be read: {error}. Make it anew, or remove it.") from error
        if any("location" in key.lower() or "gps" in key.lower() for key in metadata):
            raise ValueError(f"{name} says where it was taken. Remove its metadata before pushing.")
        return "\n".join(metadata.values()).replace("\0", "")  # of UTF-16 too
    return file.read_text("utf-8", errors="replace")


def _image_metadata(file: Path) -> dict[str, str]:
    from PIL import ExifTags, Image

    with Image.open(file, formats=[IMAGES[file.suffix]]) as image:
        image.load()  # PNG may have text behind its pixels
        exif = image.getexif()
        found = {"GPS": "there"} if exif.get_ifd(ExifTags.IFD.GPSInfo) else {}
        tags = {**dict(exif), **exif.get_ifd(ExifTags.IFD.Exif)}
        tags.pop(MAKER_NOTE, None)
        info = {key: value for key, value in image.info.items() if key not in ("icc_profile", "exif")}
        for key, value in {**info, **tags}.items():
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            if isinstance(value, str):
                found[f"tag {key}"] = value
    return found


def _video_metadata(file: Path) -> dict[str, str]:
    from refalign.video import open_container

    with open_container(file) as container:
        found = dict(container.metadata)
        for stream in container.streams:
            found |= {f"{stream.index}:{key}": value for key, value in stream.metadata.items()}
        if not container.streams.video or next(container.decode(video=0), None) is None:
            raise ValueError("it shows no frame")  # half a file
    return found


def _strings(content: Any) -> Iterator[str]:
    """All strings in a JSON value, keys too, also with their values."""
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, str):
                yield f"{key}={value}"
        content = [*content, *content.values()]
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _strings(part)
