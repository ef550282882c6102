"""The page and the targets of benchmarks/deploy.py, from made-up rates."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "deploy.py"


@pytest.fixture(scope="module")
def deploy():
    specification = importlib.util.spec_from_file_location("deploy", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


RATES = {
    "teacher, torch": 4.0,
    "student, torch": 40.0,
    "student, onnx float32": 64.0,
    "student, onnx int8": 80.0,
    "student, openvino float32": 56.0,
    "student, openvino int8": 112.0,
}


def made_up(lost: float):
    rows = [
        {
            "tower": "image", "batch": batch, "variant": name, "per_second": rate, "low": rate, "high": rate,
            "median_ms": 1000 / rate,
            "ratios": {other: (rate / r * batch,) * 3 for other, r in RATES.items() if other != name},
        }
        for batch in (1, 2)
        for name, rate in RATES.items()
    ]  # fmt: skip
    score = {"i2t_R@1": 0.5, "t2i_R@1": 0.4, "protocol": "retrieval, standard: x, 10 images, 50 captions"}
    facts = {"before": score, "after": score, "points_lost": lost, "towers": {"image": "image tower: int8"}}
    return {
        "student": "s", "teacher": "t", "threads": 2, "device": {"label": "two cores"}, "warnings": ["busy"],
        "rows": rows, "int8": {"onnx": facts},
    }  # fmt: skip


def test_targets_take_the_best_setting_and_say_which(deploy):
    found = {t["name"]: t for t in deploy.targets(made_up(lost=1.2))}
    against_teacher = found["exported student (float32) against the teacher in torch"]
    assert against_teacher["value"] == pytest.approx(32)
    assert against_teacher["where"] == "onnx float32, batch 2"
    assert against_teacher["reached"]
    assert found["onnx: int8 against its float32 export"]["value"] == pytest.approx(2.5)
    assert not found["onnx: points of R@1 lost by int8"]["reached"]
    assert "openvino: points of R@1 lost by int8" not in found


def test_the_page_shows_every_row_and_target(deploy):
    result = made_up(lost=-0.1)
    result["targets"] = deploy.targets(result)
    page = deploy.markdown(result)
    assert page.count("| image |") == 12
    assert "| at least 15 x | 32.00 x (32.00 to 32.00), onnx float32, batch 2 |" in page
    assert "| onnx: points of R@1 lost by int8 | at most 1 | -0.10 |" in page
    assert "50.00 / 40.00 before, 50.00 / 40.00 after. image tower: int8." in page
    assert page.rstrip().endswith("Warning: busy")
