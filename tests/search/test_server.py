"""The page's server gives away what it should and nothing else."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from clipdistill.errors import InputError
from clipdistill.search.collection import Collection
from clipdistill.search.server import LARGEST_UPLOAD, SearchServer
from tests.search.conftest import HOSTILE


@pytest.fixture(scope="module")
def server(collection: Collection) -> Iterator[SearchServer]:
    with SearchServer(collection) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: SearchServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, data


def test_the_page_is_local_and_locked_down(server: SearchServer) -> None:
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"
    status, headers, data = ask(server, "/?q=a+red+circle")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'; script-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    page = data.decode()
    assert page.count('class="hit') - page.count('class="hits') == 20
    assert "style=" not in page
    assert "onerror=" not in page.replace("onerror=&#34;", "")
    for other in ("http:", "https:", "//"):
        assert other not in page.replace("<!doctype html>", "")


def test_hostile_names_and_queries_are_escaped(server: SearchServer) -> None:
    _, _, data = ask(server, "/?q=%3Cscript%3Ealert(1)%3C/script%3E%22onfocus=x&top=9")
    assert b"<script>alert" not in data
    assert b'value="&lt;script&gt;alert(1)&lt;/script&gt;&#34;onfocus=x"' in data
    number = server.collection.paths.index(HOSTILE)
    _, _, data = ask(server, f"/?like={number}")
    assert b"<img src=x" not in data
    assert b"&lt;img src=x onerror=" in data


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST:{port}", 200),
        ("[::1]:{port}", 200),
        ("127.0.0.1", 403),
        ("127.0.0.1:1", 403),
        ("evil.example:{port}", 403),
        ("evil.example", 403),
        ("192.168.1.2:{port}", 403),
        ("127.0.0.1.evil.example:{port}", 403),
        ("[::1:{port}", 403),
        ("", 403),
    ],
)
def test_only_this_machines_own_names_are_answered(server: SearchServer, host: str, status: int) -> None:
    assert ask(server, "/style.css", Host=host.format(port=server.server_address[1]))[0] == status


def test_pictures_are_asked_for_by_number_only_and_lose_their_metadata(server: SearchServer) -> None:
    number = server.collection.paths.index("scene-00.png")
    status, headers, data = ask(server, f"/thumb/{number}")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(data)).size == (72, 72)
    assert ask(server, f"/image/{number}", "HEAD")[2] == b""
    bad = ["/thumb/21", "/thumb/-1", "/thumb/x", "/thumb/", "/thumb/0/1", "/thumb/scene-00.png", "/scene-00.png"]
    bad += [
        "/thumb/../../etc/passwd",
        "/image/%2e%2e/secret",
        "/server.py",
        "/page.html.j2",
        "//etc/passwd",
        "/query/0",
    ]
    bad += ["/thumb/99999999999999999999", "/image/%D9%A1"]
    for path in bad:
        assert ask(server, path)[0] == 404, path


def test_a_photographs_place_does_not_leave(server: SearchServer) -> None:
    from clipdistill.search.server import shrunk

    picture = Image.new("RGB", (3000, 40), "red")
    exif = picture.getexif()
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 0.0)}
    exif[0x010F] = "SecretCamera"
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif, comment=b"SecretComment")
    small = shrunk(out.getvalue(), 384)
    assert b"Secret" not in small
    assert not dict(Image.open(io.BytesIO(small)).getexif())
    assert max(Image.open(io.BytesIO(small)).size) == 384


def test_a_picture_can_be_given(server: SearchServer, collection: Collection) -> None:
    data = (collection.folder / "scene-01.png").read_bytes()
    origin = server.url.rstrip("/")
    status, _, answer = ask(server, "/picture", "POST", data, Origin=origin)
    assert status == 200
    name = json.loads(answer)["picture"]
    page = ask(server, f"/?picture={name}")[2].decode()
    number = collection.paths.index("scene-01.png")
    assert f'data-number="{number}"' in page
    assert ask(server, f"/query/{name}")[1]["content-type"] == "image/jpeg"
    assert ask(server, "/picture", "POST", data, Origin="http://evil.example")[0] == 403
    assert ask(server, "/picture", "POST", data, Origin="null")[0] == 403
    assert ask(server, "/picture", "POST", b"no picture")[0] == 400
    assert ask(server, "/picture", "POST", b"", Content_Length=str(LARGEST_UPLOAD + 1))[0] == 413
    assert ask(server, "/other", "POST", b"")[0] == 404
    assert ask(server, "/", "DELETE")[0] == 405
    for _ in range(20):
        server.keep_query(data)
    assert len(server.queries) == 16


def test_strange_questions_get_the_first_page(server: SearchServer) -> None:
    for query in ("", "?like=999", "?like=x", "?picture=nothing", "?q=%20", "?like=-1"):
        status, _, data = ask(server, f"/{query}")
        assert status == 200
        assert b"start from one of these" in data
    assert ask(server, "/?q=" + "x" * 5000)[0] == ask(server, "/?q=%ff")[0] == 200


def test_a_photograph_that_is_gone_is_said_to_be_gone(
    server: SearchServer, collection: Collection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(collection, "folder", tmp_path)
    assert ask(server, "/image/3")[0] == 404
    status, _, data = ask(server, "/?like=3")
    assert status == 200
    assert b"can no longer be read: missing image file" in data


def test_beyond_this_machine_the_page_has_a_secret_path(collection: Collection) -> None:
    with SearchServer(collection, "0.0.0.0") as server:
        assert len(server.prefix) > 20
        port = server.server_address[1]
        assert server.allows(f"192.168.1.2:{port}")
        assert not server.allows(f"evil.example:{port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        assert ask(server, "/")[0] == ask(server, "/thumb/0")[0] == 404
        assert ask(server, server.prefix)[0] == ask(server, f"{server.prefix}thumb/0")[0] == 200
        server.shutdown()


def test_a_port_that_is_taken_is_named(server: SearchServer, collection: Collection) -> None:
    with pytest.raises(InputError, match="cannot listen on"):
        SearchServer(collection, port=server.server_address[1])
    with pytest.raises(InputError, match="cannot listen on"):
        SearchServer(collection, host="no.such.host.invalid")
