import numpy as np
import pytest
from PIL import Image

from refalign_training.data.fields import Unusable
from refalign_training.data.recipe import Recipe
from refalign_training.data.sample import Clip, Reference, Sample, View
from refalign_training.data.source import read_source
from refalign_training.data.subjects import MARGIN, load_subjects, picture_side
from tests.training.small_refinement import refine_world


SIDE = 64
RECIPE = Recipe(height=SIDE, width=SIDE, num_frames=1, cross_probability=1.0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return list(read_source(refine_world(tmp_path_factory.mktemp("world")).source))


def sample_of(*views: View, cross: tuple[View, ...] = ()) -> Sample:
    references = tuple(Reference(f"subject {number}", view, cross) for number, view in enumerate(views))
    return Sample("one", ("It is there.",), Clip(views[0].path), references, "", 0)


def test_each_subject_with_a_mask_becomes_a_picture(samples):
    pictures, names = load_subjects(samples[0], RECIPE)
    side = picture_side(SIDE)
    assert pictures.shape == (2, side, side, 8)
    assert pictures.dtype == np.uint8
    assert len(set(names)) == 2


def test_the_mask_covers_the_subjects_own_colour(samples):
    pictures, _ = load_subjects(samples[0], RECIPE)
    for picture in pictures:
        seen = picture[..., 3] > 250
        colours = picture[seen][:, :3].astype(int)
        spread = np.abs(colours - np.median(colours, axis=0)).mean()
        assert spread < 12  # of 255: what the video's compression leaves of one colour


def test_the_picture_is_so_much_larger_than_the_subject(samples):
    for picture in load_subjects(samples[0], RECIPE)[0]:
        rows, columns = np.nonzero(picture[..., 3] > 127)
        longest = max(np.ptp(rows), np.ptp(columns)) + 1
        assert picture.shape[0] / longest == pytest.approx(MARGIN, abs=0.1)


def test_another_clip_gives_the_other_picture(samples):
    pictures, _ = load_subjects(samples[0], RECIPE)
    assert all(picture[..., 7].any() for picture in pictures)


def test_without_other_clips_there_is_no_other_picture(samples):
    recipe = Recipe(height=SIDE, width=SIDE, num_frames=1, cross_probability=0.0)
    assert not load_subjects(samples[0], recipe)[0][..., 4:].any()


def test_a_file_with_alpha_is_put_on_white(tmp_path):
    image = Image.new("RGBA", (40, 30))
    image.paste((200, 0, 0, 255), (10, 5, 30, 25))
    image.save(tmp_path / "cut.png")
    (picture,), _ = load_subjects(sample_of(View(tmp_path / "cut.png")), RECIPE)
    assert (picture[0, 0, :4] == (255, 255, 255, 0)).all()
    middle = picture.shape[0] // 2
    assert (picture[middle, middle, :4] == (200, 0, 0, 255)).all()


def test_a_file_without_alpha_is_left_out_and_told(tmp_path):
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "plain.png")
    cut = Image.new("RGBA", (40, 30))
    cut.paste((200, 0, 0, 255), (10, 5, 30, 25))
    cut.save(tmp_path / "cut.png")
    told = []
    sample = sample_of(View(tmp_path / "plain.png"), View(tmp_path / "cut.png"))
    assert len(load_subjects(sample, RECIPE, on_fault=told.append)[0]) == 1
    assert "has no alpha" in str(told[0])


def test_a_sample_without_masks_cannot_be_used(tmp_path):
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "plain.png")
    with pytest.raises(Unusable, match="none of the 1 has a mask or alpha"):
        load_subjects(sample_of(View(tmp_path / "plain.png")), RECIPE, on_fault=lambda _: None)
