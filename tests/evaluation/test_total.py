"""`refalign-eval total`, the published rows, and the figures that cards quote of them."""

import json
import re
from pathlib import Path

import pytest

from refalign_evaluation.cli import main
from refalign_evaluation.published import SPLIT, Published, published
from refalign_evaluation.results import ZERO, read_results
from refalign_evaluation.run_folder import tell_failure
from refalign_evaluation.scores import METRICS
from refalign_evaluation.totals import WEIGHTS, official_ids, read_upload, total_score, upload_json, write_upload
from tests.evaluation.small_results import IDS, write_official, write_results


CARDS = Path(__file__).parents[2] / "model_cards"
WHOLE_ROWS = [row for row in published() if row.metrics]
COUNTS = {"open": 180, "human": 60, "single": 90}


@pytest.fixture
def run(tmp_path):
    return write_results(tmp_path / "run")


def refuses(words: list[object], capsys) -> str:
    """The line that a refused command ends with."""
    assert main(["total", *map(str, words)]) == 1
    return capsys.readouterr().err.strip()


# The formula


@pytest.mark.parametrize("row", WHOLE_ROWS, ids=lambda row: row.model)
def test_a_published_total_is_that_of_its_scores(row):
    scores = {name: value / 100 for name, value in row.metrics.items()}
    # As it would be printed: Kaleido's figures make 56.6004 and 56.59 is published, more than rounding explains
    assert round(100 * total_score(SPLIT, scores), 2) == pytest.approx(row.total, abs=0.0101)


@pytest.mark.parametrize("split", WEIGHTS)
def test_weights_sum_to_one(split):
    assert sum(WEIGHTS[split].values()) == pytest.approx(1)


@pytest.mark.parametrize("split", WEIGHTS)
def test_a_split_has_its_official_number_of_samples(split):
    assert len(set(official_ids(split))) == COUNTS[split]


def test_ninety_samples_have_a_face_to_compare():
    assert len(list(filter(METRICS["face_similarity"].applies, official_ids("open")))) == 90


def test_people_have_no_nexus_score():
    scores = dict.fromkeys(WEIGHTS["human"], 0.5)
    assert "nexus_score" not in upload_json("human", scores)
    assert total_score("human", scores) == pytest.approx(0.5)


def test_a_missing_metric_gives_no_total():
    with pytest.raises(ValueError, match="without NexusScore"):
        total_score("open", dict.fromkeys(WEIGHTS["human"], 0.5))


def test_the_official_demo_of_smoothness(tmp_path):
    write_official(tmp_path, "motion_smoothness", {"faceobj_14": 0.8985507246376812, "singleface_3": 1.0})
    assert read_results([tmp_path]).scores == {"motion_smoothness": 0.9492753623188406}


# The leaderboard's file


def test_the_file_has_the_leaderboards_keys_as_fractions(run):
    assert main(["total", str(run)]) == 0
    keys = ["total_score", "aes_score", "motion_smoothness", "motion_amplitude", "facesim_cur", "gme_score"]
    assert json.loads((run / "total.json").read_text()) == pytest.approx(
        dict.fromkeys([*keys, "nexus_score", "natural_score"], 1)
    )


def test_a_file_is_read_as_it_is_written(tmp_path):
    scores = dict(zip(WEIGHTS["open"], (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), strict=True))
    write_upload(tmp_path / "total.json", upload_json("open", scores))
    assert read_upload(tmp_path / "total.json", "open") == scores


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"total_score": 0.63569}, r"total_score is 0\.63569, but by TotalScore v1\.1 its scores make 0\.5000"),
        ({"aes_score": 50}, "aes_score is 50, not a fraction"),
        ({"gme_score": float("nan")}, "gme_score is nan"),
        ({"motion_amplitude": None}, "motion_amplitude is None"),
    ],
)
def test_a_file_of_another_formula_is_told(change, problem, tmp_path):
    content = upload_json("open", dict.fromkeys(WEIGHTS["open"], 0.5))
    (tmp_path / "total.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=problem):
        read_upload(tmp_path / "total.json", "open")


def test_official_files_are_enough(run, tmp_path):
    files = sorted((run / "scores").iterdir())
    assert main(["total", *map(str, files), "--split", "open", "--output", str(tmp_path / "upload.json")]) == 0
    assert json.loads((tmp_path / "upload.json").read_text())["total_score"] == pytest.approx(1)


def test_a_folder_of_the_official_tools_completes_a_run(run, tmp_path):
    (run / "scores/nexusscore.json").unlink()
    write_official(tmp_path / "official", "nexus", dict.fromkeys(IDS, 0.025))
    assert main(["total", str(run), str(tmp_path / "official")]) == 0
    assert json.loads((run / "total.json").read_text())["nexus_score"] == pytest.approx(0.5)


# What is missing


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("gmescore.json", r"without GmeScore \(`refalign-eval score` measures it"),
        ("nexusscore.json", r"without NexusScore \(the official tool measures it: nexusscore\.json\)"),
    ],
)
def test_without_a_metric_there_is_no_file(file, remedy, run, capsys):
    (run / "scores" / file).unlink()
    assert re.search(remedy, refuses([run], capsys))
    assert not (run / "total.json").exists()


def test_missing_videos_are_told_with_their_reasons(tmp_path, capsys):
    run = write_results(tmp_path / "run", raw={"nexus": {"multiobject_1": 0.0}})
    file = run / "scores/gmescore.json"
    entries = json.loads(file.read_text())
    for sample_id in IDS[:3]:
        del entries[sample_id]
    file.write_text(json.dumps(entries))
    tell_failure(run, IDS[0], "out of memory")
    (run / "scoring.json").write_text(json.dumps({"unscored": {"gme": {IDS[1]: "the video is empty"}}}))
    assert main(["total", str(run)]) == 0
    told = capsys.readouterr().out
    assert "3 of 6 videos" in told
    assert f"GmeScore: without {IDS[0]}: no video (out of memory)" in told
    assert f"GmeScore: without {IDS[1]}: the video is empty" in told
    assert f"GmeScore: without {IDS[2]}: it is not in the file" in told
    assert f"NexusScore: without multiobject_1: {ZERO}" in told
    assert "174 of its samples were not asked for" in told


def test_a_total_of_an_earlier_call_is_told(run, capsys):
    assert main(["total", str(run)]) == 0
    (run / "scores/gmescore.json").unlink()
    assert main(["total", str(run)]) == 1
    assert "total.json is of an earlier call" in capsys.readouterr().out


def test_strict_refuses_what_is_not_whole(run, capsys):
    assert "--strict" in refuses([run, "--strict"], capsys)
    assert not (run / "total.json").exists()


def test_a_missing_repetition_of_naturalscore_is_told(run, capsys):
    (run / "scores/naturalscore_2.json").unlink()
    assert main(["total", str(run)]) == 0
    assert "NaturalScore: naturalscore_2.json missing" in capsys.readouterr().out


def test_a_metric_of_which_no_video_counts_gives_no_total(tmp_path, capsys):
    run = write_results(tmp_path / "run", raw={"nexus": dict.fromkeys(IDS, 0.0)})
    assert "no video of nexusscore.json counts" in refuses([run], capsys)


# Bad input


def test_scores_of_another_run_are_refused(run, capsys):
    write_official(run / "scores", "gme", {"singleobj_1": 0.7, "singleobj_29": 0.7})
    assert re.search(r"gmescore\.json: 1 samples are not of this run or split: singleobj_29", refuses([run], capsys))


def test_scores_of_another_split_are_refused(run, capsys):
    assert "not of this run or split" in refuses([run / "scores", "--split", "human"], capsys)


def test_a_metric_of_samples_that_it_does_not_measure_is_refused(run, capsys):
    write_official(run / "scores", "face_similarity", {"multihuman_1": 0.7})
    assert "FaceSim is not measured of samples such as multihuman_1" in refuses([run], capsys)


@pytest.mark.parametrize("content", ['{"singleface_1": {"gme_score": NaN}}', '{"singleface_1": {"gme_sc'])
def test_a_damaged_file_is_named(content, run, capsys):
    (run / "scores/gmescore.json").write_text(content)
    assert "gmescore.json" in refuses([run], capsys)
    assert not (run / "total.json").exists()


@pytest.mark.parametrize("content", ['{"unscored": []}', '{"settings": {"gme": 1}}'])
def test_a_damaged_record_of_scoring_is_named(content, run, capsys):
    (run / "scoring.json").write_text(content)
    assert "scoring.json is not what `refalign-eval score` writes" in refuses([run], capsys)


def test_what_cannot_be_read_is_told(run, tmp_path, capsys):
    other = write_results(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "scores.json").write_text("{}")
    assert "has no raw scores" in refuses([tmp_path / "empty"], capsys)
    assert "does not exist" in refuses([tmp_path / "nowhere.json"], capsys)
    assert "is not named as the official tools" in refuses([tmp_path / "scores.json"], capsys)
    assert "`refalign-eval compare` takes several" in refuses([run, other], capsys)
    assert "the same official file twice" in refuses([run, other / "scores"], capsys)
    assert "is a run of the split open, not human" in refuses([run, "--split", "human"], capsys)


# Published rows, and the cards that quote them


def row_of(model: str) -> Published:
    return next(row for row in published() if row.model == model)


def test_every_published_row_says_where_it_is_from():
    assert len(published()) == 13
    assert all(row.source for row in published())


@pytest.mark.parametrize(("card", "model"), [("refalign-1.3b", "RefAlign-1.3B"), ("refalign-14b", "RefAlign-14B")])
def test_a_card_quotes_the_published_row(card, model):
    row = row_of(model)
    titles = [metric.title for metric in METRICS.values()]
    head, line = f"| {' | '.join(['Total', *titles])} |", "|---|---|---|---|---|---|---|---|"
    figures = " | ".join(f"{value:.2f}" for value in (row.total, *row.metrics.values()))
    assert f"{head}\n{line}\n| {figures} |\n" in (CARDS / f"{card}.md").read_text("utf-8")


def test_no_card_hides_that_others_have_reached_more():
    figures = [f"{row_of(model).total:.2f}" for model in ("Bernini-R-14B", "Bernini-R-1.3B")]
    for card in ("refalign-1.3b", "refalign-14b"):
        text = (CARDS / f"{card}.md").read_text("utf-8")
        assert all(figure in text for figure in figures)
