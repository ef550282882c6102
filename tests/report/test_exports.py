"""Exports in a report: whose they are, what is drawn, and what is left out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from clipdistill.errors import InputError
from clipdistill.report.data import read_runs
from clipdistill.report.exports import ExportsPart, read_exports
from clipdistill.report.report import write_report
from clipdistill.report.tables import build_table
from tests.report.synthetic import write_run

PROTOCOL = "retrieval, standard: flickr8k/test, 1,000 images, 5,000 captions"


def write_export(folder: Path, kind: str, made_of: str, after: float | None, ms: float, **changes: Any) -> Path:
    """The manifest of an export of the model with the fingerprint `made_of`; `after`: R@1 both ways, before 0.40."""
    found = {"before": 0.4, "after": after}
    scores = {when: {"i2t_R@1": value, "t2i_R@1": value, "protocol": PROTOCOL} for when, value in found.items()}
    values: dict[str, Any] = {
        "kind": kind,
        "name": folder.name,
        "model_fingerprint": made_of,
        "parameters": {"total": 20_000_000},
        "towers": {t: {"bytes": 9_000_000, "precision": "float32"} for t in ("image", "text")},
        "latency": {
            "device": {"label": "Example CPU, 1 thread"},
            "image": {"ms": ms, "torch_ms": 30.0, "times_torch": 30 / ms},
            "text": {"ms": ms / 3, "torch_ms": 10.0, "times_torch": 30 / ms},
        },
    }
    if after is not None:
        values["scores"] = scores
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(values | changes))
    return folder


def part_of(runs: list[Path], exports: list[Path], notices: list[str] | None = None) -> ExportsPart | None:
    found = read_runs(runs)
    return read_exports(exports, found, build_table(found), [] if notices is None else notices)


def test_an_export_belongs_to_the_student_whose_weights_it_has(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / m, m) for m in ("clip-kd", "clip-rd")]
    named = write_export(tmp_path / "anything", "onnx", "clip-rd-0-weights", 0.39, 12.0)
    write_export(runs[0] / "phone", "litert", "clip-kd-0-weights", 0.38, 15.0)
    stranger = write_export(tmp_path / "stranger", "openvino", "none", 0.2, 9.0)
    part = part_of(runs, [named, stranger])
    assert part is not None
    whose = {e.shown: e.entry.label if e.entry else None for e in part.exports}
    assert whose == {"anything": "CLIP-RD", "phone": "CLIP-KD", "stranger": None}
    assert [e.shown for e in part.exports][-1] == "stranger"
    assert part.given == [str(named), str(stranger)]


def test_one_chart_holds_one_device_and_one_protocol(tmp_path: Path) -> None:
    run = write_run(tmp_path / "rd")
    weights = "clip-rd-0-weights"
    other = {"device": {"label": "Another CPU"}, "image": {"ms": 1.0, "torch_ms": 2.0, "times_torch": 2.0}}
    exports = [
        write_export(tmp_path / "a", "onnx", weights, 0.39, 12.0),
        write_export(tmp_path / "b", "litert", weights, 0.38, 15.0),
        write_export(tmp_path / "c", "onnx", weights, 0.38, 15.0, latency=other),
        write_export(tmp_path / "d", "executorch", weights, None, 15.0),
    ]
    part = part_of([run], exports)
    assert part is not None
    assert len(part.charts) == 4  # two of each device
    first = part.charts[0]
    assert first["note"] == f"Example CPU, 1 thread; {PROTOCOL}"
    assert "CLIP-RD, litert: R@1 38.0 %" in first["svg"]
    assert "CLIP-RD, torch: R@1 40.0 %" in first["svg"]
    assert "executorch" not in first["svg"]  # measured without pairs: in the table alone
    assert len(part.grid.rows) == 4


def test_the_names_of_targets_tell_precision_and_what_did_not_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "rd")
    towers = {t: {"bytes": 5_000_000, "precision": p} for t, p in (("image", "int8"), ("text", "float32"))}
    half = {t: {"bytes": 5_000_000, "precision": "float16"} for t in ("image", "text")}
    exports = [
        write_export(tmp_path / "a", "onnx", "x", 0.39, 12.0, towers=towers),
        write_export(tmp_path / "b", "onnx", "x", 0.39, 12.0, towers=half, web={"weights": "float16"}),
        write_export(tmp_path / "c", "coreml", "x", None, 12.0, latency=None, ran=False),
    ]
    part = part_of([run], exports)
    assert part is not None
    assert [e.target for e in part.exports] == ["onnx int8", "web fp16", "coreml"]
    assert part.grid.rows[-1][1][-1] == ("not run here", "")


def test_the_page_the_markdown_and_the_csv_show_exports(tmp_path: Path) -> None:
    run = write_run(tmp_path / "rd")
    export = write_export(tmp_path / "phone", "litert", "clip-rd-0-weights", 0.39, 12.0)
    summary = write_report([run, export], tmp_path / "r.html")
    page = summary.html.read_text()
    assert 'id="exports"' in page
    assert f"report {run} {export}" in page
    assert "| litert | 39.0 / 39.0 (40.0 / 40.0 before) | 12.0 ms (torch 30.0 ms)" in summary.markdown.read_text()
    rows = [row for row in csv.DictReader(summary.csv.open()) if row["kind"] == "export"]
    assert ("image ms after export", "12.0") in {(row["measure"], row["value"]) for row in rows}
    assert {row["model"] for row in rows} == {"CLIP-RD"}
    with pytest.raises(InputError, match="no run folder was given"):
        write_report([export], tmp_path / "alone.html")


def test_damaged_manifests_and_other_folders_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "rd")
    bad = write_export(tmp_path / "bad", "litert", "x", 0.39, 12.0, towers={"image": {"bytes": -1}})
    text = write_export(tmp_path / "text", "litert", "x", 0.39, 12.0, towers=7)
    other = write_export(run / "cache", "litert", "x", 0.39, 12.0)
    (other / "manifest.json").write_text("{}")
    notices: list[str] = []
    assert part_of([run], [bad, text, other], notices) is None
    assert len(notices) == 2
    assert all("left out" in notice for notice in notices)
    assert 'id="exports"' not in write_report([run], tmp_path / "r.html").html.read_text()
