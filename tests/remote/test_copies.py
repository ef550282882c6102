"""--local-cache: copies of shards by least recent use, shared by processes, within their size."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from clipdistill.cli import main
from clipdistill.data.files import read_ahead
from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError, StorageError
from clipdistill.remote import local_cache
from clipdistill.remote.copies import Copies


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What `local_cache` sets is gone after the test."""
    for name in ("CLIPDISTILL_LOCAL_CACHE", "CLIPDISTILL_LOCAL_CACHE_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def served(web, shards):
    web.serve_folder(shards)
    return web


def _copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.copy"))


def _read_all(pairs) -> list[bytes]:
    return [pairs.image_bytes(i) for i in range(len(pairs))]


def test_the_second_pass_asks_for_nothing(served, shards, tmp_path):
    local_cache(tmp_path / "copies", "1GB")
    far = open_pairs(f"{served.url}/{{00000..00002}}.tar")
    read_ahead(far, range(24))
    assert _read_all(far) == _read_all(open_pairs(str(shards)))
    assert len(_copies(tmp_path / "copies")) == 3
    served.asked.clear()
    _read_all(far)
    assert served.asked == []
    again = open_pairs(f"{served.url}/{{00000..00002}}.tar")
    _read_all(again)
    assert {wanted for _, wanted in served.asked} == {"bytes=0-4095"}  # whether they are the same still


def test_a_set_that_does_not_fit_keeps_what_fits_and_reads_the_rest_by_ranges(served, shards, tmp_path):
    size = max(path.stat().st_size for path in shards.iterdir())
    local_cache(tmp_path / "copies", 2 * size)
    far = open_pairs(f"{served.url}/{{00000..00002}}.tar")
    near = _read_all(open_pairs(str(shards)))
    for _ in range(2):
        read_ahead(far, range(24))
        assert _read_all(far) == near
    kept = _copies(tmp_path / "copies")
    assert len(kept) == 2
    assert sum(path.stat().st_size for path in kept) <= 2 * size


def test_room_is_given_once_to_copies_that_are_made_at_the_same_time(tmp_path, monkeypatch):
    from clipdistill.remote import copies

    def slowly(path, size):
        time.sleep(0.05)  # others look for room meanwhile
        os.truncate(path, size)

    def listed(path):
        entries = list(os.scandir(path))
        time.sleep(0.05)  # copies get their names meanwhile
        return entries

    monkeypatch.setattr(copies, "os", SimpleNamespace(**{**vars(os), "truncate": slowly, "scandir": listed}))
    since = time.time()
    kept = Copies(tmp_path / "copies", 250)

    def write(path):
        with path.open("r+b") as file:
            file.write(b"x" * 100)

    with ThreadPoolExecutor(6) as threads:
        made = list(threads.map(lambda k: kept.fetch(f"{k}.copy", 100, since, write), range(6)))
    assert sum(path is not None for path in made) == len(_copies(tmp_path / "copies")) == 2


def test_the_least_recently_used_copies_leave_first(served, shards, tmp_path):
    size = max(path.stat().st_size for path in shards.iterdir())
    local_cache(tmp_path / "copies", 2 * size)
    names = []
    for shard in ("00000", "00001"):
        before = set(_copies(tmp_path / "copies"))
        open_pairs(f"{served.url}/{shard}.tar").image_bytes(0)
        names += set(_copies(tmp_path / "copies")) - before
        time.sleep(0.02)
    os.utime(names[0])  # the first one is used again
    time.sleep(0.02)
    open_pairs(f"{served.url}/00002.tar").image_bytes(0)
    kept = _copies(tmp_path / "copies")
    assert len(kept) == 2
    assert names[0] in kept
    assert names[1] not in kept


@pytest.mark.parametrize(("ahead", "leaves"), [(3600, True), (5, False)])
def test_copies_from_before_the_clock_was_set_back_make_room(ahead, leaves, served, shards, tmp_path):
    """Their time lies in the future; they used to stay, and nothing else was copied until the clock was there again."""
    local_cache(tmp_path / "copies", max(path.stat().st_size for path in shards.iterdir()))
    open_pairs(f"{served.url}/00000.tar").image_bytes(0)
    [old] = _copies(tmp_path / "copies")
    os.utime(old, (time.time() + ahead, time.time() + ahead))
    open_pairs(f"{served.url}/00001.tar").image_bytes(0)
    assert old.exists() != leaves
    assert len(_copies(tmp_path / "copies")) == 1


def test_a_changed_object_gets_a_copy_of_its_own(served, tmp_path):
    local_cache(tmp_path / "copies")
    first = open_pairs(f"{served.url}/00000.tar").image_bytes(0)
    served.objects["00000.tar"] = served.objects["00001.tar"]
    assert open_pairs(f"{served.url}/00000.tar").image_bytes(0) != first


def test_a_damaged_copy_is_made_again(served, shards, tmp_path):
    local_cache(tmp_path / "copies")
    _read_all(open_pairs(f"{served.url}/00000.tar"))
    (copy,) = _copies(tmp_path / "copies")
    os.truncate(copy, 1000)
    assert _read_all(open_pairs(f"{served.url}/00000.tar")) == _read_all(open_pairs(str(shards / "00000.tar")))
    assert copy.stat().st_size == (shards / "00000.tar").stat().st_size


def test_what_a_killed_writer_left_takes_no_room(served, shards, tmp_path):
    size = max(path.stat().st_size for path in shards.iterdir())
    local_cache(tmp_path / "copies", size)
    (tmp_path / "copies" / ".abc.copy.writing-1234.copy").write_bytes(bytes(size))
    open_pairs(f"{served.url}/00000.tar").image_bytes(0)
    assert [path.name for path in (tmp_path / "copies").iterdir() if ".writing-" in path.name] == []
    assert len(_copies(tmp_path / "copies")) == 1


def _process(url: str, start: int, results) -> None:
    pairs = open_pairs(url)
    results.put([pairs.image_bytes((start + i) % len(pairs)) for i in range(len(pairs))])


def test_several_processes_fetch_each_shard_once(served, shards, tmp_path):
    local_cache(tmp_path / "copies", "1GB")
    served.always = {}
    near = _read_all(open_pairs(str(shards)))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    url = f"{served.url}/{{00000..00002}}.tar"
    open_pairs(url)
    served.asked.clear()
    processes = [context.Process(target=_process, args=(url, 5 * k, results)) for k in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(sorted(each) == sorted(near) for each in found)
    whole = [name for name, wanted in served.asked if wanted != "bytes=0-4095"]
    assert sorted(whole) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_full_disk_is_told(served, tmp_path, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    local_cache(tmp_path / "copies", "1GB")
    far = open_pairs(f"{served.url}/00000.tar")
    monkeypatch.setattr("clipdistill.remote.copies.os.truncate", full)
    with pytest.raises(StorageError, match="--local-cache-size"):
        far.image_bytes(0)


@pytest.mark.parametrize("size", ["", "many", "0", "-5GB", "10 apples", "1e300GB"])
def test_a_size_that_is_none_is_refused(size, tmp_path):
    with pytest.raises(InputError, match="200GB"):
        local_cache(tmp_path, size)


@pytest.mark.parametrize(("text", "size"), [("200GB", 200 * 10**9), ("1.5 TB", 15 * 10**11), ("2GiB", 2**31), ("7", 7)])
def test_sizes_are_written_as_people_write_them(text, size, tmp_path, monkeypatch):
    from clipdistill.remote import copies

    local_cache(tmp_path, text)
    kept = copies.copies()
    assert isinstance(kept, Copies)
    assert kept.limit == size


def test_every_command_takes_the_options(served, tmp_path, capsys):
    arguments = ["embed", "--help"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--local-cache-size" in capsys.readouterr().out
    assert main(["doctor", "--local-cache-size", "5GB"]) == 2
    assert "--local-cache DIR" in capsys.readouterr().err


def test_parquet_files_are_copied_too(web, everything, tmp_path):
    web.serve_folder(everything)
    local_cache(tmp_path / "copies", "1GB")
    far, near = open_pairs(f"{web.url}/parquet"), open_pairs(str(everything / "parquet"))
    web.asked.clear()
    assert _read_all(far) == _read_all(near)
    assert web.asked == []
    assert len(_copies(tmp_path / "copies")) == 2


def test_without_the_option_nothing_is_kept(served, tmp_path):
    _read_all(open_pairs(f"{served.url}/00000.tar"))
    assert not list(tmp_path.rglob("*.copy"))
