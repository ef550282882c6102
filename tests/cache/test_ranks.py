"""`torchrun`: ranks fill one store together, and train from it as one process would."""

import json
import os
import subprocess
import sys

import pytest

from clipdistill import cli
from clipdistill.cache.check import verify
from tests.cache.support import contents, filled, saved_teacher
from tests.cache.test_fill import VIEWS
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "clipdistill.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_ranks_fill_one_store_and_train_from_it(tmp_path, teacher):
    student = saved_teacher(tmp_path / "student", seed=5)
    whole = filled(tmp_path / "whole", teacher, 48, **VIEWS)
    view = [f"view.{key}={json.dumps(value)}" for key, value in VIEWS["view"].items()]
    fill = ["cache", "--teacher", teacher, "--data", "scenes:train", "--out", tmp_path / "ranks", "--block", 8]
    _torchrun(*fill, "--batch-size", 6, "--views", 2, "--device", "cpu", "data.size=48", *view)
    assert verify(tmp_path / "ranks").good
    assert contents(tmp_path / "ranks") == contents(whole.folder)
    losses = {}
    for ranks in (1, 2):
        out = tmp_path / f"run-{ranks}"
        run = ["train", "--recipe", "clip-kd", "--teacher", f"cache:{tmp_path / 'ranks'}", "--student", "tiny"]
        run += ["--student-weights", student, "--data", "scenes:train", "--out", out, "--device", "cpu", "--quiet"]
        settings = ["train.steps=4", "train.epochs=null", "train.batch_size=16", "train.precision=fp32"]
        settings += ["train.log_every=1", "train.warmup_steps=1", "data.size=48", "preflight.allow_weak_teacher=true"]
        if ranks == 1:
            assert cli.main([str(word) for word in (*run, *settings)]) == 0
        else:
            _torchrun(*run, *settings)
        losses[ranks] = [json.loads(line)["terms"] for line in (out / "log.jsonl").read_text().splitlines()]
    for one, two in zip(losses[1], losses[2], strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
