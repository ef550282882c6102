"""Protocols and score lists: what may share a table, retention, JSON, known sets."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

from clipdistill.config import build
from clipdistill.errors import InputError
from clipdistill.statistics.protocol import (
    Protocol,
    captions_rule,
    check_known_pairs,
    comparable,
    difference,
    digest,
    known_name,
)
from clipdistill.statistics.scores import Queries, Score, Scores


def protocol(**changes) -> Protocol:
    return Protocol(
        **{
            "name": "standard",
            "task": "retrieval",
            "dataset": "flickr8k",
            "split": "val",
            "images": 1000,
            "captions": 5000,
            "captions_per_image": "all",
            "positives": "any caption of the image",
            "transform": "224 px",
            "dtype": "float32",
            "keys_sha256": "aa",
            "model_fingerprint": "s",
        }
        | changes
    )


def example() -> Scores:
    first = protocol(name="first-caption", captions=1000, captions_per_image="first", positives="one to one")
    teacher = {"model_fingerprint": "t", "transform": "336 px"}
    scores = Scores(
        [
            Score("t2i_R@1", 0.4, 5000, protocol(), 0.38, 0.42),
            Score("t2i_median_rank", 3.0, 5000, protocol()),
            Score("ties", 7.0, 6000, protocol()),
            Score("t2i_R@1", 0.5, 5000, protocol(**teacher), model="teacher"),
            Score("t2i_median_rank", 2.0, 5000, protocol(**teacher), model="teacher"),
            Score("t2i_R@1", 0.6, 1000, first),
        ]
    )
    scores.notes = ["3 captions were cut"]
    return scores


def shown(scores: Scores) -> str:
    file = io.StringIO()
    scores.print(file)
    return file.getvalue()


def test_only_the_model_may_differ_within_a_column() -> None:
    assert comparable(protocol(), protocol(model_fingerprint="t", transform="336 px"))
    for change in (
        {"name": "first-caption"},
        {"captions_per_image": "first"},
        {"keys_sha256": "bb"},
        {"dtype": "bfloat16"},
        {"images": 999},
        {"deviation": "999 images of 1,000"},
        {"ties": "by index"},
    ):
        assert not comparable(protocol(), protocol(**change)), change
        said = {"keys_sha256": "other samples"}.get(field := next(iter(change)), field)
        assert said in difference(protocol(), protocol(**change))


def test_a_table_for_each_protocol_with_its_name() -> None:
    scores = example()
    tables = scores.table()
    assert len(tables) == 2
    text = shown(scores)
    assert "retrieval, standard: flickr8k/val, 1,000 images, 5,000 captions (all)" in text
    assert "retrieval, first-caption: flickr8k/val, 1,000 images, 1,000 captions (first)" in text
    assert "40.0 [38.0, 42.0]" in text
    assert "3 captions were cut" in text
    # ranks and counts are not percentages
    assert re.search(r"t2i_median_rank +2\.0 +3\.0$", text, re.M)
    with pytest.raises(InputError, match=r"different protocols and do not belong in one table .*captions"):
        scores.table(split=False)
    assert len(scores.table(["ties"])[0].rows) == 1
    assert scores.table(names={"student": "runs/a"})[0].heads[:3] == ["metric", "teacher", "runs/a"]


def test_markdown_has_the_same_cells() -> None:
    text = example().to_markdown()
    assert "| metric | teacher | student | student, % of teacher |" in text
    assert "| t2i_R@1 | 50.0 | 40.0 [38.0, 42.0] | 80.0 |" in text
    assert text.count("**retrieval") == 2


def test_retention_compares_within_a_protocol_only() -> None:
    kept = example().retention()
    assert [(s.metric, s.model, s.value) for s in kept] == [("t2i_R@1", "student", 0.8)]
    assert kept[0].low is None


def test_retention_interval_is_paired() -> None:
    scores = example()
    rng = np.random.default_rng(0)
    right = (rng.random(500) < 0.5).astype(float)
    for model, values in (("student", right * (np.arange(500) % 5 > 0)), ("teacher", right)):
        own = next(s.protocol for s in scores if s.model == model)
        scores.queries[model, own.question()] = Queries({"t2i_R@1": values}, {"t2i_R@1": np.arange(500) // 5})
    kept = scores.retention()[0]
    assert kept.low is not None
    assert kept.high is not None
    assert 0.7 < kept.low < kept.high < 0.9


def test_json_and_files_come_back_whole(tmp_path: Path) -> None:
    scores = example()
    own = protocol()
    values = np.random.default_rng(0).random(50)
    scores.queries["student", own.question()] = Queries({"t2i_R@1": values}, {"t2i_R@1": np.arange(50) // 5})
    again = Scores.from_json(scores.to_json())
    assert again.scores == scores.scores
    assert again.notes == scores.notes
    stored = json.loads(scores.to_json())
    assert stored["scores"][0]["protocol"] == 0
    assert stored["protocols"][0]["label"].startswith("retrieval, standard")
    assert stored["retention"][0]["value"] == 0.8
    path = tmp_path / "deep" / "scores.json"
    scores.save(path)
    loaded = Scores.load(path)
    assert loaded.scores == scores.scores
    (key,) = loaded.queries
    assert key == ("student", own.question())
    np.testing.assert_array_equal(loaded.queries[key].values["t2i_R@1"], values)
    np.testing.assert_array_equal(loaded.queries[key].clusters["t2i_R@1"], np.arange(50) // 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a list of scores"),
        ('{"format": 9, "scores": []}', "format 9, this version reads 1 and 2"),
        ('{"format": 1, "scores": [{"metric": "x"}], "protocols": []}', "score 0: not a stored score"),
        ('{"format": 1, "scores": [], "protocols": [{"nam": "x"}]}', "unknown key 'nam' .*'name'"),
    ],
)
def test_damaged_files_are_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scores.from_json(text)


def test_value_finds_one_score_or_says_why_not() -> None:
    scores = example()
    assert scores.value("t2i_R@1", "teacher") == 0.5
    with pytest.raises(InputError, match="no score 'student top1'; known metrics: t2i_R@1"):
        scores.value("top1", "student")
    with pytest.raises(InputError, match="2 scores are called"):
        scores.value("t2i_R@1", "student")


def test_known_sets_are_counted() -> None:
    assert known_name("dataset_flickr30k/test") == ("flickr30k", "test")
    assert known_name("my_flickr30k_copy/test") == ("my_flickr30k_copy", "test")
    assert check_known_pairs("dataset_flickr8k/val", 1000, 5000, "all", strict=True) is None
    assert check_known_pairs("dataset_flickr8k/val", 1000, 1000, "first", strict=True) is None
    assert check_known_pairs("dataset_coco/test", 5000, 25_010, "all", strict=True) is None
    assert check_known_pairs("dataset_coco/test", 5000, 25_000, "first 5", strict=True) is None
    assert check_known_pairs("mine/test", 3, 3, "all", strict=True) is None
    found = check_known_pairs("dataset_coco/test", 4999, 24_995, "first 5", strict=False)
    assert found == "4,999 images and 24,995 captions of 5,000 and 25,000 or 25,010"
    with pytest.raises(InputError, match=r"flickr30k/test holds 990 images and 4,950 captions of 1,000 and 5,000"):
        check_known_pairs("flickr30k/test", 990, 4950, "all", strict=True)
    assert "NOT the published set" in protocol(deviation=found).label()


def test_the_protocol_decides_which_captions_count() -> None:
    assert captions_rule("standard", "dataset_flickr8k/val") == "all"
    assert captions_rule("standard", "dataset_coco/test") == "first 5"
    assert captions_rule("first-caption", "dataset_coco/test") == "first"
    with pytest.raises(InputError, match=r"unknown retrieval protocol 'first' .*first-caption"):
        captions_rule("first", "x")


def test_protocols_are_strict_and_digests_tell_parts_apart() -> None:
    with pytest.raises(InputError, match=r"unknown key 'tie' .*'ties'"):
        build(Protocol, {**protocol().model_dump(), "tie": "x"}, "here")
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(["ab", 1]) == digest(["ab", 1])


def test_the_mean_over_sets_is_of_the_same_sets() -> None:
    def scores(*sets: str) -> list[Score]:
        made = [protocol(name="zero-shot", task="zero-shot", dataset=name, captions=None) for name in sets]
        return [Score("top1", 0.5, 10, one, model=sets[-1]) for one in made]

    assert "mean of 2" in shown_overview(Scores(scores("x", "y")))
    assert "mean of" not in shown_overview(Scores([*scores("x", "y"), *scores("x", "z")]))


def shown_overview(scores: Scores) -> str:
    return scores.overview().markdown()


def test_results_query_by_query_are_kept_of_two_names_of_the_same_weights(tmp_path: Path) -> None:
    own, scores = protocol(), Scores()
    for model in ("student", "teacher"):
        scores.scores.append(Score("t2i_R@1", 0.5, 2, own, model=model))
        scores.queries[model, own.question()] = Queries({"t2i_R@1": np.array([1.0, 0.0])})
    scores.save(tmp_path / "scores.json")
    assert set(Scores.load(tmp_path / "scores.json").queries) == set(scores.queries)
