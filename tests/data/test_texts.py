"""Texts without pictures: lines, parallel sentences, and what is none of these."""

from __future__ import annotations

import pytest

from clipdistill.data.open import open_training
from clipdistill.data.pairs import DataConfig
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError


def opened(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_training(DataConfig(path=str(path)))


def test_one_text_a_line(tmp_path):
    source = opened(tmp_path / "t.txt", "a red circle\r\n\r\ntwo squares\n")
    assert [(source.key(i), source.captions(i)) for i in range(len(source))] == [
        ("line 1", ("a red circle",)),
        ("line 3", ("two squares",)),
    ]
    assert (source.captioned, source.pictured, source.parallel) == (True, False, False)
    with pytest.raises(BadSample, match="without a picture"):
        source.image(0)


def test_parallel_sentences_in_columns(tmp_path):
    source = opened(tmp_path / "t.tsv", "a cat\teine Katze\tun chat\n\tein Hund\na dog\t\tun chien\n")
    assert [source.captions(i) for i in range(len(source))] == [
        ("a cat", "eine Katze", "un chat"),
        ("a dog", "un chien"),
    ]
    assert source.parallel
    assert source.problems.rows == [
        ("line 2", "translation without its sentence"),
        ("line 3", "missing translation"),
    ]
    assert source.problems.dropped == 1


def test_lines_with_other_numbers_of_cells_are_counted(tmp_path):
    source = opened(tmp_path / "t.tsv", "a cat\teine Katze\nred\tor\trot\na dog\na cow\teine Kuh\n")
    assert [source.key(i) for i in range(len(source))] == ["line 1", "line 3", "line 4"]
    assert source.problems.rows == [
        ("line 2", "more cells than other lines: 3 for 2"),
        ("line 3", "missing translation"),
    ]
    assert source.problems.dropped == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_system_ends_them(end, tmp_path):
    source = opened(tmp_path / "t.tsv", end.join(["a\u2028cat\teine Katze", "a\x0cdog\tein Hund", ""]))
    assert [source.key(i) for i in range(len(source))] == ["line 1", "line 2"]
    assert source.captions(0)[1] == "eine Katze"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", "picture\ttext\na.jpg\ta cat\n", "no column 'filepath'"),
        ("t.tsv", "filepat\ttitle\nx\ta cat\n", "did you mean 'filepat'"),
        ("t.md", "a cat\n", "no column 'filepath'"),
        ("t.txt", b"a cat\n\xff\xfe\n", r"not text in UTF-8 \(byte 6\)"),
    ],
)
def test_what_is_no_file_of_texts(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        opened(tmp_path / name, content)


def test_texts_in_a_mixture_have_a_set_of_their_own(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    (tmp_path / "b.tsv").write_text("a cat\teine Katze\n")
    source = open_training(DataConfig(sets=({"path": str(tmp_path / "a.txt")}, {"path": str(tmp_path / "b.tsv")})))
    assert [source.part(i).parallel for i in range(3)] == [False, False, True]
    assert (source.pictured, source.uneven) == (False, False)
