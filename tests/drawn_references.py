"""Reference sets drawn by code: a face, a pet and a place each, so that tests need no photographs.

`python -m tests.drawn_references FOLDER` writes them as FOLDER/set1, FOLDER/set2, ...
"""

import colorsys
import sys
from pathlib import Path

from PIL import Image, ImageDraw


def _color(hue: float, lightness: float = 0.6, saturation: float = 0.7) -> tuple[int, int, int]:
    return tuple(round(255 * channel) for channel in colorsys.hls_to_rgb(hue % 1, lightness, saturation))


def draw_face(hue: float) -> Image.Image:
    """A person on a plain background, upright, as a photograph would be: RGB, 320x430."""
    image = Image.new("RGB", (320, 430), (235, 235, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 330, 260, 430), fill=_color(hue))  # shoulders
    draw.ellipse((75, 40, 245, 220), fill=_color(hue + 0.5, 0.25))  # hair
    draw.ellipse((85, 80, 235, 340), fill=_color(0.07, 0.75, 0.5))
    for x in (125, 195):
        draw.ellipse((x - 14, 180, x + 14, 208), fill="white")
        draw.ellipse((x - 7, 187, x + 7, 201), fill=_color(hue, 0.3))
    draw.line((160, 200, 152, 255, 166, 258), fill=(170, 110, 80), width=4)
    draw.arc((125, 250, 195, 305), 20, 160, fill=(170, 40, 50), width=6)
    return image


def draw_pet(hue: float) -> Image.Image:
    """A round animal, cut out: RGBA, 512x512, transparent around it."""
    image = Image.new("RGBA", (512, 512), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.polygon([(130, 170), (110, 30), (230, 120)], fill=_color(hue, 0.4))
    draw.polygon([(382, 170), (402, 30), (282, 120)], fill=_color(hue, 0.4))
    draw.ellipse((90, 90, 422, 470), fill=_color(hue))
    draw.ellipse((170, 260, 342, 450), fill=_color(hue, 0.85))
    for x in (195, 317):
        draw.ellipse((x - 24, 190, x + 24, 238), fill="black")
        draw.ellipse((x - 14, 196, x - 2, 208), fill="white")
    draw.polygon([(238, 258), (274, 258), (256, 284)], fill=(60, 30, 40))
    return image


def draw_place(hue: float) -> Image.Image:
    """Hills under a sky: RGB, 768x512."""
    image = Image.new("RGB", (768, 512), _color(0.55, 0.8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((600, 40, 690, 130), fill=(255, 230, 120))
    for number, top in enumerate((250, 310, 380)):
        left = 220 * number - 200
        draw.ellipse((left, top, left + 900, top + 600), fill=_color(hue, 0.55 - 0.1 * number, 0.5))
    for x in range(60, 768, 140):
        draw.rectangle((x, 400, x + 12, 470), fill=(100, 70, 40))
        draw.ellipse((x - 34, 330, x + 46, 420), fill=_color(0.33, 0.3))
    return image


def write_reference_sets(folder: Path, count: int = 4) -> list[Path]:
    """Writes `count` sets as `set1/face.jpg`, `set1/pet.png`, `set1/place.jpg`, ... and returns their folders."""
    folders = []
    for number in range(count):
        hue = 0.02 + number / count
        target = folder / f"set{number + 1}"
        target.mkdir(parents=True, exist_ok=True)
        draw_face(hue).save(target / "face.jpg")
        draw_pet(hue + 0.1).save(target / "pet.png")
        draw_place(0.25 + hue / 4).save(target / "place.jpg")
        folders.append(target)
    return folders


if __name__ == "__main__":
    write_reference_sets(Path(sys.argv[1]))
