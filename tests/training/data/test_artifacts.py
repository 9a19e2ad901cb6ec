import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign_training.data.artifacts import Example, draw_example, draw_mask, with_stickers
from refalign_training.data.fields import Unusable
from refalign_training.data.randomness import numpy_generator
from refalign_training.data.recipe import RefineOptions


SIDE, ROOM = 64, 80
OPTIONS = RefineOptions()
seeds = st.integers(0, 10_000)


def subject(has_other: bool = False) -> np.ndarray:
    """A disc whose colour tells the place on it, on grey."""
    y, x = np.mgrid[:ROOM, :ROOM]
    seen = (x - ROOM / 2) ** 2 + (y - ROOM / 2) ** 2 < (ROOM / 3) ** 2
    picture = np.full((ROOM, ROOM, 8), 128, np.uint8)
    picture[seen, 0], picture[seen, 1], picture[seen, 2] = (3 * x)[seen], (3 * y)[seen], 0
    picture[..., 3] = 255 * seen
    picture[..., 4:] = picture[..., :4] if has_other else 0
    return picture


def draw(seed: int, options: RefineOptions = OPTIONS, has_other: bool = False) -> Example:
    return draw_example(subject(has_other), SIDE, SIDE, options, numpy_generator("test", seed))


def colours(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Red and green of the subject's pixels in a mask: blue is 0 there alone."""
    chosen = image[mask & (image[..., 2] < 20)]
    return chosen[:, :2].astype(float)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_a_mask_covers_its_share_of_the_subject(seed):
    seen = subject()[..., 3] > 127
    mask = draw_mask(seen, OPTIONS.mask_area, numpy_generator("test", seed))
    share = (mask & seen).sum() / seen.sum()
    assert 0.02 < share < 0.5


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_the_true_region_shows_what_is_masked(seed):
    # Light and blur change colours a little, and the picture's mask reaches beyond by its dilation
    whole = RefineOptions(alignment_share=1.0)
    example = draw(seed, whole)
    masked, found = colours(example.image, example.mask), colours(example.reference, example.region)
    if len(found) > 20:
        assert np.abs(np.median(masked, 0) - np.median(found, 0)).max() < 50


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_the_mask_lies_in_the_picture(seed):
    example = draw(seed)
    assert example.mask.any()
    assert not example.mask.all()


def test_a_reference_is_the_whole_subject_or_its_region():
    covered = [draw(seed, RefineOptions(alignment_share=share)).region.mean() for share in (0, 1) for seed in range(8)]
    assert min(covered[:8]) > 0.1
    assert np.mean(covered[:8]) > 2 * np.mean(covered[8:])


def test_another_picture_has_no_known_region():
    assert not draw(0, RefineOptions(alignment_share=0.0), has_other=True).region.any()


def test_the_same_seed_draws_the_same():
    first, second = draw(3), draw(3)
    assert all(np.array_equal(vars(first)[name], vars(second)[name]) for name in vars(first))


def test_a_subject_that_is_not_seen_cannot_be_used():
    hidden = subject()
    hidden[..., 3] = 0
    with pytest.raises(Unusable, match="nothing of the subject is seen"):
        draw_example(hidden, SIDE, SIDE, OPTIONS, numpy_generator("test"))


def test_stickers_are_on_the_subject_alone():
    picture, seen = subject()[..., :3], subject()[..., 3] > 127
    stuck = with_stickers(picture, seen, numpy_generator("test"))
    assert np.array_equal(stuck[~seen], picture[~seen])
    changed = (stuck[seen] != picture[seen]).any(-1).mean()
    assert 0.3 < changed <= 1
