"""OpenS2V-5M in small, made by code: annotation files, cross pairs, and clips whose masks are exact.

`python -m tests.training.opens2v_files FOLDER` writes one as FOLDER/Jsons and FOLDER/Videos.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from refalign.video import write_video


COLORS = ((220, 40, 40), (40, 90, 220), (40, 180, 60), (230, 200, 40), (170, 60, 200), (240, 140, 30))


@dataclass(frozen=True)
class Drawn:
    """A subject of a drawn clip."""

    name: str
    mask: np.ndarray
    """bool `(height, width)`, of the cropped annotated frame."""
    aesthetic: float = 5.0
    gme: float = 0.3


@dataclass(frozen=True)
class OpenS2VFiles:
    """Where [`write_opens2v`] put everything."""

    annotations: tuple[Path, ...]
    videos: Path
    cross_pairs: tuple[Path, ...]
    sample_ids: tuple[str, ...]
    """`<part>/<clip_key>`, in the files' order."""


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A bool `(height, width)` array as OpenS2V writes it: COCO's compressed RLE with ASCII counts."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def box_of(mask: np.ndarray) -> list[float]:
    """`[left, top, right, bottom]` around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(side) for side in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


def rectangle(height: int, width: int, box: Sequence[int]) -> np.ndarray:
    """A mask of that frame size which fills `box`, `(left, top, right, bottom)`."""
    left, top, right, bottom = box
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def disc(height: int, width: int, center: tuple[float, float], radius: float) -> np.ndarray:
    """A mask of that frame size: all pixels nearer than `radius` to `center`, `(x, y)`."""
    y, x = np.mgrid[:height, :width]
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2


def opens2v_record(
    drawn: Sequence[Drawn],
    path: str = "gm100-200_part2.mp4",
    crop: Sequence[int] | None = None,
    frame: int = 5,
    face_cut: Sequence[int] = (2, 18),
    captions: str | Sequence[str] = "A ball and a brick move past each other.",
    **metadata: Any,
) -> dict[str, Any]:
    """One valid record; `crop` is `[x0, x1, y0, y1]` as in the format, by default at the frame's corner."""
    height, width = drawn[0].mask.shape
    x0, x1, y0, y1 = crop or (0, width, 0, height)
    assert (x1 - x0, y1 - y0) == (width, height)
    objects = [
        {"class_name": d.name, "bbox": box_of(d.mask), "gme_score": d.gme, "aes_score": d.aesthetic} for d in drawn
    ]
    masks = {str(i): {**encode_mask(d.mask), "score": [0.99]} for i, d in enumerate(drawn, 1)}
    return {
        "metadata": {
            "cut": [0, 20],
            "crop": [x0, x1, y0, y1],
            "tech": 2.082,
            "motion": 0.0122,
            "aesthetic": 5.07,
            "fps": 25.0,
            "num_frames": 20,
            "resolution": {"height": height, "width": width},
            "path": path,
            "face_cut": list(face_cut),
            "face_cap_qwen": captions if isinstance(captions, str) else list(captions),
        }
        | metadata,
        "word_tags": {"background": ["park"], "subject": ["ball"], "object": ["brick"], "pre_define": []},
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": frame,
                "box_format": "xyxy",
                "img_width": width,
                "img_height": height,
                "annotations": objects,
            },
            "mask_map": {str(i): {"class_name": d.name} for i, d in enumerate(drawn, 1)},
            "mask_annotation": {str(frame): masks},
        },
    }


def cross_pair(current: str, after: str, class_id: str, name: str, **values: Any) -> dict[str, Any]:
    """One valid cross pair of the same class of two samples."""
    return {
        "cur_id": current,
        "aft_id": after,
        "cur_class_id": class_id,
        "aft_class_id": class_id,
        "cur_class_name": name,
        "aft_class_name": name,
        "text_similarity": 1.0,
        "image_similarity": 0.8,
        "cur_frame_idx": 5,
        "aft_frame_idx": 5,
    } | values


def write_annotations(path: Path, records: Mapping[str, Any]) -> Path:
    """An annotation file `{clip_key: record}`, as the dataset's own are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def draw_subjects(height: int, width: int, frame: int) -> tuple[Drawn, Drawn]:
    """A brick in the upper half that moves to the right and a ball in the lower half that moves to the left."""
    step = frame * width // 64
    left, top = width // 28, height // 20
    brick = rectangle(height, width, (left + step, top, left + step + width * 3 // 8, top + height * 2 // 5))
    ball = disc(height, width, (width * 0.78 - step, height * 0.73), height * 0.23)
    return Drawn("brick", brick), Drawn("ball", ball)


def draw_clip(height: int, width: int, crop: Sequence[int], num_frames: int, clip: int) -> list[np.ndarray]:
    """
    The frames, uint8 `(height, width, 3)`; subjects in the cropped region, a white watermark outside it. Clips 2k and
    2k + 1 show subjects of the same colours before different backgrounds.
    """
    x0, x1, y0, y1 = crop
    colors = COLORS[clip // 2 % len(COLORS)], COLORS[(clip // 2 + 1) % len(COLORS)]
    shades = np.linspace(60, 140, x1 - x0)[None, :, None] + (clip * 37 % 80)
    frames = []
    for number in range(num_frames):
        frame = np.full((height, width, 3), 255, dtype=np.uint8)
        region = frame[y0:y1, x0:x1]
        region[:] = shades.clip(0, 255).astype(np.uint8)
        for drawn, color in zip(draw_subjects(y1 - y0, x1 - x0, number), colors, strict=True):
            region[drawn.mask] = color
        frames.append(frame)
    return frames


def write_opens2v(
    folder: Path,
    clips: int = 4,
    height: int = 48,
    width: int = 64,
    num_frames: int = 20,
    parts: int = 1,
    videos: bool = True,
) -> OpenS2VFiles:
    """
    A whole dataset in the format's folders: `clips` clips dealt to `parts` annotation files, each a real mp4 (25 fps)
    of a brick (mask "1") and a ball (mask "2"), watermarked outside its crop; clips 2k and 2k + 1 are cross pairs.
    Clip keys name another video than `path` does, as some of the dataset's do.

    Args:
        folder (`Path`): gets `Jsons/mask_and_bbox/total_partN.json`, `Jsons/cross_video_pairs/pairs.json` and
            `Videos/total_partN/*.mp4`.
        height, width (`int`): of the videos, even; the crop leaves out 4 pixels left and right, 2 above and below.
        videos (`bool`): whether the mp4s are written.
    """
    crop = (4, width - 4, 2, height - 2)
    records: dict[str, dict[str, Any]] = {f"total_part{part + 1}": {} for part in range(parts)}
    ids = []
    (folder / "Videos").mkdir(parents=True, exist_ok=True)
    for clip in range(clips):
        part, path = f"total_part{clip % parts + 1}", f"gm{clip}-200_part2.mp4"
        frame = 3 + clip % (num_frames - 6)
        key = f"gm{clip}-201_part3_step1-0-{num_frames}_step2"
        records[part][key] = opens2v_record(
            draw_subjects(height - 4, width - 8, frame),
            path,
            crop,
            frame,
            (2, num_frames - 2),
            [f"Clip {clip}: a ball and a brick move.", f"A brick passes a ball, clip {clip}."],
            cut=[0, num_frames],
            num_frames=num_frames,
            resolution={"height": height, "width": width},
        )
        ids.append(f"{part}/{key}")
        if videos:
            write_video(draw_clip(height, width, crop, num_frames, clip), folder / "Videos" / part / path, fps=25)
    annotations = tuple(
        write_annotations(folder / f"Jsons/mask_and_bbox/{part}.json", of_part) for part, of_part in records.items()
    )
    pairs = [
        cross_pair(ids[clip], ids[clip + 1], class_id, name)
        for clip in range(0, clips - 1, 2)
        for class_id, name in (("1", "brick"), ("2", "ball"))
    ]
    cross_pairs = folder / "Jsons/cross_video_pairs/pairs.json"
    cross_pairs.parent.mkdir(parents=True, exist_ok=True)
    cross_pairs.write_text(json.dumps(pairs), "utf-8")
    ordered = tuple(f"{part}/{key}" for part, of_part in records.items() for key in of_part)
    return OpenS2VFiles(annotations, folder / "Videos", (cross_pairs,), ordered)


if __name__ == "__main__":
    print(write_opens2v(Path(sys.argv[1])))
