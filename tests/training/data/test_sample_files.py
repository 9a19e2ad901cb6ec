import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refalign_training.data.sample import Clip, Reference, Sample, Unusable, View
from refalign_training.data.sample_files import read_sample, write_sample


ROOT = Path("/videos")
MASK = {"size": [2, 2], "counts": "112"}
SAMPLE = Sample(
    id="part/a",
    prompts=("one", "zwei"),
    clip=Clip(ROOT / "part/a.mp4", 3, 9, (0, 0, 8, 6)),
    references=(
        Reference("1", View(ROOT / "part/a.mp4", 4, (0, 0, 8, 6), (1.5, 2.0, 3.0, 4.0), mask=MASK), label="ball"),
        Reference("2", None, (View(ROOT / "b.mp4", 0.25, box=(1.0, 2.0, 3.0, 4.0), box_long_side=768),)),
        Reference("2", View(ROOT / "image.png")),
    ),
    source="file.json",
    row=7,
    scores={"aesthetic": 5.5},
)
RECORD = json.loads(write_sample(SAMPLE, ROOT))


def changed(keys, value) -> str:
    """The record with another value behind the keys."""
    record = json.loads(json.dumps(RECORD))
    part = record
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return json.dumps(record)


def places(part=RECORD, keys=()):
    """The keys to every part of the record."""
    if keys:
        yield keys
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield from places(value, (*keys, key))


def test_a_sample_is_read_as_it_was_written():
    assert read_sample(write_sample(SAMPLE, ROOT), ROOT) == SAMPLE


def test_paths_are_relative():
    assert "/videos" not in write_sample(SAMPLE, ROOT)
    assert read_sample(write_sample(SAMPLE, ROOT), Path("/other")).clip.path == Path("/other/part/a.mp4")


@pytest.mark.parametrize(
    ("keys", "value", "kind"),
    [
        (("id",), "../a", "id"),
        (("prompts",), [], "no prompt"),
        (("prompts",), [1], "field"),
        (("clip", "path"), "../a.mp4", "path"),
        (("clip", "start"), "x", "field"),
        (("clip", "crop"), [1, 2], "field"),
        (("references", 0, "view", "frame"), float("nan"), "field"),
        (("references", 0, "view", "frame"), "x", "field"),
        (("references", 0, "view", "box"), ["a"] * 4, "score"),
        (("references", 1, "cross", 0, "box_long_side"), 0, "field"),
        (("references", 2, "subject"), 5, "field"),
        (("scores",), {"a": "b"}, "score"),
    ],
)
def test_a_field_that_is_wrong(keys, value, kind):
    with pytest.raises(Unusable) as error:
        read_sample(changed(keys, value), ROOT)
    assert error.value.kind == kind


MEMBERS = [keys for keys in places() if isinstance(keys[-1], str) and {"scores", "mask"}.isdisjoint(keys[:-1])]


@pytest.mark.parametrize("keys", MEMBERS)
def test_a_field_that_is_missing(keys):
    record = json.loads(json.dumps(RECORD))
    part = record
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    with pytest.raises(Unusable, match=keys[-1]) as error:
        read_sample(json.dumps(record), ROOT)
    assert error.value.kind == "field"


@given(
    keys=st.sampled_from(list(places())),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=3), values, max_size=2),
        max_leaves=4,
    ),
)
def test_any_line_is_a_sample_that_can_be_written_or_unusable(keys, value):
    try:
        sample = read_sample(changed(keys, value), ROOT)
    except Unusable:
        return
    assert read_sample(write_sample(sample, ROOT), ROOT) == sample
