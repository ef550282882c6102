"""Reading run folders: what is there is read, what is missing is empty, what is broken is one clear sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from clipdistill.errors import InputError
from clipdistill.report.data import CURVE_POINTS, read_run, read_runs, thin
from tests.report.synthetic import scores_of, write_run, write_scores


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "rd", "clip-rd", seed=3))
    assert (run.name, run.method_name, run.teacher, run.seed) == ("rd", "CLIP-RD", "scenes-teacher", 3)
    assert list(run.losses)[:2] == ["total", "task"]
    assert "xrd" in run.losses
    assert set(run.evaluations) == {"t2i_R@1", "i2t_R@1"}
    assert run.evaluations["t2i_R@1"].y[-1] == pytest.approx(0.437)
    assert {row.role for row in run.scores} == {"student", "teacher"}
    assert run.bad_samples == {"empty caption": 1, "truncated image": 1}
    assert run.bad_examples[0] == ("scene-00017", "truncated image: 812 of 2,113 bytes")
    assert run.command.startswith("clipdistill train")


def test_an_unfinished_run_has_only_run_json(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "early", "method": "clip-kd", "status": "running"}))
    run = read_run(tmp_path)
    assert (run.status, run.scores, run.losses, run.evaluations, run.seed) == ("running", [], {}, {}, None)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("run.json", "{\n 'x'", r"run\.json \(line 2\): not readable as JSON"),
        ("run.json", "[1]", "expected a JSON object, found a list"),
        ("run.json", "\0" * 30, "holds only NUL bytes"),
        ("run.json", '{"format": 7}', "format 7, this version reads 1"),
        ("run.json", '{"steps": "many"}', "'steps' must be a whole number"),
        ("scores.json", '{"format": 1}', "scores"),
        ("scores.json", '{"format": 1, "scores": [{"metric": "x"}]}', "score 0"),
        ("scores.npz", "not an archive", r"scores\.npz: damaged, or of another measurement"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        (
            "log.jsonl",
            '{"step": 1}\nbroken\n{"step": 2}\n',
            "log.jsonl: 1 line is not as clipdistill writes them (line 2",
        ),
        ("log.jsonl", '{"samples": 1}\n[]\n', "log.jsonl: 2 lines are not as clipdistill writes them (line 1"),
        ("log.jsonl", b"\xff\xfe\n", "log.jsonl: 1 line is"),
        ("eval.jsonl", '{"step": 1}\n', "eval.jsonl: 1 line is"),
        ("bad_samples.jsonl", "3\n", "bad_samples.jsonl: 1 line is"),
        ("student/model.json", "\0\0", "model.json: holds only NUL bytes"),
        ("student/model.json", "[]", "found a list"),
    ],
)
def test_what_the_report_can_do_without_is_told_and_left_out(tmp_path, name, content, note) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    [told] = read_run(folder).notes
    assert note in told


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"a run folder has a run\.json"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no run folder was given"):
        read_runs([])


def run_with(tmp_path: Path, name: str, content: str):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / name).write_text(content)
    return read_run(tmp_path)


def test_a_line_cut_by_a_crash_is_forgiven_at_the_end(tmp_path: Path) -> None:
    run = run_with(
        tmp_path, "log.jsonl", '{"step": 1, "samples": 8, "total": 2.0, "terms": {"task": 2.0}}\n{"step": 2, "sam'
    )
    assert run.losses["total"].x == (8.0,)
    assert run.notes == []


def test_steps_written_twice_after_a_resume_count_once(tmp_path: Path) -> None:
    rows = [{"step": s, "samples": 8 * s, "total": v} for s, v in ((1, 5.0), (2, 4.0), (3, 9.0), (2, 4.5), (3, 3.0))]
    total = run_with(tmp_path, "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows)).losses["total"]
    assert total.x == (8.0, 16.0, 24.0)
    assert total.y == (5.0, 4.5, 3.0)


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = '{"step": 1, "total": 1.0}\n{"step": 2, "total": NaN}\n{"step": 3, "total": Infinity}\n'
    total = run_with(tmp_path, "log.jsonl", lines + '{"step": 4, "total": 1' + "0" * 400 + "}\n").losses["total"]
    assert total.y == (1.0,)
    assert total.not_finite == 2
    run = run_with(tmp_path, "eval.jsonl", '{"step": 4, "samples": 4, "scores": {"top1": 0.5, "note": "x"}}\n')
    assert set(run.evaluations) == {"top1"}


def test_long_curves_are_thinned_and_keep_their_ends_and_mean() -> None:
    points = [(float(i), math.sin(i / 300)) for i in range(10_000)]
    curve = thin(points)
    assert len(curve.x) == CURVE_POINTS
    assert (curve.x[0], curve.x[-1]) == (0.0, 9999.0)
    assert list(curve.x) == sorted(curve.x)
    assert np.mean(curve.y) == pytest.approx(np.mean([y for _, y in points]), abs=0.01)


def test_the_same_name_twice_is_told_apart_and_the_same_folder_is_read_once(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "x" / "rd"), write_run(tmp_path / "y" / "rd")
    assert [run.name for run in read_runs([a, b, a])] == ["x/rd", "y/rd"]


def test_queries_and_retention_are_read_where_they_were_kept(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    rows = [*scores_of("student", (0.4, 0.5, 0.6), "s"), *scores_of("teacher", (0.5, 0.5, 0.6), "t")]
    write_scores(folder / "scores.json", rows, {"t2i_R@1": np.repeat([1.0, 0.0], [1600, 2400])})
    run = read_run(folder)
    record = next(row for row in run.scores if (row.role, row.metric) == ("student", "t2i_R@1"))
    question = record.question
    assert record.per_query.mean() == pytest.approx(0.4)
    assert run.retention["t2i_R@1", question][0] == pytest.approx(0.8)
