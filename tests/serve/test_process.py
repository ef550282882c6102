"""The command in a process of its own: exports of both runtimes, many callers, SIGTERM in the middle."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import clipdistill as cd
from clipdistill.data.images import decode
from clipdistill.embed.encode import Encoder
from tests.serve.conftest import Client, encoded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def started(*arguments: str) -> tuple[subprocess.Popen[str], Client]:
    command = [sys.executable, "-m", "clipdistill", "serve", *arguments, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://127.0.0.1:(\d+)/", line):
            return process, Client(None, "127.0.0.1", int(found[1]))
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_sigterm_under_load_loses_no_answer(runtime, pictures, tmp_path):
    pytest.importorskip("uvicorn")
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    cd.export("scenes-teacher", to=runtime, out=tmp_path / "export")
    model, preprocess = cd.load_model("scenes-teacher", teacher=True), cd.load_student("scenes-teacher")[1]
    encoder = Encoder(model, progress=False)
    expected = np.concatenate([encoder.encode_images(preprocess(decode(data))[None]).numpy() for data in pictures])
    process, client = started(str(tmp_path / "export"), "--batch-size", "8")
    answers: list[float] = []
    lost: list[str] = []
    stopping = threading.Event()

    def call(number: int) -> None:
        rng = np.random.default_rng(number)
        while True:
            chosen = rng.integers(0, len(pictures), rng.integers(1, 5))
            sent_before = not stopping.is_set()
            try:
                status, _, answer = client.post("/embed/images", {"images": encoded([pictures[i] for i in chosen])})
            except ConnectionRefusedError:
                return  # the port is closed
            except OSError as error:
                if sent_before and not stopping.is_set():
                    lost.append(repr(error))
                return
            if status == 200:
                answers.append(float(np.abs(np.asarray(answer["embeddings"]) - expected[chosen]).max()))
            elif status != 429:
                lost.append(f"{status}: {answer}")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stopping.set()
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "what had been accepted is answered" in out
    assert lost == []
    assert len(answers) > 20
    assert max(answers) < 1e-4
    assert err == ""


def test_a_second_signal_ends_at_once(pictures):
    pytest.importorskip("uvicorn")
    process, client = started("scenes-teacher")
    assert client.ask("GET", "/health")[0] == 200
    with socket.create_connection((client.host, client.port)) as place:  # a body that never ends keeps it waiting
        place.sendall(b"POST /embed/texts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        place.sendall(b"Content-Length: 50\r\n\r\n{")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
