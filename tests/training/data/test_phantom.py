import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign_training.data.phantom import read_phantom
from refalign_training.data.recipe import DEFAULT_RULE
from refalign_training.data.sample import Fault, Sample


VIDEOS = Path("/data/koala")
BOX = [100.0, 50.0, 400.0, 350.0]


def target(vid="a", box=BOX, frame=0.43) -> dict:
    return {"vid": vid, "frame_idx": frame, "bbox_loc": box, "bbox_cls": "dog"}


def other(vid="b", box=BOX, frame=0.1) -> dict:
    return {"vid": vid, "frame_idx": frame, "bbox_loc": [box], "bbox_cls": "dog", "scores": [0.9]}


def pair(targets=None, others=None) -> dict:
    return {"obj_from_tgt_video": targets or [target()], "refer_result": [others or [other()]]}


def row(vid="a", caption="A dog runs.", **subjects) -> dict:
    return {"video_id": vid, "video_caption": caption, "cross_pair": json.dumps(subjects or {"a brown dog": pair()})}


def read(folder: Path, *rows: dict, rule=DEFAULT_RULE):
    path = folder / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    items = list(read_phantom([path], VIDEOS, rule))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Fault)]


def test_a_row_becomes_a_sample(tmp_path):
    (sample,), faults = read(tmp_path, row())
    assert not faults
    assert (sample.id, sample.prompts, sample.clip.path) == ("a", ("A dog runs.",), VIDEOS / "a.mp4")
    (reference,) = sample.references
    assert reference.subject == reference.label == "a brown dog"
    view, (cross,) = reference.view, reference.cross
    assert (view.path, view.frame, view.box, view.box_long_side) == (VIDEOS / "a.mp4", 0.43, tuple(BOX), 768)
    assert (cross.path, cross.frame, cross.box, cross.box_long_side) == (VIDEOS / "b.mp4", 0.1, tuple(BOX), 768)
    assert view.mask is None and view.crop is None


def test_the_id_may_be_called_vid_and_end_in_mp4(tmp_path):
    values = row("a.mp4", **{"dog": pair(others=[other("b.mp4")])})
    (sample,), faults = read(tmp_path, {"vid": values.pop("video_id"), **values})
    assert not faults and sample.id == "a" and sample.clip.path == VIDEOS / "a.mp4"
    assert sample.references[0].view and sample.references[0].cross[0].path == VIDEOS / "b.mp4"


@pytest.mark.parametrize(("value", "share"), [("0.25", 0.25), (0, 0.0), (1, 1.0), ("1", 1.0), (0.5, 0.5)])
def test_a_frame_is_a_share_even_as_text_or_one(tmp_path, value, share):
    (sample,), _ = read(tmp_path, row(dog=pair([target(frame=value)])))
    assert sample.references[0].view.frame == share and isinstance(sample.references[0].view.frame, float)


@pytest.mark.parametrize("frame", [1.5, -0.1, "1.5", "nan", "x", None, True, [0.5], 10**400])
def test_a_frame_that_is_no_share_is_dropped(tmp_path, frame):
    (sample,), faults = read(tmp_path, row(dog=pair([target(frame=frame), target(frame=0.7)])))
    assert [(fault.kind, fault.lost) for fault in faults] == [("field", "reference")]
    assert sample.references[0].view.frame == 0.7  # the next one of the clip


def test_boxes_that_overrun_the_frame_are_dropped(tmp_path):
    wide = [500.0, 50.0, 790.0, 350.0]
    (sample,), faults = read(tmp_path, row(dog=pair([target(box=wide)], [other("b", wide), other("c")]), cat=pair()))
    assert [(fault.kind, fault.lost) for fault in faults] == [("box", "reference")] * 2
    dog, cat = sorted(sample.references, key=lambda reference: reference.subject == "cat")
    assert dog.view is None and [view.path.name for view in dog.cross] == ["c.mp4"]
    assert cat.view is not None
    samples, faults = read(tmp_path, row(dog=pair([target(box=wide)], [other(box=wide)])))
    assert not samples and faults[-1].kind == "no references" and faults[-1].lost == "sample"


def test_a_clip_is_no_cross_view_of_itself(tmp_path):
    (sample,), _ = read(tmp_path, row(dog=pair(others=[other("a"), other("c")])))
    assert [view.path.name for view in sample.references[0].cross] == ["c.mp4"]


def test_references_are_the_largest(tmp_path):
    boxes = {name: [x, 0.0, x + 100.0 + x / 10, 400.0] for name, x in (("u", 0), ("v", 150), ("w", 300), ("x", 500))}
    subjects = {name: pair([target(box=box)]) for name, box in boxes.items()} | {
        "tiny": pair([target(box=[0, 0, 9, 9])])
    }
    (sample,), _ = read(tmp_path, row(**subjects))
    assert [reference.subject for reference in sample.references] == ["x", "w", "v"]
    (sample,), _ = read(tmp_path, row(dog=pair(), **{"brown dog": pair([target(box=[99, 50, 400, 350])])}))
    assert [reference.subject for reference in sample.references] == ["brown dog"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"video_id": None}, "field"),
        ({"video_id": "../x"}, "id"),
        ({"video_caption": None}, "field"),
        ({"video_caption": " "}, "no prompt"),
        ({"cross_pair": None}, "field"),
        ({"cross_pair": "{"}, "not readable"),
        ({"cross_pair": "[]"}, "field"),
        ({"cross_pair": "{}"}, "no references"),
        ({"cross_pair": "[" * 100_000}, "not readable"),
        ({"cross_pair": '{"dog": 3}'}, "field"),
        ({"cross_pair": '{"dog": {"obj_from_tgt_video": {}}}'}, "field"),
        ({"cross_pair": '{"dog": {"refer_result": [["b"]]}}'}, "field"),
    ],
)
def test_a_bad_row_costs_only_itself(tmp_path, values, kind):
    samples, faults = read(tmp_path, row("x"), row() | values, row("y"))
    assert [sample.id for sample in samples] == ["x", "y"]
    assert faults[0].kind == kind and faults[-1].lost == "sample" and {fault.row for fault in faults} == {1}


def test_text_that_is_not_utf8_costs_its_row(tmp_path):
    path = tmp_path / "bad.parquet"
    captions = pa.array([b"one", b"\xff\xfe", b"two"]).cast(pa.binary()).view(pa.string())
    table = pa.table({"vid": ["x", "a", "y"], "video_caption": captions, "cross_pair": [row()["cross_pair"]] * 3})
    pq.write_table(table, path)
    items = list(read_phantom([path], VIDEOS))
    assert [item.id for item in items if isinstance(item, Sample)] == ["x", "y"]
    assert [(item.kind, item.row) for item in items if isinstance(item, Fault)] == [("not readable", 1)]


def test_a_truncated_file_is_a_fault_and_the_next_one_is_read(tmp_path):
    whole, broken = tmp_path / "whole.parquet", tmp_path / "broken.parquet"
    pq.write_table(pa.Table.from_pylist([row()]), whole)
    data = whole.read_bytes()
    for content in (data[: len(data) // 2], b"", b"text", data[:40] + bytes(60) + data[100:]):
        broken.write_bytes(content)
        items = list(read_phantom([broken, whole], VIDEOS))
        assert items[0].kind == "not readable" and items[-1].id == "a"


def test_wrong_files_say_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_phantom([tmp_path / "none.parquet"], VIDEOS)
    pq.write_table(pa.table({"video": ["a"]}), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="data table"):
        read_phantom([tmp_path / "own.parquet"], VIDEOS)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
objects = st.fixed_dictionaries(
    {}, optional={"vid": junk, "frame_idx": junk | st.just(0.5), "bbox_loc": junk | st.just(BOX) | st.just([BOX])}
)
subjects = junk | st.fixed_dictionaries(
    {},
    optional={
        "obj_from_tgt_video": junk | st.lists(objects | junk, max_size=3),
        "refer_result": junk | st.lists(st.lists(objects | junk, max_size=2) | junk, max_size=3),
    },
)


@settings(max_examples=100, deadline=None)
@given(junk | st.dictionaries(st.text(max_size=3), subjects, max_size=3))
def test_whatever_a_row_holds_its_neighbours_are_read(tmp_path_factory, found):
    broken = row() | {"cross_pair": json.dumps(found)}
    samples, faults = read(tmp_path_factory.mktemp("any"), row("x"), broken, row("y"))
    assert {"x", "y"} <= {sample.id for sample in samples}
    assert {fault.row for fault in faults} <= {1} and len(samples) + len(faults) >= 3
