"""OpenS2V-5M (arXiv 2505.20292; Hub dataset `BestWishYsh/OpenS2V-5M`, CC-BY-4.0), full or high quality.

An annotation file holds `{clip_key: record}`, up to 66 GB of it; it is streamed. What a record's names do not say:

- the video is `<part>/<metadata.path>`, the part being the annotation file's name; a key may name another video;
- `metadata.crop` is `[x0, x1, y0, y1]`; boxes, masks and sizes are in the cropped frame;
- `face_cut` is half open and in frames of the file; only frame `ann_frame_idx` is annotated;
- mask ids are texts from "1" and belong to `annotations[int(id) - 1]`.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refalign_training.data.cross_pairs import CrossPairs, check_pair_files
from refalign_training.data.masks import Candidate, box_area, check_box, check_mask, mask_box, select
from refalign_training.data.recipe import DEFAULT_RULE, SelectionRule
from refalign_training.data.records import Record, first_character, read_members
from refalign_training.data.sample import (
    Clip,
    Fault,
    Place,
    Reference,
    Report,
    Sample,
    Unusable,
    View,
    check_id,
    integer,
    mapping,
    member,
    number,
    path_inside,
    prompts,
    sequence,
    shorten,
    text,
)


_SCORES = ("aesthetic", "motion", "tech", "fps")


def read_opens2v(
    annotations: Sequence[Path],
    videos: Path,
    cross_pairs: Sequence[Path] = (),
    rule: SelectionRule = DEFAULT_RULE,
) -> Iterator[Sample | Fault]:
    """
    The clips of annotation files, in their order, with the references that `rule` selects. Sample ids are
    `<part>/<clip_key>`, as in the cross pairs; a reference's subject is its mask's id.

    Args:
        annotations (`Sequence[Path]`): such as `Jsons/mask_and_bbox/total_part1.json`. Read twice with cross pairs.
        videos (`Path`): the folder of `total_part1/`, `total_part2/`, ...
        cross_pairs (`Sequence[Path]`, *optional*): lists of pairs of `Jsons/cross_video_pairs`. A pair counts in both
            directions; the other clip's view comes from its own record, which may be in any of `annotations`.
        rule (`SelectionRule`, *optional*): views of other clips have to be large enough too; their scores are free.

    Raises:
        ValueError: if a file does not exist, an annotation file holds a list, or one of `cross_pairs` does not.
    """
    for path in annotations:
        if not path.is_file():
            raise ValueError(f"The annotation file {path} does not exist.")
        if first_character(path) == "[":
            raise ValueError(f"{path} holds a list; an annotation file of OpenS2V-5M holds one object of all clips.")
    check_pair_files(cross_pairs)
    return _read(annotations, videos, cross_pairs, rule)


def _read(
    annotations: Sequence[Path], videos: Path, cross_pairs: Sequence[Path], rule: SelectionRule
) -> Iterator[Sample | Fault]:
    with CrossPairs(cross_pairs, rule) if cross_pairs else nullcontext() as pairs:
        if pairs is not None:
            yield from pairs.read()
            for path in annotations:
                for record in read_members(path):
                    _keep_views(record, path, videos, rule, pairs)
            yield from pairs.missing()
        for path in annotations:
            for record in read_members(path):
                yield from _read_record(record, path, videos, rule, pairs)


def _read_record(
    record: Record, path: Path, videos: Path, rule: SelectionRule, pairs: CrossPairs | None
) -> Iterator[Sample | Fault]:
    faults: list[Fault] = []
    place = Place(str(path), record.row)
    try:
        place = _place(record, path)
        annotated = _annotated(
            record.checked(), videos / path.stem, rule, lambda *what: faults.append(place.fault(*what))
        )
        item = _sample(annotated, place, rule, pairs)
    except Unusable as error:
        item = place.fault(error)
    yield from faults
    yield item


def _keep_views(record: Record, path: Path, videos: Path, rule: SelectionRule, pairs: CrossPairs) -> None:
    """Keeps the views that pairs want of a record. What is wrong with it is said when it is read for itself."""
    any_score = replace(rule, min_aesthetic=-math.inf, min_gme=-math.inf, unscored=True)
    try:
        sample_id = _place(record, path).sample_id
        if not (wanted := pairs.wanted(sample_id)):
            return
        annotated = _annotated(record.checked(), videos / path.stem, any_score, lambda *_: None, wanted)
    except Unusable:
        return
    views = dict.fromkeys(wanted.intersection(annotated.subjects))
    for candidate in annotated.candidates:
        if candidate.crop_ratio >= rule.min_crop_ratio:
            views[candidate.reference.subject] = candidate.reference.view
    for subject, view in views.items():
        pairs.keep(sample_id, subject, view)


def _place(record: Record, path: Path) -> Place:
    if record.key is None:  # the file ends here
        raise record.value
    return Place(str(path), record.row, check_id(f"{path.stem}/{record.key}"))


def _sample(annotated: "_Annotated", place: Place, rule: SelectionRule, pairs: CrossPairs | None) -> Sample:
    captions = prompts(member(annotated.metadata, "face_cap_qwen"), "face_cap_qwen")
    references = select(annotated.candidates, rule)
    if not references:
        raise Unusable("no references", f"none of {len(annotated.subjects)} subjects can be used and passes the rule")
    if pairs is not None:
        references = [replace(r, cross=pairs.views(place.sample_id, r.subject)) for r in references]
    scores = annotated.scores | {"references": float(len(references))}
    return Sample(place.sample_id, captions, annotated.clip, tuple(references), place.source, place.row, scores)


@dataclass(frozen=True)
class _Annotated:
    """A record's clip, and the subjects of its annotated frame."""

    metadata: Mapping[str, Any]
    clip: Clip
    scores: Mapping[str, float]
    subjects: Sequence[str]
    """The ids of all, whether they can be used or not."""
    candidates: Sequence[Candidate]


def _annotated(
    record: Any, folder: Path, rule: SelectionRule, report: Report, wanted: Container[str] | None = None
) -> _Annotated:
    """A record's candidates whose scores pass the rule, only those in `wanted` if that is given."""
    metadata = mapping(member(record, "metadata"), "metadata")
    clip = _clip(metadata, folder)
    annotation = mapping(member(record, "annotation"), "annotation")
    frame_data = mapping(member(annotation, "ann_frame_data"), "ann_frame_data")
    frame = _frame_number(frame_data, clip)
    objects = sequence(member(frame_data, "annotations"), "annotations")
    masks = _masks(annotation, frame)
    subjects = [str(index + 1) for index in range(len(objects))]
    for mask_id in sorted(masks.keys() - set(subjects)):
        error = Unusable("mask", f"its id is {shorten(mask_id)}, but there are {len(objects)} annotations")
        report(error, "reference")
    candidates = []
    for subject, values in zip(subjects, objects, strict=True):
        if wanted is not None and subject not in wanted:
            continue
        try:
            scores = _subject_scores(values, subject, rule, report)
            if rule.passes(*scores):  # before its mask is looked at, which takes the most time
                candidates.append(_candidate(subject, values, masks.get(subject), clip, frame, scores, report))
        except Unusable as error:
            report(error, "reference")
    return _Annotated(metadata, clip, _scores(metadata, clip, report), subjects, candidates)


def _clip(metadata: Mapping[str, Any], folder: Path) -> Clip:
    path = path_inside(folder, text(member(metadata, "path"), "path"))
    x0, x1, y0, y1 = _integers(member(metadata, "crop"), 4, "crop")
    if x0 >= x1 or y0 >= y1:
        raise Unusable("crop", f"[x0, x1, y0, y1] is {[x0, x1, y0, y1]}, which is empty")
    start, end = _integers(member(metadata, "face_cut"), 2, "face_cut")
    if start >= end:
        raise Unusable("no frames", f"face_cut is {[start, end]}, from the first frame to one behind the last")
    return Clip(path, start, end, (x0, y0, x1, y1))


def _integers(value: Any, count: int, name: str) -> list[int]:
    if len(sequence(value, name)) != count:
        raise Unusable("field", f"{name} is {shorten(value)} instead of {count} numbers")
    return [integer(item, name) for item in value]


def _size(clip: Clip) -> tuple[int, int]:
    left, top, right, bottom = clip.crop
    return right - left, bottom - top


def _frame_number(frame_data: Mapping[str, Any], clip: Clip) -> int:
    """The annotated frame's number, once it is sure that boxes are in the cropped frame as they should be."""
    width, height = (integer(member(frame_data, name), name) for name in ("img_width", "img_height"))
    if (width, height) != _size(clip):
        raise Unusable("crop", f"the annotated frame is {width}x{height}, but crop is {clip.crop} (left, top, ...)")
    if (box_format := frame_data.get("box_format", "xyxy")) != "xyxy":
        raise Unusable("box", f"box_format is {shorten(box_format)}; only 'xyxy' is known")
    return integer(member(frame_data, "ann_frame_idx"), "ann_frame_idx")


def _masks(annotation: Mapping[str, Any], frame: int) -> Mapping[str, Any]:
    """The annotated frame's masks by id; none if nothing was found in it."""
    frames = mapping(annotation.get("mask_annotation") or {}, "mask_annotation")
    if frames and str(frame) not in frames:
        raise Unusable("mask", f"masks are of frames {shorten(list(frames))}, but frame {frame} is annotated")
    return mapping(frames.get(str(frame)) or {}, "mask_annotation")


def _candidate(
    subject: str, values: Any, mask: Any, clip: Clip, frame: int, scores: tuple, report: Report
) -> Candidate:
    width, height = _size(clip)
    label = text(member(values, "class_name"), "class_name")
    annotated_box = check_box(member(values, "bbox"), width, height, max(2.0, max(width, height) / 100))
    mask = check_mask(mask, height, width) if mask and member(mask, "counts") else None
    box = mask and mask_box(mask)
    if box is None:
        report(Unusable("empty mask", f"subject {subject!r}, {shorten(label)}"), "nothing")
    view = View(clip.path, frame, clip.crop, box or annotated_box, mask=mask if box else None)
    return Candidate(Reference(subject, view, label=label), box_area(view.box) / (width * height), *scores)


def _subject_scores(
    values: Any, subject: str, rule: SelectionRule, report: Report
) -> tuple[float | None, float | None]:
    values, scores, errors = mapping(values, f"subject {subject!r}"), [], []
    for name in ("aes_score", "gme_score"):
        try:
            score = values.get(name)
            scores.append(None if score is None else number(score, f"{name} of subject {subject!r}"))
        except Unusable as error:
            scores.append(math.nan)  # below every threshold, but not as if there were none
            errors.append(error)
    for error in errors:
        report(error, "nothing" if rule.passes(*scores) else "reference")
    return scores[0], scores[1]


def _scores(metadata: Mapping[str, Any], clip: Clip, report: Report) -> dict[str, float]:
    scores = {}
    for name in _SCORES:
        try:
            if metadata.get(name) is not None:
                scores[name] = number(metadata[name], name)
        except Unusable as error:
            report(error, "nothing")
    width, height = _size(clip)
    frames = clip.end - clip.start
    if scores.get("fps", 0) > 0:
        scores["duration"] = frames / scores["fps"]
    return scores | {"num_frames": float(frames), "height": float(height), "width": float(width)}
