"""Videos in and out of mp4 files, by PyAV."""

import errno
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from PIL import Image

from refalign.files import new_file


FPS = 16  # frames per second of Wan 2.1, and so of RefAlign
# A file of 50 KB can hold pictures that take gigabytes: larger ones than 8192 x 8192 are not decoded
MOST_PIXELS = 2**26
_LIMITS = {"max_pixels": str(MOST_PIXELS)}


def open_container(path: str | Path, options: Mapping[str, str] | None = None, **kwargs: Any) -> InputContainer:
    """`av.open` to read, whose video streams decode no picture of more than `MOST_PIXELS`. Raises av.FFmpegError for a
    file that is no video, or is damaged."""
    container = av.open(str(path), options={**_LIMITS, **(options or {})}, **kwargs)  # it decodes some already
    for stream in container.streams.video:
        if stream.codec_context is None:
            container.close()
            raise av.InvalidDataError(errno.EINVAL, "its video is of no known codec", str(path))
        stream.codec_context.options = dict(_LIMITS)
    return container


def write_video(
    frames: Iterable[Image.Image | np.ndarray],
    output: str | Path,
    fps: int = FPS,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes frames as H.264 mp4 that every browser plays. The file appears when it is complete.

    Args:
        frames (`Iterable`): frames of one even size: PIL images, or arrays `(height, width, 3)` as uint8 or as floats
            in 0..1. They are taken one by one, as they are written.
        output (`str` or `Path`): where to write.
        fps (`int`, defaults to 16): frames per second.
        settings (`Mapping`, *optional*): kept as JSON in the file's `comment`; [`read_settings`] reads them.
        overwrite (`bool`, defaults to `False`): whether an existing file may be replaced.

    Raises:
        ValueError: if there are no frames, their sizes differ or are odd, `fps` is not positive, or `output` exists
            and `overwrite` is false.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already. Name another output, or call write_video(..., overwrite=True).")
    arrays = map(_to_uint8, frames)
    first = next(arrays, None)
    if first is None or fps < 1:
        count = 0 if first is None else "some"
        raise ValueError(f"There are {count} frames at {fps} per second to write to {output}; both must be 1 or more.")
    height, width, _ = first.shape
    if height % 2 or width % 2:
        raise ValueError(f"Frames are {width}x{height}, but H.264 needs even sides.")
    to_mp4 = {"format": "mp4", "options": {"movflags": "+faststart"}}
    with new_file(output, overwrite=overwrite) as file, av.open(str(file), "w", **to_mp4) as container:
        if settings is not None:
            container.metadata["comment"] = json.dumps(settings, ensure_ascii=False)
        # Else x264 makes other files of equal frames, by how the CPU's instructions round and threads meet
        repeatable = {"threads": "1", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17", **repeatable})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, frame in enumerate(itertools.chain([first], arrays)):
            if frame.shape != first.shape:
                raise ValueError(f"All frames must be {first.shape}, but frame {number} is {frame.shape}.")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return output


def _to_uint8(frame: Image.Image | np.ndarray) -> np.ndarray:
    values = np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame)
    if values.dtype.kind == "f":
        values = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != 3:
        raise ValueError(f"A frame is {values.dtype} of shape {values.shape}; it must be uint8 (height, width, 3).")
    return values


def read_video(path: str | Path) -> np.ndarray:
    """All frames of a video, uint8 `(frames, height, width, 3)`."""
    with open_container(path) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that [`write_video`] kept in the file; empty if there are none."""
    with open_container(path) as container:
        return json.loads(container.metadata.get("comment", "{}"))
