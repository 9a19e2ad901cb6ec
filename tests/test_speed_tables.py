"""The tables of what a video takes: README and docs show what benchmarks/speed.json holds, and the script makes it."""

import json
from pathlib import Path

import pytest

from benchmarks import speed
from benchmarks.machine import between_marks, write_between_marks


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_a_page_shows_the_table_of_the_file(page):
    content = json.loads(speed.ROWS.read_text())
    assert between_marks(ROOT / page, "speed") == speed.as_markdown(content, is_short=page == "README.md")


def test_the_file_holds_what_is_reckoned_today():
    content = json.loads(speed.ROWS.read_text())
    if content["kind"] == "measured":
        pytest.skip("measured on a machine with a GPU")
    options = speed.Options(reckon=True)
    assert content == speed.content_of([speed.reckoned(*case) for case in speed.cases(speed.REAL)], options)


def test_reckoned_rows_agree_with_the_published_rate():
    """diffusers on an H100: 9.77 s for a step of two passes of 14B without references."""
    seconds = 2 * speed.operations(speed.MODELS["14B"], "480x832, 81 frames", 0) / speed.PUBLISHED_RATE
    assert seconds == pytest.approx(9.77, rel=0.01)


def test_presets_make_fewer_passes():
    assert [speed.passes_of(preset, 50) for preset in ("exact", "balanced", "one pass")] == [150, 135, 50]


def test_tiny_shapes_are_measured_on_a_cpu(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- speed -->\n<!-- end of speed -->\nb\n")
    speed.main(speed.Options(device="cpu", steps=4, output=tmp_path / "speed.json", page=(page,)))
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content["kind"] == "measured" and set(content["versions"]) == {"refalign", "torch", "diffusers"}
    assert [row["preset"] for row in content["rows"]] == ["exact", "balanced", "fast", "one pass"]
    assert all(row["step_seconds"] > 0 and row["clip_minutes"] >= 0 for row in content["rows"])
    assert "Measured on:" in between_marks(page, "speed")


def test_a_page_without_marks_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"has no lines <!-- speed -->"):
        write_between_marks(tmp_path / "page.md", "speed", "text")
