"""Verdicts in words, `clipdistill claims`, and the claims.json that reports read."""

import json
import re

import pytest

from clipdistill import cli
from clipdistill.ablate.summary import summarise
from clipdistill.statistics.claims import judge
from clipdistill.statistics.verdicts import Verdicts, evidence, verdicts_markdown
from tests.ablate.synthetic import plan_of, write_grid


def records(values, **extra):
    return [
        {"method": m, "seed": s, "metric": "t2i_R@1", "dataset": "d", "value": v, "per_query": [v - 0.1, v + 0.1] * 50}
        | extra
        for m, by_seed in values.items()
        for s, v in enumerate(by_seed)
    ]


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        ("a > b on d t2i_R@1", r"\+10\.33 points \(\+\d+\.\d\d to \+\d+\.\d\d\), 3 seeds, 100 queries, p"),
        ("a keeps >= 90 % of b on d t2i_R@1", r"125\.8 % \(\d+\.\d to \d+\.\d\), 3 seeds"),
        ("a >= 1.2 x b on d t2i_R@1", r"1\.26 times \(1\.\d+ to 1\.\d+\)"),
        ("a >= 0.4 on d t2i_R@1", r"50\.3 % \(\d+\.\d to \d+\.\d\)"),
        ("c > b on d t2i_R@1", "no result of c in t2i_R@1 on d"),
        ("a > b on d t2i_R@1 and c > b on d t2i_R@1", r"supported: \+10\.33 points .*; undecided: no result of c"),
    ],
)
def test_evidence_names_effect_interval_and_n(claim, text):
    (verdict,) = judge([claim], records({"a": [0.50, 0.51, 0.50], "b": [0.40, 0.405, 0.395]}))
    assert re.match(text, evidence(verdict)), evidence(verdict)


def test_an_undecided_claim_says_how_many_seeds_would_decide():
    (verdict,) = judge(["a > b on d t2i_R@1"], records({"a": [0.50, 0.42, 0.47], "b": [0.40, 0.41, 0.44]}))
    assert verdict.outcome == "undecided"
    more = verdict.seeds_needed - 3
    assert more >= 1
    assert f"about {more} more seed" in evidence(verdict)


def test_no_verdicts_are_said_to_be_none():
    assert repr(Verdicts()) == "no verdicts"


def test_the_markdown_table_keeps_its_columns():
    (verdict,) = judge(["a > b on d|e t2i_R@1"], records({"a": [0.5, 0.4], "b": [0.4, 0.3]}, dataset="d|e"))
    heads, marks, row, *_ = verdicts_markdown([verdict]).splitlines()
    assert heads.count("|") == marks.count("|") == row.replace(r"\|", "").count("|") == 4


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    plan = plan_of({"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}}, seeds=3)
    summarise(plan, write_grid(plan, out, {"clip-kd": 0.45, "clip-rd": 0.40}), out)
    return out


def test_the_command_judges_a_file_on_an_ablation(grid, tmp_path, capsys):
    path = tmp_path / "claims.yaml"
    path.write_text(
        "claims:\n"
        "  - {id: one, claim: clip-rd > clip-kd on flickr8k t2i_R@1, published: {x: {clip-rd: 2, clip-kd: 1}}}\n"
        "  - {id: two, claim: clip-kd keeps >= 60 % of teacher on flickr8k t2i_R@1}\n"
        "  - {id: three, claim: clip-rd > clip-kd on imagenet top1}\n"
    )
    assert cli.main(["claims", str(path), str(grid), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 claims are about methods or data that these runs do not have" in printed
    assert "| **contradicted** | `clip-rd > clip-kd on flickr8k t2i_R@1` | −".replace("−", "-") in printed
    stored = json.loads((grid / "claims.json").read_text())["claims"]
    assert [(row["id"], row["verdict"]) for row in stored] == [("one", "contradicted"), ("two", "supported")]
    assert stored[0]["published"] == {"x": {"clip-rd": 2, "clip-kd": 1}}
    assert stored[0]["evidence"].startswith("-5.")
    assert cli.main(["claims", str(path), str(grid), "--all", "--json", str(tmp_path / "own.json")]) == 0
    assert len(json.loads((tmp_path / "own.json").read_text())["claims"]) == 3


def test_the_published_claims_are_judged(grid, tmp_path, capsys):
    assert cli.main(["claims", "published", str(grid), "--json", str(tmp_path / "c.json")]) == 0
    capsys.readouterr()
    stored = {row["id"]: row["verdict"] for row in json.loads((tmp_path / "c.json").read_text())["claims"]}
    assert stored["clip-rd-over-clip-kd-text-to-image"] == "contradicted"


def test_bad_requests_are_refused(grid, tmp_path, capsys):
    assert cli.main(["claims", "published", str(grid / "ablation.md")]) == 2
    assert "give run folders" in capsys.readouterr().err
    assert cli.main(["claims", "published", str(grid), "--level", "2"]) == 2
    assert "--level 2" in capsys.readouterr().err
    assert cli.main(["claims", str(tmp_path / "none.yaml"), str(grid)]) == 2
    assert "no such file" in capsys.readouterr().err
