"""From the rows of a micro-batch to a batch: reading, in worker processes if there are some, and encoding."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from refalign_training.data.workers import free_videos
from refalign_training.method.losses import sample_timesteps
from refalign_training.method.objective import Batch
from refalign_training.method.options import ObjectiveOptions
from refalign_training.run.order import (
    MAX_SUBSTITUTES,
    MicroBatch,
    Order,
    draw_dropout,
    draw_noise,
    draw_quantiles,
    network_seed,
)
from refalign_training.run.stopping import outlive_signals


class RowReader(Protocol):
    """Samples by row."""

    buckets: np.ndarray
    """int32 `(samples, 4)`: frames, height, width and references; perhaps more columns with the references' sizes.
    Only samples of one bucket are batched."""
    name: str
    """The dataset's name, for cards and logs."""
    fingerprint: str
    """Another fingerprint is another dataset."""

    def id(self, row: int) -> str: ...

    def read(self, row: int, seed: int, epoch: int) -> Any:
        """Raises ValueError or OSError if the sample cannot be used."""


class SampleReader(RowReader, Protocol):
    """Samples of videos. [`encode`] makes tensors of what [`read`] gives, in the process that trains."""

    def encode(self, read: Any) -> dict[str, torch.Tensor]:
        """`latents`, `reference_latents`, `prompt_embeds` `(tokens, dim)`, `subjects`, perhaps `teacher_features`."""
        ...

    def empty_prompt_embeds(self) -> torch.Tensor: ...


class Read(NamedTuple):
    """A micro-batch as it was read, and the samples that could not be read, with the reasons."""

    micro_batch: MicroBatch
    values: list[Any]
    unusable: list[tuple[str, str]]


def read_micro_batch(samples: RowReader, order: Order, micro_batch: MicroBatch) -> Read:
    """Reads a micro-batch, with other samples for those that cannot be read. Raises ValueError if none can be."""
    unusable: list[tuple[str, str]] = []
    for attempt in range(1 + MAX_SUBSTITUTES):
        chosen = order.another(micro_batch, attempt) if attempt else micro_batch
        read = [_read_or_replace(samples, order, chosen, place, unusable) for place in chosen.places]
        if None not in read:
            rows, values = zip(*read, strict=True)
            return Read(dataclasses.replace(chosen, rows=rows), list(values), unusable)
    sample_id, reason = unusable[-1]
    raise ValueError(f"None of {len(unusable)} samples could be read; the last one, {sample_id}: {reason}")


def _read_or_replace(
    samples: RowReader, order: Order, micro_batch: MicroBatch, place: int, unusable: list[tuple[str, str]]
) -> tuple[int, Any] | None:
    """The row and what was read for a place of the batch, if need be of another sample; None if none can be read."""
    for row in order.candidates(micro_batch, place):
        try:
            return row, samples.read(row, order.seed, micro_batch.epoch)
        except (ValueError, OSError) as error:
            unusable.append((samples.id(row), str(error)))
    return None


def read_first(samples: SampleReader, order: Order) -> dict[str, torch.Tensor]:
    """The tensors of a run's first sample, for what must be known of them beforehand."""
    return samples.encode(read_micro_batch(samples, order, order(0, 0)).values[0])


def make_batch(
    micro_batch: MicroBatch,
    ids: Sequence[str],
    values: Sequence[dict[str, torch.Tensor]],
    empty_prompt_embeds: torch.Tensor,
    order: Order,
    options: ObjectiveOptions,
) -> Batch:
    """The samples of a micro-batch with their noise, timesteps and dropout (RefAlign, arXiv 2603.25743, section 4)."""

    def stacked(name: str) -> Any:
        tensors = [value[name] for value in values]
        return tensors if isinstance(tensors[0], list) else torch.stack(tensors)

    options = options.filled()
    step, seed = micro_batch.step, order.seed
    noise, embeds, keeps = [], [], []
    for place, sample_id, value in zip(micro_batch.places, ids, values, strict=True):
        noise.append(draw_noise(seed, step, place, sample_id, value["latents"].shape))
        keeps_text, keeps_references = draw_dropout(seed, step, place, sample_id, options)
        embeds.append(value["prompt_embeds"] if keeps_text else empty_prompt_embeds)
        keeps.append(keeps_references)
    references = stacked("reference_latents")
    if isinstance(references, torch.Tensor):  # a list's are dropped by the objective: they get no tokens
        references = references.where(torch.tensor(keeps)[:, None, None, None, None], 0)
    quantiles = draw_quantiles(seed, step, order.batch_size)[list(micro_batch.places)]
    timesteps, weights = sample_timesteps(options.timesteps, quantiles)
    return Batch(
        ids=list(ids),
        seed=network_seed(seed, micro_batch),
        latents=stacked("latents"),
        noise=torch.stack(noise),
        reference_latents=references,
        prompt_embeds=pad_prompt_embeds(embeds, options.max_sequence_length),
        timesteps=timesteps,
        weights=weights,
        keeps_references=torch.tensor(keeps),
        subjects=stacked("subjects"),
        teacher_features=stacked("teacher_features") if "teacher_features" in values[0] else None,
    )


def pad_prompt_embeds(embeds: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Embeddings `(tokens, dim)` cut and padded with zeros to `(batch, length, dim)`, as the pipeline's are."""
    padded = embeds[0].new_zeros(len(embeds), length, embeds[0].shape[-1])
    for row, embed in zip(padded, embeds, strict=True):
        row[: len(embed)] = embed[:length]
    return padded


def load_batches(
    samples: Any,
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
    make: Callable[[Read], Any] | None = None,
) -> Iterator[Any]:
    """The batches of one process from a step on, in their order: `batch_size / (micro_batch_size * world_size)` per
    step. With `encodes`, encoders run in this process; otherwise the workers do everything. `make` is what makes a
    batch of what was read, if it is not [`make_batch`]."""
    micro_batches = _MicroBatches(samples, order, options, encodes)
    loader = DataLoader(
        micro_batches,
        batch_size=None,
        sampler=order.turns(rank, world_size, first_step, steps),
        num_workers=workers,
        pin_memory=pin_memory and not encodes,
        worker_init_fn=outlive_signals,
    )
    if workers:
        free_videos()
    loaded = _told(iter(loader))
    return map(make or micro_batches.make, loaded) if encodes else loaded


@dataclass
class _MicroBatches(Dataset):
    """Micro-batches as they are read or, unless they are encoded later, as batches."""

    samples: SampleReader
    order: Order
    options: ObjectiveOptions
    encodes_later: bool

    def __getitem__(self, micro_batch: MicroBatch) -> Read | Batch | ValueError:
        """An error is returned instead of raised: torch would wrap a worker's in a traceback."""
        try:
            read = read_micro_batch(self.samples, self.order, micro_batch)
            return read if self.encodes_later else self.make(read)
        except ValueError as error:
            return error

    def make(self, read: Read) -> Batch:
        values = [self.samples.encode(value) for value in read.values]
        ids = [self.samples.id(row) for row in read.micro_batch.rows]
        empty = self.samples.empty_prompt_embeds()
        batch = make_batch(read.micro_batch, ids, values, empty, self.order, self.options)
        batch.unusable = read.unusable
        return batch


def _told(loaded: Iterator[Any]) -> Iterator[Any]:
    """Raises the errors that workers returned, and explains the death of one."""
    try:
        for value in loaded:
            if isinstance(value, ValueError):
                raise value
            yield value
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"A process that reads has died, of memory perhaps ({error}). Lower data.workers.") from error
