"""One judge: known tests as oracles, and the same answer from compare, claims, ablate and report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clipdistill import cli
from clipdistill.ablate.grid import GridRun
from clipdistill.ablate.results import collect
from clipdistill.ablate.tables import markdown
from clipdistill.report.report import collect as collect_report
from clipdistill.report.report import write_report
from clipdistill.statistics.claims import judge
from clipdistill.statistics.compare import compare
from clipdistill.statistics.judge import Verdict, decide
from clipdistill.statistics.records import Record, read_records
from clipdistill.statistics.scores import Queries, Score, Scores
from clipdistill.statistics.verdicts import QUERIES_ALONE, evidence
from tests.ablate.synthetic import plan_of, protocol, write_grid

CLAIM = "clip-rd > clip-kd on flickr8k t2i_R@1"


def side(method: str, values: list[float], seeds: list[int] | None = None, **more) -> list[Record]:
    seeds = list(range(len(values))) if seeds is None else seeds
    base = {"method": method, "metric": "m", "dataset": "d"}
    return [Record.of(base | {"value": v, "seed": s} | more) for v, s in zip(values, seeds, strict=True)]


def test_results_of_other_pictures_under_the_same_names_are_not_judged() -> None:
    """Names and captions are the same, so is the protocol; older scores do not say which pictures they are of."""

    def of(pictures: str | None, value: float) -> Record:
        queries = np.full(50, value)
        more = {"dataset": "d", "protocol": "p", "measured": protocol(pictures_sha256=pictures), "per_query": queries}
        return Record("m", "t2i_R@1", value, 0, n=50, **more)

    assert decide([of("a", 0.5)], [of("b", 0.1)]).outcome == "undecided"
    assert "other pictures under the same names" in decide([of("a", 0.5)], [of("b", 0.1)]).reason
    for other in ("a", None):
        assert decide([of("a", 0.5)], [of(other, 0.1)]).outcome == "supported"


# of seeds alone (the queries are certain), the known tests


def certain(method: str, values: list[float], seeds: list[int] | None = None) -> list[Record]:
    return side(method, values, seeds, per_query=np.full(50, 0.5))


def test_shared_seeds_are_the_paired_t_test() -> None:
    a, b = [0.41, 0.43, 0.40, 0.44, 0.42], [0.39, 0.42, 0.40, 0.41, 0.40]
    found, test = decide(certain("a", a), certain("b", b)), stats.ttest_rel(a, b)
    assert found.basis == "paired seeds and queries"
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))
    # seeds of one side only are not used where two or more are shared
    more = decide(certain("a", [*a, 0.9], [0, 1, 2, 3, 4, 7]), certain("b", b))
    assert (more.low, more.high, more.seeds) == (found.low, found.high, 5)


def test_other_seeds_are_the_unpaired_t_test_with_each_sides_own_spread() -> None:
    a, b = [0.41, 0.43, 0.40, 0.44, 0.42], [0.39, 0.42, 0.35]
    found = decide(certain("a", a), certain("b", b, [7, 8, 9]))
    test = stats.ttest_ind(a, b, equal_var=False)
    assert found.basis == "unpaired seeds and queries"
    assert found.p == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))


def test_a_side_of_one_seed_is_taken_to_spread_as_the_other() -> None:
    a = [0.41, 0.43, 0.40, 0.44, 0.42]
    found = decide(certain("a", a), certain("b", [0.36], [9]))
    half = stats.t.ppf(0.975, 4) * np.std(a, ddof=1) * math.sqrt(1 / 5 + 1)
    assert found.effect == pytest.approx(0.06)
    assert (found.low, found.high) == pytest.approx((0.06 - half, 0.06 + half))
    swapped = decide(certain("b", [0.36], [9]), certain("a", a))
    assert (swapped.low, swapped.high, swapped.p) == pytest.approx((-found.high, -found.low, found.p))


def test_queries_alone_are_a_normal_test_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    hits = [(rng.random(4000) < rate).astype(float) for rate in (0.43, 0.40)]
    a, b = (side(name, [h.mean()], per_query=h) for name, h in zip("ab", hits))
    found, test = decide(a, b), stats.ttest_rel(*hits)
    assert found.basis == "queries alone"
    assert found.p == pytest.approx(test.pvalue, rel=0.3)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()), abs=0.002)


@pytest.mark.parametrize("n", range(1, 14))
def test_few_queries_decide_no_sooner_than_the_exact_sign_test(n: int) -> None:
    # one side right everywhere, the other wrong: resampling alone would call even one query certain
    a, b = side("a", [1.0], per_query=np.ones(n)), side("b", [0.0], per_query=np.zeros(n))
    found = decide(a, b)
    assert found.p >= 2 / 2**n * 0.999
    assert found.outcome == ("supported" if n >= 6 else "undecided")
    # the same few among many that are alike
    rows = {name: np.repeat([value, 0.5], [n, 1000]) for name, value in (("a", 1.0), ("b", 0.0))}
    a, b = (side(name, [float(row.mean())], per_query=row) for name, row in rows.items())
    assert decide(a, b).outcome == ("supported" if n >= 6 else "undecided")


def test_p_is_below_one_in_twenty_exactly_where_the_interval_leaves_the_threshold_out() -> None:
    rng = np.random.default_rng(1)
    outcomes = set()
    for trial in range(60):
        queries, seeds = int(rng.integers(5, 300)), int(rng.integers(1, 5))
        lift = rng.choice([0.0, 0.03, 0.1])
        sides = []
        for name, rate in (("a", 0.4 + lift), ("b", 0.4)):
            hits = [(rng.random(queries) < rate).astype(float) for _ in range(seeds)]
            first = 0 if name == "a" or trial % 2 else 10
            sides.append([r for s, h in enumerate(hits) for r in side(name, [h.mean()], [first + s], per_query=h)])
        found = decide(*sides)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0) == (found.outcome != "undecided")
        outcomes.add(found.outcome)
    assert {"supported", "undecided"} <= outcomes


@pytest.mark.parametrize("seeds", [[0, 1, 2, 3], [10, 11, 12, 13]])
def test_two_alike_are_told_apart_in_one_of_twenty(seeds: list[int]) -> None:
    wrong = 0
    for trial in range(120):
        rng = np.random.default_rng(trial)
        easy = rng.random(200)
        sides = []
        for name, own in (("a", [0, 1, 2, 3]), ("b", seeds)):
            hits = [(rng.random(200) < easy + 0.03 * rng.standard_normal()).astype(float) for _ in own]
            sides.append([r for s, h in zip(own, hits) for r in side(name, [h.mean()], [s], per_query=h)])
        wrong += decide(*sides).outcome != "undecided"
    assert wrong <= 12  # 95 % of intervals: six expected


def test_of_ranks_the_lower_is_better() -> None:
    a, b = (side(n, v, low=1, high=1, metric="t2i_median_rank") for n, v in (("a", [3.0, 3.1]), ("b", [9.0, 9.1])))
    a, b = ([Record.of(vars(r) | {"low": r.value, "high": r.value}) for r in rows] for rows in (a, b))
    assert decide(a, b).better == "better"
    assert decide(b, a).better == "worse"
    assert decide(a, b, threshold=7).better == "worse"


# the same run folders, asked four ways


def hits(rate: float, seed: int, queries: int) -> np.ndarray:
    easy = np.random.default_rng(99).random(queries)
    own = np.random.default_rng([seed, int(1000 * rate)])
    return (easy + 0.1 * own.standard_normal(queries) < rate + 0.01 * own.standard_normal()).astype(float)


def write_scores(folder: Path, rate: float, seed: int, queries: int, kept: bool = True) -> None:
    right, scores = hits(rate, seed, queries), Scores()
    measured = protocol(images=max(1, queries // 5), captions=queries, model_fingerprint=folder.name)
    low, high = (float(right.mean() + step) for step in (-0.03, 0.03))
    scores.scores.append(Score("t2i_R@1", float(right.mean()), queries, measured, low, high))
    if kept:
        scores.queries["student", measured.question()] = Queries(
            {"t2i_R@1": right}, {"t2i_R@1": np.arange(queries) // 5}
        )
    scores.save(folder / "scores.json")


SITUATIONS = {
    # seeds of clip-rd, of clip-kd, queries, lift of clip-rd, per-query results kept
    "shared seeds": ((0, 1, 2), (0, 1, 2), 2000, 0.05, True),
    "shared seeds, close": ((0, 1, 2), (0, 1, 2), 2000, 0.004, True),
    "shared in part": ((0, 1, 2), (1, 2, 3), 2000, 0.05, True),
    "other seeds": ((0, 1, 2), (3, 4, 5), 2000, 0.06, True),
    "other seeds, worse": ((0, 1), (3, 4, 5), 2000, -0.3, True),
    "one seed shared": ((0, 1), (1, 2), 2000, 0.05, True),
    "one seed against several": ((0,), (1, 2, 3), 2000, 0.1, True),
    "one seed each": ((0,), (0,), 2000, 0.05, True),
    "one other seed each": ((0,), (7,), 2000, -0.05, True),
    "few queries": ((0, 1, 2), (0, 1, 2), 15, 0.3, True),
    "few queries, one seed": ((0,), (0,), 20, 0.4, True),
    "a single image": ((0, 1), (0, 1), 5, 0.3, True),
    "queries lost": ((0, 1), (0, 1), 2000, 0.2, False),
    "queries lost, one seed": ((0,), (0,), 2000, 0.2, False),
}


@pytest.fixture(params=SITUATIONS)
def runs(request, tmp_path: Path) -> dict[str, list[GridRun]]:
    """Finished runs of one situation, as an ablation would leave them."""
    ours, base, queries, lift, kept = SITUATIONS[request.param]
    seeds = sorted({*ours, *base})
    plan = plan_of({"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}}, seeds=seeds)
    grid = write_grid(plan, tmp_path, {"clip-kd": 0.4, "clip-rd": 0.4})
    found: dict[str, list[GridRun]] = {"clip-rd": [], "clip-kd": []}
    for run in grid:
        for path in run.folder.glob("scores.*"):
            path.unlink()
        if run.seed in (ours if run.variant == "clip-rd" else base):
            write_scores(run.folder, 0.4 + (lift if run.variant == "clip-rd" else 0), run.seed, queries, kept)
            found[run.variant].append(run)
        else:
            (run.folder / "run.json").unlink()
    return found


def figures(verdict: Verdict) -> tuple:
    return verdict.outcome, verdict.low, verdict.high, verdict.p, verdict.basis


@pytest.mark.sampled(3)
def test_all_four_say_the_same(runs: dict[str, list[GridRun]], tmp_path: Path) -> None:
    ours, base = ([run.folder for run in runs[name]] for name in ("clip-rd", "clip-kd"))
    (claim,) = judge([CLAIM], read_records([*ours, *base]))
    (compared,) = compare(ours, base).differences
    plan = plan_of(
        {"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}},
        seeds=sorted({run.seed for group in runs.values() for run in group}),
    )
    (ablated,) = collect(plan, [*runs["clip-rd"], *runs["clip-kd"]], tmp_path).differences
    (reported,) = collect_report([*ours, *base]).comparisons
    answers = [figures(v) for v in (claim, compared.verdict, ablated.verdict, reported.verdict)]
    assert answers == [answers[0]] * 4
    assert compared.outcome == {"supported": "a", "contradicted": "b"}.get(claim.outcome, "undecided")


@pytest.mark.sampled(3)
def test_the_pages_say_it_in_the_same_words(runs: dict[str, list[GridRun]], tmp_path: Path, capsys) -> None:
    ours, base = ([str(run.folder) for run in runs[name]] for name in ("clip-rd", "clip-kd"))
    claims = tmp_path / "claims.yaml"
    claims.write_text(f"claims:\n  - {{id: one, claim: {CLAIM}}}\n")
    assert cli.main(["compare", *ours, "--against", *base, "--json", str(tmp_path / "c.json")]) == 0
    printed = [capsys.readouterr().out.replace("\n", " ")]
    assert cli.main(["claims", str(claims), *ours, *base, "--markdown"]) == 0
    printed.append(capsys.readouterr().out)
    report = write_report([Path(p) for p in (*ours, *base)], tmp_path / "report.html").markdown.read_text()
    printed.append(report)
    compared = json.loads((tmp_path / "c.json").read_text())["differences"][0]
    (judged,) = json.loads((tmp_path / "claims.json").read_text())["claims"]
    outcome = {"a": "supported", "b": "contradicted"}.get(compared["outcome"], "undecided")
    assert judged["verdict"] == outcome
    for key in ("low", "high", "p", "basis", "seeds", "queries", "images"):
        assert compared[key] == judged[key], key
    # the report: at the top, in the table, under Claims
    said = {"supported": "beats CLIP-KD", "contradicted": "does worse", "undecided": "does not beat CLIP-KD here"}
    assert said[outcome] in report.split("\n## ")[0]
    row = next(line for line in report.splitlines() if line.startswith("| CLIP-RD | CLIP-KD |"))
    assert {"supported": "better", "contradicted": "worse"}.get(outcome, outcome) in row.split("|")[-2]
    assert f"- **{outcome}**: clip-rd" in report
    alone = judged["basis"] == "queries alone" and judged["p"] is not None
    assert [QUERIES_ALONE in text for text in printed] == [alone] * 3


def test_claims_that_lie_beside_the_runs_are_judged_again(tmp_path: Path) -> None:
    plan = plan_of({"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}}, seeds=2)
    grid = write_grid(plan, tmp_path, {"clip-kd": 0.4, "clip-rd": 0.5})
    rows = [
        {"claim": CLAIM.replace("flickr8k", "*") + " [flickr8k]", "verdict": "contradicted", "evidence": "long ago"},
        {"claim": "a claim in free text", "verdict": "supported", "evidence": "by hand"},
    ]
    (tmp_path / "claims.json").write_text(json.dumps({"claims": rows}))
    shown = collect_report([run.folder for run in grid]).claims
    assert [(c["text"], c["verdict"]) for c in shown] == [(CLAIM, "supported"), ("a claim in free text", "supported")]
    assert "long ago" not in str(shown)


# scores of other weights


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"student_fingerprint": "other"}, "other weights than the run's student"),
        ({"student_fingerprint": None, "status": "stopped"}, "the run is stopped"),
    ],
)
def test_scores_of_other_weights_are_shown_as_stale_and_judged_nowhere(tmp_path: Path, facts: dict, word: str, capsys):
    plan = plan_of({"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}}, seeds=2, claims=[CLAIM])
    grid = write_grid(plan, tmp_path, {"clip-kd": 0.4, "clip-rd": 0.5})
    for run in grid:
        described = json.loads((run.folder / "run.json").read_text())
        fresh = {"student_fingerprint": f"student {run.name}"}
        (run.folder / "run.json").write_text(json.dumps(described | (facts if run.variant == "clip-rd" else fresh)))
    ours, base = ([run.folder for run in grid if run.variant == name] for name in ("clip-rd", "clip-kd"))
    (claim,) = judge([CLAIM], read_records([*ours, *base]))
    (compared,) = compare(ours, base).differences
    for verdict in (claim, compared.verdict):
        assert (verdict.outcome, verdict.effect, verdict.p) == ("undecided", None, None)
        assert word in verdict.reason
    assert cli.main(["compare", *map(str, ours), "--against", *map(str, base)]) == 0
    assert word in capsys.readouterr().out.replace("\n", " ")
    report = collect_report([*ours, *base])
    assert report.comparisons == []
    assert len([notice for notice in report.notices if word in notice and "measure again" in notice]) == 2
    results = collect(plan, [run for run in grid if "status" not in facts or run.variant == "clip-kd"], tmp_path)
    if "status" not in facts:
        assert results.differences[0].outcome == "undecided"
        assert word in markdown(results)


def test_one_stale_seed_is_left_out_and_counted(tmp_path: Path) -> None:
    plan = plan_of({"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}}, seeds=3, claims=[CLAIM])
    grid = write_grid(plan, tmp_path, {"clip-kd": 0.4, "clip-rd": 0.5})
    described = json.loads((grid[-1].folder / "run.json").read_text())
    (grid[-1].folder / "run.json").write_text(json.dumps(described | {"student_fingerprint": "other"}))
    ours, base = ([run.folder for run in grid if run.variant == name] for name in ("clip-rd", "clip-kd"))
    (claim,) = judge([CLAIM], read_records([*ours, *base]))
    answers = [claim, compare(ours, base).differences[0].verdict, collect(plan, grid, tmp_path).differences[0].verdict]
    answers.append(collect_report([*ours, *base]).comparisons[0].verdict)
    assert {(v.low, v.high, v.p, v.seeds, v.left_out) for v in answers} == {(claim.low, claim.high, claim.p, 2, 1)}
    assert "1 unusable results left out" in evidence(claim)
