"""The same run on one process and on two ranks under torchrun: same samples, same losses, same student."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from clipdistill.runs.folder import read_rows as read_lines
from tests.conftest import REPOSITORY

COMMAND = ["-m", "clipdistill.cli", "train", "--recipe", "clip-rd", "--size", "debug", "--quiet"]


def train(out, ranks: int, *settings: str) -> None:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    # batches of 15 on two ranks are 8 and 7 rows
    command = [*launcher, *COMMAND, "--out", str(out), "train.batch_size=15", "train.evaluate_every=2", *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("train.micro_batch=3",)])
def test_two_ranks_equal_one_process(tmp_path, settings):
    train(tmp_path / "one", 1, *settings)
    train(tmp_path / "two", 2, *settings)
    described = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [d["ranks"] for d in described] == [1, 2]
    assert described[0]["samples_seen"] == described[1]["samples_seen"] == 45
    lines = [read_lines(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for one, two in zip(*lines, strict=True):
        assert two["total"] == pytest.approx(one["total"], rel=2e-5)
        assert two["terms"] == pytest.approx(one["terms"], rel=2e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-3)
    students = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two")]
    largest = max((students[0][k] - students[1][k]).abs().max().item() for k in students[0])
    assert largest < 2e-3  # Adam's first steps turn rounding into steps of the learning rate (1e-3)
