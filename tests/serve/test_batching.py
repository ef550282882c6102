"""Rows of many callers in common batches: order, size, failures, cancelling, closing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clipdistill.serve.batching import Batcher


def rows(*values: float) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)[:, None]


@pytest.fixture
def make():
    made = []

    def batcher(function, most=4, wait=0.0, **more):
        made.append(Batcher(function, most, wait, **more))
        return made[-1]

    yield batcher
    for one in made:
        one.close()


def test_every_caller_gets_its_own_rows_in_order(make):
    sizes = []
    batcher = make(lambda x: (sizes.append(len(x)), np.concatenate([2 * x, x], axis=1))[1])

    def call(number):
        count = number % 7 + 1
        asked = rows(*(100 * number + i for i in range(count)))
        return np.array_equal(batcher.submit(asked).result(20), np.concatenate([2 * asked, asked], axis=1))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(call, range(200)))
    assert max(sizes) <= 4
    assert len(sizes) < sum(number % 7 + 1 for number in range(200)) / 2  # and they did share batches


def test_what_waits_while_a_batch_runs_is_taken_together(make):
    started, go, sizes = threading.Event(), threading.Event(), []

    def function(x):
        sizes.append(len(x))
        started.set()
        assert go.wait(20)
        return x

    batcher = make(function, most=8)
    first = batcher.submit(rows(0))
    started.wait(20)
    rest = [batcher.submit(rows(number)) for number in range(1, 6)]
    go.set()
    assert [float(future.result(20)[0, 0]) for future in (first, *rest)] == [0, 1, 2, 3, 4, 5]
    assert sizes == [1, 5]


def test_the_first_row_waits_for_more_but_not_for_ever(make):
    sizes = []
    batcher = make(lambda x: (sizes.append(len(x)), x)[1], most=3, wait=30.0)
    futures = [batcher.submit(rows(number)) for number in range(3)]
    assert [float(future.result(20)[0, 0]) for future in futures] == [0, 1, 2]  # full: long before 30 s
    assert sizes == [3]
    short = make(lambda x: x, most=3, wait=0.01)
    assert short.submit(rows(7)).result(20) == 7


def test_one_callers_failure_is_nobody_elses(make):
    def function(x):
        if (x < 0).any():
            raise ValueError("negative")
        return x

    go = threading.Event()
    batcher = make(lambda x: (go.wait(20), function(x))[1])
    futures = [batcher.submit(rows(*values)) for values in ((1, 2), (-1,), (3,), (5, -2, 6, 7, 8))]
    go.set()
    assert futures[0].result(20).ravel().tolist() == [1, 2]
    assert futures[2].result(20).ravel().tolist() == [3]
    for future in (futures[1], futures[3]):
        with pytest.raises(ValueError, match="negative"):
            future.result(20)
    assert batcher.submit(rows(9)).result(20) == 9


def test_who_has_left_is_not_computed(make):
    started, go, seen = threading.Event(), threading.Event(), []

    def function(x):
        seen.extend(x.ravel().tolist())
        started.set()
        assert go.wait(20)
        return x

    batcher = make(function, most=1)
    first = batcher.submit(rows(0))
    started.wait(20)
    gone, kept = batcher.submit(rows(1, 2, 3)), batcher.submit(rows(4))
    assert gone.cancel()
    go.set()
    assert first.result(20) == 0
    assert kept.result(20) == 4
    assert seen == [0, 4]


def test_closing_finishes_what_waits_and_takes_no_more(make):
    go = threading.Event()
    batcher = make(lambda x: (go.wait(20), x)[1], most=2, wait=10.0)
    futures = [batcher.submit(rows(number)) for number in range(5)]
    go.set()
    batcher.close()
    assert [float(future.result(0)[0, 0]) for future in futures] == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(rows(1))


def test_a_function_that_loses_rows_is_an_error_and_not_somebody_elses_row(make):
    batcher = make(lambda x: x[:1])
    with pytest.raises(RuntimeError, match="1 rows came back for 2"):
        batcher.submit(rows(1, 2)).result(20)
