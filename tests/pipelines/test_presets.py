"""`--fast`: presets fill what is not given, and say what they leave out."""

import pytest

from refalign.cli import PROGRAM, main
from refalign.generate import filled
from refalign.jobs import read_jobs
from refalign.presets import PRESETS, with_preset
from refalign.sprites import SUBJECTS
from refalign.video import read_settings


DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 7.5}


@pytest.fixture
def generate(tmp_path):
    """Runs `refalign generate` with the model of this package, and gives what the video's file keeps."""

    def run(*words):
        output = tmp_path / "out.mp4"
        subject = str(SUBJECTS / "yellow-heart.png")
        job = ["--prompt", "It rises.", "--reference", subject, "--output", str(output), "--num-frames", "1"]
        assert main(["generate", *job, *map(str, words)]) == 0
        return read_settings(output)

    return run


@pytest.mark.parametrize("name", [None, "exact"])
def test_exact_is_what_a_model_does_by_itself(name):
    assert with_preset(name, "cpu", DEFAULTS) == DEFAULTS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_a_gate_that_the_pipeline_takes(name):
    gate = PRESETS[name].guidance_gate
    assert gate is None or 0 <= gate[0] <= gate[1] <= 1


def test_what_needs_a_gpu_is_left_out_with_a_line(caplog):
    settings = with_preset("balanced", "cpu", DEFAULTS)
    assert settings.keys() & {"attention", "compile"} == set()
    assert "--fast balanced leaves out attention and compile here" in caplog.text


def test_a_preset_fills_what_is_not_given(generate, capsys):
    settings = generate("--fast", "balanced", "--steps", 4)
    assert settings["guidance_gate"] == list(PRESETS["balanced"].guidance_gate)
    assert settings["steps"] == 4 and "fast" not in settings
    assert "passes per step: 2, 1 from step" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--cache", "first-block"), ("--fast", "balanced")], ids=str)
def test_passes_that_a_cache_keeps_apart_cannot_be_one_batch(words, tmp_path, capsys):
    job = ["--prompt", "a", "--output", str(tmp_path / "a.mp4"), "--batch-passes", *words]
    assert main(["generate", *job]) == 1
    assert "--batch-passes makes all passes at once, but --cache first-block" in capsys.readouterr().err


def test_what_is_given_goes_before_a_preset(generate):
    assert generate("--fast", "fast", "--guidance-gate", 0.25, 0.75, "--steps", 2)["guidance_gate"] == [0.25, 0.75]


@pytest.mark.parametrize(("words", "is_compiled"), [((), True), (("--no-compile",), False)])
def test_the_compilation_of_a_preset_is_switched_off(words, is_compiled):
    _, command = PROGRAM.parse(["generate", "--prompt", "It rises.", "--output", "a.mp4", *words])
    (job,) = read_jobs(command)
    assert filled(job, {"num_inference_steps": 50, "compile": True}).command.compile is is_compiled


def test_an_unknown_preset_is_told(capsys):
    assert main(["generate", "--fast", "faster", "--prompt", "It rises.", "--output", "a.mp4"]) == 1
    assert capsys.readouterr().err == "refalign: --fast faster: known are exact, balanced, fast.\n"
