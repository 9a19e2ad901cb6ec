"""The file that says what made the videos of a run."""

import json

import pytest

from refalign_evaluation.run_folder import RUN, Run, read_run, write_run


RUN_OF_TWO = Run(split="open", model="small", samples=("a_1", "b_1"), settings={"seed": 0}, versions={"torch": "2"})


def test_what_is_written_is_read_again(tmp_path):
    write_run(tmp_path, RUN_OF_TWO)
    assert read_run(tmp_path) == RUN_OF_TWO


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run: it has no run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"samples": ["../evil"]}, r"samples\.0: Value error, id: "),
        ({"split": "closed"}, "split: Input should be 'open', 'human' or 'single'"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_is_not_ours_is_told(values, problem, tmp_path):
    (tmp_path / RUN).write_text(json.dumps({**RUN_OF_TWO.model_dump(mode="json"), **values}), "utf-8")
    with pytest.raises(ValueError, match=rf"run\.json is not what `refalign-eval generate` writes: {problem}"):
        read_run(tmp_path)
