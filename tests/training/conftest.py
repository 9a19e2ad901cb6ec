"""A tiny world to train in, made once."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from refalign.convert import convert
from refalign_training.cache import run
from refalign_training.run import estimate, trainer
from tests.drawn_references import draw_pet
from tests.training.small_cache import cache_command, write_clips, write_teacher
from tests.training.small_run import World


# torch logs each tensor that it saves, where nobody listens but pytest
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture(scope="session", autouse=True)
def no_picture() -> Iterator[None]:
    """The picture of the timesteps takes longer than a run, and only test_plots.py is about it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_timesteps", lambda *_: None)
        yield


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


@pytest.fixture(scope="session")
def bernini_world(tmp_path_factory, training_world, native_file) -> World:
    """The same with a Bernini-R base, and references of two sizes: six samples of two, six of one."""
    folder = tmp_path_factory.mktemp("bernini")
    base = convert(native_file, training_world.wan, folder / "base", family="bernini")
    world = World(base, training_world.teacher, write_clips(folder / "clips", 12), folder / "cache")
    for number in (1, 2, 5, 6):
        draw_pet(0.3).resize((40, 64)).save(world.clips / f"clip{number:02d}.ref1.png")
    assert run(cache_command(world.clips, world.cache, world.wan, world.teacher)) == 0
    return world


@pytest.fixture
def counted_once(monkeypatch) -> None:
    """The same transformer is not counted again for each dry run."""

    def count(command, config, shape, blocks):
        options = (command.training, command.lora, command.objective.max_sequence_length)
        counted = sorted({**config, "num_layers": blocks}.items())
        key = repr((options, counted, vars(shape) | {"blocks": blocks}))
        if key not in COUNTED:
            COUNTED[key] = count_blocks(command, config, shape, blocks)
        return COUNTED[key]

    count_blocks = estimate._count_blocks
    monkeypatch.setattr(estimate, "_count_blocks", count)


COUNTED: dict[str, object] = {}
