"""Attention and compilation of the towers: chosen before step 0, recorded, and taken up again by a resumed run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.config import build as configure
from clipdistill.errors import InputError, Preempted
from clipdistill.train import loop
from clipdistill.train import tune as tuning
from clipdistill.train.config import TrainConfig, resolve
from clipdistill.train.run import distill
from clipdistill.train.setup import Setup, build
from clipdistill.train.tune import tune
from tests.conftest import REPOSITORY

FEW = ("train.batch_size=6", "data.size=24")


def setup_of(folder, *assignments: str) -> Setup:
    config = resolve("clip", {"out": str(folder)}, size="debug", assignments=[*FEW, *assignments])
    return build(config, torch.device("cpu"))


def long_setup(folder, *assignments: str) -> Setup:
    return setup_of(folder, "train.steps=1000", "train.warmup_steps=0", *assignments)


@pytest.fixture
def faster(monkeypatch):
    """Call with the way that shall be found faster, so that no clock decides."""

    def choose(way: str, compiled: bool = False) -> list[str]:
        passes: list[str] = []

        def seconds(trial, sample, attention="default"):
            passes.append(attention)
            value = 1.0 if attention == way else 2.0
            return value * (0.5 if compiled and trial.towers._compiled is not None else 1.0)

        monkeypatch.setattr(tuning._Timing, "_pass", seconds)
        return passes

    return choose


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_recipes_that_say_true_or_false_are_read_as_before(value):
    assert configure(TrainConfig, {"compile": value}).compile is value
    with pytest.raises(InputError, match="attention"):
        configure(TrainConfig, {"attention": "flash"})


@pytest.mark.parametrize("way", ["default", "math"])
def test_the_faster_attention_is_taken_and_said(tmp_path, faster, way):
    faster(way)
    setup, said = long_setup(tmp_path, "train.compile=false"), []
    record = tune(setup, None, said.append)
    assert (setup.attention, record["attention"], record["compile"]) == (way, way, False)
    assert record["seconds"] == {"default attention": 2.0 - (way == "default"), "math attention": 2.0 - (way == "math")}
    other = {"default": "math", "math": "default"}[way]
    assert said == [f"towers 1 s a step: {way} attention; {other} attention 2"]


def test_a_gain_within_noise_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning._Timing, "_pass", lambda *given: 0.97 if given[-1] == "math" else 1.0)
    assert tune(long_setup(tmp_path, "train.compile=false"), None, print)["attention"] == "default"


@pytest.mark.parametrize("assignments", [("train.steps=99",), ("train.deterministic=true",)])
def test_short_and_deterministic_runs_time_nothing(tmp_path, faster, assignments):
    passes, said = faster("math"), []
    record = tune(long_setup(tmp_path, *assignments), None, said.append)
    assert (record, passes, said) == ({"attention": "default", "compile": False}, [], [])


def test_a_run_takes_what_its_recipe_says_without_timing(tmp_path, faster):
    passes = faster("default")
    setup = long_setup(tmp_path, "train.attention=math", "train.compile=false")
    assert tune(setup, None, print) == {"attention": "math", "compile": False}
    assert (setup.attention, passes) == ("math", [])


def test_a_continued_run_takes_up_its_record_and_times_nothing(tmp_path, faster):
    passes = faster("default")
    setup = long_setup(tmp_path)
    record = {"attention": "math", "compile": False, "seconds": {"math attention": 1.0}}
    assert tune(setup, record, print) == record
    assert tune(long_setup(tmp_path), {}, print)["attention"] == "default"  # begun by an older version
    assert (setup.attention, passes) == ("math", [])


def test_the_trial_leaves_no_trace(tmp_path):
    """Weights, gradients, running statistics and the generator are those from before, to the bit."""
    setup = long_setup(tmp_path, "train.compile=false")
    setup.student.module.extra = torch.nn.BatchNorm1d(setup.student.embed_dim)
    inner = setup.student.module.encode_image
    setup.student.module.encode_image = lambda images: setup.student.module.extra(inner(images))
    before = {key: value.clone() for key, value in setup.towers.state_dict().items()}
    state = torch.get_rng_state()
    assert tune(setup, None, print)["seconds"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in setup.towers.state_dict().items())
    assert all(parameter.grad is None for parameter in setup.towers.parameters())
    assert setup.towers.training


def test_little_memory_keeps_the_default(tmp_path, faster, monkeypatch):
    faster("math")
    monkeypatch.setattr(tuning, "free_memory", lambda _: 1000)
    assert tune(long_setup(tmp_path, "train.compile=false"), None, print)["attention"] == "default"


def test_compilation_is_taken_where_it_pays(tmp_path, faster, monkeypatch):
    faster("math", compiled=True)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    setup, said = long_setup(tmp_path, "train.steps=5000"), []
    record = tune(setup, None, said.append)
    assert (record["attention"], record["compile"]) == ("math", True)
    assert said == ["towers 0.5 s a step: math attention, compiled; default attention 2, math attention 1"]
    assert setup.bare_towers._compiled is not None
    short = long_setup(tmp_path / "short", "train.steps=2000")  # 5 % of 2000 seconds are fewer than a compiler takes
    assert tune(short, None, print)["compile"] is False
    assert short.bare_towers._compiled is None


@pytest.mark.parametrize("setting", ["true", "auto"])
def test_without_a_compiler_one_line_says_so_and_the_run_goes_on(tmp_path, monkeypatch, setting):
    def broken(function):
        def fail(*_):
            raise RuntimeError("no working\ncompiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(tuning, "COMPILE_SECONDS", 0.0)
    setup, said = long_setup(tmp_path, f"train.compile={setting}", "train.attention=default"), []
    record = tune(setup, None, said.append)
    assert record["compile"] is False
    assert said == ["the towers are not compiled: torch.compile failed (RuntimeError: no working compiler here)"]
    assert setup.bare_towers._compiled is None


def test_a_compiler_that_takes_too_long_is_given_up_with_one_line(tmp_path, monkeypatch):
    """Also one that keeps every exception to itself, as a process that it waits for would."""

    def endless(function):
        def compiled(*_):
            with contextlib.suppress(Exception):
                time.sleep(60)

        return compiled

    monkeypatch.setattr(torch, "compile", endless)
    monkeypatch.setattr(tuning, "COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(tuning._Timing, "may_compile", lambda trial: True)
    before = signal.getsignal(signal.SIGALRM)
    setup, said = long_setup(tmp_path, "train.attention=default"), []
    began = time.monotonic()
    record = tune(setup, None, said.append)
    assert time.monotonic() - began < 30
    assert record["compile"] is False
    assert said == ["the towers are not compiled: trying torch.compile took longer than 0.2 s"]
    assert setup.bare_towers._compiled is None
    assert signal.getsignal(signal.SIGALRM) is before


_RANKS = """
import sys
from clipdistill.runtime.distributed import rank
from clipdistill.train import tune as tuning
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from clipdistill.train.distil import Distillation
def seconds(trial, sample, attention="default"):
    return 1.0 if (attention == "math") == (rank() == 0) else 2.0  # the ranks would choose differently
tuning._Timing._pass, tuning.LEAST_STEPS, tuning.SHARE = seconds, 1, 1e9
settings = {"out": sys.argv[1]}
few = ["train.batch_size=6", "data.size=24", "train.steps=3", "train.compile=false"]
config = resolve("clip", settings, size="debug", assignments=few)
inner = Distillation.gradients
def gradients(task, step, batch):
    assert task.setup.attention == "math", rank()
    return inner(task, step, batch)
Distillation.gradients = gradients
distill(config, quiet=True)
"""


@pytest.mark.slow
def test_ranks_agree_on_one_choice(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["towers"]["attention"] == "math"


def test_batches_of_other_sizes_and_evaluation_stay_eager(tmp_path, monkeypatch):
    called = []

    def marked(function):
        return lambda given: called.append(len(given)) or function(given)

    monkeypatch.setattr(torch, "compile", marked)
    towers = setup_of(tmp_path, "train.compile=true").bare_towers
    towers.compile_for(6)
    for rows, training in ((6, True), (5, True), (6, False)):
        towers.train(training)
        towers(torch.zeros(rows, 3, 64, 64), torch.ones(rows, 8, dtype=torch.long))
    assert called == [6, 6]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["total"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_math_attention_learns_the_same_within_rounding(tmp_path):
    found = {}
    for way in ("default", "math"):
        config = resolve(
            "clip", {"out": str(tmp_path / way)}, size="debug", assignments=[*FEW, f"train.attention={way}"]
        )
        distill(config, quiet=True)
        found[way] = losses(tmp_path / way)
        facts = json.loads((tmp_path / way / "run.json").read_text())
        assert facts["towers"] == {"attention": way, "compile": False}
    assert found["math"] == pytest.approx(found["default"], rel=1e-5)


def test_a_stopped_run_with_a_timed_choice_ends_as_an_uninterrupted_one(tmp_path, faster, monkeypatch):
    """The second start finds the other way faster, and still takes that of the first: the same weights to the bit."""
    monkeypatch.setattr(tuning, "LEAST_STEPS", 1)
    monkeypatch.setattr(tuning, "SHARE", 1e9)
    steps = ["train.steps=4", "train.compile=false", *FEW]

    def run(folder: Path) -> Path:
        return distill(resolve("clip", {"out": str(folder)}, size="debug", assignments=steps), quiet=True).student

    faster("math")
    whole = load_file(run(tmp_path / "whole") / "model.safetensors")

    stopped, asked, original = tmp_path / "stopped", [], loop.any_rank
    with monkeypatch.context() as patch:  # asked twice a step: finite?, stop?
        patch.setattr(loop, "any_rank", lambda *given: asked.append(1) or original(*given) or len(asked) == 4)
        with pytest.raises(Preempted, match="after step 2"):
            run(stopped)
    passes = faster("default")
    resumed = load_file(run(stopped) / "model.safetensors")
    assert passes == []
    assert json.loads((stopped / "run.json").read_text())["towers"]["attention"] == "math"
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
