"""Web servers, by the standard library alone: ranges under the condition of their ETag, folders by their index page.

A connection is kept open for each thread. Proxies and certificates are those of the environment (https_proxy, no_proxy,
SSL_CERT_FILE); user and password come from the URL or from ~/.netrc and go to that host only.
"""

from __future__ import annotations

import base64
import contextlib
import html.parser
import http.client
import netrc
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from clipdistill.errors import InputError
from clipdistill.remote.retry import SLOWEST, Changed, NoRanges, Refused, Temporary, time_limit
from clipdistill.remote.store import Info
from clipdistill.version import __version__

HEAD = 4096
"""Bytes that come along when an object is looked at."""
_MOST_REDIRECTS = 10
_PIECE = 1 << 18
_LARGEST_PAGE = 64 << 20  # bytes of an index page
_LARGEST_OBJECT = 1 << 31  # bytes that are read whole into memory
_DEEPEST = 12  # folders below each other
_SAFE = "/%:@!$&'()*+,;=~-._"


@dataclass(frozen=True)
class HttpAnswer:
    """url: after redirects; headers: by lower-case names; whole: the body was read to its end."""

    url: str
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    whole: bool

    @property
    def identity(self) -> str:
        """What changes with the content."""
        return self.headers.get("etag") or self.headers.get("last-modified", "")

    @property
    def length(self) -> int:
        """Bytes of the body as announced, -1 where nothing is."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() and "chunked" not in self.headers.get("transfer-encoding", "") else -1


class HttpStore:
    """http:// and https://."""

    def __init__(self) -> None:
        self._kept = threading.local()
        self._context: ssl.SSLContext | None = None
        try:
            self._netrc: netrc.netrc | None = netrc.netrc()
        except (OSError, netrc.NetrcParseError):
            self._netrc = None

    def info(self, url: str) -> Info:
        answer = self._get(url, {"Range": f"bytes=0-{HEAD - 1}"}, most=HEAD, accepted=(200, 206, 416))
        ranges = answer.status != 200
        if answer.status == 200:
            if "html" in answer.headers.get("content-type", "") and (urlsplit(answer.url).path or "/").endswith("/"):
                return Info(0, folder=True)
            size = len(answer.body) if answer.whole else answer.length
        else:
            total = answer.headers.get("content-range", "").rpartition("/")[2]
            if answer.status == 416 and total not in ("0", "*", ""):
                raise Temporary(f"HTTP 416 for the first of {total} bytes")
            size = int(total) if total.isdigit() else 0 if answer.status == 416 else -1
            ranges = size >= 0
        return Info(size, answer.identity, ranges=ranges, head=answer.body if answer.status != 416 else b"")

    def read(self, url: str, start: int, end: int, info: Info) -> bytes:
        wanted = {"Range": f"bytes={start}-{end - 1}"}
        if info.identity.startswith('"'):  # a strong ETag: the server compares
            wanted["If-Match"] = info.identity
        answer = self._get(url, wanted, most=end - start, accepted=(200, 206, 412, 416))
        if answer.status in (412, 416):
            raise Changed(f"HTTP {answer.status} for bytes {start} to {end - 1}")
        if answer.identity != info.identity:
            raise Changed(f"it was {info.identity or 'without an ETag'} and is {answer.identity or 'without one'}")
        if answer.status == 200:
            raise NoRanges
        place, _, total = answer.headers.get("content-range", "").removeprefix("bytes").strip().partition("/")
        if total.isdigit() and int(total) != info.size:
            raise Changed(f"it had {info.size} bytes and has {total}")
        if place.partition("-")[0] != str(start) or len(answer.body) != end - start:
            raise Temporary(f"bytes {place} came instead of {start}-{end - 1}, {len(answer.body)} of them")
        return answer.body

    def whole(self, url: str) -> bytes:
        answer = self._get(url, {}, most=_LARGEST_OBJECT, accepted=(200,))
        if not answer.whole:
            raise Temporary(f"more than {_LARGEST_OBJECT} bytes")
        return answer.body

    def save(self, url: str, path: Path) -> None:
        with path.open("r+b") as file:  # its room stays taken meanwhile
            self._get(url, {}, most=1 << 62, accepted=(200,), into=file)
            file.truncate()

    def children(self, url: str) -> list[tuple[str, Info]]:
        path, query = url.partition("?")[::2]
        page = f"{path.rstrip('/')}/" + (f"?{query}" if query else "")
        try:
            answer = self._get(page, {}, most=_LARGEST_PAGE, accepted=(200,))
        except Refused as error:  # servers that show no folders say so
            raise FileNotFoundError(page) from error
        if "html" not in answer.headers.get("content-type", ""):
            raise FileNotFoundError(page)
        links = _Links()
        links.feed(answer.body.decode("utf-8", "replace"))
        here, found = urlsplit(answer.url), dict[str, Info]()
        base = here.path or "/"
        for link in links.found:
            there = urlsplit(urljoin(answer.url, link))
            name = there.path.removeprefix(base)
            if there.netloc == here.netloc and there.path.startswith(base) and not there.query:
                folder, name = name.endswith("/"), unquote(name.rstrip("/"), errors="surrogateescape")
                if name and "/" not in name and name not in (".", ".."):
                    found[name] = Info(-1, folder=folder)
        return sorted(found.items())

    def tree(self, url: str) -> list[tuple[str, Info]]:
        found, waiting = [], [("", 0)]
        while waiting:
            below, depth = waiting.pop()
            for name, info in self.children(f"{url.rstrip('/')}/{quote(below, safe='/')}"):
                if not info.folder:
                    found.append((f"{below}{name}", info))
                elif depth < _DEEPEST:
                    waiting.append((f"{below}{name}/", depth + 1))
        return sorted(found, key=lambda entry: entry[0])

    def _get(
        self, url: str, headers: Mapping[str, str], *, most: int, accepted: tuple[int, ...], into: Any = None
    ) -> HttpAnswer:
        """The answer to a GET, of whose body at most `most` bytes are read, into a file where one is given.

        Raises what its status means.
        """
        own = urlsplit(url)
        for _ in range(_MOST_REDIRECTS):
            place = urlsplit(url)
            sent = {"Accept-Encoding": "identity", "User-Agent": f"clipdistill/{__version__}", **headers}
            if place.hostname == own.hostname and (place.scheme == own.scheme or place.scheme == "https"):
                sent.update(self._credentials(own.username, own.password, own.hostname or ""))
            answer = self._once(url, sent, most, into)
            if answer.status in (301, 302, 303, 307, 308) and "location" in answer.headers:
                url = urljoin(url, answer.headers["location"])
                if urlsplit(url).scheme not in ("http", "https"):
                    raise Refused(f"it leads to {urlsplit(url).scheme}:")
                continue
            if answer.status in accepted:
                return answer
            words = f"HTTP {answer.status} {answer.reason}".strip()
            if answer.status in (404, 410):
                raise FileNotFoundError(words)
            if answer.status in (401, 403, 407):
                raise Refused(words)
            after = answer.headers.get("retry-after", "")
            raise Temporary(words, float(after) if after.isdigit() else 0.0)
        raise Refused(f"more than {_MOST_REDIRECTS} redirects")

    def _credentials(self, user: str | None, password: str | None, host: str) -> dict[str, str]:
        if user is None and self._netrc is not None and host in self._netrc.hosts:
            user, _, password = self._netrc.hosts[host]
        if user is None:
            return {}
        text = f"{unquote(user)}:{unquote(password or '')}"
        return {"Authorization": "Basic " + base64.b64encode(text.encode("utf-8")).decode("ascii")}

    def _once(self, url: str, headers: dict[str, str], most: int, into: Any) -> HttpAnswer:
        place = urlsplit(url)
        target = quote(place.path or "/", safe=_SAFE, errors="surrogateescape")
        target += f"?{quote(place.query, safe=_SAFE + '?')}" if place.query else ""
        # a server may close a connection that waited: that is found out when it is used, and is no failed attempt
        for fresh in (False, True):
            connection, reused, prefix = self._connection(url, fresh)
            try:
                connection.request("GET", prefix + target, headers=headers)
                response = connection.getresponse()
                break
            except (http.client.RemoteDisconnected, ConnectionError, BrokenPipeError):
                self._forget(url)
                if fresh or not reused:
                    raise
            except BaseException:
                self._forget(url)
                raise
        try:
            body, whole = self._body(response, most if response.status < 300 else 0, into)
        except BaseException:
            self._forget(url)
            raise
        if not whole or response.will_close:
            self._forget(url)
        named = {name.lower(): value for name, value in response.getheaders()}
        return HttpAnswer(url, response.status, response.reason, named, body, whole)

    def _body(self, response: http.client.HTTPResponse, most: int, into: Any) -> tuple[bytes, bool]:
        """(at most `most` bytes, whether that is all); an answer that drips ends with TimeoutError."""
        pieces, size = [], 0
        end = time.monotonic() + time_limit()
        if response.length is not None and response.length == 0:
            response.read()
            return b"", True
        while size < most:
            piece = response.read1(min(_PIECE, most - size))
            if not piece:
                break
            pieces.append(piece) if into is None else into.write(piece)
            size += len(piece)
            if time.monotonic() > end + size / SLOWEST:
                raise TimeoutError
        body = b"".join(pieces)
        if response.length == 0 or (response.length is None and size < most):
            with contextlib.suppress(OSError, http.client.HTTPException):
                response.read()  # the end mark, after which the connection can be used again
            return body, True
        if size < most:
            raise http.client.IncompleteRead(body)
        return body, False

    def _connection(self, url: str, fresh: bool) -> tuple[http.client.HTTPConnection, bool, str]:
        """(connection, whether it was used before, what stands before the path of a request through a proxy)."""
        place = urlsplit(url)
        if not place.hostname:
            raise InputError(f"'{url}' names no machine")
        if getattr(self._kept, "process", None) != os.getpid():
            self._kept.process, self._kept.open = os.getpid(), {}
        key = (place.scheme, place.netloc.rpartition("@")[2])
        proxy = urllib.request.getproxies().get(place.scheme)
        if proxy and urllib.request.proxy_bypass(place.hostname):
            proxy = None
        prefix = f"http://{key[1]}" if proxy and place.scheme == "http" else ""
        if not fresh and key in self._kept.open:
            return self._kept.open[key], True, prefix
        try:
            connection = self._new(place.scheme, place.hostname, place.port, proxy)
        except InputError:  # a time limit that is none
            raise
        except ValueError as error:  # a port that is no number
            raise InputError(f"'{url}' is not the address of anything ({error})") from error
        self._kept.open[key] = connection
        return connection, False, prefix

    def _new(self, scheme: str, host: str, port: int | None, proxy: str | None) -> http.client.HTTPConnection:
        through = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
        at, number = (through.hostname or host, through.port or 8080) if through else (host, port)
        if scheme == "http":
            return http.client.HTTPConnection(at, number, timeout=time_limit())
        self._context = self._context or ssl.create_default_context()
        secure = http.client.HTTPSConnection(at, number, timeout=time_limit(), context=self._context)
        if through:
            words = self._credentials(through.username, through.password, "")
            secure.set_tunnel(
                host, port or 443, {k.replace("Authorization", "Proxy-Authorization"): v for k, v in words.items()}
            )
        return secure

    def _forget(self, url: str) -> None:
        place = urlsplit(url)
        connection = self._kept.open.pop((place.scheme, place.netloc.rpartition("@")[2]), None)
        if connection is not None:
            connection.close()


class _Links(html.parser.HTMLParser):
    """The targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]
