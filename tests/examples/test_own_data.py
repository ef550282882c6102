"""examples/own_data.py, from a folder outside the package: an object and a format of one's own."""

from __future__ import annotations

import json
import shutil
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


def test_data_from_a_file_outside_the_package(tmp_path: Path, launcher: Launcher) -> None:
    def run(program: str) -> str:
        return launcher.start(program, folder=tmp_path, environment={"HF_HUB_OFFLINE": "1"}).finish()

    shutil.copy(EXAMPLE, tmp_path)
    assert len(EXAMPLE.read_text().splitlines()) < 60
    assert "R@1" in run("own_data.py")
    data = yaml.safe_load((tmp_path / "runs/flags/recipe.yaml").read_text())["data"]
    assert data["path"].startswith("object:Flags@")
    # the same object again is the same run; another one is refused
    (tmp_path / "another.py").write_text("import clipdistill.errors\n" + ANOTHER)
    said = run("another.py")
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
