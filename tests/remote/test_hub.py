"""hf://: files of a data set, from a server of this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote, urlsplit

import pytest

from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError
from clipdistill.remote import store

pytest.importorskip("huggingface_hub")


class Hub(http.server.BaseHTTPRequestHandler):
    """One data set, me/set, with the files of `files`."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if file := re.match(r"/datasets/me/set/resolve/[^/]+/(.*)", path):
            self._file(self.files[file[1]])
        elif tree := re.match(r"/api/datasets/me/set/tree/[^/]+/?(.*)", path):
            inside = [self._entry(name) for name in sorted(self.files) if name.startswith(f"{tree[1]}/")]
            top = [] if tree[1] else [{"type": "directory", "path": "data", "oid": "0" * 40}]
            self._answer(200 if inside or top else 404, (inside or top) or {})
        elif path == "/api/datasets/me/set":
            self._answer(200, {"id": "me/set", "sha": "a" * 40})
        else:
            self._answer(404, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(200, [self._entry(name) for name in self.files])

    def _entry(self, name: str) -> dict[str, object]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _answer(self, status: int, values: object) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, content: bytes) -> None:
        wanted = self.headers.get("Range", f"bytes=0-{len(content) - 1}")
        self.asked.append(wanted)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        body = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(shards, monkeypatch):
    """The shards as a data set of the hub; gives the ranges that are asked for."""
    Hub.files = {f"data/{path.name}": path.read_bytes() for path in shards.iterdir()}
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, place = f"http://127.0.0.1:{server.server_address[1]}", "huggingface_hub.constants"
    monkeypatch.setattr(f"{place}.ENDPOINT", url)
    monkeypatch.setattr(f"{place}.HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "10")
    store._stores.clear()
    yield Hub.asked
    server.shutdown()
    store._stores.clear()


@pytest.mark.parametrize("name", ["data/{00000..00002}.tar", "data"])
def test_the_same_pairs_as_from_a_disk(name, hub, shards):
    near, far = open_pairs(str(shards)), open_pairs(f"hf://datasets/me/set/{name}")
    assert far.fingerprint() == near.fingerprint()
    hub.clear()
    assert far.image_bytes(9) == near.image_bytes(9)
    (wanted,) = hub
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    assert int(last) - int(first) + 1 == len(near.image_bytes(9))  # the image and no more


@pytest.mark.parametrize("name", ["datasets/me/set/none.tar", "datasets/you/none/x.tar"])
def test_what_is_not_there_is_one_sentence(name, hub):
    with pytest.raises(InputError, match="nothing of that name"):
        open_pairs(f"hf://{name}")
