"""A local page for searching: Python's own HTTP server, this machine only unless told otherwise.

What it gives away: the page, its style and script, and re-encoded pictures of indexed files, asked for by number and
never by path (so no metadata such as the place of a photograph leaves either). A request must name this machine as its
host, which keeps other sites from reaching the page through a name that points here; a content security policy allows
nothing but the page's own files. On any other address than this machine's own, the page lies below a secret path.

What it can be made to spend: the constants below bound connections, the time a request may take to arrive, and the
bytes that uploads, kept queries and thumbnails hold together. An odd request gets a 4xx, too many at once a 503.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import ipaddress
import json
import secrets
import socket
import socketserver
import sys
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from threading import BoundedSemaphore, Lock
from typing import Any, TextIO
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from clipdistill.data.images import decode
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.runtime.console import say
from clipdistill.runtime.signals import StopSignal
from clipdistill.search.collection import Collection
from clipdistill.search.page import POLICY, Question, render

LARGEST_UPLOAD = 32 << 20
LONGEST_QUERY = 1000
CONNECTIONS = 32
"""Requests answered at a time; more are told to come back."""
WORKING = 2
"""Requests that decode pictures or ask the models at a time; the others wait for them."""
UPLOADS = 64 << 20
"""Bytes of all uploads that are arriving or being looked at."""
LONGEST_HEADERS = 96 << 10
HEADER_SECONDS, BODY_SECONDS, PAUSE_SECONDS = 10.0, 60.0, 10.0
"""For the whole of a request's headers, for the whole of its body, and between two pieces of either."""
_SIDES = {"thumb": 384, "image": 1600}
_ASSETS = {
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_ALWAYS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_BUSY = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class KeptUploads:
    """The newest pictures by name: at most `most`, of at most `size` bytes together."""

    def __init__(self, most: int, size: int) -> None:
        self.most, self.size = most, size
        self._data: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._data)

    def get(self, name: Hashable) -> bytes | None:
        """What is kept under `name`, which becomes the newest."""
        with self._lock:
            if name in self._data:
                self._data.move_to_end(name)
            return self._data.get(name)

    def put(self, name: Hashable, data: bytes) -> None:
        """Keep `data`; the oldest give way."""
        with self._lock:
            self._data[name] = data
            while len(self._data) > self.most or sum(map(len, self._data.values())) > self.size:
                self._data.popitem(last=False)


class _Refused(Exception):
    """A request that is answered with an error and no more."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class SearchServer(ThreadingHTTPServer):
    """Serves one collection; `url` is where. Use `shutdown` from another thread, as with any http.server."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, collection: Collection, host: str = "127.0.0.1", port: int = 0, top: int = 10) -> None:
        self.collection = collection
        self.top = top
        self.thumbnails, self.queries = KeptUploads(1000, 64 << 20), KeptUploads(16, 64 << 20)
        self._connections, self._workers = BoundedSemaphore(CONNECTIONS), BoundedSemaphore(WORKING)
        self._uploading, self._lock = 0, Lock()
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"the page cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}): "
                "choose another --port (0 takes a free one) or --host"
            ) from error
        self.local = _is_loopback(self.server_address[0])
        self.prefix = "/" if self.local else f"/{secrets.token_urlsafe(16)}/"

    @property
    def url(self) -> str:
        """The address of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}{self.prefix}"

    def server_bind(self) -> None:
        """As in socketserver: http.server would ask the name service for this machine's full name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the request, unless there are too many."""
        if not self._connections.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(0.5)
                request.sendall(_BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """One of the few places in which pictures are decoded and models asked. Raises _Refused when none gets free."""
        if not self._workers.acquire(timeout=30):
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many questions at once; try again")
        try:
            yield
        finally:
            self._workers.release()

    def holding(self, more: int) -> bool:
        """Count bytes of an upload (negative: given back); False, and not counted, over what all may hold."""
        with self._lock:
            if more > 0 and self._uploading + more > UPLOADS:
                return False
            self._uploading += more
            return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error worth a traceback."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"clipdistill: the page failed to answer: {type(error).__name__}: {error}", file=sys.stderr)

    def allows(self, host: str | None) -> bool:
        """Whether a Host header names this machine: by address or as localhost, never by another name."""
        try:
            parts = urlsplit(f"//{host or ''}")
            if (parts.port or 80) != self.server_address[1]:
                return False
            name = (parts.hostname or "").lower()
            if name in ("localhost", self.host.lower()):
                return True
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.local

    def keep_query(self, data: bytes) -> str:
        """Remember an uploaded picture for a while and return its name."""
        name = secrets.token_hex(8)
        self.queries.put(name, data)
        return name


def shrunk(data: bytes, side: int) -> bytes:
    """A JPEG of an encoded image with both sides at most `side` pixels, without its metadata. Raises BadSample."""
    picture = decode(data, at_least=side)
    picture.info.clear()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()


def serve(collection: Collection, host: str, port: int, top: int, out: TextIO) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    server = SearchServer(collection, host, port, top)
    server.timeout = 0.25
    say(f"search page: {server.url}   (Ctrl-C ends it)", out)
    if not server.local:
        say("note: it listens beyond this machine; whoever has the address can see these photographs", out)
    with server, StopSignal() as signal:
        while signal.received is None:
            server.handle_request()


def _is_loopback(address: Any) -> bool:
    try:
        return ipaddress.ip_address(str(address)).is_loopback
    except ValueError:
        return False


class _Arriving(io.RawIOBase):
    """The bytes of a connection until a deadline, which no trickle can move, and of the headers only so many."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline = time.monotonic() + HEADER_SECONDS
        self.left: float = LONGEST_HEADERS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = min(self.deadline - time.monotonic(), PAUSE_SECONDS)
        if seconds <= 0:
            raise TimeoutError
        if self.left <= 0:
            raise http.client.LineTooLong("headers")
        self.connection.settimeout(seconds)
        count = self.connection.recv_into(buffer)
        self.left -= count
        return count


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    server_version = "clipdistill"
    sys_version = ""
    default_request_version = "HTTP/1.0"  # a request without a version gets a whole answer, too

    def setup(self) -> None:
        super().setup()
        self.arriving = _Arriving(self.connection)
        self.rfile = io.BufferedReader(self.arriving)

    def handle(self) -> None:
        self.unread = True
        with contextlib.suppress(TimeoutError):
            self.handle_one_request()
        if self.unread:
            self._drain()

    def _drain(self) -> None:
        """Read on for a moment: closing on bytes that nobody read would take the answer back."""
        self.arriving.deadline, self.arriving.left = time.monotonic() + 1, 2 * LARGEST_UPLOAD
        with contextlib.suppress(OSError, http.client.LineTooLong):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(1 << 16):
                pass

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what people search for stays out of logs."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: the sender's fault, in plain text."""
        sent = {501: HTTPStatus.METHOD_NOT_ALLOWED, 505: HTTPStatus.BAD_REQUEST}.get(code, HTTPStatus(code))
        self.close_connection = True
        self._send(sent, f"{sent.phrase.lower()}\n".encode())

    def do_GET(self) -> None:
        try:
            self._route()
        except _Refused as refused:
            self._send(refused.status, f"{refused.text}\n".encode())
        except (BadSample, IndexError):
            self._send(HTTPStatus.NOT_FOUND, b"there is no such picture (any more)\n")
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            print(f"clipdistill: the page failed to answer: {type(error).__name__}: {error}", file=sys.stderr)
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, b"this failed; the terminal says why\n")

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names that http.server looks for

    def _route(self) -> None:
        if not self.server.allows(self.headers.get("Host")):
            raise _Refused(HTTPStatus.FORBIDDEN, "this page answers only under the address it was started with")
        try:
            url = urlsplit(self.path)
            fields = parse_qs(url.query, max_num_fields=10)
        except ValueError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, "this address cannot be read") from error
        path = url.path.removeprefix(self.server.prefix)
        kind, _, number = path.partition("/")
        if not url.path.startswith(self.server.prefix):
            raise _Refused(HTTPStatus.NOT_FOUND, "nothing here")
        if self.command == "POST":
            self._upload(path)
            return
        self.unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if path == "":
            self._page({name: values[0] for name, values in fields.items()})
        elif path in _ASSETS:
            self._send(HTTPStatus.OK, _asset(path), _ASSETS[path])
        elif kind in _SIDES and (place := _number(number)) is not None:
            data = self.server.thumbnails.get(place) if kind == "thumb" else None
            if data is None:
                with self.server.working():
                    data = shrunk(self.server.collection.read(place), _SIDES[kind])
            if kind == "thumb":
                self.server.thumbnails.put(place, data)
            self._send(HTTPStatus.OK, data, "image/jpeg", "private, max-age=86400")
        elif kind == "query" and (data := self.server.queries.get(number)) is not None:
            with self.server.working():
                data = shrunk(data, _SIDES["thumb"])
            self._send(HTTPStatus.OK, data, "image/jpeg", "private, max-age=86400")
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, "nothing here")

    def _page(self, fields: dict[str, str]) -> None:
        like, uploaded = _number(fields.get("like", "")), self.server.queries.get(fields.get("picture"))
        text = "".join(c if c.isprintable() else " " for c in fields.get("q", "")[:LONGEST_QUERY])
        question = Question(text=text)
        collection, top = self.server.collection, self.server.top
        answers = []
        try:
            with self.server.working():
                if like is not None and like < len(collection):
                    question.number = like
                    answers = collection.ask_like(like, top)
                elif uploaded is not None:
                    question.picture = fields["picture"]
                    answers = collection.ask_image(uploaded, top)
                elif text.strip():
                    answers = collection.ask_text(text, top)
        except InputError as error:
            question.error = str(error)
        except BadSample as error:
            question.error = f"this photograph can no longer be read: {error.reason}"
        self._send(HTTPStatus.OK, render(collection, question, answers).encode(), "text/html; charset=utf-8")

    def _upload(self, path: str) -> None:
        """A picture to search with: its bytes as the body; answers with the name to ask for."""
        if path != "picture":
            raise _Refused(HTTPStatus.NOT_FOUND, "nothing here")
        try:
            origin = urlsplit(self.headers.get("Origin", f"//{self.headers.get('Host')}")).netloc
        except ValueError:
            origin = ""
        lengths = self.headers.get_all("Content-Length", [])
        if origin != self.headers.get("Host"):
            raise _Refused(HTTPStatus.FORBIDDEN, "another site asked")
        if not lengths or "Transfer-Encoding" in self.headers:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the length of the picture is missing")
        length = _number(lengths[0])
        if len(lengths) > 1 or length is None:
            raise _Refused(HTTPStatus.BAD_REQUEST, "the length of the picture is no number")
        if length > LARGEST_UPLOAD:
            most = LARGEST_UPLOAD >> 20
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a picture of at most {most} MiB, please")
        with self._body(length) as data, self.server.working():
            try:
                decode(data, at_least=_SIDES["thumb"])
            except BadSample as error:
                raise _Refused(HTTPStatus.BAD_REQUEST, f"the picture cannot be read: {error.reason}") from error
            answer = json.dumps({"picture": self.server.keep_query(data)}).encode()
        self._send(HTTPStatus.OK, answer, "application/json")

    @contextlib.contextmanager
    def _body(self, length: int) -> Iterator[bytes]:
        """The body, counted with all other uploads piece by piece, as it arrives."""
        self.arriving.deadline, self.arriving.left = time.monotonic() + BODY_SECONDS, length + 1
        parts: list[bytes] = []
        held = 0
        try:
            while held < length:
                part = self.rfile.read1(min(1 << 18, length - held))
                if not part:
                    raise _Refused(HTTPStatus.BAD_REQUEST, f"the picture ended after {held} of {length} bytes")
                if not self.server.holding(len(part)):
                    raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many pictures at once; try again")
                held += len(part)
                parts.append(part)
            self.unread = False
            data = b"".join(parts)
            parts.clear()
            yield data
        except TimeoutError as error:
            raise _Refused(HTTPStatus.REQUEST_TIMEOUT, "the picture took too long to arrive") from error
        finally:
            self.server.holding(-held)

    def _send(
        self, status: HTTPStatus, data: bytes, kind: str = "text/plain; charset=utf-8", cache: str = "no-store"
    ) -> None:
        self.connection.settimeout(30)
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(data),
            "Cache-Control": cache,
            **_ALWAYS,
        }.items():
            self.send_header(name, str(value))
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD, POST")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "5")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _number(text: str) -> int | None:
    """A number of at most eleven digits, else None."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else None


@functools.cache
def _asset(name: str) -> bytes:
    return resources.files("clipdistill.search").joinpath(name).read_bytes()
