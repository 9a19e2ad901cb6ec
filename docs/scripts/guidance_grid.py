"""Makes docs/guidance.png: one seed, two figures and a sentence under every pair of guidance scales.

    python docs/scripts/guidance_grid.py docs/guidance.png

It takes the tiny model that comes with the package, offline, a minute or two on a CPU. A cell is one frame of a video.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from refalign import RefAlignWanPipeline, load_reference_image, prepare_reference_image
from refalign.sprites import FOLDER, SUBJECTS


PROMPT = "On the left one hops up and down, on the right one spins around, in a meadow."
SUBJECT_NAMES = ("crowned-star", "yellow-heart")
SEED = 0
TEXT_SCALES = (1.0, 2.0, 3.0, 5.0, 7.5)
IMAGE_SCALES = (1.0, 2.0, 3.0, 5.0)
FRAME = 4  # of 17: the left one is in the air, the right one has turned by a quarter
SIDE = 128  # of a frame in the picture, in pixels
GAP = 6
MARGIN = 120  # for the scales' names and the references


def main(output: Path) -> None:
    pipeline = RefAlignWanPipeline.from_pretrained(FOLDER)
    references = [load_reference_image(SUBJECTS / f"{name}.png") for name in SUBJECT_NAMES]
    rows = []
    for image in IMAGE_SCALES:
        rows.append([generate(pipeline, references, text, image) for text in TEXT_SCALES])
    draw(references, rows).save(output, optimize=True)


def generate(
    pipeline: RefAlignWanPipeline, references: list[Image.Image], text_scale: float, image_scale: float
) -> Image.Image:
    """The shown frame of a video with these scales. Everything else is the same for all."""
    video = pipeline(
        PROMPT,
        reference_images=references,
        guidance_scale=text_scale,
        image_guidance_scale=image_scale,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pil",
    ).frames[0]
    return video[FRAME].resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def draw(references: list[Image.Image], rows: list[list[Image.Image]]) -> Image.Image:
    """The frames with a scale at each row and column, and the references in the corner."""
    step, head = SIDE + GAP, MARGIN // 2
    sheet = Image.new("RGB", (MARGIN + len(TEXT_SCALES) * step, head + len(IMAGE_SCALES) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for number, reference in enumerate(references):
        seen = prepare_reference_image(reference, head - GAP, head - GAP, cut_out=False)
        sheet.paste(seen, (number * head, 0))
    for column, scale in enumerate(TEXT_SCALES):
        write(pen, (MARGIN + column * step + SIDE // 2, head // 2), f"guidance\n{scale:g}")
    for row, scale in enumerate(IMAGE_SCALES):
        write(pen, (MARGIN // 2, head + row * step + SIDE // 2), f"image\nguidance\n{scale:g}")
        for column, frame in enumerate(rows[row]):
            sheet.paste(frame, (MARGIN + column * step, head + row * step))
    return sheet


def write(pen: ImageDraw.ImageDraw, centre: tuple[int, int], text: str) -> None:
    pen.multiline_text(centre, text, fill="black", font=ImageFont.load_default(17), anchor="mm", align="center")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
