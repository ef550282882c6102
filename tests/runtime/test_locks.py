"""Claims: one owner at a time, taken over from the dead."""

import json
import os
import socket
import subprocess
import sys
import time

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
