"""Masks of a video's frames: read, or suggested by what of the subject looks least like the reference."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from refalign.pipeline_refine_by_align import (
    cut_square,
    encode_patches,
    grown,
    largest_parts,
    load_mask,
    on_white,
    prepare_reference,
    reference_pixels,
    square_around,
)
from refalign.reference_images import bounding_box
from refalign.refine_track import moved, read_track
from refalign.refine_video import read_clip


if TYPE_CHECKING:
    from refalign.pipeline_refine_by_align import RefineByAlignPipeline

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
NEIGHBOURS = 3  # frames in a row in which a patch must look wrong
SMALLEST_GAP = 0.03  # of cosines, between a patch that looks wrong and the subject's mean
REACH = 3  # patches: so far apart, parts of the subject are still joined


def read_masks(source: str, video: Path, shape: tuple[int, ...], track: Path | None = None) -> np.ndarray:
    """
    The masks of a video's frames, bool `(frames, height, width)`.

    Args:
        source (`str`): a picture for all frames, a video, or a folder with a picture for each frame, in the order of
            their names.
        video (`Path`): what errors name.
        shape (`tuple`): frames, height and width of the video.
        track (`Path`, *optional*): a file of [`read_track`], with whose boxes a picture moves from frame to frame.

    Raises:
        ValueError: if there is not one mask for each frame, one is of another size, or all are empty; or if a mask
            that moves leaves the frame.
    """
    count, height, width = shape[:3]
    path = Path(source)
    if track is not None and (path.is_dir() or path.suffix.lower() in VIDEOS):
        raise ValueError(f"{track} moves one mask, but {source} has one for each frame. Pass a picture, or no track.")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        _check_count(count, len(files), video, source)
        masks = [load_mask(file, (width, height), f"The mask {file.name}") for file in files]
    elif path.suffix.lower() in VIDEOS:
        frames, _ = read_clip(path)
        _check_count(count, len(frames), video, source)
        if frames.shape[1:3] != (height, width):
            size = f"{frames.shape[2]}x{frames.shape[1]}"
            raise ValueError(f"{source} is {size}, but {video} {width}x{height} pixels: make them one size.")
        masks = list(frames.mean(axis=-1) >= 128)  # its compression makes grey of black and white
    else:
        masks = [load_mask(source, (width, height))] * count
        if track is not None:
            boxes = read_track(track, count, (width, height))
            masks = [moved(masks[0], boxes[0], box) for box in boxes]
    found = np.stack(masks)
    if not found.any():
        raise ValueError(f"All masks of {source} are empty, so nothing would be refined. Paint what went wrong white.")
    if track is not None and (lost := np.flatnonzero(~found.any(axis=(1, 2))).tolist()):
        raise ValueError(
            f"Moved with box {lost[0]} of {track}, nothing of the mask is in the frame. The boxes must be about what "
            "the mask hides; box 0 is that of the frame for which it was painted."
        )
    if whole := [number for number, mask in enumerate(found) if mask.all()]:
        raise ValueError(f"The mask of frame {whole[0]} covers all of it: nothing would be left. Mask less.")
    return found


def _check_count(frames: int, masks: int, video: Path, source: str) -> None:
    if frames != masks:
        raise ValueError(
            f"{video} has {frames} frames, but {source} {masks} masks. Pass one for each frame, or a picture for all."
        )


def suggest_masks(pipeline: "RefineByAlignPipeline", frames: np.ndarray, reference: Image.Image) -> np.ndarray:
    """
    Where a video's subject looks least like the reference, bool `(frames, height, width)` [O]: the patches of the
    subject whose features match none of the reference's as well as its others do, in three neighbouring frames at
    least. A suggestion: look at it before it is used.

    Args:
        frames (`np.ndarray`): uint8 `(frames, height, width, 3)`.

    Raises:
        ValueError: if there are too few frames, or nothing stands out.
    """
    if len(frames) < NEIGHBOURS:
        raise ValueError(
            f"The video has {len(frames)} frames, but masks are suggested from {NEIGHBOURS} on. Pass one."
        )
    likeness = _likeness(pipeline, frames, reference)
    subject = torch.stack([_subject(one, _split(likeness)) for one in likeness])
    inner = grown((~subject).float(), 1) == 0  # edges look like no other
    if not inner.any():
        raise ValueError("The subject of the reference is not seen in the video. Pass a mask of what went wrong.")
    values = likeness[inner]
    gap = max(float(values.std(correction=0)), SMALLEST_GAP)
    wrong = _lasting(inner & (likeness < values.mean() - gap))
    if not wrong.any():
        raise ValueError("Nothing of the subject looks unlike the reference for long. Pass a mask of what went wrong.")
    height, width = frames.shape[1:3]
    side = max(height, width)
    large = F.interpolate(wrong[:, None].float(), (side, side), mode="nearest-exact")[:, 0].bool().numpy()
    top, left = (side - height) // 2, (side - width) // 2
    return large[:, top : top + height, left : left + width]


@torch.no_grad()
def _likeness(pipeline: "RefineByAlignPipeline", frames: np.ndarray, reference: Image.Image) -> torch.Tensor:
    """How well each patch of each frame matches its best one of the reference's subject: cosines `(frames, rows,
    columns)`, of the frames padded to squares."""
    size = pipeline.config["reference_size"]
    seen, foreground = prepare_reference(reference, size)
    wanted = _features(pipeline, seen)
    side = int(len(wanted) ** 0.5)
    wanted = wanted[F.adaptive_avg_pool2d(foreground, side).flatten() > 0.5]
    found = []
    for frame in frames:
        image = Image.fromarray(frame)
        square = square_around((0, 0, *image.size), 1.0)
        patches = _features(pipeline, cut_square(image, square, 2 * size))
        found.append((patches @ wanted.T).amax(dim=1).unflatten(0, (2 * side, 2 * side)))
    return torch.stack(found)


def _features(pipeline: "RefineByAlignPipeline", image: Image.Image) -> torch.Tensor:
    """`(patches, dim)` of length 1, on the CPU."""
    pixels = reference_pixels(torch.from_numpy(np.array(on_white(image)))[None])
    pixels = pixels.to(pipeline._execution_device, pipeline.image_encoder.dtype)
    return F.normalize(encode_patches(pipeline.image_encoder, pixels)[0].float(), dim=-1).cpu()


def _split(values: torch.Tensor) -> float:
    """The value between two groups: halfway between the means of those above and below it."""
    split = float(values.mean())
    for _ in range(20):
        above, below = values[values > split], values[values <= split]
        if len(above) == 0 or len(below) == 0:
            break
        split = float(above.mean() + below.mean()) / 2
    return split


def _subject(likeness: torch.Tensor, split: float) -> torch.Tensor:
    """The patches of a frame's subject, bool `(rows, columns)`: its largest part that is like the reference, with gaps
    and bays closed."""
    alike = likeness > split
    if not alike.any():
        return alike
    largest = largest_parts(alike, likeness - likeness.min(), 0.5)
    left, top, right, bottom = bounding_box(largest)
    closed = (1 - grown(1 - grown(largest[None].float(), REACH), REACH))[0] > 0.5
    inside = torch.zeros_like(closed)
    inside[top:bottom, left:right] = True
    return closed & inside


def _lasting(wrong: torch.Tensor) -> torch.Tensor:
    """What is wrong in `NEIGHBOURS` frames in a row, bool `(frames, rows, columns)`."""
    runs = wrong.unfold(0, NEIGHBOURS, 1).all(dim=-1)  # those that begin at each frame
    lasting = torch.zeros_like(wrong)
    for later in range(NEIGHBOURS):
        lasting[later : later + len(runs)] |= runs
    return lasting
