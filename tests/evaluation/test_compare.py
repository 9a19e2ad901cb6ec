"""`refalign-eval compare`: the table, intervals of differences, the picture and the page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from refalign.video import write_video
from refalign_evaluation.bootstrap import differences
from refalign_evaluation.cli import main
from refalign_evaluation.results import read_results
from refalign_evaluation.totals import WEIGHTS, upload_json, write_upload
from tests.evaluation.small_results import IDS, write_results


EVIL = "<script>alert('model')</script>"
AESTHETICS = dict(zip(IDS, (4.0, 4.5, 5.0, 5.5, 6.0, 6.5), strict=True))
BETTER = {sample_id: raw + 0.3 for sample_id, raw in AESTHETICS.items()}


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def values(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for found, attributes in self.found if found == tag]


@pytest.fixture
def runs(tmp_path):
    """Two runs with the video of a sample each; the second has 0.1 more of aesthetics for every sample."""
    first = write_results(tmp_path / "first", "a model", {"aesthetics": AESTHETICS})
    second = write_results(tmp_path / "second", EVIL, {"aesthetics": BETTER})
    for run in (first, second):
        write_video(np.full((5, 64, 96, 3), 200, np.uint8), run / f"{IDS[0]}.mp4")
    return first, second


def compare(*words: object) -> int:
    return main(["compare", *map(str, words)])


def refuses(words, capsys) -> str:
    assert compare(*words) == 1
    return capsys.readouterr().err.strip()


# Intervals


def test_a_difference_that_all_samples_share_is_certain(runs):
    found = differences(*map(read_results, ([run] for run in runs)), resamples=200)
    for name, value in (("aesthetics", 0.1), ("total", 0.016)):
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx((value, value, value))
    assert found["gme"].value == found["gme"].low == found["gme"].high == 0


def test_intervals_are_those_of_the_seed(runs, tmp_path):
    other = write_results(tmp_path / "other", raw={"aesthetics": {IDS[0]: 5.0}})
    results = read_results([runs[0]]), read_results([other])
    first, again, new = (differences(*results, resamples=200, seed=seed) for seed in (1, 1, 2))
    assert first == again != new


def test_an_interval_covers_what_bootstrap_by_hand_gives(tmp_path):
    gains = {IDS[0]: 1.0, IDS[1]: 0.0}
    first = write_results(tmp_path / "a", raw={"gme": dict.fromkeys(IDS, 0.0)})
    other = write_results(tmp_path / "b", raw={"gme": {**dict.fromkeys(IDS, 0.0), **gains}})
    found = differences(read_results([first]), read_results([other]), resamples=4000)["gme"]
    # One sample of six gains 1: the sum over six draws is binomial, and at most 3/6 with 97.5 %
    assert (found.value, found.low, found.high) == pytest.approx((1 / 6, 0, 3 / 6))


def test_only_samples_that_both_have_are_compared(runs):
    file = runs[1] / "scores/aesthetic_score.json"
    entries = json.loads(file.read_text())
    del entries[IDS[5]]
    file.write_text(json.dumps(entries))
    found = differences(*map(read_results, ([run] for run in runs)), resamples=200)
    assert found["aesthetics"].samples == 5
    assert found["aesthetics"].value == pytest.approx(0.1)


def test_zeros_of_nexus_count_in_neither_mean(tmp_path):
    first = write_results(tmp_path / "a", raw={"nexus": dict.fromkeys(IDS, 0.02)})
    other = write_results(tmp_path / "b", raw={"nexus": {**dict.fromkeys(IDS, 0.03), IDS[0]: 0.0}})
    found = differences(read_results([first]), read_results([other]), resamples=200)["nexus"]
    assert found.value == pytest.approx(0.2)


def test_without_a_metric_there_is_no_difference_of_totals(runs):
    (runs[1] / "scores/gmescore.json").unlink()
    found = differences(*map(read_results, ([run] for run in runs)), resamples=200)
    assert "total" not in found and "gme" not in found and "nexus" in found


# The table


def test_the_table_has_runs_files_and_published_rows(runs, tmp_path, capsys):
    write_upload(tmp_path / "theirs.json", upload_json("open", dict.fromkeys(WEIGHTS["open"], 0.5)))
    assert compare(*runs, tmp_path / "theirs.json", "--published", "--output", tmp_path / "page") == 0
    told = capsys.readouterr().out
    assert re.search(r"^theirs +50\.00 ", told, re.MULTILINE)
    assert re.search(r"^RefAlign-14B +60\.42 +46\.84 ", told, re.MULTILINE)
    assert re.search(r"^Bernini-R-14B \* +62\.94 +- ", told, re.MULTILINE)
    assert "Aesthetics       +10.00 [+10.00, +10.00], 6 samples" in told


def test_what_is_not_whole_is_marked(runs, tmp_path, capsys):
    (runs[0] / "scores/gmescore.json").unlink()
    assert compare(runs[0], "--output", tmp_path / "page") == 0
    told = capsys.readouterr().out
    assert re.search(r"^a model \* +- ", told, re.MULTILINE)
    assert "* a model: 174 of the split's samples were not asked for; no GmeScore, so no total." in told


def test_runs_of_one_name_are_told_apart(runs, tmp_path, capsys):
    other = write_results(tmp_path / "third", "a model")
    assert compare(runs[0], other, "--output", tmp_path / "page", "--no-videos") == 0
    told = capsys.readouterr().out
    assert "a model (first)" in told and "a model (third)" in told


# The page


@pytest.fixture
def page(runs, tmp_path) -> Tags:
    assert compare(*runs, "--published", "--output", tmp_path / "page") == 0
    return Tags((tmp_path / "page/index.html").read_text("utf-8"))


def test_the_page_asks_no_host_for_anything(page, tmp_path):
    text = (tmp_path / "page/index.html").read_text("utf-8")
    assert "http" not in text and "//" not in re.sub('base64,[^"]+', "", text)
    assert page.values("link", "href") == ["data:,"]
    (image,) = page.values("img", "src")
    assert image is not None and image.startswith("data:image/png;base64,")
    for place in page.values("video", "src") + page.values("video", "data-poster"):
        assert place is not None and (tmp_path / "page" / place).is_file()


def test_texts_of_others_are_escaped(page):
    assert len([tag for tag, _ in page.found if tag == "script"]) == 1


def test_videos_stand_side_by_side_by_sample(page, tmp_path):
    assert page.values("video", "src") == [f"videos/1/{IDS[0]}.mp4", f"videos/2/{IDS[0]}.mp4"]
    assert set(page.values("video", "preload")) == {"none"}
    assert page.values("article", "data-category") == [sample_id.rpartition("_")[0] for sample_id in IDS]
    assert Image.open(tmp_path / f"page/videos/1/{IDS[0]}.jpg").size == (96, 64)


def test_a_picture_of_the_scores_is_written(page, tmp_path):
    assert Image.open(tmp_path / "page/scores.png").size > (1000, 500)


def test_a_broken_video_is_told_and_not_copied(runs, tmp_path, capsys):
    (runs[0] / f"{IDS[1]}.mp4").write_bytes(b"no video")
    assert compare(*runs, "--output", tmp_path / "page") == 0
    told = capsys.readouterr().out
    assert f"a model: the video cannot be shown (video: {IDS[1]}.mp4 cannot be decoded" in told
    assert f"a model: there is no video: {IDS[2]}, {IDS[3]}, {IDS[4]}, {IDS[5]}" in told
    assert not list((tmp_path / "page/videos/1").glob(f"{IDS[1]}*"))


def test_videos_may_be_left_out(runs, tmp_path):
    assert compare(*runs, "--output", tmp_path / "page", "--no-videos") == 0
    assert {file.name for file in (tmp_path / "page").iterdir()} == {"index.html", "scores.png"}


# Bad input


def test_what_cannot_be_compared_is_told(runs, tmp_path, capsys):
    output = ["--output", tmp_path / "page"]
    (tmp_path / "stale.json").write_text('{"total_score": 0.63569, "aes_score": 0.33439}')
    record = json.loads((runs[1] / "run.json").read_text())
    (runs[1] / "run.json").write_text(json.dumps({**record, "split": "single"}))
    (runs[1] / "scores").rename(tmp_path / "scores")
    assert "compare runs of one split" in refuses([*runs, *output], capsys)
    assert "leave --published out" in refuses([runs[1], "--published", *output], capsys)
    assert "is not a run: it has no run.json" in refuses([tmp_path / "scores", *output], capsys)
    assert "is not the leaderboard's file" in refuses([tmp_path / "stale.json", *output], capsys)
    assert "named twice" in refuses([runs[0], runs[0], *output], capsys)
    assert "--resamples is 0" in refuses([runs[0], "--resamples", "0", *output], capsys)
    assert not (tmp_path / "page").exists()


def test_a_page_that_exists_is_not_replaced(page, runs, tmp_path, capsys):
    assert "exists already" in refuses([*runs, "--output", tmp_path / "page"], capsys)
