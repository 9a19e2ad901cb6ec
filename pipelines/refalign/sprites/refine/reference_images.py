"""Reference images, from whatever the user has to exactly what the model sees.

An image travels one way: `load -> cut out -> white behind what is transparent -> letterbox`. The file stands alone
(rembg is needed only when a background is removed, httpx2 only for a URL), because a Hub repo carries it by itself.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import importlib
import io
import ipaddress
import logging
import os
import re
import socket
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError


logger = logging.getLogger(__name__)

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels; the last two are the first outside
ReferenceImage = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike[str]
CutOut = bool | Literal["auto"]

MAX_DOWNLOAD_BYTES = 32 * 2**20
MAX_DOWNLOAD_SECONDS = 20.0
MAX_REDIRECTS = 5
# PIL's names. Not EPS, for which it starts Ghostscript, nor formats that hold an image of any other format
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", "TGA", "QOI", "PSD"),
    *("HEIF", "JXL"),  # those of PIL's plugins, if the user has registered them
)
MAX_SIDE = 2**16 - 1  # pixels: JPEG's own limit. PIL looks at the area alone, but needs memory for each row too
MAX_MISSING = 0.1  # of the rows of a JPEG that is cut short
WHITE = (255, 255, 255)
BACKGROUND_MODEL = "birefnet-general"
SUBJECT_COVERAGE = (0.02, 0.85)  # below: nothing was found; above: the image is a place, not a subject
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|(data|file):", re.IGNORECASE)  # two letters or more: C:\ is a drive
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        if embedded := ip.ipv4_mapped or ip.sixtofour or nat64:
            return _is_public(str(embedded))
        if ip not in _GLOBAL_IPV6:
            return False
    return ip.is_global and not ip.is_multicast


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError:  # its message may quote a password
        raise ValueError("The URL of a reference image cannot be parsed. Pass http(s)://host/path.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"A {parts.scheme}: URL cannot be downloaded. Pass http(s)://host/path, or a local path.")


def redacted_url(url: str) -> str:
    """The URL without what may be secret: credentials and query."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# httpx2 by itself, and not safehttpx 0.2 on top of it, which would break what we promise: it reads bodies of any size,
# drops timeouts, takes 100.64.0.0/10 for public, asks dns.google for names that are private here, and sends a `Host`
# without its port. What is ours is the rule which addresses are public, and the limits.
def _import_httpx() -> Any:
    try:
        return importlib.import_module("httpx2")  # not `import`: diffusers takes those for requirements of the repo
    except ImportError as error:
        raise ImportError(
            "A reference at a URL needs httpx2: `pip install httpx2`, or download the image and pass its path."
        ) from error


async def _public_addresses(host: str, port: int | None) -> list[str]:
    """The addresses of a host, all checked. One of them is connected to, so the name cannot change its mind later."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
    for address in addresses:
        if not _is_public(address):
            raise ValueError(f"{host} is at {address}, not a public address. Download it yourself and pass its path.")
    return addresses


async def _get(url: str) -> tuple[int, str, bytes]:
    """One request, which follows no redirect and knows no proxy, cookie or password: (status, location, body)."""
    _check_url(url)
    httpx = _import_httpx()
    try:
        request = httpx.Request("GET", url, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        named_url, host = request.url, request.url.raw_host.decode("ascii")
        failure = OSError(f"{host} has no address")
        addresses = await _public_addresses(host, request.url.port)
        timeout = {"connect": MAX_DOWNLOAD_SECONDS / max(1, len(addresses))}
        request.extensions = {"sni_hostname": host, "timeout": timeout}
        for address in addresses:
            request.url = named_url.copy_with(host=address)
            try:
                return await _exchange(httpx.AsyncHTTPTransport(), request, redacted_url(url))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure
    except (OSError, UnicodeError, httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{redacted_url(url)} cannot be downloaded: {reason}. Check it, or pass a path.") from error


async def _exchange(transport: Any, request: Any, name: str) -> tuple[int, str, bytes]:
    too_large = f"{name} is larger than {MAX_DOWNLOAD_BYTES} bytes. Pass a smaller image."
    async with transport, contextlib.aclosing(await transport.handle_async_request(request)) as response:
        if response.status_code != 200:
            return response.status_code, response.headers.get("Location", ""), b""
        if int(response.headers.get("Content-Length", 0)) > MAX_DOWNLOAD_BYTES:
            raise ValueError(too_large)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_DOWNLOAD_BYTES:
                raise ValueError(too_large)
        return 200, "", bytes(body)


async def _follow(url: str) -> bytes:
    hop = url
    try:
        async with asyncio.timeout(MAX_DOWNLOAD_SECONDS):
            for _ in range(MAX_REDIRECTS + 1):
                status, location, body = await _get(hop)
                if status == 200:
                    return body
                if status not in (301, 302, 303, 307, 308) or not location:
                    raise ValueError(
                        f"{redacted_url(hop)} answered with HTTP status {status}. Check it, or pass a path."
                    )
                hop = urllib.parse.urljoin(hop, location)
    except TimeoutError:
        raise ValueError(
            f"{redacted_url(hop)} took more than {MAX_DOWNLOAD_SECONDS:g} s. Download it and pass its path."
        ) from None
    raise ValueError(f"{redacted_url(url)} redirects more than {MAX_REDIRECTS} times. Pass the final URL.")


def _download(url: str) -> bytes:
    # In a thread of its own, because the caller's may run an event loop already, as a notebook's does
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, _follow(url)).result()


def _check_pixels(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"it is {width}x{height} pixels, so it holds nothing")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"it is {width}x{height} pixels, but a side may have {MAX_SIDE} at most; crop or shrink it")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:
        raise ValueError(
            f"it is {width}x{height} pixels, more than the {2 * limit} that are safe to decode; shrink it"
        )


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Decoders raise whatever they like (OSError, SyntaxError, struct.error): make it one error, with the name."""
    try:
        with warnings.catch_warnings():
            # _check_pixels refuses what PIL refuses; what PIL only warns about is accepted.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{name} does not exist.") from error
        if isinstance(error, Image.DecompressionBombError):
            raise ValueError(f"{name} has more pixels than are safe to decode: {error} Scale it down.") from error
        reason = error
        if isinstance(error, UnidentifiedImageError):
            reason = f"the format is unknown, none of {', '.join(FORMATS)}"
        raise ValueError(f"{name} cannot be read: {reason}. Pass an intact image, such as a PNG or JPEG.") from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright_first_frame(image: Image.Image, name: str) -> Image.Image:
    """A copy; the caller's image stays at the frame it was at."""
    own, frame = image, image.tell()
    try:
        if frame:
            with contextlib.suppress(EOFError):  # PSD: frame 1, the first layer's number, stands for the whole
                image.seek(0)
        try:
            image.load()
        except OSError as error:
            image = _load_cut_jpeg(image, name, error)
        turn = _TURNS.get(_orientation(image, name))
        return image.copy() if turn is None else image.transpose(turn)
    finally:
        if frame:
            own.seek(frame)


def _load_cut_jpeg(image: Image.Image, name: str, error: OSError) -> Image.Image:
    """A JPEG without its end, which viewers show, if little of it is missing; else raises the error that it made."""
    file = getattr(image, "fp", None)
    if image.format != "JPEG" or file is None:
        raise error
    file.seek(0)
    data = file.read()
    # What is missing, libjpeg fills with grey. Bytes that stand for anything else in its place show where that begins
    anything = bytes(range(1, 255)) * (len(data) // 1000 + 1)
    found, other = (Image.open(io.BytesIO(data + end + b"\xff\xd9"), formats=["JPEG"]) for end in (b"", anything))
    differs = (np.asarray(found) != np.asarray(other)).reshape(found.height, -1).any(axis=1)
    missing = found.height - int(differs.argmax()) if differs.any() else 0
    # A progressive one has all rows early, but without its end they are not sharp
    if missing > found.height * MAX_MISSING or (missing and found.info.get("progressive")):
        raise error
    logger.warning("%s is cut short: %d of its %d rows are missing, and grey.", name, missing, found.height)
    return found


def _orientation(image: Image.Image, name: str) -> Any:
    """What EXIF says. Not `ImageOps.exif_transpose`, which also writes the EXIF anew, and fails if it is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # PIL parses it as it is read, and raises whatever it likes
        logger.warning("%s has damaged EXIF data, so it is taken to be upright: %s", name, error)
        return None


def _to_uint8(values: np.ndarray, white: float = 1.0) -> np.ndarray:
    """Sample values as bytes: floats are 0..`white`, 16-bit values 0..65535 (257 times a byte)."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind != "f":
        raise ValueError(f"its dtype is {values.dtype}: convert it to uint8, uint16 or a float in 0..1")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):  # so that NaN fails
        raise ValueError(
            f"its values span {low:g}..{high:g} instead of 0..{white:g}: rescale them, or convert to uint8"
        )
    return np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)


def _gray_of_more_than_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":  # PIL's own F is 0..255, a float TIFF's is 0..1
        return Image.fromarray(_to_uint8(values, white=255.0 if values.max() > 1 else 1.0))
    if image.mode == "I":
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values span {values.min()}..{values.max()} instead of 0..65535: rescale them")
        values = values.astype(np.uint16)
    gray = Image.fromarray(_to_uint8(values))
    if (transparent := image.info.get("transparency")) is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _to_rgb_or_rgba(image: Image.Image, name: str) -> Image.Image:
    """Any of PIL's modes as RGB, or as RGBA where some pixel is transparent, in sRGB's colours."""
    profile, is_gray = image.info.get("icc_profile"), image.mode[0] in "1FIL"
    if image.mode == "F" or image.mode.startswith("I"):
        image = _gray_of_more_than_8_bits(image)
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image, profile = ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image), None
    elif image.mode == "La":
        image = image.convert("LA")
    alpha = None
    if image.has_transparency_data:
        _take_high_bytes_of_transparency(image)
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile:
        image = _to_srgb(image, profile, is_gray, name)
    image = image.convert("RGB")
    image.info.clear()  # what it says (EXIF, profile, transparency) has been done
    if alpha is not None and np.asarray(alpha).min() < 255:
        image.putalpha(alpha)
    return image


def _take_high_bytes_of_transparency(image: Image.Image) -> None:
    # Of a PNG with 16-bit colours PIL reads the pixels' high bytes, but the transparent colour whole
    color = image.info.get("transparency")
    if isinstance(color, tuple) and max(color) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in color)


_PROFILE_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}


def _to_srgb(image: Image.Image, profile: bytes, is_gray: bool, name: str) -> Image.Image:
    """The image in sRGB, as viewers show it. A profile that cannot be used is passed over, as viewers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = cast(Any, source.profile).xcolor_space
        mode = _PROFILE_MODES.get(space)
        if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not is_gray):
            raise ValueError(f"it is for {space.strip()}, the image is {image.mode}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB" and _is_identity(transform):
            return image
        return transform.apply(image.convert(mode))
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning("%s has an ICC profile that cannot be used, so its colours are taken for sRGB: %s", name, error)
        return image


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a profile is sRGB's own, of which there are many editions, a rounding apart."""
    colors = np.indices((9, 9, 9)).T.reshape(27, 27, 3) * 255 // 8
    changed = transform.apply(Image.fromarray(colors.astype(np.uint8)))
    return np.abs(np.asarray(changed).astype(int) - colors).max() <= 2


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    if image.format is not None and image.format not in FORMATS:  # before a pixel is decoded, here and below
        raise ValueError(f"its format is {image.format}, not one of {', '.join(FORMATS)}")
    _check_pixels(*image.size)
    return _to_rgb_or_rgba(_upright_first_frame(image, name), name)


def _from_array(image: np.ndarray | torch.Tensor) -> Image.Image:
    shape = tuple(image.shape)
    if isinstance(image, np.ndarray):
        layout, values = "(height, width[, channels])", image
    else:
        layout, image = "([channels,] height, width)", image.detach().cpu()
        # numpy has no bfloat16
        values = (image.float() if image.is_floating_point() else image).numpy()
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4):
        raise ValueError(f"its shape {shape} is not {layout} with 1, 3 or 4 channels; pass several images as a list")
    _check_pixels(values.shape[1], values.shape[0])
    samples = _to_uint8(values)
    samples = samples[..., 0] if samples.shape[-1] == 1 else samples
    return _to_rgb_or_rgba(Image.fromarray(samples), "The array")


def load_reference_image(image: ReferenceImage) -> Image.Image:
    r"""
    Read one reference image, from wherever it is, in whatever mode it is.

    EXIF orientation is applied, and colours are converted from the image's ICC profile to sRGB; of an animation the
    first frame is taken. A PIL image that is passed in stays as it is, at its frame.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str` or `os.PathLike`):
            A PIL image of any mode; an array of shape `(height, width)` or `(height, width, channels)`; a tensor of
            shape `(height, width)` or `(channels, height, width)`; a path; or an http(s) URL. Arrays and tensors have
            1, 3 (RGB) or 4 (RGBA) channels, as uint8 in 0..255, uint16 in 0..65535 or float in 0..1. From a URL at
            most `MAX_DOWNLOAD_BYTES` are read, within `MAX_DOWNLOAD_SECONDS`, and from public addresses only.

    Returns:
        `PIL.Image.Image`: A new upright image, RGBA if some pixel is transparent, otherwise RGB.

    Raises:
        ValueError: The image is missing, damaged (but for EXIF data, and the last rows of a JPEG), empty, of a format
            that is not in `FORMATS`, larger than PIL deems safe (`2 * Image.MAX_IMAGE_PIXELS` pixels) or `MAX_SIDE`
            allows, of a wrong shape, dtype or range, or its URL is refused.
        ImportError: A URL needs httpx2, and it is not installed.
    """
    if isinstance(image, Image.Image):
        name = f"The PIL image of mode {image.mode}"
        with _reading(name):
            return _from_pil(image, name)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        with _reading(f"The {type(image).__name__}"):
            return _from_array(image)
    if isinstance(image, str) and _URL.match(image):
        source, name = io.BytesIO(_download(image)), redacted_url(image)
    elif isinstance(image, (str, os.PathLike)):
        source = name = os.fsdecode(image)
        path = Path(source)
        if path.exists() and not path.is_file() and not path.is_dir():  # PIL would wait for what a pipe may never give
            raise ValueError(f"{name} is a pipe, a socket or a device. Pass a file.")
    else:
        raise ValueError(
            f"A {type(image).__name__} is not an image: pass a PIL image, an array, a tensor, a path or a URL."
        )
    Image.init()  # knows the formats of this build
    with _reading(name), Image.open(source, formats=[known for known in FORMATS if known in Image.OPEN]) as opened:
        return _from_pil(opened, name)


def _check_size(height: int, width: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be a positive number of pixels (an int), got {value!r}.")


def _check_long_edge(long_edge: int | None) -> None:
    is_number = isinstance(long_edge, (int, np.integer)) and not isinstance(long_edge, bool)
    if long_edge is not None and (not is_number or long_edge < 16 or long_edge % 16):
        raise ValueError(f"`long_edge` must be a multiple of 16 pixels (an int), got {long_edge!r}.")


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    r"""
    Scale an image to fit, and centre it on white: nothing is cropped or stretched. RefAlign (arXiv 2603.25743) reads
    its references so.

    Args:
        image (`PIL.Image.Image`): An RGB image.
        height (`int`): Height of the result, in pixels.
        width (`int`): Width of the result, in pixels.

    Returns:
        `PIL.Image.Image`: An RGB image of `width` x `height`. Where the borders cannot be equal, the left and the top
        one are a pixel narrower.

    Raises:
        ValueError: The image is not RGB, or a size is not a positive int.
    """
    _check_size(height, width)
    if image.mode != "RGB":
        raise ValueError(f"`letterbox` takes an RGB image, got mode {image.mode!r}: use `prepare_reference_image`.")
    if image.size == (width, height):
        return image.copy()
    # By way of the aspect ratio, as RefAlign's references were fitted: float rounding can cost a pixel, which then has
    # to be lost here too
    aspect = image.width / image.height
    if aspect > width / height:
        fitted = (width, max(1, int(width / aspect)))
    else:
        fitted = (max(1, int(height * aspect)), height)
    canvas = Image.new("RGB", (width, height), WHITE)
    corner = ((width - fitted[0]) // 2, (height - fitted[1]) // 2)
    canvas.paste(_resize(image, fitted, Image.Resampling.LANCZOS), corner)
    return canvas


def _resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes as Pillow does from 13 on, with older ones too. Between its two passes it rounds, so their order is
    seen: rows go first where more than twice as many of them are lost as of columns."""
    lost_rows, lost_columns = image.height - size[1], image.width - size[0]
    if lost_rows > 0 and lost_rows > 2 * lost_columns:
        image = image.resize((image.width, size[1]), resample)
    return image.resize(size, resample)


def fit_long_edge(image: Image.Image, long_edge: int) -> Image.Image:
    r"""
    Scale an image down until its longer side is at most `long_edge`, keeping its aspect but for the rounding of both
    sides to multiples of 16. Bernini-R (arXiv 2605.22344) reads its references so.

    Args:
        image (`PIL.Image.Image`): An RGB image.
        long_edge (`int`): The longest side of the result, in pixels, a multiple of 16.

    Returns:
        `PIL.Image.Image`: An RGB image. It is never enlarged but by the rounding.
    """
    width, height = image.size
    scale = max(min(long_edge / max(width, height), 1), 1 / min(width, height))
    width, height = _nearest_tokens(width * scale), _nearest_tokens(height * scale)
    if max(width, height) > long_edge:
        scale = long_edge / max(width, height)
        width, height = _nearest_tokens(width * scale), _nearest_tokens(height * scale)
    if image.size == (width, height):
        return image.copy()
    return _resize(image, (width, height), Image.Resampling.BICUBIC)


def _nearest_tokens(pixels: float) -> int:
    return max(16, 16 * round(round(pixels) / 16))


def bounding_box(mask: np.ndarray | torch.Tensor) -> Box:
    """The smallest box that holds all of a mask, `(height, width)`; ValueError if it is empty."""
    rows, columns = np.nonzero(np.asarray(mask))
    if len(rows) == 0:
        raise ValueError("The mask is empty, so it has no box.")
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@functools.lru_cache(maxsize=1)
def _background_session() -> tuple[Any, Any]:
    try:
        rembg = importlib.import_module("rembg")  # not `import`: diffusers takes those for requirements of the repo
    except (ImportError, SystemExit) as error:  # rembg exits the interpreter when onnxruntime is missing
        raise ImportError(
            'Cutting out a reference that has no transparency needs rembg: `pip install "rembg[cpu]"`, '
            "pass an image with an alpha channel, or pass `cut_out=False`."
        ) from error
    return rembg, rembg.new_session(BACKGROUND_MODEL)


def _has_background_model() -> bool:
    """Whether BiRefNet runs without a download."""
    file, data = f"{BACKGROUND_MODEL}.onnx", os.getenv("XDG_DATA_HOME") or "~"
    homes = (os.getenv("U2NET_HOME"), os.getenv("REMBG_HOME"), f"{data}/rembg", "~/.rembg", f"{data}/.u2net")
    paths = []
    for home in filter(None, homes):
        folder = Path(home).expanduser()
        paths += [folder / file, folder / "models" / BACKGROUND_MODEL / file]
    if not any(path.exists() for path in paths):
        return False  # without asking rembg, whose first import compiles for half a minute
    try:
        sessions = importlib.import_module("rembg.sessions").sessions
        return sessions[BACKGROUND_MODEL].resolve_existing(file) is not None  # the very file that rembg would open
    except (ImportError, SystemExit, AttributeError):  # AttributeError: before 2.0.80 rembg cannot tell
        return False


@functools.cache  # once is enough
def _say_background_is_kept() -> None:
    logger.info(
        "References without transparency keep their background: BiRefNet is not on this machine. To have it cut "
        'out: `pip install "rembg[cpu]"`, and say so of each reference (`cut_out`).'
    )


def _cut_out(image: Image.Image, cut_out: CutOut) -> Image.Image:
    """The image with its subject's mask as alpha; as it is where it has alpha, or where "auto" finds no reason."""
    if cut_out is False or image.mode == "RGBA":
        return image
    if cut_out == "auto" and not _has_background_model():
        _say_background_is_kept()
        return image
    rembg, session = _background_session()
    mask = rembg.remove(image, session=session, only_mask=True).convert("L")
    coverage = np.asarray(mask).mean() / 255
    if cut_out == "auto" and not SUBJECT_COVERAGE[0] <= coverage <= SUBJECT_COVERAGE[1]:
        logger.info("A reference keeps its background: BiRefNet takes %.0f%% of it for the subject.", 100 * coverage)
        return image
    image = image.copy()
    image.putalpha(mask)
    return image


def _check_cut_out(cut_out: CutOut) -> None:
    if not isinstance(cut_out, bool) and cut_out != "auto":
        raise ValueError(f'`cut_out` must be True, False or "auto", got {cut_out!r}.')


def prepare_reference_image(
    image: ReferenceImage, height: int, width: int, cut_out: CutOut = "auto", long_edge: int | None = None
) -> Image.Image:
    r"""
    Make of a reference image exactly what the model will see: the subject on white, letterboxed (RefAlign,
    arXiv 2603.25743), or in its own aspect (Bernini-R, arXiv 2605.22344).

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str` or `os.PathLike`):
            Anything that [`load_reference_image`] reads.
        height (`int`): Height of the video, in pixels.
        width (`int`): Width of the video, in pixels.
        cut_out (`bool` or `"auto"`, *optional*, defaults to `"auto"`):
            Whether to put the subject on white. Where some pixel is transparent, the image's own alpha is the mask,
            whatever is chosen. Otherwise `True` removes the background with BiRefNet (`pip install
            "rembg[cpu]"`; rembg downloads the model, 1 GB, at its first use); `False` leaves the image
            whole, as a place wants it; `"auto"` removes the background only if BiRefNet is already on this machine,
            downloading nothing, and finds a subject on 2% to 85% of the image.
        long_edge (`int`, *optional*):
            The longer side at most, for models that read references in their own aspect
            (`pipe.call_defaults["reference_long_edge"]`). The size of the video then does not matter.

    Returns:
        `PIL.Image.Image`: An RGB image of `width` x `height`, or what [`fit_long_edge`] makes.

    Raises:
        ValueError: The image cannot be read, or another argument has a wrong value.
        ImportError: `cut_out=True` needs rembg or a URL needs httpx2, and it is not installed.
    """
    _check_size(height, width)
    _check_long_edge(long_edge)
    _check_cut_out(cut_out)
    image = _cut_out(load_reference_image(image), cut_out)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return letterbox(image, height, width) if long_edge is None else fit_long_edge(image, long_edge)


def prepare_reference_images(
    images: ReferenceImage | list[ReferenceImage],
    height: int,
    width: int,
    cut_out: CutOut | list[CutOut] = "auto",
    long_edge: int | None = None,
) -> list[Image.Image]:
    r"""
    [`prepare_reference_image`] for one image or a list of them.

    Args:
        images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, `os.PathLike`, or a list of these):
            The references, in their order.
        height (`int`): Height of the video, in pixels.
        width (`int`): Width of the video, in pixels.
        cut_out (`bool`, `"auto"` or a list of these, *optional*, defaults to `"auto"`):
            See [`prepare_reference_image`]. A list has one entry per reference: people cut out, places not.
        long_edge (`int`, *optional*): See [`prepare_reference_image`].

    Returns:
        `list[PIL.Image.Image]`: An RGB image for each reference.

    Raises:
        ValueError: A reference cannot be read (the message says which, counted from 1), or another argument has a
            wrong value.
        ImportError: `cut_out=True` needs rembg or a URL needs httpx2, and it is not installed.
    """
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    cut_outs: list[CutOut] = list(cut_out) if isinstance(cut_out, (list, tuple)) else [cut_out] * len(images)
    if len(cut_outs) != len(images):
        raise ValueError(f"`cut_out` has {len(cut_outs)} entries for {len(images)} references: pass one for each.")
    _check_size(height, width)
    _check_long_edge(long_edge)
    for choice in cut_outs:
        _check_cut_out(choice)
    prepared = []
    for number, (image, choice) in enumerate(zip(images, cut_outs, strict=True), start=1):
        try:
            prepared.append(prepare_reference_image(image, height, width, choice, long_edge))
        except ValueError as error:
            raise ValueError(f"Reference {number} of {len(images)}: {error}") from error
    return prepared
