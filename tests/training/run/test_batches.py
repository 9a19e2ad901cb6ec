"""What a batch is made of: the same, however the work is shared."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from refalign import RefAlignWanPipeline
from refalign_training.method.losses import sample_timesteps
from refalign_training.method.objective import Batch
from refalign_training.method.options import ObjectiveOptions
from refalign_training.run.batches import (
    load_batches,
    make_batch,
    pad_prompt_embeds,
    read_first,
    read_micro_batch,
)
from refalign_training.run.inputs import CachedSamples
from refalign_training.run.order import MicroBatch, Order, draw_quantiles


DEFAULTS = ObjectiveOptions()
NO_DROPOUT = ObjectiveOptions(no_text=0, no_references=0, neither=0, max_sequence_length=64)


class SmallSamples:
    """Samples of two buckets, whose tensors tell their row; some cannot be read."""

    name, fingerprint = "small", "small"

    def __init__(self, count: int = 12, broken: tuple[int, ...] = ()) -> None:
        self.buckets = np.array([(5, 32, 48, 1 + row % 2) for row in range(count)], np.int32)
        self.broken = broken

    def id(self, row: int) -> str:
        return f"sample{row}"

    def read(self, row: int, seed: int, epoch: int) -> dict[str, torch.Tensor]:
        if row in self.broken:
            raise (ValueError if row % 3 else OSError)(f"row {row} is broken")
        references = int(self.buckets[row, 3])
        return {
            "latents": torch.full((16, 2, 4, 6), row + 1.0),
            "reference_latents": torch.full((16, references, 4, 6), row + 0.5),
            "prompt_embeds": torch.full((3 + row % 4, 8), row + 1.0),
            "subjects": torch.arange(references),
        }

    def encode(self, read: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return read

    def empty_prompt_embeds(self) -> torch.Tensor:
        return torch.full((1, 8), -1.0)


def small_order(samples: SmallSamples, seed: int = 0, batch_size: int = 4, micro_batch_size: int = 2) -> Order:
    return Order(samples.buckets, np.arange(len(samples.buckets)), batch_size, micro_batch_size, seed)


def load(samples: SmallSamples, options: ObjectiveOptions = DEFAULTS, **changes) -> list[Batch]:
    """All batches of one process, by default of the only one, and of three steps."""
    sizes = {name: changes.pop(name) for name in ("seed", "batch_size", "micro_batch_size") if name in changes}
    values = {"rank": 0, "world_size": 1, "first_step": 0, "steps": 3, "workers": 0, "encodes": False, **changes}
    return list(load_batches(samples, small_order(samples, **sizes), options, **values))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(Batch):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


# -- What is random about a batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_timesteps_are_the_steps_own_however_it_is_divided(micro_batch_size):
    loaded = load(SmallSamples(), batch_size=8, micro_batch_size=micro_batch_size)
    count = 8 // micro_batch_size
    for step in range(3):
        timesteps = torch.cat([batch.timesteps for batch in loaded[step * count : (step + 1) * count]])
        weights = torch.cat([batch.weights for batch in loaded[step * count : (step + 1) * count]])
        expected = sample_timesteps("refalign", draw_quantiles(0, step, 8))
        assert torch.equal(timesteps, expected[0]) and torch.equal(weights, expected[1])
        assert len(timesteps.unique()) == 8


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    alone = load(SmallSamples(broken=(3,)))
    assert_same(load(SmallSamples(broken=(3,)), workers=workers), alone)


def test_encoding_in_the_training_process_changes_nothing():
    assert_same(load(SmallSamples(), encodes=True, workers=1), load(SmallSamples()))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_change_nothing(world_size):
    alone = load(SmallSamples(), batch_size=8)
    ranks = [load(SmallSamples(), batch_size=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_same([batch for at_once in zip(*ranks, strict=True) for batch in at_once], alone)


def test_a_run_that_goes_on_takes_what_it_would_have_taken():
    alone = load(SmallSamples(), steps=9)
    assert_same(load(SmallSamples(), first_step=5, steps=9), alone[2 * 5 :])


def test_the_same_sample_twice_in_a_step_has_other_noise_and_timesteps():
    (first, second) = load(SmallSamples(2), NO_DROPOUT, steps=1)
    assert first.ids == ["sample0"] * 2 or first.ids == ["sample1"] * 2
    noise = torch.cat([first.noise, second.noise])
    assert len(torch.unique(noise.flatten(1), dim=0)) == 4
    assert len(torch.cat([first.timesteps, second.timesteps]).unique()) == 4


def test_another_step_or_seed_has_other_noise():
    (batch, *_), (later, *_), (other, *_) = (
        load(SmallSamples(1), NO_DROPOUT, steps=1 + first_step, first_step=first_step, seed=seed)
        for first_step, seed in ((0, 0), (1, 0), (0, 1))
    )
    assert not torch.equal(batch.noise, later.noise) and not torch.equal(batch.noise, other.noise)
    assert len({batch.seed, later.seed, other.seed}) == 3


def test_noise_is_standard_normal():
    noise = torch.cat([batch.noise for batch in load(SmallSamples(), steps=8)])
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02


def test_dropout_has_its_rates():
    options = ObjectiveOptions(max_sequence_length=4)
    samples = SmallSamples(1)
    order = small_order(samples, batch_size=8, micro_batch_size=8)
    value, empty = samples.read(0, 0, 0), samples.empty_prompt_embeds()
    counts: Counter[tuple[bool, bool]] = Counter()
    for step in range(250):
        batch = make_batch(MicroBatch(step, 0, 0, (0,) * 8), ["a"] * 8, [value] * 8, empty, order, options)
        texts = (batch.prompt_embeds[:, 0, 0] == 1).tolist()
        counts.update(zip(texts, batch.keeps_references.tolist(), strict=True))
    shares = {kept: count / 2000 for kept, count in counts.items()}
    expected = {(True, True): 0.7, (False, True): 0.1, (True, False): 0.1, (False, False): 0.1}
    assert shares == pytest.approx(expected, abs=0.03)
    assert not batch.keeps_references.all() and batch.keeps_references.any()  # each time for itself, of one sample too


def test_dropped_text_is_the_empty_prompts():
    for batch in load(SmallSamples(), ObjectiveOptions(no_text=1, no_references=0, neither=0, max_sequence_length=6)):
        expected = torch.zeros(2, 6, 8)
        expected[:, 0] = -1
        assert torch.equal(batch.prompt_embeds, expected)
        assert batch.keeps_references.all() and batch.reference_latents.all()


def test_dropped_references_are_zeros():
    for batch in load(SmallSamples(), ObjectiveOptions(no_text=0, no_references=1, neither=0)):
        assert not batch.keeps_references.any() and not batch.reference_latents.any()
        assert (batch.prompt_embeds[:, 0] > 0).all()


def test_references_are_dropped_sample_by_sample():
    options = ObjectiveOptions(no_text=0, no_references=0.5, neither=0)
    loaded = load(SmallSamples(), options, steps=10)
    assert {tuple(batch.keeps_references.tolist()) for batch in loaded} >= {(True, False), (False, True)}
    for batch in loaded:
        assert torch.equal(batch.reference_latents.flatten(1).all(1), batch.keeps_references)


def test_a_batch_holds_its_samples_own_tensors():
    samples = SmallSamples()
    for batch in load(samples, NO_DROPOUT, batch_size=4, micro_batch_size=2):
        for place, sample_id in enumerate(batch.ids):
            value = samples.read(int(sample_id.removeprefix("sample")), 0, 0)
            assert torch.equal(batch.latents[place], value["latents"])
            assert torch.equal(batch.reference_latents[place], value["reference_latents"])
            assert torch.equal(batch.subjects[place], value["subjects"])
            length = len(value["prompt_embeds"])
            assert torch.equal(batch.prompt_embeds[place, :length], value["prompt_embeds"])
            assert not batch.prompt_embeds[place, length:].any()


def test_padding_is_the_pipelines(training_world):
    pipeline = RefAlignWanPipeline.from_pretrained(training_world.wan)
    cache = CachedSamples(training_world.cache, needs_teacher=False)
    ours = pad_prompt_embeds([cache.read(row, 0, 0)["prompt_embeds"] for row in range(2)], 128)
    captions = [(training_world.clips / f"clip0{row}.txt").read_text("utf-8") for row in range(2)]
    theirs, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=128)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours == 0, theirs == 0)


def test_a_prompt_that_is_too_long_is_cut():
    embeds = [torch.ones(5, 2), torch.full((2, 2), 2.0)]
    assert pad_prompt_embeds(embeds, 3).tolist() == [[[1, 1]] * 3, [[2, 2], [2, 2], [0, 0]]]


def test_what_the_losses_are_told_stays_on_the_cpu():
    (batch, *_) = load(SmallSamples(), steps=1)
    moved = batch.to(torch.device("meta"))
    on_cpu = {name for name, value in vars(moved).items() if isinstance(value, torch.Tensor) and not value.is_meta}
    assert on_cpu == {"keeps_references", "subjects"}


# -- Samples that cannot be read --------------------------------------------------------------------------------------


def test_another_sample_of_the_bucket_takes_the_place():
    samples = SmallSamples(broken=(3, 6))
    loaded = load(samples, NO_DROPOUT, steps=12)
    whole = load(SmallSamples(), NO_DROPOUT, steps=12)
    replaced = 0
    for batch, intended in zip(loaded, whole, strict=True):
        rows, intended_rows = ([int(i.removeprefix("sample")) for i in b.ids] for b in (batch, intended))
        assert not {3, 6} & set(rows)
        assert [row % 2 for row in rows] == [row % 2 for row in intended_rows]
        kept = [place for place, row in enumerate(intended_rows) if row not in (3, 6)]
        assert [rows[place] for place in kept] == [intended_rows[place] for place in kept]
        assert torch.equal(batch.noise[kept], intended.noise[kept])
        assert batch.latents[:, 0, 0, 0, 0].tolist() == [row + 1 for row in rows]  # the id is of what was read
        assert dict(batch.unusable) == {f"sample{r}": f"row {r} is broken" for r in intended_rows if r in (3, 6)}
        replaced += len(batch.unusable)
    assert replaced


def test_substitutes_are_always_the_same():
    samples = SmallSamples(broken=(1, 2, 3, 4))
    assert_same(load(samples), load(samples))


def test_each_place_of_a_step_has_its_own_substitutes():
    samples = SmallSamples(100, broken=(5,))
    order = small_order(samples)
    reads = [read_micro_batch(samples, order, MicroBatch(0, number, 0, (5, 5))) for number in range(2)]
    substitutes = [*reads[0].micro_batch.rows, *reads[1].micro_batch.rows]
    assert len(set(substitutes)) == 4


def test_a_bucket_that_cannot_be_read_is_left_for_another():
    samples = SmallSamples(6, broken=(1, 3, 5))
    batches = list(load(samples))
    assert {name for batch in batches for name in batch.ids} == {"sample0", "sample2", "sample4"}
    assert {name for batch in batches for name, _ in batch.unusable} == {"sample1", "sample3", "sample5"}


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_be_read_at_all_end_the_run_in_one_line(workers):
    samples = SmallSamples(6, broken=range(6))
    with pytest.raises(
        ValueError, match=r"^None of \d+ samples could be read; the last one, sample\d: row \d is[^\n]*$"
    ):
        list(load(samples, workers=workers))


def test_a_fault_of_the_program_is_not_taken_for_one_of_a_sample():
    samples = SmallSamples()
    samples.read = lambda row, seed, epoch: {}["latents"]
    with pytest.raises(KeyError):
        load(samples)


def test_the_first_sample_can_be_read_beforehand():
    samples = SmallSamples(broken=(0, 1, 2, 3))
    value = read_first(samples, small_order(samples))
    assert value["latents"][0, 0, 0, 0] > 4
