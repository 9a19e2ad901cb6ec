"""`refalign-train sprites`: one owner of a folder, and either its stages or the ablation."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refalign_training.sprites.recipe import STAGES, SpritesCommand, make
from refalign_training.sprites.refine_recipe import REFINE_STAGES


def run(command: SpritesCommand) -> int:
    """
    Makes what is missing and returns the exit code.

    Raises:
        ValueError: if an option is wrong, or a stage fails.
    """
    if command.clips < 1 or command.processes < 1:
        raise ValueError(f"--clips is {command.clips} and --processes {command.processes}: pass 1 or more.")
    if command.only is not None:
        (STAGES | REFINE_STAGES)[command.only](command)
        return 0
    if command.refine and command.ablation:
        raise ValueError("--refine and --ablation make different models: pass one of them.")
    stages = REFINE_STAGES if command.refine else STAGES
    if command.until not in (None, *stages):
        raise ValueError(f"--until {command.until} is not one of the stages made here: {', '.join(stages)}.")
    with _owned(command.output):
        make(command, stages, "cache" if command.ablation else command.until)
        if command.ablation:
            from refalign_training.sprites import ablation

            return ablation.run(command)
    return 0


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """
    Within it, the folder is this command's alone.

    Raises:
        ValueError: if it is another one's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # Not filelock: children must inherit the open file, so that it is held as long as one of them lives
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another refalign-train sprites, or by processes that one which was killed has "
                "left. Wait for them, or end them."
            ) from None
        yield
