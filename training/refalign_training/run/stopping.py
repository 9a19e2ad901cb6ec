"""How a run ends before its last step."""

import logging
import signal
from types import FrameType


logger = logging.getLogger(__name__)


class Stopping:
    """Within it, SIGTERM and the first Ctrl-C only leave their number in `signal`: the step ends and is saved."""

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
