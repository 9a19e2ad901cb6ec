"""Phantom-Data (arXiv 2506.18851; Hub dataset `ZhuoweiChen/phantom-data-Koala36M`; research use only by its README).

Parquet files without videos, which are Koala-36M's. `cross_pair` is a text of JSON: for every subject, named by a noun
phrase, where it is in the clip itself and in other clips. Frames are shares of a clip's frames; boxes are in a frame
shrunk to a long side of 768 pixels, flat for the clip itself and nested for others; some overrun it and are dropped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from refalign_training.data.masks import Candidate, box_area, check_box, select
from refalign_training.data.recipe import DEFAULT_RULE, SelectionRule
from refalign_training.data.records import Record, decode, parquet_columns, read_rows
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
    is_number,
    mapping,
    member,
    path_inside,
    prompts,
    sequence,
    shorten,
    text,
)


LONG_SIDE = 768
_FRAME_AREA = LONG_SIDE * 432  # of 16:9, as most clips are; the real one is only known once a clip is decoded
_IDS = ("video_id", "vid")
_COLUMNS = (*_IDS, "video_caption", "cross_pair")


def read_phantom(
    annotations: Sequence[Path],
    videos: Path,
    rule: SelectionRule = DEFAULT_RULE,
) -> Iterator[Sample | Fault]:
    """
    The rows of parquet files. A sample's id is its video's; a reference's subject is its noun phrase. A subject whose
    boxes in the clip itself cannot be used has no view of its own but those of other clips, if there are any.

    Args:
        annotations (`Sequence[Path]`): such as `koala36M_multi_ref_merged_filtered.parquet`.
        videos (`Path`): the folder of Koala-36M's `<video_id>.mp4`.
        rule (`SelectionRule`, *optional*): crop ratios are of a 16:9 frame. There are no masks and no scores.

    Raises:
        ValueError: if a file does not exist, or its columns are not Phantom-Data's.
    """
    for path in annotations:
        _check_columns(path)
    return _read(annotations, videos, rule)


def _read(annotations: Sequence[Path], videos: Path, rule: SelectionRule) -> Iterator[Sample | Fault]:
    for path in annotations:
        for record in read_rows(path, _COLUMNS):
            yield from _read_row(record, path, videos, rule)


def _check_columns(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"The annotation file {path} does not exist.")
    columns = parquet_columns(path)
    if columns is None:  # a Fault when it is read
        return
    if not {"video_caption", "cross_pair"} <= set(columns) or not set(_IDS) & set(columns):
        raise ValueError(
            f"{path} has the columns {shorten(columns)}; Phantom-Data's have `video_id` or `vid`, `video_caption` and "
            "`cross_pair`. For your own parquet files, pass --data table."
        )


def _read_row(record: Record, path: Path, videos: Path, rule: SelectionRule) -> Iterator[Sample | Fault]:
    faults: list[Fault] = []
    place = Place(str(path), record.row)
    try:
        video_id = _video_id(record.checked())
        place = Place(place.source, place.row, video_id)
        item = _sample(record.value, place, videos, rule, lambda *what: faults.append(place.fault(*what)))
    except Unusable as error:
        item = place.fault(error)
    yield from faults
    yield item


def _video_id(row: dict[str, Any]) -> str:
    first, second = map(row.get, _IDS)
    return check_id(text(second if first is None else first, "video_id").removesuffix(".mp4"))


def _sample(row: dict[str, Any], place: Place, videos: Path, rule: SelectionRule, report: Report) -> Sample:
    captions = prompts(row["video_caption"], "video_caption")
    subjects = mapping(decode(text(row["cross_pair"], "cross_pair")), "cross_pair")
    candidates = []
    for phrase, found in subjects.items():
        try:
            candidates.append(_candidate(text(phrase, "a noun phrase"), found, place.sample_id, videos, rule, report))
        except Unusable as error:
            report(error, "reference")
    references = select(candidates, rule)
    if not references:
        raise Unusable("no references", f"none of {len(subjects)} subjects can be used and passes the rule")
    clip = Clip(_video(place.sample_id, videos))
    scores = {"references": float(len(references))}
    return Sample(place.sample_id, captions, clip, references, place.source, place.row, scores)


def _video(video_id: str, videos: Path) -> Path:
    return path_inside(videos, f"{video_id}.mp4")


def _candidate(phrase: str, found: Any, video_id: str, videos: Path, rule: SelectionRule, report: Report) -> Candidate:
    video = _video(video_id, videos)
    own = None
    for view in _views(_objects(found, "obj_from_tgt_video"), video_id, videos, report):
        if own is None and view.path == video:
            own = view
    others = []
    for objects in _objects(found, "refer_result"):
        others += objects if isinstance(objects, list) else [objects]
    cross = []
    for view in _views(others, video_id, videos, report):
        if view.path != video and _crop_ratio(view) >= rule.min_crop_ratio:
            cross.append(view)
    if own is None and not cross:
        raise Unusable("box", f"no view of {shorten(phrase)} can be used")
    reference = Reference(phrase, own, tuple(cross[: rule.max_cross_views]), label=phrase)
    return Candidate(reference, _crop_ratio(own or cross[0]))


def _objects(found: Any, name: str) -> list[Any]:
    objects = mapping(found, "a subject").get(name)
    return [] if objects is None else sequence(objects, name)


def _views(objects: Sequence[Any], video_id: str, videos: Path, report: Report) -> list[View]:
    views = []
    for values in objects:
        try:
            views.append(_view(values, video_id, videos))
        except Unusable as error:
            report(error, "reference")
    return views


def _view(values: Any, video_id: str, videos: Path) -> View:
    """The view of an object in its clip, by default the sample's own."""
    path = _video(text(mapping(values, "an object").get("vid") or video_id, "vid").removesuffix(".mp4"), videos)
    box = member(values, "bbox_loc")
    if isinstance(box, list) and box and isinstance(box[0], list):  # a reference's; its only one
        box = box[0]
    return View(path, _share(member(values, "frame_idx")), None, check_box(box, LONG_SIDE, LONG_SIDE), LONG_SIDE)


def _share(value: Any) -> float:
    """A frame's place as a share of all, also from a text; a float even at 1, which as `int` is the second frame."""
    try:
        share = float(value) if isinstance(value, str) else value
    except ValueError:
        share = None
    if not is_number(share) or not 0 <= share <= 1:
        raise Unusable("field", f"frame_idx is {shorten(value)}, which is not a share from 0 to 1")
    return float(share)


def _crop_ratio(view: View) -> float:
    return box_area(view.box) / _FRAME_AREA
