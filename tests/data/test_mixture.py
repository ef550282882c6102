"""Several sets with weights: whose turn a step is, keys, problems, caption rules, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from clipdistill.data.held_out import HeldOutConfig, without_held_out
from clipdistill.data.memory import KeptInMemory
from clipdistill.data.mixture.mixed import TurnSampler
from clipdistill.data.open import check_training, open_pairs, open_training
from clipdistill.data.pairs import DataConfig
from clipdistill.errors import InputError
from tests.data.helpers import encoded


def folder(path, count, captions=True, first=0):
    path.mkdir()
    for i in range(first, first + count):
        (path / f"{i:02d}.jpg").write_bytes(encoded(i))
        if captions:
            (path / f"{i:02d}.txt").write_text(f"caption {i}\nanother {i}\n")
    return str(path)


@pytest.fixture
def sets(tmp_path):
    captioned, bare = folder(tmp_path / "captioned", 7), folder(tmp_path / "bare", 5, captions=False)
    return [{"path": captioned, "weight": 3}, {"path": bare, "weight": 1, "name": "photographs"}]


def opened(sets):
    return open_training(DataConfig(sets=sets))


@pytest.mark.parametrize("weights", [(3, 1), (0.2, 0.5, 0.3), (1, 1, 1), (1e-3, 1)])
def test_turns_keep_to_the_weights_at_every_step(weights):
    sampler = TurnSampler([40, 30, 20][: len(weights)], weights, 4, 0, 0, 1)
    turns = np.array([sampler.turn(step) for step in range(3000)])
    for number, share in enumerate(np.array(weights) / sum(weights)):
        mine = turns[:, 0] == number
        assert np.abs(np.cumsum(mine) - share * np.arange(1, 3001)).max() <= 1
        assert (turns[mine, 1] == np.arange(mine.sum())).all(), "a set's own steps follow each other"


def test_the_order_is_a_function_of_seed_and_step_on_any_number_of_ranks():
    make = lambda rank, world: TurnSampler([10, 6], [2, 1], 5, 3, rank, world)  # noqa: E731
    one = make(0, 1)
    for step in (2000, 0, 17, 5):  # in any order, far ahead first
        ranks = [make(rank, 2).indices(step) for rank in range(2)]
        whole = make(0, 1).indices(step)
        assert whole.tolist() == one.indices(step).tolist() == np.concatenate(ranks).tolist()
        number, _ = one.turn(step)
        assert ((whole >= 10) == (number == 1)).all(), "a batch is of one set"
    epoch = np.concatenate([one.indices(step) for step in range(9) if one.turn(step)[0] == 0][:2])
    assert sorted(epoch.tolist()) == list(range(10)), "an epoch of a set visits each of its samples"


def test_samples_of_all_sets_lie_one_after_the_other(sets):
    source = opened(sets)
    assert len(source) == 12
    assert (source.key(0), source.key(7)) == ("captioned/00.jpg", "photographs/00.jpg")
    assert (source.captions(1), source.captions(8)) == (("caption 1", "another 1"), ())
    assert source.image(7).size == open_pairs(sets[0]["path"]).image(0).size
    assert [source.part(i).name for i in (6, 7)] == ["captioned", "photographs"]
    assert (source.captioned, source.uneven) == (True, True)
    assert source.name == "3 captioned : 1 photographs"
    kept = KeptInMemory(source)
    assert [kept.part(i).name for i in (6, 7)] == ["captioned", "photographs"]
    assert isinstance(kept.sampler(4, 0), TurnSampler)
    with pytest.raises(IndexError):
        source.key(12)


def test_without_weights_sets_count_by_their_size(sets):
    for each in sets:
        del each["weight"]
    assert opened(sets).weights == [7, 5]


def test_plain_names_are_sets_too(sets):
    assert opened([each["path"] for each in sets]).weights == [7, 5]


def test_a_setting_beside_the_sets_is_refused(sets):
    with pytest.raises(InputError, match=r"data.split=train is not applied to several sets: give it in each"):
        open_training(DataConfig(sets=sets, split="train"))


def test_contents_and_not_weights_make_the_fingerprint(sets, tmp_path):
    before = opened(sets).fingerprint()
    sets[0]["weight"] = 9
    assert opened(sets).fingerprint() == before
    sets[0]["caption"] = "none"
    assert opened(sets).fingerprint() != before


def test_caption_rules(sets):
    sets[0]["caption"] = "first"
    assert opened(sets).part(0).rule == "first"
    sets[0]["caption"] = "none"
    source = opened(sets)
    assert (source.captions(0), source.captioned, source.uneven) == ((), False, False)


def test_a_file_of_sets(sets, tmp_path):
    (tmp_path / "mix.yaml").write_text(f"sets: {sets}\nbad_sample_budget: 0.5\n")
    config = DataConfig(path=str(tmp_path / "mix.yaml"))
    assert (config.path, config.bad_sample_budget) == ("", 0.5)
    assert open_training(config).fingerprint() == opened(sets).fingerprint()
    (tmp_path / "other.yaml").write_text("path: x\n")
    with pytest.raises(ValueError, match=r"other.yaml: no file of sets"):
        DataConfig(path=str(tmp_path / "other.yaml"))


def test_held_out_pictures_leave_their_own_set(sets, tmp_path):
    (tmp_path / "test.txt").write_text("00.jpg\n")
    source = without_held_out(opened(sets), HeldOutConfig(data=str(tmp_path / "test.txt"), action="drop"))
    assert (len(source), source.key(6), source.captions(6)) == (10, "photographs/01.jpg", ())
    assert source.problems.total == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, r"data.sets\[1\]: weight"),
        ({"weight": None}, "some have a weight and some have none"),
        ({"wieght": 1}, r"data.sets\[1\]: .*wieght.*weight"),
        ({"caption": "first"}, r"data.sets\[1\]: caption=first, and bare has no captions"),
        ({"path": "nowhere"}, r"data.sets\[1\]: data 'nowhere': no such file"),
        ({"path": None}, r"data.sets\[1\]: path"),
        ({"bad_sample_budget": 0.5}, r"data.sets\[1\]: the budget is one for all sets"),
        ({"name": "captioned"}, r"data.sets\[1\]: two sets are called 'captioned'"),
    ],
)
def test_sets_that_cannot_be(sets, change, message):
    sets[1] |= change
    with pytest.raises(InputError, match=message):
        opened(sets)


def test_a_file_of_sets_that_names_one_is_refused_before_it_is_opened(sets, tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text(f"sets:\n- {{path: '{path}'}}\n- {{path: scenes}}\n")
    for call in (check_training, open_training):
        with pytest.raises(InputError, match=r"data.sets\[0\]: it is a file of sets itself"):
            call(DataConfig(path=str(path)))
    path.write_text("sets: []")
    with pytest.raises(InputError, match="neither a path nor sets are named"):
        check_training(DataConfig(path=str(path)))


def test_one_set_or_a_path_beside_them_is_refused(sets):
    with pytest.raises(InputError, match="one set alone needs no weights"):
        opened(sets[:1])
    with pytest.raises(InputError, match=r"data.path=.* is not applied to several sets"):
        open_training(DataConfig(path=sets[0]["path"], sets=sets))
    with pytest.raises(InputError, match="several sets with weights are for training and caches"):
        open_pairs(DataConfig(sets=sets))
