"""Claims: the language, verdicts that are known beforehand, what would decide, run folders, the shipped file."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clipdistill.errors import InputError
from clipdistill.statistics.claims import Claim, Statement, judge, read_claims
from clipdistill.statistics.records import SPEED, Record, read_records, records_of
from clipdistill.statistics.scores import Queries, Score, Scores
from clipdistill.statistics.verdicts import QUERIES_ALONE, evidence
from tests.statistics.test_scores import protocol


def results(
    method: str, rate: float, seeds: range | None = range(5), queries: int = 2000, jitter: float = 0.003, **more
) -> list[dict]:
    """Records of one method with per-query results of about this rate; the same queries are hard for every method."""
    difficulty = np.random.default_rng(0).random(queries)
    found = []
    for seed in [None] if seeds is None else seeds:
        shift = 0.0 if seed is None else jitter * np.random.default_rng([seed, len(method)]).standard_normal()
        right = (difficulty < rate + shift).astype(float)
        found.append(
            {
                "method": method,
                "seed": seed,
                "metric": "t2i_R@1",
                "value": float(right.mean()),
                "dataset": "flickr8k",
                "per_query": right,
                "clusters": np.arange(queries) // 5,
            }
            | more
        )
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a > b on d m", ("a", "b", "difference", 0.0, "m", "d")),
        ("a > b by 0.01 on d t2i_R@1", ("a", "b", "difference", 0.01, "t2i_R@1", "d")),
        ("clip-rd keeps >= 90 % of teacher on cifar10 top1", ("clip-rd", "teacher", "ratio", 0.9, "top1", "cifar10")),
        ("a keeps >= 90% of b on * m", ("a", "b", "ratio", 0.9, "m", None)),
        ("a >= 10x teacher pairs_per_second", ("a", "teacher", "ratio", 10.0, "pairs_per_second", None)),
        ("a  >= 1.5 x b on d m", ("a", "b", "ratio", 1.5, "m", "d")),
        ("a >= 0.4 on d m", ("a", None, "value", 0.4, "m", "d")),
    ],
)
def test_the_language(text: str, expected: tuple) -> None:
    found = Statement.parse(text)
    assert (found.left, found.right, found.measure, found.threshold, found.metric, found.dataset) == expected


@pytest.mark.parametrize("text", ["a is better than b", "a > 3 on d m", "a >= b on d m", ""])
def test_what_is_not_understood_is_said(text: str) -> None:
    with pytest.raises(InputError, match="is not understood: write 'a > b on DATA METRIC'"):
        judge([text], [])


def test_clear_differences_are_supported_or_contradicted() -> None:
    records = results("good", 0.45) + results("bad", 0.40)
    for text, outcome in (
        ("good > bad on flickr8k t2i_R@1", "supported"),
        ("bad > good on flickr8k t2i_R@1", "contradicted"),
        ("good > bad by 0.2 on flickr8k t2i_R@1", "contradicted"),
        ("bad keeps >= 80 % of good on flickr8k t2i_R@1", "supported"),
        ("bad keeps >= 99 % of good on flickr8k t2i_R@1", "contradicted"),
        ("good >= 0.42 on flickr8k t2i_R@1", "supported"),
    ):
        (verdict,) = judge([text], records)
        assert verdict.outcome == outcome, text
        assert verdict.low < verdict.effect < verdict.high
        assert (verdict.seeds, verdict.queries, verdict.images) == (5, 2000, 400)
        assert verdict.p < 0.05
    (verdict,) = judge(["good > bad on flickr8k t2i_R@1"], records)
    assert verdict.effect == pytest.approx(0.05, abs=0.01)


def test_seeds_are_paired() -> None:
    # seeds differ by far more than the methods do, but alike for both
    records = results("ab", 0.42, jitter=0.05) + results("ba", 0.41, jitter=0.05)
    (verdict,) = judge(["ab > ba on flickr8k t2i_R@1"], records)
    assert verdict.outcome == "supported"
    assert verdict.basis == "paired seeds and queries"
    # without shared seeds there is no pairing
    (verdict,) = judge(["ab > ba on flickr8k t2i_R@1"], records[:5] + results("ba", 0.41, seeds=range(7, 9)))
    assert (verdict.outcome, verdict.basis) == ("undecided", "unpaired seeds and queries")
    assert (verdict.seeds, verdict.seeds_right) == (5, 2)


def test_noise_over_seeds_stays_undecided() -> None:
    # 0.5 points in truth, and seeds that differ by 2 points independently of each other
    records = results("aa", 0.425, jitter=0.02) + results("bbb", 0.42, jitter=0.02)
    (verdict,) = judge(["aa > bbb on flickr8k t2i_R@1"], records)
    assert verdict.outcome == "undecided"
    assert verdict.low < 0 < verdict.high
    assert "the interval holds the threshold" in verdict.reason


def test_seeds_needed_is_right_when_queries_are_certain() -> None:
    values = [0.02, 0.005, 0.012, -0.004]
    records = [
        {"method": m, "seed": i, "metric": "x", "value": 0.5 + (v if m == "a" else 0), "per_query": np.full(50, 0.5)}
        for i, v in enumerate(values)
        for m in ("a", "b")
    ]
    (verdict,) = judge(["a > b x"], records)
    assert verdict.outcome == "undecided"
    mean, spread = np.mean(values), np.std(values, ddof=1)
    half = [stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n) for n in (verdict.seeds_needed - 1, verdict.seeds_needed)]
    assert half[1] < mean <= half[0]
    assert f"about {verdict.seeds_needed - 4} more seeds" in verdict.reason


def test_a_small_test_set_names_the_images_that_would_decide() -> None:
    rng = np.random.default_rng(1)
    records = []
    for seed in range(5):
        for method, rate in (("a", 0.44), ("b", 0.42)):
            right = (
                (rng.random(200) < rate).astype(float) if seed == 0 else records[0 if method == "a" else 1]["per_query"]
            )
            value = float(np.mean(right)) + 1e-6 * seed
            records.append({"method": method, "seed": seed, "metric": "m", "value": value, "per_query": right})
    (verdict,) = judge(["a > b m"], records)
    assert verdict.outcome == "undecided"
    assert "no number of seeds decides" in verdict.reason
    assert verdict.images_needed > 200


def test_one_seed_decides_on_the_queries_alone_and_lost_queries_do_not() -> None:
    records = results("good", 0.6, seeds=range(1)) + results("bad", 0.2, seeds=range(1))
    (verdict,) = judge(["good > bad on flickr8k t2i_R@1"], records)
    assert (verdict.outcome, verdict.seeds, verdict.basis) == ("supported", 1, "queries alone")
    assert QUERIES_ALONE in evidence(verdict)
    records = results("good", 0.6, per_query=None) + results("bad", 0.2, per_query=None)
    (verdict,) = judge(["good > bad on flickr8k t2i_R@1"], records)
    assert verdict.outcome == "undecided"
    assert "per-query results were not kept" in verdict.reason
    assert verdict.low > 0.3


def test_retention_of_an_untrained_teacher_uses_every_seed_of_the_student() -> None:
    records = results("clip-rd", 0.46) + results("teacher", 0.5, seeds=None)
    (verdict,) = judge(["clip-rd keeps >= 80 % of teacher on * t2i_R@1"], records)
    assert (verdict.outcome, verdict.seeds, verdict.dataset) == ("supported", 5, "flickr8k")
    # two models that were not trained here are compared on the queries alone
    records = results("one", 0.5, seeds=None) + results("two", 0.4, seeds=None)
    (verdict,) = judge(["one > two on flickr8k t2i_R@1"], records)
    assert (verdict.outcome, verdict.seeds) == ("supported", 0)


def test_speed_and_accuracy_together() -> None:
    speeds = [
        {"method": "clip-rd", "metric": SPEED, "value": 5000.0, "low": 4800.0, "high": 5200.0},
        {"method": "teacher", "metric": SPEED, "value": 400.0, "low": 390.0, "high": 410.0},
    ]
    records = results("clip-rd", 0.46) + results("teacher", 0.5, seeds=None) + speeds
    text = "clip-rd >= 10 x teacher pairs_per_second and clip-rd keeps >= 80 % of teacher on * t2i_R@1"
    (verdict,) = judge([text], records)
    assert verdict.outcome == "supported"
    assert [part.outcome for part in verdict.parts] == ["supported"] * 2
    assert verdict.parts[0].low == pytest.approx(4800 / 410)
    (verdict,) = judge([text.replace("10 x", "13 x")], records)
    assert verdict.outcome == "undecided"
    (verdict,) = judge([text.replace("10 x", "20 x")], records)
    assert verdict.outcome == "contradicted"


def test_what_is_missing_is_named_and_protocols_are_kept_apart() -> None:
    (verdict,) = judge(["a > b on flickr8k t2i_R@1"], results("a", 0.4))
    assert verdict.reason == "no result of b in t2i_R@1 on flickr8k"
    records = results("a", 0.5, protocol="standard") + results("b", 0.3, protocol="first-caption")
    (verdict,) = judge(["a > b on flickr8k t2i_R@1"], records)
    assert verdict.outcome == "undecided"
    assert "different protocols (first-caption; standard)" in verdict.reason
    records = results("a", 0.4) + results("a", 0.4) + results("b", 0.3)
    (verdict,) = judge(["a > b on flickr8k t2i_R@1"], records)
    assert "two results of a have the seed 0" in verdict.reason


def test_every_data_set_gets_a_verdict_and_p_values_are_adjusted() -> None:
    records = [r for name in ("d1", "d2") for m, v in (("a", 0.45), ("b", 0.43)) for r in results(m, v, dataset=name)]
    verdicts = judge(["a > b on * t2i_R@1"], records)
    assert [v.dataset for v in verdicts] == ["d1", "d2"]
    assert [v.claim for v in verdicts] == ["a > b on * t2i_R@1 [d1]", "a > b on * t2i_R@1 [d2]"]
    assert verdicts[0].p_holm == pytest.approx(min(1.0, 2 * verdicts[0].p))
    json.dumps([v.to_dict() for v in verdicts], allow_nan=False)


def test_false_verdicts_are_rare() -> None:
    # no difference in truth: about 5 % of the intervals may leave zero out
    wrong = 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        records = []
        for seed in range(4):
            for method in ("a", "b"):
                right = (rng.random(300) < 0.4 + 0.02 * rng.standard_normal()).astype(float)
                records.append(
                    {"method": method, "seed": seed, "metric": "m", "value": right.mean(), "per_query": right}
                )
        wrong += judge(["a > b m"], records)[0].outcome != "undecided"
    assert wrong <= 6


def test_records_are_checked() -> None:
    for values, message in (
        ({"method": "a", "metric": "m"}, "lacks the key 'value'"),
        ({"method": "a", "metric": "m", "value": 1, "seeed": 2}, r"no key 'seeed' \(did you mean 'seed'"),
        ({"method": "a", "metric": "m", "value": "much"}, "holds something else than numbers"),
        ({"method": "a", "metric": "m", "value": float("nan")}, "result of a in m is not a finite number"),
    ):
        with pytest.raises(InputError, match=message):
            Record.of(values)


def write_run(folder: Path, method: str, seed: int, rate: float, bench: dict | None = None) -> None:
    rng = np.random.default_rng([seed, len(method)])
    scores = Scores()
    for model, value in (("student", rate), ("teacher", 0.5)):
        own = protocol(model_fingerprint=f"{model}{method if model == 'student' else ''}{seed * (model == 'student')}")
        right = (np.random.default_rng(7).random(5000) < value + 0.002 * rng.standard_normal()).astype(float)
        scores.scores.append(Score("t2i_R@1", float(right.mean()), 5000, own, model=model))
        scores.queries[model, own.question()] = Queries({"t2i_R@1": right}, {"t2i_R@1": np.arange(5000) // 5})
    folder.mkdir(parents=True)
    scores.save(folder / "scores.json")
    (folder / "run.json").write_text(json.dumps({"method": method, "seed": seed, "name": folder.name}))
    if bench is not None:
        (folder / "bench.json").write_text(json.dumps(bench))


def test_run_folders_become_records_and_verdicts(tmp_path: Path) -> None:
    folders = []
    for method, rate in (("clip-rd", 0.44), ("clip-kd", 0.40)):
        for seed in range(3):
            folders.append(tmp_path / f"{method}-{seed}")
            row = {"tower": "pair", "backend": "eager", "dtype": "float32", "low": None, "high": None}
            rows = [
                {**row, "model": name, "batch": batch, "value": float(batch)}
                for batch in (1, 64)
                for name in (folders[-1].name, "teacher")
            ]
            write_run(folders[-1], method, seed, rate, {"measurements": rows})
    records = read_records(folders)
    assert {(r.method, r.seed) for r in records if r.metric == "t2i_R@1"} == {
        *((m, s) for m in ("clip-rd", "clip-kd") for s in range(3)),
        ("teacher", None),
    }
    assert {(r.method, r.value) for r in records if r.metric == SPEED} == {
        ("clip-rd", 64.0),
        ("clip-kd", 64.0),
        ("teacher", 64.0),
    }
    outcomes = {v.id: v.outcome for v in judge(read_claims("published"), records)}
    assert outcomes["clip-rd-over-clip-kd-text-to-image"] == "supported"
    assert outcomes["clip-rd-over-clip-kd-zero-shot"] == "undecided"
    with pytest.raises(InputError, match="not a run folder"):
        read_records([tmp_path])


def test_the_shipped_claims_name_shipped_recipes_and_their_figures() -> None:
    claims = read_claims("published")
    files = resources.files("clipdistill.recipes").iterdir()
    recipes = {file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")}
    for claim in claims:
        assert claim.source
        assert claim.published
        for statement in claim.statements():
            assert {statement.left, statement.right} - {"teacher", "start", None} <= recipes, claim.id
    assert {claim.source for claim in claims} == {
        "CLIP-RD (2026)",
        "CLIP-KD (2024)",
        "TinyCLIP (2023)",
        "DCLIP (2025)",
    }


def test_claim_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text("claims:\n  - {id: a, claim: a > b on d m}\n  - {id: a, claim: b > a on d m}\n")
    with pytest.raises(InputError, match="two claims have the id 'a'"):
        read_claims(path)
    path.write_text("claims:\n  - {id: a, clam: a > b on d m}\n")
    with pytest.raises(InputError, match=r"unknown key 'claims.0.clam'"):
        read_claims(path)
    path.write_text("claims:\n  - {id: a, claim: a beats b}\n")
    with pytest.raises(InputError, match="is not understood"):
        read_claims(path)
    with pytest.raises(InputError, match="no such file"):
        read_claims(tmp_path / "none.yaml")
    assert judge([Claim(id="x", claim="a > b on d m", source="s")], [])[0].source == "s"


def test_statements_on_two_named_sets_are_one_claim() -> None:
    records = [
        one | {"dataset": dataset}
        for dataset in ("f", "g")
        for one in (*results("a", 0.6), *results("b", 0.3), *results("c", 0.7 if dataset == "f" else 0.2))
    ]
    found = judge(["a > b on f t2i_R@1 and a > b on g t2i_R@1", "c > a on f t2i_R@1 and c > a on g t2i_R@1"], records)
    assert [(v.outcome, v.dataset, len(v.parts)) for v in found] == [("supported", None, 2), ("contradicted", None, 2)]
    everywhere, *others = judge(["a > b on * t2i_R@1 and a > c on g t2i_R@1"], records)
    assert [(v.outcome, v.dataset) for v in (everywhere, *others)] == [("supported", "f"), ("supported", "g")]
    assert [v.dataset for v in judge(["a > b on f t2i_R@1 and a >= 0.5 on f t2i_R@1"], records)] == ["f"]


def test_every_part_of_a_claim_has_its_own_unit() -> None:
    records = [*results("a", 0.6, range(1)), *results("b", 0.3, range(1))]
    records += [{"method": m, "metric": SPEED, "value": v, "low": v, "high": v} for m, v in (("a", 30.0), ("b", 10.0))]
    [found] = judge(["a keeps >= 90 % of b on flickr8k t2i_R@1 and a >= 2 x b on * pairs_per_second"], records)
    kept, speed = found.parts
    assert evidence(speed).startswith("3 times")
    assert " %" in evidence(kept)
    assert " times" not in evidence(kept)


def test_stored_intervals_are_taken_to_the_level_that_is_asked_for() -> None:
    half = stats.norm.ppf(0.975)
    records = [{"method": "a", "metric": SPEED, "value": 10.0, "low": 10 - half, "high": 10 + half}]
    for level in (0.5, 0.95, 0.999):
        [found] = judge(["a >= 5 pairs_per_second"], records, level=level)
        assert (found.low, found.high) == pytest.approx(stats.norm.interval(level, loc=10))
        assert found.p == pytest.approx(2 * stats.norm.sf(5))


def test_two_teachers_are_not_one() -> None:
    own = [
        Record.of(one | {"method": "teacher", "measured": protocol(model_fingerprint=name)})
        for name, rate in (("small", 0.3), ("large", 0.7))
        for one in results("teacher", rate, None)
    ]
    [found] = judge(["a keeps >= 90 % of teacher on flickr8k t2i_R@1"], [*results("a", 0.5), *own])
    assert (found.outcome, found.effect) == ("undecided", None)
    assert "of 2 teachers" in found.reason


def test_what_is_kept_of_a_rank_is_no_claim() -> None:
    with pytest.raises(InputError, match="the lower is better"):
        Statement.parse("a keeps >= 90 % of b on d t2i_median_rank")


def test_a_median_that_is_the_mean_is_a_median_still() -> None:
    scores, own = Scores(), protocol()
    scores.scores.append(Score("t2i_median_rank", 2.0, 3, own, 1.0, 3.0))
    scores.queries["student", own.question()] = Queries({"t2i_median_rank": np.array([1.0, 2.0, 3.0])})
    assert [record.per_query for record in records_of(scores, "a", 0)] == [None]


def bench_of(device: str, rows: list[tuple[str, str, int, float]]) -> dict:
    return {
        "device": {"label": device, "fingerprint": device},
        "measurements": [
            {"tower": "pair", "backend": backend, "dtype": "float32", "model": model, "batch": batch, "value": value,
             "low": value, "high": value}
            for model, backend, batch, value in rows
        ],
    }  # fmt: skip


def test_speeds_of_two_machines_are_not_compared(tmp_path: Path) -> None:
    slow = bench_of("laptop", [("a", "eager", 1, 10.0), ("teacher", "eager", 1, 5.0)])
    fast = bench_of("server", [("b", "eager", 1, 1000.0), ("teacher", "eager", 1, 500.0)])
    for method, bench in (("a", slow), ("b", fast)):
        write_run(tmp_path / method, method, 0, 0.4, bench)
    records = read_records([tmp_path / "a", tmp_path / "b"])
    [found] = judge(["b >= 2 x a pairs_per_second"], records)
    assert (found.outcome, found.effect) == ("undecided", None)
    assert "laptop" in found.reason
    assert "server" in found.reason
    # each against the teacher on the machine that both were measured on, whichever comes first
    for order in ("ab", "ba"):
        records = read_records([tmp_path / name for name in order])
        found = judge(["a >= 2 x teacher pairs_per_second", "b >= 2 x teacher pairs_per_second"], records)
        assert [v.effect for v in found] == [2, 2]


def test_the_batch_is_one_that_all_models_were_measured_in(tmp_path: Path) -> None:
    rows = [("a", "eager", 1, 10.0), ("a", "eager", 8, 40.0), ("teacher", "eager", 1, 5.0), ("a", "onnx", 64, 90.0)]
    write_run(tmp_path / "a", "a", 0, 0.4, bench_of("laptop", rows))
    assert {r.method: r.value for r in read_records([tmp_path / "a"]) if r.metric == SPEED} == {"a": 10, "teacher": 5}
