"""What a visitor of the app has: references, checked as they come in, and a folder that goes with the visit."""

import importlib.util
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from refalign.privacy import ABSOLUTE_PATH
from refalign.reference_images import FORMATS, load_reference_image, prepare_reference_image
from refalign.sprites import SUBJECTS


MAX_REFERENCES = 4
MAX_MEGABYTES = 20
MAX_MEGAPIXELS = 50


@dataclass
class Reference:
    """A reference image of a visitor."""

    path: Path
    has_alpha: bool
    """Whether the image is cut out already: some pixel is transparent."""
    cut_out: bool = False
    _seen: tuple[tuple[int, int, bool, int | None], Image.Image] | None = None

    def seen(self, height: int, width: int, long_edge: int | None = None) -> Image.Image:
        """The image as the model sees it, as [`prepare_reference_image`] makes it. It is kept until a setting changes,
        because cutting out takes seconds."""
        settings = (height, width, self.cut_out, long_edge)
        if self._seen is None or self._seen[0] != settings:
            with naming_file(self.path):
                self._seen = settings, prepare_reference_image(self.path, *settings)
        return self._seen[1]


@dataclass
class Visit:
    """The references of a visitor in their order, in a folder of their own below `root`."""

    root: Path
    references: list[Reference] = field(default_factory=list)
    _folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Its name cannot be guessed; nothing below it is served."""
        if self._folder is None or not self._folder.is_dir():
            self._folder = self.root / secrets.token_hex(16)
            self._folder.mkdir(parents=True)
        return self._folder

    def add(self, file: str | Path) -> None:
        """
        Adds a copy of a picture, cut out if it is to be had for nothing and finds a subject.

        Raises:
            ValueError: if it is not an image, is too large, or there are `MAX_REFERENCES` already.
        """
        file = Path(file)
        if len(self.references) >= MAX_REFERENCES:
            raise ValueError(f"{file.name} was left out: there can be {MAX_REFERENCES} references. Remove one first.")
        with naming_file(file):
            check_upload(file)
            image = load_reference_image(file)
        path = self.folder / secrets.token_hex(4) / file.name
        path.parent.mkdir()
        shutil.copyfile(file, path)
        reference = Reference(path, has_alpha=image.mode == "RGBA")
        reference.cut_out = reference.has_alpha or _is_cut_out_by_default(image)
        self.references.append(reference)

    def take_subjects(self, names: Sequence[str]) -> None:
        """Puts the embedded pictures of these names in place of the references."""
        while self.references:
            self.remove(0)
        for name in names:
            self.add(SUBJECTS / f"{name}.png")

    def move_back(self, place: int) -> None:
        """Lets the reference at a place, from 1 on, and the one before it change places."""
        before, moved = self.references[place - 1], self.references[place]
        self.references[place - 1 : place + 1] = [moved, before]

    def remove(self, place: int) -> None:
        """Removes the reference at a place, and its file."""
        shutil.rmtree(self.references.pop(place).path.parent)

    def seen(self, height: int, width: int, long_edge: int | None = None) -> list[Image.Image]:
        """All references as the model sees them."""
        return [reference.seen(height, width, long_edge) for reference in self.references]

    @property
    def stop_file(self) -> Path:
        """Its being there asks the visitor's video to stop. A file, because ZeroGPU computes in another process."""
        return self.folder / "stop"

    def close(self) -> None:
        """Removes all files of the visit."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def check_upload(file: Path) -> None:
    """Raises ValueError for a file that is larger than visitors may send, or not an image of a known format. No pixel
    is decoded."""
    size = file.stat().st_size
    if size > MAX_MEGABYTES * 1e6:
        raise ValueError(f"{file.name} has {size / 1e6:.0f} MB; {MAX_MEGABYTES} are allowed. Make it smaller.")
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        with Image.open(file, formats=known) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise ValueError(f"{file.name} is not an image. Take a PNG, JPEG or WebP file.") from None
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise ValueError(
            f"{file.name} has {width}x{height} pixels; {MAX_MEGAPIXELS} million are allowed. Make it smaller."
        )


def can_cut_out() -> bool:
    """Whether what removes backgrounds is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("rembg", "onnxruntime"))


def _is_cut_out_by_default(image: Image.Image) -> bool:
    """Whether "auto" would cut an opaque image out."""
    if not can_cut_out():
        return False
    whole = prepare_reference_image(image, image.height, image.width, cut_out=False)
    return prepare_reference_image(image, image.height, image.width, cut_out="auto") != whole


@contextmanager
def naming_file(file: Path) -> Iterator[None]:
    """Within it, errors name a file without its folders."""
    try:
        yield
    except ValueError as error:
        raise ValueError(without_paths(str(error).replace(str(file), file.name))) from error


def without_paths(text: str) -> str:
    """A text for visitors: of paths of this machine, the last name alone."""
    return ABSOLUTE_PATH.sub(lambda match: Path(match[0]).name, text)
