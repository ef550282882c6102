"""Training on several sets: counts and losses of each in the log, exact resume, caches, ranks."""

from __future__ import annotations

import json

import pytest

from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import fill
from clipdistill.errors import InputError, Preempted
from clipdistill.scenes.pairs import open_scenes
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from tests.train.support import lines, require_same_run, stop_after
from tests.train.test_ranks import train as train_on_ranks

TERMS = {"task", "crd", "icl", "fd"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Built-in pairs, and a folder of pictures without captions."""
    folder = tmp_path_factory.mktemp("data") / "photographs"
    folder.mkdir()
    source = open_scenes("val", 24)
    for i in range(24):
        source.image(i).save(folder / f"{i:03d}.png")
    return [{"path": "scenes:train", "size": 40, "weight": 2, "name": "pairs"}, {"path": str(folder), "weight": 1}]


def run(out, sets, *assignments, recipe="clip-kd", **settings):
    given = {"out": str(out), "data": {"sets": sets}, **settings}
    changes = ("train.batch_size=8", "train.steps=6", "objective.weights.cosine_image=1", *assignments)
    return distill(resolve(recipe, given, size="debug", assignments=changes), quiet=True)


def rows(out):
    return lines(out / "log.jsonl")


def test_the_log_tells_counts_and_losses_of_each_set(sets, tmp_path):
    run(tmp_path / "run", sets, "train.log_every=3")
    first, last = rows(tmp_path / "run")
    assert {name: own["samples"] for name, own in last["sets"].items()} == {"pairs": 32, "photographs": 16}
    assert [own["steps"] for own in last["sets"].values()] == [2, 1]
    for line in (first, last):
        pairs, photographs = line["sets"]["pairs"], line["sets"]["photographs"]
        assert set(pairs) >= {*TERMS, "cosine_image", "total"}
        assert not {*photographs} & TERMS
        assert line["total"] == pytest.approx((2 * pairs["total"] + photographs["total"]) / 3)
        assert line["terms"]["task"] == pytest.approx(pairs["task"]), "a mean over the steps that have the term"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sets"] == {"pairs": 32, "photographs": 16}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("extra", [("train.log_every=4",), ("train.workers=2", "train.micro_batch=3")])
def test_a_stopped_run_goes_on_to_the_bit(sets, tmp_path, monkeypatch, extra):
    run(tmp_path / "whole", sets, *extra)
    stop_after(monkeypatch, 3)
    with pytest.raises(Preempted, match="after step 3"):
        run(tmp_path / "parts", sets, *extra)
    monkeypatch.undo()
    run(tmp_path / "parts", sets, *extra)
    require_same_run(tmp_path / "whole", tmp_path / "parts", 6)


def test_a_set_that_is_small_or_never_has_its_turn_is_told(sets, tmp_path, capsys):
    small = {"path": "scenes:val", "size": 3, "name": "few", "weight": 1}
    given = {"out": str(tmp_path / "run"), "data": {"sets": [sets[0], small, {**sets[1], "weight": 1e-9}]}}
    changes = ("train.batch_size=8", "train.steps=2", "objective.weights.cosine_image=1")
    distill(resolve("clip-kd", given, size="debug", assignments=changes))
    said = capsys.readouterr().err
    assert "few has 3 samples, so its batches have no more, instead of 8" in said
    assert "photographs has so small a weight that none of 2 steps is its turn" in said
    with pytest.raises(InputError, match=r"'few': 1 usable pairs; training needs at least 2"):
        run(tmp_path / "one", [sets[0], {**small, "size": 1}])


def test_other_weights_are_another_run(sets, tmp_path):
    run(tmp_path / "run", sets)
    (tmp_path / "run" / "run.json").write_text(
        (tmp_path / "run" / "run.json").read_text().replace('"finished"', '"stopped"')
    )
    with pytest.raises(InputError, match=r"other settings \(data.sets"):
        run(tmp_path / "run", [{**sets[0], "weight": 5}, sets[1]])


def test_a_cache_of_several_sets(sets, tmp_path):
    store = tmp_path / "cache"
    fill(CacheConfig(teacher="scenes-teacher", data={"sets": sets}, out=store, workers=0))
    run(tmp_path / "live", sets, "train.views=fixed")
    run(tmp_path / "cached", [{**sets[0], "weight": 2}, sets[1]], teacher=f"cache:{store}")
    for live, cached in zip(rows(tmp_path / "live"), rows(tmp_path / "cached"), strict=True):
        assert cached["terms"] == pytest.approx(live["terms"], rel=5e-3)


def test_a_term_that_no_set_serves_is_refused_by_name(sets, tmp_path):
    bare = [sets[1], {**sets[0], "caption": "none"}]
    with pytest.raises(InputError, match=r"^the terms task, crd, icl, fd need captions, and photographs has none"):
        run(tmp_path / "run", bare)


@pytest.mark.slow
def test_two_ranks_equal_one_process(sets, tmp_path):
    (tmp_path / "mix.yaml").write_text(json.dumps({"sets": sets}))
    extra = ("--data", str(tmp_path / "mix.yaml"), "--recipe", "clip-kd", "objective.weights.cosine_image=1")
    for ranks in (1, 2):
        train_on_ranks(tmp_path / str(ranks), ranks, *extra, "train.steps=6", "train.evaluate_every=null")
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        assert two["total"] == pytest.approx(one["total"], rel=1e-4)
        assert {n: own["samples"] for n, own in two["sets"].items()} == {
            n: own["samples"] for n, own in one["sets"].items()
        }
