"""What the trainer and its workers do about signals."""

import multiprocessing
import os
import select
import signal
import threading

import pytest

from refalign_training.method.options import ObjectiveOptions
from refalign_training.run.batches import load_batches
from refalign_training.run.stopping import Stopping
from tests.training.run.test_batches import SmallSamples, assert_same, load, small_order


def test_the_first_ctrl_c_is_noted_and_the_second_one_interrupts():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stopping() as stopping:
        assert stopping.signal == 0
        signal.raise_signal(signal.SIGINT)
        assert stopping.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_after_sigterm_another_one_is_noted_too_but_ctrl_c_interrupts():
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stopping.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError), Stopping():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def default_handlers():
    """Those of a process in the foreground: one in the background may ignore Ctrl-C."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_workers_outlive_a_signal_to_the_whole_job(number, default_handlers):
    others = set(multiprocessing.active_children())  # of whatever test was here before
    loaded = load_batches(
        samples := SmallSamples(),
        small_order(samples),
        ObjectiveOptions(),
        rank=0,
        world_size=1,
        first_step=0,
        steps=20,
        workers=1,
        encodes=False,
    )
    first = next(loaded)
    (worker,) = set(multiprocessing.active_children()) - others
    other = os.fork()
    if other == 0:  # not this process, which may end its workers
        os.kill(worker.pid, number)
        os._exit(0)
    os.waitpid(other, 0)
    assert_same([first, *loaded], load(samples, steps=20))


class NeverReady(SmallSamples):
    """Samples whose reading takes for ever, in processes that hold a file open."""

    def __init__(self, started: int) -> None:
        super().__init__()
        self.started = started

    def read(self, row: int, seed: int, epoch: int) -> None:
        os.write(self.started, b"started")
        threading.Event().wait()


def test_workers_end_with_a_trainer_that_is_killed():
    reading, writing = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        samples = NeverReady(writing)
        order, options = small_order(samples), ObjectiveOptions()
        sizes = {"rank": 0, "world_size": 1, "first_step": 0, "steps": 20}
        next(load_batches(samples, order, options, **sizes, workers=2, encodes=False))
    os.close(writing)
    os.read(reading, 7)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    left = b"started"
    while left:  # until no process has the file open
        assert select.select([reading], [], [], 30)[0], "A worker lives on."
        left = os.read(reading, 7)
