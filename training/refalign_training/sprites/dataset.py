"""The small world as a dataset: clips, annotations and cross pairs in OpenS2V-5M's own format."""

import functools
import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from pycocotools import mask as coco
from tqdm import tqdm

from refalign.files import new_file
from refalign.video import write_video
from refalign_training.data.masks import box_area
from refalign_training.data.randomness import numpy_generator
from refalign_training.data.source import Dataset
from refalign_training.data.workers import free_videos
from refalign_training.sprites.subject import SIDE, Subject, subjects
from refalign_training.sprites.world import (
    FPS,
    NUM_FRAMES,
    Drawn,
    Scene,
    captions,
    draw_scene,
    random_scene,
)


logger = logging.getLogger(__name__)

PART = "total_part1"
Box = tuple[int, int, int, int]  # left, top, right, bottom
CLIPS_OF_A_CAST = 200  # which shows the same subjects, so that most references can come from another clip
SMALLEST_BOX = 0.105  # of the frame's area, in the annotated frame; the reader leaves out subjects below 0.1
MOST_TRIES = 20


class Clip(NamedTuple):
    """A drawn clip with the frame that is annotated."""

    scene: Scene
    drawn: Drawn
    frame: int
    boxes: tuple[Box, ...]
    """The subjects' in that frame, the largest first."""


def write_dataset(folder: Path, clips: int, seed: int = 0, held_out: bool = False) -> Dataset:
    """
    Writes clips 0 to `clips - 1`, each second one of two subjects, or goes on with it. Nothing is drawn that is there.

    Args:
        folder (`Path`): gets `Videos/total_part1/*.mp4` and, last, `Jsons/`.
        held_out (`bool`): whether the subjects are those that are never trained on.
    """
    annotations = folder / "Jsons/mask_and_bbox" / f"{PART}.json"
    pairs = folder / "Jsons/cross_video_pairs/pairs.json"
    if not pairs.is_file():
        (folder / "Videos" / PART).mkdir(parents=True, exist_ok=True)
        write = functools.partial(_write_clip, folder / "Videos" / PART, seed, held_out)
        free_videos()
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            drawn = pool.map(write, range(clips), chunksize=8)
            written = list(tqdm(drawn, total=clips, desc=f"clips of {folder.name}", mininterval=5))
        _write_json(annotations, {_key(number): clip.record for number, clip in enumerate(written)})
        _write_json(pairs, _cross_pairs(written))
    return Dataset(data="opens2v", annotations=(annotations,), videos=folder / "Videos", cross_pairs=(pairs,))


def scene_of_clip(number: int, seed: int, held_out: bool) -> Scene:
    """What the clip of that number shows."""
    generator = numpy_generator("sprites clip", seed, number)
    cast = _cast(number // CLIPS_OF_A_CAST, seed, held_out)
    who = generator.choice(len(cast), size=1 + number % 2, replace=False)
    return random_scene(generator, tuple(cast[i] for i in who))


@functools.cache
def _cast(number: int, seed: int, held_out: bool) -> list[Subject]:
    """The subjects of the clips that share a cast: so many that each is in four of them on average."""
    pool = subjects(held_out)
    chosen = numpy_generator("sprites cast", seed, number).permutation(len(pool))
    return [pool[i] for i in chosen[: 3 * CLIPS_OF_A_CAST // 8]]


def draw_clip(number: int, seed: int, held_out: bool) -> Clip:
    """
    The clip of that number. Readers take the larger subject for the first reference, so the annotated frame is one in
    which that is the left one; where there is none, the two change sides, or the camera moves a little.
    """
    scene = scene_of_clip(number, seed, held_out)
    generator = numpy_generator("sprites frame", seed, number)
    for number_of_try in range(2 * MOST_TRIES):
        candidate = replace(scene, seed=scene.seed + number_of_try // 2)
        if number_of_try % 2:
            candidate = candidate.mirrored()
        drawn = draw_scene(candidate)
        for frame in generator.permutation(NUM_FRAMES).tolist():
            boxes = _boxes(drawn, frame)
            if boxes is not None:
                return Clip(candidate, drawn, frame, boxes)
    raise ValueError(f"Clip {number} of seed {seed} has no frame in which its subjects can be annotated.")


def _boxes(drawn: Drawn, frame: int) -> tuple[Box, ...] | None:
    """The subjects' boxes in a frame; none if one is too small or hidden, or the larger one is not the left one."""
    boxes = list(map(_box, drawn.masks[:, frame]))
    areas = list(map(box_area, boxes))
    is_apart = len(boxes) == 1 or boxes[0][2] <= boxes[1][0] or boxes[1][2] <= boxes[0][0]
    is_large = min(areas) >= SMALLEST_BOX * SIDE * SIDE
    return tuple(boxes) if is_apart and is_large and areas[0] >= areas[-1] else None


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class Written(NamedTuple):
    """What the annotation files say of a clip."""

    record: dict[str, Any]
    subjects: tuple[Subject, ...]
    frame: int


def _write_clip(folder: Path, seed: int, held_out: bool, number: int) -> Written:
    """Writes the video unless it is there."""
    clip = draw_clip(number, seed, held_out)
    path = folder / f"sprite{number:06d}.mp4"
    if not path.is_file():
        write_video(clip.drawn.frames, path, fps=FPS)
    return Written(_record(clip, path.name), clip.scene.subjects, clip.frame)


def _key(number: int) -> str:
    return f"sprite{number:06d}_step1-0-{NUM_FRAMES}"


def _record(clip: Clip, path: str) -> dict[str, Any]:
    scene, frame = clip.scene, clip.frame
    masks = {}
    for index, mask in enumerate(clip.drawn.masks, 1):
        rle = coco.encode(np.asfortranarray(mask[frame], dtype=np.uint8))
        counts = cast(bytes, rle["counts"]).decode("ascii")  # annotated as what a file holds, str
        masks[str(index)] = {"size": [SIDE, SIDE], "counts": counts, "score": [1.0]}
    objects = []
    for subject, box in zip(scene.subjects, clip.boxes, strict=True):
        values = {"class_name": subject.shape, "bbox": list(map(float, box)), "gme_score": 0.5, "aes_score": 5.0}
        objects.append(values)
    shapes = [subject.shape for subject in scene.subjects]
    return {
        "metadata": {
            "cut": [0, NUM_FRAMES],
            "crop": [0, SIDE, 0, SIDE],
            "tech": 5.0,
            "motion": 0.1,
            "aesthetic": 5.0,
            "fps": float(FPS),
            "num_frames": NUM_FRAMES,
            "resolution": {"height": SIDE, "width": SIDE},
            "path": path,
            "face_cut": [0, NUM_FRAMES],
            "face_cap_qwen": list(captions(scene)),
        },
        "word_tags": {
            "background": [scene.place],
            "subject": shapes,
            "object": [],
            "pre_define": [],
        },
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": frame,
                "box_format": "xyxy",
                "img_width": SIDE,
                "img_height": SIDE,
                "annotations": objects,
            },
            "mask_map": {str(index): {"class_name": shape} for index, shape in enumerate(shapes, 1)},
            "mask_annotation": {str(frame): masks},
        },
    }


def _cross_pairs(written: Sequence[Written]) -> list[dict[str, Any]]:
    """Every two clips that show the same subject, by the place it has among the clip's."""
    seen = defaultdict(list)
    for number, clip in enumerate(written):
        for index, subject in enumerate(clip.subjects, 1):
            seen[subject].append((number, index, clip.frame))
    pairs = []
    for subject, places in seen.items():
        for (number, index, frame), (other, other_index, other_frame) in itertools.combinations(places, 2):
            pairs.append(
                {
                    "cur_id": f"{PART}/{_key(number)}",
                    "aft_id": f"{PART}/{_key(other)}",
                    "cur_class_id": str(index),
                    "aft_class_id": str(other_index),
                    "cur_class_name": subject.shape,
                    "aft_class_name": subject.shape,
                    "text_similarity": 1.0,
                    "image_similarity": 0.8,
                    "cur_frame_idx": frame,
                    "aft_frame_idx": other_frame,
                }
            )
    return pairs


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, overwrite=True) as file:
        file.write_text(json.dumps(content), "utf-8")
