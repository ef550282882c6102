"""Claims: one owner at a time, taken over from the dead."""

import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from clipdistill.runtime import locks
from clipdistill.runtime.locks import Claims, _started


def _write(folder, **owner):
    folder.mkdir(exist_ok=True)
    (folder / "a.lock").write_text(json.dumps(owner))


def test_a_claim_is_held_until_it_is_given_back(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take("a")
    assert not second.take("a")
    assert second.take("b")
    first.give_back("a")
    assert second.take("a")
    second.give_back_all()
    assert not list(tmp_path.iterdir())


def test_a_dead_process_loses_its_claims(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    _write(tmp_path, host=socket.gethostname(), pid=child.pid, started="1")
    assert Claims(tmp_path).take("a")


def test_a_reused_process_number_is_another_process(tmp_path):
    _write(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="0")
    assert Claims(tmp_path).take("a")
    assert _started(os.getpid()) not in ("", "0")


def test_another_machine_keeps_its_claim_while_it_gives_signs_of_life(tmp_path):
    _write(tmp_path, host="elsewhere", pid=1, started="0")
    assert not Claims(tmp_path).take("a")
    old = time.time() - 3600
    os.utime(tmp_path / "a.lock", (old, old))
    assert Claims(tmp_path).take("a")


def test_renewing_is_a_sign_of_life(tmp_path):
    claims = Claims(tmp_path, lease=100)
    claims.take("a")
    old = time.time() - 3600
    os.utime(tmp_path / "a.lock", (old, old))
    claims.renew()
    assert time.time() - (tmp_path / "a.lock").stat().st_mtime < 100


def test_a_claim_cut_off_while_it_was_written_is_taken_over_after_a_moment(tmp_path):
    (tmp_path / "a.lock").write_text("")
    assert not Claims(tmp_path).take("a")
    old = time.time() - 60
    os.utime(tmp_path / "a.lock", (old, old))
    assert Claims(tmp_path).take("a")


def test_two_that_find_a_lock_stale_do_not_both_get_it(tmp_path, monkeypatch):
    """The second comes to its rename when the first has already made a lock of its own."""
    _write(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="0")
    first, second, stale = Claims(tmp_path), Claims(tmp_path), locks._stale

    def late(path, lease):
        found = stale(path, lease)
        monkeypatch.setattr(locks, "_stale", stale)
        assert first.take("a")
        return found

    monkeypatch.setattr(locks, "_stale", late)
    assert not second.take("a")
    assert first.held == {"a"}
    assert json.loads((tmp_path / "a.lock").read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def test_a_lock_that_does_not_fit_the_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        Claims(tmp_path).take("a")
    assert not list(tmp_path.iterdir())
