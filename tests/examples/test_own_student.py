"""examples/own_student.py, from a folder outside the package: trained, resumed, evaluated, loaded, exported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_student.py"
CHECK = """
import sys, torch
import own_student
import clipdistill as cd
from clipdistill.models import load_model
module, preprocess, tokenizer = cd.load_student("run/student")
assert type(module).__name__ == "Patches"
assert module.encode_text(tokenizer("a red square")).shape == (1, 128)
exported = load_model("onnx:exported").module
images = torch.randn(3, 3, 64, 64)
assert torch.allclose(module.encode_image(images), exported.encode_image(images), atol=1e-4)
"""


def run(folder: Path, *words: str) -> str:
    """One command in a process of its own; what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_student_from_a_file_outside_the_package(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    shutil.copy(EXAMPLE, tmp_path)
    assert len(EXAMPLE.read_text().splitlines()) < 60
    command = ("-m", "clipdistill.cli")
    plugin = ("--plugin", "own_student.py")
    train = (*command, "train", *plugin, "--student", "patches", "--recipe", "clip-rd", "--size", "debug",
             "--out", "run", "train.batch_size=8", "data.size=32", "validation.size=16")  # fmt: skip
    run(tmp_path, *train, "train.steps=2", "train.checkpoint_every=1")
    described = json.loads((tmp_path / "run/student/model.json").read_text())
    assert described["architecture"] | {"module": ""} == {
        "module": "",
        "student": "patches",
        "plugin": "own_student.py",
    }
    # again, from the checkpoint of step 2
    said = run(tmp_path, *train, "train.steps=3", "train.checkpoint_every=1", "--allow-changes")
    assert "from step 2" in said
    scores = run(
        tmp_path, *command, "eval", *plugin, "run", "--data", "scenes:val?size=16", "--quiet", "--device", "cpu"
    )
    assert "R@1" in scores
    run(tmp_path, *command, "export", *plugin, "run", "--to", "onnx", "--out", "exported")
    run(tmp_path, "-c", CHECK)
