"""Data on servers of this machine, and the same data in a folder."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.data.helpers import encoded, sample_members, write_tar
from tests.remote.servers import WebServer, az_server, fill_bucket, gs_server, s3_server


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Nothing is remembered from other tests; failures come quickly."""
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "indexes"))
    monkeypatch.delenv("CLIPDISTILL_LOCAL_CACHE", raising=False)
    monkeypatch.delenv("CLIPDISTILL_LOCAL_CACHE_SIZE", raising=False)
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "0.5")
    monkeypatch.setattr("clipdistill.remote.retry._FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Three tars of eight pairs each."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number:05d}.tar", [m for k in range(8) for m in sample_members(8 * number + k)])
    return folder


@pytest.fixture(scope="session")
def everything(tmp_path_factory, shards) -> Path:
    """A folder with one set of every format."""
    import json

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    top = tmp_path_factory.mktemp("formats")
    (top / "shards").mkdir()
    for tar in shards.iterdir():
        (top / "shards" / tar.name).write_bytes(tar.read_bytes())
    images = [f"images/{k:03d} é.jpg" if k % 3 == 0 else f"images/{k:03d}.jpg" for k in range(12)]
    (top / "images").mkdir()
    for k, name in enumerate(images):
        (top / name).write_bytes(encoded(k))
    (top / "pairs.csv").write_text("filepath,title\n" + "".join(f"{n},caption {k}\n" for k, n in enumerate(images)))
    (top / "pairs.tsv").write_text("filepath\ttitle\n" + "".join(f"{n}\tcaption {k}\n" for k, n in enumerate(images)))
    karpathy = [
        {"filename": name, "split": "train" if k % 2 else "val", "sentences": [{"raw": f"caption {k}"}]}
        for k, name in enumerate(images)
    ]
    (top / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    coco = {
        "images": [{"id": k, "file_name": name} for k, name in enumerate(images)],
        "annotations": [{"image_id": k, "caption": f"caption {k}"} for k in range(len(images))],
    }
    (top / "coco.json").write_text(json.dumps(coco))
    (top / "parquet").mkdir()
    for part in range(2):
        table = {"image": [encoded(k) for k in range(6)], "caption": [f"caption {part} {k}" for k in range(6)]}
        pq.write_table(pa.table(table), top / "parquet" / f"{part}.parquet", row_group_size=2)
    paths = {"filepath": images, "title": [f"caption {k}" for k in range(len(images))]}
    pq.write_table(pa.table(paths), top / "paths.parquet")
    folder = top / "folder" / "inner"
    folder.mkdir(parents=True)
    for k in range(6):
        (folder / f"{k}.jpg").write_bytes(encoded(k))
        (folder / f"{k}.txt").write_text(f"caption {k}\nanother {k}\n")
    for label in ("cat", "dog"):
        (top / "classes" / label).mkdir(parents=True)
        for k in range(3):
            (top / "classes" / label / f"{k}.jpg").write_bytes(encoded(k))
    np.savez(
        top / "arrays.npz",
        images=np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3),
        labels=np.array([0, 1, 0, 1]),
        classnames=np.array(["cat", "dog"]),
    )
    labelled = [m for k in range(5) for m in ((f"{k}.jpg", encoded(k)), (f"{k}.cls", str(k % 2).encode()))]
    (top / "labelled").mkdir()
    write_tar(top / "labelled" / "0.tar", labelled)
    (top / "labelled" / "classes.txt").write_text("cat\ndog\n")
    return top


PAIRS = (
    *("shards", "shards/{00000..00002}.tar", "shards/00001.tar", "pairs.csv", "pairs.tsv", "karpathy.json:train"),
    *("coco.json", "parquet", "parquet/0.parquet", "paths.parquet", "folder"),
)
LABELLED = ("classes", "arrays.npz", "labelled/0.tar", "labelled")


@pytest.fixture
def web():
    """A web server without anything on it."""
    with WebServer() as server:
        yield server


@pytest.fixture(scope="session")
def s3(everything):
    """An S3 server with all formats in the bucket `pairs`."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with s3_server() as url:
        fill_bucket(everything)
        yield url


@pytest.fixture(scope="session")
def gs(everything):
    """A server that speaks Google's protocol with all formats in the bucket `pairs`."""
    if not all(map(find_spec, ("gcsfs", "gcp_storage_emulator"))):
        pytest.skip("needs gcsfs and gcp-storage-emulator")
    with gs_server(everything):
        yield


@pytest.fixture(scope="session")
def az(everything):
    """A server that speaks Azure's protocol with all formats in the container `pairs`."""
    pytest.importorskip("adlfs")
    modules = Path(os.environ.get("CLIPDISTILL_NODE_MODULES", REPOSITORY / "node_modules"))
    if shutil.which("node") is None or not (modules / ".bin" / "azurite-blob").exists():
        pytest.skip("needs Node and  npm install azurite")
    with az_server(modules / ".bin" / "azurite-blob", everything):
        yield


@pytest.fixture(scope="session")
def memory(everything) -> str:
    """All formats in fsspec's memory."""
    import fsspec

    store = fsspec.filesystem("memory")
    for path in everything.rglob("*"):
        if path.is_file():
            store.pipe(f"/formats/{path.relative_to(everything).as_posix()}", path.read_bytes())
    return "memory://formats"
