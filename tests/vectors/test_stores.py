"""Vectors in the stores that people have: LanceDB and DuckDB read them, and what they find is what `search` finds."""

from __future__ import annotations

import re

import numpy as np
import pytest

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.scenes.pairs import open_scenes
from clipdistill.vectors import job
from clipdistill.vectors.files import read_embeddings, require_suffix, write_embeddings
from tests.conftest import REPOSITORY

TEXTS = ["a red circle", "two blue squares", "a green star"]


@pytest.fixture
def photographs(tmp_path):
    """Twelve drawn scenes in a folder."""
    folder, source = tmp_path / "photographs", open_scenes("val", 12, 0)
    folder.mkdir()
    for i in range(12):
        source.image(i).save(folder / f"{i:02d}.png")
    return folder


def parts(width=4):
    """Three parts of 5, 0 and 4 rows."""
    rows = np.random.default_rng(0).standard_normal((9, width)).astype(np.float32)
    entries = [{"key": f"k{i}", "caption": i, "text": f"text {i} é"} for i in range(9)]
    return rows, entries, [(rows[:5], entries[:5]), (rows[:0], []), (rows[5:], entries[5:])]


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors", ".lance"])
def test_rows_come_back_in_order_also_where_a_part_has_none(suffix, tmp_path):
    if suffix == ".lance":
        pytest.importorskip("lancedb")
    rows, entries, written = parts()
    write_embeddings(tmp_path / f"x{suffix}", 9, 4, written, {"clipdistill.model": "abc"})
    found, keys = read_embeddings(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(found, rows)
    assert keys == entries
    assert {path.name for path in tmp_path.iterdir()} <= {f"x{suffix}", "x.jsonl"}


def test_a_table_of_lancedb_is_opened_by_its_name_knows_its_model_and_may_be_moved(tmp_path):
    lancedb = pytest.importorskip("lancedb")
    rows, _, written = parts()
    (tmp_path / "a").mkdir()
    write_embeddings(tmp_path / "a" / "photos.lance", 9, 4, written, {"clipdistill.model": "abc"})
    (tmp_path / "a").rename(tmp_path / "b")
    database = lancedb.connect(tmp_path / "b")
    table = database.open_table("photos")
    assert table.schema.metadata[b"clipdistill.model"] == b"abc"
    (best,) = table.search(rows[6], vector_column_name="embedding").distance_type("cosine").limit(1).to_list()
    assert (best["key"], best["_distance"]) == ("k6", pytest.approx(0, abs=1e-6))


def test_the_model_stands_in_the_parquet(tmp_path):
    import pyarrow.parquet as pq

    write_embeddings(tmp_path / "x.parquet", 9, 4, parts()[2], {"clipdistill.model": "abc"})
    assert pq.read_schema(tmp_path / "x.parquet").metadata[b"clipdistill.model"] == b"abc"


def test_bad_places_are_one_sentence(tmp_path, photographs, capsys):
    with pytest.raises(InputError, match=r"written as \.npy, \.parquet, \.safetensors, \.lance"):
        require_suffix(tmp_path / "x.csv")
    search = ["search", str(photographs), "--model", "scenes-teacher", "--vectors"]
    assert main([*search, str(tmp_path / "x.csv")]) == 2
    assert "end the name so" in capsys.readouterr().err
    assert main([*search, str(photographs / "x.npy")]) == 2  # it would make the folder a set of another kind
    assert "x.npy: lies in the folder of photographs: choose another place" in capsys.readouterr().err
    (tmp_path / "x.parquet").write_text("mine")
    assert main([*search, str(tmp_path / "x.parquet")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "x.parquet").read_text() == "mine"
    (tmp_path / "x.lance").mkdir()
    pytest.importorskip("lancedb")
    for path in (tmp_path / "none.lance", tmp_path / "x.lance"):
        with pytest.raises(InputError, match=r"no such table|holds no embeddings"):
            read_embeddings(path)
    with pytest.raises(InputError, match="letters, digits"):
        require_suffix(tmp_path / "my photos.lance")


def test_without_lancedb_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    with pytest.raises(InputError, match=r"clipdistill\[lancedb\]"):
        require_suffix(tmp_path / "x.lance")


def test_search_writes_its_vectors(photographs, tmp_path, capsys):
    search = ["search", str(photographs), "--model", "scenes-teacher", "--quiet", "--vectors"]
    assert main([*search, str(tmp_path / "v.parquet"), "--query", "a red circle", "--top", "3"]) == 0
    assert "v.parquet: 12 vectors" in capsys.readouterr().out
    rows, keys = read_embeddings(tmp_path / "v.parquet")
    assert [entry["key"] for entry in keys] == [f"{i:02d}.png" for i in range(12)]
    assert all(len(entry["sha256"]) == 64 for entry in keys)
    embedded = cd.embed_to_file("scenes-teacher", str(photographs), tmp_path / "e.npy", progress=False)
    np.testing.assert_allclose(rows, read_embeddings(embedded.path)[0], atol=1e-5)


@pytest.mark.slow
def test_lancedb_finds_what_search_finds_by_the_example_of_the_page(photographs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lancedb")
    report = cd.embed_to_file(
        "scenes-teacher", str(photographs), tmp_path / "vectors" / "photographs.lance", progress=False
    )
    assert report.rows == 12
    assert cd.embed_to_file("scenes-teacher", str(photographs), report.path, progress=False).known
    monkeypatch.chdir(tmp_path)
    cd.embed_to_file("scenes-teacher", texts=TEXTS, out="questions.parquet", progress=False)
    page = (REPOSITORY / "docs" / "search.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import lancedb.*?)```", page, re.DOTALL)
    exec(compile(code, "search.md", "exec"), {})
    found = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    hits = cd.search(photographs, TEXTS[0], model="scenes-teacher", top=5).answers[0].hits
    assert [key for _, key in found] == [hit.path for hit in hits]
    np.testing.assert_allclose([float(score) for score, _ in found], [hit.score for hit in hits], atol=6e-4)


@pytest.mark.slow
def test_duckdb_finds_what_search_finds(photographs, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    path = tmp_path / "v.parquet"
    assert main(["search", str(photographs), "--model", "scenes-teacher", "--quiet", "--vectors", str(path)]) == 0
    question = cd.embed_to_file("scenes-teacher", texts=TEXTS[:1], out=tmp_path / "q.parquet", progress=False).path
    found = duckdb.sql(f"""
        SELECT photos.key, array_cosine_similarity(photos.embedding::FLOAT[128], asked.embedding::FLOAT[128]) AS score
        FROM '{path}' AS photos, '{question}' AS asked ORDER BY score DESC LIMIT 5
    """).fetchall()
    hits = cd.search(photographs, TEXTS[0], model="scenes-teacher", top=5).answers[0].hits
    assert [key for key, _ in found] == [hit.path for hit in hits]


def test_a_kill_before_the_description_and_a_changed_table_are_noticed(photographs, tmp_path):
    pytest.importorskip("lancedb")
    out = tmp_path / "p.lance"
    whole = cd.embed_to_file("scenes-teacher", str(photographs), out, progress=False)
    (tmp_path / "p.lance.json").unlink()
    with pytest.raises(InputError, match="is there already, and not from clipdistill embed"):
        cd.embed_to_file("scenes-teacher", str(photographs), out, progress=False)
    parts = tmp_path / "p.lance.parts"
    parts.mkdir()
    (parts / job._ASSEMBLING).touch()  # what a kill between the table and its description leaves
    again = cd.embed_to_file("scenes-teacher", str(photographs), out, progress=False)
    assert (again.rows, again.known) == (whole.rows, False)
    next((out / "data").glob("*.lance")).write_bytes(b"changed")
    with pytest.raises(InputError, match="is not what"):
        cd.embed_to_file("scenes-teacher", str(photographs), out, progress=False)
