"""scores.json, scores.npz and claims.json torn, flipped, replaced: one sentence each, and never another number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from clipdistill import cli
from clipdistill.errors import InputError
from clipdistill.report.report import collect
from clipdistill.statistics.compare import compare
from clipdistill.statistics.records import read_records
from clipdistill.statistics.scores import Queries, Score, Scores
from tests.ablate.synthetic import protocol

OTHER_SHAPES = [b"", b"\0" * 400, b"[]", b"[[]]", b"null", b"3", b'"text"', b"{}", b"\xff\xfe{}", b"[" * 100_000,
    b'{"format": 2}', b'{"format": 2, "scores": []}', b'{"format": 1, "scores": {}}', b'{"format": 1, "scores": [[]]}',
    b'{"format": 1, "scores": [], "protocols": {}}', b'{"format": 1, "scores": [], "protocols": [3]}',
    b'{"format": 1, "scores": [], "protocols": [], "notes": 3}', b'{"format": [], "scores": []}', b"9" * 5000,
    b'{"format": 1, "scores": [{"metric": "m", "value": NaN, "n": 1, "low": null, "high": null, "model": "student"}]}',
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with a score, its results query by query, and a claim beside it."""
    own, right = protocol(images=4, captions=12), np.repeat([1.0, 0.0], [5, 7])
    scores = Scores([Score("t2i_R@1", float(right.mean()), 12, own, 0.2, 0.7)])
    scores.queries["student", own.question()] = Queries({"t2i_R@1": right}, {"t2i_R@1": np.arange(12) // 3})
    run = tmp_path / "run"
    run.mkdir()
    scores.save(run / "scores.json")
    (run / "run.json").write_text(json.dumps({"method": "clip", "seed": 0, "name": "run", "status": "finished"}))
    rows = [{"claim": "clip >= 0.3 on flickr8k t2i_R@1", "verdict": "undecided", "evidence": "?"}]
    (run / "claims.json").write_text(json.dumps({"format": 1, "claims": rows}))
    return run


def damaged(content: bytes, stride: int) -> Iterator[bytes]:
    """Cut at every byte, single bits flipped (every `stride`th), stretches of NUL bytes, a stretch doubled."""
    for end in range(len(content)):
        yield content[:end]
    for bit in range(0, 8 * len(content), stride):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)
    for start in range(0, len(content), 97):
        yield content[:start] + b"\0" * 50 + content[start + 50 :]
        yield content[: start + 50] + content[start:]


def loaded(path: Path) -> Scores | None:
    """What is believed of a file; None when it is refused in one sentence that names it."""
    try:
        return Scores.load(path)
    except InputError as error:
        text = str(error)
        assert text.startswith(str(path.parent)), text
        assert "\n" not in text.strip()
        return None


def refusal(ask: Callable[[], object]) -> str | None:
    try:
        ask()
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["scores.json", "scores.npz"])
def test_damage_never_changes_a_number(folder: Path, name: str) -> None:
    path, content = folder / name, (folder / name).read_bytes()
    whole = Scores.load(folder / "scores.json")
    refused = 0
    for changed in damaged(content, stride=11):
        path.write_bytes(changed)
        found = loaded(folder / "scores.json")
        refused += found is None
        if found is not None:  # a blank more or less
            assert found.scores == whole.scores
            assert [q.values["t2i_R@1"].tolist() for q in found.queries.values()] == [[1.0] * 5 + [0.0] * 7]
    assert refused > 0.9 * len(content)


@pytest.mark.parametrize("content", OTHER_SHAPES, ids=lambda c: c[:40].decode("latin-1"))
@pytest.mark.parametrize("name", ["scores.json", "scores.npz", "claims.json"])
def test_every_reader_says_it_in_one_sentence(folder: Path, name: str, content: bytes, capsys) -> None:
    (folder / name).write_bytes(content)
    for ask in (lambda: collect([folder]), lambda: read_records([folder]), lambda: compare([folder], [folder])):
        said = refusal(ask)
        assert said is None or name in said
    (folder / "mine.yaml").write_text("claims: [{id: a, claim: clip >= 0.3 on flickr8k t2i_R@1}]")
    code = cli.main(["claims", str(folder / "mine.yaml"), str(folder), "--json", str(folder / "out.json")])
    said = capsys.readouterr().err
    assert code == (0 if name == "claims.json" else 2)
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == (0 if code == 0 else 1)


def test_damaged_claims_are_named(folder: Path) -> None:
    content = (folder / "claims.json").read_bytes()
    for changed in damaged(content, stride=5):
        (folder / "claims.json").write_bytes(changed)
        said = refusal(lambda: collect([folder]))
        assert said is None or "claims.json" in said


def test_queries_of_another_measurement_are_not_taken_for_this_one(folder: Path) -> None:
    other = Scores.load(folder / "scores.json")
    (old,) = other.queries.values()
    old.values["t2i_R@1"] = 1 - old.values["t2i_R@1"]
    other.save(folder / "other.json")
    (folder / "other.npz").replace(folder / "scores.npz")  # what a crash between the two writes would leave
    with pytest.raises(InputError, match=r"of another measurement than scores\.json"):
        Scores.load(folder / "scores.json")
    # scores without them take the old ones away
    other.queries.clear()
    other.save(folder / "scores.json")
    assert not (folder / "scores.npz").exists()


def test_scores_of_the_first_format_are_read(folder: Path) -> None:
    stored = json.loads((folder / "scores.json").read_text())
    del stored["sha256"], stored["queries_sha256"]
    (folder / "scores.json").write_text(json.dumps(stored | {"format": 1}))
    found = Scores.load(folder / "scores.json")
    assert found.scores[0].value == pytest.approx(5 / 12)
    assert len(found.queries) == 1


def test_scores_changed_by_hand_are_refused(folder: Path) -> None:
    text = (folder / "scores.json").read_text()
    (folder / "scores.json").write_text(text.replace("0.41666", "0.91666"))
    with pytest.raises(InputError, match=r"damaged or changed by hand .*: measure again with  clipdistill eval"):
        Scores.load(folder / "scores.json")
