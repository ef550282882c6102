"""Matching measured models to entries, sizes, ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipdistill.models.known import architecture_fingerprint
from clipdistill.report.data import read_runs
from clipdistill.report.tables import build_table
from clipdistill.report.trade import Trade, read_trade
from tests.report.synthetic import scores_of, write_bench, write_run, write_scores


def trade_of(*folders: Path) -> Trade:
    runs = read_runs(folders)
    return read_trade(runs, build_table(runs))


def test_models_are_matched_by_weights_before_names(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    path = write_bench(tmp_path / "bench.json", {"some-path": (10.0, 20.0), "stranger": (5.0, 5.0)})
    bench = json.loads(path.read_text())
    bench["models"]["some-path"]["fingerprint"] = "clip-rd-0-weights"
    path.write_text(json.dumps(bench))
    [device] = trade_of(folder).devices
    assert {(s.name, s.entry.label if s.entry else None) for s in device.speeds} == {
        ("CLIP-RD", "CLIP-RD"),
        ("stranger", None),
    }


def test_students_of_one_architecture_share_a_measurement(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("clip-kd", "clip-rd")]
    for folder in folders:
        (folder / "student").mkdir()
        (folder / "student" / "model.json").write_text(json.dumps({"architecture": {"layers": 4, "width": [1, 2]}}))
    assert architecture_fingerprint({"width": (1, 2), "layers": 4}) == read_runs(folders)[0].architecture
    write_bench(folders[0] / "bench.json", {"student": (4200.0, 9100.0)})
    [device] = trade_of(*folders).devices
    lent = [s for s in device.speeds if s.entry and s.entry.label == "CLIP-RD"]
    assert lent
    assert all(s.borrowed == "CLIP-KD" for s in lent)
    assert lent[0].rates["image"].value == 4200.0


def test_ratios_of_common_rounds_are_preferred(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    path = write_bench(tmp_path / "bench.json", {"teacher": (100.0, 100.0), "rd": (300.0, 300.0)})
    runs = read_runs([folder])
    table = build_table(runs)
    student, teacher = table.students[0], table.teachers[0]
    setting = ("eager", "float32", 32)
    before = read_trade(runs, table).devices[0].ratio(student, teacher, "pair", setting)
    assert before is not None
    assert (before.value, before.low, before.high) == pytest.approx((3.0, 3 * 0.97 / 1.02, 3 * 1.02 / 0.97))
    bench = json.loads(path.read_text())
    row = {"model": "rd", "reference": "teacher", "tower": "pair", "backend": "eager", "dtype": "float32", "batch": 32}
    bench["ratios"] = [{**row, "value": 3.0, "low": 2.99, "high": 3.01}]
    path.write_text(json.dumps(bench))
    after = read_trade(runs, table).devices[0].ratio(student, teacher, "pair", setting)
    assert after is not None
    assert (after.low, after.high) == (2.99, 3.01)


def test_sizes_come_from_the_run_when_nothing_was_measured(tmp_path: Path) -> None:
    sizes = trade_of(write_run(tmp_path / "rd")).sizes
    assert sizes["CLIP-RD"].parameters == 1_900_001
    assert sizes["teacher"].parameters == 11_000_001


@pytest.mark.parametrize(
    "change",
    [
        {"models": 3},
        {"measurements": [{"model": "x"}]},
        {"measurements": "none"},
        {"ratios": [{"model": "rd", "reference": "teacher"}]},
        {"failures": [3]},
        {"device": []},
        {"libraries": 3},
    ],
)
def test_a_broken_benchmark_is_told_and_nothing_of_it_is_shown(tmp_path: Path, change: dict[str, object]) -> None:
    folder = write_run(tmp_path / "rd")
    path = write_bench(tmp_path / "bench.json", {"teacher": (100.0, 100.0), "rd": (300.0, 300.0)})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    trade = trade_of(folder)
    [notice] = trade.notices
    assert notice.startswith(f"{path}: not as clipdistill writes it")
    assert (trade.devices, trade.failures) == ([], [])


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"[1]", b'{"device": ', b"\xff"])
def test_a_benchmark_that_is_no_json_is_told(tmp_path: Path, content: bytes) -> None:
    folder = write_run(tmp_path / "rd")
    (folder / "bench.json").write_bytes(content)
    [notice] = trade_of(folder).notices
    assert notice.startswith(str(folder / "bench.json"))
    assert notice.endswith("it is left out here.")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0, -3, 1e308, 10**400, True, "3", None])
@pytest.mark.parametrize("key", ["value", "low", "high"])
def test_speeds_that_no_chart_can_show_are_told(tmp_path: Path, key: str, value: object) -> None:
    folder = write_run(tmp_path / "rd")
    path = write_bench(tmp_path / "bench.json", {"student": (10.0, 20.0)})
    bench = json.loads(path.read_text())
    bench["measurements"][0][key] = value
    path.write_text(json.dumps(bench))
    trade = trade_of(folder)
    assert trade.devices == []
    assert "no positive number" in trade.notices[0]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0, -3, 1e308, 10**400, True, "3", None, []])
def test_sizes_that_are_none_are_left_out(tmp_path: Path, value: object) -> None:
    folder = write_run(tmp_path / "rd")
    facts = json.loads((folder / "run.json").read_text())
    facts["parameters"] = {"total": value, "image": 5}
    (folder / "run.json").write_text(json.dumps(facts))
    size = trade_of(folder).sizes["CLIP-RD"]
    assert (size.parameters, size.image_parameters) == (None, 5)


def test_a_teacher_that_was_not_measured_is_not_another_runs(tmp_path: Path) -> None:
    """One run's teacher has scores; the other's has only a speed, of other weights."""
    first, second = write_run(tmp_path / "kd", "clip-kd", teacher="small"), write_run(tmp_path / "rd", teacher="large")
    write_scores(second / "scores.json", scores_of("student", (0.4,) * 3, "rd"))
    for folder, weights, speed in ((first, "teacher-weights", 100.0), (second, "other", 7.0)):
        path = write_bench(folder / "bench.json", {"teacher": (speed, speed)})
        bench = json.loads(path.read_text())
        bench["models"]["teacher"]["fingerprint"] = weights
        path.write_text(json.dumps(bench))
    [device] = trade_of(first, second).devices
    found = {(s.name, s.entry is None): s.rates["image"].value for s in device.speeds if s.batch == 32}
    assert found == {("teacher", False): 100.0, ("teacher of rd", True): 7.0}
