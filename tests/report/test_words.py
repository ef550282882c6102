"""The headline says what the numbers say, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipdistill.report.grids import score_cell, speed_grid
from clipdistill.report.report import collect
from clipdistill.statistics.claims import judge
from clipdistill.statistics.records import read_records
from clipdistill.statistics.verdicts import QUERIES_ALONE
from tests.report.synthetic import scores_of, write_bench, write_run, write_scores


def headline(*folders: Path) -> list[tuple[str, str]]:
    return [(s.kind, s.text) for s in collect(list(folders)).headline]


def test_a_win_a_draw_and_the_price(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("contrastive", "clip-kd", "clip-rd")]
    write_bench(tmp_path / "bench.json", {"teacher": (100.0, 400.0), "clip-rd": (800.0, 3200.0)})
    said = headline(*folders)
    assert said[0] == (
        "lead",
        "CLIP-RD has the highest text→image R@1 of the students: 43.7 % (42.2 to 45.2), "
        "84 % of the teacher's 52.2 %; CLIP-KD is too close to call.",
    )
    assert said[1][0] == "win"
    assert said[1][1].startswith(
        "CLIP-KD beats contrastive only in every headline measure: text→image R@1 +11.9 points"
    )
    assert said[3][0] == "open"
    assert said[3][1].startswith("CLIP-RD does not beat CLIP-KD here. No headline measure separates them:")
    assert said[4][0] == "cost"
    assert "17.3 % of the teacher's 11M, and encodes 8.0 times as many image-text pairs per second" in said[4][1]
    assert said[5][0] == "caution"
    assert QUERIES_ALONE in said[5][1]


@pytest.mark.parametrize("marked", [True, False], ids=["rows", "a warning of an older version"])
def test_speeds_of_a_busy_machine_are_marked_and_not_judged(tmp_path: Path, marked: bool) -> None:
    folder = write_run(tmp_path / "rd")
    path = write_bench(folder / "bench.json", {"teacher": (100.0, 400.0), "rd": (800.0, 3200.0)})
    claim, bench = "clip-rd >= 2 x teacher pairs_per_second", json.loads(path.read_text())

    def busy(*batches: int) -> str:
        rows = [row | ({"noisy": True} if marked and row["batch"] in batches else {}) for row in bench["measurements"]]
        text = "batch {}: noise: fixed arithmetic took up to 4120 % longer in some rounds, so other work ran on it"
        warnings = [] if marked else [text.format(batch) for batch in batches]
        path.write_text(json.dumps(bench | {"measurements": rows, "warnings": warnings}))
        return dict(headline(folder))["cost"]

    assert "eager, float32, batch 32." in busy()
    assert "eager, float32, batch 1." in busy(32)  # which was measured in peace
    assert judge([claim], read_records([folder]))[0].outcome == "supported"
    rows = speed_grid(collect([folder]).trade.devices[0]).rows
    assert ["nothing is judged by it" in str(row) for row in rows] == ["batch 32" in str(row) for row in rows]
    assert "other work slowed the machine several times over, so no ratio is given" in busy(1, 32)
    [verdict] = judge([claim], read_records([folder]))
    assert verdict.outcome == "undecided"
    assert "other work slowed the machine" in verdict.reason


def test_a_newer_method_that_is_worse_is_said_to_be_worse(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "kd", "clip-kd"), write_run(tmp_path / "rd", "clip-rd", shift=-0.1)]
    kinds = dict(headline(*folders))
    assert kinds["loss"].startswith(
        "CLIP-RD does not beat CLIP-KD here, it does worse: text→image R@1 −9.4 points (−12.4 to"
    )
    assert kinds["lead"].startswith("CLIP-KD has the highest")
    assert "too close" not in kinds["lead"]


def test_methods_that_trade_places(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("clip-kd", "clip-rd")]
    write_scores(folders[0] / "scores.json", scores_of("student", (0.5, 0.3, 0.5), "a"))
    write_scores(folders[1] / "scores.json", scores_of("student", (0.3, 0.5, 0.5), "b"))
    assert any(kind == "open" and "CLIP-RD and CLIP-KD trade places" in text for kind, text in headline(*folders))


def test_partly_decided(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("clip-kd", "clip-rd")]
    write_scores(folders[0] / "scores.json", scores_of("student", (0.3, 0.5, 0.5), "a"))
    write_scores(folders[1] / "scores.json", scores_of("student", (0.5, 0.5, 0.5), "b"))
    [text] = [text for kind, text in headline(*folders) if kind == "win"]
    assert text.startswith("CLIP-RD beats CLIP-KD: text→image R@1 +20.0 points")
    assert "Not decided: image→text R@1" in text


def test_one_student_alone(tmp_path: Path) -> None:
    said = headline(write_run(tmp_path / "rd"))
    assert said[0][1].startswith("CLIP-RD reaches text→image R@1 43.7 %")
    assert said[1] == ("cost", "CLIP-RD has 1.9M parameters, 17.3 % of the teacher's 11M. Its speed was not measured.")
    assert len(said) == 2


def test_nothing_evaluated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    (folder / "scores.json").unlink()
    [(kind, text)] = headline(folder)
    assert kind == "caution"
    assert "nothing can be said about accuracy" in text


def test_unequal_budgets_are_a_caution(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", "clip-kd"), write_run(tmp_path / "b", "clip-rd", samples=192_000)]
    assert any(
        "differ in more than the method: budget" in text for kind, text in headline(*folders) if kind == "caution"
    )


def test_a_student_without_a_teacher_keeps_nothing_of_one(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "plain", "contrastive", shift=0.3), write_run(tmp_path / "kd", "clip-kd")]
    lead = dict(headline(*folders))["lead"]
    assert "Contrastive only has the highest" in lead
    assert "117 % of the other methods' teacher's 52.2 %" in lead
    report = collect(folders)
    cells = {e.label: score_cell(e, report.table.lead[0], report.table).kept for e in report.table.students}
    assert cells == {"contrastive only": "117 % of teacher", "CLIP-KD": "83 %"}


def test_a_measure_that_one_side_lacks_is_not_won(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("contrastive", "clip-kd")]
    rows = [row for row in scores_of("student", (0.312, 0.351, 0.402), "plain") if row.metric not in ("top1", "top5")]
    write_scores(folders[0] / "scores.json", rows)
    won = dict(headline(*folders))["win"]
    assert won.startswith("CLIP-KD beats contrastive only: text→image R@1")


def test_a_student_that_is_much_slower_is_not_zero_times_as_fast(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    write_bench(folder / "bench.json", {"teacher": (800.0, 3200.0), "rd": (32.0, 128.0)})
    assert "encodes 0.04 times as many" in dict(headline(folder))["cost"]
