"""Programs of ours in processes of their own: forks of the tests' process, which spares the seconds of their imports.

What is about the start of a process itself, such as what it imports, takes a fresh one.
"""

import importlib
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from typing import IO, NamedTuple

import torch
from accelerate import PartialState
from diffusers.loaders import lora_base
from huggingface_hub import close_session, constants, hf_api
from tqdm import tqdm
from tqdm.auto import tqdm as tqdm_auto

from refalign_training.data.workers import free_videos


FORK = multiprocessing.get_context("fork")
PATIENCE = 300  # seconds


class Ended(NamedTuple):
    """What a process has left."""

    returncode: int | None
    stdout: str
    stderr: str


def call(work: Callable[[], int | None], environment: Mapping[str, str] = os.environ) -> Ended:
    """Does work that returns an exit code; that, and what was said."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start(work, output, errors, environment)
        process.join(PATIENCE)
        process.kill()
        process.join()
        output.seek(0)
        errors.seek(0)
        return Ended(process.exitcode, output.read(), errors.read())


# The beginning of a script that has not imported our packages, nor code of repos; and of one that cannot import the
# first of them
FORGET = """
import sys

for name in [name for name in sys.modules if name.startswith(("refalign", "diffusers_modules"))]:
    del sys.modules[name]
"""
WITHOUT_PACKAGE = (
    FORGET
    + """
sys.modules["refalign"] = None  # importing it fails
"""
)


def call_script(script: str, *words: str, environment: Mapping[str, str] = os.environ) -> Ended:
    """Runs a script with arguments."""
    return call(partial(_run_script, script, words), environment)


@contextmanager
def started(work: Callable[[], int | None]) -> Iterator[tuple[BaseProcess, IO[str]]]:
    """A process at work, and what it says, line by line as it says it. In the end it is killed."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as output:
        process = start(work, output, output)
    with os.fdopen(reading) as told:
        try:
            yield process, told
        finally:
            process.kill()
            process.join()


def start(
    work: Callable[[], int | None], output: IO[str], errors: IO[str], environment: Mapping[str, str] = os.environ
) -> BaseProcess:
    """A process at work, which says what it says into open files."""
    free_videos()
    work = partial(_live_in, environment, work)
    process = FORK.Process(target=_do, args=(work, output.fileno(), errors.fileno()))
    process.start()
    return process


def _do(work: Callable[[], int | None], output: int, errors: int) -> None:
    os.dup2(output, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    logging.getLogger().handlers.clear()  # pytest's
    be_a_program()
    sys.exit(work())


def _run_script(script: str, words: Sequence[str]) -> None:
    sys.argv = ["-c", *words]
    exec(script, {"__name__": "__main__"})


def _live_in(environment: Mapping[str, str], work: Callable[[], int | None]) -> int | None:
    """Works with other environment variables, which the Hub's client, diffusers and tempfile read again."""
    if environment is not os.environ:
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        importlib.reload(constants)
        close_session()
        hf_api.api.endpoint = constants.ENDPOINT
        lora_base.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    return work()


def be_a_program() -> None:
    """Leaves in a fork what its parent has, and a fresh process would not."""
    torch.set_num_threads(1)
    PartialState._reset_state()
    for bar in (tqdm, tqdm_auto):  # else forked processes share one lock, and a killed one never gives it back
        bar.set_lock(threading.RLock())
