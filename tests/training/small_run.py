"""The command of a tiny training run, the tiny world it trains in, and processes that do it."""

import dataclasses
import os
import random
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from refalign_training.data.workers import free_videos
from refalign_training.method.options import AlignmentOptions
from refalign_training.run import trainer
from refalign_training.run.checkpoint import find_checkpoint, has_checkpoint, read_tensors, stored_tensors
from refalign_training.run.config import (
    BatchOptions,
    CheckpointOptions,
    DataOptions,
    LogOptions,
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    RunCommand,
    ValidationOptions,
)
from tests.programs import FORK, be_a_program


ATTEMPTS = 10


@dataclass(frozen=True)
class World:
    """Folders of tiny models, and of what is trained on."""

    wan: Path
    teacher: Path
    clips: Path
    cache: Path
    """8 samples, each second one with two references, in float32."""


def run_command(folder: Path, wan_folder: Path, cache: Path, **changes: Any) -> RunCommand:
    """
    Ten steps of four samples on the CPU, two at once, as LoRA in float32; without workers, tracker and validation.

    Args:
        folder (`Path`): the run's.
        changes: options by their dotted names, as in `**{"optimizer.lr": 1e-4}`.
    """
    command = RunCommand(
        output=folder,
        steps=10,
        device="cpu",
        model=ModelOptions(base=str(wan_folder), precision="float32", gradient_checkpointing=False),
        lora=LoraOptions(rank=4, alpha=8.0),
        data=DataOptions(cache=cache, workers=0),
        batch=BatchOptions(size=4, micro=2),
        optimizer=OptimizerOptions(lr=1e-3),
        alignment=AlignmentOptions(layers=(0, 1)),
        checkpoints=CheckpointOptions(every=5),
        log=LogOptions(every=2, tracker="none", gradients_every=0),
        validation=ValidationOptions(every=0, videos=0, video_steps=2),
    )
    return changed(command, **changes)


def changed(options: Any, **changes: Any) -> Any:
    """The options with others in their place, by dotted names."""
    values: dict[str, Any] = {}
    for name, value in changes.items():
        section, _, rest = name.partition(".")
        if rest:  # those of a section at once: some are valid together only
            values.setdefault(section, {})[rest] = value
        else:
            values[section] = value
    for section, value in values.items():
        if dataclasses.is_dataclass(getattr(options, section)) and isinstance(value, dict):
            values[section] = changed(getattr(options, section), **value)
    return dataclasses.replace(options, **values)


# -- Processes that train, and such that are killed. They are forked, so that they start at once ----------------------


def start(command: RunCommand, processes: int = 1) -> list[BaseProcess]:
    """The processes of a run, at work."""
    environments: list[dict[str, str]] = [{}]
    if processes > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
        environments = [{**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    free_videos()
    started = [FORK.Process(target=_train, args=(command, environment)) for environment in environments]
    for process in started:
        process.start()
    return started


def train(command: RunCommand, processes: int = 1) -> Path:
    """Trains to the end in processes of its own; the run's folder."""
    codes = wait(start(command, processes))
    assert codes == [0] * processes, f"the processes ended with {codes}"
    return command.output


def wait(processes: list[BaseProcess]) -> list[int | None]:
    """The exit codes of processes that come to their end by themselves."""
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    kill(processes)
    return codes


def kill(processes: list[BaseProcess]) -> bool:
    """Kills processes with SIGKILL; whether all were still at work."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    return all(process.exitcode == -signal.SIGKILL for process in processes)


def train_with_kills(command: RunCommand, processes: int = 1, kills: int = 1, seed: int = 0) -> Path:
    """
    Trains to the end, but each of so many times kills all processes at a random moment after they have saved, and goes
    on from the latest checkpoint. A run that was faster than its killer does not count: it starts again.
    """
    delays, longest, done = random.Random(seed), 0.1, 0
    for _ in range(ATTEMPTS * kills):
        started = start(resumed(command), processes)
        wait_for_a_checkpoint(command.output, started)
        time.sleep(delays.uniform(0, longest))
        if kill(started):
            done += 1
        else:
            assert {process.exitcode for process in started} <= {0, -signal.SIGKILL}
            shutil.rmtree(command.output)
            longest, done = longest / 2, 0
        if done == kills:
            return train(resumed(command), processes)
    raise AssertionError(f"The run was always faster than {kills} kills.")


def stop(
    command: RunCommand, number: signal.Signals, processes: int = 1, rank: int = 0, to_group: bool = False
) -> list[int | None]:
    """
    Sends a signal to one process of a run, or to its workers too, at a random moment after the first checkpoint; the
    exit codes. A run that was faster than the signal does not count: it starts again.
    """
    delays, longest = random.Random(0), 0.1
    for _ in range(ATTEMPTS):
        started = start(command, processes)
        wait_for_a_checkpoint(command.output, started)
        time.sleep(delays.uniform(0, longest))
        (os.killpg if to_group else os.kill)(started[rank].pid, number)
        codes = wait(started)
        if set(codes) != {0}:
            break
        shutil.rmtree(command.output)
        longest /= 2
    return codes


def resumed(command: RunCommand) -> RunCommand:
    return changed(command, resume="latest" if has_checkpoint(command.output) else None)


def wait_for_a_checkpoint(output: Path, processes: list[BaseProcess]) -> None:
    """Until there is another latest checkpoint than now, or no process any more that would write it."""
    latest = output / "checkpoints" / "latest"

    def content() -> str:
        return latest.read_text("utf-8") if latest.exists() else ""

    before = content()
    while content() == before and all(process.is_alive() for process in processes):
        time.sleep(0.001)


def final_tensors(output: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's latest checkpoint."""
    return read_tensors(find_checkpoint(output), "")


def assert_equal_runs(one: Path, other: Path) -> None:
    """Both have come to the same step with the same tensors, bit for bit: weights, average, optimiser."""
    assert find_checkpoint(one).name == find_checkpoint(other).name
    ours, theirs = final_tensors(one), final_tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_holds_no_base(checkpoint: Path) -> None:
    """Only adapters, projectors and what belongs to them."""
    stored = stored_tensors(checkpoint)
    assert [name for name in stored if ".lora_" not in name and ".alignment." not in name] == []
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    files = list(checkpoint.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert sum(file.stat().st_size for file in files) == size + headers


def _train(command: RunCommand, environment: dict[str, str]) -> None:
    os.environ |= environment
    os.setpgid(0, 0)
    be_a_program()
    os._exit(trainer.run(command))


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
