"""CSV, TSV and Parquet: field.md E2 row 5, separators, splits, several captions an image, images inside the table."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from tests.conftest import shared_folder
from tests.data.helpers import encoded


def everything(source: PairSource) -> dict[str, tuple[str, ...]]:
    return {source.key(i): source.captions(i) for i in range(len(source))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        (tmp_path / name).write_bytes(encoded(number))
    return tmp_path


def table(folder: Path, text: str, name: str = "table.csv") -> str:
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(folder / name)


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
def test_the_separator_is_found(folder: Path, separator: str) -> None:
    text = "title_{s}filepath{s}title\nx{s}a.jpg{s}one\nx{s}b.jpg{s}two\nx{s}a.jpg{s}three\n".replace("{s}", separator)
    source = open_pairs(table(folder, text))
    assert everything(source) == {"a.jpg": ("one", "three"), "b.jpg": ("two",)}
    assert source.image_bytes(1) == encoded(1)


def test_quotes_commas_bom_and_line_ends(folder: Path) -> None:
    text = '\ufefffilepath,title\r\na.jpg,"one, ""quoted"""\r\n\r\nb.jpg,"two\nlines, and more"\r\n'
    assert everything(open_pairs(table(folder, text))) == {
        "a.jpg": ('one, "quoted"',),
        "b.jpg": ("two lines, and more",),
    }
    (folder / "wide.csv").write_bytes("filepath\ttitle\na.jpg\tüber\n".encode("utf-16"))
    assert everything(open_pairs(str(folder / "wide.csv"))) == {"a.jpg": ("über",)}


def test_other_columns_splits_and_roots(folder: Path) -> None:
    (folder / "tables").mkdir()
    path = table(folder / "tables", "file;set;split;text\na.jpg;1;train;one\nb.jpg;1;val;two\nc.jpg;1;val;three\n")
    config = DataConfig(path=path, image_column="file", caption_column="text")
    assert everything(open_pairs(config, split="val")) == {"b.jpg": ("two",), "c.jpg": ("three",)}
    assert list(everything(open_pairs(config, default_split="train"))) == ["a.jpg"]
    with pytest.raises(InputError, match=r"holds several splits: train \(1\), val \(2\)"):
        open_pairs(config)
    rooted = config.model_copy(update={"image_root": str(folder), "split": "all"})
    assert len(open_pairs(rooted)) == 3


def test_absolute_paths_and_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    absolute = table(folder / "elsewhere", f"filepath,title\n{folder / 'a.jpg'},one\n")
    assert open_pairs(absolute).image_bytes(0) == encoded(0)
    (folder / "deep" / "er" / "est").mkdir(parents=True)
    monkeypatch.chdir(folder)
    relative = table(folder / "deep" / "er" / "est", "filepath,title\nb.jpg,two\n")
    assert open_pairs(relative).image_bytes(0) == encoded(1)


BLANKS = "filepath,title\na.jpg,one\nb.jpg,\nb.jpg,nan\nc.jpg\na.jpg,NULL\nb.jpg,<NA>\nb.jpg,None\nc.jpg,   \n,lost\n"


def test_row_5_missing_captions_are_an_error_with_their_rows(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_pairs(table(folder, BLANKS))
    assert str(caught.value).endswith(
        "table.csv: 6 rows have no caption: line 3 ('b.jpg'), line 4 ('b.jpg'), line 5 ('c.jpg'), line 6 ('a.jpg'), "
        "line 7 ('b.jpg'), ...; fill them in, or leave them out with missing_captions=skip"
    )


def test_row_5_missing_captions_can_be_skipped(folder: Path) -> None:
    source = open_pairs(DataConfig(path=table(folder, BLANKS), missing_captions="skip"))
    assert everything(source) == {"a.jpg": ("one",)}
    assert source.problems.counts == {
        "missing caption": 6,
        "empty caption": 1,
        "row without image": 1,
        "image without caption": 2,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,title\na.jpg,one\n",
            r"no column 'filepath' \(did you mean 'file'\?\); it has: file, title; set image_co",
        ),
        ("filepath,words\na.jpg,one\n", r"no column 'title'; it has: filepath, words; set caption_column"),
        ("filepath,title\n", "no rows with an image"),
        ("filepath,title\nz.jpg,one\n", r"the images of 'table.csv' are not found \('z.jpg'"),
        (
            'filepath,title\na.jpg,"one\nb.jpg,two\nc.jpg,three\n',
            r"quotation mark on line 2 is never closed and swallows the rows up to line 4",
        ),
        ("plain words\nwithout columns\n", "no column 'filepath'"),
        (
            'filepath,title\na.jpg,"' + "x" * 200_000 + '"\n',
            r"no rows with an image \(1 over-long cell\)",
        ),
    ],
)
def test_tables_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_pairs(table(folder, text))


@pytest.mark.parametrize("header", ["image,caption", "file_name;text", "path\tcaptions", "img|title"])
def test_usual_columns_are_found(folder: Path, header: str) -> None:
    """Those of Kaggle's captions.txt of Flickr8k among them, as in Parquet files."""
    (separator,) = {",", ";", "\t", "|"} & set(header)
    text = f"{header}\na.jpg{separator}one\nb.jpg{separator}two\n"
    assert everything(open_pairs(table(folder, text))) == {"a.jpg": ("one",), "b.jpg": ("two",)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"image": "a.jpg", "caption": "one"}\n', "in no known format"),
        ("a.csv", b"filepath,title\na.jpg,o\0ne\n", "is no text, since it holds NUL bytes"),
        ("a.tsv", "filepath\ttitle\na.jpg\tone\n".encode("utf-16-le"), "is no text, since it holds NUL bytes"),
    ],
)
def test_what_is_no_table_says_why(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_pairs(str(folder / name))


def test_a_wrong_separator_is_refused(folder: Path) -> None:
    path = table(folder, "filepath\ttitle\na.jpg\tone\n")
    assert len(open_pairs(DataConfig(path=path, separator="\\t"))) == 1
    with pytest.raises(InputError, match="is not one character"):
        open_pairs(DataConfig(path=path, separator="::"))
    with pytest.raises(InputError, match="no column 'filepath'"):
        open_pairs(DataConfig(path=path, separator=","))


def test_missing_images_are_counted(folder: Path) -> None:
    source = open_pairs(table(folder, "filepath,title\na.jpg,one\ngone.jpg,two\n../out.jpg,three\n"))
    assert list(everything(source)) == ["a.jpg"]
    assert source.problems.counts == {"missing image file": 2}
    assert source.problems.dropped == 2


def test_the_shared_tables_hold_what_the_json_holds() -> None:
    folder = shared_folder("data/flickr8k")
    train = open_pairs(str(folder / "openclip_train.csv"))
    assert len(train) == 6000
    assert {len(train.captions(i)) for i in range(6000)} == {5}
    config = DataConfig(path=str(folder / "captions.csv"), image_column="filename", caption_column="caption")
    karpathy = str(folder / "dataset_flickr8k.json")
    assert open_pairs(config, split="val").fingerprint() == open_pairs(karpathy, split="val").fingerprint()
    assert [train.captions(i) for i in range(6000)] == [
        c for s in [open_pairs(karpathy, split="train")] for c in (s.captions(i) for i in range(6000))
    ]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.lists(st.text(st.sampled_from('ab,"\t\n\r .jpgé'), max_size=30), max_size=6))
def test_any_table_is_read_or_refused(folder: Path, noise: bytes, lines: list[str]) -> None:
    rows = "\n".join(["filepath,title", "a.jpg,good", *lines]).encode()
    for content in (rows, rows[: len(rows) // 2], b"filepath\ttitle\n" + noise, noise):
        (folder / "any.csv").write_bytes(content)
        try:
            source = open_pairs(DataConfig(path=str(folder / "any.csv"), missing_captions="skip"))
        except InputError as error:
            assert str(error)  # noqa: PT017 - either outcome is right
        else:
            assert all(captions and all(captions) for captions in everything(source).values())


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def test_parquet_with_paths(folder: Path) -> None:
    path = parquet(
        folder / "t.parquet",
        {"filepath": ["a.jpg", "b.jpg", "a.jpg", None], "title": ["one", "two", "three", "lost"], "n": [1, 2, 3, 4]},
    )
    source = open_pairs(path)
    assert everything(source) == {"a.jpg": ("one", "three"), "b.jpg": ("two",)}
    assert source.problems.counts == {"row without image": 1}
    listed = parquet(folder / "l.parquet", {"filepath": ["c.jpg"], "captions": [["x", " ", "y"]], "split": ["val"]})
    config = DataConfig(path=listed)
    assert everything(open_pairs(config, split="val")) == {"c.jpg": ("x", "y")}


def test_parquet_with_images_inside(folder: Path) -> None:
    images = [encoded(n) for n in range(10)]
    cells = [{"bytes": data, "path": None} for data in images]
    parts = folder / "parts"
    parts.mkdir()
    for number in range(2):
        half = slice(5 * number, 5 * number + 5)
        parquet(
            parts / f"{number}.parquet",
            {"image": cells[half], "caption": [f"caption {n}" for n in range(10)][half]},
            row_group_size=2,
        )
    source = open_pairs(str(parts))
    assert list(everything(source))[4:6] == ["0/4", "1/0"]
    assert source.captions(7) == ("caption 7",)
    order = [9, 0, 5, 1, 8, 2, 7, 3, 6, 4, 0, 9]
    assert [source.image_bytes(i) for i in order] == [images[i] for i in order]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.image_bytes(6) == images[6]
    assert source.shard_of("1/0") == str(parts / "1.parquet")
    plain = parquet(folder / "plain.parquet", {"jpg": [*images, None], "txt": [["c"]] * 11})
    source = open_pairs(plain)
    assert source.image_bytes(3) == images[3]
    assert len(source) == 10
    assert source.problems.counts == {"row without image": 1}
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if source.image_bytes(4) == images[4] else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_row_5_parquet_with_missing_captions(folder: Path) -> None:
    path = parquet(folder / "t.parquet", {"image": [encoded(0), encoded(1)], "title": [None, "good"]})
    with pytest.raises(InputError, match=r"1 rows have no caption: row 0 \('t/0'\); fill them in"):
        open_pairs(path)
    source = open_pairs(DataConfig(path=path, missing_captions="skip"))
    assert everything(source) == {"t/1": ("good",)}
    assert source.image_bytes(0) == encoded(1)
    assert source.problems.dropped == 1


def test_parquet_errors(folder: Path) -> None:
    good = parquet(folder / "t.parquet", {"filepath": ["a.jpg"], "title": ["one"], "caption": ["x"]})
    with pytest.raises(InputError, match=r"no column 'picture'; it has: filepath, title, caption; set image_column"):
        open_pairs(DataConfig(path=good, image_column="picture"))
    numbers = parquet(folder / "n.parquet", {"filepath": [1, 2], "title": ["a", "b"]})
    with pytest.raises(InputError, match="the column 'filepath' holds int64, neither paths nor encoded images"):
        open_pairs(numbers)
    content = Path(good).read_bytes()
    (folder / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        open_pairs(str(folder / "cut.parquet"))
    mixed = folder / "mixed"
    mixed.mkdir()
    parquet(mixed / "0.parquet", {"filepath": ["a.jpg"], "title": ["one"]})
    parquet(mixed / "1.parquet", {"path": ["a.jpg"], "title": ["one"]})
    with pytest.raises(InputError, match=r"1.parquet' has other columns than"):
        open_pairs(str(mixed))


def test_parquet_bytes_that_are_no_text(folder: Path) -> None:
    bad = pa.array([b"caf\xe9 au lait"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"filepath": pa.array(["a.jpg"]), "title": bad}), folder / "t.parquet")
    source = open_pairs(str(folder / "t.parquet"))
    assert everything(source) == {"a.jpg": ("caf au lait",)}
    assert source.problems.counts == {"undecodable characters removed": 1}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mangled_parquet_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    good = folder / "good.parquet"
    if not good.exists():
        parquet(
            good, {"image": [encoded(n) for n in range(4)], "title": ["one", "two", "three", "four"]}, row_group_size=2
        )
    mangled = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        mangled[data.draw(st.integers(4, len(mangled) - 1))] = data.draw(st.integers(0, 255))
    (folder / "any.parquet").write_bytes(mangled)
    try:
        source = open_pairs(DataConfig(path=str(folder / "any.parquet"), missing_captions="skip"))
        for i in range(len(source)):
            source.image(i)
    except (InputError, BadSample) as error:
        assert str(error)  # noqa: PT017 - either outcome is right
