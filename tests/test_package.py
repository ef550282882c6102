"""What a wheel holds: all that the package reads at run time, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_extra_that_a_sentence_names_exists():
    """`pip install 'clipdistill[NAME]'` in the code and in the book."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    places = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    written = re.compile(r"pip install[^\n]*?(?:clipdistill|\.)\[([\w, -]+)\]|needing\(\s*\"[\w.-]+\", \"([\w-]+)\"")
    found = [pair for path in places for pair in written.findall(path.read_text(encoding="utf-8"))]
    named = {name.strip() for pair in found for name in ",".join(filter(None, pair)).split(",")}
    assert len(named) > 3
    assert named <= extras


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "src/clipdistill"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert {name.removeprefix("src/") for name in listed} <= held
    assert "clipdistill/py.typed" in held
    others = {name for name in held if not name.startswith("clipdistill/") and ".dist-info/" not in name}
    assert others == set()
    assert wheel.stat().st_size < 7_000_000  # 5 of them are the demo's teacher


def test_libraries_report_nothing_to_their_makers():
    """onnxruntime reads the variable when its first session is made; OpenVINO and NNCF go on where the import fails."""
    program = """
import os, clipdistill
print(os.environ["ORT_DISABLE_TELEMETRY"])
try:
    import openvino_telemetry
except ImportError:
    print("absent")
"""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for own, told in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        ran = subprocess.run(
            [sys.executable, "-c", program], env={**environment, **own}, check=True, capture_output=True, text=True
        )
        assert ran.stdout.split() == [told, "absent"]
