"""`refalign refine --video`, and the masks of its frames."""

import json
import logging
import pkgutil

import av
import numpy as np
import pytest
import torch
from PIL import Image

from refalign import refine_masks
from refalign.cli import main
from refalign.pipeline_refine_by_align import on_white
from refalign.reference_images import bounding_box
from refalign.refine_masks import read_masks, suggest_masks
from refalign.refine_track import read_track
from refalign.refine_video import carried, flicker, key_frames, read_clip, refine_frames
from refalign.video import read_video, write_video
from tests.tiny_refine import mask_of, picture, reference, tiny_refine_pipeline


SIZE = (96, 80)
BOXES = [(30 + 2 * number, 20, 50 + 2 * number, 45) for number in range(4)]


@pytest.fixture(scope="module")
def pipe():
    return tiny_refine_pipeline(alignment_seeds=1, num_inference_steps=1, guidance_scale=1.0)


@pytest.fixture
def frames():
    return np.stack([np.asarray(picture(seed=number)) for number in range(4)])


@pytest.fixture
def masks():
    return np.stack([np.asarray(mask_of(box)) > 0 for box in BOXES])


# -- Frames --


def test_outside_the_masks_the_frames_stay(pipe, frames, masks):
    refined = refine_frames(pipe, frames, masks, reference()).frames
    changed = (refined != frames).any(axis=-1)
    assert not changed[~masks].any()
    assert all(changed[number].any() for number in range(4))


def test_frames_without_a_mask_stay(pipe, frames, masks):
    masks[1] = False
    refined = refine_frames(pipe, frames, masks, reference()).frames
    assert np.array_equal(refined[1], frames[1])
    assert (refined[3] != frames[3]).any()


def test_all_frames_take_one_region(pipe, frames, masks, monkeypatch):
    regions = []
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kw: regions.append(kw["region"]) or call(*args, **kw))
    refined = refine_frames(pipe, frames, masks, reference())
    assert len(regions) == 4
    assert all(region is refined.alignment for region in regions)


def test_the_region_of_a_clip_is_that_of_the_mean_of_its_maps(pipe, frames, masks):
    arguments = ([Image.fromarray(frame) for frame in frames], list(masks), reference())
    maps = pipe.attention_maps(*arguments, blocks=[9], generator=torch.Generator().manual_seed(0))[0, 0]
    mean = (maps / maps.sum(dim=(1, 2), keepdim=True)).mean(dim=0)
    together = pipe.align(*arguments, generator=torch.Generator().manual_seed(0), one_region=True)
    expected = pipe._alignment(pipe._sample(frames[0], masks[0], reference(), None), mean)
    assert together.box == expected.box
    np.testing.assert_allclose(together.map, expected.map, atol=1e-5)


def test_a_frame_begins_with_what_the_one_before_shows_in_the_mask(frames, masks):
    before, frame = Image.fromarray(frames[0]), Image.fromarray(frames[1])
    start = np.asarray(carried(before, masks[0], frame, masks[1]))
    assert np.array_equal(start[masks[1]], frames[0][masks[0]])
    assert np.array_equal(start[~masks[1]], frames[1][~masks[1]])


def test_the_sharpest_frame_of_each_stretch_is_aligned(frames, masks):
    frames[0::2] //= 4  # less contrast
    assert key_frames(frames, masks, count=2) == [1, 3]
    assert key_frames(frames[:1], masks[:1]) == [0]


def test_flicker_is_the_difference_of_neighbours_inside_the_masks():
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[1, :4] = 10
    masks = np.zeros((3, 8, 8), bool)
    masks[:, :4] = True
    assert flicker(frames, masks) == 10
    assert flicker(frames, ~masks) == 0
    assert flicker(frames, np.zeros_like(masks)) == 0


# -- Masks --


def test_masks_of_a_folder_a_video_and_a_picture_are_the_same(masks, tmp_path):
    white = masks[..., None].repeat(3, -1).astype(np.uint8) * 255
    (tmp_path / "masks").mkdir()
    for number, mask in enumerate(white):
        Image.fromarray(mask).save(tmp_path / f"masks/{number:04}.png")
    write_video(white, tmp_path / "masks.mp4")
    shape = (4, 80, 96, 3)
    assert np.array_equal(read_masks(str(tmp_path / "masks"), tmp_path, shape), masks)
    assert (read_masks(str(tmp_path / "masks.mp4"), tmp_path, shape) == masks).mean() > 0.99
    one = read_masks(str(tmp_path / "masks/0001.png"), tmp_path, shape)
    assert np.array_equal(one, masks[[1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "3.png").unlink(), "clip.mp4 has 4 frames, but .* 3 masks"),
        (lambda folder: mask_of(BOXES[0], (80, 80)).save(folder / "3.png"), "The mask 3.png is 80x80"),
        (lambda folder: mask_of((0, 0, *SIZE)).save(folder / "2.png"), "mask of frame 2 covers all"),
        (lambda folder: [mask_of((0, 0, 0, 0)).save(folder / f"{n}.png") for n in range(4)], "All masks of"),
    ],
)
def test_masks_that_do_not_fit_are_told(tmp_path, change, told):
    for number in range(4):
        mask_of(BOXES[0]).save(tmp_path / f"{number}.png")
    change(tmp_path)
    with pytest.raises(ValueError, match=told):
        read_masks(str(tmp_path), tmp_path / "clip.mp4", (4, 80, 96, 3))


def test_a_mask_moves_with_its_track(masks, tmp_path):
    Image.fromarray(masks[0]).save(tmp_path / "mask.png")
    track = tmp_path / "track.csv"
    track.write_text("left,top,right,bottom\n" + "\n".join(", ".join(map(str, box)) for box in BOXES) + "\n")
    found = read_masks(str(tmp_path / "mask.png"), tmp_path, (4, 80, 96, 3), track)
    assert np.array_equal(found, masks)
    track.with_suffix(".json").write_text(
        json.dumps([(0, 0, 40, 50), (0, 0, 80, 75), (8.5, 0, 48.5, 50), (0, 0, 20, 25)])
    )
    found = read_masks(str(tmp_path / "mask.png"), tmp_path, (4, 80, 96, 3), track.with_suffix(".json"))
    assert bounding_box(found[0]) == (30, 20, 50, 45)  # parts of the mask may lie outside its box
    assert bounding_box(found[1]) == (60, 30, 96, 68)
    assert bounding_box(found[2]) == (38, 20, 58, 45)
    assert bounding_box(found[3]) == (15, 10, 25, 22)


def test_names_in_capitals_and_quoted_cells_are_read(tmp_path):
    (tmp_path / "track.csv").write_text('Left, Top,Right,Bottom\n"0", "1", 9 ,"9.5"\n\n')
    assert read_track(tmp_path / "track.csv", 1, SIZE) == [(0, 1, 9, 9.5)]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("", "has 3 boxes, but the video 4 frames"),
        ("1,2,3", "Box 3 of .* is .'1', '2', '3'., but must be four finite numbers"),
        ("1,2,3,x", "must be four finite numbers"),
        ("1,2,nan,9", "must be four finite numbers"),
        ("1,2,inf,9", "must be four finite numbers"),
        ("1,2,1,9", "is empty: right must be more than left"),
        ("1,2,97,9", "leaves the frame of 96x80 pixels"),
        ("-1,2,9,9", "leaves the frame"),
        pytest.param("x" * 200_000, "is not a CSV file: field larger than field limit", id="long"),
        ("95,79,96,80", "Moved with box 3 of .* nothing of the mask is in the frame"),
    ],
)
def test_tracks_that_do_not_fit_are_told(tmp_path, last, told):
    mask_of((90, 4, 94, 8)).save(tmp_path / "mask.png")
    (tmp_path / "track.csv").write_text("0,0,48,40\n" * 3 + last)
    with pytest.raises(ValueError, match=told) as error:
        read_masks(str(tmp_path / "mask.png"), tmp_path, (4, 80, 96, 3), tmp_path / "track.csv")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "7",
        "[1, 2]",
        "[null, {}]",
        "[[1, 2, 3, 1e999], 0]",
        "[[true, 0, 4, 4], 0]",
        "[",
        '["1299", "0099"]',
        '[{"1": 0, "2": 0, "9": 0, "10": 0}, {"1": 0, "2": 0, "9": 0, "10": 0}]',
    ],
)
def test_a_json_file_of_something_else_is_told(tmp_path, content):
    (tmp_path / "track.json").write_text(content)
    with pytest.raises(ValueError, match=r"track\.json"):
        read_track(tmp_path / "track.json", 2, SIZE)
    with pytest.raises(ValueError, match=r"track\.csv does not exist"):
        read_track(tmp_path / "track.csv", 2, SIZE)


def test_a_track_goes_with_one_picture_alone(refine, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    (tmp_path / "track.csv").write_text("0,0,9,9\n" * 4)
    assert refine("--track", tmp_path / "track.csv", mask="masks") == 1
    assert "moves one mask, but" in capsys.readouterr().err
    assert refine("--track", tmp_path / "track.csv", mask="auto") == 1
    assert "it goes with --video and a picture" in capsys.readouterr().err


def scene(wrong: bool) -> np.ndarray:
    """Frames of the reference's subject, red, on grey; in some a part of it is green."""
    frames = np.full((5, 80, 96, 3), 128, np.uint8)
    frames[:, 16:64, 24:72] = (200, 40, 40)
    if wrong:
        frames[1:, 28:40, 40:52] = (40, 200, 40)
    return frames


class ColourPatches(torch.nn.Module):
    """An image encoder whose patches are their mean colours: what it finds alike is known."""

    def __init__(self, config):
        super().__init__()
        self.config, self.dtype, self.device = config, torch.float32, torch.device("cpu")

    def forward(self, pixel_values):
        patches = torch.nn.functional.avg_pool2d(pixel_values, self.config.patch_size).flatten(2).transpose(1, 2)
        others = torch.zeros(len(patches), 1 + self.config.num_register_tokens, 3)
        return type("Output", (), {"last_hidden_state": torch.cat([others, patches], dim=1)})


def test_what_looks_unlike_the_reference_is_suggested(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "image_encoder", ColourPatches(pipe.image_encoder.config))
    plain = Image.new("RGB", (64, 64), (200, 40, 40))
    masks = suggest_masks(pipe, scene(wrong=True), plain)
    assert not masks[0].any()
    for mask in masks[1:]:
        assert mask[30:38, 42:50].all()
        assert mask.sum() < 18 * 18
    with pytest.raises(ValueError, match="Nothing of the subject looks unlike"):
        suggest_masks(pipe, scene(wrong=False), plain)
    with pytest.raises(ValueError, match="has 2 frames, but masks are suggested from 3 on"):
        suggest_masks(pipe, scene(wrong=True)[:2], plain)


def test_what_is_wrong_for_a_moment_is_not_suggested(pipe):
    wrong = torch.zeros(6, 2, 2, dtype=torch.bool)
    wrong[0:2, 0, 0] = True
    wrong[2:5, 1, 1] = True
    lasting = refine_masks._lasting(wrong)
    assert not lasting[:, 0, 0].any()
    assert lasting[:, 1, 1].tolist() == [False, False, True, True, True, False]


# -- The command --


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refine") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def refine(folder, tmp_path, frames):
    """Runs `refalign refine --video` and returns its exit code."""
    write_video(frames, tmp_path / "clip.mp4", fps=8)
    mask_of(BOXES[0]).save(tmp_path / "mask.png")
    on_white(reference()).save(tmp_path / "reference.png")

    def run(*words, video="clip.mp4", mask="mask.png"):
        files = {"video": video, "mask": mask, "reference": "reference.png", "output": "out.mp4"}
        for option, file in files.items():
            words += (f"--{option}", file if file == "auto" else str(tmp_path / file))
        return main(["refine", *map(str, words), "--model", str(folder), "--device", "cpu"])

    return run


def test_a_video_is_refined_and_its_flicker_told(refine, tmp_path, capsys):
    (tmp_path / "track.csv").write_text("".join(f"{','.join(map(str, box))}\n" for box in BOXES))
    assert refine("--map", tmp_path / "map.png", "--track", tmp_path / "track.csv") == 0
    before, after = read_clip(tmp_path / "clip.mp4"), read_clip(tmp_path / "out.mp4")
    assert before[0].shape == after[0].shape
    assert before[1] == after[1] == 8
    assert Image.open(tmp_path / "map.png").height == 384
    assert "Flicker inside the mask" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["refalign.refine_video.carried", "refalign.video._to_uint8"])
def test_stopped_in_the_middle_it_leaves_no_half_file(refine, tmp_path, monkeypatch, capsys, place):
    """While frames are refined, and while they are written."""
    left = iter(range(3))
    original = pkgutil.resolve_name(place)

    def stop_at_the_third(*arguments):
        if next(left) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    (tmp_path / "out.mp4").write_bytes(b"of an earlier run")
    files = sorted(tmp_path.iterdir())
    monkeypatch.setattr(place, stop_at_the_third)
    assert refine("--overwrite") == 130
    assert "no unfinished file is left" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == files
    assert (tmp_path / "out.mp4").read_bytes() == b"of an earlier run"


def test_what_a_killed_run_has_left_is_removed_by_the_next(refine, tmp_path):
    (tmp_path / ".out.mp4.abcdefgh.partial").mkdir()
    (tmp_path / ".out.mp4.abcdefgh.partial/out.mp4").write_bytes(b"half")
    (tmp_path / ".out.mp4.lock").write_text("process 1 on elsewhere")
    assert refine("--overwrite") == 0
    assert not list(tmp_path.glob(".*"))


def test_auto_writes_masks_to_look_at_and_refines_nothing(refine, tmp_path, capsys, monkeypatch):
    suggestion = np.stack([np.asarray(mask_of(box)) > 0 for box in BOXES])
    monkeypatch.setattr(refine_masks, "suggest_masks", lambda *_: suggestion)
    assert refine(mask="auto") == 0
    assert not (tmp_path / "out.mp4").exists()
    assert (tmp_path / "out.mask.png").exists()
    assert "Nothing is refined yet" in capsys.readouterr().out
    found = read_masks(str(tmp_path / "out.mask.mp4"), tmp_path / "clip.mp4", read_video(tmp_path / "clip.mp4").shape)
    assert (found == suggestion).mean() > 0.99


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"video": "reference.txt"}, "reference.txt does not exist"),
        ({"video": "half.mp4"}, "half.mp4 cannot be read as a video"),
        ({"video": "sound.mp4"}, "sound.mp4 cannot be read as a video: it has no pictures"),
        ({"mask": "missing.mp4"}, "missing.mp4 does not exist"),
        ({"mask": "half.mp4"}, "half.mp4 cannot be read as a video"),
    ],
)
def test_a_video_that_is_none_is_told(refine, tmp_path, capsys, files, told):
    (tmp_path / "half.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:400])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    assert refine(**files) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("strength", [0, 1.5, "nan"])
def test_a_wrong_strength_is_told_before_a_model_is_loaded(refine, monkeypatch, capsys, strength):
    monkeypatch.setattr("refalign.refine.owned", None)
    assert refine("--strength", strength) == 1
    assert "but must be above 0 and at most 1" in capsys.readouterr().err


def test_grey_masks_of_one_picture_are_told_once(tmp_path, caplog):
    Image.new("L", SIZE, 100).save(tmp_path / "grey.png")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="are empty"):
        read_masks(str(tmp_path / "grey.png"), tmp_path / "clip.mp4", (4, 80, 96, 3))
    assert caplog.text.count("grey values") == 1
