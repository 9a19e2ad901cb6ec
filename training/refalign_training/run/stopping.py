"""What a run's processes do about signals: the trainer saves before it ends, its workers live until then."""

import logging
import os
import signal
import threading
from types import FrameType

from refalign_training.data.workers import end_with_parent


logger = logging.getLogger(__name__)


class Stopping:
    """A context in which SIGTERM and the first Ctrl-C only set `signal`: the step ends and is saved."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "Stopping":
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("Asked to stop: the step is finished and saved first.")


def outlive_signals(worker: int) -> None:
    """Terminals and clusters send a signal to all processes of a job. The trainer answers it, and needs its workers
    for the rest of its step: only the trainer's own SIGTERM, or its death, ends them."""
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    end_with_parent(worker)  # last: its thread must not take SIGTERM either


def _end_with(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
