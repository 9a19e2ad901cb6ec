"""Processes that fill a cache together, and such that are killed. They are forked, so that they start at once."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from refalign_training.cache import fill, run
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.files import CacheFolder, Lock
from refalign_training.cache.reader import Cache
from tests.training.small_cache import all_items, cache_command, stamps, write_clip, write_clips


FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, wan_folder) -> CacheCommand:
    """The command of a cache of twelve clips in six units, run without disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = cache_command(write_clips(folder / "clips", 12), folder / "cache", wan_folder)
    assert run(command) == 0
    return command


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch):
    monkeypatch.setattr(fill, "POLL_SECONDS", 0.01)


def _run(command: CacheCommand, environment: dict[str, str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    for bar in (tqdm, fill.tqdm):  # else forked processes share one lock, and a killed one never gives it back
        bar.set_lock(threading.RLock())
    os._exit(run(command))


def start(command: CacheCommand, **environment: str) -> BaseProcess:
    process = FORK.Process(target=_run, args=(command, environment))
    process.start()
    return process


def kill(process: BaseProcess) -> bool:
    """Kills a process with SIGKILL; whether it was still at work."""
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def headers(command: CacheCommand) -> list[dict]:
    files = (command.output / "records").rglob("*.jsonl")
    return [json.loads(file.read_text("utf-8").split("\n")[0]) for file in sorted(files)]


def assert_equals(command: CacheCommand, undisturbed: CacheCommand) -> None:
    assert run(dataclasses.replace(command, verify=True)) == 0
    ours, theirs = Cache(command.output), Cache(undisturbed.output)
    assert ours.fingerprint == theirs.fingerprint
    for one, other in zip(ours.samples, theirs.samples, strict=True):
        a, b = ours.read(one), theirs.read(other)
        assert torch.equal(a["latents"], b["latents"])
        assert torch.equal(a["reference_latents"], b["reference_latents"])
        torch.testing.assert_close(a["prompt_embeds"], b["prompt_embeds"], atol=1e-5, rtol=1e-5)  # other batches


@pytest.mark.parametrize("ranks", [None, ("0", "1")])
def test_two_processes_compute_every_unit_once(undisturbed, tmp_path, ranks):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache")
    environments = [{}, {}] if ranks is None else [{"RANK": rank, "WORLD_SIZE": "2"} for rank in ranks]
    processes = [start(command, **environment) for environment in environments]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sum(header["computed"] for header in headers(command)) == 3 * 12
    assert_equals(command, undisturbed)


def test_a_process_takes_over_what_a_killed_one_has_left(undisturbed, tmp_path):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache", families=("video",))
    record = CacheFolder(command.output).record("video", "000000")
    killed = start(command)
    while not record.is_file():
        time.sleep(0.001)
    other = start(command)
    time.sleep(0.02)
    kill(killed)
    other.join()
    assert other.exitcode == 0
    assert len(Cache(command.output).samples) == 12


def _hold(lock: Path, held: EventType) -> None:
    with Lock.take(lock):
        held.set()
        time.sleep(60)


def test_a_process_waits_for_the_units_of_others(undisturbed, tmp_path):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache", families=("text",))
    held = FORK.Event()
    other = FORK.Process(target=_hold, args=(CacheFolder(command.output).lock("text", "000003.lock"), held))
    other.start()
    assert held.wait(10)
    process = start(command)
    process.join(1.0)
    assert process.is_alive()
    assert len(headers(command)) == 5  # of six
    kill(other)
    process.join()
    assert process.exitcode == 0
    assert len(headers(command)) == 6


def test_a_waiting_process_shows_no_bar(undisturbed, tmp_path, monkeypatch, capsys):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache", families=("video",))
    assert run(command) == 0
    record = CacheFolder(command.output).record("video", "000003")
    content = record.read_bytes()
    record.unlink()
    polls = []

    def poll(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 5:
            record.write_bytes(content)  # the other one is done

    monkeypatch.setattr(fill.time, "sleep", poll)
    capsys.readouterr()
    with Lock.take(CacheFolder(command.output).lock("video", "000003.lock")):
        assert run(command) == 0
    assert len(polls) == 5
    assert capsys.readouterr().err == ""


def test_a_process_that_starts_late_takes_the_plan_of_those_at_work(undisturbed, tmp_path, monkeypatch):
    from refalign_training.cache import settings

    command = dataclasses.replace(undisturbed, output=tmp_path / "cache", families=("text",))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one launch")
    assert run(command) == 0
    monkeypatch.setattr(settings, "read_source", None)
    assert run(command) == 0  # of the same launch
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Lock.take(CacheFolder(command.output).lock("cache.lock"), shared=True):
        assert run(command) == 0
    with pytest.raises(TypeError):
        run(command)  # alone, it reads the dataset


def test_other_settings_have_to_wait(undisturbed, tmp_path):
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache", families=("text",))
    assert run(command) == 0
    with Lock.take(CacheFolder(command.output).lock("cache.lock"), shared=True):  # as a process at work has it
        assert run(command) == 0
        for changes in ({"dtype": "bfloat16"}, {"limit": 3}, {"families": ("video",)}):
            with pytest.raises(ValueError, match="with other settings, families or data"):
                run(dataclasses.replace(command, **changes))
        for action in ("verify", "prune"):
            with pytest.raises(ValueError, match="Another process works"):
                run(dataclasses.replace(command, **{action: True}))
    assert run(dataclasses.replace(command, limit=3)) == 0


def test_processes_that_start_together_read_the_dataset_once(undisturbed, tmp_path, monkeypatch):
    from refalign_training.cache import settings

    read, reads = settings.read_source, []
    monkeypatch.setattr(settings, "read_source", lambda source: reads.append(source) or read(source))
    command = dataclasses.replace(undisturbed, output=tmp_path / "cache", families=("text",))
    now = time.time()
    monkeypatch.setattr(fill.time, "time", lambda: now)
    assert run(command) == 0
    now -= 1  # a process that started before the plan was made
    assert run(command) == 0
    assert len(reads) == 1
    now += 100
    assert run(command) == 0
    assert len(reads) == 2


def kill_often(command: CacheCommand, undisturbed: CacheCommand, kills: int, seed: int) -> None:
    """Kills processes at random moments; what is finished has to stay. Starts a new cache when one is done."""
    random_delay = random.Random(seed)
    caches, done = 0, 0
    while done < kills:
        caches += 1
        current = dataclasses.replace(command, output=command.output / str(caches))
        kept: dict[str, tuple[int, int]] = {}
        opened: Counter[str] = Counter()
        alive = True
        while alive and done < kills:
            process = start(current)
            time.sleep(random_delay.uniform(0.01, 0.35))
            alive = kill(process)
            done += alive
            now = finished(current)
            assert {path: now.get(path) for path in kept} == kept
            opened.update(set(now) - set(kept))
            kept = now
        assert run(current) == 0
        now = finished(current)
        assert {path: now.get(path) for path in kept} == kept
        assert all(count == 1 for count in opened.values())
        assert_equals(current, undisturbed)
        assert run(dataclasses.replace(current, prune=True)) == 0
        assert finished(current) == now
        assert not list(current.output.rglob(".*"))


def finished(command: CacheCommand) -> dict[str, tuple[int, int]]:
    """What must not be made again: records, and the items of a cache of files or the tars that records name."""
    if not command.shards:
        return stamps(command.output) | stamps(command.output, "records/**/*.jsonl")
    names = set()
    for file in (command.output / "records").rglob("*.jsonl"):
        if not file.parent.name.startswith("."):
            lines = map(json.loads, file.read_text("utf-8").splitlines()[1:])
            names |= {f"shards/{file.parent.name}/{item['shard']}" for line in lines for item in line["items"]}
    tars = stamps(command.output, "shards/**/*.tar")
    return {path: tars[path] for path in names} | stamps(command.output, "records/**/*.jsonl")


@pytest.mark.parametrize("shards", [False, True])
def test_kill_9_loses_no_finished_item(undisturbed, tmp_path, shards):
    kill_often(dataclasses.replace(undisturbed, output=tmp_path, shards=shards), undisturbed, kills=4, seed=0)


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
    words += ["--height", command.recipe.height, "--width", command.recipe.width, "--unit-size", 2]
    words += ["--num-frames", command.recipe.num_frames]
    line = [sys.executable, "-m", "refalign_training.cli", "cache", *map(str, words)]
    kept: dict[str, tuple[int, int]] = {}
    for number in range(4):
        log = tmp_path / f"{number}.log"
        with log.open("w") as file:
            process = subprocess.Popen(line, stdout=file, stderr=file)
        while number < 3 and process.poll() is None and len(headers(command)) < 4 * (number + 1):
            time.sleep(0.005)
        if number < 3:
            process.kill()
        # On a busy machine it may come to its end before it is killed
        assert process.wait(60) in (0, -signal.SIGKILL), log.read_text()
        now = finished(command)
        assert {path: now.get(path) for path in kept} == kept
        kept = now
    assert_equals(command, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
def test_fifty_kills_lose_no_finished_item(undisturbed, tmp_path, shards):
    kill_often(dataclasses.replace(undisturbed, output=tmp_path, shards=shards), undisturbed, kills=50, seed=1)


@pytest.mark.slow
def test_kills_of_one_of_two_and_a_dataset_that_grows(undisturbed, tmp_path, wan_folder):
    random_delay = random.Random(2)
    clips = write_clips(tmp_path / "clips", 6)
    command = cache_command(clips, tmp_path / "cache", wan_folder)
    for number in range(6):
        write_clip(clips, f"a{number}", seed=100 + number)
        processes = [start(command), start(command)]
        time.sleep(random_delay.uniform(0.05, 0.5))
        kill(processes[number % 2])
        processes[1 - number % 2].join()
        assert processes[1 - number % 2].exitcode == 0
        assert len(Cache(command.output).samples) == 7 + number
    assert run(dataclasses.replace(command, verify=True)) == 0
    assert len(all_items(command.output)) == 3 * 12
