"""examples/own_data.py, from a folder outside the package: an object and a format of one's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.reliability.support import Launcher

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_data.py"
ANOTHER = """
import own_data
import clipdistill as cd
settings = {"recipe": "clip-rd", "size": "debug", "out": "runs/flags", "validation": own_data.Flags(1000, 32)}
for flags in (own_data.Flags(0, 64), own_data.Flags(5, 64)):
    try:
        cd.distill({**settings, "data": flags})
        print("the same flags are taken")
    except cd.errors.InputError as error:
        print(f"refused: {error}")
"""


def run(folder: Path, program: str) -> str:
    """A program in a process of its own; what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_data_from_a_file_outside_the_package(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    assert len(EXAMPLE.read_text().splitlines()) < 60
    assert "R@1" in run(tmp_path, "own_data.py")
    data = yaml.safe_load((tmp_path / "runs/flags/recipe.yaml").read_text())["data"]
    assert data["path"].startswith("object:Flags@")
    # the same object again is the same run; another one is refused
    (tmp_path / "another.py").write_text("import clipdistill.errors\n" + ANOTHER)
    said = run(tmp_path, "another.py")
    assert "the same flags are taken" in said
    assert "refused: " in said
    assert "data" in said.split("refused: ")[1]


@pytest.mark.slow
def test_a_format_of_ones_own_from_the_shell(tmp_path: Path, launcher: Launcher) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    command = ("train", "--plugin", "own_data.py", "--recipe", "clip-rd", "--size", "debug", "--data", "flags:train")
    launcher.start(*command, "--validation", "flags:val", "--out", "run", "train.steps=2", folder=tmp_path).finish()
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert "flags" in json.dumps(told)
