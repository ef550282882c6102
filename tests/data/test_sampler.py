"""Sample order: a function of (seed, epoch, position) for any number of ranks; field.md E2 rows 11, 12 and 18."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill.data.sampler import StepSampler, epoch_order, sample_generator, steps_per_epoch
from clipdistill.errors import InputError


def test_epoch_order_is_a_permutation_and_stays_the_same_for_ever() -> None:
    order = epoch_order(1000, seed=3, epoch=7)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    # fixed values: a run resumed with a later version must go on in the same order
    assert epoch_order(10, 0, 0).tolist() == GOLDEN[0, 0]
    assert epoch_order(10, 0, 1).tolist() == GOLDEN[0, 1]
    assert epoch_order(10, 1, 0).tolist() == GOLDEN[1, 0]


GOLDEN = {
    (0, 0): [0, 2, 9, 1, 8, 5, 4, 3, 6, 7],
    (0, 1): [5, 3, 7, 8, 2, 4, 1, 0, 6, 9],
    (1, 0): [3, 5, 2, 9, 7, 0, 8, 6, 1, 4],
}


def test_sample_generators_are_independent_of_each_other_and_of_the_order() -> None:
    draws = {
        tuple(sample_generator(seed, epoch, index).integers(0, 2**32, 4).tolist())
        for seed in range(3)
        for epoch in range(3)
        for index in range(50)
    }
    assert len(draws) == 450
    many = np.array([sample_generator(0, 0, i).random() for i in range(4000)])
    assert abs(many.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.05


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 8), st.integers(0, 5), st.data())
def test_rows_11_12_18_ranks_share_the_batch_of_one_process(
    n: int, batch_size: int, world: int, seed: int, data: st.DataObject
) -> None:
    if min(n, batch_size) < world:
        with pytest.raises(InputError, match="cannot share batches"):
            StepSampler(n, batch_size, seed, 0, world)
        return
    alone = StepSampler(n, batch_size, seed)
    ranks = [StepSampler(n, batch_size, seed, rank, world) for rank in range(world)]
    assert {r.steps_per_epoch for r in ranks} == {alone.steps_per_epoch} == {max(1, n // batch_size)}
    shares = [r.local_batch_size for r in ranks]
    assert max(shares) - min(shares) <= 1
    step = data.draw(st.integers(0, 3 * alone.steps_per_epoch))
    parts = [r.indices(step) for r in ranks]
    assert [len(p) for p in parts] == shares
    assert np.concatenate(parts).tolist() == alone.indices(step).tolist()


def test_an_epoch_sees_every_sample_at_most_once_and_drops_the_tail() -> None:
    sampler = StepSampler(103, 10, seed=0)
    assert (sampler.steps_per_epoch, sampler.dropped_per_epoch) == (10, 3)
    seen = np.concatenate([sampler.indices(step) for step in range(10)])
    assert len(set(seen.tolist())) == 100
    following = np.concatenate([sampler.indices(step) for step in range(10, 20)])
    assert set(range(103)) - set(seen.tolist()) != set(range(103)) - set(following.tolist())
    assert [sampler.epoch(step) for step in (0, 9, 10, 25)] == [0, 0, 1, 2]


def test_a_set_smaller_than_the_batch_is_one_step_of_all_its_samples() -> None:
    sampler = StepSampler(7, 64, seed=0)
    assert (sampler.batch_size, sampler.steps_per_epoch, sampler.dropped_per_epoch) == (7, 1, 0)
    assert sorted(sampler.indices(5).tolist()) == list(range(7))
    assert steps_per_epoch(7, 64) == 1
    assert steps_per_epoch(128, 64) == 2


def test_steps_may_be_asked_for_in_any_order() -> None:
    forward = [StepSampler(50, 8, 1).indices(step).tolist() for step in range(20)]
    sampler = StepSampler(50, 8, 1)
    assert [sampler.indices(step).tolist() for step in reversed(range(20))] == forward[::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "batch_size": 4, "seed": 0}, "data set is empty"),
        ({"n": 4, "batch_size": 0, "seed": 0}, "batch size must be at least 1"),
        ({"n": 4, "batch_size": 4, "seed": -1}, "seed must lie between"),
        ({"n": 4, "batch_size": 4, "seed": 0, "rank": 2, "world": 2}, "rank 2 does not exist"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StepSampler(**arguments)
