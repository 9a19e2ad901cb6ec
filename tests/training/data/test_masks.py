import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from refalign_training.data.masks import (
    check_box,
    check_mask,
    decode_mask,
    drop_duplicates,
    mask_box,
)
from refalign_training.data.sample import Unusable, View
from tests.training.opens2v_files import box_of, disc, encode_mask, rectangle


masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda size: arrays(bool, size))


def run_lengths(*runs: int, size: tuple[int, int]) -> dict:
    rle = coco.frPyObjects({"size": list(size), "counts": list(runs)}, *size)
    return {"size": list(size), "counts": rle["counts"].decode("ascii")}


def view(mask: np.ndarray | None = None, box=None) -> View:
    return View("clip.mp4", 0, box=box or tuple(box_of(mask)), mask=None if mask is None else encode_mask(mask))


@given(masks)
def test_a_mask_decodes_to_what_was_encoded(mask):
    rle = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(rle, *mask.shape), mask)
    assert mask_box(rle) == (tuple(box_of(mask)) if mask.any() else None)


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 5), max_size=20))
def test_runs_of_no_length_change_nothing(height, width, runs):
    runs = [run for i, run in enumerate(runs) if sum(runs[: i + 1]) <= height * width]
    runs.append(height * width - sum(runs))
    rle = run_lengths(*runs, size=(height, width))
    decoded = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    np.testing.assert_array_equal(decode_mask(rle, height, width), decoded)
    assert mask_box(check_mask(rle, height, width)) == (tuple(box_of(decoded)) if decoded.any() else None)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=60) | st.text(max_size=20))
def test_counts_that_are_garbage_never_reach_pycocotools(counts):
    try:
        mask = decode_mask({"size": [6, 7], "counts": counts}, 6, 7)
    except Unusable as error:
        assert error.kind == "mask"
    else:
        assert mask.shape == (6, 7)


@settings(max_examples=100)
@given(st.data())
def test_a_changed_character_is_found_or_gives_a_mask_of_the_size(data):
    counts = list(encode_mask(disc(40, 50, (25, 20), 12))["counts"])
    counts[data.draw(st.integers(0, len(counts) - 1))] = chr(data.draw(st.integers(32, 126)))
    try:
        assert decode_mask({"size": [40, 50], "counts": "".join(counts)}, 40, 50).shape == (40, 50)
    except Unusable as error:
        assert error.kind == "mask"


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        ({"size": [7, 6], "counts": encode_mask(np.ones((6, 7), bool))["counts"]}, "mask size"),
        ({"size": [10**9, 10**9], "counts": "0"}, "mask size"),
        ({"size": [6.5, 7], "counts": "0"}, "mask size"),
        ({"size": "6x7", "counts": "0"}, "field"),
        ({"size": [6, 7]}, "field"),
        ({"size": [6, 7], "counts": [42]}, "mask"),
        ({"size": [6, 7], "counts": ""}, "mask"),
        ({"size": [6, 7], "counts": "\0"}, "mask"),
        ({"size": [6, 7], "counts": "P" * 1000}, "mask"),
        ({"size": [6, 7], "counts": "\udc80"}, "mask"),
        ([1], "field"),
    ],
)
def test_what_is_no_mask_of_the_frame_says_why(mask, kind):
    with pytest.raises(Unusable) as error:
        check_mask(mask, 6, 7)
    assert error.value.kind == kind


def test_a_size_that_would_exhaust_memory_is_refused_even_if_the_frame_has_it():
    side = 1 << 15
    with pytest.raises(Unusable, match="mask size"):
        decode_mask(run_lengths(side * side, size=(side, side)), side, side)


def test_a_box_may_leave_the_frame_by_the_tolerance():
    assert check_box([-1.5, 0, 101, 50], 100, 50, tolerance=2) == (0, 0, 100, 50)
    for box in (
        [-3, 0, 10, 10],
        [0, 0, 103, 10],
        [5, 5, 5, 9],
        [9, 5, 3, 9],
        [0, 0, float("nan"), 9],
        [0, 0, 1],
        "box",
    ):
        with pytest.raises(Unusable, match="box"):
            check_box(box, 100, 50, tolerance=2)


@given(st.lists(arrays(bool, (6, 6)).filter(np.any), min_size=2, max_size=5), st.sampled_from([0.0, 0.3, 0.8]))
def test_no_two_of_those_that_stay_overlap_too_much(drawn, limit):
    kept = drop_duplicates([view(mask) for mask in drawn], limit)
    iou = [[(a & b).sum() / (a | b).sum() for b in drawn] for a in drawn]
    assert all(iou[a][b] <= limit for a in kept for b in kept if a != b)
    for gone in set(range(len(drawn))) - set(kept):
        assert any(iou[gone][k] > limit and drawn[k].sum() >= drawn[gone].sum() for k in kept)


def test_boxes_are_compared_where_a_mask_is_absent():
    triangle = view(np.tri(20, dtype=bool))  # its box is the frame's, its area half of it
    assert drop_duplicates([triangle, view(rectangle(20, 20, (0, 0, 20, 20)))], limit=0.6) == [0, 1]
    assert drop_duplicates([triangle, view(box=(0, 0, 20, 20))], limit=0.6) == [1]
    assert drop_duplicates([view(box=(0, 0, 2, 2)), view(box=(1, 0, 3, 2))], limit=0.34) == [0, 1]
    assert drop_duplicates([view(box=(0, 0, 2, 2)), view(box=(1, 0, 3, 2))], limit=0.33) == [0]


def test_of_duplicates_the_largest_stays():
    small, large, larger = (rectangle(40, 40, (0, 0, 30, side)) for side in (30, 33, 36))
    other = rectangle(40, 40, (32, 0, 40, 40))
    assert drop_duplicates([view(small), view(other), view(larger), view(large)]) == [1, 2]
    assert drop_duplicates([view(small), view(larger)], limit=0.9) == [0, 1]
    assert drop_duplicates([]) == []
