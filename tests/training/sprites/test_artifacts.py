"""Triplets: wrong inside the mask alone, with the true region from the drawing itself."""

import numpy as np
import pytest
from PIL import Image

from refalign_training.sprites.artifacts import KINDS, draw_triplet, write_benchmark
from refalign_training.sprites.subject import SIDE, Pose, draw_subject, posed, subjects
from refalign_training.sprites.views import fitted_pose, own_places, parts_of_view


@pytest.fixture(scope="module")
def triplets():
    return [draw_triplet(number, held_out=True) for number in range(2 * len(KINDS))]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_an_image_is_wrong_inside_its_mask_and_nowhere_else(triplets):
    for triplet in triplets:
        is_wrong = (pixels(triplet.image) != pixels(triplet.truth)).any(-1)
        inside = pixels(triplet.mask) > 0
        assert not is_wrong[~inside].any()
        assert is_wrong[inside].mean() > 0.1


def test_each_kind_comes_in_turn(triplets):
    assert [triplet.kind for triplet in triplets] == 2 * list(KINDS)


def test_the_region_is_on_the_subject_or_at_its_edge(triplets):
    for triplet in triplets:
        is_subject = pixels(triplet.reference.getchannel("A")) > 127
        region = pixels(triplet.region) > 0
        assert region.any()
        assert (region & is_subject).sum() > 0.5 * region.sum()


def test_the_region_shows_what_the_mask_hides(triplets):
    # Faces are black and white, which neither light nor pose changes
    for triplet in triplets:
        if triplet.kind == "face":
            shown = pixels(triplet.reference)[pixels(triplet.region) > 0]
            hidden = pixels(triplet.truth)[pixels(triplet.mask) > 0]
            for colours in (shown[:, :3], hidden):
                assert (colours.max(axis=1) < 70).mean() > 0.05


def test_the_same_number_gives_the_same_triplet(triplets):
    again = draw_triplet(3, held_out=True)
    assert np.array_equal(pixels(again.image), pixels(triplets[3].image))
    assert np.array_equal(pixels(again.region), pixels(triplets[3].region))
    assert not np.array_equal(pixels(draw_triplet(3, seed=1, held_out=True).image), pixels(again.image))


def test_a_benchmark_is_written_whole_in_the_papers_form(tmp_path, triplets):
    write_benchmark(tmp_path / "bench", 2)
    folders = sorted(path.name for path in (tmp_path / "bench").iterdir())
    assert folders == ["0000-pattern", "0001-face"]
    files = sorted(path.name for path in (tmp_path / "bench/0001-face").iterdir())
    assert files == ["image.png", "mask.png", "reference.png", "reference_mask.png", "truth.png"]
    with Image.open(tmp_path / "bench/0001-face/image.png") as image:
        assert np.array_equal(pixels(image), pixels(triplets[1].image))


def test_a_fitted_pose_fills_the_frame_as_asked():
    subject = subjects(held_out=True)[5]
    pose = fitted_pose(subject, tilt=20, fill=0.8, shift=(0.05, -0.05))
    left, top, right, bottom = posed(draw_subject(subject), pose, SIDE).getchannel("A").getbbox() or (0, 0, 0, 0)
    assert max(right - left, bottom - top) == pytest.approx(0.8 * SIDE, abs=3)
    assert (left + right) / 2 == pytest.approx(0.55 * SIDE, abs=2)
    assert (top + bottom) / 2 == pytest.approx(0.45 * SIDE, abs=2)


def test_places_are_the_subjects_own_however_it_is_turned():
    places = own_places(Pose(0.5, 0.5, 0.25, tilt=90), 16)
    # Turned clockwise, what was above is at the right
    assert places[8, 15] == pytest.approx((0.125, -1.875))


def test_parts_are_where_they_are_drawn():
    subject = next(each for each in subjects(held_out=True) if each.accessory == "hat" and each.face == "glasses")
    parts = parts_of_view(subject, Pose(0.5, 0.5, 0.25), 64)
    assert parts[0, 0] == 0
    assert parts[32, 28] == 3  # an eye
    assert parts[15, 32] == 4  # the hat
