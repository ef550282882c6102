"""Shares of one data set and stores of several, put together."""

import multiprocessing
import os
import signal
import sys

import pytest
import torch

from clipdistill.cache.check import verify
from clipdistill.cache.fill import fill
from clipdistill.cache.merge import merge
from clipdistill.cache.store import CacheStore
from clipdistill.cache.teacher import CacheUse, open_cached_teacher
from clipdistill.data.pairs import Subset
from clipdistill.errors import InputError
from tests.cache.support import cache_config, contents, filled, scenes
from tests.cache.test_fill import VIEWS


def test_shares_filled_apart_become_the_whole_store(tmp_path, teacher):
    filled(tmp_path / "whole", teacher, 40, **VIEWS)
    for share in range(3):
        fill(cache_config(tmp_path / f"{share}", teacher, 40, **VIEWS, part=f"{share}/3"))
    with pytest.raises(InputError, match="blocks are not filled"):
        CacheStore(tmp_path / "0").require_complete()
    merge(tmp_path / "merged", [tmp_path / f"{share}" for share in range(3)])
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")


def _part(folder, teacher, indices, **settings):
    config = cache_config(folder, teacher, 40, **VIEWS, **settings)
    return fill(config, source=Subset(scenes(40), indices=indices)).store


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_stores_of_different_data_follow_each_other(tmp_path, teacher, dtype):
    first = _part(tmp_path / "a", teacher, range(11), dtype=dtype)
    second = _part(tmp_path / "b", teacher, range(11, 30), dtype=dtype)
    merged = merge(tmp_path / "merged", [first.folder, second.folder])
    assert verify(merged.folder).good
    for index in (0, 10, 11, 18, 29):
        store, place = (first, index) if index < 11 else (second, index - 11)
        assert torch.equal(merged.read(0, [index], [3], [2])[0], store.read(0, [place], [3], [2])[0])
        assert torch.equal(merged.read(0, [index], [3], [2])[1], store.read(0, [place], [3], [2])[1])
        assert merged.view(index, 1) == store.view(place, 1)
    joined = Subset(scenes(40), indices=range(30))
    assert open_cached_teacher(f"cache:{merged.folder}", joined, torch.device("cpu"), CacheUse()).blocks == (32,)
    with pytest.raises(InputError, match="data order"):
        swapped = Subset(scenes(40), indices=[*range(11, 30), *range(11)])
        open_cached_teacher(f"cache:{merged.folder}", swapped, torch.device("cpu"), CacheUse())


def test_a_merged_store_can_grow(tmp_path, teacher):
    stores = [_part(tmp_path / "a", teacher, range(11)), _part(tmp_path / "b", teacher, range(11, 20))]
    merge(tmp_path / "merged", [store.folder for store in stores])
    assert (
        fill(
            cache_config(tmp_path / "merged", teacher, 25, **VIEWS), source=Subset(scenes(40), indices=range(25))
        ).samples
        == 5
    )
    assert verify(tmp_path / "merged").good


def test_stores_that_differ_are_refused(tmp_path, teacher, second_teacher):
    first = filled(tmp_path / "a", teacher, 16)
    cases = {
        "dtype": filled(tmp_path / "b", teacher, 16, dtype="int8"),
        "teachers.0.weights|teachers.0": filled(tmp_path / "c", second_teacher, 16),
        "views": filled(tmp_path / "d", teacher, 16, **VIEWS),
    }
    for message, other in cases.items():
        with pytest.raises(InputError, match=f"differ in .*({message})"):
            merge(tmp_path / "out", [first.folder, other.folder])
    overlapping = filled(tmp_path / "e", teacher, 20)
    with pytest.raises(InputError, match="keys must differ"):
        merge(tmp_path / "out2", [first.folder, overlapping.folder])


@pytest.mark.parametrize("same_data", [True, False])
def test_a_killed_merge_is_repeated_into_the_same_folder(tmp_path, teacher, same_data):
    if same_data:
        for share in range(2):
            fill(cache_config(tmp_path / f"{share}", teacher, 16, part=f"{share}/2"))
    else:
        for number in range(2):
            _part(tmp_path / f"{number}", teacher, range(11 * number, 11 * number + 11))
    folders = [tmp_path / "0", tmp_path / "1"]
    process = multiprocessing.get_context("fork").Process(target=_killed_merge, args=(tmp_path / "out", folders))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "out", folders)
    assert verify(tmp_path / "out").good
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "out"]
    with pytest.raises(InputError, match="exists and is no merged cache that may be replaced"):
        merge(tmp_path / "out", folders)


def _killed_merge(out, folders):
    torch.set_num_threads(1)
    places = []

    def killed(path, *_):
        places.append(path)
        if len(places) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, args: killed(args) if event == "open" and "safetensors" in str(args[0]) else None)
    merge(out, folders)
