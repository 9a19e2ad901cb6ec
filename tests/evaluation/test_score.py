import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refalign_evaluation import cli
from refalign_evaluation.metrics import face_similarity
from refalign_evaluation.metrics.curricular_face import CurricularFace
from refalign_evaluation.metrics.motion_amplitude import MotionAmplitude
from refalign_evaluation.metrics.weights import digest
from refalign_evaluation.run_folder import Run, tell_failure, write_run
from tests.evaluation.small_benchmark import MAN, SAMPLES, WOMAN, write_benchmark
from tests.evaluation.tiny_metrics import (
    FACE_NETWORK,
    RED,
    draw,
    write_clip,
    write_detector,
    write_face_network,
    write_gme,
    write_head,
    write_noise,
)
from tests.programs import call_script


FILE = "scores/motion_amplitude.json"


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A video for each sample."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_noise(folder / f"{name}.mp4", seed=seed) for seed, name in enumerate(SAMPLES)]


@pytest.fixture
def run(tmp_path, benchmark, videos):
    folder = tmp_path / "run"
    folder.mkdir()
    for video in videos:
        (folder / video.name).write_bytes(video.read_bytes())
    settings = {"benchmark": digest(benchmark / "Open-Domain_Eval.json")}
    write_run(folder, Run(split="open", model="m", samples=tuple(SAMPLES), settings=settings, versions={}))
    return folder


@pytest.fixture
def score(run, benchmark, capsys):
    """Calls the command; gives its exit code, output and errors."""

    def call(*words: str | Path, metrics: str = "motion_amplitude") -> tuple[int, str, str]:
        options = ["--videos", run, "--benchmark", benchmark, "--device", "cpu", "--metrics", *metrics.split(), *words]
        code = cli.main(["score", *map(str, options)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def raw(run: Path, file: str = FILE) -> dict:
    return json.loads((run / file).read_text())


def notes(run: Path) -> dict:
    return json.loads((run / "scoring.json").read_text())


@pytest.fixture
def measured(monkeypatch):
    """The ids of samples that are measured, without any arithmetic."""
    ids = []

    def measure(self, video, sample):
        ids.append(sample.id)
        return len(ids) / 10

    monkeypatch.setattr(MotionAmplitude, "measure", measure)
    return ids


# -- What is measured -------------------------------------------------------------------------------------------------


def test_every_sample_gets_its_score_in_the_official_file(run, score):
    code, told, _ = score()
    assert code == 0
    assert list(raw(run)) == list(SAMPLES)
    values = [entry["motion_fb"] for entry in raw(run).values()]
    assert f"motion_amplitude: 6 of 6 samples scored, {100 * np.mean(values):.2f} %" in told
    assert notes(run)["settings"]["motion_amplitude"]["farneback"]["winsize"] == 15


def test_all_four_metrics_on_tiny_models(run, score, tmp_path, monkeypatch):
    monkeypatch.setattr(face_similarity, "CurricularFace", partial(CurricularFace, **FACE_NETWORK))
    other = write_benchmark(tmp_path / "benchmark")
    Image.fromarray(draw((64, 128, RED))).save(other / MAN)
    Image.fromarray(draw()).save(other / WOMAN)
    code, told, errors = score(
        *("--benchmark", other),
        *("--aesthetics-clip", write_clip(tmp_path / "clip")),
        *("--aesthetics-head", write_head(tmp_path / "head.safetensors")),
        *("--face-detector", write_detector(tmp_path / "detector")),
        *("--face-network", write_face_network(tmp_path / "faces.safetensors")),
        *("--gme-model", write_gme(tmp_path / "gme")),
        metrics="aesthetics motion_amplitude face_similarity gme",
    )
    assert code == 1
    for name in ("aesthetics", "motion_amplitude", "gme"):
        assert f"{name}: 6 of 6 samples scored" in told
    assert "face_similarity: 2 of 3 samples scored, 0.00 %" in told
    assert "face_similarity: singlehuman_1 is not scored: no face is found in its reference" in errors
    assert raw(run, "scores/facesim.json") == {"singleface_1": {"cur_score": 0.0}, "humanobj_1": {"cur_score": 0.0}}
    assert list(raw(run, "scores/aesthetic_score.json")["singleobj_1"]) == ["aes_score"]
    assert list(raw(run, "scores/gmescore.json")["singleobj_1"]) == ["gme_score"]


def test_files_of_the_official_tools_are_told_too(run, score):
    score()
    (run / "scores/nexusscore.json").write_text(json.dumps({"singleface_1": {"nexus_score": 0.02}}))
    code, told, errors = score()
    assert code == 1
    assert "nexus: 1 of 6 samples scored, 40.00 %" in told
    assert "nexus: singlehuman_1 is not scored: it was not measured" in errors


def test_a_folder_of_another_tool_is_measured_by_naming_the_split(run, score):
    (run / "run.json").unlink()
    code, _, errors = score()
    assert code == 1 and "has no run.json, which says what is in it. Name the benchmark's --split." in errors
    assert score("--split", "open")[0] == 0


# -- What cannot be measured ------------------------------------------------------------------------------------------


def test_broken_empty_short_and_missing_videos_are_listed_and_not_averaged(run, score):
    (run / "singleface_1.mp4").write_bytes(b"")
    (run / "singlehuman_1.mp4").write_bytes((run / "singlehuman_1.mp4").read_bytes()[:-500])
    write_noise(run / "new.mp4", frames=1).rename(run / "singleobj_1.mp4")
    (run / "humanobj_1.mp4").unlink()
    (run / "multiobject_1.mp4").unlink()
    tell_failure(run, "multiobject_1", "out of memory")
    code, told, errors = score()
    assert code == 1
    assert list(raw(run)) == ["multihuman_1"]
    assert "motion_amplitude: 1 of 6 samples scored" in told
    reasons = notes(run)["unscored"]["motion_amplitude"]
    assert set(reasons) == set(SAMPLES) - {"multihuman_1"}
    assert "too short: it has 1 frames" in reasons["singleobj_1"]
    assert reasons["humanobj_1"] == "there is no humanobj_1.mp4"
    assert reasons["multiobject_1"] == "there is no multiobject_1.mp4: it could not be made (out of memory)"
    for sample_id in reasons:
        assert f"motion_amplitude: {sample_id} is not scored: " in errors


def test_an_error_that_nobody_expected_ends_no_other_sample(run, score, measured, monkeypatch):
    measure = MotionAmplitude.measure

    def fail(self, video, sample):
        if sample.id == "singleobj_1":
            raise RuntimeError("out of\nmemory")
        return measure(self, video, sample)

    monkeypatch.setattr(MotionAmplitude, "measure", fail)
    assert score()[0] == 1
    assert len(raw(run)) == 5
    reason = notes(run)["unscored"]["motion_amplitude"]["singleobj_1"]
    assert "memory" in reason and "\n" not in reason


def test_a_score_that_is_no_number_is_not_kept(run, score, monkeypatch):
    monkeypatch.setattr(MotionAmplitude, "measure", lambda self, video, sample: float("nan"))
    code, told, errors = score()
    assert code == 1 and "0 of 6 samples scored, no score" in told
    assert "its score is nan, which is not a finite number" in errors


def test_reasons_name_no_folder_of_this_machine(run, score):
    (run / "singleface_1.mp4").write_bytes(b"not a video")
    score()
    assert notes(run)["unscored"]["motion_amplitude"]["singleface_1"].startswith("singleface_1.mp4 ")


def test_a_package_that_is_not_installed_is_told_with_its_extra(run, score, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, _, errors = score()
    assert code == 1 and "Install the extra: pip install 'refalign[evaluate]'." in errors


def test_what_could_not_be_measured_is_tried_again(run, score):
    whole = (run / "singleface_1.mp4").read_bytes()
    (run / "singleface_1.mp4").write_bytes(b"")
    assert score()[0] == 1
    (run / "singleface_1.mp4").write_bytes(whole)
    assert score()[0] == 0
    assert notes(run)["unscored"]["motion_amplitude"] == {}


# -- Going on ---------------------------------------------------------------------------------------------------------


def test_what_is_measured_is_not_measured_again(run, score, measured):
    score()
    assert measured == list(SAMPLES)
    score()
    assert len(measured) == 6


def test_a_video_that_was_replaced_is_measured_again(run, score, measured):
    score()
    write_noise(run / "new.mp4", seed=99).rename(run / "humanobj_1.mp4")
    score()
    assert measured[6:] == ["humanobj_1"]
    assert raw(run)["humanobj_1"] == {"motion_fb": 0.7}


def test_a_replaced_video_that_is_broken_loses_its_score(run, score):
    score()
    (run / "humanobj_1.mp4").write_bytes(b"")
    assert score()[0] == 1
    assert "humanobj_1" not in raw(run)


def test_a_score_stays_when_its_video_is_put_elsewhere(run, score):
    score()
    (run / "humanobj_1.mp4").unlink()
    assert score()[0] == 0
    assert "humanobj_1" in raw(run)


def test_scores_of_other_settings_are_not_mixed(run, score, monkeypatch):
    (run / "singleface_1.mp4").rename(run / "later.mp4")
    score()
    (run / "later.mp4").rename(run / "singleface_1.mp4")
    before = (run / FILE).read_bytes()
    monkeypatch.setattr("refalign_evaluation.metrics.motion_amplitude.WIDTH", 8)
    code, _, errors = score()
    assert code == 1
    assert "measured with other settings (width 16 there)" in errors and errors.count("\n") == 1
    assert (run / FILE).read_bytes() == before


def test_the_official_tools_scores_are_neither_mixed_nor_lost(run, score, measured):
    (run / "scores").mkdir()
    entries = {"singleface_1": {"motion_fb": 0.5, "motion_lk": 0.1}}
    (run / FILE).write_text(json.dumps(entries))
    code, _, errors = score()
    assert code == 1 and "measured with the official tool, or by hand" in errors
    assert raw(run) == entries and measured == []


def test_all_of_the_official_tools_scores_are_taken_as_they_are(run, score, measured):
    (run / "scores").mkdir()
    (run / FILE).write_text(json.dumps({name: {"motion_fb": 0.5, "motion_lk": 0.1} for name in SAMPLES}))
    code, told, _ = score()
    assert code == 0 and measured == []
    assert "motion_amplitude: 6 of 6 samples scored, 50.00 %" in told


KILLED = """
import os, signal, sys
from refalign_evaluation import cli
from refalign_evaluation.metrics.motion_amplitude import MotionAmplitude
measure, count = MotionAmplitude.measure, 0
def counted(self, video, sample):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, video, sample)
MotionAmplitude.measure = counted
cli.main(sys.argv[1:])
"""


def test_a_killed_call_is_gone_on_with_to_the_same_files(run, score, benchmark):
    score()
    whole = (run / FILE).read_bytes(), (run / "scoring.json").read_bytes()
    (run / FILE).unlink()
    (run / "scoring.json").unlink()
    words = ["score", "--videos", run, "--benchmark", benchmark, "--metrics", "motion_amplitude"]
    assert call_script(KILLED, *map(str, words)).returncode == -signal.SIGKILL
    assert len(raw(run)) == 3
    assert score()[0] == 0
    assert ((run / FILE).read_bytes(), (run / "scoring.json").read_bytes()) == whole


def test_a_kill_between_the_two_files_costs_one_sample(run, score, measured):
    score()
    kept = notes(run)
    del kept["videos"]["motion_amplitude"]["multiobject_1"]
    (run / "scoring.json").write_text(json.dumps(kept))
    score()
    assert measured[6:] == ["multiobject_1"]


def test_a_run_has_one_owner(run, score):
    code = "import sys, time; from refalign.owner import owned\n"
    code += "with owned(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, run / "scores"], stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        returned, _, errors = score()
        owner.kill()
    assert returned == 1 and "is in use by process" in errors


def test_leftovers_of_a_killed_call_go(run, score):
    (run / "scores" / ".motion_amplitude.json.abcd1234.partial").mkdir(parents=True)
    (run / ".scoring.json.abcd1234.partial").mkdir()
    score()
    assert not list(run.rglob("*.partial"))


# -- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("aesthetics", "--aesthetics-clip and --aesthetics-head"),
        ("face_similarity", "--face-detector and --face-network"),
        ("gme", "--gme-model"),
    ],
)
def test_a_metric_without_its_models_is_told_before_anything_is_measured(run, score, name, options):
    code, _, errors = score(metrics=f"motion_amplitude {name}")
    assert code == 1 and f"The metric {name} needs {options}." in errors
    assert not (run / "scores").exists()


def test_videos_of_another_benchmark_are_refused(run, score, tmp_path):
    changed = {**SAMPLES, "singleobj_1": {**SAMPLES["singleobj_1"], "prompt": "a dog sleeps"}}
    other = write_benchmark(tmp_path / "other", samples=changed)
    code, _, errors = score("--benchmark", other)
    assert code == 1 and "were made of another Open-Domain_Eval.json" in errors


def test_ids_that_the_benchmark_lacks_are_refused(run, score):
    write_run(run, Run(split="open", model="m", samples=("singleobj_7",), settings={}, versions={}))
    code, _, errors = score()
    assert code == 1 and "asks for singleobj_7, which" in errors


def test_another_split_is_refused(score):
    code, _, errors = score("--split", "human")
    assert code == 1 and "holds videos of the split open, not human" in errors


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (FILE, '{"singleface_1": {"motion_fb": 0.', "is not a whole JSON file"),
        (FILE, '{"singleface_1": {"motion_fb": NaN}}', "motion_fb is nan, which is not a finite number"),
        (FILE, '{"../x": {"motion_fb": 1}}', "cannot name"),
        ("scoring.json", '{"settings": {"motion_amplitude"', "is not a whole JSON file"),
        ("scoring.json", '{"settings": {"motion_amplitude": 3}}', "its part 'settings' is not what"),
        ("scoring.json", '{"videos": {"motion_amplitude": {"a": 3}}}', "a is 3, which is not a text"),
    ],
)
def test_files_that_are_cut_or_of_other_content_are_told(run, score, file, content, told):
    (run / "scores").mkdir()
    (run / file).write_text(content)
    code, _, errors = score()
    assert code == 1 and told in errors and errors.count("\n") == 1
    assert (run / file).read_text() == content


def test_a_folder_that_is_not_there_is_told(score, tmp_path):
    code, _, errors = score("--videos", tmp_path / "nowhere")
    assert code == 1 and "nowhere is not a folder" in errors


def test_help_loads_no_model_library():
    code = (
        "import sys; from refalign_evaluation import score; print([m for m in ('torch', 'cv2') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
