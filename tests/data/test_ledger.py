"""The list of bad samples and its budget; tallies, subsets and packed strings."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipdistill.data.ledger import BadSampleLedger
from clipdistill.data.pairs import Strings, Subset
from clipdistill.data.problems import ROWS_KEPT, BadSample, Problems
from clipdistill.errors import BudgetError, InputError
from tests.data.helpers import MemoryPairs


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_rows_hold_key_reason_and_shard(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    ledger = BadSampleLedger(path, 0.5, shard_of=lambda key: "7.tar" if key.startswith("7/") else None)
    ledger.record([("7/a", "corrupt image: x"), ("b\u2028ü", "empty image file")], seen=100)
    ledger.record([("7/a", "corrupt image: x"), ("7/c", "corrupt image: y")], seen=100)
    assert lines(path) == [
        {"key": "7/a", "reason": "corrupt image: x", "shard": "7.tar"},
        {"key": "b\u2028ü", "reason": "empty image file"},
        {"key": "7/c", "reason": "corrupt image: y", "shard": "7.tar"},
    ]
    assert ledger.by_reason == {"corrupt image": 3, "empty image file": 1}
    assert (ledger.bad, ledger.seen) == (4, 200)


def test_row_1_the_budget_stops_the_run_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    ledger = BadSampleLedger(path, 0.01)
    for number in range(10):  # within the minimum allowance
        ledger.record([(f"k{number}", "corrupt image: x")], seen=1)
    with pytest.raises(BudgetError) as caught:
        ledger.record([("k10", "truncated image: x")], seen=1)
    assert str(caught.value) == (
        "11 of 11 samples are bad (10 corrupt image, 1 truncated image); the budget is 1.000%, at least 10: look at "
        f"{path}, then mend the data or raise data.bad_sample_budget"
    )
    assert caught.value.exit_code == 3
    assert len(lines(path)) == 11


def test_the_budget_is_a_fraction_of_what_was_seen(tmp_path: Path) -> None:
    ledger = BadSampleLedger(tmp_path / "bad.jsonl", 0.01)
    ledger.record([], seen=5000)
    ledger.record([(f"k{n}", "corrupt image") for n in range(50)], seen=0)
    with pytest.raises(BudgetError, match="51 of 5000"):
        ledger.record([("one more", "corrupt image")], seen=0)


def test_a_budget_of_nothing_tolerates_nothing(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"1 of 1000 .* the budget is 0.000%, at least 0"):
        BadSampleLedger(tmp_path / "bad.jsonl", 0.0).record([("k", "corrupt image")], seen=1000)
    assert not BadSampleLedger(tmp_path / "other.jsonl", 1.0).record([(str(n), "x") for n in range(100)], seen=100)


def test_what_opening_found_counts_as_well(tmp_path: Path) -> None:
    problems = Problems()
    problems.add("missing image file", "gone.jpg", dropped=True)
    problems.add("empty caption", "a.jpg")
    ledger = BadSampleLedger(tmp_path / "bad.jsonl", 0.1)
    ledger.record_opening(problems, total=100)
    assert (ledger.bad, ledger.seen) == (1, 100)
    assert [row["reason"] for row in lines(ledger.path)] == ["missing image file", "empty caption"]
    for number in range(20):
        problems.add("missing image file", f"{number}.jpg", dropped=True)
    with pytest.raises(BudgetError, match=r"21 of 100 .*20|21 missing image file"):
        BadSampleLedger(tmp_path / "other.jsonl", 0.1).record_opening(problems, total=100)


def test_an_interrupted_list_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    first = BadSampleLedger(path, 0.5)
    first.record([("a", "corrupt image"), ("b", "corrupt image")], seen=100)
    state = json.loads(json.dumps(first.state()))
    with path.open("a") as file:
        file.write('{"key": "cut of')  # killed while writing
    second = BadSampleLedger(path, 0.5)
    second.restore(state)
    second.record([("b", "corrupt image"), ("c", "corrupt image")], seen=10)
    rows = path.read_text().splitlines()
    assert rows[2] == '{"key": "cut of'
    assert [json.loads(rows[n])["key"] for n in (0, 1, 3)] == ["a", "b", "c"]
    assert (second.seen, second.bad, dict(second.by_reason)) == (110, 4, {"corrupt image": 4})


def test_names_that_are_no_text_can_be_listed(tmp_path: Path) -> None:
    ledger = BadSampleLedger(tmp_path / "bad.jsonl", 0.5)
    ledger.record([("file\udcff.jpg", "missing image file")], seen=1)
    assert lines(ledger.path)[0]["key"] == "file\udcff.jpg"


def test_problems_count_everything_and_keep_the_first_rows() -> None:
    problems = Problems()
    assert not problems
    for number in range(ROWS_KEPT + 5):
        problems.add("empty caption", str(number))
    problems.add("corrupt image: a", "x", dropped=True)
    problems.add("corrupt image: b", "y", times=3)
    assert problems
    assert problems.counts == {"empty caption": ROWS_KEPT + 5, "corrupt image": 4}
    assert len(problems.rows) == ROWS_KEPT + 2
    assert problems.total == ROWS_KEPT + 9
    other = Problems()
    other.add("corrupt image", "z", dropped=True)
    problems.merge(other)
    assert problems.counts["corrupt image"] == 5
    assert problems.dropped == 2
    assert problems.summary() == f"5 corrupt image, {ROWS_KEPT + 5} empty caption"


def test_bad_samples_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadSample("corrupt image: x", "key")))
    assert (error.key, error.reason, str(error)) == ("key", "corrupt image: x", "key: corrupt image: x")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=20))
def test_packed_strings_are_the_strings(texts: list[str]) -> None:
    packed = Strings.pack(texts)
    assert len(packed) == len(texts)
    assert list(packed) == texts
    assert [packed[i] for i in range(len(texts))] == texts
    for outside in (-1, len(texts)):
        with pytest.raises(IndexError):
            packed[outside]


def test_fingerprints_tell_pairs_apart() -> None:
    source = MemoryPairs(6)
    assert source.fingerprint() == MemoryPairs(6).fingerprint()
    values = {
        source.fingerprint(),
        MemoryPairs(7).fingerprint(),
        MemoryPairs(6, captions=2).fingerprint(),
        Subset(source, indices=[1, 0, 2, 3, 4, 5]).fingerprint(),
        Subset(source, indices=[0, 1, 2, 3, 4]).fingerprint(),
    }
    assert len(values) == 5
    assert Subset(source, indices=range(6)).fingerprint() == source.fingerprint()


def test_subset() -> None:
    source = MemoryPairs(10, bad={3: "corrupt image: x"})
    part = Subset(source, 4)
    assert [part.key(i) for i in range(len(part))] == [source.key(i) for i in (0, 2, 5, 7)]
    assert part.captions(1) == source.captions(2)
    assert part.image_bytes(1) == source.image_bytes(2)
    assert part.image(1).tobytes() == source.image(2).tobytes()
    assert part.name == "memory10[4 of 10]"
    assert len(Subset(source, 99)) == 10
    chosen = Subset(source, indices=np.array([3, 1]))
    with pytest.raises(BadSample) as caught:
        chosen.image(0)
    assert caught.value.key == "sample-0003"
    for arguments, message in [
        ({}, "either a number of samples or"),
        ({"count": 0}, "at least one sample"),
        ({"indices": [10]}, "leave the 10 samples"),
        ({"indices": [-1]}, "leave the 10 samples"),
    ]:
        with pytest.raises(InputError, match=message):
            Subset(source, **arguments)  # type: ignore[arg-type]
