"""The teacher's rows of the whole set: what a step is compared with, samples of it, cleaned targets, exact resume."""

import itertools

import numpy as np
import pytest
import torch

from clipdistill.bank import rows as module
from clipdistill.bank.rows import BankOfSet, Cleaning, SetRows
from clipdistill.bank.teacher import BankTeacher
from clipdistill.cache.teacher import CacheUse, open_cached_teacher
from clipdistill.data.loader import PairLoader
from clipdistill.data.sampler import step_sample
from clipdistill.errors import InputError, Preempted
from clipdistill.models import load_model
from clipdistill.runs.folder import read_rows
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from tests.cache.support import filled, saved_teacher, scenes
from tests.train.support import signal_at

SIZE = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory, teacher):
    return filled(tmp_path_factory.mktemp("cache") / "c", teacher, SIZE)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return saved_teacher(tmp_path_factory.mktemp("student") / "student", seed=3, dim=16)


@pytest.fixture(params=["in memory", "on disk"])
def rows(request, store, monkeypatch):
    if request.param == "on disk":
        monkeypatch.setattr(module, "LARGEST", 100)
    monkeypatch.setattr(module, "_PART", 7)
    found = SetRows(store, 0, scenes(SIZE), "random")
    assert found.in_memory == (request.param == "in memory")
    return found


def batches(store, student, steps=2, **settings):
    cached = open_cached_teacher(f"cache:{store.folder}", scenes(SIZE), torch.device("cpu"), CacheUse())
    loader = PairLoader(
        scenes(SIZE), batch_size=6, student=load_model(student), stored=cached.stored, steps=steps, **settings
    )
    return cached, list(loader)


def test_rows_are_those_of_the_cache_in_the_order_of_the_set(store, rows):
    source = scenes(SIZE)
    image, text = rows.rows()
    start = 0
    for index in range(SIZE):
        captions = range(len(source.captions(index)))
        one, all_of_it = store.read(0, [index] * len(captions), list(captions), [0] * len(captions))
        torch.testing.assert_close(image[index], torch.nn.functional.normalize(one[0], dim=0))
        torch.testing.assert_close(text[start : start + len(captions)], torch.nn.functional.normalize(all_of_it, dim=1))
        start += len(captions)
    assert start == len(text)
    some = np.array([3, 20, 5])
    one, all_of_it = rows.rows(some)
    assert torch.equal(one, image[some])
    assert torch.equal(all_of_it[: rows.counts[3]], text[rows.first[3] : rows.first[3] + rows.counts[3]])


def test_a_row_finds_itself_in_the_bank(store, student):
    cached, (batch, _) = batches(store, student)
    rows = SetRows(store, 0, scenes(SIZE), "random")
    for samples in (None, 5):
        found = BankOfSet(rows, None, samples, 0, torch.device("cpu"))(batch)
        taught = cached(batch)
        assert len(found.place) == 6
        torch.testing.assert_close(found.image[found.place], taught.image)
        own = found.side("text").own
        columns = own[torch.arange(6), batch.caption_indices]
        torch.testing.assert_close(found.text[columns], taught.text)


def test_every_rank_compares_a_row_with_the_same_columns(store, student, rows):
    """The sample depends on (seed, step); other rows' own pictures are hidden."""
    _, whole = batches(store, student)
    shares = [batches(store, student, rank=rank, world=2)[1] for rank in range(2)]
    of = {seed: BankOfSet(rows, None, 5, seed, torch.device("cpu")) for seed in (0, 1)}

    def columns(found, row):
        side = found.side("image")
        seen = (torch.arange(len(side.rows)) < side.shared) | (side.owner == found.place[row])
        return side.rows[seen]

    for step in range(2):
        one = of[0](whole[step])
        together = [(of[0](share[step]), row) for share in shares for row in range(len(share[step].indices))]
        for row, (found, own) in enumerate(together):
            mine, theirs = columns(one, row), columns(found, own)
            assert torch.equal(torch.sort(mine, 0)[0], torch.sort(theirs, 0)[0])
            assert 5 <= len(mine) <= 6
    shared = [of[seed](batch).image[:5] for seed, batch in itertools.product((0, 1), whole)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(shared, 2))
    assert torch.equal(of[0](whole[1]).image[:5], shared[1])


def test_samples_are_without_repetition_and_spread():
    for n, count in ((10, 3), (10, 9), (100_000, 700), (100_000, 60_000)):
        found = step_sample(n, count, 3, 5)
        assert len(np.unique(found)) == count
        assert found.min() >= 0
        assert found.max() < n
        assert np.array_equal(found, step_sample(n, count, 3, 5))
        assert not np.array_equal(found, step_sample(n, count, 3, 6))
    assert abs(step_sample(100_000, 5000, 0, 0).mean() / 50_000 - 1) < 0.05


def test_a_set_too_large_for_memory_asks_for_a_sample(store, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 100)
    rows = SetRows(store, 0, scenes(SIZE), "random")
    with pytest.raises(InputError, match=r"all 24 pictures and their captions take .*kB: set train.bank_samples"):
        BankOfSet(rows, None, None, 0, torch.device("cpu"))


def test_unreadable_pictures_have_no_place(store, monkeypatch):
    monkeypatch.setattr(store, "valid", lambda index: index != 2)
    rows = SetRows(store, 0, scenes(SIZE), "random")
    assert len(rows.samples) == SIZE - 1
    assert 2 not in rows.samples


@pytest.mark.parametrize("targets", ["centred", "pca", "whitened"])
def test_cleaned_targets_against_numpy(store, rows, targets):
    image, text = (part.double().numpy() for part in rows.rows())
    cleaning = Cleaning.fit(rows, targets, 8)
    found = cleaning(torch.from_numpy(text), "text").numpy()
    centred = text - text.mean(0)
    if targets == "centred":
        expected = centred
        assert cleaning.kept == 1
    else:
        spread = (np.cov(image.T, bias=True) + np.cov(text.T, bias=True)) / 2
        values, axes = np.linalg.eigh(spread)
        values, axes = values[::-1], axes[:, ::-1][:, :8]
        assert cleaning.kept == pytest.approx(values[:8].sum() / values.sum(), rel=1e-6)
        if targets == "whitened":
            axes = axes / np.sqrt(values[:8] + 1e-4 * values[0])
        expected = centred @ axes
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    # axes are free up to their sign
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    with pytest.raises(InputError, match="the student's embeddings are 99 wide, the teacher's 32"):
        Cleaning.fit(rows, "pca", 99)


def _config(out, teacher, student, *assignments, recipe="clip-rd", steps=6, **weights):
    given = {
        "student": "tiny",
        "student_weights": student,
        "teacher": teacher,
        "data": {"path": "scenes:train", "size": SIZE},
        "out": str(out),
        "preflight": {"allow_weak_teacher": True},
        "objective": {"weights": {"bank_cross": 1, "bank_within": 1, "bank_xrd": 0.5, **weights}},
        "train": {"steps": steps, "batch_size": 8, "warmup_steps": 1, "precision": "fp32", "log_every": 1},
    }
    return resolve(recipe, given, assignments=list(assignments))


def _losses(out):
    return [{"total": line["total"], **line["terms"]} for line in read_rows(out / "log.jsonl")]


@pytest.mark.parametrize("settings", [["train.bank_samples=5", "train.teacher_targets=pca"]])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, store, student, settings, monkeypatch, capsys):
    name = f"cache:{store.folder}"
    distill(_config(tmp_path / "whole", name, student, *settings), quiet=True)
    expected = _losses(tmp_path / "whole")
    assert len(expected) == 6
    assert {"bank_cross", "bank_within", "bank_xrd"} <= set(expected[0])
    signal_at(monkeypatch, 3)
    with pytest.raises(Preempted):
        distill(_config(tmp_path / "parts", name, student, *settings), quiet=True)
    distill(_config(tmp_path / "parts", name, student, *settings), quiet=True)
    assert _losses(tmp_path / "parts") == expected


def test_pca_targets_need_no_projection(store, student):
    from clipdistill.train.run import make_task

    for targets, widths in (("raw", (16, 32)), ("centred", (16, 32)), ("pca", (16, 16)), ("whitened", (16, 16))):
        config = _config("x", f"cache:{store.folder}", student, f"train.teacher_targets={targets}")
        objective = make_task(config, torch.device("cpu")).setup.objective
        assert (objective.student_dim, objective.teacher_dim) == widths
        assert (objective.image_projection is None) == (widths[0] == widths[1])


@pytest.mark.parametrize("assignment", ["objective.weights.bank_within=1", "train.teacher_targets=pca"])
def test_without_a_cache_one_sentence_refuses(teacher, assignment):
    given = {"teacher": teacher, "student": "S", "data": "scenes", "out": "x"}
    with pytest.raises(InputError, match=r"needs the teacher's embeddings of the whole .*--teacher cache:DIR") as error:
        resolve("clip-kd", given, assignments=[assignment])
    assert "\n" not in str(error.value)


def test_one_teacher_of_several_has_a_bank(tmp_path, teacher, second_teacher, student):
    both = filled(tmp_path / "c", f"{teacher},{second_teacher}", SIZE)
    cached = open_cached_teacher(f"cache:{both.folder}", scenes(SIZE), torch.device("cpu"), CacheUse())
    with pytest.raises(InputError, match=r"are those of one teacher, .* take one, teacher=cache:DIR\?teacher=0"):
        BankTeacher(cached, scenes(SIZE), captions="random", targets="raw", width=16, bank=True, samples=None, seed=0)
    distill(_config(tmp_path / "run", f"cache:{both.folder}?teacher=1", student, steps=1), quiet=True)
