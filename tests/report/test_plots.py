"""Charts: valid, escaped, small; axes with sensible ticks; one device a chart; the Pareto front."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from clipdistill.report import plots
from clipdistill.report.data import read_runs
from clipdistill.report.svg import Axis, Chart, marker
from clipdistill.report.tables import build_table, compare
from clipdistill.report.trade import pareto, read_trade
from clipdistill.runtime.console import compact, rate
from tests.report.synthetic import write_bench, write_demo, write_run


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in parse(svg).iter("title")]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0523, "0.0523"), (12, "12"), (999.9, "1k"), (1500, "1.5k"), (4.02e7, "40.2M")]
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(("value", "text"), [(2.408, "2.41"), (48.62, "48.6"), (2912.3, "2,910"), (0, "0")])
def test_rates(value: float, text: str) -> None:
    assert rate(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.44), (-3, 250), (5, 5), (0, 0), (1e-6, 3e-6)])
def test_linear_ticks_are_few_and_inside(low: float, high: float) -> None:
    axis = Axis(low, high, "x")
    assert 2 <= len(axis.ticks) <= 8
    assert all(-0.001 <= axis(tick) <= 1.001 for tick in axis.ticks)


@pytest.mark.parametrize(("low", "high"), [(1, 1000), (486, 2910), (3e6, 4e6), (7, 7), (1, 1e9)])
def test_logarithmic_ticks_are_few_and_inside(low: float, high: float) -> None:
    axis = Axis(low, high, "x", log=True)
    assert 2 <= len(axis.ticks) <= 6
    assert all(-0.001 <= axis(tick) <= 1.001 for tick in axis.ticks)
    assert axis(low) <= axis(high)


def test_names_and_tips_are_escaped() -> None:
    chart = Chart(Axis(0, 1, "<x>"), Axis(0, 1, "&y"), 'a "name" <b>')
    chart.point(0.5, 0.5, 2, "<script>alert(1)</script> & more")
    chart.label(0.5, 0.5, "<i>name</i>", 2)
    chart.line([0, 1], [0, 1], 3, "tip </title><script>")
    svg = chart.render()
    assert titles(svg) == ["<script>alert(1)</script> & more", "tip </title><script>"]
    assert "<script" not in svg
    assert parse(svg).get("aria-label") == 'a "name" <b>'


def test_labels_do_not_cover_each_other() -> None:
    chart = Chart(Axis(0, 1, "x"), Axis(0, 1, "y"), "crowded")
    for i in range(4):
        chart.point(0.5 + 0.002 * i, 0.5, i, "")
    for i in range(4):
        chart.label(0.5 + 0.002 * i, 0.5, f"model {i}", i)
    boxes = []
    for text in parse(chart.render()).iter("text"):
        if "name" in (text.get("class") or ""):
            wide = 6.6 * len(text.text or "")
            x, y = float(text.get("x", 0)), float(text.get("y", 0))
            left = x - {"start": 0, "end": wide, "middle": wide / 2}[text.get("text-anchor", "start")]
            boxes.append((left, y - 11, left + wide, y + 3))
    assert len(boxes) == 4
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_markers_differ_in_shape_not_only_in_colour() -> None:
    assert len({re.sub(r"s\d", "", marker(colour, 8, 8, 5)) for colour in range(7)}) == 7


def test_pareto_front() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 4.5), (4.0, 1.0), (4.0, 0.5)]
    assert pareto(points, larger_x=True) == [0, 2, 3]
    assert pareto(points, larger_x=False) == [0]
    assert pareto([(1.0, 1.0), (1.0, 1.0)], larger_x=True) == [0, 1]


def test_every_chart_of_the_demo_is_valid_and_says_its_numbers_on_hover(tmp_path: Path) -> None:
    runs = read_runs(write_demo(tmp_path))
    table = build_table(runs)
    trade = read_trade(runs, table)
    column = table.lead[0]
    speed = plots.speed_chart(trade.devices[0], table, column)
    assert any(t.startswith("CLIP-RD: Text→image R@1 43.7 % (42.2 to 45.2), 2,910 pairs/s") for t in titles(speed))
    assert parse(speed).find(".//polyline[@class='front']") is not None
    assert any("1.9M parameters" in t for t in titles(plots.size_chart(trade, table, column)))
    assert any("CLIP-RD minus CLIP-KD" in t for t in titles(plots.difference_chart(column, compare(table))))
    assert "hollow" in plots.difference_chart(column, compare(table))
    assert len(titles(plots.forest_chart(column, table.entries))) == 4
    evaluation = plots.evaluation_charts(table)
    where = "on a sample of the validation set"  # runs of older versions did not write how large it was
    assert [title for title, _ in evaluation] == [f"Text→image R@1 {where}", f"Image→text R@1 {where}"]
    losses = dict(plots.loss_charts(table))
    assert list(losses)[:2] == ["total loss", "task loss"]
    assert all(len(svg) < 60_000 for svg in losses.values())
    for svg in [*losses.values(), *(svg for _, svg in evaluation)]:
        assert parse(svg).get("viewBox")


def test_two_devices_never_share_a_chart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("clip-kd", "clip-rd")]
    rates = {"teacher": (610.0, 2400.0), "clip-kd": (4200.0, 9100.0)}
    write_bench(folders[0] / "bench.json", rates, "CPU one")
    write_bench(folders[1] / "bench.json", {**rates, "clip-rd": (4300.0, 9100.0)}, "GPU two")
    runs = read_runs(folders)
    table = build_table(runs)
    devices = read_trade(runs, table).devices
    assert [device.label for device in devices] == ["CPU one", "GPU two"]
    charts = [plots.speed_chart(device, table, table.lead[0]) for device in devices]
    assert ["CLIP-RD" in chart for chart in charts] == [False, True]


def test_no_chart_of_one_point(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "kd", "contrastive")
    write_bench(tmp_path / "bench.json", {"kd": (1.0, 1.0)})
    runs = read_runs([folder])
    table = build_table(runs)
    assert plots.speed_chart(read_trade(runs, table).devices[0], table, table.lead[0]) == ""


def test_noise_between_students_of_one_architecture_moves_none_of_them(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("contrastive", "clip-kd")]
    for folder in folders:
        (folder / "student").mkdir()
        (folder / "student" / "model.json").write_text('{"architecture": {"layers": 4}}')
    write_bench(
        tmp_path / "bench.json", {"teacher": (610.0, 2400.0), "contrastive": (4400.0, 9e3), "clip-kd": (4200.0, 9e3)}
    )
    runs = read_runs(folders)
    table = build_table(runs)
    svg = plots.speed_chart(read_trade(runs, table).devices[0], table, table.lead[0])
    labels = {t.text: t.get("x") for t in parse(svg).iter("text") if "name" in (t.get("class") or "")}
    front = parse(svg).find(".//polyline[@class='front']")
    assert front is not None
    assert (
        len((front.get("points") or "").split()) == 2
    )  # the teacher and the better student, not the faster-looking one
    assert set(labels) == {"teacher", "contrastive only", "CLIP-KD"}


def test_learning_curves_name_the_images_they_were_measured_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    rows = [json.loads(line) | {"images": 200} for line in (folder / "eval.jsonl").read_text().splitlines()]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    charts = plots.evaluation_charts(build_table(read_runs([folder])))
    assert [title for title, _ in charts] == [f"{name} R@1 among 200 images" for name in ("Text→image", "Image→text")]
