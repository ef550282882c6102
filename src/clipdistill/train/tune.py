"""How the towers are computed: which attention, compiled or not. Timed before step 0, recorded with the run.

The choice changes rounding, so a resumed run takes up what was chosen (a checkpoint holds it) and times nothing. What a
step computes with depends on the shape of its batch alone, never on the steps before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipdistill.data.pairs import one_or_several
from clipdistill.data.sampler import pairs_a_step
from clipdistill.runtime.distributed import gather_lists, on_main, world_size
from clipdistill.runtime.machine import free_memory, wait_for
from clipdistill.runtime.signals import TooLongError, time_limit
from clipdistill.train.setup import Setup
from clipdistill.train.step import Statistics, Towers, attention_by, autocast
from clipdistill.train.task import Say

LEAST_STEPS = 100
"""Shorter runs take default attention, eager."""
SHARE = 0.05
"""Of the run's time that a trial may take."""
PASS_SECONDS = 0.7
"""Passes of a trial are over fewer rows where a whole batch would take longer."""
GAIN = 0.95
"""Another way must take less than this share of the usual one's time, so that noise decides nothing."""
COMPILE_SECONDS = 180.0
"""What trying a compiler may take, or it is given up; so only runs of an hour and more try one."""
ATTENTION_SECONDS = 30.0
"""After these no further turn of the trial of attention is begun, whatever else keeps the machine busy."""
REPEATS = 3


class NoisePairs(NamedTuple):
    """Images (B, 3, H, W) of noise and real captions (B, L), cut as the run's are; None where the run reads none."""

    images: Tensor | None
    tokens: Tensor | None

    def first(self, rows: int) -> NoisePairs:
        return NoisePairs(*(None if given is None else given[:rows] for given in self))


def tune(setup: Setup, known: dict[str, Any] | None, say: Say) -> dict[str, Any]:
    """Set `setup.attention` and compile the towers as the recipe says; returns the choice, to be kept with the run.

    known: the choice of the run that is continued (empty for one of an older version, which had default attention and
    compiled nothing by itself); None before step 0, where `auto` is timed. Rank 0 chooses for all.
    """
    train = setup.config.train
    chosen: dict[str, Any] = {"attention": "default", "compile": False, **(known or {})}
    if train.attention != "auto":
        chosen["attention"] = train.attention
    if train.compile != "auto":
        chosen["compile"] = train.compile
    timed = known is None and "auto" in (train.attention, train.compile) and _worth_timing(setup)
    if timed or chosen["compile"]:
        found = on_main(lambda: _tried(setup, chosen, say, timed), train.rank_timeout)
        chosen = gather_lists([found])[0]
    setup.attention = chosen["attention"]
    setup.bare_towers.compile_for(_rows(setup) if chosen["compile"] else None)
    return chosen


def _worth_timing(setup: Setup) -> bool:
    if setup.features is not None:  # what a step computes is the heads alone
        return False
    return not setup.config.train.deterministic and setup.total_steps >= LEAST_STEPS


def _rows(setup: Setup) -> int:
    """Rows of a pass through the towers."""
    train = setup.config.train
    share = -(-pairs_a_step(setup.source, train.batch_size) // world_size())
    return min(train.micro_batch or share, share)


def _tried(setup: Setup, chosen: dict[str, Any], say: Say, timed: bool) -> dict[str, Any]:
    """`chosen` with what the trial decides, on rank 0. Weights, gradients, statistics and generators are left alone."""
    with _nothing_changed(setup) as towers:
        trial = _Timing(setup, towers)
        seconds: dict[str, float] = {}
        if timed and setup.config.train.attention == "auto" and setup.device.type == "cpu":
            seconds = trial.attention()
            if seconds and seconds["math attention"] < GAIN * seconds["default attention"]:
                chosen = {**chosen, "attention": "math"}
        if chosen["compile"] or (timed and setup.config.train.compile == "auto" and trial.may_compile()):
            chosen, more = trial.compiled(chosen, say)
            seconds |= more
    if not seconds:
        return chosen
    name = f"{chosen['attention']} attention" + (", compiled" if chosen["compile"] else "")
    others = ", ".join(f"{other} {value:.3g}" for other, value in seconds.items() if other != name)
    if name in seconds:
        say(f"towers {seconds[name]:.3g} s a step: {name}; {others}")
    return {**chosen, "seconds": {key: round(value, 4) for key, value in seconds.items()}}


@contextmanager
def _nothing_changed(setup: Setup) -> Iterator[Towers]:
    """The bare towers, for passes that leave nothing behind (no gradient is stored by them)."""
    towers = setup.bare_towers
    statistics = Statistics(towers)
    devices = [setup.device] if setup.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield towers
        finally:
            statistics.restore()


class _Timing:
    """Passes forward and backward through the towers, timed."""

    def __init__(self, setup: Setup, towers: Towers) -> None:
        self.setup, self.towers = setup, towers
        train, student = setup.config.train, setup.student
        self.rows = _rows(setup)
        self.passes = -(-pairs_a_step(setup.source, train.batch_size) // world_size() // self.rows)  # of a step
        rows = min(self.rows, len(setup.source))
        generator = torch.Generator().manual_seed(train.seed)
        order = torch.randperm(len(setup.source), generator=generator)[:rows].tolist()
        repeated = (order * -(-self.rows // rows))[: self.rows]
        images = tokens = None
        if "text" in setup.modalities:
            captions = [(*one_or_several(setup.source.captions(i)), "a picture")[0] for i in order]
            by_index = dict(zip(order, student.tokenizer(captions)))
            (tokens,) = student.shorten(torch.stack([by_index[i] for i in repeated]))
            tokens = tokens.to(setup.device)
        if "image" in setup.modalities:
            side = student.image.size
            images = torch.randn(self.rows, 3, side, side, generator=generator).to(setup.device)
        self.sample = NoisePairs(images, tokens)
        self.step_seconds = 0.0

    def attention(self) -> dict[str, float]:
        """Seconds of a step by attention; nothing when timing or memory do not allow it."""
        few = self.sample.first(min(self.rows, 8))
        self._pass(few)
        few_rows = min(self.rows, 8)
        per_row = self._pass(few) / few_rows
        self.step_seconds = per_row * self.rows * self.passes
        rows = int(min(max(PASS_SECONDS / per_row, few_rows), self.rows))
        part = self.sample.first(rows)
        run = self.step_seconds * self.setup.total_steps
        if 2 * REPEATS * per_row * rows > SHARE * run or not self._fits("math"):
            return {}
        ways = {f"{name} attention": name for name in ("default", "math")}
        seconds = {name: float("inf") for name in ways}
        began = time.monotonic()
        for turn in range(REPEATS):  # in turns, so that other work on the machine slows both
            if turn and time.monotonic() - began > ATTENTION_SECONDS:
                break
            for name, way in ways.items():
                seconds[name] = min(seconds[name], self._pass(part, way))
        scaled = {name: value / rows * self.rows * self.passes for name, value in seconds.items()}
        self.step_seconds = min(scaled.values())
        return scaled

    def may_compile(self) -> bool:
        """Whether the run is long enough to find out what compiling gains."""
        train = self.setup.config.train
        if train.masks is not None or train.mask_ratio is not None:  # they change the towers at every step
            return False
        if not self.step_seconds:
            few = self.sample.first(min(self.rows, 8))
            self._pass(few)
            self.step_seconds = self._pass(few) / min(self.rows, 8) * self.rows * self.passes
        cost = COMPILE_SECONDS + 5 * self.step_seconds / self.passes
        return cost < SHARE * self.step_seconds * self.setup.total_steps

    def compiled(self, chosen: dict[str, Any], say: Say) -> tuple[dict[str, Any], dict[str, float]]:
        """The choice with `compile` decided, and seconds of a step; a compiler that fails is told in one line."""
        wanted, attention = chosen["compile"], chosen["attention"]
        eager = seconds = float("inf")
        try:
            with nullcontext() if wanted else time_limit(COMPILE_SECONDS):
                self.towers.compile_for(self.rows)
                first = self._pass(self.sample, attention)
                if wanted:
                    return chosen, {}
                for _ in range(2):
                    seconds = min(seconds, self._pass(self.sample, attention))
                    with self.towers.eager():
                        eager = min(eager, self._pass(self.sample, attention))
        except TooLongError:
            return self._eager(chosen, say, f"trying torch.compile took longer than {COMPILE_SECONDS:g} s")
        except Exception as error:  # no compiler, or a tower that it cannot take: whatever it raises
            reason = " ".join(str(error).split())[:200]
            return self._eager(chosen, say, f"torch.compile failed ({type(error).__name__}: {reason})")
        steps, gain = self.setup.total_steps, (eager - seconds) * self.passes
        # a continued run compiles once more
        chosen = {**chosen, "compile": seconds < GAIN * eager and gain * steps > 2 * first}
        name = f"{attention} attention"
        return chosen, {f"{name}, compiled": seconds * self.passes, name: eager * self.passes}

    def _eager(self, chosen: dict[str, Any], say: Say, why: str) -> tuple[dict[str, Any], dict[str, float]]:
        self.towers.compile_for(None)
        say(f"the towers are not compiled: {why}")
        return {**chosen, "compile": False}, {}

    def _pass(self, sample: NoisePairs, attention: str = "default") -> float:
        """Seconds of a pass forward and backward; no parameter's gradient is touched, DDP's hooks are not called."""
        torch.manual_seed(0)
        parameters = [p for p in self.towers.module.parameters() if p.requires_grad]
        began = self._now()
        with attention_by(attention):
            with autocast(self.setup.device, self.setup.config.train.precision):
                both = self.towers(*sample)[:2]
            total = sum(rows.square().sum() for rows in both if rows is not None)
            if total.requires_grad:  # not where both towers are frozen
                torch.autograd.grad(total, parameters, allow_unused=True)
        return self._now() - began

    def _now(self) -> float:
        wait_for(self.setup.device)
        return time.perf_counter()

    def _fits(self, attention: str) -> bool:
        """Whether half of the free memory is enough for the activations of a pass: the objective needs some, too."""
        free = free_memory(self.setup.device)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        pair, precision = self.sample.first(2), self.setup.config.train.precision
        kept = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with kept, attention_by(attention), autocast(self.setup.device, precision):
            self.towers(*pair)
        weights = {p.untyped_storage().data_ptr() for p in self.towers.parameters()}
        per_row = sum(size for pointer, size in saved.items() if pointer not in weights) / min(self.rows, 2)
        return free is None or per_row * self.rows < free / 2
