"""The file that `refalign-train init` writes for clips and a GPU."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from refalign_training import cli
from refalign_training.data.sample import Clip, Reference, Sample, View
from refalign_training.run import init
from refalign_training.run.checks import check
from refalign_training.run.config_files import read_config
from refalign_training.run.init import Clips, InitCommand, run
from tests.training.small_cache import FRAMES, HEIGHT, WIDTH, write_clips


def found(count: int = 20, size: tuple[int, int] = (1920, 1080), seconds: float = 6.0) -> Clips:
    reference = Reference("1", View(Path(__file__)))
    sample = Sample("a", ("A dog: 'runs' #1\nfast.",), Clip(Path("a.mp4")), (reference,), "clips", 0)
    return Clips([sample] * count, 0, [size] * 4, [seconds] * 4)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The options that are written for such clips and such a GPU; a frame of a pixel takes as much memory as any."""

    def make(clips: Clips, memory: float = 24.0):
        def estimate(command, *_):
            recipe = command.data.recipe
            size = recipe.height * recipe.width * recipe.num_frames
            return SimpleNamespace(memory=SimpleNamespace(total=15 * size / (480 * 832 * 81)))

        monkeypatch.setattr(init, "_estimate", estimate)
        monkeypatch.setattr(init, "_look", lambda _: clips)
        assert run(InitCommand(Path("my clips"), tmp_path / "a.yaml", memory)) == 0
        return read_config(tmp_path / "a.yaml")

    return make


def shape(command) -> tuple[int, int, int]:
    recipe = command.data.recipe
    return recipe.height, recipe.width, recipe.num_frames


@pytest.mark.parametrize(
    ("clips", "memory", "expected"),
    [
        (found(), 24, (480, 832, 81)),
        (found(size=(1080, 1920)), 24, (832, 480, 81)),
        (found(seconds=3.5), 24, (480, 832, 49)),
        (found(seconds=0.5), 24, (480, 832, 17)),
        (found(), 12, (480, 832, 49)),
        (found(), 3.2, (320, 544, 33)),
    ],
    ids=["wide", "upright", "short", "too short", "small GPU", "smallest GPU"],
)
def test_size_and_length_suit_the_clips_and_the_gpu(made, clips, memory, expected):
    assert shape(made(clips, memory)) == expected


def test_a_gpu_that_is_too_small_is_told(made, tmp_path, capsys):
    made(found(), 0.5)
    assert "MORE than your 0.5 GB" in capsys.readouterr().out
    assert "MORE than your 0.5 GB" in (tmp_path / "a.yaml").read_text("utf-8")


@pytest.mark.parametrize(("count", "batch", "steps"), [(1, 2, 1000), (20, 4, 500), (100, 8, 1250), (10_000, 8, 2000)])
def test_steps_are_epochs_of_the_clips(tmp_path, monkeypatch, count, batch, steps):
    settings = init._settings(InitCommand(Path("clips")), found(count))
    assert (settings["batch"], settings["steps"]) == (batch, steps)


def test_what_is_written_passes_the_checks_of_a_run(made):
    command = made(found())
    check(command)
    assert command.data.source.videos == Path("my clips")
    assert command.data.recipe.stride == 1.5625
    assert command.validation.prompts[0].prompt == "A dog: 'runs' #1\nfast."
    assert command.validation.prompts[0].references == (__file__,)


def test_the_memory_of_the_published_size_is_reckoned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(init, "_look", lambda _: found())
    assert run(InitCommand(Path("clips"), tmp_path / "a.yaml", 24)) == 0
    told = re.search(r"832x480, 81 frames; memory: (\d+) GB by arithmetic", capsys.readouterr().out)
    assert told and 12 <= int(told[1]) <= 16  # the recipe for few clips says 15 GiB


def test_a_folder_without_a_usable_clip_is_told_with_its_first_fault(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"has no usable clip\. The first fault: "):
        run(InitCommand(tmp_path, tmp_path / "a.yaml", 24))
    assert not (tmp_path / "a.yaml").exists()


@pytest.mark.parametrize("memory", [-1.0, 0.0, float("nan")])
def test_a_memory_that_cannot_be_meant_is_refused(tmp_path, memory):
    with pytest.raises(ValueError, match=f"--gpu-memory is {memory:g}"):
        run(InitCommand(tmp_path, tmp_path / "a.yaml", memory))


def test_a_file_that_exists_is_kept(made, tmp_path):
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        made(found())
    assert (tmp_path / "a.yaml").read_text() == "mine"


def test_check_cache_run_and_export_read_the_file(training_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = write_clips(tmp_path / "my clips", 3)
    small = ["--height", str(HEIGHT), "--width", str(WIDTH), "--num-frames", str(FRAMES)]
    short = ["--steps=1", "--optimizer.warmup-steps=0", "--alignment.layers=0", "--log.tracker=none"]
    prompt = ["--validation.video-steps=1", "--data.workers=0", "--device=cpu"]
    for words in (
        ["init", str(clips), "--gpu-memory", "24", "--model", str(training_world.wan)],
        ["check", "--config", "refalign.yaml", *small],
        ["cache", "--config", "refalign.yaml", *small, "--teacher", str(training_world.teacher), "--workers", "0"],
        ["run", "--config", "refalign.yaml", *short, *prompt],
        ["export", "--config", "refalign.yaml", "--output", "lora"],
    ):
        assert cli.main(words) == 0, words
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()
    assert len(list((tmp_path / "runs/my clips/samples").glob("*/prompt_?.mp4"))) == 4
