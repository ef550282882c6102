"""`compare`: the same queries, the same protocol, seeds paired where there are several."""

import json
from pathlib import Path

import numpy as np
import pytest

from clipdistill import cli
from clipdistill.errors import InputError
from clipdistill.statistics.bootstrap import bootstrap_difference, holm, mcnemar
from clipdistill.statistics.compare import compare
from clipdistill.statistics.judge import decide
from clipdistill.statistics.records import read_records
from clipdistill.statistics.scores import Queries, Score, Scores
from clipdistill.statistics.verdicts import QUERIES_ALONE
from tests.ablate.synthetic import protocol, scores_of


def write(folder: Path, rate: float, seed: int = 0, method: str = "kd", **changes) -> Path:
    folder.mkdir(parents=True)
    scores_of(rate, seed, fingerprint=folder.name, **changes).save(folder / "scores.json")
    (folder / "run.json").write_text(json.dumps({"method": method, "seed": seed, "name": folder.name}))
    return folder


def values(folder: Path) -> np.ndarray:
    scores = Scores.load(folder / "scores.json")
    return next(q for (model, _), q in scores.queries.items() if model == "student").values["t2i_R@1"]


def test_two_models_are_compared_on_the_same_queries(tmp_path):
    a, b = write(tmp_path / "a", 0.40), write(tmp_path / "b", 0.35)
    result = compare([a], [b])
    (found,) = result.differences
    expected = bootstrap_difference(values(a), values(b), np.arange(3000) // 5)
    verdict = found.verdict
    assert (verdict.queries, verdict.images, verdict.basis) == (3000, 600, "queries alone")
    assert (verdict.low, verdict.high, verdict.p_holm) == pytest.approx((expected.low, expected.high, verdict.p))
    assert found.outcome == "a"
    assert compare([b], [a]).differences[0].outcome == "b"
    same = compare([a], [a]).differences[0]
    assert (same.value, same.verdict.p, same.outcome) == (0, 1, "undecided")


def test_several_seeds_are_paired(tmp_path):
    ours = [write(tmp_path / f"a{seed}", 0.41, seed, "rd") for seed in range(4)]
    base = [write(tmp_path / f"b{seed}", 0.35, seed, "kd") for seed in (1, 2, 3, 4)]
    result = compare(ours, base)
    (found,) = result.differences
    assert result.shared_seeds == 3
    assert (result.a.name, result.b.name) == ("rd", "kd")
    records = {(r.method, r.seed): r for r in read_records([*ours, *base]) if r.method != "teacher"}
    expected = decide([records["rd", s] for s in (1, 2, 3)], [records["kd", s] for s in (1, 2, 3)])
    assert (found.verdict.low, found.verdict.high, found.verdict.p) == (expected.low, expected.high, expected.p)
    assert found.value == pytest.approx(expected.effect)
    assert found.outcome == "a"


def test_seeds_that_are_not_shared_are_compared_unpaired(tmp_path):
    ours = [write(tmp_path / f"a{seed}", 0.40, seed, "rd") for seed in (0, 1)]
    base = [write(tmp_path / f"b{seed}", 0.40, seed, "kd") for seed in (2, 3, 4)]
    result = compare(ours, base)
    assert result.shared_seeds == 0
    verdict = result.differences[0].verdict
    assert (verdict.basis, verdict.seeds, verdict.seeds_right) == ("unpaired seeds and queries", 2, 3)
    assert result.differences[0].outcome == "undecided"


def test_other_protocols_are_refused(tmp_path):
    a = write(tmp_path / "a", 0.4)
    b = write(tmp_path / "b", 0.4, captions_per_image="first", name="first-caption")
    with pytest.raises(InputError, match=r"different protocols on flickr8k \(captions_per_image: all / first"):
        compare([a], [b])
    c = write(tmp_path / "c", 0.4, keys_sha256="cd" * 32)
    with pytest.raises(InputError, match="other samples, captions or labels under that name"):
        compare([a], [c])
    d = write(tmp_path / "d", 0.4, dataset="coco")
    with pytest.raises(InputError, match="a was measured on flickr8k, d on coco: no data set in common"):
        compare([a], [d])


def test_sides_that_cannot_be_read_are_refused(tmp_path):
    a = write(tmp_path / "a", 0.4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no scores\.json there"):
        compare([a], [tmp_path / "empty"])
    with pytest.raises(InputError, match="another run of this side has the seed 0"):
        compare([a, write(tmp_path / "again", 0.4)], [a])
    with pytest.raises(InputError, match="none of the metrics top1"):
        compare([a], [a], metrics=["top1"])
    with pytest.raises(InputError, match="at least one run"):
        compare([a], [])


def test_classifiers_get_mcnemar_and_metrics_are_adjusted_together(tmp_path):
    rng = np.random.default_rng(1)
    right = {name: (rng.random(400) < rate).astype(float) for name, rate in (("a", 0.6), ("b", 0.5))}
    for name, top1 in right.items():
        own = protocol(task="zero-shot", name="zero-shot", captions=None, captions_per_image=None, classes=10)
        top5 = np.maximum(top1, rng.random(400) < 0.5)
        scores = Scores([Score(m, v.mean(), 400, own) for m, v in (("top1", top1), ("top5", top5))])
        scores.queries["student", own.question()] = Queries({"top1": top1, "top5": top5})
        scores.save(tmp_path / f"{name}.json")
    found = compare([tmp_path / "a.json"], [tmp_path / "b.json"]).differences
    assert [t.metric for t in found] == ["top1", "top5"]
    assert found[0].mcnemar == mcnemar(right["a"], right["b"])
    assert [t.verdict.p_holm for t in found] == holm([t.verdict.p for t in found])


def test_models_of_one_file_are_compared_by_name(tmp_path):
    """`eval A B --json FILE` writes one file."""
    both = Scores()
    for name, folder in (("runs/a", write(tmp_path / "a", 0.6)), ("runs/b", write(tmp_path / "b", 0.3))):
        both.add(Scores.of_run(folder).renamed("student", name))
    both.save(tmp_path / "both.json")
    found = compare(f"{tmp_path}/both.json@runs/a", f"{tmp_path}/both.json@runs/b")
    wanted = compare(tmp_path / "a", tmp_path / "b")
    assert (found.a.name, found.b.name) == ("runs/a", "runs/b")
    assert [one.value for one in found.differences] == [one.value for one in wanted.differences]
    assert compare(tmp_path / "a", f"{tmp_path}/both.json@runs/a").differences[0].value == 0
    for name in ("both.json", "both.json@runs/c"):
        with pytest.raises(
            InputError, match=r"it holds those of runs/a, teacher, runs/b; one of them is .*both\.json@runs/a"
        ):
            compare(tmp_path / name, tmp_path / "a")


def test_the_command_prints_and_writes(tmp_path, capsys):
    a, b = write(tmp_path / "a", 0.40), write(tmp_path / "b", 0.35)
    assert cli.main(["compare", str(a), str(b), "--json", str(tmp_path / "c.json")]) == 0
    printed = capsys.readouterr().out
    assert "a: a\nb: b\n" in printed
    assert QUERIES_ALONE in printed.replace("\n", " ")
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored["differences"][0]["outcome"] == "a"
    assert cli.main(["compare", str(a)]) == 2
    assert "name two runs" in capsys.readouterr().err


def test_classifiers_with_ties_are_compared_without_mcnemar(tmp_path):
    """Two classes of one name share their pictures' hits half and half."""
    own = protocol(name="zero-shot", task="zero-shot", captions=None)
    files = []
    for name, hit in (("a", [1.0, 0.5, 1.0, 0.5]), ("b", [0.0, 0.5, 1.0, 0.0])):
        scores = Scores([Score("top1", float(np.mean(hit)), 4, own.model_copy(update={"model_fingerprint": name}))])
        scores.queries["student", scores.scores[0].protocol.question()] = Queries({"top1": np.array(hit)})
        scores.save(tmp_path / f"{name}.json")
        files.append(tmp_path / f"{name}.json")
    [found] = compare(*files).differences
    assert found.mcnemar is None
    assert found.value == pytest.approx(0.375)
