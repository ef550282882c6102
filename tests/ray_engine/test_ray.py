"""Real Ray: a cluster of two worker processes on this machine; a worker is killed, the driver is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import clipdistill as cd
from clipdistill.cache.fill import fill
from clipdistill.errors import InputError
from clipdistill.models.load import load_model
from tests.cache.support import cache_config, saved_teacher, scenes
from tests.conftest import REPOSITORY
from tests.ray_engine.test_same_bytes import files

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILL = """
import sys, torch
torch.set_num_threads(1)
from tests.cache.support import cache_config
from clipdistill.cache.fill import fill
fill(cache_config(sys.argv[1], sys.argv[2], 40, engine="ray:workers=2"), progress=lambda *_: print("block", flush=True))
"""


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Workers find this checkout and its tests, and work on one thread as this process does."""
    import ray
    import torch

    before, threads = dict(os.environ), torch.get_num_threads()
    os.environ |= {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    torch.set_num_threads(1)
    yield
    ray.shutdown()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return saved_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def test_files_and_scores_are_the_same_bytes_through_two_workers(teacher, tmp_path):
    for name, engine in (("here", "torch"), ("there", "ray:workers=2")):
        fill(cache_config(tmp_path / name, teacher, 40, views=1, engine=engine))
        cd.embed_to_file(
            teacher, "scenes:val?size=30", tmp_path / f"{name}.npy", part=8, batch_size=4, engine=engine, progress=False
        )
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert (tmp_path / "here.npy").read_bytes() == (tmp_path / "there.npy").read_bytes()
    here = cd.evaluate(teacher, "scenes:val?size=12", batch_size=5, progress=False)
    there = cd.evaluate(teacher, "scenes:val?size=12", batch_size=5, progress=False, engine="ray:workers=2")
    assert str(there) == str(here)


class DiesOnce:
    """A scene source that kills the process which reads one picture for the first time."""

    def __init__(self, source, marker: Path) -> None:
        self.source, self.marker = source, marker

    def __getattr__(self, name):
        if name in ("source", "marker"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def image(self, i):
        if i == 21 and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.image(i)


def test_the_work_of_a_killed_worker_is_done_again(teacher, tmp_path):
    from clipdistill.embed.encode import Encoder, open_encoder
    from clipdistill.scenes.pairs import open_scenes

    source, model = open_scenes("val", 40, 0), load_model(teacher, teacher=True)
    here = Encoder(model, batch_size=4, progress=False).images(source)
    dying = DiesOnce(source, tmp_path / "marker")
    there = open_encoder(model, batch_size=4, progress=False, engine="ray:workers=2").images(dying)
    assert (tmp_path / "marker").read_text() != str(os.getpid())
    assert (here[0] == there[0]).all()
    assert here[1] == there[1]


def test_the_block_of_a_killed_worker_is_filled_again(teacher, tmp_path):
    fill(cache_config(tmp_path / "here", teacher, 40))
    dying = DiesOnce(scenes(40), tmp_path / "marker")
    report = fill(cache_config(tmp_path / "there", teacher, 40, engine="ray:workers=2"), source=dying)
    assert (tmp_path / "marker").read_text() != str(os.getpid())
    assert report.samples == 40
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_a_killed_driver_resumes(teacher, tmp_path):
    fill(cache_config(tmp_path / "here", teacher, 40))
    out = tmp_path / "there"
    driver = subprocess.Popen(
        [sys.executable, "-c", FILL, out, teacher], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout.readline() == "block\n"
    driver.kill()
    driver.wait()
    left = len(list(out.rglob("0*.safetensors")))
    assert 0 < left < 5
    time.sleep(1)
    report = fill(cache_config(out, teacher, 40, engine="ray:workers=2"))
    assert report.samples <= 40 - 8 * left
    assert files(tmp_path / "here") == files(out)


def test_a_cluster_that_is_there_is_used_by_its_address(teacher, tmp_path):
    """`ray start` as an administrator types it, and the command with RAY_ADDRESS as a user does."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets' paths may have 107 letters
    head = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    head += ["--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=200000000"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    cluster = subprocess.Popen(head, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        wait_for(port)
        command = [sys.executable, "-m", "clipdistill", "cache", "--teacher", teacher, "--data", "scenes:train?size=40"]
        for name, engine in (("here", "torch"), ("there", "ray:workers=2")):
            done = subprocess.run(
                [*command, "--out", tmp_path / name, "--engine", engine, "block=8", "--device", "cpu"],
                env={**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
        assert "Ray: 2 workers on CPUs of 1 machines" in done.stdout + done.stderr
        assert files(tmp_path / "here") == files(tmp_path / "there")
        assert cluster.poll() is None  # it is not ours to end
    finally:
        cluster.terminate()
        cluster.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def wait_for(port: int) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end, "no cluster was started"
            time.sleep(0.5)


def test_more_workers_than_there_is_room_for(teacher, tmp_path):
    with pytest.raises(InputError, match=r"100000 workers of 1 cores were asked for and the cluster has room for"):
        fill(cache_config(tmp_path / "cache", teacher, 20, engine="ray:workers=100000"))
