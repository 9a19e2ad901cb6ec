"""The processes that torchrun or accelerate started for one command: what they share, and how they end together.

Nothing heavy is imported before there are many, so that `--help` answers at once.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

LONG = timedelta(days=30)  # a process may wait for the others' videos; one that ended is noticed at once


@dataclass(frozen=True)
class Processes:
    """Those that run one command together; by default, a single one."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes, and speaks for all."""
        return self.rank == 0

    def agree(self, error: Exception | None) -> Exception | None:
        """The same for all: an error if any process has one, its own before others'."""
        from refalign.command_line import one_line

        told = self.gather(None if error is None else one_line(error))
        others = [text for text in told if text is not None]
        if error is not None or not others:
            return error
        return ValueError(others[0])

    @contextmanager
    def only_first_speaks(self) -> Iterator[None]:
        """Within it, the others print, log and show nothing."""
        if self.is_first:
            yield
            return
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
        finally:
            logging.disable(level)

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order, for all of them."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values


ALONE = Processes()


@contextmanager
def together(device: str) -> Iterator[Processes]:
    """
    Within it, the processes know each other, if there are many; they compute on the device that `--device` names. An
    error in one of them ends them all, and is told by that one alone.

    Raises:
        SystemExit: in the others.
        ValueError: if there are more processes on this machine than devices, or one of them was killed.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield Processes()
        return
    import torch.distributed as dist

    store, rank, count = next(dist.rendezvous("env://"))
    own = dist.PrefixStore("refalign", store)
    try:
        backend = _begin(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=LONG)
        yield Processes(rank, count)
    except Exception as error:
        if not _is_first_to_tell(own):
            raise SystemExit(1) from error
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise ValueError("Another process of this command was killed, so all of them end.") from error
        raise
    except KeyboardInterrupt:
        if rank != 0:
            raise SystemExit(130) from None
        raise
    dist.destroy_process_group()


def _begin(device: str) -> str:
    """Takes this process's device, and gives what processes on such devices talk by."""
    import torch
    import torch.distributed as dist

    from refalign.devices import find_device

    kind = torch.accelerator.current_accelerator() if device == "auto" else find_device(device.partition(":")[0])
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if kind is None or kind.type == "cpu":
        return "gloo"
    if here > there:
        raise ValueError(
            f"{here} processes on this machine need a device each, but it has {there}. Start {there} at most: "
            f"torchrun --nproc_per_node {there}."
        )
    torch.accelerator.set_device_index(find_device(device).index or 0)
    return f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind.type)}"


def _is_first_to_tell(store: "torch.distributed.Store") -> bool:
    try:
        return store.add("told", 1) == 1
    except Exception:  # the process that holds it has ended, which is told
        return False
