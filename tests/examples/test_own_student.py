"""examples/own_student.py, from a folder outside the package: trained, resumed, evaluated, loaded, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.reliability.support import Launcher

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


def test_a_student_from_a_file_outside_the_package(tmp_path: Path, launcher: Launcher) -> None:
    def run(*words: str) -> str:
        return launcher.start(*words, folder=tmp_path, environment={"HF_HUB_OFFLINE": "1"}).finish()

    pytest.importorskip("onnxruntime")
    shutil.copy(EXAMPLE, tmp_path)
    assert len(EXAMPLE.read_text().splitlines()) < 60
    plugin = ("--plugin", "own_student.py")
    train = ("train", *plugin, "--student", "patches", "--recipe", "clip-rd", "--size", "debug",
             "--out", "run", "train.batch_size=8", "data.size=32", "validation.size=16")  # fmt: skip
    run(*train, "train.steps=2", "train.checkpoint_every=1")
    described = json.loads((tmp_path / "run/student/model.json").read_text())
    assert described["architecture"] | {"module": ""} == {
        "module": "",
        "student": "patches",
        "plugin": "own_student.py",
    }
    # again, from the checkpoint of step 2
    said = run(*train, "train.steps=3", "train.checkpoint_every=1", "--allow-changes")
    assert "from step 2" in said
    scores = run("eval", *plugin, "run", "--data", "scenes:val?size=16", "--quiet", "--device", "cpu")
    assert "R@1" in scores
    run("export", *plugin, "run", "--to", "onnx", "--out", "exported")
    (tmp_path / "check.py").write_text(CHECK)
    run("check.py")
