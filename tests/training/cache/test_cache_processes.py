"""Processes that fill a cache together, and such that are killed. They are forked, so that they start at once."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from refalign_training.cache import run, writer
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.holders import WRITERS, writing
from refalign_training.cache.reader import Cache
from refalign_training.data.workers import free_videos
from tests.training.small_cache import assert_same_items, cache_command, change, stamps, write_clip, write_clips


FORK = multiprocessing.get_context("fork")
ITEMS = 3 * 5 + 1  # of the undisturbed cache, with the empty prompt


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, wan_folder) -> CacheCommand:
    """The command of a cache of five clips, run without disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = cache_command(write_clips(folder / "clips", 5), folder / "cache", wan_folder)
    assert run(command) == 0
    assert len(stamps(command.output)) == ITEMS
    return command


def _run(command: CacheCommand, rank: int, processes: int, last_file: int | None) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    for bar in (tqdm, writer.tqdm):  # else forked processes share one lock, and a killed one never gives it back
        bar.set_lock(threading.RLock())
    if last_file is not None:
        _die_at(last_file)
    os._exit(run(command))


def _die_at(number: int) -> None:
    """Lets this process kill itself at the file of that number: an even one is still unnamed, an odd one is done."""
    replace, names = Path.replace, []

    def count(path: Path, target: Path) -> None:
        names.append(target)
        is_last = len(names) == number
        if is_last and number % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(path, target)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = count


def start(command: CacheCommand, rank: int = 0, processes: int = 1, last_file: int | None = None) -> BaseProcess:
    free_videos()
    process = FORK.Process(target=_run, args=(command, rank, processes, last_file))
    process.start()
    return process


def assert_equals(command: CacheCommand, undisturbed: CacheCommand) -> None:
    """And nothing is left of processes that were killed."""
    assert [path.name for path in command.output.rglob(".*")] == [".lock"]
    assert run(dataclasses.replace(command, verify=True)) == 0
    assert_same_items(command.output, undisturbed.output)


# -- Several ----------------------------------------------------------------------------------------------------------


def test_a_process_takes_every_so_many_th_sample(undisturbed, tmp_path, monkeypatch, capsys):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(command) == 0
    first = stamps(command.output)
    assert len(first) == 3 * 2
    assert "others, or the same command again, do the rest" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not a finished one"):
        Cache(command.output)
    monkeypatch.setenv("RANK", "0")
    assert run(command) == 0
    both = stamps(command.output)
    assert len(both) == ITEMS and both.items() > first.items()
    assert_equals(command, undisturbed)


def test_two_processes_at_once(undisturbed, tmp_path):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache")
    processes = [start(command, rank, 2) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(stamps(command.output)) == ITEMS
    assert_equals(command, undisturbed)


def test_two_commands_with_other_settings_at_once(undisturbed, tmp_path):
    commands = [
        change(undisturbed, output=tmp_path / "cache", families=("video",), num_frames=frames) for frames in (1, 5)
    ]
    processes = [start(command) for command in commands]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(stamps(tmp_path / "cache")) == 2 * 5
    before = stamps(tmp_path / "cache")
    for command in commands:
        assert run(command) == 0
        assert Cache(command.output).samples[0].bucket[0] == command.recipe.num_frames
    assert stamps(tmp_path / "cache") == before


def test_a_killed_process_does_not_stop_the_others_and_its_part_is_done_by_the_next_run(undisturbed, tmp_path):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache")
    killed, other = start(command, 0, 2, last_file=7), start(command, 1, 2)
    killed.join()
    other.join()
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
    kept = stamps(command.output)
    assert 6 < len(kept) < ITEMS
    assert run(command) == 0
    assert stamps(command.output).items() > kept.items()
    assert_equals(command, undisturbed)


# -- What is left -----------------------------------------------------------------------------------------------------


@pytest.fixture
def left(undisturbed, tmp_path) -> tuple[CacheCommand, Path]:
    """A command that was killed, and the folder of a file that it had not finished."""
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache")
    killed = start(command, last_file=6)
    killed.join()
    (partial,) = command.output.rglob(".*.partial")
    assert killed.exitcode == -signal.SIGKILL and list(partial.iterdir())
    return command, partial


def test_what_a_killed_process_left_stays_while_another_writes(left, undisturbed):
    command, partial = left
    with writing(command.output):
        assert run(command) == 0
        assert list(partial.iterdir())
        with pytest.raises(ValueError, match=rf"is written by process {os.getpid()} on .*Prune it when"):
            run(dataclasses.replace(command, prune=True))
    assert run(command) == 0
    assert_equals(command, undisturbed)


def test_what_a_killed_process_left_stays_while_one_on_another_machine_may_write(left, undisturbed):
    command, partial = left
    (command.output / WRITERS / "process 1 on elsewhere, 12ab.lock").touch()
    assert run(command) == 0
    assert list(partial.iterdir())
    assert run(dataclasses.replace(command, prune=True)) == 0
    assert_equals(command, undisturbed)


# -- Killed -----------------------------------------------------------------------------------------------------------


def kill_at(command: CacheCommand, undisturbed: CacheCommand, numbers: tuple[int, ...]) -> None:
    """Kills one process after the other, each at the file of that number; what is finished must stay."""
    kept: dict[str, tuple[int, int]] = {}
    for number in numbers:
        process = start(command, last_file=number)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = stamps(command.output)
        assert now.items() >= kept.items()
        kept = now
    assert run(command) == 0
    now = stamps(command.output)
    assert now.items() >= kept.items() and len(now) == ITEMS
    assert_equals(command, undisturbed)
    assert run(dataclasses.replace(command, prune=True)) == 0
    assert stamps(command.output) == now
    assert [path.name for path in command.output.rglob(".*")] == [".lock"]


def test_kill_9_loses_no_finished_item(undisturbed, tmp_path):
    kill_at(dataclasses.replace(undisturbed, output=tmp_path / "cache"), undisturbed, (1, 6, 9, 8))


def test_kill_9_at_the_end_leaves_the_index_whole(undisturbed, tmp_path):
    """The recipes, the options and the plan are five files; behind the items come the index and the failures."""
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache")
    kill_at(command, undisturbed, (5 + ITEMS, 6, 7))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 5 + ITEMS + 3))
def test_kill_9_at_any_file(undisturbed, tmp_path, number):
    kill_at(dataclasses.replace(undisturbed, output=tmp_path / "cache"), undisturbed, (number,))


@pytest.mark.slow
def test_kill_9_of_real_processes_with_a_worker(undisturbed, tmp_path):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache")
    words = [
        "--data",
        "folder",
        "--videos",
        command.source.videos,
        "--model",
        command.model,
        "--output",
        command.output,
    ]
    words += ["--families", "video", "references", "text", "--dtype", "float32", "--device", "cpu", "--workers", 1]
    words += ["--height", command.recipe.height, "--width", command.recipe.width]
    words += ["--num-frames", command.recipe.num_frames]
    line = [sys.executable, "-m", "refalign_training.cli", "cache", *map(str, words)]
    kept: dict[str, tuple[int, int]] = {}
    for number in range(4):
        log = tmp_path / f"{number}.log"
        with log.open("w") as file:
            process = subprocess.Popen(line, stdout=file, stderr=file)
        while number < 3 and process.poll() is None and len(stamps(command.output)) < 4 * (number + 1):
            time.sleep(0.005)
        if number < 3:
            process.kill()
        # On a busy machine it may come to its end before it is killed
        assert process.wait(60) in (0, -signal.SIGKILL), log.read_text()
        now = stamps(command.output)
        assert {path: now.get(path) for path in kept} == kept
        kept = now
    assert_equals(command, undisturbed)


@pytest.mark.slow
def test_kills_of_one_of_two_and_a_dataset_that_grows(undisturbed, tmp_path, wan_folder):
    clips = write_clips(tmp_path / "clips", 6)
    command = cache_command(clips, tmp_path / "cache", wan_folder)
    for number in range(6):
        write_clip(clips, f"a{number}", seed=100 + number)
        processes = [start(command, rank, 2, last_file=6 if rank == number % 2 else None) for rank in range(2)]
        for process in processes:
            process.join()
        assert run(command) == 0
        assert len(Cache(command.output).samples) == 7 + number
    assert run(dataclasses.replace(command, verify=True)) == 0
    assert len(stamps(command.output)) == 3 * 12 + 1
