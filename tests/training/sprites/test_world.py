"""The small world is the same each time and what masks and captions say; its dataset is in OpenS2V-5M's format."""

import json
import shutil

import numpy as np
import pytest

from refalign_training.cli import main
from refalign_training.data.sample import Fault
from refalign_training.data.source import read_source
from refalign_training.sprites.dataset import draw_clip, scene_of_clip, write_dataset
from refalign_training.sprites.subject import COLOURS, draw_reference, of_same_colours, subjects
from refalign_training.sprites.world import (
    ACTS,
    CROSSES,
    NUM_FRAMES,
    Scene,
    all_captions,
    captions,
    draw_scene,
)


CLIPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("sprites"), CLIPS)


@pytest.fixture(scope="module")
def samples(dataset):
    return list(read_source(dataset))


def test_there_are_thousands_of_subjects_and_a_tenth_is_held_out():
    trained, held_out = len(subjects(held_out=False)), len(subjects(held_out=True))
    assert trained > 10_000
    assert 0.08 < held_out / (trained + held_out) < 0.12


def test_held_out_shapes_colours_and_patterns_are_never_trained_on():
    def looks(held_out: bool) -> set:
        return {(s.shape, s.body, s.second, s.pattern) for s in subjects(held_out)}

    assert looks(True).isdisjoint(looks(False))


def test_clips_show_subjects_of_their_part_alone():
    for held_out in (False, True):
        shown = {subject for n in range(300) for subject in scene_of_clip(n, 0, held_out).subjects}
        assert shown <= set(subjects(held_out))


def test_a_scene_gives_the_same_pixels_again():
    scene = scene_of_clip(3, seed=0, held_out=False)
    first, second = draw_scene(scene), draw_scene(scene)
    assert np.array_equal(first.frames, second.frames) and np.array_equal(first.masks, second.masks)


def test_another_seed_gives_other_scenes():
    assert scene_of_clip(3, seed=0, held_out=False) != scene_of_clip(3, seed=1, held_out=False)


def test_masks_are_where_the_subject_is():
    """Outside its mask, and the pixel around it that is half covered, a frame is what it is without the subject."""
    left, right = subjects(held_out=False)[:2]
    both = draw_scene(Scene((left, right), ("rises", "spins"), "meadow", seed=5))
    other = draw_scene(Scene((subjects(held_out=False)[900], right), ("rises", "spins"), "meadow", seed=5))
    differs = (both.frames != other.frames).any(-1)
    edges = np.zeros_like(differs)
    for drawn in (both, other):
        for y in (-2, 0, 2):
            for x in (-2, 0, 2):
                edges |= np.roll(drawn.masks[0], (y, x), (1, 2))
    assert differs.any()
    assert not (differs & ~edges).any()


def test_who_is_hidden_has_no_mask_there():
    pair = subjects(held_out=False)[:2]
    drawn = draw_scene(Scene(pair, (CROSSES, CROSSES), "beach"))
    assert not (drawn.masks[0] & drawn.masks[1]).any()
    sizes = drawn.masks[1].sum((1, 2))
    assert sizes.min() < 0.5 * sizes.max()


@pytest.mark.parametrize("act", ACTS)
def test_every_act_moves(act):
    drawn = draw_scene(Scene(subjects(held_out=False)[:1], (act,), "night"))
    assert drawn.frames.shape == (NUM_FRAMES, 128, 128, 3)
    assert all((drawn.frames[i] != drawn.frames[i + 1]).any() for i in range(NUM_FRAMES - 1))


@pytest.mark.parametrize("act", [act for act in ACTS if act != "grows"])
def test_no_subject_leaves_the_frame(act):
    for who in subjects(held_out=True)[::200]:
        sizes = draw_scene(Scene((who,), (act,), "city", seed=1)).masks[0].sum((1, 2))
        assert sizes.min() > 0.95 * sizes.max(), who


def test_captions_do_not_say_who_it_is():
    words = {word.strip(",.").lower() for caption, _ in all_captions() for word in caption.split()}
    one = subjects(held_out=False)[0]
    names = {*COLOURS, "circle", "square", "triangle", "star", "heart", one.pattern, one.accessory, one.face}
    assert words.isdisjoint(names)


def test_captions_that_tell_other_things_differ():
    facts_of = {}
    for caption, facts in all_captions():
        assert facts_of.setdefault(caption, facts) == facts


def test_same_colours_are_others_of_both_colours():
    one = subjects(held_out=True)[0]
    assert {(other.body, other.second) for other in of_same_colours(one)} == {(one.body, one.second)}
    assert one not in of_same_colours(one)


def test_a_tilted_reference_is_another_picture_on_white():
    one = subjects(held_out=True)[0]
    upright, tilted = (np.asarray(draw_reference(one, tilt)) for tilt in (0, 25))
    assert (upright != tilted).any()
    assert (tilted[0] == 255).all() and (tilted[:, -1] == 255).all()


def test_every_record_is_usable(samples):
    assert [item for item in samples if isinstance(item, Fault)] == []
    assert [len(sample.references) for sample in samples] == [1, 2] * (CLIPS // 2)


def test_the_first_reference_is_the_left_subject(samples):
    for number, sample in enumerate(samples):
        scene = draw_clip(number, seed=0, held_out=False).scene
        assert [reference.label for reference in sample.references] == [subject.shape for subject in scene.subjects]


def test_most_references_can_come_from_another_clip(tmp_path):
    videos = tmp_path / "data/Videos/total_part1"
    videos.mkdir(parents=True)
    for number in range(60):
        (videos / f"sprite{number:06d}.mp4").touch()  # there already: only annotations are written
    dataset = write_dataset(tmp_path / "data", 60)
    references = [reference for sample in read_source(dataset) for reference in sample.references]
    assert sum(bool(reference.cross) for reference in references) > len(references) / 2


def test_captions_are_those_of_the_scene(samples):
    for number, sample in enumerate(samples):
        assert sample.prompts == captions(draw_clip(number, seed=0, held_out=False).scene)


def test_check_finds_no_fault(dataset, tmp_path, capsys):
    arguments = ["check", "--data", "opens2v", "--annotations", str(dataset.annotations[0])]
    arguments += ["--videos", str(dataset.videos), "--cross-pairs", str(dataset.cross_pairs[0])]
    arguments += ["--height", "64", "--width", "64", "--num-frames", "17", "--stride", "1.5625"]
    assert main([*arguments, "--preview", str(tmp_path / "preview")]) == 0
    told = capsys.readouterr().out
    assert f"usable samples: {CLIPS}" in told
    assert "lost" not in told and "remarks" not in told


def test_a_dataset_that_was_broken_off_goes_on_to_the_same(dataset, tmp_path):
    shutil.copytree(dataset.videos, tmp_path / "data/Videos")
    videos = sorted((tmp_path / "data/Videos").rglob("*.mp4"))
    videos[0].unlink()
    kept = videos[1].stat().st_mtime_ns
    again = write_dataset(tmp_path / "data", CLIPS)
    assert videos[0].is_file() and videos[1].stat().st_mtime_ns == kept
    assert json.loads(again.annotations[0].read_text()) == json.loads(dataset.annotations[0].read_text())
