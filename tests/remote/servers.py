"""Servers on 127.0.0.1 for the tests: a web server that fails when it is told to, and those of S3, GCS and Azure."""

from __future__ import annotations

import hashlib
import html
import http.client
import http.server
import os
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from clipdistill.remote import store


class Loopback(http.server.ThreadingHTTPServer):
    """Answers on a free port of this machine between `with` and its end."""

    daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class WebServer(Loopback):
    """Serves the files of `objects` (path without the first '/' -> bytes).

    faults: what happens to the next requests, one each: a status, "reset", "short", "hang", "drip", "slow".
    always: what happens to every request for a path. leads: where paths are redirected to. ranges, etags: whether the
    server knows them.
    """

    request_queue_size = 128

    def __init__(self, objects: dict[str, bytes] | None = None, *, ranges: bool = True, etags: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = dict(objects or {})
        self.ranges, self.etags = ranges, etags
        self.faults: list[int | str] = []
        self.always: dict[str, int | str] = {}
        self.leads: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def serve_folder(self, folder: Path, prefix: str = "") -> None:
        """Serve the files below a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.objects[prefix + path.relative_to(folder).as_posix()] = path.read_bytes()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        with self.server.lock:
            self.server.asked.append((name, self.headers.get("Range", "")))
            self.server.headers.append(dict(self.headers))
            fault = self.server.always.get(name) or (self.server.faults.pop(0) if self.server.faults else None)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "hang":
            time.sleep(3)
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._answer(fault, b"no", {"Retry-After": "0"} if fault in (429, 503) else {})
            return
        if name in self.server.leads:
            self._answer(302, b"", {"Location": self.server.leads[name]})
        elif name in self.server.objects:
            self._object(name, self.server.objects[name], fault)
        else:
            self._index(name)

    def _object(self, name: str, content: bytes, fault: str | None) -> None:
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        headers = {"ETag": tag} if self.server.etags else {}
        if self.headers.get("If-Match", tag) != tag:
            self._answer(412, b"", headers)
            return
        status, body = 200, content
        wanted = self.headers.get("Range", "")
        if wanted and self.server.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(content)) if last else len(content)
            if start >= len(content):
                self._answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
                return
            status, body = 206, content[start:end]
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.server.sent[name] += len(body)
        self._answer(status, body, headers, fault)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], fault: str | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "short":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "drip":
            for place in range(0, len(body), 1):
                self.wfile.write(body[place : place + 1])
                self.wfile.flush()
                time.sleep(0.05)
        else:
            if fault == "slow":
                time.sleep(0.2)
            self.wfile.write(body)

    def _index(self, name: str) -> None:
        folder = f"{name.rstrip('/')}/" if name.strip("/") else ""
        inside = {other[len(folder) :] for other in self.server.objects if other.startswith(folder)}
        if not inside:
            self._answer(404, b"not here", {})
        elif folder and not name.endswith("/"):
            self._answer(301, b"", {"Location": f"/{quote(folder)}"})
        else:
            entries = sorted({f"{part.partition('/')[0]}/" if "/" in part else part for part in inside})
            links = "".join(f'<li><a href="{quote(e)}">{html.escape(e)}</a></li>' for e in entries)
            page = f'<html><a href="../">..</a><a href="?C=N">Name</a><ul>{links}</ul></html>'.encode()
            self._answer(200, page, {"Content-Type": "text/html; charset=utf-8"})


@contextmanager
def found_at(scheme: str, url: str) -> Iterator[None]:
    """The environment in which the rules of s3, gs or az find their server at `url`."""
    import fsspec

    # the account that every Azurite has, whose key is public
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    name = "devstoreaccount1"
    text = f"DefaultEndpointsProtocol=http;AccountName={name};AccountKey={key};BlobEndpoint={url}/{name};"
    own = {
        "s3": {
            **{"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"},
            **{"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"},
        },
        "gs": {"STORAGE_EMULATOR_HOST": url},
        "az": {"AZURE_STORAGE_CONNECTION_STRING": text},
    }[scheme]
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC, which the servers do not speak
    before = fsspec.config.conf.get(scheme)
    if scheme == "gs":
        fsspec.config.conf[scheme] = {"token": "anon"}
    try:
        with _environment({**own, "NO_PROXY": "127.0.0.1"}):
            yield
    finally:
        fsspec.config.conf.pop(scheme, None) if before is None else fsspec.config.conf.update({scheme: before})


@contextmanager
def s3_server(bucket: str = "pairs") -> Iterator[str]:
    """moto's server with an empty bucket, and the environment in which S3's own rules find it; gives its URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    try:
        with found_at("s3", url):
            boto3.client("s3").create_bucket(Bucket=bucket)
            yield url
    finally:
        server.stop()


def fill_bucket(folder: Path, bucket: str = "pairs", prefix: str = "") -> None:
    """Put the files below a folder into a bucket."""
    import boto3

    client = boto3.client("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = prefix + path.relative_to(folder).as_posix()
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


@contextmanager
def gs_server(folder: Path, bucket: str = "pairs") -> Iterator[None]:
    """gcp-storage-emulator with the files below a folder in a bucket, found by Google's own variable."""
    import fsspec
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    try:
        with found_at("gs", "http://{}:{}".format(*server._api._httpd.server_address[:2])):
            _pipe(fsspec.filesystem("gs", skip_instance_cache=True), folder, bucket)
            yield
    finally:
        server.stop()


@contextmanager
def az_server(azurite: Path, folder: Path, container: str = "pairs") -> Iterator[None]:
    """Azurite (its program at `azurite`) with the files below a folder in a container, found by a connection string."""
    import fsspec

    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    words = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--blobPort", str(port)]
    process = subprocess.Popen([azurite, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _answering(port, process)
        with found_at("az", f"http://127.0.0.1:{port}"):
            fs = fsspec.filesystem("az", skip_instance_cache=True)
            fs.mkdir(container)
            _pipe(fs, folder, container)
            yield
    finally:
        process.terminate()
        process.wait(30)


def _pipe(fs: Any, folder: Path, bucket: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe(f"{bucket}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def _answering(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)


@contextmanager
def _environment(own: dict[str, str]) -> Iterator[None]:
    """These variables, and no connection of another test's server, within."""
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    store._stores.clear()  # a process keeps its connections, to the server of an earlier test too
    try:
        yield
    finally:
        store._stores.clear()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class FaultyProxy(Loopback):
    """Passes requests on to a server, but for those that `faults` (one each) or `always` spoil: a status, "reset",
    "hang" (for 3 s), "slow" (passed on after 0.4 s)."""

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.behind, self.always = behind, None
        self.faults: list[int | str] = []
        self.spoilt = 0


class _ProxyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.server.always or (self.server.faults.pop(0) if self.server.faults else None)
        self.server.spoilt += fault is not None
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "hang":
            time.sleep(3)
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(0.4)
        place = urlsplit(self.server.behind)
        connection = http.client.HTTPConnection(place.hostname or "", place.port)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        connection.close()

    do_HEAD = do_GET  # noqa: N815
