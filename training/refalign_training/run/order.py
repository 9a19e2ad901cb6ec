"""Which samples a step takes, and all that is random about them.

The order of an epoch depends on the seed and the epoch. Noise, timestep and dropout of a sample depend on the seed,
the step and the sample's place in the step's batch. None of it depends on workers, on the number of processes or on
what ran before, so a resumed run takes what it would have taken.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from refalign_training.data.pixels import draw_conditions
from refalign_training.data.randomness import numpy_generator, seed_of
from refalign_training.method.options import ObjectiveOptions


MAX_SUBSTITUTES = 20


@dataclass(frozen=True)
class MicroBatch:
    """The samples that a process takes at once."""

    step: int
    number: int
    """Its number among all micro-batches of the step, of all processes."""
    epoch: int
    rows: tuple[int, ...]

    @property
    def places(self) -> range:
        """The places of its samples in the step's batch."""
        first = self.number * len(self.rows)
        return range(first, first + len(self.rows))


class Order:
    """Every micro-batch of a run, by number, without end.

    An epoch shows each sample once. A micro-batch is of one bucket; a bucket's last one is filled up with the bucket's
    first samples. `buckets` `(samples, 4)` are those of all samples, `rows` the samples to train on, and `batch_size`,
    a multiple of `micro_batch_size`, counts the samples that all processes take per step.
    """

    def __init__(
        self, buckets: np.ndarray, rows: np.ndarray, batch_size: int, micro_batch_size: int, seed: int
    ) -> None:
        assert len(rows) and batch_size % micro_batch_size == 0
        _, bucket_of_row = np.unique(buckets[rows], axis=0, return_inverse=True)
        self._members = [rows[bucket_of_row == number] for number in range(bucket_of_row.max() + 1)]
        self._bucket_of = np.zeros(len(buckets), np.int32)
        self._bucket_of[rows] = bucket_of_row
        self.batch_size, self.micro_batch_size, self.seed = batch_size, micro_batch_size, seed
        self.micro_batches = batch_size // micro_batch_size  # per step
        self.epoch_length = sum(math.ceil(len(members) / micro_batch_size) for members in self._members)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty((0, micro_batch_size), np.int64))

    def __call__(self, step: int, number: int) -> MicroBatch:
        """The micro-batch of that number of a step."""
        epoch, place = divmod(step * self.micro_batches + number, self.epoch_length)
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._shuffled(epoch))
        return MicroBatch(step, number, epoch, tuple(self._epoch[1][place].tolist()))

    def turns(self, rank: int, world_size: int, first_step: int, steps: int) -> Iterator[MicroBatch]:
        """The micro-batches of one process: every `world_size`-th of each step."""
        for step in range(first_step, steps):
            for number in range(rank, self.micro_batches, world_size):
                yield self(step, number)

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = numpy_generator("order", self.seed, epoch)
        parts = []
        for members in self._members:
            length = math.ceil(len(members) / self.micro_batch_size) * self.micro_batch_size
            filled = np.resize(generator.permutation(members), length)
            parts.append(filled.reshape(-1, self.micro_batch_size))
        return generator.permutation(np.concatenate(parts))

    def another(self, micro_batch: MicroBatch, attempt: int) -> MicroBatch:
        """A micro-batch of any bucket, for when no sample of that one's bucket can be read."""
        generator = numpy_generator("another", self.seed, micro_batch.step, micro_batch.number, attempt)
        members = self._members[generator.integers(len(self._members))]
        rows = np.resize(generator.permutation(members), self.micro_batch_size)
        return dataclasses.replace(micro_batch, rows=tuple(rows.tolist()))

    def candidates(self, micro_batch: MicroBatch, place: int) -> Iterator[int]:
        """The row at a place of the step's batch, then others that may take its place."""
        row = micro_batch.rows[place - micro_batch.places.start]
        yield row
        yield from self.substitutes(row, micro_batch.step, place)

    def substitutes(self, row: int, step: int, place: int) -> list[int]:
        """Other samples of the same bucket, each once, for when that one cannot be read."""
        members = self._members[self._bucket_of[row]]
        others = members[members != row]
        generator = numpy_generator("substitute", self.seed, step, place)
        return generator.choice(others, min(MAX_SUBSTITUTES, len(others)), replace=False).tolist()


def hold_out(num_samples: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and the rows to validate on: a dataset's are always the same, at most a tenth of it."""
    rows = numpy_generator("held out").permutation(num_samples)
    wanted = min(wanted, num_samples // 10)
    return np.sort(rows[wanted:]), np.sort(rows[:wanted])


def nothing_held_out(num_samples: int) -> str:
    """What to tell of a dataset that is too small to hold a sample out."""
    return (
        f"Nothing is held out: of {num_samples} samples, a tenth is none. No loss or video of samples that the run "
        "has not seen tells when to stop; name other clips' cache as validation.cache, or prompts with references of "
        "your own as validation.prompts."
    )


def draw_quantiles(seed: int, step: int, batch_size: int) -> torch.Tensor:
    """The quantiles of a step's timesteps, float64 `(batch_size,)`: one in each of so many equal parts of [0, 1)."""
    generator = numpy_generator("timesteps", seed, step)
    quantiles = (generator.permutation(batch_size) + generator.random(batch_size)) / batch_size
    return torch.from_numpy(np.minimum(quantiles, np.nextafter(1.0, 0.0)))


def draw_noise(seed: int, step: int, place: int, sample_id: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise for a sample, float32."""
    generator = torch.Generator().manual_seed(seed_of("noise", seed, step, place, sample_id))
    return torch.randn(shape, generator=generator)


def draw_dropout(seed: int, step: int, place: int, sample_id: str, options: ObjectiveOptions) -> tuple[bool, bool]:
    """Whether a sample keeps its text, and whether it keeps its references."""
    shares: Any = options.filled()  # none of them is None
    return draw_conditions(
        seed,
        step,
        f"{place} {sample_id}",
        no_text=shares.no_text,
        no_references=shares.no_references,
        neither=shares.neither,
    )


def network_seed(seed: int, micro_batch: MicroBatch) -> int:
    """The seed of dropout inside the networks."""
    return seed_of("dropout", seed, micro_batch.step, micro_batch.number)
