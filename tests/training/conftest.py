"""A tiny world to train in, made once."""

from pathlib import Path

import pytest

from refalign_training.cache import run
from tests.training.small_cache import cache_command, write_clips, write_teacher
from tests.training.small_run import World


@pytest.fixture(scope="session")
def training_world(tmp_path_factory, wan_folder) -> World:
    folder = tmp_path_factory.mktemp("training")
    world = World(wan_folder, write_teacher(folder / "teacher"), write_clips(folder / "clips", 8), folder / "cache")
    assert run(cache_command(world.clips, world.cache, world.wan, world.teacher)) == 0
    return world


@pytest.fixture(scope="session")
def larger_cache(tmp_path_factory, training_world) -> Path:
    """12 samples: enough to hold one out."""
    folder = tmp_path_factory.mktemp("larger")
    clips, cache = write_clips(folder / "clips", 12), folder / "cache"
    assert run(cache_command(clips, cache, training_world.wan, training_world.teacher)) == 0
    return cache
