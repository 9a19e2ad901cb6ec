"""From raw scores of videos to scores from 0 to 1, and the official files they stand in."""

import json
import math

import pytest

from refalign_evaluation.scores import METRICS, read_raw, write_raw


# (metric, raw scores of videos, score). The first of each two are within its bounds.
CASES = [
    ("aesthetics", (4.5, 5.5), 1 / 3),
    ("aesthetics", (3.0, 9.0), 0.5),  # to 4 and 7 before the mean
    ("motion_smoothness", (0.9, 1.0), 0.95),
    ("motion_smoothness", (-0.5, 3.0), 0.75),
    ("motion_amplitude", (0.25, 0.75), 0.5),
    ("motion_amplitude", (-0.5, 2.0), 0.75),  # the sign is left out
    ("face_similarity", (0.0, 0.5), 0.25),  # a video without a face counts
    ("face_similarity", (0.5, 1.5), 0.75),
    ("gme", (0.6, 0.7), 0.65),
    ("gme", (-0.2, 1.2), 0.4),  # negative ones stay
    ("nexus", (0.01, 0.03), 0.4),
    ("nexus", (0.0, 0.02, 0.09), 0.7),  # zeros do not count, nor what is beyond 0.05
    ("naturalness", (3.0, 4.0), 0.625),
    ("naturalness", (0.0, 6.0), 0.5),
]


@pytest.mark.parametrize(("name", "raw", "score"), CASES)
def test_raw_scores_are_clipped_and_normalised(name, raw, score):
    assert METRICS[name].score(raw) == pytest.approx(score)


def test_without_videos_that_count_there_is_no_score():
    assert METRICS["nexus"].score([0.0, 0.0]) is None
    assert METRICS["gme"].score([]) is None


def test_faces_are_measured_of_people_alone():
    measured = [
        name
        for name in ("singleface_3", "humanobj_1", "multihuman_2", "singleobj_9")
        if METRICS["face_similarity"].applies(name)
    ]
    assert measured == ["singleface_3", "humanobj_1"]
    assert METRICS["gme"].applies("multihuman_2")


def test_the_official_files_are_read(tmp_path):
    write(tmp_path, "motion_amplitude.json", {"a_1": {"motion_fb": 0.35, "motion_lk": 7.2}})
    write(tmp_path, "naturalscore_1.json", {"a_1": "4", "b_1": "error"})
    write(tmp_path, "naturalscore_2.json", {"a_1": "3\n", "b_1": "2"})
    write(tmp_path, "facesim.json", {"a_1": {"cur_score": 0.5, "arc_score": 0.4}})
    raw = read_raw(tmp_path)
    assert list(raw) == ["motion_amplitude", "face_similarity", "naturalness"]
    assert raw["motion_amplitude"].scores == {"a_1": 0.35}
    assert raw["naturalness"].scores == {"a_1": 3.5, "b_1": 2.0}


def test_a_video_that_the_official_tool_failed_on_has_no_score(tmp_path):
    write(tmp_path, "naturalscore_1.json", {"a_1": "error", "b_1": "5"})
    raw = read_raw(tmp_path)["naturalness"]
    assert raw.scores == {"b_1": 5.0}
    assert raw.unscored["a_1"].startswith("the official tool failed")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"gme_score": math.nan}, "gme_score is nan, which is not a finite number"),
        ({"gme_score": math.inf}, "gme_score is inf"),
        ({"gme_score": "0.7"}, "gme_score is '0.7'"),
        ({"gme_score": True}, "gme_score is True"),
        ({"score": 0.7}, "there is no 'gme_score' among"),
        (0.7, "is 0.7, which is not an object"),
    ],
)
def test_a_raw_score_that_is_no_number_names_its_sample(entry, problem, tmp_path):
    write(tmp_path, "gmescore.json", {"a_1": {"gme_score": 0.6}, "b_1": entry})
    with pytest.raises(ValueError, match=rf"gmescore\.json: the entry of 'b_1' cannot be used: .*{problem}"):
        read_raw(tmp_path)


def test_an_answer_in_words_is_not_a_score(tmp_path):
    write(tmp_path, "naturalscore_3.json", {"a_1": "Score: 4"})
    with pytest.raises(ValueError, match=r"naturalscore_3\.json: the entry of 'a_1' .* 'Score: 4'"):
        read_raw(tmp_path)


def test_a_file_that_is_cut_in_half_is_named(tmp_path):
    (tmp_path / "nexusscore.json").write_text('{"a_1": {"nexus_sc', "utf-8")
    with pytest.raises(ValueError, match=r"nexusscore\.json is not a whole JSON file"):
        read_raw(tmp_path)


def test_what_is_written_is_read_again(tmp_path):
    write_raw(tmp_path, "gme", {"a_1": {"gme_score": 0.1 + 0.2}})
    assert read_raw(tmp_path)["gme"].scores == {"a_1": 0.1 + 0.2}


def test_what_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_raw(tmp_path, "gme", {"a_1": {"gme_score": math.nan}})
    assert not list(tmp_path.iterdir())


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), "utf-8")
