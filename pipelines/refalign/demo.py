"""`refalign demo`: a video by the tiny model that comes with the package, offline, and pictures of how it came about.

Nothing heavy is imported before it is needed, so that `--help` answers at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refalign.files import new_file
from refalign.owner import owned_folder
from refalign.sprites import FOLDER, REFINE_FOLDER, SUBJECTS, TRIPLETS, subject_names


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
    """The folder for `demo.mp4`, and for the references beside it: `demo.png` shows them with frames of the video,
    `demo.webp` with the video itself."""
    prompt: str = "On the left one hops up and down, on the right one spins around, in a meadow."
    """A description of what happens and where. "It", or "the left one" and "the right one", hops up and down, spins
    around, grows, rises or falls. "It" also slides to the right or to the left, and "the two change places". All this
    happens in a meadow, on a beach, in the snow, at night, in a desert or in a city."""
    subjects: tuple[str, ...] = ("crowned-star", "yellow-heart")
    """The one or two subjects, from the left to the right: names that --list shows, or pictures of your own."""
    seed: int = 0
    """The seed of the noise. Another seed gives another video."""
    refine: bool = False
    """Refine pictures of figures that are wrong in one place instead, with the tiny model for that: `refine.png` in
    the output's folder shows each with its mask, the reference with the region that was found, and the result."""
    list: bool = False
    """Only show the names of the subjects, and make no video."""


def run(command: Demo) -> int:
    """
    Makes the video and the pictures, over those of an earlier call, and returns the exit code.

    Raises:
        ValueError: if a subject is neither a name nor a file.
    """
    if command.list:
        print("\n".join(subject_names()))
        return 0
    if command.refine:
        return _run_refine(command)
    from refalign.video import FPS, write_video

    if not 1 <= len(command.subjects) <= 2:
        raise ValueError(f"{len(command.subjects)} subjects are named; the tiny model was trained with one or two.")
    references = pictures_of(command.subjects)
    frames = make_frames(command, references)
    picture, moving, video = (command.output / f"demo.{kind}" for kind in ("png", "webp", "mp4"))
    # Sixty-four pixels are a stamp on a screen
    large = [frame.resize((VIDEO_SIDE, VIDEO_SIDE)) for frame in frames]
    settings = {"prompt": command.prompt, "subjects": command.subjects, "seed": command.seed}
    with owned_folder(command.output):
        with new_file(picture, overwrite=True) as file:
            draw_sheet(references, frames).save(file)
        with new_file(moving, overwrite=True) as file:
            first, *others = draw_moving(references, frames)
            first.save(file, save_all=True, append_images=others, duration=round(1000 / FPS), loop=0, quality=90)
        write_video(large, video, settings=settings, overwrite=True)
    print(f"{command.prompt}\nWrote {video}, and the references beside it: {picture} and {moving}.")
    return 0


def _run_refine(command: Demo) -> int:
    """Refines the package's pictures, and draws what was found and made."""
    picture = command.output / "refine.png"
    sheet = draw_refined(command.seed)
    with owned_folder(command.output), new_file(picture, overwrite=True) as file:
        sheet.save(file)
    print(f"Wrote {picture}: what is wrong, where the reference shows it right, and what was made of it.")
    return 0


def draw_refined(seed: int) -> "Image.Image":
    """One picture with a row for each of the package's triplets, as `refalign refine --map` draws it."""
    import numpy as np
    import torch
    from PIL import Image

    from refalign import refine

    pipeline = refine.load_refine_pipeline(str(REFINE_FOLDER), "cpu")
    rows = []
    for folder in sorted(TRIPLETS.iterdir()):
        image, mask, reference = (Image.open(folder / f"{name}.png") for name in ("image", "mask", "reference"))
        output = pipeline(image, mask, reference, generator=torch.Generator().manual_seed(seed))
        is_masked = np.asarray(mask) > 127
        rows.append(refine.draw_sheet(image, is_masked, reference, output.alignments[0], output.images[0]))
    step = rows[0].height + GAP
    sheet = Image.new("RGB", (rows[0].width, len(rows) * step - GAP), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * step))
    return sheet


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

    rows, columns = (2, SHOWN_FRAMES // 2) if len(references) > 1 else (1, SHOWN_FRAMES // 2)
    places = np.linspace(0, len(frames) - 1, rows * columns).round().astype(int)
    step = SIDE + GAP
    sheet = Image.new("RGB", ((1 + columns) * step + GAP, rows * step - GAP), "white")
    _paste(references, sheet)
    for number, place in enumerate(places):
        row, column = divmod(number, columns)
        frame = frames[place].resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(frame, ((1 + column) * step + GAP, row * step))
    return sheet


def draw_moving(references: "list[Image.Image]", frames: "list[Image.Image]") -> "list[Image.Image]":
    """For each frame a picture: the references as the model sees them, one below the other, beside the frame."""
    from PIL import Image

    height = len(references) * (SIDE + GAP) - GAP
    still = Image.new("RGB", (SIDE + 2 * GAP + height, height), "white")
    _paste(references, still)
    pictures = []
    for frame in frames:
        picture = still.copy()
        picture.paste(frame.resize((height, height), Image.Resampling.BICUBIC), (SIDE + 2 * GAP, 0))
        pictures.append(picture)
    return pictures


def _paste(references: "list[Image.Image]", sheet: "Image.Image") -> None:
    """Pastes the references, as the model sees them, one below the other at the left of a sheet."""
    from refalign.reference_images import prepare_reference_image

    for row, reference in enumerate(references):
        seen = prepare_reference_image(reference, SIDE, SIDE, cut_out=False)
        sheet.paste(seen, (0, row * (SIDE + GAP)))
