"""Phantom-Data (arXiv 2506.18851; Hub dataset `ZhuoweiChen/phantom-data-Koala36M`; research use only by its README).

Parquet files without videos, which are Koala-36M's. `cross_pair` is a text of JSON: for every subject, named by a noun
phrase, where it is in the clip itself and in other clips. Frames are shares of a clip's frames; boxes are in a frame
shrunk to a long side of 768 pixels, flat for the clip itself and nested for others; some overrun it and are dropped.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from refalign_training.data import fields
from refalign_training.data.fields import Unusable, shorten
from refalign_training.data.masks import Candidate, check_box, select, view_area
from refalign_training.data.recipe import DEFAULT_RULE, SelectionRule
from refalign_training.data.records import Record, decode, parquet_columns, read_rows, read_samples
from refalign_training.data.sample import Clip, Fault, Place, Reference, Sample, View


LONG_SIDE = 768
_FRAME_AREA = LONG_SIDE * 432  # of 16:9, as most clips are; the real one is only known once a clip is decoded
_IDS = ("video_id", "vid")
_COLUMNS = (*_IDS, "video_caption", "cross_pair")


def read_phantom(
    annotations: Sequence[Path], videos: Path, rule: SelectionRule = DEFAULT_RULE
) -> Iterator[Sample | Fault]:
    """
    The rows of parquet files. A sample's id is its video's; a reference's subject is its noun phrase. A subject whose
    boxes in the clip itself cannot be used has no view of its own but those of other clips, if there are any. The
    rule's crop ratios are of a 16:9 frame; there are no masks and no scores.

    Raises:
        ValueError: if a file does not exist, or its columns are not Phantom-Data's.
    """
    for path in annotations:
        _check_columns(path)
    return read_samples(annotations, lambda path: read_rows(path, _COLUMNS), _sample, videos, rule)


def _check_columns(path: Path) -> None:
    fields.check_given(path, "The annotation file")
    columns = parquet_columns(path)
    if columns is None:  # a Fault when it is read
        return
    if not {"video_caption", "cross_pair"} <= set(columns) or not set(_IDS) & set(columns):
        raise ValueError(
            f"{path} has the columns {shorten(columns)}; Phantom-Data's have `video_id` or `vid`, `video_caption` and "
            "`cross_pair`. For your own parquet files, pass --data table."
        )


def _sample(record: Record, place: Place, videos: Path, rule: SelectionRule) -> Sample:
    row = record.checked()
    first, second = map(row.get, _IDS)
    video_id = fields.text(second if first is None else first, "video_id")
    place.sample_id = fields.check_id(video_id.removesuffix(".mp4"))
    prompts = fields.prompts(row["video_caption"], "video_caption")
    subjects = fields.mapping(decode(fields.text(row["cross_pair"], "cross_pair")), "cross_pair")
    video = fields.path_inside(videos, f"{place.sample_id}.mp4")
    candidates = []
    for phrase, found in subjects.items():
        with place.losing("reference"):
            candidates.append(_candidate(fields.text(phrase, "a noun phrase"), found, video, videos, rule, place))
    references = select(candidates, rule) if rule.passes(None, None) else ()  # there are no scores
    if not references:
        raise Unusable("no references", f"none of {len(subjects)} subjects can be used and passes the rule")
    scores = {"references": float(len(references))}
    return Sample(place.sample_id, prompts, Clip(video), references, place.source, place.row, scores)


def _candidate(phrase: str, found: Any, video: Path, videos: Path, rule: SelectionRule, place: Place) -> Candidate:
    here = _objects(found, "obj_from_tgt_video")
    own = next((view for view in _views(here, videos, place) if view.path == video), None)
    elsewhere = []
    for objects in _objects(found, "refer_result"):
        elsewhere += objects if isinstance(objects, list) else [objects]
    cross = []
    for view in _views(elsewhere, videos, place):
        if view.path != video and view_area(view) / _FRAME_AREA >= rule.min_crop_ratio:
            cross.append(view)
    if own is None and not cross:
        raise Unusable("box", f"no view of {shorten(phrase)} can be used")
    reference = Reference(phrase, own, tuple(cross[: rule.max_cross_views]), label=phrase)
    return Candidate(reference, view_area(own or cross[0]) / _FRAME_AREA)


def _objects(found: Any, name: str) -> list[Any]:
    objects = fields.mapping(found, "a subject").get(name)
    return [] if objects is None else fields.sequence(objects, name)


def _views(objects: Sequence[Any], videos: Path, place: Place) -> list[View]:
    """The views of objects in their clips, by default the sample's own."""
    views = []
    for values in objects:
        with place.losing("reference"):
            video_id = fields.text(fields.mapping(values, "an object").get("vid") or place.sample_id, "vid")
            path = fields.path_inside(videos, f"{video_id.removesuffix('.mp4')}.mp4")
            box = fields.member(values, "bbox_loc")
            if isinstance(box, list) and box and isinstance(box[0], list):  # a reference's; its only one
                box = box[0]
            frame = _share(fields.member(values, "frame_idx"))
            views.append(View(path, frame, None, check_box(box, LONG_SIDE, LONG_SIDE), LONG_SIDE))
    return views


def _share(value: Any) -> float:
    """A frame's place as a share of all, also from a text; a float even at 1, which as `int` is the second frame."""
    share = value
    if isinstance(value, str):
        with suppress(ValueError):
            share = float(value)
    if not fields.is_number(share) or not 0 <= share <= 1:
        raise Unusable("field", f"frame_idx is {shorten(value)}, which is not a share from 0 to 1")
    return float(share)
