"""What a run measures on samples that it is not trained on. Nothing of it changes the run."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from refalign_training.data.fields import check_id
from refalign_training.data.randomness import seed_of
from refalign_training.method.losses import sample_timesteps
from refalign_training.method.objective import Batch, Objective
from refalign_training.method.options import ObjectiveOptions
from refalign_training.run.batches import SampleReader, pad_prompt_embeds
from refalign_training.run.config import ValidationOptions
from refalign_training.run.parallel import Parallel
from refalign_training.run.videos import References, Shown, batch_of_one, evaluating


logger = logging.getLogger(__name__)

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GAIN_QUANTILE = 6  # the place of 0.7: where layout and identity are decided


def _reversed(references: References) -> References:
    """References in reverse order; a single one as it is."""
    if isinstance(references, list):
        return references[::-1] if len(references) > 1 else references
    return references.flip(1) if references.shape[1] > 1 else references


class Validation:
    """Held-out samples, read once; those that cannot be read are left out."""

    def __init__(
        self,
        samples: SampleReader,
        rows: Sequence[int],
        options: ValidationOptions,
        objective_options: ObjectiveOptions,
        parallel: Parallel,
    ) -> None:
        self.options, self.objective_options, self.parallel = options, objective_options, parallel
        self.values: list[tuple[str, dict[str, Any]]] = []
        for row in rows:
            try:
                name = check_id(samples.id(row))  # of its videos, and a cache's index says what it likes
                self.values.append((name, samples.encode(samples.read(row, seed=0, epoch=0))))
            except (ValueError, OSError) as error:
                logger.warning("%s cannot be validated on: %s", samples.id(row), error)
        # One that a single process could not read is left out by all: they compute together
        common = set.intersection(*map(set, gather_object([list(dict(self.values))])))
        self.values = [pair for pair in self.values if pair[0] in common]
        self._empty_prompt_embeds = samples.empty_prompt_embeds()

    def losses(self, objective: Objective, step: int) -> dict[str, float]:
        """The unweighted loss at nine fixed quantiles of t, always with the same noise, and their mean; and of the
        alignment, while there is one, its loss and cosine."""
        sums = torch.zeros(len(QUANTILES) + 2, device=self.parallel.device)
        with torch.no_grad(), evaluating(objective):
            for place, counts in self._share(len(self.values) * len(QUANTILES)):
                number, quantile = divmod(place, len(QUANTILES))
                losses = objective(self._batch(number, quantile), step)
                if counts:
                    sums[quantile] += losses.mse[0]
                    sums[-2] += losses.alignment[0]
                    sums[-1] += 0.0 if losses.cosine is None else losses.cosine.mean()
        means = self.parallel.sum(sums) / len(self.values)
        mse, (alignment, cosine) = means[: len(QUANTILES)].tolist(), (means[-2:] / len(QUANTILES)).tolist()
        values = {"validation/mse": sum(mse) / len(mse)}
        for quantile, value in zip(QUANTILES, mse, strict=True):
            values[f"validation/mse_by_quantile/{quantile}"] = value
        if objective.alignment_weight(step):
            values |= {"validation/alignment": alignment, "validation/cosine": cosine}
        return values

    def gains(self, objective: Objective, step: int) -> dict[str, float]:
        """What the loss rises by, at a high t, if a sample gets another one's references (`reference_gain`), or its
        own in reverse order (`order_gain`): early signs that references are followed, and are told from each other.
        A distillation has none: its teacher follows the same references."""
        if self.objective_options.kind == "distil":
            return {}
        names = ("validation/reference_gain", "validation/order_gain")
        sums = torch.zeros(2, len(names), device=self.parallel.device)  # of the gains, and how many samples have them
        with torch.no_grad(), evaluating(objective):
            for number, counts in self._share(len(self.values)):
                own = self.values[number][1]["reference_latents"]
                exchanged = (self._references_of_another(number), _reversed(own))
                loss = objective(self._batch(number, GAIN_QUANTILE), step).mse[0]
                for index, other in enumerate(exchanged):
                    gain = objective(self._batch(number, GAIN_QUANTILE, other), step).mse[0] - loss
                    if counts and other is not own:
                        sums[0, index] += gain
                        sums[1, index] += 1
        totals = zip(names, *self.parallel.sum(sums).tolist(), strict=True)
        return {name: total / count for name, total, count in totals if count}

    def _share(self, count: int) -> Iterator[tuple[int, bool]]:
        """This process's part of so many items, and whether each counts. Sharded processes compute together, so all of
        them take equally many: some take one that does not count."""
        rank, world_size = self.parallel.rank, self.parallel.world_size
        for place in range(rank, math.ceil(count / world_size) * world_size, world_size):
            yield place % count, place < count

    def _references_of_another(self, number: int) -> References:
        """The references of the next sample with latents of the same shape, or of any with sizes of their own; its own
        if there is none."""
        own = self.values[number][1]["reference_latents"]
        for _, value in (*self.values[number + 1 :], *self.values[:number]):
            other = value["reference_latents"]
            if isinstance(other, list) or other.shape == own.shape:
                return other
        return own

    def _batch(self, number: int, quantile: int, other: References | None = None) -> Batch:
        """A sample at one of the quantiles of t, perhaps with other references, which are not aligned then."""
        sample_id, value = self.values[number]
        references = value["reference_latents"] if other is None else other
        features = value.get("teacher_features") if other is None else None
        generator = torch.Generator().manual_seed(seed_of("validation", sample_id, quantile))
        quantiles = torch.tensor([QUANTILES[quantile]], dtype=torch.float64)
        timesteps, weights = sample_timesteps(self.objective_options.timesteps, quantiles)
        return Batch(
            ids=[sample_id],
            seed=0,
            latents=value["latents"][None],
            noise=torch.randn(value["latents"].shape, generator=generator)[None],
            reference_latents=batch_of_one(references),
            prompt_embeds=pad_prompt_embeds([value["prompt_embeds"]], self.objective_options.max_sequence_length),
            timesteps=timesteps,
            weights=weights,
            keeps_references=torch.tensor([True]),
            subjects=value["subjects"][None],
            teacher_features=None if features is None else batch_of_one(features),
        ).to(self.parallel.device)

    def shown(self) -> list[Shown]:
        """The samples that videos are made of: the first ones."""
        shown = []
        for sample_id, value in self.values[: self.options.videos]:
            generator = torch.Generator().manual_seed(seed_of("video", sample_id))
            noise = torch.randn(value["latents"][None].shape, generator=generator)[0]
            embeds, references = value["prompt_embeds"], value["reference_latents"]
            shown.append(Shown(sample_id, embeds, self._empty_prompt_embeds, references, noise))
        return shown
