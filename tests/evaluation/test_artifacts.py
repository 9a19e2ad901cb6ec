"""`refalign-eval artifacts`: overlaps, baselines, the search of step and block, and the command on a tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refalign.pipeline_refine_by_align import cross_attention_blocks, cut_mask, reference_square, subject_mask
from refalign_evaluation import alignment, artifacts
from refalign_evaluation.alignment import (
    best_constant,
    best_matching,
    box_iou,
    mask_iou,
    overlaps,
    overlaps_of_maps,
)
from refalign_evaluation.bootstrap import mean_interval
from refalign_evaluation.cli import main
from refalign_evaluation.triplets import Task, read_benchmark
from refalign_training.sprites.artifacts import write_benchmark
from tests.evaluation.tiny_metrics import write_clip
from tests.tiny_refine import tiny_refine_pipeline


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts") / "triplets"
    write_benchmark(folder, 4)
    return folder


@pytest.fixture(scope="module")
def tasks(benchmark):
    return read_benchmark(benchmark)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "refine"
    tiny_refine_pipeline().save_pretrained(folder)
    return folder


# -- Overlaps ---------------------------------------------------------------------------------------------------------


def test_overlap_is_intersection_over_union():
    first, second = np.zeros((2, 4, 4), bool)
    first[:2], second[1:3] = True, True
    assert mask_iou(first, second) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_the_true_region_overlaps_wholly(tasks):
    values = overlaps(tasks, [task.region for task in tasks])
    assert values.mask.tolist() == values.box.tolist() == [1.0] * 4


def test_a_map_of_the_true_region_finds_it(tasks):
    maps = []
    for task in tasks:
        square = reference_square(subject_mask(task.reference))
        maps.append(torch.nn.functional.adaptive_avg_pool2d(cut_mask(task.region, square, 64), 16)[0])
    assert overlaps_of_maps(tasks, maps, 64, 0.4).mask.min() > 0.5
    assert overlaps(tasks[:1], [np.zeros_like(tasks[0].region)]).mask[0] == 0
    assert overlaps_of_maps(tasks, [map.flip(0) for map in maps], 64, 0.4).mask.mean() < 0.4


def test_the_best_constant_guess_is_right_where_all_regions_are_the_same():
    region = np.zeros((64, 64), bool)
    region[16:32, 8:40] = True
    reference = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    task = Task("same", Image.new("RGB", (64, 64)), region, reference, region)
    values = best_constant([task, task])
    assert values.mask.min() > 0.85  # the square has a margin, in which its pixels are not the reference's
    assert values.box.min() > 0.7  # the corners of boxes are four pixels apart


def test_matching_finds_the_patches_that_are_the_same(monkeypatch):
    def colours(_, images):
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float()
        return torch.nn.functional.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)

    monkeypatch.setattr(alignment, "encode", colours)
    image = Image.new("RGB", (64, 64), (10, 90, 10))
    image.paste((250, 10, 10), (40, 8, 56, 24))
    region = np.zeros((64, 64), bool)
    region[8:24, 40:56] = True
    reference, elsewhere = image.convert("RGBA"), np.roll(region, 30, axis=0)
    values = best_matching(tiny_refine_pipeline(), [Task("same", image, region, reference, region)])
    assert values.mask[0] > 0.6 and values.box[0] > 0.6
    assert best_matching(tiny_refine_pipeline(), [Task("other", image, region, reference, elsewhere)]).mask[0] < 0.1


def test_the_interval_of_a_mean_holds_it():
    found = mean_interval(np.array([0.0, 1.0, 1.0, 0.0]))
    assert found["value"] == 0.5
    assert found["low"] < 0.5 < found["high"]
    assert found["samples"] == 4


# -- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures(benchmark, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    words = ["artifacts", "--benchmark", benchmark, "--model", model, "--steps", "2", "--device", "cpu"]
    words += ["--json", folder / "figures.json", "--sheet", folder / "sheet.png"]
    words += ["--similarity", write_clip(folder / "clip", dim=32)]
    assert main(list(map(str, words))) == 0
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.height == 4 * 392
    return json.loads((folder / "figures.json").read_text())


def test_nothing_changes_outside_the_masks(figures):
    assert figures["outside"] == 0


def test_the_error_of_the_input_is_what_is_wrong_in_it(figures, tasks):
    errors = []
    for task in tasks:
        difference = np.abs(np.asarray(task.image).astype(int) - np.asarray(task.truth))
        errors.append(difference[task.mask].mean() / 255)
    assert figures["error"]["input"]["value"] == pytest.approx(np.mean(errors))


def test_all_arms_and_guesses_have_figures_with_intervals(figures):
    assert list(figures["error"]) == list(figures["similarity"]) == ["input", "whole", "predicted", "true"]
    assert list(figures["alignment"]) == ["model", "best_constant", "best_matching"]
    for value in (*figures["error"].values(), *figures["less_error"].values()):
        assert value["low"] <= value["value"] <= value["high"]


def test_the_search_finds_the_block_and_stores_it_if_asked(benchmark, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(artifacts, "GRID_STEPS", (0.2, 0.8))
    shutil.copytree(model, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    before = index.read_text()
    words = ["artifacts", "--benchmark", str(benchmark), "--model", str(tmp_path / "model"), "--grid", "--limit", "2"]
    words += ["--device", "cpu", "--plot", str(tmp_path / "grid.png"), "--json", str(tmp_path / "grid.json")]
    assert main(words) == 0
    assert index.read_text() == before
    assert main([*words, "--choose"]) == 0
    told = capsys.readouterr().out
    stored = json.loads(index.read_text())
    assert f"The best is block {stored['alignment_block']} at step {stored['alignment_step']:g}" in told
    found = json.loads((tmp_path / "grid.json").read_text())["by_threshold_and_blur"]
    assert found[f"{stored['map_threshold']:g} {stored['map_blur']:g}"] == max(found.values())
    with Image.open(tmp_path / "grid.png") as plot:
        assert plot.width == 900


def test_the_best_of_a_grid_is_the_largest(monkeypatch, tasks):
    monkeypatch.setattr(artifacts, "GRID_STEPS", (0.2, 0.8))
    pipe = tiny_refine_pipeline(map_blur=2.0)
    blocks = len(cross_attention_blocks(pipe.unet))
    maps = torch.rand(2, blocks, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("refalign_evaluation.alignment.search_grid", lambda *_: maps)
    found = artifacts.search(artifacts.Artifacts(benchmark=Path("unused")), pipe, tasks[:2])
    values = np.array(found["mask"])
    step = found["steps"].index(found["best"]["alignment_step"])
    assert values[step, found["best"]["alignment_block"]] == values.max()
    levels = found["by_threshold_and_blur"]
    assert levels["0.4 2"] == values.max() != levels["0.4 0"]
    best = f"{found['best']['map_threshold']:g} {found['best']['map_blur']:g}"
    assert levels[best] == max(levels.values()) > min(levels.values())


def test_bad_triplets_are_told_and_left_out(benchmark, tmp_path, capsys):
    shutil.copytree(benchmark, tmp_path / "bench")
    (tmp_path / "bench/0000-pattern/mask.png").unlink()
    Image.new("L", (128, 128)).save(tmp_path / "bench/0001-face/reference_mask.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "bench/0002-accessory/mask.png")
    assert [task.name for task in read_benchmark(tmp_path / "bench")] == ["0003-colours"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "0000-pattern is left out: it has no mask.png."
    assert "reference_mask.png is empty" in told[1]
    assert "64x64" in told[2] or "(64, 64)" in told[2]


@pytest.mark.parametrize(
    "words, named",
    [
        (["--limit", "0"], "--limit is 0"),
        (["--choose"], "--choose is of the search by --grid"),
        (["--grid", "--choose"], "--choose writes into the model's folder"),
    ],
)
def test_options_that_do_not_fit_are_told(words, named, tmp_path, capsys):
    assert main(["artifacts", "--benchmark", str(tmp_path), *words]) == 1
    assert named in capsys.readouterr().err


def test_a_folder_without_triplets_is_told(tmp_path, capsys):
    assert main(["artifacts", "--benchmark", str(tmp_path / "none")]) == 1
    assert "draw some with --sprites 200" in capsys.readouterr().err
