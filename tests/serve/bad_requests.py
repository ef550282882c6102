"""Seeded requests that are no good ones, each on a socket of its own, and good ones between them that must be answered.

    python -m tests.serve.bad_requests HOST PORT [--requests 10000] [--seed 0] [--threads 4]

A fault is a status of 500 or more, an answer that is no HTTP or no JSON, one that shows a path or a traceback, silence
for longer than `PATIENCE`, and a good request between the bad ones that does not get its own rows.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import io
import json
import random
import socket
import struct
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image

PATIENCE = 40.0
GOOD = "picture of a colour"
LEAKS = (b"Traceback", b'File "', b"site-packages", b"/work/", b"/tmp/", b"/home/", b".py", b"onnxruntime::")


@dataclass
class Attack:
    """What came of it: statuses by kind ("none": the connection ended without an answer) and faults in words."""

    answers: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def total(self) -> int:
        """Requests sent."""
        return sum(sum(counts.values()) for counts in self.answers.values())


def picture(rng: random.Random, kind: str = "PNG", side: int = 24) -> bytes:
    """A small picture of one colour."""
    data = io.BytesIO()
    Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3))).save(data, kind)
    return data.getvalue()


@functools.cache
def colour(number: int) -> bytes:
    """One of the good pictures."""
    return picture(random.Random(number))


def http(
    method: str, path: str, body: bytes = b"", kind: str = "application/json", more: str = "", length: str = ""
) -> bytes:
    """A whole request that asks for the connection to be closed."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    if kind:
        head += f"Content-Type: {kind}\r\n"
    head += f"Content-Length: {length or len(body)}\r\n{more}\r\n"
    return head.encode("latin-1", "replace") + body


def form(parts: list[tuple[str, str | None, bytes]], boundary: str = "frontier") -> bytes:
    """A multipart body of (name, file name or None, content)."""
    body = b""
    for name, file, content in parts:
        named = f'; filename="{file}"' if file is not None else ""
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return body + f"--{boundary}--\r\n".encode()


def mangled(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, left out, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[place : place + rng.randrange(1, 20)]
            case 2:
                changed[place:place] = changed[place : place + rng.randrange(1, 200)]
            case _:
                del changed[max(place, 1) :]
        if not changed:
            changed = bytearray(b"x")
    return bytes(changed)


def value(rng: random.Random, depth: int = 0) -> object:
    """Any JSON value."""
    simple = [
        None,
        True,
        0,
        -1,
        1e308,
        10**30,
        "",
        "a dog",
        "\0",
        "\ud800",
        "é" * 50,
        "A" * rng.choice((1, 5000)),
        "data:,",
    ]
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(simple)
    if rng.random() < 0.5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(("images", "texts", "labels", "x", "")): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is that large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(5000))) + chunk(b"IEND", b"")
    )


PATHS = ("/embed/images", "/embed/texts", "/classify")


def _asked(rng: random.Random, images: list[bytes]) -> tuple[str, dict[str, object]]:
    path = rng.choice(PATHS)
    asked: dict[str, object] = (
        {"texts": ["a red circle"]}
        if path == "/embed/texts"
        else {"images": [base64.b64encode(data).decode() for data in images]}
    )
    if path == "/classify":
        asked["labels"] = ["a red circle", "a blue square"]
    return path, asked


def _json_mangled(rng: random.Random) -> bytes:
    path, asked = _asked(rng, [picture(rng)])
    return http("POST", path, mangled(rng, json.dumps(asked).encode()))


def _json_types(rng: random.Random) -> bytes:
    path, asked = _asked(rng, [picture(rng)])
    for key in rng.sample([*asked, "format", "top", "templates", "x"], 2):
        asked[key] = value(rng)
    whole = rng.choice((asked, asked, asked, value(rng)))
    return http("POST", path, json.dumps(whole).encode())


def _json_shapes(rng: random.Random) -> bytes:
    body = rng.choice(
        (
            b"[" * rng.choice((10, 5000, 300_000)),
            b'{"texts":' * 2000,
            b'{"texts": [' + b'"a",' * 150_000 + b'"a"]}',
            b'{"texts": ["a"], "texts": ["b"]}',
            b"1" * 20_000,
            b"NaN",
            b"\xff\xfe{\0}\0",
            b"\xef\xbb\xbf{}",
            b"",
            b"null",
            json.dumps({"texts": ["word " * rng.choice((10, 5000))]}).encode(),
            json.dumps({"texts": ["a"] * rng.choice((1024, 1025, 20_000))}).encode(),
            json.dumps({"images": [""] * rng.choice((1, 64, 65, 2000))}).encode(),
            json.dumps(
                {"texts": ["".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.choice((9, 900))))]}
            ).encode(),
            b'{"labels": ["a", "a"], "images": ["%s"]}' % base64.b64encode(picture(rng)),
            b'{"labels": ["a"], "templates": ["no place"], "images": ["%s"]}' % base64.b64encode(picture(rng)),
            b'{"labels": ["a"], "top": 0, "images": ["%s"]}' % base64.b64encode(picture(rng)),
        )
    )
    return http("POST", rng.choice(PATHS), body)


def _pictures(rng: random.Random) -> bytes:
    good = picture(rng, rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")), rng.choice((1, 8, 60)))
    bad = rng.choice(
        (
            mangled(rng, good),
            mangled(rng, good),
            good[: len(good) // 2],
            b"",
            b"<svg onload=alert(1)>",
            b"%PDF-1.4",
            bytes(3000),
            bomb(100_000, 100_000),
            bomb(1, 2_000_000_000),
            bomb(6000, 4000),
            b"GIF89a" + bytes(50),
            rng.randbytes(500),
        )
    )
    images = [good] * rng.randrange(3)
    images.insert(rng.randrange(len(images) + 1), bad)
    if rng.random() < 0.5:
        kind = "multipart/form-data; boundary=frontier"
        return http("POST", "/embed/images", form([("images", "a.png", data) for data in images]), kind)
    path, asked = _asked(rng, images)
    return http("POST", path, json.dumps(asked).encode())


def _forms(rng: random.Random) -> bytes:
    parts: list[tuple[str, str | None, bytes]] = [("images", "a.png", picture(rng))]
    parts += rng.sample(
        [
            ("labels", None, b"a red circle"),
            ("images", None, b"x"),
            ("texts", None, b"a"),
            ("x", None, b"y"),
            ("top", None, b"many"),
            ("top", None, b"1"),
            ("", None, b""),
            ("labels", "file", b"z"),
            ("format", None, b"base64"),
            ("labels", None, b"\xff\xfe"),
            ("labels", None, b"a" * 2_000_000),
            ("templates", None, b"{} {}"),
        ],
        rng.randrange(5),
    )
    if rng.random() < 0.2:
        parts = [part for part in parts if len(part[2]) < 10_000] * 300
    body = form(parts)
    kind = rng.choice(
        (
            "multipart/form-data; boundary=frontier",
            "multipart/form-data; boundary=frontier",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=other",
            'multipart/form-data; boundary="',
            "multipart/form-data; charset=utf-99; boundary=frontier",
            "multipart/mixed; boundary=frontier",
        )
    )
    return http("POST", rng.choice(PATHS), mangled(rng, body) if rng.random() < 0.5 else body, kind)


def _headers(rng: random.Random) -> bytes:
    path, asked = _asked(rng, [picture(rng)])
    body = json.dumps(asked).encode()
    kind = rng.choice(
        ("", "text/plain", "application/json", "image/png", "application/x-www-form-urlencoded", ";;=", "x" * 9000)
    )
    more = rng.choice(
        (
            "",
            "Host: evil.example\r\n",
            "Host: 127.0.0.1:1\r\n",
            "Origin: http://evil.example\r\n",
            "Origin: null\r\n",
            "Transfer-Encoding: chunked\r\n",
            "Transfer-Encoding: gzip\r\n",
            "Content-Encoding: gzip\r\n",
            "Expect: 100-continue\r\n",
            "Expect: magic\r\n",
            f"Cookie: {'c' * rng.choice((10, 70_000))}\r\n",
            "X: y\r\n" * 3000,
            "Bad Header\r\n",
            "X:\0\r\n",
            "Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n",
            "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n",
            "Range: bytes=0-9999999999\r\n",
            "Origin: http://[\r\n",
        )
    )
    length = rng.choice(("", "", "", "-1", "abc", "0", "1", "99999999999999999999", str(1 << 40), "1, 2", " 5", "0x10"))
    return http(
        rng.choice(("POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "FOO", "p\x80")),
        path,
        body,
        kind,
        more,
        length,
    )


def _paths(rng: random.Random) -> bytes:
    path = rng.choice(
        (
            "/",
            "/embed/images/",
            "//",
            "/../../etc/passwd",
            "/%2e%2e/etc/passwd",
            "/metrics/../model",
            "/embed",
            "*",
            "http://x/health",
            "/health?" + "a=b&" * 5000,
            "/%00",
            "/%ff%fe",
            "/" + "a" * 60_000,
            "/docs",
            "/model?x=<script>",
            "/openapi.json/",
            "health",
        )
    )
    return http(rng.choice(("GET", "POST", "HEAD", "DELETE")), path)


def _chunked(rng: random.Random) -> bytes:
    head = http("POST", "/embed/texts").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + rng.choice(
        (
            b"zz\r\nx\r\n",
            b"5\r\nabc",
            b"-1\r\n",
            b"ffffffffffffffff\r\n",
            b"0\r\n\r\n",
            b'12\r\n{"texts": ["a"]}\r\n0\r\n\r\n',
            b"1\r\n{\r\n" * 3000 + b"0\r\n\r\n",
            b"5;ext=" + b"x" * 5000 + b"\r\nabcde\r\n0\r\n\r\n",
            b"0\r\nTrailer: x\r\n\r\n",
        )
    )


def _garbage(rng: random.Random) -> bytes:
    return rng.choice(
        (
            rng.randbytes(rng.randrange(1, 3000)),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
            b"\r\n" * 5000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /health HTTP/1.1\r\n\r\n",
            b"GET /health HTTP/1.0\r\n\r\n",
            b"POST\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /health\r\n",
            http("GET", "/health") * 50,
            b"A" * 100_000,
            http("GET", "/health").replace(b"Connection: close\r\n", b"") + rng.randbytes(200),
            mangled(rng, http("GET", "/health")),
        )
    )


def _good(rng: random.Random) -> bytes:
    number = rng.randrange(8)
    return http(
        "POST", f"/embed/images?{number}", json.dumps({"images": [base64.b64encode(colour(number)).decode()]}).encode()
    )


KINDS = {
    "mangled JSON": _json_mangled,
    "wrong types": _json_types,
    "odd JSON": _json_shapes,
    "bad pictures": _pictures,
    "bad forms": _forms,
    "odd headers": _headers,
    "odd paths": _paths,
    "broken chunks": _chunked,
    "garbage": _garbage,
    GOOD: _good,
}
TORN = "torn uploads"
SLOW = "slow clients"


def send(host: str, port: int, data: bytes, rng: random.Random, way: str = "") -> bytes | None:
    """What came back; None: the other side was silent for too long."""
    with (
        contextlib.suppress(ConnectionError, BrokenPipeError),
        socket.create_connection((host, port), PATIENCE) as place,
    ):
        received = b""
        try:
            if way == TORN:
                place.sendall(data[: rng.randrange(len(data))])
                end = rng.randrange(3)
                if end == 0:  # a reset instead of an orderly end
                    place.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if end < 2:
                    return b""
                place.shutdown(socket.SHUT_WR)
            elif way == SLOW:
                for start in range(0, len(data), max(1, len(data) // 6)):
                    place.sendall(data[start : start + max(1, len(data) // 6)])
                    time.sleep(rng.random() * 0.05)
            else:
                place.sendall(data)
                if (
                    way == "garbage" and rng.random() < 0.95
                ):  # else it waits for its end until the server's patience is over
                    place.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # refused before all was sent: the answer may be there all the same
        try:
            while piece := place.recv(1 << 16):
                received += piece
        except TimeoutError:
            return None
        except ConnectionError:
            pass
        return received
    return b""


def judged(kind: str, answer: bytes | None, expected: dict[int, list[float]], asked: bytes) -> tuple[str, str]:
    """(status or "none", what is wrong with the answer or "")."""
    if answer is None:
        return "hang", f"silence for {PATIENCE:g} s"
    if not answer:
        return "none", "no answer to a good request" if kind == GOOD else ""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return "no HTTP", f"no HTTP: {answer[:80]!r}"
    status = int(words[1])
    if status == 100:
        return judged(kind, body, expected, asked)
    leaked = next((leak for leak in LEAKS if leak in answer), None)
    if status >= 500 and status != 503:
        return str(status), f"status {status}: {body[:200]!r}"
    if leaked and leaked not in asked:
        return str(status), f"the answer shows {leaked!r}: {answer[:300]!r}"
    if body and status >= 400:
        try:
            if not isinstance(json.loads(body.partition(b"HTTP/1.1 ")[0])["error"], str):
                raise ValueError("no sentence")
        except (ValueError, KeyError, TypeError):
            return str(status), f"no JSON with a sentence: {body[:200]!r}"
    if kind == GOOD:
        number = int(asked.partition(b"?")[2][:1])
        if status == 429:
            return "429", ""
        if status != 200:
            return str(status), f"a good request got {status}: {body[:200]!r}"
        row = json.loads(body)["embeddings"][0]
        if max(abs(a - b) for a, b in zip(row, expected[number], strict=True)) > 1e-5:
            return "200", f"picture {number} got another one's row"
    return str(status), ""


def attack(host: str, port: int, count: int, seed: int = 0, threads: int = 4) -> Attack:
    """Send `count` requests of all kinds from some threads; before it, the good ones alone."""
    expected: dict[int, list[float]] = {}
    for number in range(8):
        rng = random.Random()
        body = json.dumps({"images": [base64.b64encode(colour(number)).decode()]}).encode()
        answer = send(host, port, http("POST", "/embed/images", body), rng)
        expected[number] = json.loads((answer or b"").partition(b"\r\n\r\n")[2])["embeddings"][0]
    found = Attack()

    def one(number: int) -> None:
        rng = random.Random(seed * 1_000_003 + number)
        kind = rng.choice([*KINDS, TORN, SLOW])
        make = KINDS.get(kind) or KINDS[rng.choice(list(KINDS))]
        data = make(rng)
        answer = send(host, port, data, rng, kind)
        status, fault = judged(kind, answer, expected, data)
        found.answers.setdefault(kind, Counter())[status] += 1
        if fault:
            found.faults.append(f"request {number} ({kind}): {fault}")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(count)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=4)
    given = parser.parse_args()
    done = attack(given.host, given.port, given.requests, given.seed, given.threads)
    for name, counts in done.answers.items():
        print(f"{name}: {', '.join(f'{status} {number}' for status, number in sorted(counts.items()))}")
    print(f"{done.total()} requests, {len(done.faults)} faults")
    print("\n".join(done.faults[:30]))
