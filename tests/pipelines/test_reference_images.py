"""Reference images: every source and mode arrives upright, on white, letterboxed to the authors' very bytes."""

import asyncio
import base64
import contextlib
import http.server
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from refalign import reference_images
from refalign.reference_images import (
    letterbox,
    load_reference_image,
    prepare_reference_image,
    prepare_reference_images,
)


GOLDEN = np.load(Path(__file__).parent.parent / "fixtures" / "reference_letterbox.npz")
WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
SIDES = st.integers(1, 60)


def gradient(width=6, height=4):
    """An RGB image in which no two pixels are equal and no symmetry holds."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 40, y * 60, x * 7 + y * 31], axis=-1).astype(np.uint8))


def png(width, height, depth, color_type, rows, *chunks):
    """A PNG by hand, for the headers and chunks that PIL does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    body = b"".join(chunk(*each) for each in chunks) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def assert_same(image, expected):
    assert (image.mode, image.size) == (expected.mode, expected.size)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


# Letterbox


@pytest.mark.parametrize("case", range(5))
def test_letterbox_equals_the_authors_bytes(case):
    expected = GOLDEN[f"case{case}.output"]
    output = letterbox(Image.fromarray(GOLDEN[f"case{case}.input"]), *expected.shape[:2])
    np.testing.assert_array_equal(np.asarray(output), expected)


@settings(deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_letterbox_centres_the_whole_image_on_white(image_width, image_height, width, height):
    output = np.asarray(letterbox(Image.new("RGB", (image_width, image_height)), height, width))
    assert output.shape == (height, width, 3)
    dark = (output == 0).all(axis=2)
    assert (output[~dark] == 255).all()
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    assert dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    for found, side in ((rows, height), (columns, width)):
        before, after = found[0], side - 1 - found[-1]
        assert after - before in (0, 1)
    assert len(rows) == height or len(columns) == width
    # The aspect ratio, to less than the pixel that flooring takes; a side is never thinner than one pixel
    scale = min(width / image_width, height / image_height)
    assert len(columns) == 1 or -1e-6 <= image_width * scale - len(columns) < 1 + 1e-6
    assert len(rows) == 1 or -1e-6 <= image_height * scale - len(rows) < 1 + 1e-6


@settings(deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_letterbox_leaves_its_own_output_as_it_is(image_width, image_height, width, height):
    once = letterbox(gradient(image_width, image_height), height, width)
    assert_same(letterbox(once, height, width), once)


def test_letterbox_meets_the_fitting_side_where_floats_fall_short():
    assert int(22 * (480 / 22)) == 479
    output = np.asarray(letterbox(Image.new("RGB", (1, 22)), 480, 832))
    assert (output == 0).all(axis=2).any(axis=1).sum() == 480


def test_letterbox_refuses_alpha_instead_of_dropping_it():
    with pytest.raises(ValueError, match="RGBA"):
        letterbox(Image.new("RGBA", (4, 4)), 8, 8)


@pytest.mark.parametrize("value", [0, -16, 48.0, "48", None, True])
@pytest.mark.parametrize("name", ["height", "width"])
def test_sizes_must_be_positive_ints(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{value!r}"):
        prepare_reference_image(gradient(), **({"height": 16, "width": 16} | {name: value}))


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_become_rgb(mode):
    image = gradient().convert(mode)
    assert_same(load_reference_image(image), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_modes_with_alpha_become_rgba(mode):
    image = gradient().convert("L" if mode != "RGBA" else "RGB").convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert_same(load_reference_image(image), image.convert("RGBA"))


@pytest.mark.parametrize(("straight", "premultiplied"), [("LA", "La"), ("RGBA", "RGBa")])
def test_premultiplied_modes_are_divided_by_their_alpha(straight, premultiplied):
    image = Image.new(straight, (2, 2), 0)
    image.putalpha(128)
    image.paste(tuple([200] * (len(straight) - 1) + [128]), (0, 0, 2, 2))
    output = load_reference_image(image.convert(premultiplied))
    np.testing.assert_allclose(np.asarray(output), [[[200, 200, 200, 128]] * 2] * 2, atol=1)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_that_hides_nothing_is_dropped(mode):
    assert load_reference_image(gradient().convert(mode)).mode == "RGB"


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_transparency_becomes_alpha(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    output = load_reference_image(Image.open(io.BytesIO(encoded(image, transparency=transparency))))
    assert np.asarray(output).tolist() == [[[*RED, 255], [*GREEN, 0]]]


@pytest.mark.parametrize(("color", "mode"), [(RED, "RGB"), (0, "L")])
def test_a_transparent_color_becomes_alpha(color, mode):
    image = Image.new(mode, (2, 1), color)
    image.putpixel((1, 0), WHITE if mode == "RGB" else 255)
    output = load_reference_image(Image.open(io.BytesIO(encoded(image, transparency=color))))
    assert np.asarray(output)[0, :, 3].tolist() == [0, 255]


def test_lab_becomes_rgb():
    output = load_reference_image(Image.new("LAB", (1, 1), (138, 209, 198)))  # sRGB red; a, b offset by 128
    np.testing.assert_allclose(np.asarray(output)[0, 0], RED, atol=6)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_16_bit_gray_is_scaled_not_clipped(mode):
    image = Image.new(mode, (3, 1))
    for x, value in enumerate([0, 257 * 100, 65535]):
        image.putpixel((x, 0), value)
    assert np.asarray(load_reference_image(image))[0, :, 0].tolist() == [0, 100, 255]


def test_16_bit_png_as_pil_writes_it(tmp_path):
    values = np.array([[0, 257, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    output = load_reference_image(tmp_path / "deep.png")
    assert np.asarray(output).tolist() == [[[value // 257] * 3 for value in values[0].tolist()]]


def test_16_bit_png_with_a_transparent_gray():
    rows = b"\0" + struct.pack(">2H", 0x1234, 0x1235)
    output = load_reference_image(Image.open(io.BytesIO(png(2, 1, 16, 0, rows, (b"tRNS", b"\x12\x34")))))
    assert np.asarray(output).tolist() == [[[18, 18, 18, 0], [18, 18, 18, 255]]]


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_images_reach_white(white):
    image = Image.fromarray(np.array([[0, white / 5, white]], dtype=np.float32))
    assert np.asarray(load_reference_image(image))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize(("mode", "value"), [("I", -1), ("I", 65536), ("F", -0.5), ("F", 256.0), ("F", float("nan"))])
def test_gray_out_of_range_is_refused(mode, value):
    with pytest.raises(ValueError, match=f"{value:g}.*instead of"):
        load_reference_image(Image.new(mode, (1, 1), value))


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")  # PIL writes Adobe's inverted CMYK
    np.testing.assert_allclose(np.asarray(load_reference_image(tmp_path / "red.jpg"))[8, 8], RED, atol=4)


# Orientation and frames

STORED_AS = {  # how a camera stores an upright scene under each orientation (EXIF 2.3, section 4.6.4)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    stored = gradient()
    if orientation in STORED_AS:
        stored = stored.transpose(STORED_AS[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert_same(load_reference_image(tmp_path / "photo.png"), gradient())


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_an_animation_gives_its_first_frame_and_stays_where_it_was(format):
    first, second, third = (Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE))
    options = {"lossless": True} if format == "WEBP" else {}
    image = Image.open(io.BytesIO(encoded(first, format, save_all=True, append_images=[second, third], **options)))
    image.seek(1)
    assert_same(load_reference_image(image), first)
    assert image.tell() == 1
    assert_same(image.convert("RGB"), second)


def test_the_callers_image_is_neither_changed_nor_returned():
    image = gradient()
    image.getexif()[0x0112] = 6
    before = image.copy()
    output = load_reference_image(image)
    output.paste(RED, (0, 0, *output.size))
    assert_same(image, before)
    assert image.getexif()[0x0112] == 6


def exif_of(*entries):
    """EXIF data by hand: orientation 6, and entries that PIL would not write, each (tag, type, count, value)."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), *entries]
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


DAMAGED_EXIF = {
    "text where a number belongs": (exif_of((0x011A, 2, 4, b"abc\0")), (4, 6)),
    "a value outside the file": (exif_of((0x010F, 2, 200, b"\xff\xff\xff\0")), (4, 6)),
    "an unknown type": (exif_of((0x9999, 77, 1, bytes(4))), (4, 6)),
    "no header": (b"Exif\0\0" + bytes(range(40)), (6, 4)),
    "nothing": (b"Exif\0\0", (6, 4)),
}


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("name", DAMAGED_EXIF)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_an_image_readable_and_upright_where_it_says_how(name, format):
    exif, size = DAMAGED_EXIF[name]
    image = encoded(gradient(), format, exif=exif)
    assert load_reference_image(Image.open(io.BytesIO(image))).size == size


def test_exif_that_cannot_be_read_is_told_with_the_images_name(tmp_path, caplog):
    gradient().save(tmp_path / "photo.png", exif=DAMAGED_EXIF["no header"][0])
    load_reference_image(tmp_path / "photo.png")
    assert "photo.png has damaged EXIF data, so it is taken to be upright" in caplog.text


def test_an_image_that_was_read_is_read_again_as_it_is():
    image = Image.open(io.BytesIO(encoded(gradient(), exif=exif_of(), icc_profile=swapped_profile())))
    once = load_reference_image(image)
    assert_same(load_reference_image(once), once)


# Colours


def swapped_profile():
    """An ICC profile of a colour space that is sRGB with red and blue swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_colors_are_converted_from_the_images_profile_to_srgb(mode, format):
    image = Image.new("RGB", (8, 8), (204, 51, 0)).convert(mode)
    opened = Image.open(io.BytesIO(encoded(image, format, icc_profile=swapped_profile(), lossless=True)))
    np.testing.assert_allclose(np.asarray(load_reference_image(opened))[0, 0], (0, 51, 204), atol=2)


def test_transparency_outlives_the_conversion():
    image = Image.new("RGBA", (1, 1), (*RED, 100))
    output = load_reference_image(Image.open(io.BytesIO(encoded(image, icc_profile=swapped_profile()))))
    np.testing.assert_allclose(np.asarray(output), [[[*BLUE, 100]]], atol=2)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_srgbs_own_profile_changes_no_byte(mode):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = gradient().convert(mode)
    opened = Image.open(io.BytesIO(encoded(image, icc_profile=profile)))
    assert_same(load_reference_image(opened), image.convert("RGB"))


@pytest.mark.parametrize(("mode", "profile"), [("RGB", b"no profile"), ("CMYK", swapped_profile())])
def test_a_profile_that_cannot_be_used_is_told_and_passed_over(mode, profile, tmp_path, caplog):
    image = gradient().convert(mode)
    image.save(tmp_path / "photo.tiff", icc_profile=profile)
    assert_same(load_reference_image(tmp_path / "photo.tiff"), image.convert("RGB"))
    assert "photo.tiff has an ICC profile that cannot be used" in caplog.text


def test_16_bit_rgb_with_a_transparent_color():
    color = struct.pack(">3H", 0xC812, 0x4034, 0x2056)
    image = Image.open(io.BytesIO(png(1, 1, 16, 2, b"\0" + color, (b"tRNS", color))))
    assert np.asarray(load_reference_image(image)).tolist() == [[[200, 64, 32, 0]]]


# Arrays and tensors


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
def test_arrays_of_each_dtype(channels, dtype):
    expected = np.arange(2 * 3 * channels, dtype=np.uint8).reshape(2, 3, channels) * 9
    scale = {"uint8": 1, "uint16": 257}.get(dtype, 1 / 255)
    output = np.asarray(load_reference_image((expected * np.float64(scale)).astype(dtype)))
    np.testing.assert_array_equal(output, np.repeat(expected, 3, axis=2) if channels == 1 else expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.bfloat16, torch.float16, torch.float32])
def test_tensors_of_each_dtype(dtype):
    white = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    tensor = torch.zeros(3, 2, 5).index_fill_(0, torch.tensor([0]), white).to(dtype)
    assert_same(load_reference_image(tensor), Image.new("RGB", (5, 2), RED))


def test_a_tensor_that_requires_grad():
    assert_same(load_reference_image(torch.ones(2, 5, requires_grad=True)), Image.new("RGB", (5, 2), WHITE))


def test_big_endian_and_strided_arrays():
    values = np.asarray(gradient())[::-1, ::2]
    output = load_reference_image(values.astype(">u2") * 257)
    np.testing.assert_array_equal(np.asarray(output), values)


@pytest.mark.parametrize("values", [[-0.01, 1], [0, 1.5], [0, float("nan")], [0, float("inf")]])
def test_floats_outside_0_to_1_are_refused_with_their_range(values):
    with pytest.raises(ValueError, match=r"values span \S+\.\.\S+ instead of 0\.\.1"):
        load_reference_image(np.array([values]))


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "object"])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=dtype):
        load_reference_image(np.zeros((2, 2), dtype))


@pytest.mark.parametrize(
    "image",
    [np.zeros((2, 4, 4, 3)), np.zeros((3, 4, 5)), np.zeros(4), torch.zeros(2, 3, 4, 4), torch.zeros(5, 4, 3)],
    ids=lambda image: f"{type(image).__name__}{tuple(image.shape)}",
)
def test_other_shapes_are_refused_with_the_shape(image):
    with pytest.raises(ValueError, match=r"shape \(.*several images as a list") as error:
        load_reference_image(image)
    assert str(tuple(image.shape)) in str(error.value)


# Files


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_path(tmp_path, as_type):
    gradient().save(tmp_path / "photo.png")
    assert_same(load_reference_image(as_type(tmp_path / "photo.png")), gradient())


def write_bad_file(path, kind):
    whole = encoded(Image.effect_noise((64, 64), 50))
    contents = {"empty": b"", "text": b"not an image", "truncated": whole[: len(whole) // 2]}
    contents["damaged"] = whole[:60] + bytes(20) + whole[80:]
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(contents[kind])


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "text", "truncated", "damaged"])
def test_a_bad_file_is_named(tmp_path, kind):
    write_bad_file(tmp_path / "photo.png", kind)
    with pytest.raises(ValueError, match=r"photo\.png (cannot be read|does not exist)"):
        load_reference_image(tmp_path / "photo.png")


def write_cut_jpeg(path, left_out, mode="RGB", **options):
    """A JPEG of noise without its last bytes, or that share of them; returns it whole."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)).convert(mode)
    data = encoded(image, "JPEG", **options)
    path.write_bytes(data[: -left_out if left_out >= 1 else -int(len(data) * left_out)])
    return data


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("left_out", [2, 40, 0.05])
def test_a_jpeg_without_its_last_bytes_is_shown_as_viewers_do_and_told(tmp_path, caplog, left_out, mode):
    whole = write_cut_jpeg(tmp_path / "photo.jpg", left_out, mode)
    image = load_reference_image(tmp_path / "photo.jpg")
    expected = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))
    assert np.array_equal(np.asarray(image)[:360], expected[:360])
    rows = int(re.search(r"photo\.jpg is cut short: (\d+) of its 400 rows are missing", caplog.text)[1])
    assert rows <= 40 and (rows == 0) == (left_out == 2)
    assert_same(image, load_reference_image(Image.open(tmp_path / "photo.jpg")))


@pytest.mark.parametrize("left_out", [0.2, 0.5, 0.9])
def test_a_jpeg_that_lacks_more_is_refused(tmp_path, left_out):
    write_cut_jpeg(tmp_path / "photo.jpg", left_out)
    with pytest.raises(ValueError, match=r"photo\.jpg cannot be read: image file is truncated"):
        load_reference_image(tmp_path / "photo.jpg")


def test_a_progressive_jpeg_may_lack_its_mark_of_the_end_alone(tmp_path, caplog):
    write_cut_jpeg(tmp_path / "photo.jpg", 2, progressive=True)
    load_reference_image(tmp_path / "photo.jpg")
    assert "0 of its 400 rows" in caplog.text
    write_cut_jpeg(tmp_path / "photo.jpg", 0.05, progressive=True)
    with pytest.raises(ValueError, match="truncated"):
        load_reference_image(tmp_path / "photo.jpg")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def test_a_format_for_which_pil_starts_a_program_is_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(EPS)
    with pytest.raises(ValueError, match=r"photo\.png cannot be read: the format is unknown, none of PNG, JPEG"):
        load_reference_image(tmp_path / "photo.png")


def test_such_a_format_handed_over_lazily_is_refused_before_it_is_decoded():
    with pytest.raises(ValueError, match="its format is EPS, not one of PNG"):
        load_reference_image(Image.open(io.BytesIO(EPS)))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"photo\.png is a pipe"):
        load_reference_image(tmp_path / "photo.png")


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 4)), np.zeros((4, 0, 3)), torch.zeros(3, 0, 0)], ids=type)
def test_an_image_without_pixels_is_refused(image):
    with pytest.raises(ValueError, match="holds nothing"):
        load_reference_image(image)


@pytest.mark.parametrize("image", [None, 3, b"bytes", [Image.new("RGB", (1, 1))], io.StringIO()], ids=type)
def test_other_types_are_refused_by_name(image):
    with pytest.raises(ValueError, match=type(image).__name__):
        load_reference_image(image)


@pytest.mark.parametrize("path", ["C:\\photos\\cat.png", "C:/photos/cat.png", "cat:1.png"])
def test_a_colon_does_not_make_a_url(path):
    with pytest.raises(ValueError, match="does not exist"):
        load_reference_image(path)


# Decompression bombs


def test_a_bomb_in_a_file_is_refused(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, 2, b""))
    with pytest.raises(ValueError, match=r"bomb\.png has more pixels than are safe.*3600000000 pixels"):
        load_reference_image(tmp_path / "bomb.png")


def test_a_bomb_handed_over_lazily_is_refused_before_it_is_decoded(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        bomb = Image.open(io.BytesIO(png(60_000, 60_000, 8, 2, b"")))
    with pytest.raises(ValueError, match="60000x60000 pixels, more than"):
        load_reference_image(bomb)


@pytest.mark.parametrize("size", [(1, 170_000_000), (65_536, 1)])
def test_a_side_too_long_is_refused_before_it_is_decoded(tmp_path, size):
    (tmp_path / "line.png").write_bytes(png(*size, 8, 0, b""))
    with pytest.raises(ValueError, match=rf"line\.png .*{size[0]}x{size[1]} pixels, but a side may have 65535"):
        load_reference_image(tmp_path / "line.png")


@pytest.mark.parametrize("image", [Image.new("RGB", (11, 10)), np.zeros((11, 10, 3))], ids=type)
def test_too_many_pixels_in_memory_are_refused(monkeypatch, image):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match="more than the 100 that are safe"):
        load_reference_image(image)


def test_a_large_image_is_read_without_a_warning(tmp_path, monkeypatch):
    gradient(10, 10).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_reference_image(tmp_path / "large.png").size == (10, 10)


# URLs: a real server on 127.0.0.1


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    photo = encoded(gradient())

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, first):
        self.wfile.write(first)
        with contextlib.suppress(OSError):
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        self.close_connection = True

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path == "/photo.png":
            self.answer(body=self.photo)
        elif path == "/long":
            self.answer(**{"Content-Length": str(10**9)})
        elif path == "/endless":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(5000))
            self.close_connection = True
        elif path == "/cut":
            self.answer(body=self.photo[:-40], **{"Content-Length": str(len(self.photo))})
        elif path.startswith("/again/"):
            left = int(path.removeprefix("/again/"))
            self.answer(302, Location=f"/again/{left - 1}" if left > 1 else "/photo.png")
        elif path == "/to":
            self.answer(301, Location=self.path.partition("?")[2])
        elif path == "/drip-header":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        elif path == "/drip-body":
            self.drip(b"HTTP/1.1 200 OK\r\n\r\n" + self.photo)
        elif path == "/garbage":
            self.wfile.write(b"\x00 not HTTP\r\n")
            self.close_connection = True
        else:
            self.answer(404)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def running_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running_server, monkeypatch):
    """Its address, on a machine where 127.0.0.1 passes for public."""
    running_server.requests.clear()
    is_public = reference_images._is_public
    monkeypatch.setattr(reference_images, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))
    return f"http://127.0.0.1:{running_server.server_port}"


def test_a_url(server):
    assert_same(load_reference_image(f"{server}/photo.png"), gradient())


def test_a_url_is_recognised_in_capitals(server):
    assert_same(load_reference_image(f"{server}/photo.png".replace("http", "HTTP")), gradient())


def test_a_url_with_spaces_and_accents_is_quoted(server, running_server):
    with pytest.raises(ValueError, match="HTTP status 404"):
        load_reference_image(f"{server}/é a.png?q=ü b")
    assert running_server.requests[0][0] == "/%C3%A9%20a.png?q=%C3%BC%20b"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_private_address_is_refused(running_server, host):
    running_server.requests.clear()
    with pytest.raises(ValueError, match="not a public address"):
        load_reference_image(f"http://{host}:{running_server.server_port}/photo.png")
    assert running_server.requests == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),  # NAT64 of 8.8.8.8
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),  # the clouds' metadata service
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),  # 6to4 of 127.0.0.1
        ("2001:0:4136:e378::1", False),  # Teredo
        ("fc00::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff0e::1", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert reference_images._is_public(address) is public


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    found = [(None, None, None, "", (address, 80)) for address in ("8.8.8.8", "127.0.0.1")]
    monkeypatch.setattr(reference_images.socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1, not a public address"):
        load_reference_image("http://both.example/photo.png")


def test_the_address_that_was_checked_is_the_one_connected_to(server, monkeypatch):
    resolve, resolved = reference_images.socket.getaddrinfo, []

    def resolve_once(host, *args, **kwargs):
        resolved.append(host)
        return resolve("127.0.0.1" if host == "rebinding.example" else host, *args, **kwargs)

    monkeypatch.setattr(reference_images.socket, "getaddrinfo", resolve_once)
    load_reference_image(f"{server}/photo.png".replace("127.0.0.1", "rebinding.example"))
    assert resolved.count("rebinding.example") == 1


@pytest.mark.parametrize(
    ("host", "sent"), [("photos.example", "photos.example"), ("bücher.example", "xn--bcher-kva.example")]
)
def test_the_host_is_named_with_its_port(server, running_server, monkeypatch, host, sent):
    found = [(None, None, None, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(reference_images.socket, "getaddrinfo", lambda *args, **kwargs: found)
    load_reference_image(f"{server}/photo.png".replace("127.0.0.1", host))
    assert running_server.requests[0][1]["Host"] == f"{sent}:{running_server.server_port}"


def test_an_address_that_does_not_answer_gives_way_to_the_next(server, monkeypatch):
    found = [(None, None, None, "", (address, 0)) for address in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(reference_images, "_is_public", lambda address: True)
    monkeypatch.setattr(reference_images.socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert_same(load_reference_image(f"{server}/photo.png".replace("127.0.0.1", "two.example")), gradient())


def test_a_url_is_read_where_an_event_loop_runs(server):
    async def read():
        return load_reference_image(f"{server}/photo.png")

    assert_same(asyncio.run(read()), gradient())


def test_a_url_without_httpx2_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match="`pip install httpx2`"):
        load_reference_image("http://photos.example/photo.png")


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    load_reference_image(f"{server}/photo.png")


def test_credentials_are_neither_sent_nor_shown(server, running_server):
    with pytest.raises(ValueError, match=r"127\.0\.0\.1.*/missing answered") as error:
        load_reference_image(f"{server}/missing?token=secret1".replace("http://", "http://me:secret2@"))
    assert "secret" not in str(error.value)
    assert "Authorization" not in running_server.requests[0][1]


def test_a_url_that_cannot_be_parsed_shows_no_password():
    with pytest.raises(ValueError, match="cannot be parsed") as error:
        load_reference_image("http://me:sec/ret@127.0.0.1/photo.png")
    assert "sec" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/a.png", "data:image/png;base64,AA", "gopher://host"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(ValueError, match=f"{url.partition(':')[0]}: URL cannot be downloaded"):
        load_reference_image(url)


@pytest.mark.parametrize("url", ["http://", "http:///photo.png", "https://[::1", "http://host:port/", "http://a..b/"])
def test_a_malformed_url_is_a_value_error(url):
    with pytest.raises(ValueError, match=r"Pass http|cannot be downloaded"):
        load_reference_image(url)


@pytest.mark.parametrize("path", ["/long", "/endless"])
def test_a_large_download_is_refused(server, monkeypatch, path):
    monkeypatch.setattr(reference_images, "MAX_DOWNLOAD_BYTES", 2000)
    with pytest.raises(ValueError, match="larger than 2000 bytes"):
        load_reference_image(server + path)


@pytest.mark.parametrize("path", ["/drip-header", "/drip-body"])
def test_a_slow_drip_ends_at_the_deadline(server, monkeypatch, path):
    monkeypatch.setattr(reference_images, "MAX_DOWNLOAD_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"took more than 0\.3 s"):
        load_reference_image(server + path)
    assert time.monotonic() - start < 2


def test_five_redirects_are_followed(server):
    assert_same(load_reference_image(f"{server}/again/5"), gradient())


def test_six_redirects_are_not_followed(server):
    with pytest.raises(ValueError, match="redirects more than 5 times"):
        load_reference_image(f"{server}/again/6")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://127.0.0.2/photo.png", r"127\.0\.0\.2, not a public address"),
        ("file:///etc/passwd", "file: URL cannot be downloaded"),
        ("", "HTTP status 301"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(server, target, message):
    with pytest.raises(ValueError, match=message):
        load_reference_image(f"{server}/to?{target}")


@pytest.mark.parametrize(
    ("path", "message"),
    [("/missing", "HTTP status 404"), ("/cut", "/cut cannot be downloaded"), ("/garbage", "cannot be downloaded")],
)
def test_a_bad_answer_is_named(server, path, message):
    with pytest.raises(ValueError, match=message):
        load_reference_image(server + path)


def test_tls_is_not_optional(server):
    with pytest.raises(ValueError, match=r"cannot be downloaded.*SSL"):
        load_reference_image(f"{server}/photo.png".replace("http:", "https:"))


# Cut out


@pytest.fixture
def birefnet(monkeypatch, tmp_path):
    """rembg's surface as of 2.0.86, with a mask that the test sets: BiRefNet's weights (1 GB) cannot be shipped."""
    rembg, sessions = types.ModuleType("rembg"), types.ModuleType("rembg.sessions")
    rembg.mask, rembg.opened = Image.new("L", (1, 1), 255), []
    rembg.new_session = lambda name: rembg.opened.append(name) or name
    rembg.remove = lambda image, session, only_mask: rembg.mask.resize(image.size, Image.Resampling.NEAREST)
    rembg.file = tmp_path / "birefnet-general.onnx"
    rembg.file.touch()
    existing = types.SimpleNamespace(resolve_existing=lambda file: rembg.file if rembg.file.exists() else None)
    sessions.sessions = {"birefnet-general": existing}
    monkeypatch.setitem(sys.modules, "rembg", rembg)
    monkeypatch.setitem(sys.modules, "rembg.sessions", sessions)
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    reference_images._background_session.cache_clear()
    yield rembg
    reference_images._background_session.cache_clear()


@pytest.fixture
def without_rembg(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    reference_images._background_session.cache_clear()


def left_half(width=8, height=8):
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def half_transparent():
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.putalpha(left_half())
    return image


RED_AND_WHITE = ImageOps.expand(Image.new("RGB", (4, 8), RED), (0, 0, 4, 0), WHITE)


@pytest.mark.parametrize("cut_out", [True, False, "auto"])
def test_alpha_goes_on_white_whatever_is_chosen(without_rembg, cut_out):
    assert_same(prepare_reference_image(half_transparent(), 8, 8, cut_out), RED_AND_WHITE)


def test_half_transparent_red_on_white_is_pink(without_rembg):
    output = prepare_reference_image(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), 8, 8)
    assert_same(output, Image.new("RGB", (8, 8), (255, 127, 127)))


def test_hidden_colors_do_not_bleed_into_the_edge(without_rembg):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # black under what is transparent
    image.paste((*WHITE, 255), (0, 0, 31, 64))
    assert_same(prepare_reference_image(image, 24, 24), Image.new("RGB", (24, 24), WHITE))


def test_true_without_rembg_says_what_to_install(without_rembg):
    with pytest.raises(ImportError, match=r'pip install "rembg\[cpu\]"'):
        prepare_reference_image(gradient(), 8, 8, cut_out=True)


def test_auto_without_rembg_leaves_the_image_whole(without_rembg, caplog):
    caplog.set_level("INFO")
    reference_images._say_background_is_kept.cache_clear()
    assert_same(prepare_reference_image(gradient(), 4, 6), gradient())
    assert "BiRefNet is not on this machine" in caplog.text


@pytest.mark.parametrize("cut_out", [True, "auto"])
def test_birefnet_cuts_out_what_has_no_alpha(birefnet, cut_out):
    birefnet.mask = left_half()
    assert_same(prepare_reference_image(Image.new("RGB", (8, 8), RED), 8, 8, cut_out), RED_AND_WHITE)


def test_birefnet_is_loaded_once(birefnet):
    prepare_reference_images([gradient()] * 3, 8, 8, cut_out=True)
    assert birefnet.opened == ["birefnet-general"]


def test_false_never_asks_birefnet(birefnet):
    birefnet.mask = left_half()
    assert_same(prepare_reference_image(gradient(), 4, 6, cut_out=False), gradient())


def test_auto_downloads_nothing(birefnet):
    birefnet.mask = left_half()
    birefnet.file.unlink()
    assert_same(prepare_reference_image(gradient(), 4, 6), gradient())
    assert birefnet.opened == []


def test_auto_does_not_trust_an_old_rembg_which_may_download(birefnet):
    del sys.modules["rembg.sessions"].sessions["birefnet-general"].resolve_existing
    prepare_reference_image(gradient(), 4, 6)
    assert birefnet.opened == []


@pytest.mark.parametrize(("covered", "used"), [(1, False), (3, True), (84, True), (87, False)])
def test_auto_uses_a_mask_that_isolates_a_subject(birefnet, covered, used):
    birefnet.mask = Image.new("L", (100, 1))
    birefnet.mask.paste(255, (0, 0, covered, 1))
    output = prepare_reference_image(Image.new("RGB", (100, 1), RED), 1, 100)
    assert (np.asarray(output) == WHITE).all(axis=2).any() == used


def test_true_uses_any_mask(birefnet):
    birefnet.mask = Image.new("L", (1, 1), 0)
    assert_same(prepare_reference_image(gradient(), 4, 6, cut_out=True), Image.new("RGB", (6, 4), WHITE))


# In BiRefNet's place, an ONNX model of one node with BiRefNet's input and output shapes: the mean over the channels
TINY_ONNX = (
    "CAg6cwowCgF4EgF5IgpSZWR1Y2VNZWFuKgsKBGF4ZXNAAaABByoPCghrZWVwZGltcxgBoAECEgFnWh0KAX"
    "gSGAoWCAESEgoCCAEKAggDCgMIgAgKAwiACGIdCgF5EhgKFggBEhIKAggBCgIIAQoDCIAICgMIgAhCAhAN"
)


@pytest.mark.slow  # needs the background extra, whose first import compiles for half a minute
def test_the_real_rembg_finds_runs_and_reports_its_model(monkeypatch, tmp_path):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    reference_images._background_session.cache_clear()
    image = Image.new("RGB", (64, 48))
    image.paste(WHITE, (20, 10, 44, 38))  # the brightest is the tiny model's subject
    assert_same(prepare_reference_image(image, 48, 64), image)
    model = tmp_path / "models" / "birefnet-general" / "birefnet-general.onnx"
    model.parent.mkdir(parents=True)
    model.write_bytes(base64.b64decode(TINY_ONNX))
    assert prepare_reference_image(image, 48, 64).getpixel((0, 0)) == WHITE
    reference_images._background_session.cache_clear()


@pytest.mark.parametrize("cut_out", [None, 1, "yes", "True"])
def test_other_choices_are_refused(cut_out):
    with pytest.raises(ValueError, match=f"`cut_out` must be.*{cut_out!r}"):
        prepare_reference_image(gradient(), 8, 8, cut_out)


# Rows of references


@pytest.mark.parametrize("images", [gradient(), [gradient()], (gradient(),)], ids=["image", "list", "tuple"])
def test_one_image_or_a_list(images):
    (output,) = prepare_reference_images(images, 16, 24, cut_out=False)
    assert_same(output, prepare_reference_image(gradient(), 16, 24, cut_out=False))


def test_references_keep_their_order_and_kind(tmp_path):
    half_transparent().save(tmp_path / "cut.png")
    outputs = prepare_reference_images([tmp_path / "cut.png", np.zeros((8, 8)), torch.ones(3, 8, 8)], 8, 8, False)
    assert [np.asarray(output).mean() for output in outputs] == [np.asarray(RED_AND_WHITE).mean(), 0, 255]


def test_each_reference_has_its_own_choice(birefnet):
    birefnet.mask = left_half()
    person, place = prepare_reference_images([Image.new("RGB", (8, 8), RED)] * 2, 8, 8, cut_out=[True, False])
    assert_same(person, RED_AND_WHITE)
    assert_same(place, Image.new("RGB", (8, 8), RED))


@pytest.mark.parametrize("cut_out", [[], [False], [False] * 3])
def test_choices_of_another_number_are_refused(cut_out):
    with pytest.raises(ValueError, match=f"{len(cut_out)} entries for 2 references"):
        prepare_reference_images([gradient()] * 2, 8, 8, cut_out)


def test_the_failing_reference_is_named():
    with pytest.raises(ValueError, match=r"Reference 2 of 3: missing\.png"):
        prepare_reference_images([gradient(), "missing.png", gradient()], 8, 8, cut_out=False)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]),
    *[SIDES] * 4,
)
def test_any_mode_and_size_gives_what_the_model_sees(mode, image_width, image_height, width, height):
    output = prepare_reference_image(Image.new(mode, (image_width, image_height)), height, width, cut_out=False)
    assert (output.mode, output.size) == ("RGB", (width, height))


def test_the_file_stands_alone(tmp_path):
    """A Hub repo carries it without the package, and importing it must not cost what few images need."""
    shutil.copy(reference_images.__file__, tmp_path / "alone.py")
    code = "import sys, alone; assert not {'httpx2', 'rembg', 'refalign'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
