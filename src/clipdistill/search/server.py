"""A local page for searching: Python's own HTTP server, this machine only unless told otherwise.

What it gives away: the page, its style and script, and re-encoded pictures of indexed files, asked for by number and
never by path (so no metadata such as the place of a photograph leaves either). A request must name this machine as its
host, which keeps other sites from reaching the page through a name that points here; a content security policy allows
nothing but the page's own files. On any other address than this machine's own, the page lies below a secret path.
"""

from __future__ import annotations

import io
import ipaddress
import json
import secrets
import socket
import socketserver
import sys
from collections import OrderedDict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image
from rich.console import Console

from clipdistill.data.images import decode
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.runtime.signals import StopSignal
from clipdistill.search.collection import Collection
from clipdistill.search.page import POLICY, Question, render

LARGEST_UPLOAD = 32 << 20
LONGEST_QUERY = 1000
_SIDES = {"thumb": 384, "image": 1600}
_ASSETS = {
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_KEPT_THUMBNAILS = 1000
_KEPT_QUERIES = 16


class SearchServer(ThreadingHTTPServer):
    """Serves one collection; `url` is where. Use `shutdown` from another thread, as with any http.server."""

    daemon_threads = True

    def __init__(self, collection: Collection, host: str = "127.0.0.1", port: int = 0, top: int = 10) -> None:
        self.collection = collection
        self.top = top
        self.thumbnails: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self.queries: OrderedDict[str, bytes] = OrderedDict()
        self.lock = Lock()
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"the page cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}): "
                "choose another --port (0 takes a free one)"
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

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error worth a traceback."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"clipdistill: the page failed to answer: {type(error).__name__}: {error}", file=sys.stderr)

    def allows(self, host: str | None) -> bool:
        """Whether a Host header names this machine: by address or as localhost, never by another name."""
        if host is None:
            return False
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if port != self.server_address[1]:
            return False
        if name.lower() in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.local

    def keep_query(self, data: bytes) -> str:
        """Remember an uploaded picture (the newest sixteen) and return its name."""
        name = secrets.token_hex(8)
        with self.lock:
            self.queries[name] = data
            while len(self.queries) > _KEPT_QUERIES:
                self.queries.popitem(last=False)
        return name

    def picture(self, kind: str, number: int) -> bytes:
        """The JPEG of an indexed photograph, at most as large as `kind` says. Raises BadSample, IndexError."""
        key = (kind, number)
        with self.lock:
            if key in self.thumbnails:
                self.thumbnails.move_to_end(key)
                return self.thumbnails[key]
        data = shrunk(self.collection.read(number), _SIDES[kind])
        if kind == "thumb":
            with self.lock:
                self.thumbnails[key] = data
                while len(self.thumbnails) > _KEPT_THUMBNAILS:
                    self.thumbnails.popitem(last=False)
        return data


def shrunk(data: bytes, side: int) -> bytes:
    """A JPEG of an encoded image with both sides at most `side` pixels, without its metadata. Raises BadSample."""
    picture = decode(data, at_least=side)
    picture.info.clear()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()


def serve(collection: Collection, host: str, port: int, top: int, console: Console) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    server = SearchServer(collection, host, port, top)
    server.timeout = 0.25
    console.print(f"search page: {server.url}   (Ctrl-C ends it)", markup=False, soft_wrap=True)
    if not server.local:
        console.print("note: it listens beyond this machine; whoever has the address can see these photographs")
    sys.stdout.flush()
    with server, StopSignal() as signal:
        while signal.received is None:
            server.handle_request()


def _is_loopback(address: Any) -> bool:
    try:
        return ipaddress.ip_address(str(address)).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    timeout = 30
    server_version = "clipdistill"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what people search for stays out of logs."""

    def _answer(self) -> None:
        try:
            self._route()
        except (BadSample, IndexError):
            self._send(HTTPStatus.NOT_FOUND, b"there is no such picture (any more)\n")
        except ConnectionError:
            raise
        except Exception as error:
            print(f"clipdistill: the page failed to answer: {type(error).__name__}: {error}", file=sys.stderr)
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, b"this failed; the terminal says why\n")

    def _route(self) -> None:
        if not self.server.allows(self.headers.get("Host")):
            self._send(HTTPStatus.FORBIDDEN, b"this page answers only under the address it was started with\n")
            return
        url = urlsplit(self.path)
        if not url.path.startswith(self.server.prefix):
            self._send(HTTPStatus.NOT_FOUND, b"nothing here\n")
            return
        path = url.path.removeprefix(self.server.prefix)
        kind, _, number = path.partition("/")
        if self.command == "POST":
            self._upload(path)
        elif path == "":
            self._page(parse_qs(url.query, max_num_fields=10))
        elif path in _ASSETS:
            data = resources.files("clipdistill.search").joinpath(path).read_bytes()
            self._send(HTTPStatus.OK, data, _ASSETS[path])
        elif kind in _SIDES and number.isascii() and number.isdecimal() and len(number) < 12:
            self._send(HTTPStatus.OK, self.server.picture(kind, int(number)), "image/jpeg", "private, max-age=86400")
        elif kind == "query" and number in self.server.queries:
            data = shrunk(self.server.queries[number], _SIDES["thumb"])
            self._send(HTTPStatus.OK, data, "image/jpeg", "private, max-age=86400")
        else:
            self._send(HTTPStatus.NOT_FOUND, b"nothing here\n")

    def _page(self, fields: dict[str, list[str]]) -> None:
        first = {name: values[0] for name, values in fields.items()}
        like, uploaded = first.get("like", ""), self.server.queries.get(first.get("picture", ""))
        question = Question(text=first.get("q", "")[:LONGEST_QUERY], error="")
        collection, top = self.server.collection, self.server.top
        answers = []
        try:
            if like.isascii() and like.isdecimal() and len(like) < 12 and int(like) < len(collection):
                question.number = int(like)
                answers = collection.ask_like(question.number, top)
            elif uploaded is not None:
                question.picture = first["picture"]
                answers = collection.ask_image(uploaded, top)
            elif question.text.strip():
                answers = collection.ask_text(question.text, top)
        except InputError as error:
            question.error = str(error)
        except BadSample as error:
            question.error = f"this photograph can no longer be read: {error.reason}"
        self._send(HTTPStatus.OK, render(collection, question, answers).encode(), "text/html; charset=utf-8")

    def _upload(self, path: str) -> None:
        """A picture to search with: its bytes as the body; answers with the name to ask for."""
        origin = self.headers.get("Origin")
        length = self.headers.get("Content-Length", "")
        if path != "picture":
            self._refuse(HTTPStatus.NOT_FOUND, "nothing here")
        elif origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            self._refuse(HTTPStatus.FORBIDDEN, "another site asked")
        elif not length.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the length of the picture is missing")
        elif int(length) > LARGEST_UPLOAD:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a picture of at most {LARGEST_UPLOAD >> 20} MiB, please"
            )
        else:
            data = self.rfile.read(int(length))
            try:
                decode(data, at_least=_SIDES["thumb"])
            except BadSample as error:
                self._refuse(HTTPStatus.BAD_REQUEST, f"the picture cannot be read: {error.reason}")
                return
            answer = json.dumps({"picture": self.server.keep_query(data)}).encode()
            self._send(HTTPStatus.OK, answer, "application/json")

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # the body was not read
        self._send(status, f"{text}\n".encode())

    def _send(
        self, status: HTTPStatus, data: bytes, kind: str = "text/plain; charset=utf-8", cache: str = "no-store"
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Cache-Control": cache,
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
