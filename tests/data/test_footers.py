"""Damaged footers of Parquet files: the same rows, or one sentence; pyarrow itself ends the process at some of them.

Each file is spoiled one bit at a time and read in one child, so that an end of the process is seen.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdistill.data.formats.parquet_footer import row_groups
from tests.conftest import REPOSITORY

CHILD = """
import faulthandler, struct, sys, warnings
from pathlib import Path
faulthandler.disable()
from clipdistill.errors import InputError
from clipdistill.data.problems import BadSample

def pairs(path):
    from clipdistill.data.open import open_pairs
    source = open_pairs(str(path))
    found = {}
    for i in range(len(source)):
        try:
            found[source.key(i)] = (source.captions(i), source.image_bytes(i))
        except BadSample as error:
            found[source.key(i)] = (source.captions(i), None)
    return found, source.problems.counts

def plain(path):
    from clipdistill.cache.plain import PlainEmbeddings
    found = PlainEmbeddings(path)
    rows = {key: (found.image[i].tolist(), found.text[i].tolist()) for i, key in enumerate(found.keys)}
    return {**rows, "scale": found.logit_scale}, None

def added(path):
    from clipdistill.cache.synthetic import read_synthetic
    return read_synthetic(path), None

def boxes(path):
    from clipdistill.regions.box_file import BoxFile
    return {key: repr(row) for key, row in BoxFile(path)._rows.items()}, None

def vectors(path):
    from clipdistill.vectors.files import read_embeddings
    rows, keys = read_embeddings(path)
    return {entry["key"]: (row.tolist(), entry) for row, entry in zip(rows, keys, strict=True)}, None

path, read, every = Path(sys.argv[1]), globals()[sys.argv[2]], int(sys.argv[3])
whole = path.read_bytes()
wanted, others = read(path)
start = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
flips = [(place, bit) for place in range(start, len(whole)) for bit in range(8)][::every]
for place, bit in flips:
    spoiled = bytearray(whole)
    spoiled[place] ^= 1 << bit
    path.write_bytes(spoiled)
    print(place, bit, end=" ", flush=True)
    try:
        found, counts = read(path)
    except InputError as error:
        print("refused", "" if "\\n" not in str(error) else "TWO LINES")
        continue
    if found == wanted and counts == others:
        print("the same")
    elif others is not None and (len(found) == len(wanted) or counts != others) and all(
        key in wanted and row[0] == wanted[key][0] and row[1] in (None, wanted[key][1]) for key, row in found.items()
    ):
        print("some are bad samples")
    else:
        print("OTHER", str(found)[:200])
print("end")
"""


def written(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


FILES = {
    "pairs in groups": ("pairs", {"image": [{"bytes": bytes([65 + k]) * 3, "path": None} for k in range(4)],
                                  "caption": [["one", "two"], ["three"], ["four"], ["five"]]}, {"row_group_size": 2}),
    "pairs": ("pairs", {"jpg": [b"one", None, b"two"], "txt": ["a", "b", "c"]}, {"compression": "none"}),
    "plain": ("plain", {"key": ["a", "b"], "image": [[1.0, 2.0], [3.0, 4.0]], "text": [[1.0, 2.0], [3.0, 4.0]]}, {}),
    "added": ("added", {"key": ["a", "b"], "captions": [["one", "two"], ["three"]]}, {}),
    "boxes": ("boxes", {"key": ["a", "b"], "boxes": [[[0.0, 0.0, 2.0, 2.0]], [[1.0, 1.0, 3.0, 3.0]]]}, {}),
    "vectors": ("vectors", {"key": ["a", "b"], "embedding": [[1.0, 0.0], [0.0, 1.0]]}, {}),
}  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FILES)
def test_a_flipped_bit_of_a_footer_gives_the_same_rows_or_one_sentence(kind: str, every: int, tmp_path: Path) -> None:
    reader, columns, options = FILES[kind]
    path = written(tmp_path / "data.parquet", columns, **options)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(path), reader, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-500:])
    assert lines[-1] == "end"
    assert [line for line in lines if "OTHER" in line or "TWO LINES" in line] == []
    assert any("refused" in line for line in lines)


def test_a_footer_says_rows_and_nulls(tmp_path: Path) -> None:
    columns = {"image": [{"bytes": b"x", "path": None}, None, {"bytes": None, "path": "p"}], "n": [1.5, None, 2.5]}
    path = written(tmp_path / "data.parquet", columns, row_group_size=2)
    assert row_groups(path, {"image.bytes"}) == [(2, [1]), (1, [1])]
    assert row_groups(path, {"image.path", "n"}) == [(2, [2, 1]), (1, [0, 0])]
    assert row_groups(written(path, columns, write_statistics=False), {"n"}) == [(3, [None])]
    assert row_groups(path, {"nothing"}) == [(3, [])]


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"x" * 40, b"\x19\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x19\xf7\xff\x01"]
)
def test_what_is_no_footer_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content + struct.pack("<I", len(content)) + b"PAR1")
    assert row_groups(tmp_path / "x", {"image"}) == []


def test_bytes_of_any_kind_end(tmp_path: Path) -> None:
    """Deep nesting, lists of any length, numbers of any size."""
    for content in (
        b"\x1c" * 5000,
        b"\x19" * 5000,
        b"\x15" + b"\xff" * 5000,
        b"\x18" + b"\xff" * 9 + b"\x01" + b"x" * 99,
    ):
        (tmp_path / "x").write_bytes(content + struct.pack("<I", len(content)) + b"PAR1")
        assert row_groups(tmp_path / "x", {"image"}) == []
