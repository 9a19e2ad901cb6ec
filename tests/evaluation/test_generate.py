"""A model's videos of a benchmark's samples: made, gone on with, shared among processes, and never of two settings."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from refalign import RefAlignWanPipeline
from refalign.cli import main as refalign
from refalign.sprites import FOLDER
from refalign_evaluation import benchmark as benchmark_files
from refalign_evaluation import run_folder
from refalign_evaluation.cli import main
from refalign_evaluation.generate import fingerprint
from refalign_evaluation.run_folder import read_failures, read_run
from tests.evaluation.small_benchmark import CAT, DOG, MAN, SAMPLES, write_benchmark
from tests.programs import started


STEPS = ("--steps", "2", "--num-frames", "5", "--cut-out", "false", "--device", "cpu")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def whole(benchmark, tmp_path_factory):
    """The run that nothing disturbed, never changed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert generate(benchmark, folder) == 0
    return folder


def generate(benchmark, folder, *words):
    return main(["generate", "--benchmark", str(benchmark), "--output", str(folder), *STEPS, *map(str, words)])


def videos(folder):
    return {path.stem: path.read_bytes() for path in folder.glob("*.mp4")}


def test_every_sample_has_its_video(whole):
    assert sorted(videos(whole)) == sorted(SAMPLES)
    run = read_run(whole)
    assert (run.split, run.model, list(run.samples)) == ("open", "refalign-sprites", list(SAMPLES))
    assert (run.settings["steps"], run.settings["seed"], run.settings["num_frames"]) == (2, 0, 5)


def test_a_video_is_what_refalign_generate_makes(whole, benchmark, tmp_path):
    sample = SAMPLES["humanobj_1"]
    references = [str(benchmark / path) for path in sample["img_paths"]]
    words = ["--prompt", sample["prompt"], "--reference", *references, "--output", str(tmp_path / "a.mp4"), *STEPS]
    assert refalign(["generate", *words]) == 0
    assert (tmp_path / "a.mp4").read_bytes() == videos(whole)["humanobj_1"]


def test_what_is_there_is_not_made_again(whole, benchmark, tmp_path, capfd):
    folder = tmp_path / "run"
    assert generate(benchmark, folder, "--limit", 2) == 0
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    capfd.readouterr()
    assert generate(benchmark, folder) == 0
    assert "6 samples of the split open, 2 made before" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert videos(folder) == videos(whole)
    assert read_run(folder) == read_run(whole)


def test_processes_share_the_samples(whole, benchmark, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert generate(benchmark, folder) == 0
        if rank == "1":
            assert sorted(videos(folder)) == sorted(list(SAMPLES)[1::2])
            for path in folder.glob("*.mp4"):  # as if the other had started at the same time
                path.rename(path.with_suffix(".done"))
    for path in folder.glob("*.done"):
        path.rename(path.with_suffix(".mp4"))
    assert videos(folder) == videos(whole)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--steps", "3"), "steps 2 there and 3 here"),
        (("--seed", "1"), "seed 0 there and 1 here"),
        (("--dtype", "bfloat16"), "dtype 'auto' there and 'bfloat16' here"),
        (("--model", FOLDER), "model 'refalign-sprites' there and 'model' here"),
    ],
)
def test_other_settings_are_not_mixed_in(words, told, whole, benchmark, capfd):
    before = videos(whole)
    assert generate(benchmark, whole, *words) == 1
    assert told in capfd.readouterr().err
    assert videos(whole) == before


def test_another_version_of_the_benchmark_is_not_mixed_in(whole, tmp_path, capfd):
    other = write_benchmark(tmp_path, samples={**SAMPLES, "singleobj_2": SAMPLES["singleobj_1"]})
    assert generate(other, whole) == 1
    assert "holds videos of other settings (benchmark 'sha256:" in capfd.readouterr().err


def test_other_images_are_not_mixed_in(whole, tmp_path, capfd):
    other = write_benchmark(tmp_path / "benchmark")
    run = shutil.copytree(whole, tmp_path / "run")
    Image.new("RGB", (90, 90), "red").save(other / CAT)
    assert generate(other, run) == 1
    assert "a video of the sample multiobject_1, whose images in the benchmark have changed" in capfd.readouterr().err
    (run / "multiobject_1.mp4").unlink()
    assert generate(other, run) == 0
    assert videos(run).items() - videos(whole).items() == {("multiobject_1", videos(run)["multiobject_1"])}
    assert read_run(run).images.keys() == SAMPLES.keys()


def put_another(image: Path) -> None:
    Image.new("RGB", (90, 90), "red").save(image)


@pytest.mark.parametrize("change", [Path.unlink, put_another])
def test_an_image_that_changes_in_the_middle_costs_its_samples(change, tmp_path, monkeypatch, capfd):
    samples = {name: SAMPLES[name] for name in ("singleface_1", "multiobject_1")}
    benchmark, run = write_benchmark(tmp_path / "benchmark", samples=samples), tmp_path / "run"
    begin = run_folder.begin
    monkeypatch.setattr(run_folder, "begin", lambda *args: (begin(*args), change(benchmark / CAT)))
    assert generate(benchmark, run) == 1
    assert list(videos(run)) == ["singleface_1"]
    assert list(read_failures(run)) == ["multiobject_1"]
    assert "1 of 2 samples failed: multiobject_1" in capfd.readouterr().err


def test_a_benchmark_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch, capfd):
    benchmark_folder, read = write_benchmark(tmp_path / "benchmark"), benchmark_files.read_benchmark
    newer = {**SAMPLES, "singleobj_1": {**SAMPLES["singleobj_1"], "prompt": "a dog sleeps"}}

    def read_too_late(*args):
        write_benchmark(benchmark_folder, samples=newer)
        return read(*args)

    monkeypatch.setattr(benchmark_files, "read_benchmark", read_too_late)
    assert generate(benchmark_folder, tmp_path / "run") == 1
    assert "changed while it was read" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_was_trained_on_is_another_one(whole, benchmark, capfd):
    run = json.loads((whole / "run.json").read_text("utf-8"))
    (whole / "singleobj_1.mp4").rename(whole / "kept")
    (whole / "run.json").write_text(
        json.dumps({**run, "settings": {**run["settings"], "weights": "sha256:0"}}), "utf-8"
    )
    try:
        assert generate(benchmark, whole) == 1
    finally:
        (whole / "run.json").write_text(json.dumps(run, indent=2) + "\n", "utf-8")
        (whole / "kept").rename(whole / "singleobj_1.mp4")
    assert "holds videos of other settings (weights 'sha256:0' there" in capfd.readouterr().err


def test_any_weight_changes_the_fingerprint():
    pipeline = RefAlignWanPipeline.from_pretrained(FOLDER)
    before = fingerprint(pipeline)
    assert fingerprint(pipeline) == before
    with torch.no_grad():
        pipeline.transformer.blocks[0].attn1.to_q.weight.mul_(1.001)
    assert fingerprint(pipeline) != before


def test_videos_of_nobody_knows_what_are_left_alone(benchmark, tmp_path, capfd):
    (tmp_path / "singleface_1.mp4").write_bytes(b"mine")
    assert generate(benchmark, tmp_path) == 1
    assert "has videos but no run.json" in capfd.readouterr().err
    assert (tmp_path / "singleface_1.mp4").read_bytes() == b"mine"


def test_a_sample_that_fails_does_not_end_the_others(tmp_path, capfd):
    benchmark, folder = write_benchmark(tmp_path / "benchmark"), tmp_path / "run"
    content = (benchmark / DOG).read_bytes()
    (benchmark / DOG).write_bytes(content[:99])
    assert generate(benchmark, folder) == 1
    with_dog = [name for name in SAMPLES if DOG in SAMPLES[name]["img_paths"]]
    assert sorted(videos(folder)) == sorted(SAMPLES.keys() - with_dog)
    assert list(read_failures(folder)) == sorted(with_dog)
    assert "4.jpg" in read_failures(folder)["singleobj_1"]
    assert f"3 of 6 samples failed: {', '.join(with_dog)}" in capfd.readouterr().err

    (benchmark / DOG).write_bytes(content)
    assert generate(benchmark, folder) == 0
    assert sorted(videos(folder)) == sorted(SAMPLES)
    assert read_failures(folder) == {}


def test_a_dry_run_reckons_and_writes_nothing(benchmark, tmp_path, capfd):
    assert generate(benchmark, tmp_path / "run", "--dry-run", "--seconds-per-step", 600) == 0
    output = capfd.readouterr().out
    assert "left: 6 samples (3 with 1, 2 with 2, 1 with 3 references), 5 frames of 64x64" in output
    assert "passes: 24 (4 in 2 steps for each)" in output
    assert "time: 2 hours" in output
    assert not (tmp_path / "run").exists()


def test_a_dry_run_measures_a_step_of_each_kind(benchmark, tmp_path, capfd):
    assert generate(benchmark, tmp_path / "run", "--dry-run") == 0
    output = capfd.readouterr().out
    for count in (1, 2, 3):
        assert f"measured with {count} references: 0." in output
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_whole_run_has_nothing_left(whole, benchmark, capfd):
    assert generate(benchmark, whole, "--dry-run") == 0
    assert "Nothing is left to make." in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--limit", "0"), "--limit is 0: pass 1 or more."),
        (("--seconds-per-step", "3"), "--seconds-per-step goes with --dry-run."),
        (("--dry-run", "--seconds-per-step", "0"), "--seconds-per-step is 0.0: pass a number of seconds above 0."),
        (("--steps", "0"), "`num_inference_steps` must be 1 or more, but is 0."),
        (("--cut-out", "true"), "cut_out has 2 words for 1 references"),
        (("--split", "human"), "is not a copy of OpenS2V-Eval with the split human"),
    ],
)
def test_options_that_cannot_be_used_are_told_before_anything(words, told, benchmark, tmp_path, capfd):
    assert generate(benchmark, tmp_path / "run", *words) == 1
    assert told in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_killed_call_is_gone_on_with(whole, benchmark, tmp_path):
    folder = tmp_path / "run"
    with started(partial(generate, benchmark, folder)) as (_, told):
        assert any(line.startswith("Wrote") for line in told)
    assert 1 <= len(videos(folder)) < len(SAMPLES)
    (folder / ".singleface_1.mp4.lock").touch()  # as if it had been killed at the very end of a video
    assert generate(benchmark, folder) == 0
    assert videos(folder) == videos(whole)
    assert not list(folder.glob(".*"))


def test_a_link_out_of_the_benchmark_is_read(tmp_path):  # people keep their images on other disks
    benchmark = write_benchmark(tmp_path / "benchmark", samples={"singleface_1": SAMPLES["singleface_1"]})
    (benchmark / MAN).rename(tmp_path / "man.jpg")
    (benchmark / MAN).symlink_to(tmp_path / "man.jpg")
    assert generate(benchmark, tmp_path / "run") == 0
