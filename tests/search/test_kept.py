"""An index of version 0.1 is searched and updated; whatever is damaged is said in one sentence and made again.

tests/kept/search was made by two updates with the stand-in of conftest; vectors.json is what the index then held.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from clipdistill.errors import InputError
from clipdistill.search.store import SearchIndex, open_index
from clipdistill.search.update import update
from tests.search.conftest import StandIn, draw

KEPT = Path(__file__).parents[1] / "kept" / "search"


def opened(folder: Path) -> SearchIndex:
    return open_index(folder / "index", dict(StandIn.description))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of the kept photographs and their index."""
    shutil.copytree(KEPT, tmp_path / "kept")
    return tmp_path / "kept"


def require_kept_vectors(index: SearchIndex) -> None:
    wanted = json.loads((KEPT / "vectors.json").read_text())
    assert sorted(index.entries) == sorted(wanted)
    for path, vector in wanted.items():
        np.testing.assert_array_equal(index.vector(index.entries[path].row), np.array(vector, dtype=np.float32))


def test_an_old_index_is_searched_as_it_is(kept: Path) -> None:
    index = opened(kept)
    assert index.notices == []
    assert index.old
    require_kept_vectors(index)
    assert index.bad["broken.jpg"][2].startswith("truncated image")
    assert index.cost.files == 6


def test_an_old_index_is_updated_without_encoding_again(kept: Path) -> None:
    done = update(opened(kept), kept / "photographs", model := StandIn())
    assert (model.encoded, done.photographs, done.removed) == (0, 5, 0)
    index = opened(kept)
    assert not index.old
    require_kept_vectors(index)
    names = sorted(path.name for path in index.folder.iterdir() if path.suffix != ".lock" and path.name != "lock")
    assert names[0] == "index.json"
    assert all(name.endswith(".safetensors") for name in names[1:])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Six photographs and an index of two parts, with a name that is no UTF-8 and a file that cannot be read."""
    folder = tmp_path / "photographs"
    paths = draw(folder, 6)
    (folder / "caf\udce9.png").write_bytes(paths[0].read_bytes())
    (folder / "bad\udcff.png").write_bytes(b"nothing")
    paths[1].rename(tmp_path / "later.png")
    update(opened(tmp_path), folder, StandIn())
    (tmp_path / "later.png").rename(paths[1])
    update(opened(tmp_path), folder, StandIn())
    return tmp_path


def state(folder: Path) -> dict[str, list[float]]:
    index = opened(folder)
    return {path: index.vector(entry.row).tolist() for path, entry in index.entries.items()}


CONTENTS = [b"", bytes(400), b"[]", b"null", b'"text"', b"\xff\xfe", b"{", b'{"format": 2}', b"[" * 5000, b"{}" * 9]


@pytest.mark.parametrize("file", ["index.json", "part-00000001.safetensors", "part-00000002.safetensors"])
@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:20]))
def test_a_file_of_something_else_is_noted_and_made_again(made: Path, file: str, content: bytes) -> None:
    wanted = state(made)
    (path,) = (made / "index").glob(f"*/{file}")
    path.write_bytes(content)
    index = opened(made)
    assert index.notices
    assert all("\n" not in notice and str(path) in notice for notice in index.notices)
    assert len(index.entries) < len(wanted)
    update(index, made / "photographs", StandIn())
    assert opened(made).notices == []
    assert state(made) == wanted


def test_every_flipped_bit_and_every_cut_is_found(made: Path) -> None:
    wanted = state(made)
    generator, noted = np.random.default_rng(0), 0
    for path in sorted((made / "index").glob("*/*.*")):
        whole = path.read_bytes()
        for place in generator.choice(len(whole), 100, replace=False).tolist():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            try:
                found = opened(made)
            except InputError as error:  # the number of the format, or the model's fingerprint
                assert "delete it" in str(error)  # noqa: PT017
                continue
            noted += bool(found.notices)
            assert found.notices or state(made) == wanted
        for length in generator.choice(len(whole) - 2, 30, replace=False).tolist():
            path.write_bytes(whole[:length])
            assert opened(made).notices
        path.write_bytes(whole)
    assert noted > 240
    assert state(made) == wanted


OLD_CHANGES: list[dict[str, object]] = [
    {"parts": 3}, {"parts": ["part-x"]}, {"parts": [None]}, {"parts": ["../part-00000001"]}, {"dropped": []},
    {"dropped": {"part-00000001": 5}}, {"dropped": {"part-00000001": ["x"]}}, {"bad": 7}, {"bad": [["a"]]},
    {"bad": [["../a", 1, 1, "x"]]}, {"cost": None}, {"cost": {}}, {"next": "many"}, {"next": None}, {"model": []},
    {"format": "2"}, {"format": None}, {"format": 0},
]  # fmt: skip


@pytest.mark.parametrize("change", OLD_CHANGES, ids=str)
def test_an_index_that_says_something_else_is_noted_and_made_again(kept: Path, change: dict[str, object]) -> None:
    (path,) = kept.glob("index/*/index.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    index = opened(kept)
    assert len(index.notices) >= 1
    assert all("\n" not in notice for notice in index.notices)
    update(index, kept / "photographs", StandIn())
    assert opened(kept).notices == []
    require_kept_vectors(opened(kept))


@pytest.mark.parametrize("name", ["part-00000001.npy", "part-00000002.json"])
def test_a_damaged_part_of_an_old_index_is_made_again(kept: Path, name: str) -> None:
    (path,) = kept.glob(f"index/*/{name}")
    for content in (None, *CONTENTS):
        shutil.rmtree(kept)
        shutil.copytree(KEPT, kept)
        path.unlink() if content is None else path.write_bytes(content)
        index = opened(kept)
        assert len(index.notices) == 1
        update(index, kept / "photographs", StandIn())
        require_kept_vectors(opened(kept))


def test_an_index_that_cannot_be_read_is_not_made_again(made: Path) -> None:
    (path,) = (made / "index").glob("*/index.json")
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        opened(made)
