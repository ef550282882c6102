"""Odd, slow, huge and broken requests: a 4xx (or 503), never a 500, never a hang, and bounded memory."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipdistill.search import server as servers
from clipdistill.search.collection import Collection
from clipdistill.search.server import LARGEST_UPLOAD, SearchServer


@pytest.fixture(scope="module")
def server(collection: Collection) -> Iterator[SearchServer]:
    with SearchServer(collection) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def connect(server: SearchServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=30)


def status_of(connection: socket.socket) -> int:
    """The status of the answer, 0 when the connection is closed without one."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            answer += part
    assert answer == b"" or answer.startswith(b"HTTP/1.0 "), answer[:80]
    return int(answer.split()[1]) if answer else 0


def send(server: SearchServer, raw: bytes) -> int:
    """Status of the answer to these bytes, after which nothing more is sent."""
    host = f"127.0.0.1:{server.server_address[1]}".encode()
    with connect(server) as connection:
        with contextlib.suppress(OSError):  # refused and closed before it was sent
            connection.sendall(raw.replace(b"HOST", host))
            connection.shutdown(socket.SHUT_WR)
        return status_of(connection)


def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((line, b"Host: HOST", *headers, b"", body))


POST = b"POST /picture HTTP/1.1"
PART = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\x89PNG'
ODD = {
    "no length": (request(POST), 411),
    "chunked": (request(POST, b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"), 411),
    "chunked and a length": (request(POST, b"Transfer-Encoding: chunked", b"Content-Length: 3", body=b"abc"), 411),
    "broken chunks": (request(POST, b"Transfer-Encoding: chunked", body=b"zz\r\n\xff"), 411),
    "negative length": (request(POST, b"Content-Length: -5"), 400),
    "length with a sign": (request(POST, b"Content-Length: +5", body=b"hello"), 400),
    "length in words": (request(POST, b"Content-Length: many"), 400),
    "length of thousands of digits": (request(POST, b"Content-Length: " + b"9" * 5000), 400),
    "length in superscript digits": (request(POST, b"Content-Length: \xb2"), 400),
    "empty length": (request(POST, b"Content-Length:"), 400),
    "fraction": (request(POST, b"Content-Length: 1.5"), 400),
    "two lengths": (request(POST, b"Content-Length: 3", b"Content-Length: 4", body=b"abc"), 400),
    "too long": (request(POST, b"Content-Length: %d" % (LARGEST_UPLOAD + 1)), 413),
    "cut short": (request(POST, b"Content-Length: 100", body=b"abc"), 400),
    "nothing": (request(POST, b"Content-Length: 0"), 400),
    "longer than it says": (request(POST, b"Content-Length: 3", body=b"abcdefgh" * 99), 400),
    "NULs": (request(POST, b"Content-Length: 300", body=bytes(300)), 400),
    "a form": (request(POST, b"Content-Type: multipart/form-data; boundary=b", b"Content-Length: 49", body=PART), 400),
    "a form without a boundary": (request(POST, b"Content-Type: multipart/form-data", b"Content-Length: 0"), 400),
    "another site": (request(POST, b"Origin: http://evil.example", b"Content-Length: 3", body=b"abc"), 403),
    "an origin that is none": (request(POST, b"Origin: http://[::1", b"Content-Length: 3", body=b"abc"), 403),
    "delete": (request(b"DELETE / HTTP/1.1"), 405),
    "put": (request(b"PUT /picture HTTP/1.1", b"Content-Length: 3", body=b"abc"), 405),
    "options": (request(b"OPTIONS * HTTP/1.1"), 405),
    "trace": (request(b"TRACE / HTTP/1.1"), 405),
    "connect": (request(b"CONNECT example.com:443 HTTP/1.1"), 405),
    "unknown method": (request(b"BREW /pot HTTP/1.1"), 405),
    "method in small letters": (request(b"get / HTTP/1.1"), 405),
    "a very long method": (request(b"X" * 9000 + b" / HTTP/1.1"), 405),
    "post elsewhere": (request(b"POST / HTTP/1.1", b"Content-Length: 3", body=b"abc"), 404),
    "bad percent": (request(b"GET /%zz%%% HTTP/1.1"), 404),
    "percent NUL": (request(b"GET /thumb/%00 HTTP/1.1"), 404),
    "NUL": (request(b"GET /\x00 HTTP/1.1"), 404),
    "bad percent in a query": (request(b"GET /?q=%zz%&q=%ff%fe HTTP/1.1"), 200),
    "NUL in a query": (request(b"GET /?q=%00 HTTP/1.1"), 200),
    "surrogates in a query": (request(b"GET /?q=%ed%a0%80red HTTP/1.1"), 200),
    "many fields": (request(b"GET /?" + b"&".join(b"a=1" for _ in range(50)) + b" HTTP/1.1"), 400),
    "bad address": (request(b"GET http://[::1/ HTTP/1.1"), 400),
    "other scheme": (request(b"GET file:///etc/passwd HTTP/1.1"), 404),
    "path upwards": (request(b"GET /../../etc/passwd HTTP/1.1"), 404),
    "path upwards in percents": (request(b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1"), 404),
    "path upwards behind a file": (request(b"GET /style.css%2f..%2f..%2fserver.py HTTP/1.1"), 404),
    "path upwards in percents twice": (request(b"GET /%252e%252e%252fetc/passwd HTTP/1.1"), 404),
    "NUL behind a file": (request(b"GET /style.css%00.png HTTP/1.1"), 404),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 400),
    "half a line": (b"GET /style.c", 403),
    "headers of a megabyte": (request(b"GET / HTTP/1.1", *[b"X-%d: " % i + b"a" * 60_000 for i in range(17)]), 431),
    "one header of a megabyte": (request(b"GET / HTTP/1.1", b"X: " + b"a" * 1_000_000), 431),
    "two in one": (request(b"GET /style.css HTTP/1.1") * 2, 200),
    "backslashes": (request(rb"GET /thumb\..\x HTTP/1.1"), 404),
    "long address": (request(b"GET /?q=" + b"x" * 70_000 + b" HTTP/1.1"), 414),
    "picture that is not there": (request(b"GET /thumb/99999999999 HTTP/1.1"), 404),
    "number in other digits": (request("GET /thumb/\u0663 HTTP/1.1".encode()), 404),
    "get with a body": (request(b"GET /style.css HTTP/1.1", b"Content-Length: 5000", body=b"a" * 5000), 200),
    "huge header": (request(b"GET / HTTP/1.1", b"X: " + b"a" * 70_000), 431),
    "many headers": (request(b"GET / HTTP/1.1", *[b"X-%d: 1" % i for i in range(200)]), 431),
    "long headers": (request(b"GET / HTTP/1.1", *[b"X-%d: " % i + b"a" * 5000 for i in range(90)]), 431),
    "header without a colon": (request(b"GET /style.css HTTP/1.1", b"nonsense"), 200),
    "header with a NUL": (request(b"GET /style.css HTTP/1.1", b"X: \x00\x01"), 200),
    "two hosts": (request(b"GET / HTTP/1.1", b"Host: evil.example"), 200),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 403),
    "strange host": (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 403),
    "host with NULs": (b"GET / HTTP/1.1\r\nHost: \x00\r\n\r\n", 403),
    "host that normalises": ("GET / HTTP/1.1\r\nHost: \u2100\r\n\r\n".encode(), 403),
    "version 2": (request(b"GET / HTTP/2.0"), 400),
    "version in words": (request(b"GET / HTTP/one"), 400),
    "no version": (b"GET /\r\n\r\n", 403),
    "no address": (b"GET\r\n\r\n", 400),
    "four words": (request(b"GET / now HTTP/1.1"), 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)) + b"\r\n\r\n", 400),
    "noise": (bytes(range(256)) * 40 + b"\r\n\r\n", 400),
    "one endless line": (b"A" * 200_000, 414),
    "blank lines": (b"\r\n\r\n", 0),
    "nothing at all": (b"", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_requests_are_refused_and_the_page_goes_on(
    server: SearchServer, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    raw, status = ODD[name]
    began = time.monotonic()
    assert send(server, raw) == status
    assert time.monotonic() - began < 5
    assert capfd.readouterr().err == ""
    assert send(server, request(b"GET /style.css HTTP/1.1")) == 200


def test_two_hundred_idle_connections_keep_nobody_out_for_long(server: SearchServer, monkeypatch) -> None:
    with hurried(monkeypatch):
        idle = [connect(server) for _ in range(200)]
        began, status = time.monotonic(), 503
        while status in (0, 503) and time.monotonic() - began < 20:
            status = send(server, request(b"GET /style.css HTTP/1.1"))
        assert status == 200
        for connection in idle:
            connection.close()
    assert send(server, request(b"GET /style.css HTTP/1.1")) == 200


@contextlib.contextmanager
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(servers, "HEADER_SECONDS", 0.5)
        patch.setattr(servers, "BODY_SECONDS", 0.5)
        yield


def test_what_trickles_in_is_given_up(server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with hurried(monkeypatch):
        for beginning, status in (
            (b"", 0),
            (b"GET / HT", 0),
            (b"GET / HTTP/1.1\r\nHost: HOST\r\n", 0),
            (request(POST, b"Content-Length: 1000"), 408),
        ):
            host = f"127.0.0.1:{server.server_address[1]}".encode()
            with connect(server) as connection:
                connection.sendall(beginning.replace(b"HOST", host))
                began = time.monotonic()
                stop = threading.Event()

                def trickle(to: socket.socket = connection, stop: threading.Event = stop) -> None:
                    with contextlib.suppress(OSError):
                        while not stop.wait(0.1):
                            to.sendall(b"a")

                sender = threading.Thread(target=trickle)
                sender.start()
                try:
                    assert status_of(connection) == status
                finally:
                    stop.set()
                    sender.join()
                assert time.monotonic() - began < 3


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts memory by /proc")
def test_unfinished_uploads_hold_no_more_than_they_may(server: SearchServer) -> None:
    length = LARGEST_UPLOAD
    head = request(POST, b"Content-Length: %d" % length).replace(
        b"HOST", f"127.0.0.1:{server.server_address[1]}".encode()
    )
    piece = bytes(1 << 20)
    before = resident()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(40)]
        sent = 0
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(head)
                connection.settimeout(0.3)
                for _ in range(31):  # all but the last piece
                    sent += connection.send(piece)
        grown = resident() - before
        assert sent > 2 * servers.UPLOADS
        assert grown < 4 * servers.UPLOADS, f"{grown >> 20} MiB"
        assert server._uploading <= servers.UPLOADS
    deadline = time.monotonic() + 10
    while server._uploading and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server._uploading == 0
    assert send(server, request(b"GET /style.css HTTP/1.1")) == 200


def test_more_connections_than_are_answered_are_told_so(server: SearchServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(servers.CONNECTIONS):
            stack.enter_context(connect(server)).sendall(b"GET / HTTP/1.1\r\n")
        deadline = time.monotonic() + 5
        found = 0
        while found != 503 and time.monotonic() < deadline:
            with connect(server) as late, contextlib.suppress(TimeoutError):
                late.settimeout(0.5)
                found = status_of(late)
        assert found == 503
    deadline = time.monotonic() + 10
    while send(server, request(b"GET /style.css HTTP/1.1")) != 200:
        assert time.monotonic() < deadline


def test_kept_pictures_are_bounded_by_number_and_size() -> None:
    kept = servers.KeptUploads(3, 100)
    for number in range(5):
        kept.put(number, b"a")
    assert [kept.get(number) is not None for number in range(5)] == [False, False, True, True, True]
    kept.get(2)
    kept.put(5, b"b" * 99)
    assert [kept.get(number) is not None for number in (2, 4, 5)] == [True, False, True]
    kept.put(6, b"c" * 101)
    assert len(kept) == 0
