import contextlib
import copy
import json
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign.video import read_video
from refalign_training.data import records
from refalign_training.data.masks import decode_mask
from refalign_training.data.opens2v import read_opens2v
from refalign_training.data.recipe import DEFAULT_RULE, SelectionRule
from refalign_training.data.sample import Fault, Sample
from tests.training.opens2v_files import (
    Drawn,
    cross_pair,
    disc,
    draw_subjects,
    encode_mask,
    opens2v_record,
    rectangle,
    write_annotations,
    write_opens2v,
)


HEIGHT, WIDTH = 44, 56
VIDEOS = Path("/data/Videos")
SUBJECTS = draw_subjects(HEIGHT, WIDTH, 5)
ABSENT = object()


def record(*drawn: Drawn, **values) -> dict:
    return opens2v_record(drawn or SUBJECTS, **values)


def set_in(value, keys, new):
    """A copy of nested dicts and lists with one member replaced, or removed if `new` is ABSENT."""
    value = copy.deepcopy(value)
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    if new is ABSENT:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = new
    return value


def read(folder: Path, records: dict | str | bytes, rule=DEFAULT_RULE, pairs=(), name="total_part1.json"):
    path = folder / name
    if isinstance(records, dict):
        write_annotations(path, records)
    else:
        path.write_bytes(records.encode() if isinstance(records, str) else records)
    items = list(read_opens2v([path], VIDEOS, pairs, rule))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Fault)]


def read_one(folder: Path, of: dict, **arguments):
    samples, faults = read(folder, {"key": of}, **arguments)
    return (samples[0] if samples else None), faults


ANNOTATIONS = ("annotation", "ann_frame_data", "annotations")
MASKS = ("annotation", "mask_annotation", "5")


def test_a_record_becomes_a_sample(tmp_path):
    sample, faults = read_one(tmp_path, record(crop=(4, 60, 2, 46), captions="A ball."))
    assert not faults
    assert sample.id == "total_part1/key" and sample.prompts == ("A ball.",) and sample.row == 0
    assert sample.clip.path == VIDEOS / "total_part1/gm100-200_part2.mp4"  # by `path`, not by the key
    assert sample.clip.crop == (4, 2, 60, 46)  # left, top, right, bottom of [x0, x1, y0, y1]
    assert (sample.clip.start, sample.clip.end) == (2, 18)
    assert [(r.subject, r.label) for r in sample.references] == [("2", "ball"), ("1", "brick")]  # the largest first
    view = sample.references[1].view
    assert (view.path, view.frame, view.crop, view.box) == (sample.clip.path, 5, sample.clip.crop, (6, 2, 27, 19))
    np.testing.assert_array_equal(decode_mask(view.mask, HEIGHT, WIDTH), SUBJECTS[0].mask)
    assert sample.scores == {
        "aesthetic": 5.07,
        "motion": 0.0122,
        "tech": 2.082,
        "fps": 25,
        "duration": 16 / 25,
        "num_frames": 16,
        "height": 44,
        "width": 56,
        "references": 2,
    }


def test_masks_lie_on_the_drawn_subjects(tmp_path):
    files = write_opens2v(tmp_path, clips=2, parts=2)
    samples = list(read_opens2v(files.annotations, files.videos))
    assert tuple(sample.id for sample in samples) == files.sample_ids
    view = samples[0].references[0].view
    left, top, right, bottom = view.crop
    frame = read_video(view.path)[view.frame][top:bottom, left:right]
    inside = frame[decode_mask(view.mask, bottom - top, right - left)].astype(int)
    assert np.abs(np.median(inside, 0) - (40, 90, 220)).max() < 30


def test_captions_are_a_text_or_a_list(tmp_path):
    sample, _ = read_one(tmp_path, record(captions=["One.", " ", "Two. "]))
    assert sample.prompts == ("One.", "Two.")
    for captions in ("", [], [" "]):
        sample, faults = read_one(tmp_path, set_in(record(), ("metadata", "face_cap_qwen"), captions))
        assert sample is None and [fault.kind for fault in faults] == ["no prompt"]


def test_an_empty_mask_falls_back_to_the_box(tmp_path):
    nothing = encode_mask(np.zeros((HEIGHT, WIDTH), bool))
    for mask in (nothing, None, {"size": [HEIGHT, WIDTH], "counts": ""}, ABSENT):
        broken = set_in(record(), (*MASKS, "1"), mask)
        for score in ("aes_score", "gme_score"):
            broken = set_in(broken, (*ANNOTATIONS, 0, score), ABSENT)
        sample, faults = read_one(tmp_path, broken)
        assert [(fault.kind, fault.lost) for fault in faults] == [("empty mask", "nothing")]
        assert sample.references[1].view.box == (6, 2, 27, 19) and sample.references[1].view.mask is None
        sample, _ = read_one(tmp_path, broken, rule=SelectionRule(unscored=False))
        assert [reference.subject for reference in sample.references] == ["2"]


@pytest.mark.parametrize(
    ("keys", "value", "kind"),
    [
        ((*MASKS, "1", "size"), [WIDTH, HEIGHT], "mask size"),
        ((*MASKS, "1", "counts"), "no RLE", "mask"),
        ((*MASKS, "1", "counts"), 7, "mask"),
        ((*MASKS, "9"), {"size": [HEIGHT, WIDTH], "counts": "0"}, "mask"),
        ((*ANNOTATIONS, 0, "bbox"), [0, 0, 90, 10], "box"),
        ((*ANNOTATIONS, 0, "bbox"), [9, 9, 9, 9], "box"),
        ((*ANNOTATIONS, 0, "bbox"), [1, 2, 3], "box"),
        ((*ANNOTATIONS, 0, "bbox"), [0, 0, None, 4], "box"),
        ((*ANNOTATIONS, 0, "bbox"), ABSENT, "field"),
        ((*ANNOTATIONS, 0, "class_name"), 3, "field"),
        ((*ANNOTATIONS, 0), "brick", "field"),
    ],
)
def test_a_bad_subject_costs_only_itself(tmp_path, keys, value, kind):
    sample, faults = read_one(tmp_path, set_in(record(), keys, value))
    assert [(fault.kind, fault.lost, fault.sample_id) for fault in faults] == [(kind, "reference", "total_part1/key")]
    assert "2" in [reference.subject for reference in sample.references]


@pytest.mark.parametrize(
    ("keys", "value", "kind"),
    [
        (("metadata",), ABSENT, "field"),
        (("metadata",), [], "field"),
        (("metadata", "path"), "../secret.mp4", "path"),
        (("metadata", "path"), "/etc/passwd", "path"),
        (("metadata", "path"), None, "field"),
        (("metadata", "path"), "a\ud800.mp4", "field"),
        (("metadata", "crop"), [0, WIDTH, HEIGHT], "field"),
        (("metadata", "crop"), [10, 10, 0, HEIGHT], "crop"),
        (("metadata", "crop"), [0, 0, WIDTH, HEIGHT], "crop"),  # xyxy
        (("metadata", "crop"), [0, WIDTH, 0, 10**400], "field"),
        (("metadata", "crop"), [0, WIDTH + 2, 0, HEIGHT], "crop"),  # not the annotated frame's size
        (("metadata", "face_cut"), [5, 5], "no frames"),
        (("metadata", "face_cut"), [-1, 5], "field"),
        (("metadata", "face_cap_qwen"), ABSENT, "field"),
        (("metadata", "face_cap_qwen"), {"a": 1}, "field"),
        (("annotation", "ann_frame_data"), None, "field"),
        (("annotation", "ann_frame_data", "ann_frame_idx"), True, "field"),
        (("annotation", "ann_frame_data", "ann_frame_idx"), 4.5, "field"),
        (("annotation", "ann_frame_data", "ann_frame_idx"), 6, "mask"),
        (("annotation", "ann_frame_data", "box_format"), "xywh", "box"),
        (ANNOTATIONS, {}, "field"),
        (ANNOTATIONS, [], "no references"),
        (("annotation", "mask_annotation"), "?", "field"),
    ],
)
def test_a_bad_record_costs_only_itself(tmp_path, keys, value, kind):
    text = json.dumps({"a": record(), "key": set_in(record(), keys, value), "b": record()})
    samples, faults = read(tmp_path, text)
    assert [sample.id for sample in samples] == ["total_part1/a", "total_part1/b"]
    lost = [fault for fault in faults if fault.lost == "sample"]
    assert [(f.kind, f.sample_id, f.row, f.source) for f in lost] == [
        (kind, "total_part1/key", 1, str(tmp_path / "total_part1.json"))
    ]


def test_a_box_that_leaves_the_frame_by_rounding_is_cut(tmp_path):
    moved = set_in(record(), (*ANNOTATIONS, 0, "bbox"), [-1.4, 2, 57.2, 44.9])
    sample, faults = read_one(tmp_path, set_in(moved, (*MASKS, "1"), None))
    assert [fault.kind for fault in faults] == ["empty mask"]
    assert sample.references[0].view.box == (0, 2, 56, 44)


def test_scores_that_are_no_numbers(tmp_path):
    text = json.dumps({"key": record()}).replace('"aesthetic": 5.07', '"aesthetic": NaN')
    samples, faults = read(tmp_path, text.replace('"tech": 2.082', '"tech": "high"'))
    assert [(fault.kind, fault.lost) for fault in faults] == [("score", "nothing")] * 2
    assert {"aesthetic", "tech"}.isdisjoint(samples[0].scores) and samples[0].scores["motion"] == 0.0122


def test_a_subjects_bad_score_is_not_a_missing_one(tmp_path):
    text = json.dumps({"key": record(*SUBJECTS[:1], Drawn("ball", SUBJECTS[1].mask, 123456, 0.1))})
    samples, faults = read(tmp_path, text.replace("123456", "-Infinity"))
    assert [reference.subject for reference in samples[0].references] == ["1"]
    assert [(fault.kind, fault.lost) for fault in faults] == [("score", "reference")]
    samples, faults = read(tmp_path, text.replace("123456", "NaN").replace('"gme_score": 0.1', '"gme_score": 0.7'))
    assert len(samples[0].references) == 2 and [fault.lost for fault in faults] == ["nothing"]


def test_references_are_the_three_largest_that_score_high_enough():
    drawn = [Drawn(f"{i}", rectangle(40, 100, (20 * i, 0, 20 * i + 20, 40 - i))) for i in range(5)]
    assert chosen(*drawn) == ["1", "2", "3"]
    low = [Drawn(d.name, d.mask, aesthetic=4.49, gme=g) for d, g in zip(drawn, (0.59, 0.6, 0, 0, 0.9), strict=True)]
    assert chosen(*low) == ["2", "5"]
    small = Drawn("small", rectangle(40, 100, (0, 0, 19, 20)))
    assert chosen(small, drawn[4]) == ["2"]
    assert chosen(*drawn, rule=SelectionRule(max_references=1, min_crop_ratio=0.1925)) == ["1"]


def test_of_duplicates_the_larger_that_scores_high_enough_stays():
    background = rectangle(40, 100, (0, 0, 100, 40))
    person = [disc(40, 100, (50, 20), radius) for radius in (18, 18.5, 19)]
    assert chosen(*(Drawn("person", mask) for mask in person), Drawn("place", background)) == ["4", "3"]
    assert chosen(Drawn("person", person[0]), Drawn("person", person[1], aesthetic=1)) == ["1"]


def chosen(*drawn: Drawn, rule=DEFAULT_RULE) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        sample, _ = read_one(Path(folder), record(*drawn), rule=rule)
        return [reference.subject for reference in sample.references]


# ---- files


def test_a_truncated_file_gives_all_records_before_its_end(tmp_path):
    text = json.dumps({f"k{i}": record() for i in range(5)})
    for end in (len(text) - 1, len(text) - 9, len(text) * 2 // 3, 1):
        samples, faults = read(tmp_path, text[:end])
        assert len(samples) == {len(text) - 1: 5, len(text) - 9: 4, len(text) * 2 // 3: 3, 1: 0}[end]
        assert [(fault.kind, fault.row, fault.sample_id) for fault in faults] == [("not readable", len(samples), "")]


def test_the_next_file_is_read_after_a_bad_one(tmp_path):
    bad, good = tmp_path / "total_part1.json", write_annotations(tmp_path / "total_part2.json", {"key": record()})
    for content in (b"", b"\x00\x01", b"7", b"{", b'{"a" 1}', b"{1: 2}", b'{"a": }', b'{"a": 1}}'):
        bad.write_bytes(content)
        items = list(read_opens2v([bad, good], VIDEOS))
        assert items[-1].id == "total_part2/key" and {item.kind for item in items[:-1]} <= {"not readable", "field"}
        assert len(items) >= 2


@pytest.mark.parametrize(
    "bad",
    [
        '{"metadata": nope}',
        '{"a": 1,, }',
        '{"a": "\\x"}',
        "[" * 100_000 + "]" * 100_000,
        '"text"',
        "NaN",
        "-",
        "1e999",
        "9" * 5000,
    ],
)
def test_the_next_record_is_read_after_a_bad_one(tmp_path, bad):
    good = json.dumps(record())
    samples, faults = read(tmp_path, f'{{"a": {good}, "b": {bad}, "c": {good}}}')
    assert [sample.id for sample in samples] == ["total_part1/a", "total_part1/c"]
    assert [(fault.sample_id, fault.row) for fault in faults] == [("total_part1/b", 1)]
    assert len(faults[0].detail) <= 400


def test_bytes_that_are_not_utf8_cost_their_record(tmp_path):
    bad = json.dumps(record(captions="caf#")).encode().replace(b"#", b"\xe9")
    good = json.dumps(record(captions="café, 公园"), ensure_ascii=False).encode()
    samples, faults = read(tmp_path, b'\xef\xbb\xbf{"a": %b, "b": %b, "c": %b, "\xff": %b}' % (good, bad, good, good))
    assert [(sample.id, sample.prompts) for sample in samples] == [
        ("total_part1/a", ("café, 公园",)),
        ("total_part1/c", ("café, 公园",)),
    ]
    assert [(fault.kind, fault.row) for fault in faults] == [("not readable", 1), ("not readable", 3)]


def test_where_the_file_is_cut_into_chunks_changes_nothing(tmp_path, monkeypatch):
    text = json.dumps({f"é{i}": record(captions=f'A "{i}" 公 [{{') for i in range(3)}, ensure_ascii=False, indent=1)
    whole = read(tmp_path, text)
    for size in (1, 7, 100):
        monkeypatch.setattr(records, "CHUNK", size)
        assert read(tmp_path, text) == whole


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK", 1 << 14)

    def peak(count: int) -> int:
        path = write_annotations(tmp_path / "total_part1.json", dict.fromkeys(map(str, range(count)), record()))
        tracemalloc.start()
        assert sum(isinstance(item, Sample) for item in read_opens2v([path], VIDEOS)) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # what is only made once
    assert peak(1000) < 4 * peak(50)


def test_a_record_without_end_stops_at_a_length(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_RECORD", 10_000)
    monkeypatch.setattr(records, "CHUNK", 1000)
    samples, faults = read(tmp_path, f'{{"a": {json.dumps(record())}, "b": ["{"x" * 100_000}')
    assert len(samples) == 1 and [fault.kind for fault in faults] == ["not readable"]


def test_a_key_that_cannot_name_a_folder_is_a_fault(tmp_path):
    samples, faults = read(tmp_path, json.dumps({"..": record(), "": record(), "a\ud800": record(), "b": record()}))
    assert [sample.id for sample in samples] == ["total_part1/b"]
    assert [fault.kind for fault in faults] == ["id", "id", "id"]


def test_wrong_files_say_what_to_pass(tmp_path):
    pairs = tmp_path / "pairs.json"
    with pytest.raises(ValueError, match="does not exist"):
        read_opens2v([pairs], VIDEOS)
    pairs.write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        read_opens2v([pairs], VIDEOS)
    clusters = tmp_path / "cluster_videos.json"
    clusters.write_text('{"0": ["total_part1/a"]}')
    with pytest.raises(ValueError, match="list of cross pairs"):
        read_opens2v([], VIDEOS, [clusters])


# ---- cross pairs


def write_pairs(folder: Path, *pairs) -> list[Path]:
    path = folder / "pairs.json"
    path.write_text(json.dumps(pairs), "utf-8")
    return [path]


A, B, C = "total_part1/a", "total_part1/b", "total_part1/c"


def crosses(samples) -> dict:
    return {s.id: {r.subject: [v.path.name for v in r.cross] for r in s.references} for s in samples}


def named(*names: str) -> dict:
    return {name: record(path=f"{name}.mp4") for name in names}


def test_a_pair_counts_both_ways(tmp_path):
    pairs = write_pairs(tmp_path, cross_pair(A, B, "2", "ball", aft_class_id=1))
    samples, faults = read(tmp_path, named("a", "b"), pairs=pairs)
    assert not faults
    assert crosses(samples) == {A: {"2": ["b.mp4"], "1": []}, B: {"2": [], "1": ["a.mp4"]}}
    assert samples[0].references[0].cross[0] == samples[1].references[1].view
    assert samples[1].references[1].cross[0] == samples[0].references[0].view


def test_the_other_clip_may_be_in_another_file(tmp_path):
    files = write_opens2v(tmp_path, clips=4, parts=2, videos=False)
    samples = list(read_opens2v(files.annotations, files.videos, files.cross_pairs))
    assert len(samples) == 4
    for sample in samples:
        for reference in sample.references:
            (view,) = reference.cross
            assert view.path.parent != sample.clip.path.parent and view.mask and view.crop == (4, 2, 60, 46)


def test_pairs_that_teach_nothing_are_dropped(tmp_path):
    pairs = write_pairs(
        tmp_path,
        cross_pair(A, A, "1", "brick"),
        cross_pair(A, B, "1", "brick", image_similarity=0.99),
        cross_pair(A, C, "1", "brick", image_similarity=0.9),
        cross_pair(C, A, "1", "brick", image_similarity=0.9),
    )
    samples, faults = read(tmp_path, named("a", "b", "c"), pairs=pairs)
    assert not faults and crosses(samples)[A] == {"2": [], "1": ["c.mp4"]}
    samples, _ = read(tmp_path, named("a", "b", "c"), pairs=pairs, rule=SelectionRule(max_image_similarity=None))
    assert crosses(samples)[A]["1"] == ["b.mp4", "c.mp4"]  # the most similar first
    rule = SelectionRule(max_image_similarity=None, max_cross_views=1)
    assert crosses(read(tmp_path, named("a", "b", "c"), pairs=pairs, rule=rule)[0])[A]["1"] == ["b.mp4"]


def test_a_pair_that_names_what_is_not_there_is_one_fault_an_end(tmp_path):
    pairs = write_pairs(
        tmp_path,
        cross_pair(A, "total_part9/x", "1", "brick"),
        cross_pair(B, "total_part9/x", "1", "brick"),
        cross_pair(A, B, "7", "?", aft_class_id="1"),
    )
    samples, faults = read(tmp_path, named("a", "b"), pairs=pairs)
    assert len(samples) == 2
    assert sorted((f.kind, f.lost, f.sample_id, f.row) for f in faults) == [
        ("cross pair", "nothing", A, 2),
        ("cross pair", "nothing", "total_part9/x", 0),
    ]


def test_a_cross_view_has_to_be_usable_but_not_to_score(tmp_path):
    records = named("a", "b", "c")
    for score in ("aes_score", "gme_score"):
        records["b"] = set_in(records["b"], (*ANNOTATIONS, 0, score), 0)
    records["c"] = set_in(records["c"], (*MASKS, "1", "counts"), "broken")
    pairs = write_pairs(tmp_path, cross_pair(A, B, "1", "brick"), cross_pair(A, C, "1", "brick"))
    samples, faults = read(tmp_path, records, pairs=pairs)
    assert crosses(samples)[A]["1"] == ["b.mp4"] and crosses(samples)[B] == {"2": []}
    assert [fault.kind for fault in faults] == ["mask"]  # once, though the file is read twice


def test_broken_pairs_are_faults(tmp_path):
    good = cross_pair(A, B, "1", "brick")
    broken = [7, None, {}, good | {"cur_id": 3}, good | {"aft_class_id": None}, good | {"image_similarity": "1"}]
    samples, faults = read(tmp_path, named("a", "b"), pairs=write_pairs(tmp_path, *broken, good))
    assert len(faults) == len(broken) and {fault.lost for fault in faults} == {"nothing"}
    assert crosses(samples)[A]["1"] == ["b.mp4"]


# ---- anything at all

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**400)
    | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def all_keys(value, above=()):
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in members:
        yield (*above, key)
        yield from all_keys(inner, (*above, key))


KEYS = list(all_keys(record()))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KEYS), junk | st.just(ABSENT)), min_size=1, max_size=3))
def test_whatever_a_record_holds_its_neighbours_are_read(tmp_path_factory, changes):
    broken = record()
    for keys, value in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change removed what this one would
            broken = set_in(broken, keys, value)
    samples, faults = read(tmp_path_factory.mktemp("any"), json.dumps({"a": record(), "b": broken, "c": record()}))
    assert {"total_part1/a", "total_part1/c"} <= {sample.id for sample in samples}
    assert all(fault.row == 1 for fault in faults) and len(samples) + len(faults) >= 3
    for sample in samples:
        assert json.dumps(sample.scores, allow_nan=False) and "".join(sample.prompts).encode()
        for reference in sample.references:
            assert 0 <= reference.view.box[0] < reference.view.box[2]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_bytes_change_reading_goes_to_an_end(tmp_path_factory, data):
    text = bytearray(json.dumps({f"k{i}": record() for i in range(3)}).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    samples, faults = read(tmp_path_factory.mktemp("bytes"), bytes(text))
    assert len(samples) <= 3 and (len(samples) == 3 or faults)
