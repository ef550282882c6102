"""The search page gives away pictures of the indexed folder and nothing else, to this machine and nobody else."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdistill.cache.blocks import Block, write_block
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.runtime.files import read_json, write_json
from clipdistill.search import HIDDEN
from clipdistill.search.ask import open_collection
from clipdistill.search.collection import Collection
from clipdistill.search.photographs import scan
from clipdistill.search.server import SearchServer
from clipdistill.search.store import open_index
from clipdistill.search.update import update
from tests.browser import Browser, needs_chromium
from tests.data.helpers import encoded
from tests.search.conftest import StandIn as Colours
from tests.security.conftest import Fence

SET_TITLE = "document.title='owned'"
NAMES = [
    "plain.png",
    f"<script>{SET_TITLE}<script>.png",
    f"'><img src=x onerror={SET_TITLE}>.png",
    f'" onerror={SET_TITLE} x=".png',
    "..png",
    "%2e%2e%2fetc%2fpasswd.png",
    "..\\..\\secret.png",
    "line\nbreak\r\nSet-Cookie: a=b.png",
    "\u202egnp.evil.png",
    f"javascript:{SET_TITLE}.png",
]


class Model(Colours):
    """The stand-in of the search's tests, with words: their letters are colours."""

    def text(self, words: str) -> np.ndarray:
        colours = np.frombuffer((words.encode("utf-8", "replace") * 12)[:12], dtype=np.uint8).astype(np.float32) + 1
        return colours / np.linalg.norm(colours)

    def image(self, picture: Image.Image) -> np.ndarray:
        return self.images(self.pixels(picture)[None])[0]

    def cut(self, words: str) -> bool:
        return False

    def knows(self, words: str) -> bool:
        return True

    def warm_up(self) -> None:
        return

    class model:  # noqa: N801 - stands for the module's wrapper
        @staticmethod
        def parameter_counts() -> dict[str, int]:
            return {"total": 12}


@pytest.fixture
def folder(fence: Fence) -> Path:
    """Photographs with hostile names, and links out of the folder."""
    found = fence.inside / "photographs"
    found.mkdir()
    for number, name in enumerate(NAMES):
        (found / name).write_bytes(encoded(number, "PNG"))
    (fence.inside / "private.jpg").write_bytes(encoded(50))
    (found / "link.jpg").symlink_to(fence.inside / "private.jpg")
    (found / "inner.png").symlink_to("plain.png")
    (found / "up").symlink_to(fence.inside)
    (found / "notes.txt").write_text("a secret")
    return found


def opened(folder: Path, index: Path) -> Collection:
    model = Model()
    store = open_index(index, dict(model.description))
    update(store, folder, model)  # type: ignore[arg-type]
    return Collection(folder, [(model, store)])  # type: ignore[list-item]


@pytest.fixture
def server(folder: Path, fence: Fence) -> Iterator[SearchServer]:
    with SearchServer(opened(folder, fence.inside / "index")) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield made
        made.shutdown()


def raw(server: SearchServer, request: bytes) -> bytes:
    """The whole answer to a request written by hand (a client would tidy the path up)."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    return answer


def get(server: SearchServer, path: str, host: str | None = None) -> bytes:
    host = host or f"127.0.0.1:{server.server_address[1]}"
    return raw(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1"))


def test_it_listens_on_this_machine_only(server: SearchServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.getsockname()[0] == "127.0.0.1"
    for address in _addresses():
        if not address.startswith("127."):
            with socket.socket() as probe:
                probe.settimeout(2)
                assert probe.connect_ex((address, server.server_address[1])) != 0


def _addresses() -> list[str]:
    """This machine's addresses, as far as its own name leads to them."""
    try:
        return socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        return []


TRAVERSALS = [
    "/../private.jpg", "/../../etc/passwd", "/%2e%2e/private.jpg", "/%2e%2e%2fprivate.jpg", "/..%2fprivate.jpg",
    "/..%5cprivate.jpg", "/..\\private.jpg", "/%252e%252e%252fprivate.jpg", "/..%c0%afprivate.jpg",
    "/....//private.jpg", "/thumb/../private.jpg", "/thumb/..%2f..%2fprivate.jpg", "/image/%2e%2e%2fprivate.jpg",
    "/image/../../private.jpg", "/image//etc/passwd", "//etc/passwd", "/./././../private.jpg", "/image/0%00.jpg",
    "/image/0/../../private.jpg", "/image/0?/../../private.jpg%23", "/image/link.jpg", "/up/private.jpg",
    "/notes.txt", "/plain.png", "/image/plain.png", "file:///etc/passwd", "http://127.0.0.1/../private.jpg",
    "/image/-1", "/image/1e1", "/image/0x1", "/image/+1", "/image/\xb2", "/image/99999999999", "/query/../image/0",
    "/style.css/../server.py", "/server.py", "/..", "/~root/",
]  # fmt: skip


def test_no_path_leads_out(server: SearchServer, fence: Fence) -> None:
    private = {(fence.inside / "private.jpg").read_bytes()[-200:], b"root:", b"a secret"}
    reference = np.asarray(Image.open(fence.inside / "private.jpg").convert("RGB")).astype(int)
    for path in TRAVERSALS:
        answer = get(server, path)
        status = answer.split(b" ", 2)[1]
        if path == "/image/0?/../../private.jpg%23":
            assert status == b"200"  # image 0, whatever follows the question mark
        else:
            assert status in (b"400", b"404"), path
        assert not any(part in answer for part in private), path
    for number in range(len(server.collection)):
        data = get(server, f"/image/{number}").partition(b"\r\n\r\n")[2]
        shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert shown.shape != reference.shape or np.abs(shown - reference).mean() > 3


def test_links_out_of_the_folder_are_not_indexed_and_not_served(
    folder: Path, server: SearchServer, fence: Fence
) -> None:
    paths = {photograph.path for photograph in scan(folder)[0]}
    assert "link.jpg" not in paths
    assert ("link.jpg", "is a link that leads out of the folder") in scan(folder)[1]
    assert {"inner.png", "plain.png"} <= paths
    number = server.collection.paths.index("plain.png")
    (folder / "plain.png").unlink()  # swapped after it was indexed
    (folder / "plain.png").symlink_to(fence.inside / "private.jpg")
    for kind in ("thumb", "image"):
        assert get(server, f"/{kind}/{number}").split(b" ", 2)[1] == b"404"
    with pytest.raises(BadSample, match="leads out of the folder"):
        server.collection.ask_like(number)


@pytest.mark.parametrize("path", ["../private.jpg", "/etc/passwd", "a/../../private.jpg", "", "x\0.jpg", 3])
def test_an_index_names_files_of_its_folder_only(folder: Path, fence: Fence, path: object) -> None:
    index = fence.inside / "index"
    opened(folder, index)
    (part,) = index.rglob("part-*.safetensors")
    block = Block(part)
    listed = json.loads(block.arrays["files"].tobytes())
    listed[0][0] = path
    tensors = {"vectors": torch.from_numpy(block.arrays["vectors"].copy())}
    files = torch.frombuffer(bytearray(json.dumps(listed).encode()), dtype=torch.uint8)
    write_block(part, {**tensors, "files": files}, {"model": Model.fingerprint})
    store = open_index(index, dict(Model.description))
    assert not store.entries
    assert any("damaged" in notice for notice in store.notices)
    document = read_json(next(index.rglob("index.json")))
    document["parts"] = ["../../outside/part-00000001", "/part-0", "part-0/../../../outside/part-1"]
    write_json(next(index.rglob("index.json")), document, checked=True)
    assert not open_index(index, dict(Model.description)).entries


@pytest.mark.parametrize("place", [HIDDEN, f"{HIDDEN}/index", f"{HIDDEN}/{Model.fingerprint[:16]}"])
def test_an_index_is_not_written_through_a_link(
    folder: Path, fence: Fence, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(fence.outside / "folder")
    monkeypatch.setattr("clipdistill.search.encoder.SearchModel", lambda *_: Model())
    settings = {
        "model": "x", "teacher": None, "index": None, "folder": folder, "device": "cpu", "update": True, "quiet": True,
        "index_kind": "exact", "rehash": False, "batch_size": 8, "workers": 0, "engine": "torch",
    }  # fmt: skip
    with pytest.raises(InputError, match="is a link that leads out"):
        open_collection(**settings, out=sys.stdout)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "localhost.evil.example:{port}",
        "127.0.0.1:{port}@evil.example:{port}", "evil.example#127.0.0.1:{port}", "0.0.0.0:{port}", "192.168.0.1:{port}",
        "[::ffff:10.0.0.1]:{port}", "169.254.169.254:{port}", "localhost", "127.0.0.1:80", " ", "a b", "\xff",
    ],
)  # fmt: skip
def test_a_name_that_points_here_is_no_way_in(server: SearchServer, host: str) -> None:
    """DNS rebinding: a page on evil.example whose name now means 127.0.0.1 sends its own name as Host."""
    answer = get(server, "/", host.format(port=server.server_address[1]))
    assert answer.split(b" ", 2)[1] in (b"403", b"400"), host
    assert b"plain.png" not in answer


def test_requests_without_or_with_two_hosts(server: SearchServer) -> None:
    port = server.server_address[1]
    assert b" 403 " in raw(server, b"GET / HTTP/1.0\r\n\r\n").split(b"\r\n")[0]
    assert b" 403 " in raw(server, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").split(b"\r\n")[0]
    two = f"GET / HTTP/1.1\r\nHost: evil.example\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
    assert b" 403 " in raw(server, two.encode()).split(b"\r\n")[0]


def test_other_sites_can_neither_upload_nor_read(server: SearchServer) -> None:
    port, body = server.server_address[1], encoded(1)
    for origin in ("http://evil.example", "null", "https://127.0.0.1:1", f"http://localhost.evil:{port}"):
        request = (
            f"POST /picture HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: {origin}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        assert raw(server, request.encode() + body).split(b" ", 2)[1] == b"403"
    answer = get(server, "/").lower().partition(b"\r\n\r\n")[0]
    assert b"access-control-allow" not in answer
    assert b"cross-origin-resource-policy: same-origin" in answer
    assert b"x-frame-options: deny" in answer
    assert b"set-cookie" not in answer


@needs_chromium
def test_no_file_name_and_no_question_runs_in_a_browser(server: SearchServer, fence: Fence) -> None:
    questions = ["", "?like=1"]  # every name stands on the first page, and among the answers
    questions += [
        "?q=%3Cscript%3Edocument.title=%27owned%27%3C/script%3E",
        "?q=%22%20autofocus%20onfocus=alert(1)%20x=%22",
    ]
    with Browser(fence.inside / "profile") as browser:
        for question in questions:
            browser.open(server.url + question)
            browser.evaluate("document.querySelectorAll('a.picture').forEach(e => e.dispatchEvent(new Event('click')))")
            assert "owned" not in browser.evaluate("document.title").replace(SET_TITLE, "")
            assert browser.evaluate("document.scripts.length") == 1
            assert browser.evaluate("document.querySelectorAll('[onerror], [onfocus], [onload]').length") == 0
            origins = browser.evaluate("performance.getEntriesByType('resource').map(e => new URL(e.name).origin)")
            assert set(origins) <= {server.url.rstrip("/")}
        assert not [line for line in browser.console if "Content Security" in line]
    assert torch.device("cpu") == Model.device
