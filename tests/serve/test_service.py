"""The service over real sockets: equal to single calls, bounded, polite to whoever sends nonsense."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.data.images import decode
from clipdistill.embed.encode import Encoder

pytest.importorskip("starlette", reason="needs the extra 'serve'")

from clipdistill.serve import app
from clipdistill.serve.command import check_hosts, in_thread
from clipdistill.serve.limits import ServiceLimits
from tests.serve.bad_requests import attack, bomb, http
from tests.serve.conftest import Client, encoded

TEXTS = ["a red circle", "two blue squares above a green star", "a small yellow triangle"]


@pytest.fixture(scope="module")
def model():
    return cd.load_model("scenes-teacher", teacher=True)


@pytest.fixture(scope="module")
def alone(model, pictures):
    """What single calls give."""
    preprocess = cd.load_student("scenes-teacher")[1]
    encoder = Encoder(model, progress=False)
    return np.concatenate([encoder.encode_images(preprocess(decode(data))[None]).numpy() for data in pictures])


def test_pictures_as_json_and_as_a_form_have_the_rows_of_single_calls(client, pictures, alone):
    status, _, answer = client.post("/embed/images", {"images": encoded(pictures[:5])})
    assert status == 200, answer
    assert (answer["rows"], answer["width"]) == alone[:5].shape
    np.testing.assert_allclose(answer["embeddings"], alone[:5], atol=1e-6)
    parts = [("images", f"{i}.png", data) for i, data in enumerate(pictures[:5])]
    _, _, answer = client.send("/embed/images", [*parts, ("format", None, b"base64")])
    raw = np.frombuffer(base64.b64decode(answer["embeddings"]), dtype="<f4").reshape(answer["rows"], answer["width"])
    np.testing.assert_allclose(raw, alone[:5], atol=1e-6)
    as_address = [f"data:image/png;base64,{encoded(pictures[:1])[0]}"]
    _, _, answer = client.post("/embed/images", {"images": as_address})
    np.testing.assert_allclose(answer["embeddings"], alone[:1], atol=1e-6)


def test_texts_have_the_rows_of_single_calls_and_cut_or_unknown_ones_are_named(client, model):
    long = "a red circle and " * 30 + "a star"
    status, _, answer = client.post("/embed/texts", {"texts": [*TEXTS, long, "xylophone"]})
    assert status == 200, answer
    expected = np.concatenate([Encoder(model, progress=False).texts([text]).numpy() for text in [*TEXTS, long]])
    np.testing.assert_allclose(answer["embeddings"][:4], expected, atol=1e-6)
    assert (answer["cut"], answer["unknown"]) == ([3], [4])
    _, _, form = client.send("/embed/texts", [("texts", None, text.encode()) for text in TEXTS])
    np.testing.assert_allclose(form["embeddings"], expected[:3], atol=1e-6)


def test_classes_are_the_softmax_over_the_labels(client, model, pictures, alone):
    asked = {"images": encoded(pictures[:3]), "labels": TEXTS, "templates": ["a photo of {}.", "{}"], "top": 2}
    status, _, answer = client.post("/classify", asked)
    assert status == 200, answer
    prompts = [template.format(text) for template in asked["templates"] for text in TEXTS]
    classes = Encoder(model, progress=False).texts(prompts).numpy().reshape(2, 3, -1).mean(0)
    cosines = alone[:3] @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
    shares = np.exp(client.service.model.logit_scale * cosines)
    shares /= shares.sum(1, keepdims=True)
    for row, found in enumerate(answer["classes"]):
        best = np.argsort(-cosines[row])[:2]
        assert [one["label"] for one in found] == [TEXTS[i] for i in best]
        np.testing.assert_allclose([one["cosine"] for one in found], cosines[row][best], atol=1e-6)
        np.testing.assert_allclose([one["probability"] for one in found], shares[row][best], atol=1e-5)
    again = client.post("/classify", asked)[2]  # with remembered labels
    assert again == answer
    parts = [
        ("images", "x.png", pictures[0]),
        *(("labels", None, text.encode()) for text in TEXTS),
        ("top", None, b"1"),
    ]
    assert len(client.send("/classify", parts)[2]["classes"][0]) == 1


def test_many_callers_at_once_get_their_own_rows(client, pictures, alone):
    def call(number):
        rng = np.random.default_rng(number)
        chosen = rng.integers(0, len(pictures), rng.integers(1, 4))
        while True:
            status, headers, answer = client.post("/embed/images", {"images": encoded([pictures[i] for i in chosen])})
            if status == 200:
                return np.abs(np.asarray(answer["embeddings"]) - alone[chosen]).max()
            assert (status, int(headers["retry-after"]) >= 1) == (429, True)
            time.sleep(0.05)

    with ThreadPoolExecutor(12) as pool:
        assert max(pool.map(call, range(40))) < 1e-6
    text = client.ask("GET", "/metrics")[2].decode()
    rows = float(text.split('clipdistill_batch_rows_sum{tower="image"} ')[1].split()[0])
    batches = float(text.split('clipdistill_batch_rows_count{tower="image"} ')[1].split()[0])
    assert rows / batches > 1.5  # batches were shared


ONE = '{"images": ["%s"]}'
BAD = {
    "no JSON": ("/embed/texts", b'{"texts": [', 400, "not readable as JSON"),
    "another JSON": ("/embed/texts", b'["a"]', 400, "must be a JSON object with the keys texts, format"),
    "unknown key": ("/embed/texts", b'{"text": ["a"]}', 400, "unknown key 'text' (did you mean 'texts'?)"),
    "wrong type": ("/embed/texts", b'{"texts": [1]}', 400, "texts.0"),
    "no text": ("/embed/texts", b'{"texts": []}', 400, "no text"),
    "no picture": ("/embed/images", b'{"images": []}', 400, "no picture"),
    "blank text": ("/embed/texts", b'{"texts": ["a", " "]}', 400, "text 1 (from 0) is empty"),
    "half a character": ("/embed/texts", b'{"texts": ["\\ud800"]}', 400, "holds undecodable characters"),
    "long text": ("/embed/texts", json.dumps({"texts": ["a" * 5000]}).encode(), 413, "5000 characters"),
    "many texts": ("/embed/texts", json.dumps({"texts": ["a"] * 65}).encode(), 413, "65 texts, at most 64"),
    "many values": ("/embed/texts", b'{"texts": [' + b"[]," * 60_000 + b"1]}", 413, "more than 100000 values"),
    "nested": ("/embed/texts", b"[" * 50_000, 400, "nested too deeply"),
    "twice": ("/embed/texts", b'{"texts": ["a"], "texts": ["b"]}', 400, "stands twice"),
    "no base64": ("/embed/images", (ONE % "###").encode(), 400, "picture 0 (from 0) is not in base64"),
    "no image": ("/embed/images", (ONE % "aGVsbG8=").encode(), 422, "not an image"),
    "bomb": ("/embed/images", (ONE % encoded([bomb(30_000, 30_000)])[0]).encode(), 422, "too many pixels"),
    "many pictures": ("/embed/images", json.dumps({"images": [""] * 9}).encode(), 413, "9 pictures, at most 8"),
    "large body": ("/embed/images", b" " * 1_200_000, 413, "larger than 1 MiB"),
    "format": ("/embed/texts", b'{"texts": ["a"], "format": "xml"}', 400, "format"),
    "same labels": ("/classify", b'{"images": ["aa=="], "labels": ["a", "a"]}', 400, "'a' stands twice"),
    "no place": ("/classify", b'{"images": ["aa=="], "labels": ["a"], "templates": ["x"]}', 400, "exactly one {}"),
    "labels that differ in capitals": (
        "/classify",
        b'{"images": ["aa=="], "labels": ["red", "blue", "RED"]}',
        422,
        "labels 0 and 2 (from 0) are the same",
    ),
    "labels that differ in unknown words": (
        "/classify",
        b'{"images": ["aa=="], "labels": ["red harp", "red oboe"]}',
        422,
        "the same to the model",
    ),
    "unknown label": ("/classify", b'{"images": ["aa=="], "labels": ["red", "xylophone"]}', 422, "no word of label 1"),
    "too many prompts": (
        "/classify",
        json.dumps({"images": ["aa=="], "labels": ["a", "b"], "templates": ["{} %d" % i for i in range(40)]}).encode(),  # noqa: UP031
        413,
        "2 labels times 40 templates",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_one_sentence(case, client):
    path, body, expected, sentence = BAD[case]
    status, _, answer = client.ask("POST", path, body, Content_Type="application/json")
    assert (status, list(answer)) == (expected, ["error"]), answer
    assert sentence in answer["error"]
    assert len(answer["error"]) < 600
    assert client.ask("GET", "/health")[2] == {"status": "ok"}


def test_a_bad_picture_among_good_ones_is_named_and_nothing_is_answered(client, pictures):
    parts = [("images", "a.png", pictures[0]), ("images", "b.png", pictures[1][:200])]
    status, _, answer = client.send("/embed/images", parts)
    assert (status, answer["error"].split(":")[0]) == (422, "picture 1 (from 0) cannot be read")


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([("images", None, b"x")], "send pictures as files"),
        ([("picture", "a.png", b"x")], "files belong in 'images'"),
        ([("images", "a.png", b"x")] * 9, "Too many files"),
        ([("images", "a.png", b"x"), ("format", None, b"a"), ("format", None, b"b")], "'format' stands twice"),
        ([("x", None, b"y")], "unknown key 'x'"),
    ],
)
def test_a_bad_form_is_one_sentence(parts, sentence, client):
    status, _, answer = client.send("/embed/images", parts)
    assert status in (400, 413)
    assert sentence in answer["error"]
    for kind in ("multipart/form-data", "multipart/form-data; boundary=other"):
        assert client.ask("POST", "/embed/images", b"--x\r\n", Content_Type=kind)[0] == 400


def test_paths_methods_kinds_hosts_and_origins(client, pictures):
    assert client.ask("GET", "/nothing")[0] == 404
    assert client.ask("GET", "/embed/texts")[0] == 405
    assert client.ask("POST", "/embed/texts", b"a=b", Content_Type="application/x-www-form-urlencoded")[0] == 415
    assert client.ask("GET", "/health", Host="evil.example")[0] == 403
    assert client.ask("GET", "/health", Host="localhost")[0] == 200
    body = json.dumps({"texts": TEXTS}).encode()
    own = f"http://{client.host}:{client.port}"
    assert client.ask("POST", "/embed/texts", body, Content_Type="application/json", Origin="http://e.com")[0] == 403
    assert client.ask("POST", "/embed/texts", body, Content_Type="application/json", Origin=own)[0] == 200


def test_it_says_what_it_is_and_counts(client):
    found = client.ask("GET", "/model")[2]
    assert (found["width"], found["image_size"]) == (128, 64)
    assert "scenes-teacher" not in json.dumps(found)
    paths = client.ask("GET", "/openapi.json")[2]["paths"]
    assert {"/embed/images", "/embed/texts", "/classify", "/health", "/metrics", "/model"} == set(paths)
    text = client.ask("GET", "/metrics")[2].decode()
    assert 'clipdistill_requests_total{path="/embed/texts",status="400"}' in text
    assert 'clipdistill_waiting{tower="image"} 0.0' in text
    assert "process_resident_memory_bytes" in text


@pytest.fixture
def held(pictures, monkeypatch):
    """A service whose image tower waits for an event, with a queue of three pictures: (client, go, started)."""
    go, started = threading.Event(), threading.Event()
    original = app.ServedModel.images

    def images(self, pixels):
        if armed:
            started.set()
            assert go.wait(30)
        return original(self, pixels)

    armed = []
    monkeypatch.setattr(app.ServedModel, "images", images)
    with in_thread("scenes-teacher", ServiceLimits(batch_size=1, wait_ms=0, queue=3, pictures=3, timeout=3)) as found:
        armed.append(True)
        yield Client(*found), go, started
        go.set()


def test_a_full_queue_says_when_to_come_again(held, pictures):
    client, go, started = held
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, "/embed/images", {"images": encoded(pictures[:3])})
        assert started.wait(20)
        status, headers, answer = client.post("/embed/images", {"images": encoded(pictures[:1])})
        assert (status, "busy" in answer["error"]) == (429, True)
        assert int(headers["retry-after"]) >= 1
        go.set()
        assert first.result(20)[0] == 200
    assert client.post("/embed/images", {"images": encoded(pictures[:1])})[0] == 200


def test_a_late_answer_is_503_and_its_pictures_leave_the_queue(held, pictures):
    client, go, _ = held
    status, headers, answer = client.post("/embed/images", {"images": encoded(pictures[:3])})
    assert (status, answer["error"][:22]) == (503, "no answer within 3 s: ")
    assert int(headers["retry-after"]) >= 1
    assert client.service.gates["image"].count == 0
    go.set()
    assert client.post("/embed/images", {"images": encoded(pictures[:3])})[0] == 200


@pytest.mark.parametrize("path", ["/embed/texts", "/health"])
def test_two_lengths_of_a_body_are_refused_and_the_connection_ends(client, path):
    """A proxy that goes by the other one would take the rest for the next caller's request."""
    method = "GET" if path == "/health" else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((client.host, client.port), 10) as place:
        place.sendall(head.encode() + b"0\r\n\r\nGET /model HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b"".join(iter(lambda: place.recv(1 << 16), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", found) == [b"400"]
    assert b"one of them" in found


def test_a_compressed_body_is_refused(client):
    body = gzip.compress(json.dumps({"texts": ["a dog"]}).encode())
    status, _, answer = client.ask(
        "POST", "/embed/texts", body, Content_Type="application/json", Content_Encoding="gzip"
    )
    assert status == 415
    assert "compressed" in answer["error"]


def test_who_hangs_up_leaves_the_queue(held, pictures):
    client, _, started = held
    body = json.dumps({"images": encoded(pictures[:3])}).encode()
    with socket.create_connection((client.host, client.port)) as place:
        place.sendall(http("POST", "/embed/images", body))
        assert started.wait(20)
        assert client.service.gates["image"].count == 3
    deadline = time.monotonic() + 2.5  # before its time is over
    while client.service.gates["image"].count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.service.gates["image"].count == 0


def test_a_small_request_gets_through_beside_one_that_decodes_for_long(client, pictures, monkeypatch):
    go, original = threading.Event(), client.service.model.pixels
    slow = lambda data, most: (data == pictures[0] or go.wait(20)) and original(data, most)  # noqa: E731
    monkeypatch.setattr(client.service.model, "pixels", slow)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(client.post, "/embed/images", {"images": encoded([pictures[1]] * 8)})
        deadline = time.monotonic() + 10
        while client.service.gates["image"].count < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.post("/embed/images", {"images": encoded(pictures[:1])})[0] == 200
        assert not large.done()
        go.set()
        assert large.result(20)[0] == 200


def test_what_was_accepted_is_answered_when_it_stops(pictures, monkeypatch):
    go, started = threading.Event(), threading.Event()
    answers = []
    with in_thread("scenes-teacher", ServiceLimits(batch_size=2, wait_ms=0)) as found:
        client, original = Client(*found), found[0].model.images
        monkeypatch.setattr(
            client.service._batchers["image"], "_function", lambda x: (started.set(), go.wait(20), original(x))[2]
        )
        thread = threading.Thread(
            target=lambda: answers.append(client.post("/embed/images", {"images": encoded(pictures[:4])}))
        )
        thread.start()
        assert started.wait(20)
        threading.Timer(0.3, go.set).start()
    thread.join(20)
    assert answers[0][0] == 200
    with pytest.raises(ConnectionRefusedError):
        client.ask("GET", "/health")


def test_a_picture_that_breaks_the_model_is_its_senders_alone(client, pictures, alone, monkeypatch):
    black = client.service.model.pixels(pictures[0], 10**6)
    original = client.service.model.images

    def images(pixels):
        found = original(pixels).copy()
        found[(pixels == black).all(axis=(1, 2, 3))] = np.nan
        return found

    monkeypatch.setattr(client.service._batchers["image"], "_function", images)
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda i: client.post("/embed/images", {"images": encoded([pictures[i]])}), (0, 1))
        (bad, _, sentence), (good, _, answer) = both
    assert (bad, "no finite embedding" in sentence["error"]) == (422, True)
    assert good == 200
    np.testing.assert_allclose(answer["embeddings"][0], alone[1], atol=1e-6)


def test_a_failing_model_shows_nothing_of_itself(client, pictures, monkeypatch, capsys):
    def images(pixels):
        raise OSError("/secret/place is gone")

    monkeypatch.setattr(client.service._batchers["image"], "_function", images)
    status, _, answer = client.post("/embed/images", {"images": encoded(pictures[:1])})
    assert (status, answer["error"]) == (500, "this failed; the log of the service says why")
    assert "/secret/place is gone" in capsys.readouterr().err


def test_headers_and_bodies_that_trickle_in_have_an_end(client, monkeypatch):
    monkeypatch.setattr("clipdistill.serve.connection.HEADER_SECONDS", 0.3)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    for start, sentence in (
        (b"GET /health HTTP/1.1\r\nHost: loc", b"the headers took longer"),
        (b"", b"the headers took longer"),
        (http("POST", "/embed/texts", b"{", length="50"), b"the body took longer"),
    ):
        with socket.create_connection((client.host, client.port), 10) as place:
            place.sendall(start)
            received = b""
            while piece := place.recv(4096):
                received += piece
        assert received.startswith(b"HTTP/1.1 408 ")
        assert sentence in received


def test_more_connections_than_are_answered_are_told_so(client, monkeypatch):
    monkeypatch.setattr("clipdistill.serve.connection.CONNECTIONS", 3)
    places = [socket.create_connection((client.host, client.port), 10) for _ in range(3)]
    try:
        time.sleep(0.1)
        with socket.create_connection((client.host, client.port), 10) as place:
            assert b"429" in place.recv(4096).split(b"\r\n")[0]
    finally:
        for place in places:
            place.close()


def test_bad_requests_of_every_kind_without_a_fault(client, monkeypatch):
    monkeypatch.setattr("clipdistill.serve.connection.HEADER_SECONDS", 0.3)
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    found = attack(client.host, client.port, 120, seed=1)
    assert found.faults == []
    assert found.total() == 120
    assert client.service._held == 0
    assert [gate.count for gate in client.service.gates.values()] == [0, 0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "70000"], "--port must be between"),
        (["--batch-size", "0"], "--batch-size must be a number from 1"),
        (["--timeout", "nan"], "--timeout must be a number"),
        (["--queue", "3"], "--queue 3 is below --pictures 64"),
        (["--wait-ms", "30000"], "--wait-ms 30000 is no less than --timeout 30 s"),
        (["--allow-host", "http://photos.lan"], "--allow-host 'http://photos.lan': a name or an address alone"),
        (["--allow-host", "photos.lan", "--allow-host", "other:8000"], "--allow-host 'other:8000': a name or an addr"),
        (["--threads", "0"], "--threads must be from 1"),
        (["--host", "no such host"], "cannot listen on"),
    ],
)
def test_options_that_cannot_be_used_are_one_sentence(options, sentence, capsys):
    assert main(["serve", "scenes-teacher", *options]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["photos.lan", "my_host", "bücher.example", "::1", "10.0.0.7"])
def test_names_that_a_request_can_have(name):
    check_hosts([name], "--allow-host")


def test_a_tower_is_no_export(tmp_path, capsys):
    (tmp_path / "image.onnx").write_bytes(b"graph")
    assert main(["serve", str(tmp_path / "image.onnx")]) == 2
    assert f"is one tower of an export: name its folder, {tmp_path}" in capsys.readouterr().err


def test_a_port_in_use_is_one_sentence(client, capsys):
    assert main(["serve", "scenes-teacher", "--port", str(client.port)]) == 2
    assert f"cannot listen on 127.0.0.1:{client.port} (Address already in use)" in capsys.readouterr().err
