"""Caches of embeddings, plain files of embeddings and added captions, damaged: what is read is right, or refused."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clipdistill.cache.plain import PlainEmbeddings
from clipdistill.cache.store import CacheStore
from clipdistill.cache.synthetic import read_synthetic
from clipdistill.data.captions import clean
from tests.fuzz.mutate import mangle_json
from tests.fuzz.targets import Target, require

KEPT = Path(__file__).parent.parent / "kept" / "cache-int8"
_SAMPLES = 3


def _read(folder: Path) -> list[torch.Tensor]:
    store = CacheStore(folder)
    store.require_complete()
    store.require_fields()
    store.verify_blocks()
    indices = list(range(_SAMPLES))
    views = [store.view(index, 1) for index in indices]
    image, text = store.read(0, indices, [0] * _SAMPLES, [1] * _SAMPLES)
    return [image, text, torch.tensor([view.box or (-1,) * 4 for view in views])]


@cache
def _kept() -> list[torch.Tensor]:
    return _read(KEPT)


def _run_cache(name: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        shutil.copytree(KEPT, folder / "cache")
        (folder / "cache" / name).write_bytes(data)
        found = _read(folder / "cache")
        require(all(map(torch.equal, found, _kept())), f"a cache with a changed {name} gives other rows")

    return run


def _run_plain(suffix: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        path = folder / f"vectors{suffix}"
        path.write_bytes(data)
        table = PlainEmbeddings(path)
        image, text = table.read(0, [0], [0], [0])
        require(image.shape == text.shape == (1, *table.dims), "rows have the width that is stated")
        require(bool(image.isfinite().all() and text.isfinite().all()), "a row that is not finite was taken")
        require(
            0 < table.logit_scale < float("inf") and len(table.fingerprint()) == 64, "a scale that is none was taken"
        )

    return run


def _run_added(suffix: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, folder: Path) -> None:
        path = folder / f"added{suffix}"
        path.write_bytes(data)
        for captions in read_synthetic(path).values():
            require(bool(captions) and all(clean(text)[0] == text for text in captions), "a caption that is not clean")

    return run


def _plain_files() -> tuple[bytes, bytes]:
    rows = np.eye(3, 4, dtype=np.float32) + 0.1
    npz, parquet = io.BytesIO(), io.BytesIO()
    np.savez(npz, keys=np.array(["a", "b", "c"]), image=rows, text=rows, logit_scale=20.0, captions=np.ones(3, int))
    table = pa.table({"key": ["a", "b", "c"], "image": rows.tolist(), "text": [[row] for row in rows.tolist()]})
    pq.write_table(table.replace_schema_metadata({"logit_scale": "20"}), parquet)
    return npz.getvalue(), parquet.getvalue()


def cache_targets() -> list[Target]:
    """All of them."""
    npz, parquet = _plain_files()
    added = [
        b'{"a": ["one", "two"], "b": ["three"]}',
        b'{"key": "a", "captions": ["x"]}\n{"key": "b", "caption": "y"}\n',
    ]
    (samples,) = KEPT.glob("samples-*.arrow")
    files = {
        "cache-manifest": "manifest.json", "cache-table": samples.name, "cache-block": "teacher-0/000000.safetensors",
        "cache-views": "views/000000.safetensors",
    }  # fmt: skip
    found = [
        Target(name, [(KEPT / path).read_bytes()], _run_cache(path), (b"null", b"[]", b"-1", b"1e999", b"\0\0\0\0"),
               structured=(mangle_json,) if path.endswith(".json") else (), weight=4)
        for name, path in files.items()
    ]  # fmt: skip
    found += [
        Target("plain-npz", [npz], _run_plain(".npz"), (b"PK\x01\x02", b"'|O'", b"'<f2'", b"(0,)"), weight=5),
        Target("plain-parquet", [parquet], _run_plain(".parquet"), (b"PAR1", b"nan", b"-20"), weight=5),
        Target("added-captions", added, _run_added(".json"), (b"null", b'"key"', b"\\ud800"), structured=(mangle_json,),
               weight=5),
    ]  # fmt: skip
    return found
