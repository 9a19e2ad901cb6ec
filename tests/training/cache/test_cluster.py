"""Shards, and a cache that a Ray cluster on this machine fills."""

import dataclasses
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from refalign_training.cache import run, writer
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.items import Items
from refalign_training.data.decoding import Task
from refalign_training.data.sample import Clip, Sample, Unusable
from tests.training.small_cache import assert_same_items, cache_command, change, failures, stamps, write_clips


KEYS = tuple(character * 32 for character in "abcd")


def outcome(number: int) -> tuple[Task, Any]:
    sample = Sample(f"sample {number}", ("a cat",), Clip(Path("clip.mp4")), (), "", number)
    if number == 2:
        return Task(KEYS[number], 0, sample), Unusable("video", "cut off")
    tensors = {"latents": torch.full((3, number + 1), float(number)), "more": torch.ones(100 * number + 1)}
    return Task(KEYS[number], 0, sample), (tensors, {"frames": number})


# -- Shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def items(tmp_path) -> Items:
    Items(tmp_path / "video-0").write_shard(map(outcome, range(4)))
    return Items(tmp_path / "video-0")


def test_a_shards_items_are_found_and_read(items):
    for number in (0, 1, 3):
        place, info = items.find(KEYS[number])
        assert info == {"frames": number}
        expected = outcome(number)[1][0]
        tensors = items.read(place)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert len(items.sizes()) == 3


def test_what_fails_in_a_shard_is_told(items):
    assert items.find(KEYS[2]) is None
    assert items.find_failure(KEYS[2])["detail"] == "cut off"
    assert not items.lacks(KEYS[2], retry=False) and items.lacks(KEYS[2], retry=True)


def test_a_shard_that_is_written_again_is_the_same_file(items):
    places = [items.find(key) for key in KEYS]
    items.write_shard(map(outcome, range(4)))
    assert [Items(items.folder).find(key) for key in KEYS] == places
    assert len(list(items.folder.glob("shards/*"))) == 2


def test_an_item_that_is_removed_from_a_shard_is_missing(items):
    place, _ = items.find(KEYS[1])
    items.remove(place)
    items = Items(items.folder)
    assert items.lacks(KEYS[1], retry=False) and not items.lacks(KEYS[0], retry=False)
    items.write(*outcome(1))
    assert items.path(items.find(KEYS[1])[0]).suffix == ".safetensors"


def test_a_shard_goes_when_none_of_its_items_is_needed(items):
    assert items.without({KEYS[0]}) == []
    assert {path.suffix for path in items.without({"e" * 32})} == {".tar", ".json"}


def test_a_shard_whose_writer_was_killed_before_its_index_is_made_again_or_goes(items):
    (index,) = items.folder.glob("shards/*.json")
    place = items.place(KEYS[0])
    index.unlink()
    items = Items(items.folder)
    assert items.lacks(KEYS[0], retry=False)
    assert items.without({KEYS[0]}) == [index.with_suffix(".tar")]
    items.remove(place)  # as --verify does: nothing is left to remove
    items.write_shard(map(outcome, range(4)))
    assert Items(items.folder).place(KEYS[0]) == place


@pytest.mark.parametrize(("start", "size"), [(2**63, 8), (0, 2**62), (2**40, 8)])
def test_a_place_that_no_file_has_is_told(items, start, size):
    place = items.place(KEYS[0])[:24] + start.to_bytes(8) + size.to_bytes(8)
    with pytest.raises(ValueError, match=r"\.tar cannot be read"):
        items.read(place)


def test_the_extra_is_named(made, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r'--ray needs Ray .*pip install "ray\[data\]"'):
        run(dataclasses.replace(made, output=tmp_path / "cache", ray="auto"))


# -- A cluster --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, wan_folder) -> CacheCommand:
    """The command of a cache of five clips, one of them broken, run in this process."""
    folder = tmp_path_factory.mktemp("made")
    clips = write_clips(folder / "clips", 5)
    (clips / "clip03.mp4").write_bytes(b"not a video")
    command = cache_command(clips, folder / "cache", wan_folder)
    assert run(command) == 0
    return command


class Killer(Items):
    """Kills the process that writes the first shard before that, and the next one behind it."""

    def write_shard(self, outcomes: Iterable[Any]) -> None:
        outcomes = list(outcomes)
        kills = self.folder / "kills"
        count = len(kills.read_text()) if kills.exists() else 0
        kills.write_text("x" * (count + 1))
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write_shard(outcomes)
        if count == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_cluster_makes_the_same_cache_though_its_workers_are_killed(made, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    monkeypatch.setattr("refalign_training.cache.cluster.BLOCK", 1)
    command = dataclasses.replace(made, output=tmp_path / "cache", ray="auto")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with monkeypatch.context() as patches:
            patches.setattr(writer, "Items", Killer)
            assert run(command) == 0
        assert {len(path.read_text()) > 2 for path in command.output.glob("*/kills")} == {True}
        shards = stamps(command.output, "*/shards/*.tar")
        assert len(shards) == 4 + 5 + 6  # a sample each, and the empty prompt: none twice
        assert run(command) == 0
        assert stamps(command.output, "*/shards/*.tar") == shards
    finally:
        ray.shutdown()
    assert len(failures(command.output)) == 1
    assert_same_items(command.output, made.output)
    assert run(change(command, verify=True)) == 0
    assert run(change(command, prune=True)) == 0
    assert stamps(command.output, "*/shards/*.tar") == shards
    assert run(dataclasses.replace(command, ray=None)) == 0  # a cache of shards goes on in one process
    assert not list(command.output.glob("*/??/*.safetensors"))
