"""Schedule, seeds, signals, logs: the small parts of the loop."""

import itertools
import json
import os
import signal
from dataclasses import replace

import pytest

from clipdistill.runs.folder import read_rows
from clipdistill.runtime.signals import StopSignal
from clipdistill.train.callbacks import Log, RunView
from clipdistill.train.config import TrainConfig, resolve
from clipdistill.train.display import summary
from clipdistill.train.loop import learning_rate_factor
from clipdistill.train.step import step_seed
from clipdistill.train.trackers import flatten


def test_schedule_rises_linearly_then_falls_as_a_cosine():
    config = TrainConfig(warmup_steps=4, steps=12)
    factors = [learning_rate_factor(s, 12, 4, config) for s in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[8] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    assert factors[-1] > 0


def test_schedule_ends_at_the_stated_floor_and_can_be_constant():
    config = TrainConfig(steps=100, learning_rate=1e-3, final_learning_rate=1e-4)
    assert learning_rate_factor(100, 100, 0, config) == pytest.approx(0.1)
    assert learning_rate_factor(90, 100, 0, TrainConfig(steps=100, schedule="constant")) == 1.0


def test_a_warmup_longer_than_the_run_still_reaches_the_peak():
    assert learning_rate_factor(2, 3, 1000, TrainConfig(steps=3)) == 1.0


def test_step_seeds_differ_in_every_argument():
    seeds = {step_seed(a, b, c, d) for a in (0, 1) for b in range(50) for c in range(4) for d in range(4)}
    assert len(seeds) == 2 * 50 * 4 * 4


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_first_signal_is_remembered_and_handlers_are_put_back(name):
    number = getattr(signal, name)
    outside = signal.signal(number, signal.default_int_handler)  # SIGHUP is ignored where these tests run under nohup
    try:
        with StopSignal() as stop:
            assert stop.received is None
            os.kill(os.getpid(), number)
            assert stop.received == name
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, outside)


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_leaves_at_once():
    child = os.fork()
    if child == 0:
        with StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_log_lines_after_the_resumed_step_are_removed(tmp_path):
    config = resolve("clip", {"out": str(tmp_path)}, size="debug")
    start = RunView(config, tmp_path, 0, 6)
    log = Log()
    log.on_start(start)
    for step in (1, 2, 3):
        log.on_step(replace(start, step=step, line={"step": step}))
    log.on_step(replace(start, step=4))  # no line is due
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "tot')  # a crash cut this line
    Log().on_start(replace(start, step=2))
    assert [line["step"] for line in read_rows(tmp_path / "log.jsonl")] == [1, 2]
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_flatten_keeps_numbers_only():
    assert flatten({"a": {"b": 1}, "c": "text", "d": True, "e": 2.5}) == {"a/b": 1.0, "e": 2.5}


def test_summary_names_every_term():
    line = {"total": 3.0, "terms": {"task": 1.0, "xrd": 2.0}, "samples_per_second": 10, "data_wait": 0.25}
    assert "task 1" in summary(line)
    assert "xrd 2" in summary(line)
    assert "wait 25%" in summary(line)
