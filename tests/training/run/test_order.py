"""Which samples a step takes: the same, however the work is shared."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refalign_training.run.order import MAX_SUBSTITUTES, MicroBatch, Order, draw_quantiles, hold_out
from tests.training.run.test_batches import SmallSamples, small_order


# -- The order --------------------------------------------------------------------------------------------------------


@st.composite
def orders(draw):
    """Orders of up to 40 samples in up to 4 buckets, not all of them trained on; with their buckets and rows."""
    numbers = draw(st.lists(st.integers(0, 3), min_size=1, max_size=40))
    rows = np.flatnonzero(draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers))))
    rows = rows if len(rows) else np.array([0])
    micro, count, seed = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 9))
    buckets = np.array([(5, 32, 48, number) for number in numbers], np.int32)
    return Order(buckets, rows, micro * count, micro, seed), buckets, rows


def epoch_of(order: Order, epoch: int) -> list[MicroBatch]:
    places = range(epoch * order.epoch_length, (epoch + 1) * order.epoch_length)
    return [order(*divmod(place, order.micro_batches)) for place in places]


@given(orders(), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_an_epoch_shows_every_sample_and_little_twice(drawn, epoch):
    order, buckets, rows = drawn
    shown = epoch_of(order, epoch)
    assert {micro_batch.epoch for micro_batch in shown} == {epoch}
    counts = Counter(row for micro_batch in shown for row in micro_batch.rows)
    assert counts.keys() == set(rows.tolist())
    for number in np.unique(buckets[rows, 3]):
        in_bucket = [counts[row] for row in rows.tolist() if buckets[row, 3] == number]
        assert max(in_bucket) - min(in_bucket) <= 1  # filled up evenly
        assert sum(in_bucket) - len(in_bucket) < order.micro_batch_size


@given(orders(), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_a_micro_batch_is_of_one_bucket_and_full(drawn, epoch):
    order, buckets, _ = drawn
    for micro_batch in epoch_of(order, epoch):
        assert len(micro_batch.rows) == order.micro_batch_size
        assert len(np.unique(buckets[list(micro_batch.rows)], axis=0)) == 1


@given(orders(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_a_micro_batch_does_not_depend_on_what_was_asked_before(drawn, random):
    order, buckets, rows = drawn
    places = [(step, number) for step in range(12) for number in range(order.micro_batches)]
    in_order = {place: order(*place) for place in places}
    random.shuffle(places)
    again = Order(buckets, rows, order.micro_batches * order.micro_batch_size, order.micro_batch_size, order.seed)
    assert {place: again(*place) for place in places} == in_order


@given(st.permutations([1, 2, 3, 4, 6, 12]), st.integers(0, 5), st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_ranks_share_the_turns_of_one_process_from_any_step(world_sizes, first_step, steps):
    order = small_order(SmallSamples(7), batch_size=24)
    alone = [order(step, number) for step in range(first_step, first_step + steps) for number in range(12)]
    for world_size in world_sizes:
        turns = [order.turns(rank, world_size, first_step, first_step + steps) for rank in range(world_size)]
        together = [turn for at_once in zip(*turns, strict=True) for turn in at_once]
        assert together == alone


@pytest.mark.parametrize("what", ["seed", "epoch"])
def test_another_seed_or_epoch_is_another_order(what):
    samples = SmallSamples(40)
    first = small_order(samples)
    seed, epoch = (1, 0) if what == "seed" else (0, 1)
    ours = [micro_batch.rows for micro_batch in epoch_of(first, 0)]
    theirs = [micro_batch.rows for micro_batch in epoch_of(small_order(samples, seed=seed), epoch)]
    assert ours != theirs
    assert {frozenset(rows) for rows in ours} != {frozenset(rows) for rows in theirs}  # not only their order


def test_buckets_are_mixed_over_an_epoch():
    samples = SmallSamples(200)
    shown = [samples.buckets[micro_batch.rows[0], 3] for micro_batch in epoch_of(small_order(samples), 0)]
    assert 20 < sum(a != b for a, b in itertools.pairwise(shown)) < 80


# -- Quantiles of timesteps -------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(0, 10**6), st.integers(1, 64))
@settings(deadline=None)
def test_a_step_has_one_quantile_in_each_part(seed, step, batch_size):
    quantiles = draw_quantiles(seed, step, batch_size)
    assert sorted((quantiles * batch_size).long().tolist()) == list(range(batch_size))


def test_quantiles_are_drawn_inside_their_parts():
    places = torch.stack([(draw_quantiles(0, step, 8) * 8) % 1 for step in range(200)])
    assert (places.std(1) > 0.05).all()  # each for itself
    assert 0.45 < places.mean() < 0.55 and places.max() > 0.99 and places.min() < 0.01


def test_which_sample_gets_which_part_is_random():
    firsts = Counter(int(draw_quantiles(0, step, 4)[0] * 4) for step in range(400))
    assert set(firsts) == {0, 1, 2, 3} and max(firsts.values()) < 150


# -- Substitutes ------------------------------------------------------------------------------------------------------


def test_substitutes_are_others_of_the_bucket_each_once():
    samples = SmallSamples(100)
    order = small_order(samples)
    drawn = order.substitutes(5, 0, 0)
    assert len(drawn) == len(set(drawn)) == MAX_SUBSTITUTES and 5 not in drawn
    assert {row % 2 for row in drawn} == {1}
    assert drawn != order.substitutes(5, 1, 0) and drawn != order.substitutes(5, 0, 1)


# -- Held-out samples -------------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(0, 60))
@settings(deadline=None)
def test_what_is_held_out_is_not_trained_on(num_samples, wanted):
    rows, held_out = hold_out(num_samples, wanted)
    assert sorted([*rows, *held_out]) == list(range(num_samples))
    assert len(held_out) == min(wanted, num_samples // 10)
    assert sorted(rows) == list(rows) and sorted(held_out) == list(held_out)


def test_the_same_samples_are_held_out_always():
    _, held_out = hold_out(200, 5)
    assert held_out.tolist() == hold_out(200, 5)[1].tolist()
    assert set(held_out) < set(hold_out(200, 10)[1])  # of more, the same ones too
    assert held_out.tolist() != list(range(5))
