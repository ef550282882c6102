"""`benchmarks/gpu.py` runs on a CPU up to the device call, so that minutes on a GPU are not lost to a mistake."""

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_script", REPOSITORY / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(700)  # a part has 600 s of a busy machine
@pytest.mark.parametrize("part", ["recipes", "steps", "trainer", "cache", "objective"])
def test_every_part_runs_on_a_cpu(script, part, monkeypatch):
    monkeypatch.setitem(script.LIMITS, part, 600)
    if part == "trainer":
        pytest.importorskip("open_clip_train")
        pytest.importorskip("webdataset")
    if part == "objective":
        pytest.importorskip("matplotlib")
    *rows, whole = script.measure(part, "cpu", small=True)
    assert whole["note"] == "passed"
    assert rows
    assert all(row["value"] > 0 for row in rows)


def test_the_parts_take_at_most_eight_minutes_together(script):
    assert sum(script.LIMITS.values()) <= 8 * 60


def test_a_part_that_fails_or_hangs_is_a_row(script, monkeypatch):
    ways = {"cache": ["-c", "raise SystemExit('no memory left')"], "steps": ["-c", "import time; time.sleep(60)"]}
    monkeypatch.setattr(script, "command_of", lambda part, *_: [sys.executable, *ways[part]])
    monkeypatch.setitem(script.LIMITS, "steps", 1)
    assert script.measure("cache", "cpu", small=True)[-1]["note"] == "FAILED (1): no memory left"
    assert script.measure("steps", "cpu", small=True)[-1]["note"].startswith("FAILED (124): over its limit of 1 s")


def test_every_recipe_engine_and_precision_is_among_the_cases(script):
    from clipdistill.recipes import recipe_names

    names = {name for name, _ in script.cases(small=False)}
    assert {name for name in recipe_names() if not name.endswith("-stages")} == names
    settings = [text for _, texts in script.cases(small=True) for text in texts]
    for setting, value in (("objective.engine", "tiled"), ("train.precision", "fp16"), ("train.compile", "true")):
        assert f"{setting}={value}" in settings


def test_what_it_needs_is_installed_before_it():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    steps = makefile.split("\ntest-gpu:")[1].split("\n\n")[0].splitlines()
    assert "benchmarks]'" in steps[1]
    assert "benchmarks/gpu.sh" in steps[2]
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"matplotlib>=3.8", "webdataset==0.2.86"} <= set(extras["optional-dependencies"]["benchmarks"])
