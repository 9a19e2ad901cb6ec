"""`refalign demo`: a video by the tiny model that comes with the package, offline, and a picture of how it came about.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refalign.files import new_file
from refalign.owner import owned_folder
from refalign.sprites import FOLDER, SUBJECTS, subject_names


if TYPE_CHECKING:
    from PIL import Image

SHOWN_FRAMES = 6
SIDE = 192  # the side of a frame in the picture, in pixels
GAP = 8
VIDEO_SIDE = 384


@dataclass(frozen=True)
class Demo:
    """Make a video of drawn figures, offline and in seconds, with the tiny model that comes with this package."""

    output: Path = Path("demo")
    """The folder for `demo.mp4` and for `demo.png`, which shows the references beside frames of the video."""
    prompt: str = "On the left one hops up and down, on the right one spins around, in a meadow."
    """A description of what happens and where. "It", or "the left one" and "the right one", hops up and down, spins
    around, grows, rises or falls. "It" also slides to the right or to the left, and "the two change places". All this
    happens in a meadow, on a beach, in the snow, at night, in a desert or in a city."""
    subjects: tuple[str, ...] = ("crowned-star", "yellow-heart")
    """The one or two subjects, from the left to the right: names that --list shows, or pictures of your own."""
    seed: int = 0
    """The seed of the noise. Another seed gives another video."""
    list: bool = False
    """Only show the names of the subjects, and make no video."""


def run(command: Demo) -> int:
    """
    Makes the video and the picture, over those of an earlier call, and returns the exit code.

    Raises:
        ValueError: if a subject is neither a name nor a file.
    """
    if command.list:
        print("\n".join(subject_names()))
        return 0
    from refalign.video import write_video

    if not 1 <= len(command.subjects) <= 2:
        raise ValueError(f"{len(command.subjects)} subjects are named; the tiny model was trained with one or two.")
    references = pictures_of(command.subjects)
    frames = make_frames(command, references)
    picture, video = command.output / "demo.png", command.output / "demo.mp4"
    # Sixty-four pixels are a stamp on a screen
    large = [frame.resize((VIDEO_SIDE, VIDEO_SIDE)) for frame in frames]
    settings = {"prompt": command.prompt, "subjects": command.subjects, "seed": command.seed}
    with owned_folder(command.output):
        with new_file(picture, overwrite=True) as file:
            draw_sheet(references, frames).save(file)
        write_video(large, video, settings=settings, overwrite=True)
    print(f"{command.prompt}\nWrote {video} and {picture}, the references beside frames of it.")
    return 0


def pictures_of(subjects: Iterable[str]) -> "list[Image.Image]":
    """The subjects by their names, or pictures of the user's own; ValueError for what is neither."""
    return list(map(_picture_of, subjects))


def _picture_of(subject: str) -> "Image.Image":
    """A subject by its name, or a picture of the user's own."""
    from refalign.reference_images import load_reference_image

    if subject in subject_names():
        return load_reference_image(SUBJECTS / f"{subject}.png")
    if not Path(subject).is_file():
        raise ValueError(f"{subject} is neither a file nor one of the subjects: {', '.join(subject_names())}.")
    return load_reference_image(subject)


def make_frames(command: Demo, references: "list[Image.Image]", model: Path = FOLDER) -> "list[Image.Image]":
    """The frames that a model of the small world makes of references and the prompt."""
    import torch

    from refalign import RefAlignWanPipeline

    pipeline = RefAlignWanPipeline.from_pretrained(model)
    generator = torch.Generator().manual_seed(command.seed)
    return pipeline(command.prompt, reference_images=references, generator=generator, output_type="pil").frames[0]


def draw_sheet(references: "list[Image.Image]", frames: "list[Image.Image]") -> "Image.Image":
    """One picture: the references as the model sees them, one below the other, beside frames of the video."""
    import numpy as np
    from PIL import Image

    from refalign.reference_images import prepare_reference_image

    rows, columns = (2, SHOWN_FRAMES // 2) if len(references) > 1 else (1, SHOWN_FRAMES // 2)
    places = np.linspace(0, len(frames) - 1, rows * columns).round().astype(int)
    step = SIDE + GAP
    sheet = Image.new("RGB", ((1 + columns) * step + GAP, rows * step - GAP), "white")
    for row, reference in enumerate(references):
        seen = prepare_reference_image(reference, SIDE, SIDE, cut_out=False)
        sheet.paste(seen, (0, row * step))
    for number, place in enumerate(places):
        row, column = divmod(number, columns)
        frame = frames[place].resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(frame, ((1 + column) * step + GAP, row * step))
    return sheet
