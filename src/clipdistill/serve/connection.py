"""uvicorn with limits of time and number: headers must arrive, answers must be taken, and connections are counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from clipdistill.runtime.signals import StopSignal
from clipdistill.serve.limits import CONNECTIONS, HEADER_SECONDS, WRITE_SECONDS


class BoundedConnection(H11Protocol):
    """One connection. uvicorn itself waits for headers, and for a client to read, as long as that takes."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._last_words(429, "busy: too many connections, come again", b"Retry-After: 1\r\n")
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # nonsense behind an answer that is on its way
            self.transport.abort()
            return
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(WRITE_SECONDS, self._abort_unread)

    def timeout_keep_alive_handler(self) -> None:
        self._abort_unread()
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
        else:
            self._last_words(400, "this is no valid HTTP request")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """A clock runs while headers, or what nobody asked for, are arriving; no trickle can move it."""
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._late)
        elif not waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._last_words(408, f"the headers took longer than {HEADER_SECONDS:g} s to arrive")

    def _last_words(self, status: int, text: str, more: bytes = b"") -> None:
        """An answer without a request, and the end."""
        if self.transport.is_closing():
            return
        body = json.dumps({"error": text}).encode()
        head = b"HTTP/1.1 %d \r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % (status, len(body))
        self.transport.write(head + more + b"Connection: close\r\n\r\n" + body)
        self.transport.close()
        self.loop.call_later(WRITE_SECONDS, self._abort_unread)

    def _abort_unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()


class StoppableServer(uvicorn.Server):
    """uvicorn's server, ended by StopSignal or by `should_exit`; the exit code of a graceful stop is 0."""

    stop: StopSignal | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: StopSignal has them."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn."""
        ends: Any = await super().on_tick(counter)
        return bool(ends) or (self.stop is not None and self.stop.received is not None)
