"""Held-out losses and sample videos."""

import dataclasses
import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image

from refalign import RefAlignWanPipeline
from refalign.pipeline_refalign_wan import paper_scheduler
from refalign.video import read_video
from refalign_training.cache.reader import Cache
from refalign_training.method.objective import Objective
from refalign_training.run.config import PromptOptions, RunCommand
from refalign_training.run.inputs import CachedSamples
from refalign_training.run.order import hold_out
from refalign_training.run.parallel import Parallel
from refalign_training.run.trainer import Trainer, run
from refalign_training.run.validation import QUANTILES, Validation
from refalign_training.run.videos import Videos, beside, strip
from tests.training.small_cache import FRAMES, HEIGHT, WIDTH
from tests.training.small_run import changed, run_command


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, training_world) -> Trainer:
    """A trainer of a LoRA with dropout, validated on a cache of its own."""
    folder = tmp_path_factory.mktemp("validated")
    changes = {"validation.every": 1, "validation.cache": training_world.cache, "lora.dropout": 0.3}
    trainer = Trainer(run_command(folder, training_world.wan, training_world.cache, **changes))
    for name, parameter in trainer.state.parameters.items():
        if ".lora_B." in name:  # which starts as zeros: adapters would do nothing
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return trainer


def validation_of(trainer: Trainer, rows, **changes) -> Validation:
    command = changed(trainer.command, **changes)
    return Validation(trainer.samples, rows, command.validation, command.objective, trainer.parallel)


def losses(trainer: Trainer, objective: Objective | None = None, step: int = 0) -> dict[str, float]:
    """Those of two samples, which take less time than all."""
    return validation_of(trainer, range(2)).losses(objective or trainer.objective, step)


# -- Losses -----------------------------------------------------------------------------------------------------------


def test_losses_repeat_bit_for_bit(trainer):
    torch.manual_seed(1)
    first = losses(trainer)
    torch.manual_seed(2)
    assert losses(trainer) == first


def test_losses_do_not_depend_on_the_runs_seed(trainer, tmp_path):
    other = Trainer(changed(trainer.command, seed=5, output=tmp_path))
    for name, parameter in other.state.parameters.items():
        parameter.data.copy_(trainer.state.parameters[name])
    assert other.validation.losses(other.objective, 0) == trainer.validation.losses(trainer.objective, 0)


def test_losses_depend_on_the_weights(trainer, tmp_path):
    other = Trainer(changed(trainer.command, output=tmp_path))
    values, others = losses(trainer), losses(other)
    assert {name for name in values if values[name] == others[name]} == set()


def test_losses_are_those_of_single_samples_averaged(trainer):
    rows = range(3)
    values = validation_of(trainer, rows).losses(trainer.objective, 0)
    alone = [validation_of(trainer, [row]).losses(trainer.objective, 0) for row in rows]
    assert values == pytest.approx({name: sum(one[name] for one in alone) / 3 for name in values}, rel=1e-5)


def test_there_is_a_loss_at_each_quantile_and_their_mean(trainer):
    values = losses(trainer)
    by_quantile = [values[f"validation/mse_by_quantile/{q}"] for q in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    assert values.keys() - {f"validation/mse_by_quantile/{q}" for q in QUANTILES} == {
        *("validation/mse", "validation/alignment", "validation/cosine")
    }
    assert values["validation/mse"] == pytest.approx(np.mean(by_quantile))
    assert len(set(by_quantile)) == 9


def test_without_alignment_there_is_none_to_measure(trainer):
    command = changed(trainer.command, **{"alignment.stop_step": 5})
    objective = trainer.objective
    ended = type(objective)(objective.transformer, objective.alignment, command.alignment, objective.dtype)
    assert "validation/cosine" in losses(trainer, ended, 4)
    assert {name.split("/")[1] for name in losses(trainer, ended, 5)} == {"mse", "mse_by_quantile"}


def test_dropout_is_off_within_and_on_afterwards(trainer):
    before = {name: module.training for name, module in trainer.transformer.named_modules()}
    losses(trainer)
    assert all(before.values())
    assert {name: module.training for name, module in trainer.transformer.named_modules()} == before


# -- Which samples ----------------------------------------------------------------------------------------------------


def test_those_held_out_are_the_same_for_every_seed_and_at_most_a_tenth(larger_cache, training_world, tmp_path):
    trainers = []
    for seed in (0, 1):
        changes = {"seed": seed, "validation.every": 1, "validation.samples": 50}
        trainers.append(Trainer(run_command(tmp_path / str(seed), training_world.wan, larger_cache, **changes)))
    first, second = trainers
    assert len(first.held_out) == 1
    assert first.held_out.tolist() == second.held_out.tolist()
    assert sorted([*first.rows, *first.held_out]) == list(range(12))
    assert [name for name, _ in first.validation.values] == [first.samples.id(first.held_out[0])]


def test_a_tenth_or_fewer_are_held_out_and_none_is_lost():
    for count in (1, 9, 10, 25, 100):
        for wanted in (0, 1, 3, 1000):
            kept, held_out = hold_out(count, wanted)
            assert len(held_out) == min(wanted, count // 10)
            assert sorted([*kept, *held_out]) == list(range(count))


def test_of_a_cache_of_its_own_all_are_validated_on_and_all_others_trained_on(trainer):
    assert len(trainer.validation.values) == 8
    assert trainer.rows.tolist() == list(range(8))


@pytest.fixture
def broken_cache(training_world, tmp_path):
    """Copies a cache, without the videos of some samples."""

    def copy(*rows: int):
        shutil.copytree(training_world.cache, tmp_path / "broken")
        cache = Cache(tmp_path / "broken")
        for row in rows:
            cache.items["video"].path(cache.place(cache.samples[row], "video")).unlink()
        return tmp_path / "broken"

    return copy


def test_a_sample_that_cannot_be_read_is_left_out_and_told(trainer, broken_cache, caplog):
    samples = CachedSamples(broken_cache(3), needs_teacher=True)
    options = trainer.command
    validation = Validation(samples, range(8), options.validation, options.objective, trainer.parallel)
    assert [name for name, _ in validation.values] == [samples.id(row) for row in range(8) if row != 3]
    assert f"{samples.id(3)} cannot be validated on" in caplog.text


def test_an_id_that_would_leave_the_folder_of_videos_is_left_out_and_told(trainer, monkeypatch, caplog):
    monkeypatch.setattr(trainer.samples, "id", lambda row: "../../../outside" if row == 1 else f"clip{row}")
    assert [name for name, _ in validation_of(trainer, range(3)).values] == ["clip0", "clip2"]
    assert "'../../../outside' cannot name a folder" in caplog.text


def test_without_a_readable_sample_the_run_goes_without_validation(trainer, broken_cache, tmp_path, caplog):
    changes = {"validation.cache": broken_cache(*range(8)), "output": tmp_path / "run"}
    assert Trainer(changed(trainer.command, **changes)).validation is None
    assert "There is no validation: none of its 8 samples can be read." in caplog.text


# -- Videos -----------------------------------------------------------------------------------------------------------


def write(trainer: Trainer, validation: Validation, folder):
    videos = Videos(validation.options, validation.objective_options.max_sequence_length, Parallel(device="cpu"))
    model = trainer.command.model.base
    return videos.write(validation.shown(), trainer.objective, trainer.transformer, model, folder)


@pytest.fixture(scope="module")
def videos(trainer, tmp_path_factory):
    """Pictures of the videos of a sample with one reference and of one with two."""
    folder = tmp_path_factory.mktemp("videos")
    validation = validation_of(trainer, range(3), **{"validation.videos": 2})
    torch.manual_seed(0)
    pictures = write(trainer, validation, folder)
    return folder, validation, pictures


def test_each_video_has_its_frames_and_the_references_beside_them(videos):
    folder, validation, pictures = videos
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}{end}" for name in pictures for end in (".mp4", ".png")
    )
    assert list(pictures) == [name for name, _ in validation.values[:2]]
    for (name, value), columns in zip(validation.values, (WIDTH, WIDTH // 2), strict=False):
        assert value["reference_latents"].shape[1] == WIDTH // columns
        with av.open(str(folder / f"{name}.mp4")) as video:
            frames = [(frame.width, frame.height) for frame in video.decode(video=0)]
        assert frames == [(columns + WIDTH, HEIGHT)] * FRAMES
        assert pictures[name].size == Image.open(folder / f"{name}.png").size == (columns + WIDTH, 3 * HEIGHT)


def test_videos_are_the_same_again(videos, trainer, tmp_path):
    folder, validation, pictures = videos
    torch.manual_seed(7)
    again = write(trainer, validation, tmp_path)
    for name, picture in pictures.items():
        # The decoder's weights lie elsewhere in memory the second time, and x264 does not repeat itself bit for bit
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(again[name])).max() <= 1
        first, second = (read_video(parent / f"{name}.mp4").astype(int) for parent in (folder, tmp_path))
        assert np.abs(first - second).mean() < 0.5


def test_videos_follow_their_references(videos, trainer, tmp_path):
    _, validation, pictures = videos
    name, value = validation.values[0]
    other = dataclasses.replace(validation.options, videos=1)
    changed_one = Validation(trainer.samples, [], other, validation.objective_options, Parallel(device="cpu"))
    changed_one.values = [(name, value | {"reference_latents": -value["reference_latents"]})]
    picture = write(trainer, changed_one, tmp_path)[name]
    ours, theirs = (np.asarray(p)[:, WIDTH:].astype(int) for p in (pictures[name], picture))
    assert np.abs(ours - theirs).mean() > 0.1


# -- One's own prompts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(training_world, tmp_path_factory) -> RunCommand:
    """A run of two steps on samples too few to hold one out, with two prompts of one's own."""
    references = sorted(map(str, training_world.clips.glob("clip01.ref*.png")))
    prompts = (PromptOptions("a cat", references, 3), PromptOptions("a dog"))
    changes = {"validation.every": 2, "validation.samples": 5, "validation.videos": 2, "validation.prompts": prompts}
    folder = tmp_path_factory.mktemp("own") / "run"
    return run_command(folder, training_world.wan, training_world.cache, steps=2, **changes)


def test_own_prompts_are_shown_before_the_first_step_and_at_each_validation(own, caplog, capsys):
    with caplog.at_level("INFO"):
        assert run(own) == 0
    samples = own.output / "samples"
    assert {str(path.relative_to(samples)) for path in samples.glob("*/*.mp4")} == {
        f"step-{step:08d}/prompt_{number}.mp4" for step in (0, 2) for number in (1, 2)
    }
    for step in (0, 2):
        assert f"Step {step}, videos beside their references: {samples / f'step-{step:08d}'}" in caplog.text
    assert caplog.text.count("Nothing is held out: of 8 samples, a tenth is none.") == 1


def test_the_video_of_a_prompt_is_what_the_pipeline_makes(own, training_world, tmp_path):
    trainer = Trainer(changed(own, output=tmp_path))
    ours = trainer.videos.generate(trainer.prompts[0], trainer.objective, trainer.transformer)
    pipeline = RefAlignWanPipeline.from_pretrained(training_world.wan, scheduler=paper_scheduler())
    theirs = pipeline(
        prompt="a cat",
        reference_images=list(own.validation.prompts[0].references),
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=own.validation.video_steps,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).frames
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_reference_that_cannot_be_read_is_told_with_its_prompt(own, tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    changes = {"validation.prompts": (PromptOptions("a cat", (str(tmp_path / "a.png"),)),)}
    with pytest.raises(ValueError, match=r"validation\.prompts, prompt 1 \(a cat\): Reference 1"):
        Trainer(changed(own, output=tmp_path / "run", **changes))


def flat(color: str, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, color)


def test_without_references_a_frame_stands_alone():
    assert beside([], flat("red", (48, 32))).size == (48, 32)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_references_stand_at_the_left_from_top_to_bottom(count):
    colors = ["red", "green", "blue"][:count]
    picture = beside([flat(color, (48, 32)) for color in colors], flat("black", (48, 32)))
    assert picture.width % 2 == 0 and picture.height == 32
    width = picture.width - 48
    pixels = [picture.getpixel((width // 2, (2 * i + 1) * 32 // (2 * count))) for i in range(count)]
    assert pixels == [flat(color, (1, 1)).getpixel((0, 0)) for color in colors]
    assert picture.getpixel((width, 0)) == picture.getpixel((width + 47, 31)) == (0, 0, 0)


def test_a_strip_holds_the_first_middle_and_last_frame():
    frames = [flat(color, (4, 2)) for color in ("red", "black", "blue", "black", "white")]
    picture = strip(frames)
    assert [picture.getpixel((1, y)) for y in (1, 3, 5)] == [(255, 0, 0), (0, 0, 255), (255, 255, 255)]


# -- Gains ------------------------------------------------------------------------------------------------------------


def test_gains_are_what_the_loss_rises_by(trainer):
    gains = trainer.validation.gains(trainer.objective, 0)
    assert gains == trainer.validation.gains(trainer.objective, 0)
    assert all(0 < abs(gains[f"validation/{name}"]) < 1 for name in ("reference_gain", "order_gain"))


def test_one_sample_alone_has_no_reference_gain(trainer):
    row = int(np.flatnonzero(trainer.samples.buckets[:, 3] == 1)[0])
    assert validation_of(trainer, [row]).gains(trainer.objective, 0) == {}
