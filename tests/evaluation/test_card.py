"""`refalign-eval card`: results in a model card's front matter, and in the file that the Hub reads."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from refalign_evaluation.cli import main
from refalign_evaluation.run_folder import read_run, write_run
from refalign_evaluation.scores import METRICS
from tests.evaluation.small_results import write_results


FRONT = "license: mit # theirs\ntags:   [refalign,  'wan']\nbase_model: Wan-AI/Wan2.1\n"
TEXT = "\n# A model\n\n---\n\nmodel-index: of the text\n"
ENTRIES = ".eval_results/opens2v-eval.yaml"
OTHER = {
    "task": {"type": "text-to-video"},
    "dataset": {"type": "someone/VBench", "name": "VBench"},
    "metrics": [{"type": "total", "value": 80.0}],
}


@pytest.fixture
def run(tmp_path):
    run = write_results(tmp_path / "run", "org/small", {"nexus": {"multiobject_1": 0.0}})
    (run / "scoring.json").write_text(json.dumps({"settings": {"gme": {"model": "/home/me/gme", "frames": 32}}}))
    record = read_run(run)
    write_run(run, record.model_copy(update={"settings": {"seed": 7, "base": "/home/me/wan"}}))
    return run


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_card(folder, f"---\n{FRONT}---\n{TEXT}")
    return folder


def write_card(folder, text: str) -> None:
    (folder / "README.md").write_bytes(text.encode())


def read_card(folder) -> str:
    return (folder / "README.md").read_bytes().decode()


def card(run, model) -> int:
    return main(["card", str(run), "--model", str(model)])


def refuses(run, model, capsys) -> str:
    """The line of a refused command, which has changed nothing."""
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    assert card(run, model) == 1
    assert before == {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    return capsys.readouterr().err.strip()


def test_the_hub_reads_the_results_of_the_card(run, model):
    assert card(run, model) == 0
    results = ModelCard.load(model / "README.md").data.eval_results
    assert results is not None
    keys = ["total_score", *(metric.upload_key for metric in METRICS.values())]
    assert {result.metric_type: result.metric_value for result in results} == dict.fromkeys(keys, 100.0)
    assert {(result.dataset_type, result.dataset_config) for result in results} == {
        ("BestWishYsh/OpenS2V-Eval", "open")
    }
    assert results[0].dataset_name == "OpenS2V-Eval (open domain, 6 of its 180 samples)"


def test_the_hub_reads_the_results_file(run, model):
    assert card(run, model) == 0
    entries = parse_eval_result_entries(yaml.safe_load((model / ENTRIES).read_text()))
    assert [entry.task_id for entry in entries][:2] == ["open_total_score", "open_aes_score"]
    assert {entry.value for entry in entries} == {100.0}
    assert all(entry.date and entry.source_url and entry.notes for entry in entries)


def test_every_figure_says_what_measured_it(run, model):
    assert card(run, model) == 0
    results = ModelCard.load(model / "README.md").data.eval_results
    assert results is not None
    sources = {result.metric_type: result.metric_args for result in results}
    date = sources["total_score"].pop("date")
    assert sources["total_score"] == {"videos": {"seed": 7, "base": "wan"}, "versions": {"refalign": "1"}}
    settings = {"model": "gme", "frames": 32}
    assert sources["gme_score"] == {
        "measured_by": "refalign-eval score",
        "settings": settings,
        "counted_videos": "6 of 6",
        "date": date,
    }
    assert sources["nexus_score"]["read_from"] == "nexusscore.json, as the official tools write it"
    assert sources["nexus_score"]["counted_videos"] == "5 of 6"


def test_no_path_of_this_machine_gets_out(run, model):
    assert card(run, model) == 0
    assert "/home/me" not in read_card(model) + (model / ENTRIES).read_text()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_all_else_in_a_card_stays_as_it_is(end, run, model):
    front, text = FRONT.replace("\n", end), TEXT.replace("\n", end)
    write_card(model, f"---{end}{front}---{end}{text}")
    assert card(run, model) == 0
    changed = read_card(model)
    assert changed.startswith(f"---{end}{front}model-index:{end}")
    assert changed.endswith(f"{end}---{end}{text}")
    assert changed.count("\n") == changed.count(end)


def test_twice_is_as_once(run, model):
    assert card(run, model) == 0
    once = read_card(model), (model / ENTRIES).read_text()
    assert card(run, model) == 0
    assert (read_card(model), (model / ENTRIES).read_text()) == once


def test_newer_results_take_the_place_of_older_ones(run, model, tmp_path):
    assert card(run, model) == 0
    newer = write_results(tmp_path / "newer", raw={"gme": dict.fromkeys(read_run(run).samples, 0.5)})
    assert card(newer, model) == 0
    results = ModelCard.load(model / "README.md").data.eval_results
    assert results is not None
    assert [result.metric_value for result in results if result.metric_type == "gme_score"] == [50.0]
    assert len(yaml.safe_load((model / ENTRIES).read_text())) == len(results) == 8


def test_results_of_others_and_of_other_splits_stay(run, model):
    index = yaml.safe_dump({"model-index": [{"name": "mine", "results": [OTHER]}]})
    write_card(model, f"---\n{index}{FRONT}---\n{TEXT}")
    (model / ".eval_results").mkdir()
    human = [{"dataset": {"id": "BestWishYsh/OpenS2V-Eval", "task_id": "human_total_score"}, "value": 50.0}]
    (model / ENTRIES).write_text(yaml.safe_dump(human))
    assert card(run, model) == 0
    front = yaml.safe_load(read_card(model).split("---\n")[1])
    assert front["model-index"][0]["name"] == "mine"
    assert front["model-index"][0]["results"][0] == OTHER
    assert read_card(model).endswith(f"{FRONT}---\n{TEXT}")
    assert yaml.safe_load((model / ENTRIES).read_text())[0] == human[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# A model\n", "has no front matter"),
        ("---\n- a\n---\n", "has no front matter"),
        ("---\nlicense: [\n---\n", "is not YAML"),
        ("---\nmodel-index: mine\n---\n", "is not a list of models with results"),
        ("---\nmodel-index: [{name: a}]\n---\n", "is not a list of models with results"),
        ('---\n"model-index": []\n---\n', "is written in a way that cannot be changed"),
    ],
)
def test_a_card_that_cannot_be_changed_is_told(text, problem, run, model, capsys):
    write_card(model, text)
    assert problem in refuses(run, model, capsys)


def test_a_folder_without_a_card_is_told(run, model, capsys):
    (model / "README.md").unlink()
    assert "has no README.md" in refuses(run, model, capsys)


@pytest.mark.parametrize("text", ["mine", "- 1", "a: b", "["])
def test_a_results_file_of_another_kind_is_told(text, run, model, capsys):
    (model / ".eval_results").mkdir()
    (model / ENTRIES).write_text(text)
    assert "is not a list of the Hub's results" in refuses(run, model, capsys)


def test_a_run_without_a_total_is_told(run, model, capsys):
    (run / "scores/nexusscore.json").unlink()
    assert "There is no total without NexusScore" in refuses(run, model, capsys)
    (run / "run.json").unlink()
    assert "is not a run" in refuses(run, model, capsys)
