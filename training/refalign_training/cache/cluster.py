"""
`refalign-train cache --ray`: many machines fill a cache together, by Ray Data.

Tasks read and decode; a pool of actors, one for each GPU, encodes and writes each block of samples as a shard of the
family. Retries, lost machines, growing clusters and progress are Ray's. All machines must see the same files by the
same names, and have this package installed.
"""

import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

from refalign_training.cache import encoders
from refalign_training.cache.command import CacheCommand
from refalign_training.cache.holders import writing
from refalign_training.cache.items import Items, Outcome
from refalign_training.cache.plan import Plan
from refalign_training.data.decoding import Task, try_decode
from refalign_training.data.recipe import Recipe


ROUND = 100_000  # tasks that this process holds at a time
BLOCK = 64  # tasks, whose items become a shard: fewer, if their pixels are more than
BLOCK_BYTES = 512 * 2**20
READER_CPUS = 0.5
# Without GPUs. One encoder a CPU leaves room for readers: encoders that took all CPUs would wait for ever for what
# nobody reads. It differs from a reader's, since Ray would make one step of two that need the same
ENCODER_CPUS = 0.4


def compute(family: str, command: CacheCommand, model: encoders.Model, items: Items, plan: Plan) -> None:
    """
    Computes what a family lacks on the cluster.

    Raises:
        ValueError: if Ray is not installed, there is no such cluster, or it is too small.
    """
    missing = (task for task in plan.tasks(family) if items.lacks(task.key, command.retry_failed))
    while tasks := list(itertools.islice(missing, ROUND)):
        ray, pool = _connect(command.ray or "auto")
        for task in tasks:
            if items.find(task.key):  # it is made again, by --retry-failed
                items.remove(items.place(task.key))
        ray.data.DataContext.get_current().target_max_block_size = BLOCK_BYTES
        rows = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=-(-len(tasks) // BLOCK))
        decoded = rows.map(_decode, fn_args=(family, command.recipe), num_cpus=READER_CPUS)
        arguments = (family, command, model, type(items)(items.folder))  # without what this one has read
        done = decoded.map_batches(_Encoder, fn_constructor_args=arguments, batch_size=None, **pool)
        for _ in done.iter_batches(batch_size=None):
            pass


def _connect(address: str) -> tuple[Any, dict[str, Any]]:
    """Ray, connected, and the pool of encoders that the cluster bears, as `map_batches` takes it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        import ray  # pyright: ignore[reportMissingImports]  (an extra)
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f'--ray needs Ray ({error}). Install it: pip install "ray[data]".') from None
    try:
        where = None if address == "auto" else address
        ray.init(where, ignore_reinit_error=True, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"There is no Ray cluster at {address!r} for us: {error}. Start one, ray start --head; for one that asks "
            "for a token, as Ray's do from 2.60 on, set RAY_AUTH_MODE=token and copy its ~/.ray/auth_token."
        ) from None
    has = ray.cluster_resources()
    cpus, gpus = has.get("CPU", 0), int(has.get("GPU", 0))
    if cpus < 1:
        raise ValueError(f"The Ray cluster at {address} has {cpus:g} CPUs. It needs one at least, to read videos.")
    share = {"num_gpus": 1} if gpus else {"num_cpus": ENCODER_CPUS}
    return ray, {"compute": ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or int(cpus)), **share}


def _decode(row: dict[str, Task], family: str, recipe: Recipe) -> dict[str, Any]:
    return row | {"decoded": try_decode(family, row["task"], recipe)}


class _Encoder:
    """Encodes blocks and writes each as a shard: the same one, if Ray has it made again."""

    def __init__(self, family: str, command: CacheCommand, model: encoders.Model, items: Items) -> None:
        self.family, self.items = family, items
        self.encoder = encoders.make_encoder(family, command, model)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        with writing(self.items.folder.parent):
            self.items.write_shard(self._encode(zip(block["task"], block["decoded"], strict=True)))
        return {"done": [len(block["task"])]}

    def _encode(self, rows: Iterator[tuple[Task, Any]]) -> Iterator[tuple[Task, Outcome]]:
        while batch := list(itertools.islice(rows, encoders.BATCH_SIZES[self.family])):
            yield from encoders.encode(self.family, self.encoder, batch)
