"""The service as an ASGI application: routes, admission, and the way of a request through pool and batches.

A request is taken whole or not at all: its bytes count against what all bodies may hold, its pictures and texts against
the queue. Decoding runs in a pool of threads, the towers in a thread each that take turns. Whoever is answered late, or
has hung up, is taken out of the queue. Every answer that is no success is JSON with one sentence under "error".
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import math
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from clipdistill.config import Config
from clipdistill.data.problems import BadSample
from clipdistill.data.templates import fill
from clipdistill.runtime.machine import cpu_count
from clipdistill.serve.batching import Batcher
from clipdistill.serve.bodies import (
    FORMS,
    ClassifyPictures,
    EmbedPictures,
    EmbedTexts,
    RequestRefused,
    check_classes,
    check_texts,
    media_type,
    openapi,
    read_form_body,
    read_json_body,
)
from clipdistill.serve.limits import BODIES_AT_ONCE, BODY_SECONDS, LABELS_KEPT, ServiceLimits
from clipdistill.serve.metrics import ServiceMetrics
from clipdistill.serve.model import ServedModel
from clipdistill.version import __version__

_DRAIN_SECONDS = 1.0
_TEXTS_AT_ONCE = 16
_HIDDEN = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class _Gate:
    """Rows of one tower on their way: from admission to the answer."""

    def __init__(self, what: str, most: int) -> None:
        self.what, self.most, self.count = what, most, 0
        self._row_seconds = 0.0

    def waiting(self) -> float:
        """Rows on their way."""
        return self.count

    def seen(self, rows: int, seconds: float) -> None:
        """Learn from a batch how long a row takes."""
        now = seconds / rows
        self._row_seconds = now if not self._row_seconds else 0.9 * self._row_seconds + 0.1 * now

    def check(self, rows: int) -> None:
        """Raise RequestRefused where so many more are too many at the moment."""
        if self.count + rows > self.most:
            again = min(60, max(1, math.ceil(self.count * self._row_seconds)))
            raise RequestRefused(
                429, f"busy: {self.count} {self.what} are on their way, come again in {again} s", again
            )

    @contextlib.contextmanager
    def admit(self, rows: int) -> Iterator[None]:
        """Count rows within."""
        self.check(rows)
        self.count += rows
        try:
            yield
        finally:
            self.count -= rows


class Service:
    """The ASGI application for one model. hosts: names a Host header may have besides this machine's addresses (None:
    any name); `close` ends its threads."""

    def __init__(self, model: ServedModel, limits: ServiceLimits, hosts: Collection[str] | None = None) -> None:
        self.model, self.limits, self.hosts = model, limits, hosts
        self.gates = {"image": _Gate("pictures", limits.queue), "text": _Gate("texts", limits.text_queue)}
        self.metrics = ServiceMetrics({name: gate.waiting for name, gate in self.gates.items()})
        turn = threading.Lock()
        self._batchers = {
            tower: Batcher(run, limits.batch_size, limits.wait_ms / 1000, turn=turn, seen=self._counting(tower))
            for tower, run in (("image", model.images), ("text", model.texts))
        }
        # one request gets all of them but one, so that a small one gets through beside one that decodes for long
        self._decoders = cpu_count() + 1
        self._pool = ThreadPoolExecutor(self._decoders, thread_name_prefix="decode")
        self._held = 0
        self._labels: OrderedDict[str, np.ndarray] = OrderedDict()
        self._openapi = json.dumps(openapi(__version__)).encode()
        posts: dict[str, Callable[[Any, list[bytes]], Awaitable[bytes]]]
        posts = {"/embed/images": self._embed_pictures, "/embed/texts": self._embed_texts, "/classify": self._classify}
        gets = {"/health": self._health, "/model": self._describe, "/metrics": self._count, "/openapi.json": self._api}
        self._paths = {*posts, *gets}
        routes = [Route(path, self._posting(FORMS[path], work), methods=["POST"]) for path, work in posts.items()]
        routes += [Route(path, answer, methods=["GET"]) for path, answer in gets.items()]
        self._app = Starlette(
            routes=routes,
            exception_handlers={
                RequestRefused: self._refuse,
                HTTPException: self._refuse,
                ClientDisconnect: self._gone,
                Exception: self._fail,
            },
        )
        self._app.router.redirect_slashes = False

    def close(self) -> None:
        """End its threads; what waits is finished first."""
        for batcher in self._batchers.values():
            batcher.close()
        self._pool.shutdown(cancel_futures=True)

    def _counting(self, tower: str) -> Callable[[int, float], None]:
        count, learn = self.metrics.batch(tower), self.gates[tower].seen

        def seen(rows: int, seconds: float) -> None:
            count(rows, seconds)
            learn(rows, seconds)

        return seen

    # --- every request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: answer, count, and let no error out."""
        if scope["type"] != "http":
            return
        began, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            names = {name for name, _ in scope["headers"]}
            if not self._knows(scope):
                sentence = "this service answers only under the address it was started with (--allow-host adds names)"
                await _sentence(403, sentence)(scope, receive, counted)
            elif names >= {b"content-length", b"transfer-encoding"}:  # a proxy may go by the other one
                response = _sentence(400, "Content-Length and Transfer-Encoding: one request, one of them")
                response.headers["Connection"] = "close"
                await response(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        except asyncio.CancelledError:  # the time for a graceful stop is over
            if not status:
                await _sentence(503, "the service is stopping", 5)(scope, receive, counted)
        except Exception:  # it has been told and answered by `_fail`
            if not status:
                await _sentence(500, "this failed; the log of the service says why")(scope, receive, counted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self.metrics.request(path, status or 499, time.perf_counter() - began)

    def _knows(self, scope: Scope) -> bool:
        """Whether the Host header names this machine: a page of another site must not reach it by a name of its own."""
        if self.hosts is None:
            return True
        try:
            name = (urlsplit(f"//{Request(scope).headers.get('host', '')}").hostname or "").lower()
            return name == "localhost" or name in self.hosts or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    async def _refuse(self, request: Request, error: Exception) -> Response:
        if isinstance(error, RequestRefused):
            return _sentence(error.status, error.text, error.again)
        assert isinstance(error, HTTPException)
        text = {404: "there is nothing at this path", 405: "this path takes another method"}.get(error.status_code)
        response = _sentence(error.status_code, text or str(error.detail))
        response.headers.update(error.headers or {})
        return response

    async def _gone(self, request: Request, error: Exception) -> Response:
        return _sentence(400, "the body ended too early")

    async def _fail(self, request: Request, error: Exception) -> Response:
        print(f"clipdistill: a request failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return _sentence(500, "this failed; the log of the service says why")

    # --- requests that tell

    async def _health(self, request: Request) -> Response:
        if any(batcher.stuck(4 * self.limits.timeout) for batcher in self._batchers.values()):
            return _sentence(503, "the model does not answer any more")
        return _answer(b'{"status": "ok"}')

    async def _describe(self, request: Request) -> Response:
        limits = {name: getattr(self.limits, name) for name in ("pictures", "texts", "bytes", "pixels", "timeout")}
        return _answer(json.dumps({**self.model.description(), "limits": limits}).encode())

    async def _count(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8", headers=_HIDDEN)

    async def _api(self, request: Request) -> Response:
        return _answer(self._openapi)

    # --- requests that ask the model

    def _posting(
        self, form: type[Config], work: Callable[[Any, list[bytes]], Awaitable[bytes]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route of a form: read, parse, work, within the limits."""
        kinds = {"application/json", "multipart/form-data"}

        async def post(request: Request) -> Response:
            body = bytearray()
            try:
                self._own_site(request)
                kind = media_type(request.headers.get("content-type", ""))
                if kind not in kinds:
                    raise RequestRefused(415, f"the Content-Type must be {' or '.join(sorted(kinds))}")
                if request.headers.get("content-encoding", "identity").lower() != "identity":
                    raise RequestRefused(415, "the body is compressed (Content-Encoding): send it as it is")
                if "images" in form.model_fields:
                    self.gates["image"].check(1)
                await self._read(request, body)
            except RequestRefused as refused:
                await _drain(request)
                response = await self._refuse(request, refused)
                response.headers["Connection"] = "close"
                self._held -= len(body)
                return response
            try:
                return _answer(await self._in_time(request, self._work(request, kind, body, form, work)))
            finally:
                self._held -= len(body)

        return post

    def _own_site(self, request: Request) -> None:
        origin = request.headers.get("origin")
        try:
            own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
        except ValueError:
            own = False
        if not own:
            raise RequestRefused(403, "another site asked: pages of other origins get no answer")

    async def _read(self, request: Request, body: bytearray) -> None:
        """Fill `body`, counted with all others piece by piece. Raises RequestRefused and ClientDisconnect."""
        most = self.limits.bytes
        too_large = RequestRefused(413, f"the body is larger than {self.limits.megabytes} MiB")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    if len(body) + len(piece) > most:
                        raise too_large
                    if self._held + len(piece) > BODIES_AT_ONCE * most:
                        raise RequestRefused(429, "busy: too many bodies are arriving at once, come again", 1)
                    self._held += len(piece)
                    body += piece
        except TimeoutError as error:
            raise RequestRefused(408, f"the body took longer than {BODY_SECONDS:g} s to arrive") from error
        except ClientDisconnect:
            self._held -= len(body)
            raise

    async def _in_time(self, request: Request, work: Coroutine[Any, Any, bytes]) -> bytes:
        """What `work` gives; it is cancelled when the client has gone or the time is over."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({task, gone}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            raise RequestRefused(503, f"no answer within {self.limits.timeout:g} s: ask for less, or come again", 5)
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.wait({task, gone})  # what they hold is given back before the answer leaves

    async def _work(
        self,
        request: Request,
        kind: str,
        body: bytearray,
        form: type[Config],
        work: Callable[[Any, list[bytes]], Awaitable[bytes]],
    ) -> bytes:
        if kind == "application/json":
            asked, pictures = await self._pooled(read_json_body, bytes(body), form)
        else:
            asked, pictures = await read_form_body(bytes(body), request.headers["content-type"], form, self.limits)
        return await work(asked, pictures)

    async def _pooled(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _embed_pictures(self, asked: EmbedPictures, pictures: list[bytes]) -> bytes:
        rows = await self._picture_rows(pictures)
        return await self._pooled(_embeddings, rows, asked.format, {})

    async def _embed_texts(self, asked: EmbedTexts, pictures: list[bytes]) -> bytes:
        check_texts(asked.texts, "text", self.limits.texts)
        rows, cut, unknown = await self._text_rows(asked.texts, "text")
        notes = {name: found for name, found in (("cut", cut), ("unknown", unknown)) if found}
        return await self._pooled(_embeddings, rows, asked.format, notes)

    async def _classify(self, asked: ClassifyPictures, pictures: list[bytes]) -> bytes:
        templates = check_classes(asked, self.limits)
        tokens, _, unknown = await self._tokens(asked.labels)
        if unknown:
            raise RequestRefused(
                422, f"the model knows no word of label {unknown[0]} (from 0), so an answer means nothing"
            )
        first: dict[bytes, int] = {}
        for number, row in enumerate(tokens):
            if (other := first.setdefault(row.tobytes(), number)) != number:
                raise RequestRefused(422, f"labels {other} and {number} (from 0) are the same to the model")
        prompts = [fill(template, label) for template in templates for label in asked.labels]
        known = {text: row for text in prompts if (row := self._labels.get(text)) is not None}
        missing = [text for text in dict.fromkeys(prompts) if text not in known]
        if missing:
            rows, _, _ = await self._text_rows(missing, "prompt")
            known |= zip(missing, rows, strict=True)
        for text in prompts:
            self._labels[text] = known[text]
            self._labels.move_to_end(text)
        while len(self._labels) > LABELS_KEPT:
            self._labels.popitem(last=False)
        classes = np.stack([known[text] for text in prompts]).reshape(len(templates), len(asked.labels), -1).mean(0)
        classes /= np.maximum(np.linalg.norm(classes, axis=1, keepdims=True), 1e-12)
        rows = await self._picture_rows(pictures)
        return await self._pooled(_ranking, rows @ classes.T, self.model.logit_scale, asked.labels, asked.top)

    async def _picture_rows(self, pictures: Sequence[bytes]) -> np.ndarray:
        """Unit rows (n, width) of encoded pictures. Raises RequestRefused for one that cannot be used."""
        if not pictures:
            raise RequestRefused(400, "there is no picture in the request")
        if len(pictures) > self.limits.pictures:
            raise RequestRefused(413, f"{len(pictures)} pictures, at most {self.limits.pictures} a request")
        with self.gates["image"].admit(len(pictures)):
            places = asyncio.Semaphore(self._decoders - 1)

            async def decoded(number: int, data: bytes) -> np.ndarray:
                async with places:
                    return await self._pooled(self._pixels, number, data)

            decoding = [asyncio.ensure_future(decoded(i, data)) for i, data in enumerate(pictures)]
            try:
                pixels = np.stack(await asyncio.gather(*decoding))
            finally:
                for task in decoding:
                    task.cancel()
            return await self._batched("image", pixels, "picture")

    def _pixels(self, number: int, data: bytes) -> np.ndarray:
        try:
            return self.model.pixels(data, self.limits.pixels)
        except BadSample as error:
            raise RequestRefused(422, f"picture {number} (from 0) cannot be read: {error.reason}") from error

    async def _text_rows(self, texts: list[str], what: str) -> tuple[np.ndarray, list[int], list[int]]:
        """Unit rows (n, width), which texts were cut, and of which the model knows no word."""
        with self.gates["text"].admit(len(texts)):
            tokens, cut, unknown = await self._tokens(texts)
            return await self._batched("text", tokens, what), cut, unknown

    async def _tokens(self, texts: list[str]) -> tuple[np.ndarray, list[int], list[int]]:
        """As the model's, a few texts at a time: long words take long, and who is late must not keep a thread."""
        found: list[np.ndarray] = []
        cut: list[int] = []
        unknown: list[int] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            rows, long, strange = await self._pooled(self.model.tokens, texts[start : start + _TEXTS_AT_ONCE])
            found.append(rows)
            cut += [start + i for i in long]
            unknown += [start + i for i in strange]
        return np.concatenate(found), cut, unknown

    async def _batched(self, tower: str, rows: np.ndarray, what: str) -> np.ndarray:
        found = await asyncio.wrap_future(self._batchers[tower].submit(rows))
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(bad):
            raise RequestRefused(422, f"the model gives no finite embedding for {what} {bad[0]} (from 0)")
        return found


def _answer(content: bytes) -> Response:
    return Response(content, media_type="application/json", headers=_HIDDEN)


def _sentence(status: int, text: str, again: int | None = None) -> Response:
    headers = _HIDDEN if again is None else {**_HIDDEN, "Retry-After": str(again)}
    content = json.dumps({"error": text}).encode()
    return Response(content, status_code=status, media_type="application/json", headers=headers)


async def _drain(request: Request) -> None:
    """Read on for a moment before a refusal: closing on bytes that nobody read would take the answer back."""
    if "expect" in request.headers:
        return
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while (await request.receive()).get("more_body", False):
                pass


def _embeddings(rows: np.ndarray, form: str, notes: dict[str, list[int]]) -> bytes:
    """The JSON of unit rows: eight decimals, or their float32 in base64."""
    found: Any = base64.b64encode(rows.astype("<f4").tobytes()).decode()
    if form == "numbers":
        found = rows.astype(np.float64).round(8).tolist()
    return json.dumps({"embeddings": found, "rows": len(rows), "width": rows.shape[1], **notes}).encode()


def _ranking(cosines: np.ndarray, scale: float, labels: Sequence[str], top: int) -> bytes:
    """The JSON of the `top` labels of each picture, with cosines (n, C) and the softmax of `scale` times them."""
    logits = scale * cosines.astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    found = [
        [
            {"label": labels[j], "probability": round(float(shares[i, j]), 8), "cosine": round(float(cosines[i, j]), 8)}
            for j in row
        ]
        for i, row in enumerate(order.tolist())
    ]
    return json.dumps({"classes": found}).encode()
