"""A video's frames, refined from one region of one reference (REFINE.md's own choices: nothing of it is published)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from refalign.pipeline_refine_by_align import mask_square
from refalign.reference_images import bounding_box
from refalign.video import FPS, open_container, read_video


if TYPE_CHECKING:
    from refalign.pipeline_refine_by_align import Alignment, RefineByAlignPipeline

KEY_FRAMES = 5


@dataclass(frozen=True)
class RefinedVideo:
    """What [`refine_frames`] made."""

    frames: np.ndarray
    """uint8 `(frames, height, width, 3)`."""
    alignment: "Alignment"
    """The region of the reference that all frames were refined from."""
    key_frame: int
    """The first of the frames that were aligned."""


def read_clip(video: Path) -> tuple[np.ndarray, int]:
    """
    A video's frames, uint8 `(frames, height, width, 3)`, and how many of them a second has, rounded.

    Raises:
        ValueError: if it cannot be read, or has sides that H.264 cannot have.
    """
    if not video.is_file():
        raise ValueError(f"{video} does not exist.")
    try:
        frames = read_video(video)
        with open_container(video) as container:
            rate = round(container.streams.video[0].average_rate or FPS)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{video} cannot be read as a video: {error}. Pass an intact one, such as an mp4.") from error
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{video} is {width}x{height} pixels, but an mp4 needs even sides. Crop it.")
    return frames, max(1, rate)


def refine_frames(
    pipeline: "RefineByAlignPipeline",
    frames: np.ndarray,
    masks: np.ndarray,
    reference: Image.Image,
    region: Any = None,
    strength: float = 0.6,
    seed: int = 0,
    **settings: Any,
) -> RefinedVideo:
    """
    Refines each frame that has a mask, all from one region of the reference [O]: their maps on a few sharp frames are
    averaged. All frames get the same noise, in the square around their mask, and from the second one on begin with
    what the frame before shows there.

    Args:
        frames (`np.ndarray`): uint8 `(frames, height, width, 3)`.
        masks (`np.ndarray`): bool `(frames, height, width)`; frames with empty ones stay as they are.
        region (*optional*): as in the pipeline's call, in place of the one that is found.
        strength (`float`, defaults to 0.6): how much of what the frame before shows is replaced.
        seed (`int`, defaults to 0): of the noise.
        settings: of the pipeline's call.
    """
    keys = key_frames(frames, masks)
    if region is None:
        images, key_masks = [Image.fromarray(frames[key]) for key in keys], [masks[key] for key in keys]
        generator = torch.Generator().manual_seed(seed)
        region = pipeline.align(images, key_masks, reference, generator=generator, one_region=True)
    refined, previous, alignment = frames.copy(), None, None
    for number in tqdm(np.flatnonzero(masks.any(axis=(1, 2))), desc="Frames"):
        image = Image.fromarray(frames[number])
        follows = previous is not None and previous == number - 1
        if follows:
            before = Image.fromarray(refined[previous])
            image = carried(before, masks[previous], image, masks[number])
        output = pipeline(
            image,
            masks[number],
            reference,
            region=region,
            strength=strength if follows else 1.0,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        )
        refined[number], previous, alignment = np.asarray(output.images[0]), number, output.alignments[0]
    if alignment is None:
        raise ValueError("All masks are empty, so nothing would be refined.")
    return RefinedVideo(refined, alignment, keys[0])


def key_frames(frames: np.ndarray, masks: np.ndarray, count: int = KEY_FRAMES) -> list[int]:
    """The frames to align: of those with a mask, the sharpest one of each of `count` stretches of time."""
    numbers = np.flatnonzero(masks.any(axis=(1, 2)))
    stretches = [stretch for stretch in np.array_split(numbers, count) if len(stretch)]
    return [int(max(stretch, key=lambda number: _sharpness(frames[number], masks[number]))) for stretch in stretches]


def _sharpness(frame: np.ndarray, mask: np.ndarray) -> float:
    """The variance of the Laplacian around a mask."""
    left, top, side = mask_square(mask)
    grey = frame[max(top, 0) : top + side, max(left, 0) : left + side].astype(float).mean(axis=-1)
    if min(grey.shape) < 3:
        return 0.0
    centre = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * centre).var())


def carried(before: Image.Image, mask_before: np.ndarray, frame: Image.Image, mask: np.ndarray) -> Image.Image:
    """A frame with what the frame before shows inside its mask, moved and scaled from the one mask's box to the
    other's."""
    left, top, right, bottom = bounding_box(mask)
    part = before.crop(bounding_box(mask_before)).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    start = frame.copy()
    start.paste(part, (left, top), Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255))
    return start


def flicker(frames: np.ndarray, masks: np.ndarray) -> float:
    """The mean difference of neighbouring frames inside both their masks, of 255; 0 if no neighbours have masks."""
    differences = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=-1)
    both = masks[1:] & masks[:-1]
    return float(differences[both].mean()) if both.any() else 0.0
