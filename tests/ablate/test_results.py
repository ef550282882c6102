"""What is said of finished runs: planted effects are found, with the statistics that the parts give by themselves."""

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from clipdistill.ablate.results import collect
from clipdistill.ablate.summary import summarise
from clipdistill.ablate.tables import detail_table, main_table
from clipdistill.errors import InputError
from clipdistill.report.report import write_report
from clipdistill.runs.folder import run_folders
from clipdistill.statistics.bootstrap import bootstrap_difference, holm, seed_interval
from clipdistill.statistics.records import read_records
from clipdistill.statistics.verdicts import QUERIES_ALONE
from tests.ablate.synthetic import plan_of, write_grid, write_run

VARIANTS = {
    "base": {"recipe": "clip-kd"},
    "better": {"recipe": "clip-rd", "about": "with VRD and XRD"},
    "same": {"recipe": "clip-kd-fd", "settings": {"train.weight_decay": 0.5}},
    "worse": {"recipe": "clip"},
}
RATES = {"base": 0.40, "better": 0.46, "same": 0.4001, "worse": 0.30}
CLAIMS = ["better > base on flickr8k t2i_R@1", "worse > base on flickr8k t2i_R@1", "same > base on flickr8k t2i_R@1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    plan = plan_of(VARIANTS, seeds=4, title="Made-up grid", claims=CLAIMS)
    grid = write_grid(plan, out, RATES)
    results = summarise(plan, grid, out, command="clipdistill ablate plan.yaml --out grid")
    return out, results, grid


def test_planted_effects_are_found(folder):
    _, results, _ = folder
    assert [(d.variant, d.outcome) for d in results.differences] == [
        ("better", "better"),
        ("same", "undecided"),
        ("worse", "worse"),
    ]
    assert [v.outcome for v in results.verdicts] == ["supported", "contradicted", "undecided"]
    assert results.teacher[results.columns[0]] == pytest.approx(0.6, abs=0.02)


def test_the_statistics_are_those_of_their_parts(folder):
    _, results, grid = folder
    found = results.differences[0]
    records = {(r.method, r.seed): r for r in read_records([run.folder for run in grid])}
    ours, base = ([records[name, seed] for seed in range(4)] for name in ("better", "base"))
    seeds = seed_interval([a.value - b.value for a, b in zip(ours, base)])
    means = [np.mean([r.per_query for r in side], axis=0) for side in (ours, base)]
    queries = bootstrap_difference(*means, ours[0].clusters)
    alone = found.verdict.over_seeds, found.verdict.over_queries
    assert [(part.low, part.high) for part in alone] == [
        pytest.approx((seeds.low, seeds.high)),
        pytest.approx((queries.low, queries.high)),
    ]
    assert found.verdict.images == 600
    below = math.hypot(seeds.value - seeds.low, queries.value - queries.low)
    assert found.verdict.low == pytest.approx(found.verdict.effect - below)
    verdicts = [d.verdict for d in results.differences]
    assert [v.p_holm for v in verdicts] == holm([v.p for v in verdicts])


def test_the_files_say_the_same(folder):
    out, results, _ = folder
    stored = json.loads((out / "ablation.json").read_text())
    assert stored["baseline"] == "base"
    assert (stored["runs"], stored["finished"], stored["missing"]) == (16, 16, [])
    assert {d["variant"]: d["outcome"] for d in stored["differences"]}["worse"] == "worse"
    page = (out / "ablation.md").read_text()
    assert "# Made-up grid" in page
    assert "clipdistill ablate plan.yaml --out grid" in page
    assert "![differences from base and learning curves](ablation.svg)" in page
    drawn = ElementTree.parse(out / "ablation.svg").getroot()
    words = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"better", "same", "worse", "text→image R@1", "points against base"} <= words
    rows = [line.split(" | ") for line in main_table(results).markdown().splitlines()]
    assert rows[0][0] == "| variant"
    assert [row[0].strip("|* ") for row in rows[2:]] == ["teacher", *VARIANTS]
    better = next(row for row in rows if row[0] == "| better")
    value = next(d for d in stored["differences"] if d["variant"] == "better")["both"]
    assert better[2].startswith(f"**+{100 * value['effect']:.2f} [+{100 * value['low']:.2f} to")
    assert "same − base" in detail_table(results).markdown()
    assert "task + crd" not in page.split("## What was compared")[1].split("**same**")[1]
    assert "train.weight_decay: 0.1 -> 0.5" in page
    verdicts = json.loads((out / "claims.json").read_text())["claims"]
    assert [v["verdict"] for v in verdicts] == ["supported", "contradicted", "undecided"]
    assert "4 seeds, 3,000 queries on 600 images" in verdicts[0]["evidence"]


def test_the_report_takes_the_whole_folder(folder, tmp_path):
    out, _, grid = folder
    assert sorted(run_folders(out)) == sorted(run.folder for run in grid)
    runs = [run for entry in sorted(out.iterdir()) for run in run_folders(entry) if not entry.name.startswith(".")]
    assert sorted(runs) == sorted(run.folder for run in grid)
    summary = write_report(run_folders(out), tmp_path / "report.html")
    text = summary.markdown.read_text()
    for verdict in ("supported", "contradicted", "undecided"):
        assert f"**{verdict}**" in text


def test_unequal_runs_are_told(tmp_path):
    plan = plan_of({"base": {"recipe": "clip"}, "other": {"recipe": "clip-kd"}}, seeds=2)
    grid = write_grid(plan, tmp_path, {"base": 0.3, "other": 0.3})
    notes = " ".join(collect(plan, grid, tmp_path).notes)
    assert "started from the same weights" in notes
    assert "Every run saw 48 pairs." in notes
    assert " NOT " not in notes
    write_run(grid[1], 0.3, initial_weights="elsewhere", batch_size=8, samples_seen=24)
    notes = " ".join(collect(plan, grid, tmp_path).notes)
    assert "did NOT all start from the same weights" in notes
    assert "did NOT all see the same pairs" in notes
    assert "The budgets differ: 24, 48 pairs." in notes


def test_an_unfinished_grid_compares_what_is_there(tmp_path):
    plan = plan_of({"base": {"recipe": "clip"}, "other": {"recipe": "clip-kd"}}, seeds=3)
    grid = write_grid(plan, tmp_path, {"base": 0.3, "other": 0.4})
    (grid[-1].folder / "run.json").write_text(json.dumps({"status": "running"}))
    results = summarise(plan, grid, tmp_path)
    assert results.missing == ["other.seed-2"]
    assert results.differences[0].verdict.seeds == 2
    assert "missing: other.seed-2" in (tmp_path / "ablation.md").read_text()
    for run in grid:
        (run.folder / "run.json").unlink()
    assert collect(plan, grid, tmp_path) is None


def test_what_a_kill_left_beside_the_results_goes(tmp_path):
    plan = plan_of(
        {"base": {"recipe": "clip"}, "other": {"recipe": "clip-kd"}},
        seeds=2,
        claims=["other > base on flickr8k t2i_R@1"],
    )
    for name in ("ablation.json", "ablation.md", "ablation.svg", "claims.json", "notes"):
        (tmp_path / f".{name}.writing-abc").write_text("half")
    summarise(plan, write_grid(plan, tmp_path, {"base": 0.3, "other": 0.5}), tmp_path)
    assert [path.name for path in tmp_path.glob(".*.writing-*")] == [".notes.writing-abc"]
    assert (tmp_path / "claims.json").is_file()


def test_one_seed_decides_on_the_queries_alone_and_says_so(tmp_path):
    plan = plan_of({"base": {"recipe": "clip"}, "other": {"recipe": "clip-kd"}}, seeds=1)
    results = summarise(plan, write_grid(plan, tmp_path, {"base": 0.3, "other": 0.5}), tmp_path)
    (found,) = results.differences
    assert found.outcome == "better"
    assert found.verdict.over_seeds is None
    assert found.verdict.over_queries.low > 0.15
    assert QUERIES_ALONE in (tmp_path / "ablation.md").read_text()
    assert "**better on the test queries alone**" in (tmp_path / "ablation.md").read_text()


def test_an_unknown_metric_is_refused(tmp_path):
    plan = plan_of({"base": {"recipe": "clip"}}, seeds=1, metrics=["t2i_R@2"])
    with pytest.raises(InputError, match=r"no run has the metric 't2i_R@2' \(did you mean 't2i_R@1'"):
        collect(plan, write_grid(plan, tmp_path, {"base": 0.3}), tmp_path)
