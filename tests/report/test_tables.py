"""Entries, columns, retention and comparisons: protocols never mix, seeds become one entry, p-values are corrected."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clipdistill.report.data import read_runs
from clipdistill.report.tables import ScoreTable, build_table, compare, metric_name
from clipdistill.statistics.bootstrap import holm
from tests.report.synthetic import PROTOCOL, score, scores_of, write_run, write_scores


def table_of(*folders: Path) -> ScoreTable:
    return build_table(read_runs(folders))


def test_teacher_first_then_students_in_order(tmp_path: Path) -> None:
    table = table_of(write_run(tmp_path / "a", "clip"), write_run(tmp_path / "b", "clip-kd"))
    assert [e.label for e in table.entries] == ["teacher", "contrastive only", "CLIP-KD"]
    assert [e.colour for e in table.entries] == [0, 1, 2]
    assert [c.metric for c in table.lead] == ["t2i_R@1", "i2t_R@1", "top1"]


def test_protocols_never_share_a_column(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    first = PROTOCOL.model_copy(update={"name": "first-caption", "captions_per_image": "first", "captions": 1000})
    rows = scores_of("student", (0.4, 0.5, 0.6), "s") + [score("t2i_R@1", 0.2, 1000, first, "student", "s")]
    write_scores(folder / "scores.json", rows)
    table = table_of(folder)
    columns = [c for c in table.columns if c.metric == "t2i_R@1"]
    assert [c.cells["CLIP-RD"].value for c in columns] == [0.4, 0.2]
    assert columns[0].number != columns[1].number
    assert table.title_of(columns[0]) == "Text→image R@1 [1]"


def test_scores_of_other_samples_are_another_column(tmp_path: Path) -> None:
    other = PROTOCOL.model_copy(update={"keys_sha256": "ab" * 32})
    folders = [write_run(tmp_path / "a", "clip-kd"), write_run(tmp_path / "b", "clip-rd")]
    write_scores(folders[1] / "scores.json", [score("t2i_R@1", 0.9, 4000, other, "student", "s")])
    table = table_of(*folders)
    assert not any({"CLIP-KD", "CLIP-RD"} <= set(c.cells) for c in table.columns)
    assert compare(table) == []


def test_seeds_of_one_recipe_become_one_entry_with_students_interval(tmp_path: Path) -> None:
    shifts = (0.0, 0.02, -0.01)
    folders = [write_run(tmp_path / f"s{i}", "clip-rd", seed=i, shift=v) for i, v in enumerate(shifts)]
    table = table_of(*folders)
    [entry] = table.students
    cell = table.lead[0].cells[entry.label]
    values = [0.437 + v for v in shifts]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert cell.seeds == 3
    assert (cell.value, cell.low, cell.high) == pytest.approx((np.mean(values), low, high))


def test_the_interval_of_a_share_stays_within_the_possible(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"s{i}", "clip-rd", seed=i, shift=v) for i, v in enumerate((-0.3, 0.3))]
    table = table_of(*folders)
    [entry] = table.students
    cell = table.lead[0].cells[entry.label]
    assert (cell.low, cell.high) == (0, 1)  # Student's alone would lie far outside


def test_the_same_seed_twice_is_not_two_seeds(tmp_path: Path) -> None:
    table = table_of(write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=1))
    assert [e.label for e in table.students] == ["CLIP-RD (a)", "CLIP-RD (b)"]


def test_another_recipe_is_another_entry(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2)
    (b / "recipe.yaml").write_text("recipe: clip-rd\nobjective: {weights: {xrd: 0}}\n")
    assert len(table_of(a, b).students) == 2


def test_retention_by_the_delta_method(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    table = table_of(folder)
    column, [student] = table.lead[0], table.students
    kept = table.retention(student, column)
    assert kept is not None
    assert kept.value == pytest.approx(0.437 / 0.522)
    errors = [math.sqrt(v * (1 - v) / 4000) / v for v in (0.437, 0.522)]
    assert (kept.high - kept.low) / 2 == pytest.approx(1.96 * kept.value * math.hypot(*errors), rel=1e-3)
    assert table.retention(table.teachers[0], column) is None


def test_a_student_without_a_teacher_is_compared_with_its_rivals_teacher(tmp_path: Path) -> None:
    table = table_of(write_run(tmp_path / "a", "clip"), write_run(tmp_path / "b", "clip-kd"))
    kept = table.retention(table.students[0], table.lead[0])
    assert kept is not None
    assert kept.value == pytest.approx(0.431 / 0.522 if table.students[0].method == "clip-kd" else kept.value)


def test_differences_without_results_of_single_queries_take_the_widest_interval(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("contrastive", "clip-kd", "clip-rd")]
    compared = compare(table_of(*folders))
    found = [c for c in compared if c.column.metric == "t2i_R@1"]
    assert [(c.challenger.method, c.baseline.method) for c in found] == [
        ("clip-kd", "contrastive"),
        ("clip-rd", "contrastive"),
        ("clip-rd", "clip-kd"),
    ]
    assert [c.verdict.better for c in found] == ["better", "better", "undecided"]
    halves = [1.96 * math.sqrt(v * (1 - v) / 4000) for v in (0.437, 0.431)]
    assert found[2].bounds == pytest.approx((0.006 - sum(halves), 0.006 + sum(halves)), abs=1e-5)
    verdicts = [c.verdict for c in compared]
    assert [v.p_holm for v in verdicts] == holm([v.p for v in verdicts])
    assert verdicts[0].family == 9


def test_the_challenger_is_the_newer_method_whatever_the_order(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("clip-rd", "contrastive")]
    assert {(c.challenger.method, c.baseline.method) for c in compare(table_of(*folders))} == {
        ("clip-rd", "contrastive")
    }


def test_kept_queries_are_compared_in_pairs_and_decide_more(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weaker = (rng.random(4000) < 0.43).astype(float)
    stronger = np.maximum(
        weaker, (rng.random(4000) < 0.02).astype(float)
    )  # right wherever the other is, and a little more
    folders = []
    for method, hits in (("clip-kd", weaker), ("clip-rd", stronger)):
        folder = write_run(tmp_path / method, method)
        rows = [score("t2i_R@1", float(hits.mean()), 4000, PROTOCOL, "student", method)]
        write_scores(folder / "scores.json", rows, {"t2i_R@1": hits})
        folders.append(folder)
    [paired] = compare(table_of(*folders))
    assert paired.verdict.queries == 4000
    assert paired.decided
    for folder in folders:
        (folder / "scores.npz").unlink()
    [unpaired] = compare(table_of(*folders))
    assert unpaired.verdict.queries is None
    assert not unpaired.decided
    assert unpaired.difference == pytest.approx(paired.difference)


def test_unequal_budgets_are_named(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", "clip-kd"), write_run(tmp_path / "b", "clip-rd", samples=192_000)]
    [sentence] = compare(table_of(*folders))[0].unequal
    assert "96,000" in sentence
    assert "192,000" in sentence


def test_notices_of_what_cannot_be_trusted(tmp_path: Path) -> None:
    running = write_run(tmp_path / "a", "clip-kd", status="running")
    (running / "scores.json").unlink()
    rd = write_run(tmp_path / "b", "clip-rd")
    moved = [*scores_of("student", (0.4, 0.5, 0.6), "s"), *scores_of("teacher", (0.6, 0.5, 0.6), "teacher-weights")]
    other = write_run(tmp_path / "c", "tinyclip")
    write_scores(other / "scores.json", moved)
    notices = "\n".join(table_of(running, rd, other).notices)
    assert "a is not finished (status: running)" in notices
    assert "a has no scores.json" in notices
    assert "teacher was measured with different results (52.20, 60.00)" in notices


def test_metric_names() -> None:
    assert metric_name("i2t_mAP@10") == "Image→text mAP@10"
    assert metric_name("t2i_median_rank") == "Text→image median rank"
    assert metric_name("top1") == "Zero-shot top-1"


def test_one_teacher_measured_by_runs_that_have_it_and_one_that_does_not(tmp_path: Path) -> None:
    plain, kd = write_run(tmp_path / "a", "contrastive"), write_run(tmp_path / "b", "clip-kd")
    rows = [
        *scores_of("student", (0.3, 0.3, 0.3), "s"),
        *scores_of("teacher", (0.522, 0.548, 0.674), "teacher-weights"),
    ]
    write_scores(plain / "scores.json", rows)
    table = table_of(plain, kd)
    assert [e.label for e in table.teachers] == ["teacher"]
    assert {run.name for run in table.teachers[0].runs} == {"a", "b"}


def test_two_teachers_are_kept_apart(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", "clip-kd", teacher="small"), write_run(tmp_path / "b", "clip-rd", teacher="large")
    write_scores(
        b / "scores.json", [*scores_of("student", (0.4,) * 3, "s"), *scores_of("teacher", (0.8,) * 3, "large")]
    )
    table = table_of(a, b)
    assert [e.label for e in table.teachers] == ["teacher small", "teacher large"]
    kept = [table.retention(student, table.lead[0]) for student in table.students]
    assert [k.value for k in kept if k] == pytest.approx([0.431 / 0.522, 0.5])


def test_what_seeds_keep_has_students_interval(tmp_path: Path) -> None:
    """With two seeds a normal interval would be a sixth as wide."""
    shifts = (0.0, 0.02)
    table = table_of(*(write_run(tmp_path / f"s{i}", "clip-rd", seed=i, shift=v) for i, v in enumerate(shifts)))
    kept = table.retention(table.students[0], table.lead[0])
    assert kept is not None
    own = stats.t.ppf(0.975, 1) * stats.sem([0.437, 0.457]) / 0.447
    teacher = 1.96 * math.sqrt(0.522 * 0.478 / 4000) / 0.522
    assert (kept.high - kept.value) / kept.value == pytest.approx(math.hypot(own, teacher), rel=1e-3)
    assert kept.value - kept.low == pytest.approx(kept.high - kept.value)


def test_ranks_in_a_notice_are_ranks(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"s{i}", "clip-rd", seed=i) for i in range(2)]
    for folder, rank in zip(folders, (3.0, 4.0), strict=True):
        row = score("t2i_median_rank", 0.5, 4000, PROTOCOL, "teacher", "teacher-weights")
        own = [*scores_of("student", (0.4,) * 3, folder.name), *scores_of("teacher", (0.5,) * 3, "teacher-weights")]
        write_scores(folder / "scores.json", [*own, replace(row, value=rank)])
    assert any("different results (3.00, 4.00) in Text→image median rank" in n for n in table_of(*folders).notices)
