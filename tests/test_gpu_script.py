"""`benchmarks/gpu.py` runs on a CPU up to the device call, so that minutes on a GPU are not lost to a mistake."""

import importlib.util
import json
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_script", REPOSITORY / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(1000)  # a part has 900 s of a busy machine
@pytest.mark.parametrize("part", ["recipes", "steps", "trainer", "cache", "objective"])
def test_every_part_runs_on_a_cpu(script, part, monkeypatch):
    monkeypatch.setitem(script.LIMITS, part, 900)
    if part == "trainer":
        pytest.importorskip("open_clip_train")
        pytest.importorskip("webdataset")
    if part == "objective":
        pytest.importorskip("matplotlib")
    *rows, whole = script.measure(part, "cpu", small=True)
    assert whole["note"] == "passed"
    assert rows
    assert all(row["value"] > 0 for row in rows if "deviation" not in row["what"])


def test_the_parts_take_at_most_eight_minutes_together(script):
    assert sum(script.LIMITS.values()) <= 8 * 60


def test_a_part_that_fails_or_hangs_is_a_row(script, monkeypatch):
    ways = {"cache": ["-c", "raise SystemExit('no memory left')"], "steps": ["-c", "import time; time.sleep(60)"]}
    monkeypatch.setattr(script, "command_of", lambda part, *_: [sys.executable, *ways[part]])
    monkeypatch.setitem(script.LIMITS, "steps", 1)
    assert script.measure("cache", "cpu", small=True)[-1]["note"] == "FAILED (1): no memory left"
    assert script.measure("steps", "cpu", small=True)[-1]["note"].startswith("FAILED (124): over its limit of 1 s")


def test_a_case_that_takes_its_process_with_it_is_a_row_and_the_next_ones_go_on(script, monkeypatch):
    monkeypatch.setattr(script, "cases", lambda small: [(name, ()) for name in "abcd"])
    body = (
        "import json, os, sys\nfor name in 'abcd'[int((sys.argv[2:] or ['0'])[0]):]:\n"
        "    if name == 'b': os.kill(os.getpid(), 11)\n"
        "    row = {'what': name, 'value': 1.0, 'unit': 's', 'note': 'FAILED: CUDA error' if name == 'c' else 'done'}\n"
        "    print(json.dumps(row), flush=True)\n    if name == 'c': os._exit(3)\n"
    )
    monkeypatch.setattr(script, "command_of", lambda *_: [sys.executable, "-c", body])
    *rows, whole = script.measure("recipes", "cpu", small=True)
    notes = ["done", "FAILED: the process ended (-11)", "FAILED: CUDA error", "done"]
    assert [(row["what"], row["note"]) for row in rows] == list(zip("abcd", notes, strict=True))
    assert whole["note"] == "FAILED: 2 of 4"


def test_what_a_part_over_its_limit_has_started_ends_with_it_and_a_cut_line_is_no_row(script, monkeypatch):
    body = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        """print('{"what": "child", "value": %d, "unit": "", "note": ""}' % child.pid)\n"""
        """print('{"what": "cut', end='', flush=True)\ntime.sleep(99)"""
    )
    monkeypatch.setattr(script, "command_of", lambda *_: [sys.executable, "-c", body])
    row, whole = script.measure("cache", "cpu", small=True, limit=5)
    assert "over its limit of 5 s" in whole["note"]
    state = Path(f"/proc/{row['value']}/stat")
    time.sleep(0.2)
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_batch_that_does_not_fit_is_tried_in_groups(script):
    def way(micro):
        if micro is None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(micro):
        raise ValueError("no such kernel")

    (whole, no_rate, said), (micro, rate, note) = script.tried(way, (None, 256), 4096, 2, torch.device("cpu"))
    assert (whole, no_rate, said, micro, note) == (None, None, "out of memory", 256, "2 steps")
    assert rate > 0
    found = list(script.tried(broken, (None, 256), 4096, 2, torch.device("cpu")))
    assert found == [(None, None, "FAILED: ValueError: no such kernel")]


def test_a_slow_device_takes_fewer_steps(script, monkeypatch):
    monkeypatch.setattr(script, "STEP_SECONDS", 0.05)
    _, note = script.timed(lambda: time.sleep(0.03), 4, 20, torch.device("cpu"))
    assert note == "2 steps"


def test_the_table_is_written_after_each_part_and_time_that_is_left_is_the_next_ones(script, monkeypatch, tmp_path):
    limits, seen, table = [], [], tmp_path / "new" / "gpu.json"

    def measure(part, device, small, limit):
        limits.append(limit)
        seen.append(len(json.loads(table.read_text())["rows"]))
        if part == "steps":
            raise RuntimeError("unforeseen")
        return [{"what": f"{part}: whole", "value": 1.0, "unit": "s", "note": "passed"}]

    monkeypatch.setattr(script, "measure", measure)
    words = ["gpu.py", "--device", "cpu", "--parts", "tests,steps,cache", "--json", str(table)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"^failed: steps: whole$"):
        script.main()
    assert seen == [0, 1, 2]
    together = sum(script.LIMITS[part] for part in ("tests", "steps", "cache"))
    assert limits == pytest.approx([script.LIMITS["tests"], together - script.LIMITS["cache"], together], abs=5)
    notes = [row["note"] for row in json.loads(table.read_text())["rows"]]
    assert notes == ["passed", "FAILED: RuntimeError: unforeseen", "passed"]


def test_a_place_that_cannot_be_written_is_told_before_the_minutes_are_gone(script, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--json", str(tmp_path / "file" / "gpu.json")])
    with pytest.raises(OSError, match="file"):
        script.main()


def test_why_there_is_no_gpu_is_said(script, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA" in script.obstacle()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert "built for CUDA 13.0, finds no device (The NVIDIA driver on your system is too old)" in script.obstacle()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.obstacle() == ""


def test_packages_that_are_missing_are_told_first(script, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    assert script.missing(list(script.LIMITS)) == {"objective": "matplotlib"}


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
