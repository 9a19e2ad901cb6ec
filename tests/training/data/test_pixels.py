import dataclasses
from collections import Counter
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refalign.video import write_video
from refalign_training.bounds import InvalidOption
from refalign_training.data.augmentation import jitter_colours, warp
from refalign_training.data.pixels import (
    cover,
    draw_conditions,
    draw_frames,
    draw_prompt,
    load_references,
    load_video,
)
from refalign_training.data.randomness import numpy_generator, seed_of
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Clip, Reference, Sample, Unusable, View, usable
from refalign_training.data.source import Source, read_source
from tests.training.opens2v_files import encode_mask, rectangle, write_opens2v


RECIPE = Recipe(height=48, width=64, num_frames=5, stride=1.0, augment="none")
RED, BLUE = (220, 30, 30), (30, 30, 220)


def paint(size, colour):
    return np.full((*size, 3), colour, np.uint8)


def write_stretched(path, frame, aspect):
    """A video of 5 frames whose pixels are shown `aspect` times as wide as high."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = frame.shape[:2]
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def sample(tmp_path) -> Sample:
    """A clip of 20 frames whose greys are 10 times their numbers; on each a red rectangle of 32 x 24 pixels."""
    frames = [paint((96, 128), (10 * number,) * 3) for number in range(20)]
    for frame in frames:
        frame[8:32, 16:48] = RED
    path = write_video(frames, tmp_path / "clip.mp4", fps=25)
    mask = encode_mask(rectangle(96, 128, (16, 8, 48, 32)))
    view = View(path, frame=7, box=(16, 8, 48, 32), mask=mask)
    Image.fromarray(paint((60, 60), BLUE)).save(tmp_path / "other.png")
    cross = View(tmp_path / "other.png")
    return Sample("a/b", ("one", "two"), Clip(path, 2, 18), (Reference("1", view, (cross,)),), "file", 0)


def change(sample, **changes):
    """The sample with another view of its only reference."""
    reference = dataclasses.replace(sample.references[0], **changes)
    return dataclasses.replace(sample, references=(reference,))


def mean_colour(image):
    """The mean colour of what is not white."""
    pixels = np.asarray(image).reshape(-1, 3)
    return pixels[(pixels < 240).any(axis=1)].mean(axis=0)


# -- Frames -----------------------------------------------------------------------------------------------------------


@given(
    available=st.integers(1, 400),
    fps=st.floats(1, 240),
    num_frames=st.sampled_from([1, 5, 17, 81]),
    stride=st.floats(0.1, 20),
    seed=st.integers(0, 5),
)
def test_frames_stay_inside_the_clip_and_in_order(available, fps, num_frames, stride, seed):
    recipe = Recipe(num_frames=num_frames, stride=stride)
    numbers = draw_frames(available, fps, recipe, np.random.default_rng(seed))
    assert numbers.shape == (num_frames,)
    assert numbers.min() >= 0
    assert numbers.max() < available
    assert (np.diff(numbers) >= 0).all()


def test_the_stride_is_relative_to_25_frames_a_second():
    recipe = Recipe(num_frames=81)
    for fps, stride in ((25, 3.0), (29.97, 3.5964), (50, 6.0)):
        numbers = draw_frames(2000, fps, recipe, np.random.default_rng(0))
        assert numbers[-1] - numbers[0] == pytest.approx(80 * stride, abs=1)
        assert set(np.diff(numbers)) <= {int(stride), int(stride) + 1}


def test_a_short_clip_repeats_frames():
    numbers = draw_frames(10, 25, Recipe(num_frames=81), np.random.default_rng(0))
    assert set(numbers) == set(range(10))
    assert max(Counter(numbers.tolist()).values()) <= 9


def test_frames_start_anywhere():
    starts = {draw_frames(300, 25, Recipe(num_frames=5), np.random.default_rng(s))[0] for s in range(200)}
    assert min(starts) < 20
    assert max(starts) > 260


def test_a_video_is_of_the_clips_range(sample):
    recipe = dataclasses.replace(RECIPE, num_frames=17)
    numbers = load_video(sample, recipe)[:, -4:, -4:].mean(axis=(1, 2, 3)) / 10
    assert numbers[0] == pytest.approx(2, abs=0.3)
    assert numbers[-1] == pytest.approx(17, abs=0.3)


def test_a_video_depends_on_seed_variant_and_id_alone(sample):
    first = load_video(sample, RECIPE)
    np.testing.assert_array_equal(load_video(sample, RECIPE), first)
    others = [
        load_video(sample, RECIPE, variant=1),
        load_video(sample, dataclasses.replace(RECIPE, seed=1)),
        load_video(dataclasses.replace(sample, id="c"), RECIPE),
    ]
    assert any((other != first).any() for other in others)


def test_the_stride_is_the_recipes_else_the_clips(sample):
    """Frame n is of grey 10n; the clip has frames 2 to 17."""

    def distance(clip, stride):
        recipe = dataclasses.replace(RECIPE, stride=stride)
        greys = load_video(dataclasses.replace(sample, clip=clip), recipe)[:, -4:, -4:].mean(axis=(1, 2, 3)) / 10
        return (greys[-1] - greys[0]) / 4

    assert distance(sample.clip, None) == pytest.approx(3, abs=0.1)
    assert distance(dataclasses.replace(sample.clip, stride=2.0), None) == pytest.approx(2, abs=0.1)
    assert distance(sample.clip, 1.0) == pytest.approx(1, abs=0.1)


def test_motion_keeps_its_speed_at_a_variable_rate():
    times = np.concatenate([np.arange(50) / 50, 1 + np.arange(10) / 10])  # a second at 50, and one at 10
    recipe = Recipe(num_frames=17, stride=1.5625)
    numbers = draw_frames(60, 59 / times[-1], recipe, np.random.default_rng(0), times=times)
    assert np.abs(np.diff(times[numbers]) - 1 / 16).max() <= 1 / 10
    assert times[numbers[-1]] - times[numbers[0]] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("crop", [None, (24, 0, 72, 96)])
def test_pixels_that_are_not_square_become_so(tmp_path, crop):
    """A box of 24x48 stored pixels, each twice as wide as high, is a square; crops count stored pixels."""
    frame = paint((96, 96), BLUE)
    frame[24:72, 36:60] = RED
    path = write_stretched(tmp_path / "a.mp4", frame, 2)
    view = View(path, 0, box=(36, 24, 60, 72))
    sample = Sample("a", ("p",), Clip(path, crop=crop), (Reference("1", view),), "file", 0)
    red = load_video(sample, dataclasses.replace(RECIPE, width=96, height=96))[0, ..., 0] > 128
    assert red.any(axis=0).sum() == pytest.approx(red.any(axis=1).sum(), abs=3)
    (reference,) = load_references(sample, dataclasses.replace(RECIPE, cross_probability=0))
    assert (np.asarray(reference.image)[..., 1] < 128).sum() == pytest.approx(48 * 48, rel=0.1)  # a square, on white


def test_a_clip_beyond_the_files_end_is_unusable(sample):
    with pytest.raises(Unusable, match=r"no frames: .*20 frames, the clip is 20 to 30"):
        load_video(dataclasses.replace(sample, clip=dataclasses.replace(sample.clip, start=20, end=30)), RECIPE)


@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    target=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    data=st.data(),
)
def test_cover_fills_the_size_without_stretching(size, target, data):
    """On an image of gradients: columns tell x, rows tell y."""
    width, height = size
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    target = (16 * target[0], 16 * target[1])
    pixels = np.asarray(cover(image, (left, top, right, bottom), *target)).astype(float)
    assert pixels.shape == (*target, 3)
    assert left <= pixels[..., 0].min() and pixels[..., 0].max() < right
    assert top <= pixels[..., 1].min() and pixels[..., 1].max() < bottom
    if min(right - left, bottom - top) >= 40 and min(target) >= 48:
        steps = np.diff(pixels[8:-8, 8:-8, 0].mean(0)).mean(), np.diff(pixels[8:-8, 8:-8, 1].mean(1)).mean()
        assert steps[0] == pytest.approx(steps[1], rel=0.15)


def test_a_crop_outside_the_frame_is_unusable(sample):
    with pytest.raises(Unusable, match=r"crop: .*in a frame of 128x96"):
        load_video(dataclasses.replace(sample, clip=dataclasses.replace(sample.clip, crop=(0, 0, 129, 96))), RECIPE)


# -- References -------------------------------------------------------------------------------------------------------


def test_a_reference_is_cut_out_and_letterboxed(sample):
    (reference,) = load_references(sample, dataclasses.replace(RECIPE, cross_probability=0))
    pixels = np.asarray(reference.image).astype(int)
    assert reference.origin == "regular"
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels - RED).max() < 30  # 32 x 24 fills 64 x 48


def test_a_mask_leaves_white_around_the_subject(sample):
    triangle = np.tril(np.ones((24, 32), bool))
    mask = np.zeros((96, 128), bool)
    mask[8:32, 16:48] = triangle
    view = dataclasses.replace(sample.references[0].view, mask=encode_mask(mask))
    (reference,) = load_references(change(sample, view=view, cross=()), RECIPE)
    pixels = np.asarray(reference.image)
    assert (pixels[:8, -8:] == 255).all()
    assert np.abs(pixels[-8:, :8].astype(int) - RED).max() < 30


def test_a_cross_pair_is_taken_as_often_as_it_should(sample):
    origins = Counter(load_references(sample, RECIPE, variant)[0].origin for variant in range(300))
    assert origins["cross"] / 300 == pytest.approx(0.23, abs=0.08)


def test_a_reference_without_a_cross_pair_is_regular(sample):
    recipe = dataclasses.replace(RECIPE, cross_probability=1.0)
    assert load_references(sample, recipe)[0].origin == "cross"
    assert load_references(change(sample, cross=()), recipe)[0].origin == "regular"
    recipe = dataclasses.replace(RECIPE, cross_probability=0)
    assert load_references(change(sample, view=None), recipe)[0].origin == "cross"


def test_a_broken_view_gives_way_to_another_and_is_told(sample):
    faults = []
    view = dataclasses.replace(sample.references[0].view, path=sample.clip.path.with_name("gone.mp4"))
    recipe = dataclasses.replace(RECIPE, cross_probability=0)
    (reference,) = load_references(change(sample, view=view), recipe, on_fault=faults.append)
    assert mean_colour(reference.image) == pytest.approx(BLUE, abs=5)
    assert [fault.kind for fault in faults] == ["missing file"]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"frame": 20}, "no frames"),
        ({"box": (16, 8, 48, 200)}, "box"),
        ({"box": (160, 8, 200, 40)}, "box"),
        ({"crop": (0, 0, 400, 96)}, "crop"),
        ({"mask": {"size": [96, 127], "counts": "P`:"}}, "mask size"),
        ({"mask": {"size": [96, 128], "counts": "0"}}, "mask"),
    ],
)
def test_a_view_that_does_not_fit_its_frame(sample, changes, kind):
    faults = []
    view = dataclasses.replace(sample.references[0].view, **changes)
    with pytest.raises(Unusable, match="no references: none of the 1 can be read"):
        load_references(change(sample, view=view, cross=()), RECIPE, on_fault=faults.append)
    assert [fault.kind for fault in faults] == [kind]


def test_a_box_of_the_shrunk_frame_and_a_place_as_a_share(sample):
    """As Phantom-Data has them."""
    view = View(sample.clip.path, frame=0.5, box=(8, 4, 24, 16), box_long_side=64)
    (reference,) = load_references(change(sample, view=view, cross=()), RECIPE)
    assert np.abs(np.asarray(reference.image).astype(int) - RED).max() < 30
    view = View(sample.clip.path, frame=0.5, box=(32, 24, 64, 48), box_long_side=64)
    (reference,) = load_references(change(sample, view=view, cross=()), RECIPE)
    assert np.asarray(reference.image).mean() == pytest.approx(100, abs=3)  # frame 10 of 20


def test_an_image_that_is_none(sample, tmp_path):
    (tmp_path / "other.png").write_bytes(b"no image")
    faults = []
    with pytest.raises(Unusable):
        load_references(change(sample, view=None), RECIPE, on_fault=faults.append)
    assert [fault.kind for fault in faults] == ["image"]


# -- Augmentation -----------------------------------------------------------------------------------------------------


def test_only_what_comes_from_the_clip_itself_is_augmented(sample):
    plain = dataclasses.replace(RECIPE, cross_probability=0)
    augmented = dataclasses.replace(plain, augment="regular")
    assert load_references(sample, plain)[0].image != load_references(sample, augmented)[0].image
    cross = dataclasses.replace(plain, cross_probability=1)
    assert (
        load_references(sample, cross)[0].image
        == load_references(sample, dataclasses.replace(cross, augment="regular"))[0].image
    )
    assert (
        load_references(sample, cross)[0].image
        != load_references(sample, dataclasses.replace(cross, augment="all"))[0].image
    )


def test_augmentation_differs_by_variant_and_repeats(sample):
    recipe = dataclasses.replace(RECIPE, augment="regular", cross_probability=0)
    images = [load_references(sample, recipe, variant)[0].image for variant in (0, 1, 0)]
    assert images[0] == images[2] != images[1]


@given(seed=st.integers(0, 2**32))
def test_all_of_a_subject_stays_and_what_a_warp_uncovers_is_white(seed):
    """Even of one that fills the canvas: each of its corners has a colour of its own."""
    canvas = np.full((96, 160, 3), 90, np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    for (y, x), colour in zip([(0, 0), (0, 136), (72, 0), (72, 136)], colours, strict=True):
        canvas[y : y + 24, x : x + 24] = colour
    warped = np.asarray(warp(Image.fromarray(canvas), np.random.default_rng(seed))).astype(int)
    assert warped.shape == canvas.shape
    for colour in colours:
        assert 40 < (np.abs(warped - colour).max(axis=-1) < 60).sum() < 2 * 24 * 24
    assert warped.min(axis=-1)[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 255
    assert warped.max(axis=-1).min() > 50  # nothing is black


def test_half_of_the_warps_mirror():
    left = Image.fromarray(np.tile(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[:, None], (64, 1, 3)))
    mirrored = 0
    for seed in range(300):
        pixels = np.asarray(warp(left, np.random.default_rng(seed)))[20:44]
        mirrored += pixels[:, 32:].mean() < pixels[:, :32].mean()
    assert mirrored / 300 == pytest.approx(0.5, abs=0.1)


def test_colours_change_a_little_and_take_nothing_from_what_is_cut_off():
    pixels = np.zeros((40, 40, 4), np.uint8)  # a bright disc, cut out of black
    rows, columns = np.mgrid[:40, :40]
    pixels[(rows - 20) ** 2 + (columns - 20) ** 2 < 100] = 250, 250, 250, 255
    pixels[18:22, 18:22, :3] = RED
    for seed in range(20):
        jittered = jitter_colours(Image.fromarray(pixels), np.random.default_rng(seed))
        white = Image.new("RGBA", jittered.size, "white")
        on_white = np.asarray(Image.alpha_composite(white, jittered).convert("RGB")).astype(int)
        assert on_white[np.abs(rows - 20) + np.abs(columns - 20) > 8].min() > 200
        assert 0 < np.abs(on_white[20, 20] - RED).max() < 80


def test_white_behind_a_subject_stays_white_without_alpha_too():
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[10:30, 10:30] = RED
    for seed in range(20):
        jittered = jitter_colours(Image.fromarray(pixels), np.random.default_rng(seed))
        on_white = Image.alpha_composite(Image.new("RGBA", jittered.size, "white"), jittered)
        assert (np.asarray(on_white)[:5, :, :3] == 255).all()


# -- Randomness, captions, conditions ---------------------------------------------------------------------------------


def test_every_caption_is_drawn(sample):
    assert {draw_prompt(sample, RECIPE, variant) for variant in range(20)} == {"one", "two"}


def test_seeds_depend_on_every_part_and_its_place():
    parts = [("a", 1, 2, "b"), ("a", 2, 1, "b"), ("a", 12, "b"), ("a", 1, 2, "c"), ("a", "1", 2, "b"), ("a", 1, "2b")]
    assert len({seed_of(*part) for part in parts}) == len(parts)
    assert seed_of("frames", 0, 3, "id") == 1595537970164601346  # what a run draws must not change with a release


def test_generators_repeat():
    assert numpy_generator("a", 1).random() == numpy_generator("a", 1).random()


def test_conditions_are_dropped_as_often_as_they_should_and_apart():
    counts = Counter(draw_conditions(0, step, "id") for step in range(20_000))
    expected = {(True, True): 0.7, (False, True): 0.1, (True, False): 0.1, (False, False): 0.1}
    for kept, share in expected.items():
        assert counts[kept] / 20_000 == pytest.approx(share, abs=0.01)


def test_conditions_can_always_stay_or_always_go():
    assert draw_conditions(0, 0, "id", no_text=0, no_references=0, neither=0) == (True, True)
    assert draw_conditions(0, 0, "id", no_text=0, no_references=1, neither=0) == (True, False)
    with pytest.raises(ValueError, match=r"rates are 0.5, 0.5 and 0.1"):
        draw_conditions(0, 0, "id", no_text=0.5, no_references=0.5)


@pytest.mark.parametrize(
    "changes", [{"height": 40}, {"width": 0}, {"num_frames": 6}, {"stride": 0}, {"cross_probability": 1.2}]
)
def test_a_recipe_that_makes_no_video(changes):
    ((name, value),) = changes.items()
    with pytest.raises(InvalidOption, match=f"{name} is {value}: it must be"):
        Recipe(**changes)


# -- A whole dataset --------------------------------------------------------------------------------------------------


def test_references_of_opens2v_are_the_drawn_subjects(tmp_path):
    files = write_opens2v(tmp_path, clips=2)
    recipe = dataclasses.replace(RECIPE, cross_probability=0)
    for sample in usable(read_source(Source("opens2v", files.annotations, files.videos, files.cross_pairs))):
        for reference in load_references(sample, recipe):
            pixels = np.asarray(reference.image).reshape(-1, 3).astype(int)
            subject = pixels[(pixels < 200).any(axis=1)]
            assert subject.std(axis=0).max() < 30  # one colour: no pixel of the background
        assert load_video(sample, recipe).shape == (5, 48, 64, 3)
