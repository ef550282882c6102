"""Services on free ports in this process, asked over real sockets."""

from __future__ import annotations

import base64
import http.client
import io
import json
from dataclasses import dataclass
from typing import Any

import pytest

from clipdistill.scenes.pairs import open_scenes
from clipdistill.serve.command import in_thread
from clipdistill.serve.limits import ServiceLimits
from tests.serve.bad_requests import form


@dataclass
class Client:
    """Asks a service; every request on a connection of its own."""

    service: Any
    host: str
    port: int

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """(status, headers, what the JSON says)."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        return (
            answer.status,
            answer.headers,
            json.loads(content) if "json" in answer.headers["content-type"] else content,
        )

    def post(self, path: str, asked: Any) -> tuple[int, Any, Any]:
        """The same with JSON as body."""
        return self.ask("POST", path, json.dumps(asked).encode(), Content_Type="application/json")

    def send(self, path: str, parts: list[tuple[str, str | None, bytes]]) -> tuple[int, Any, Any]:
        """The same with a form."""
        return self.ask("POST", path, form(parts), Content_Type="multipart/form-data; boundary=frontier")


def encoded(pictures: list[bytes]) -> list[str]:
    return [base64.b64encode(data).decode() for data in pictures]


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Twelve drawn scenes as PNG."""
    source, found = open_scenes("val", 12, 0), []
    for i in range(12):
        data = io.BytesIO()
        source.image(i).save(data, "PNG")
        found.append(data.getvalue())
    return found


@pytest.fixture(scope="session")
def client() -> Any:
    """The demo's teacher as a service, with small limits."""
    for package in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
        pytest.importorskip(package, reason="needs the extra 'serve'")
    limits = ServiceLimits(
        batch_size=4, wait_ms=2, queue=40, timeout=20, pictures=8, texts=64, megabytes=1, pixels=1_000_000
    )
    with in_thread("scenes-teacher", limits) as found:
        yield Client(*found)
