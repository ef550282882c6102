"""Masks, pruning and stages on two ranks under torchrun: the same students as one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from clipdistill.runs.folder import read_rows as read_lines
from clipdistill.runs.folder import run_folders
from tests.conftest import REPOSITORY

COMMAND = ["-m", "clipdistill.cli", "train", "--recipe", "tinyclip-auto-stages", "--size", "debug", "--quiet"]


def train(out: Path, ranks: int) -> None:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    # batches of 15 on two ranks are 8 and 7 rows
    command = [*launcher, *COMMAND, "--out", str(out), "train.batch_size=15", "train.evaluate_every=2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_ranks_make_the_students_of_one(tmp_path: Path) -> None:
    train(tmp_path / "one", 1)
    train(tmp_path / "two", 2)
    one, two = (run_folders(tmp_path / name) for name in ("one", "two"))
    assert [folder.name for folder in one] == [folder.name for folder in two]
    assert len(one) == 3
    for single, double in zip(one, two, strict=True):
        described = [json.loads((folder / "run.json").read_text()) for folder in (single, double)]
        assert [values["ranks"] for values in described] == [1, 2]
        # the same parts were closed: the same sizes, layer by layer
        assert described[0]["parameters"] == described[1]["parameters"]
        students = [load_file(folder / "student" / "model.safetensors") for folder in (single, double)]
        assert {k: v.shape for k, v in students[0].items()} == {k: v.shape for k, v in students[1].items()}
        # weights go apart as Adam's first steps turn rounding into steps of the learning rate (1e-4 here)
        assert max((students[0][k] - students[1][k]).abs().max().item() for k in students[0]) < 2e-3
        for a, b in zip(read_lines(single / "log.jsonl"), read_lines(double / "log.jsonl"), strict=True):
            assert b["total"] == pytest.approx(a["total"], rel=2e-3)
            assert a.get("sparsity", {}).keys() == b.get("sparsity", {}).keys()
            for name, value in a.get("sparsity", {}).items():
                assert b["sparsity"][name] == pytest.approx(value, rel=1e-3, abs=1e-4)


GROUPS = """
import time
from datetime import timedelta
import torch
from clipdistill.runtime.distributed import ProcessGroup, gather_lists, rank
for number in range(4):
    with ProcessGroup(torch.device("cpu"), timedelta(seconds=120)) as group:
        assert gather_lists([(number, rank())]) == [(number, 0), (number, 1)]
        first = rank() == 0
    time.sleep(0.5 * first)
"""


@pytest.mark.slow
def test_groups_follow_each_other(tmp_path: Path) -> None:
    """Every stage forms a group of its own; none meets at the addresses that an earlier one left."""
    script = tmp_path / "groups.py"
    script.write_text(GROUPS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
