"""Which samples a step takes, and all that is random about them.

The order of an epoch depends on the seed and the epoch; noise, timestep and dropout of a sample on the seed, the step
and the sample's place in the step's batch. None of it depends on workers, on the number of processes or on what ran
before, so a run that goes on takes what it would have taken.
"""

import dataclasses
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from refalign_training.data.pixels import draw_conditions
from refalign_training.data.randomness import numpy_generator, seed_of
from refalign_training.method.losses import sample_timesteps
from refalign_training.method.objective import Batch
from refalign_training.method.options import ObjectiveOptions


logger = logging.getLogger(__name__)

MAX_SUBSTITUTES = 20


class SampleReader(Protocol):
    """Samples by row. What [`read`] gives is made tensors of by [`encode`], in the process that trains."""

    buckets: np.ndarray
    """int32 `(samples, 4)`: frames, height, width and references. Only samples of one bucket are batched."""
    name: str
    """Of the dataset, for cards and logs."""
    fingerprint: str
    """Another one, another dataset."""

    def id(self, row: int) -> str: ...

    def read(self, row: int, seed: int, epoch: int) -> Any:
        """Raises ValueError or OSError if the sample cannot be used."""
        ...

    def encode(self, read: Any) -> dict[str, torch.Tensor]:
        """`latents`, `reference_latents`, `prompt_embeds` `(tokens, dim)`, `subjects`, perhaps `teacher_features`."""
        ...

    def empty_prompt_embeds(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class MicroBatch:
    """The samples that a process takes at once."""

    step: int
    number: int
    """Among all of the step, of all processes."""
    epoch: int
    rows: tuple[int, ...]


class Order:
    """
    Every micro-batch of a run, by number, without end.

    An epoch shows each sample once, those of a bucket in micro-batches of their own; the last of a bucket is filled up
    with the bucket's first ones.

    Args:
        buckets (`np.ndarray` of shape `(samples, 4)`): of all samples.
        rows (`np.ndarray`): the samples to train on.
        batch_size (`int`): samples a step, of all processes.
        micro_batch_size (`int`): samples a micro-batch; divides `batch_size`.
        seed (`int`): the run's.
    """

    def __init__(
        self, buckets: np.ndarray, rows: np.ndarray, batch_size: int, micro_batch_size: int, seed: int
    ) -> None:
        assert len(rows) and batch_size % micro_batch_size == 0
        _, bucket_of_row = np.unique(buckets[rows], axis=0, return_inverse=True)
        self._members = [rows[bucket_of_row == number] for number in range(bucket_of_row.max() + 1)]
        self._bucket_of = np.zeros(len(buckets), np.int32)
        self._bucket_of[rows] = bucket_of_row
        self.micro_batch_size, self.seed = micro_batch_size, seed
        self.micro_batches = batch_size // micro_batch_size  # a step
        self.epoch_length = sum(math.ceil(len(members) / micro_batch_size) for members in self._members)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty((0, micro_batch_size), np.int64))

    def __call__(self, step: int, number: int) -> MicroBatch:
        """The micro-batch of that number of a step."""
        epoch, place = divmod(step * self.micro_batches + number, self.epoch_length)
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._shuffled(epoch))
        return MicroBatch(step, number, epoch, tuple(self._epoch[1][place].tolist()))

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = numpy_generator("order", self.seed, epoch)
        parts = []
        for members in self._members:
            length = math.ceil(len(members) / self.micro_batch_size) * self.micro_batch_size
            parts.append(np.resize(generator.permutation(members), length).reshape(-1, self.micro_batch_size))
        return generator.permutation(np.concatenate(parts))

    def another(self, micro_batch: MicroBatch, attempt: int) -> MicroBatch:
        """A micro-batch of any bucket, for when nothing of that one's can be read."""
        generator = numpy_generator("another", self.seed, micro_batch.step, micro_batch.number, attempt)
        members = self._members[generator.integers(len(self._members))]
        return dataclasses.replace(
            micro_batch, rows=tuple(np.resize(generator.permutation(members), self.micro_batch_size).tolist())
        )

    def substitutes(self, row: int, step: int, place: int) -> list[int]:
        """Other samples of the same bucket, each once, for when that one cannot be read."""
        members = self._members[self._bucket_of[row]]
        others = members[members != row]
        generator = numpy_generator("substitute", self.seed, step, place)
        return generator.choice(others, min(MAX_SUBSTITUTES, len(others)), replace=False).tolist()


class _Turns(Sampler):
    """The micro-batches of one process: of each step, every `world_size`-th."""

    def __init__(self, order: Order, rank: int, world_size: int, first_step: int, steps: int) -> None:
        self.order, self.rank, self.world_size = order, rank, world_size
        self.first_step, self.steps = first_step, steps

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in range(self.first_step, self.steps):
            for number in range(self.rank, self.order.micro_batches, self.world_size):
                yield self.order(step, number)


# The micro-batch as it was read, what was read, and the samples that could not be, with the reason
Read = tuple[MicroBatch, list[Any], list[tuple[str, str]]]


class _Reading(Dataset):
    """Reads micro-batches, in worker processes if there are some."""

    def __init__(self, samples: SampleReader, order: Order) -> None:
        self.samples, self.order = samples, order

    def __getitem__(self, micro_batch: MicroBatch) -> Read:
        unusable: list[tuple[str, str]] = []
        for attempt in range(1 + MAX_SUBSTITUTES):
            chosen = self.order.another(micro_batch, attempt) if attempt else micro_batch
            places = enumerate(chosen.rows, chosen.number * len(chosen.rows))
            read = [self._read(row, chosen, place, unusable) for place, row in places]
            if None not in read:
                rows, values = zip(*read, strict=True)
                return dataclasses.replace(chosen, rows=rows), list(values), unusable
        raise ValueError(
            f"None of {len(unusable)} samples could be read; the last one, {unusable[-1][0]}: {unusable[-1][1]}"
        )

    def _read(
        self, row: int, micro_batch: MicroBatch, place: int, unusable: list[tuple[str, str]]
    ) -> tuple[int, Any] | None:
        """A sample that can be read: of that row, else of its bucket, and which; None if none can."""
        candidates = [row]
        for tried, candidate in enumerate(candidates):
            try:
                return candidate, self.samples.read(candidate, self.order.seed, micro_batch.epoch)
            except (ValueError, OSError) as error:
                unusable.append((self.samples.id(candidate), str(error)))
            if tried == 0:
                candidates += self.order.substitutes(row, micro_batch.step, place)
        return None


class _Encoding(Dataset):
    """What [`_Reading`] gives as a [`Batch`]. Runs in the workers too, if nothing has to be encoded."""

    def __init__(self, reading: _Reading, options: ObjectiveOptions) -> None:
        self.reading, self.options = reading, options

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        return self.finish(self.reading[micro_batch])

    def finish(self, read: Read) -> Batch:
        micro_batch, values, unusable = read
        samples, order = self.reading.samples, self.reading.order
        values = [samples.encode(value) for value in values]
        ids = [samples.id(row) for row in micro_batch.rows]
        batch = make_batch(micro_batch, ids, values, samples.empty_prompt_embeds(), order, self.options)
        batch.unusable = unusable
        return batch


def make_batch(
    micro_batch: MicroBatch,
    ids: Sequence[str],
    values: Sequence[dict[str, torch.Tensor]],
    empty_prompt_embeds: torch.Tensor,
    order: Order,
    options: ObjectiveOptions,
) -> Batch:
    """The samples of a micro-batch with their noise, timesteps and dropout (RefAlign, arXiv 2603.25743, section 4)."""
    step, seed = micro_batch.step, order.seed
    places = [micro_batch.number * len(ids) + i for i in range(len(ids))]
    noise, embeds, references, keeps = [], [], [], []
    rates = {name: getattr(options, name) for name in ("no_text", "no_references", "neither")}
    for place, sample_id, value in zip(places, ids, values, strict=True):
        generator = torch.Generator().manual_seed(seed_of("noise", seed, step, place, sample_id))
        noise.append(torch.randn(value["latents"].shape, generator=generator))
        keeps_text, keeps_references = draw_conditions(seed, step, f"{place} {sample_id}", **rates)
        embeds.append(value["prompt_embeds"] if keeps_text else empty_prompt_embeds)
        latents = value["reference_latents"]
        references.append(latents if keeps_references else torch.zeros_like(latents))
        keeps.append(keeps_references)
    timesteps, weights = sample_timesteps(
        options.timesteps, draw_quantiles(seed, step, order.micro_batches * order.micro_batch_size)[places]
    )
    features = [value["teacher_features"] for value in values if "teacher_features" in value]
    return Batch(
        ids=list(ids),
        seed=seed_of("dropout", seed, step, micro_batch.number),
        latents=torch.stack([value["latents"] for value in values]),
        noise=torch.stack(noise),
        reference_latents=torch.stack(references),
        prompt_embeds=pad_prompt_embeds(embeds, options.max_sequence_length),
        timesteps=timesteps,
        weights=weights,
        keeps_references=torch.tensor(keeps),
        subjects=torch.stack([value["subjects"] for value in values]),
        teacher_features=torch.stack(features) if features else None,
    )


def draw_quantiles(seed: int, step: int, batch_size: int) -> torch.Tensor:
    """
    The quantiles of a step's timesteps, one a sample, stratified: each lies in another one of `batch_size` equal
    parts of [0, 1). float64 `(batch_size,)`.
    """
    generator = numpy_generator("timesteps", seed, step)
    quantiles = (generator.permutation(batch_size) + generator.random(batch_size)) / batch_size
    return torch.from_numpy(np.minimum(quantiles, np.nextafter(1.0, 0.0)))


def pad_prompt_embeds(embeds: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Embeddings `(tokens, dim)` cut and padded with zeros to `(batch, length, dim)`, as the pipeline's are."""
    padded = embeds[0].new_zeros(len(embeds), length, embeds[0].shape[-1])
    for row, embed in zip(padded, embeds, strict=True):
        row[: len(embed)] = embed[:length]
    return padded


def load_batches(
    samples: SampleReader,
    order: Order,
    options: ObjectiveOptions,
    *,
    rank: int,
    world_size: int,
    first_step: int,
    steps: int,
    workers: int,
    encodes: bool,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """
    The batches of one process from a step on, in their order: `batch_size / (micro_batch_size * world_size)` a step.

    Args:
        encodes (`bool`): whether encoders run in this process; else everything is done in the workers.
    """
    encoding = _Encoding(_Reading(samples, order), options)
    loader = DataLoader(
        _Told(encoding.reading if encodes else encoding),
        batch_size=None,
        sampler=_Turns(order, rank, world_size, first_step, steps),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory and not encodes,
        worker_init_fn=_outlive_signals,
    )
    read = _told(iter(loader))
    return map(encoding.finish, read) if encodes else read


class _Told(Dataset):
    """Gives a ValueError instead of raising it: torch would wrap a worker's in a traceback."""

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __getitem__(self, micro_batch: MicroBatch) -> Any:
        try:
            return self.inner[micro_batch]
        except ValueError as error:
            return error


def _told(values: Iterator[Any]) -> Iterator[Any]:
    try:
        for value in values:
            if isinstance(value, ValueError):
                raise value
            yield value
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"A process that reads has died, of memory perhaps ({error}). Lower data.workers.") from error


def _as_it_is(value: Any) -> Any:
    return value


def _outlive_signals(worker: int) -> None:
    """
    Terminals and clusters send a signal to all processes of a job. The trainer answers it, and needs its workers for
    the rest of its step: only its own SIGTERM ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def hold_out(num_samples: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """
    The rows to train on and those to validate on: always the same ones of a dataset, and at most a tenth of it.
    """
    rows = numpy_generator("held out").permutation(num_samples)
    wanted = min(wanted, num_samples // 10)
    return np.sort(rows[wanted:]), np.sort(rows[:wanted])


def read_first(samples: SampleReader, order: Order) -> dict[str, torch.Tensor]:
    """The tensors of a run's first sample, for what has to be known of them beforehand."""
    _, values, _ = _Reading(samples, order)[order(0, 0)]
    return samples.encode(values[0])
