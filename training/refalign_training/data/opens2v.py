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
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from refalign_training.data import fields
from refalign_training.data.cross_pairs import CrossPairs, check_pair_files
from refalign_training.data.fields import Unusable, shorten
from refalign_training.data.masks import Candidate, box_area, check_box, check_mask, mask_box, select
from refalign_training.data.recipe import DEFAULT_RULE, SelectionRule
from refalign_training.data.records import Record, first_character, read_members, read_samples
from refalign_training.data.sample import Clip, Fault, Place, Reference, Sample, View


_SCORES = ("aesthetic", "motion", "tech", "fps")
_ANY_SCORE = SelectionRule(min_aesthetic=-math.inf, min_gme=-math.inf)


def read_opens2v(
    annotations: Sequence[Path], videos: Path, cross_pairs: Sequence[Path] = (), rule: SelectionRule = DEFAULT_RULE
) -> Iterator[Sample | Fault]:
    """
    The clips of annotation files, in their order, with the references that `rule` selects. Sample ids are
    `<part>/<clip_key>`, as in the cross pairs; a reference's subject is its mask's id. `videos` holds `total_part1/`,
    `total_part2/`, ...

    With cross pairs the annotations are read twice. A pair counts in both directions; the other clip's view comes from
    its own record, which may be in any of the files. It has to be large enough too, but its scores are free.

    Raises:
        ValueError: if a file does not exist, an annotation file holds a list, or one of `cross_pairs` does not.
    """
    for path in annotations:
        fields.check_given(path, "The annotation file")
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
        yield from read_samples(annotations, read_members, _sample, videos, rule, pairs)


def _keep_views(record: Record, path: Path, videos: Path, rule: SelectionRule, pairs: CrossPairs) -> None:
    """Keeps the views that pairs want of a record. What is wrong with it is said when it is read for itself."""
    place = Place(str(path), record.row)
    try:
        sample_id = _id(record, place)
        if not (wanted := pairs.wanted(sample_id)):
            return
        annotated = _annotated(record, place, videos, _ANY_SCORE, wanted)
    except Unusable:
        return
    views = dict.fromkeys(wanted.intersection(annotated.subjects))
    for reference, crop_ratio in annotated.candidates:
        if crop_ratio >= rule.min_crop_ratio:
            views[reference.subject] = reference.view
    for subject, view in views.items():
        pairs.keep(sample_id, subject, view)


def _id(record: Record, place: Place) -> str:
    if record.key is None:  # the file ends here
        raise record.value
    return fields.check_id(f"{Path(place.source).stem}/{record.key}")


def _sample(record: Record, place: Place, videos: Path, rule: SelectionRule, pairs: CrossPairs | None) -> Sample:
    place.sample_id = _id(record, place)
    annotated = _annotated(record, place, videos, rule)
    scores = _scores(annotated, place)
    prompts = fields.required(annotated.metadata, "face_cap_qwen", fields.prompts)
    references = select(annotated.candidates, rule)
    if not references:
        raise Unusable("no references", f"none of {len(annotated.subjects)} subjects can be used and passes the rule")
    if pairs is not None:
        references = tuple(replace(r, cross=pairs.views(place.sample_id, r.subject)) for r in references)
    scores["references"] = float(len(references))
    return Sample(place.sample_id, prompts, annotated.clip, references, place.source, place.row, scores)


class _Annotated(NamedTuple):
    """A record's clip, and the subjects of its annotated frame."""

    metadata: Mapping[str, Any]
    clip: Clip
    shape: tuple[int, int, int]
    """The clip's number of frames, and their height and width once they are cropped."""
    subjects: Sequence[str]
    """The ids of all, whether they can be used or not."""
    candidates: Sequence[Candidate]


def _annotated(
    record: Record, place: Place, videos: Path, rule: SelectionRule, wanted: Container[str] | None = None
) -> _Annotated:
    """A record's candidates whose scores pass the rule, only those in `wanted` if that is given."""
    metadata = fields.required(record.checked(), "metadata", fields.mapping)
    clip, shape = _clip(metadata, videos / Path(place.source).stem)
    annotation = fields.required(record.value, "annotation", fields.mapping)
    frame_data = fields.required(annotation, "ann_frame_data", fields.mapping)
    frame = _frame_number(frame_data, clip, shape)
    objects = fields.required(frame_data, "annotations", fields.sequence)
    masks = _masks(annotation, frame)
    subjects = list(map(str, range(1, len(objects) + 1)))
    for mask_id in sorted(masks.keys() - set(subjects)):
        error = Unusable("mask", f"its id is {shorten(mask_id)}, but there are {len(objects)} annotations")
        place.report(error, "reference")
    whole = View(clip.path, frame, clip.crop)
    candidates = []
    for subject, values in zip(subjects, objects, strict=True):
        if wanted is None or subject in wanted:
            with place.losing("reference"):
                if _scores_pass(values, subject, rule, place):  # before its mask, which takes the most time
                    candidates.append(_candidate(subject, values, masks.get(subject), whole, shape, place))
    return _Annotated(metadata, clip, shape, subjects, candidates)


def _clip(metadata: Mapping[str, Any], folder: Path) -> tuple[Clip, tuple[int, int, int]]:
    path = fields.path_inside(folder, fields.required(metadata, "path", fields.text))
    x0, x1, y0, y1 = _integers(metadata, "crop", 4)
    if x0 >= x1 or y0 >= y1:
        raise Unusable("crop", f"[x0, x1, y0, y1] is {[x0, x1, y0, y1]}, which is empty")
    start, end = _integers(metadata, "face_cut", 2)
    if start >= end:
        raise Unusable("no frames", f"face_cut is {[start, end]}, from the first frame to one behind the last")
    return Clip(path, start, end, (x0, y0, x1, y1)), (end - start, y1 - y0, x1 - x0)


def _integers(metadata: Mapping[str, Any], name: str, count: int) -> list[int]:
    values = fields.required(metadata, name, fields.sequence)
    if len(values) != count:
        raise Unusable("field", f"{name} is {shorten(values)} instead of {count} numbers")
    return [fields.integer(value, name) for value in values]


def _frame_number(frame_data: Mapping[str, Any], clip: Clip, shape: tuple[int, int, int]) -> int:
    """The annotated frame's number, once it is sure that boxes are in the cropped frame as they should be."""
    width = fields.required(frame_data, "img_width", fields.integer)
    height = fields.required(frame_data, "img_height", fields.integer)
    if (height, width) != shape[1:]:
        raise Unusable("crop", f"the annotated frame is {width}x{height}, but crop is {clip.crop} (left, top, ...)")
    if (box_format := frame_data.get("box_format", "xyxy")) != "xyxy":
        raise Unusable("box", f"box_format is {shorten(box_format)}; only 'xyxy' is known")
    return fields.required(frame_data, "ann_frame_idx", fields.integer)


def _masks(annotation: Mapping[str, Any], frame: int) -> Mapping[str, Any]:
    """The annotated frame's masks by id; none if nothing was found in it."""
    frames = fields.mapping(annotation.get("mask_annotation") or {}, "mask_annotation")
    if frames and str(frame) not in frames:
        raise Unusable("mask", f"masks are of frames {shorten(list(frames))}, but frame {frame} is annotated")
    return fields.mapping(frames.get(str(frame)) or {}, "mask_annotation")


def _scores_pass(values: Any, subject: str, rule: SelectionRule, place: Place) -> bool:
    scores, errors = [], []
    for name in ("aes_score", "gme_score"):
        score = fields.mapping(values, f"subject {subject!r}").get(name)
        if score is not None and not fields.is_number(score):
            detail = f"{name} of subject {subject!r} is {shorten(score)}, which is not a finite number"
            errors.append(Unusable("score", detail))
            score = math.nan  # below every threshold, but not as if there were none
        scores.append(score)
    passes = rule.passes(*scores)
    for error in errors:
        place.report(error, "nothing" if passes else "reference")
    return passes


def _candidate(
    subject: str, values: Any, mask: Any, whole: View, shape: tuple[int, int, int], place: Place
) -> Candidate:
    _, height, width = shape
    label = fields.required(values, "class_name", fields.text)
    box = check_box(fields.member(values, "bbox"), width, height, max(2.0, max(width, height) / 100))
    mask = check_mask(mask, height, width) if mask and fields.member(mask, "counts") else None
    tight_box = mask and mask_box(mask)
    if tight_box:
        view = replace(whole, box=tight_box, mask=mask)
    else:
        place.report(Unusable("empty mask", f"subject {subject!r}, {shorten(label)}"), "nothing")
        view = replace(whole, box=box)
    return Candidate(Reference(subject, view, label=label), box_area(tight_box or box) / (width * height))


def _scores(annotated: _Annotated, place: Place) -> dict[str, float]:
    scores = {}
    for name in _SCORES:
        if (value := annotated.metadata.get(name)) is not None:
            with place.losing("nothing"):
                scores[name] = fields.number(value, name)
    frames, height, width = map(float, annotated.shape)
    if scores.get("fps", 0) > 0:
        scores["duration"] = frames / scores["fps"]
    return scores | {"num_frames": frames, "height": height, "width": width}
