"""Every sample that is not used is counted with its reason where a set is opened; none is read as another one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdistill.data.captions import clean_all
from clipdistill.data.ledger import BadSampleLedger
from clipdistill.data.loader import PairLoader
from clipdistill.data.open import is_labelled_name, open_labelled, open_pairs
from clipdistill.data.pairs import DataConfig, IndexedPairs, PairSource
from clipdistill.data.problems import Problems
from clipdistill.data.templates import check_templates
from clipdistill.errors import InputError
from tests.data.helpers import FakeModel, MemoryPairs, encoded, sample_members, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "cache"))


def everything(source: PairSource) -> dict[str, tuple[str, ...]]:
    return {source.key(i): source.captions(i) for i in range(len(source))}


# ---- tars


def test_dotted_names_follow_the_rule_of_webdataset_and_the_rest_is_counted(tmp_path: Path) -> None:
    dotted = [("p1.v2.jpg", encoded(1)), ("p1.v2.txt", b"lost"), ("p.q/1.jpg", encoded(2)), ("p.q/1.txt", b"kept")]
    source = open_pairs(str(write_tar(tmp_path / "s.tar", [*sample_members(0), *dotted])))
    assert everything(source) == {"s/000000": ("caption 0",), "s/p.q/1": ("kept",)}
    assert source.problems.counts == {"dotted member name": 2}
    assert source.problems.dropped == 1
    assert source.problems.rows[0][0] == "s/p1.v2.jpg"


def test_a_tar_of_dotted_names_only_says_why_nothing_is_left(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("p1.v2.jpg", encoded(1)), ("p1.v2.txt", b"x")])
    with pytest.raises(InputError, match=r"no usable image-caption pair in 1 shards \(2 dotted member name\)"):
        open_pairs(str(path))


@pytest.mark.parametrize("kind", ["heic", "HEIF", "jxl", "jp2", "dng", "svg"])
def test_images_of_formats_that_are_not_read_are_counted_when_opened(tmp_path: Path, kind: str) -> None:
    members = [*sample_members(0), (f"a.{kind}", b"x"), ("a.txt", b"a caption")]
    source = open_pairs(str(write_tar(tmp_path / "s.tar", members)))
    assert source.problems.counts == {"image format that is not read": 1}
    assert source.problems.rows == [("s/a", f"image format that is not read: .{kind.lower()}")]
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("good.jpg", f"sub/a.{kind}"):
        (folder / name).write_bytes(encoded(0))
        (folder / name).with_suffix(".txt").write_text("a caption")
    source = open_pairs(str(folder))
    assert list(everything(source)) == ["good.jpg"]
    assert source.problems.counts == {"image format that is not read": 1}
    assert source.problems.dropped == 1
    (folder / "t.csv").write_text(f"filepath,title\ngood.jpg,one\nsub/a.{kind},two\n")
    assert open_pairs(str(folder / "t.csv")).problems.counts == {"image format that is not read": 1}
    classes = tmp_path / "classes"
    for name in ("cat/a.jpg", f"cat/b.{kind}"):
        (classes / name).parent.mkdir(parents=True, exist_ok=True)
        (classes / name).write_bytes(encoded(0))
    assert open_labelled(classes).problems.counts == {"image format that is not read": 1}


@pytest.mark.parametrize("kind", ["gif", "bmp", "tif", "tiff", "avif"])
def test_every_image_format_that_is_read_is_read_from_tars(tmp_path: Path, kind: str) -> None:
    write_tar(tmp_path / "s.tar", [(f"a.{kind}", encoded(0, "GIF")), ("a.txt", b"a caption")])
    assert open_pairs(str(tmp_path / "s.tar")).image(0).size == (40, 30)


@pytest.mark.parametrize("count", [2, 3])
def test_archives_written_one_behind_the_other_are_one(tmp_path: Path, count: int) -> None:
    parts = [write_tar(tmp_path / f"{k}.part", sample_members(k)).read_bytes() for k in range(count)]
    (tmp_path / "s.tar").write_bytes(b"".join(parts))
    source = open_pairs(str(tmp_path / "s.tar"))
    assert everything(source) == {f"s/00000{k}": (f"caption {k}",) for k in range(count)}
    assert source.image_bytes(count - 1) == encoded(count - 1)
    assert not source.problems


@pytest.mark.parametrize("behind", [b"x" * 100, b"\xaa" * 5000, b"\0" * 512 + b"garbage" * 500])
def test_anything_else_behind_the_end_of_an_archive_is_counted(tmp_path: Path, behind: bytes) -> None:
    content = write_tar(tmp_path / "whole.part", sample_members(0)).read_bytes()
    (tmp_path / "s.tar").write_bytes(content + behind)
    source = open_pairs(str(tmp_path / "s.tar"))
    assert len(source) == 1
    assert sum(source.problems.counts.values()) == 1
    assert source.problems.rows[0][1].startswith(("data behind the end of the archive", "truncated archive"))


def test_the_key_of_the_json_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    records = [{"alt": "from the json", "caption": "no"}, {"alt": ["one", "two"]}, {"other": "x"}, {"alt": " "}]
    members = [
        member
        for k, record in enumerate(records)
        for member in ((f"{k}.jpg", encoded(k)), (f"{k}.txt", b"text"), (f"{k}.json", json.dumps(record).encode()))
    ]
    path = str(write_tar(tmp_path / "s.tar", members))
    for _ in range(2):  # the second time from the index
        source = open_pairs(DataConfig(path=path, caption_column="alt"))
        assert everything(source) == {"s/0": ("from the json",), "s/1": ("one", "two")}
        assert source.problems.counts == {"missing caption": 1, "empty caption": 1, "image without caption": 2}
    assert set(everything(open_pairs(path)).values()) == {("text",)}
    assert set(everything(open_pairs(DataConfig(path=path, caption_column="txt"))).values()) == {("text",)}


# ---- tables


TABLE_FAULTS = [
    ("b.jpg,a dog, a cat", "more cells than columns: 3 for 2"),
    ("b.jpg,a,b,c,d", "more cells than columns: 5 for 2"),
    ('b.jpg, "a dog"', "blank before a quotation mark"),
    ('b.jpg, "a dog, a cat"', "more cells than columns: 3 for 2"),
    ('b.jpg,"a \\"big\\" dog"', "stray quotation mark"),
    ('b.jpg,a \\"big\\" dog', "backslash before a quotation mark"),
    ('b.jpg,"a dog" named Rex', "stray quotation mark"),
    ('b.jpg,"' + "x " * 70_000 + '"', "over-long cell: 140000 characters"),
    ("b.jpg," + "y " * 70_000, "over-long cell: 140000 characters"),
]


@pytest.mark.parametrize(("row", "reason"), TABLE_FAULTS, ids=range(len(TABLE_FAULTS)))
def test_rows_that_would_be_changed_are_bad_samples_with_their_line(tmp_path: Path, row: str, reason: str) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(encoded(0))
    (tmp_path / "t.csv").write_text(f"filepath,title\na.jpg,one\n{row}\nc.jpg,three\n")
    source = open_pairs(str(tmp_path / "t.csv"))
    assert everything(source) == {"a.jpg": ("one",), "c.jpg": ("three",)}
    ((place, found),) = source.problems.rows
    assert place == "line 3"
    assert found.startswith(reason)
    assert source.problems.dropped == 1


GOOD_ROWS = [
    ('b.jpg,"a dog, a cat"', "a dog, a cat"), ('b.jpg,"a ""big"" dog"', 'a "big" dog'),
    ('b.jpg,a 5" screen', 'a 5" screen'),
    ("b.jpg,one,", "one"), ("b.jpg,one, ,", "one"), ('b.jpg,"two\nlines"', "two lines"),
    ("b.jpg, blank first", "blank first"),
    ("b.jpg,C:\\dir", "C:\\dir"), ("b.jpg," + "z" * 1500, "z" * 1500),
]  # fmt: skip


@pytest.mark.parametrize(("row", "caption"), GOOD_ROWS, ids=range(len(GOOD_ROWS)))
def test_rows_that_say_clearly_what_they_hold_are_read(tmp_path: Path, row: str, caption: str) -> None:
    (tmp_path / "b.jpg").write_bytes(encoded(0))
    (tmp_path / "t.csv").write_text(f"filepath,title\n{row}\n")
    source = open_pairs(str(tmp_path / "t.csv"))
    assert source.captions(0) == (caption,)
    assert not source.problems


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("struct", [True, False])
def test_parquet_rows_without_an_image_are_found_when_opened(tmp_path: Path, statistics: bool, struct: bool) -> None:
    images: list[Any] = [encoded(0), None, encoded(2), None]
    if struct:
        images = [{"bytes": image, "path": "x.jpg"} for image in images[:3]] + [None]
    table = pa.table({"image": images, "caption": ["a", "b", "c", "d"]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2, write_statistics=statistics)
    source = open_pairs(str(tmp_path / "t.parquet"))
    assert everything(source) == {"t/0": ("a",), "t/2": ("c",)}
    assert source.problems.rows == [("t/1", "row without image"), ("t/3", "row without image")]
    assert source.image_bytes(1) == encoded(2)


# ---- layouts


def img2dataset_files(folder: Path) -> Path:
    for shard in ("00000", "00001"):
        (folder / shard).mkdir(parents=True)
        for k in range(2):
            (folder / shard / f"{shard}{k:04d}.jpg").write_bytes(encoded(k))
            (folder / shard / f"{shard}{k:04d}.txt").write_text(f"caption {k}")
            (folder / shard / f"{shard}{k:04d}.json").write_text("{}")
        pq.write_table(pa.table({"url": ["u"], "caption": ["c"], "key": ["k"]}), folder / f"{shard}.parquet")
        (folder / f"{shard}_stats.json").write_text("{}")
    return folder


def test_img2datasets_files_are_a_folder_of_images(tmp_path: Path) -> None:
    folder = img2dataset_files(tmp_path / "out")
    source = open_pairs(str(folder))
    assert list(everything(source)) == [f"{s}/{s}{k:04d}.jpg" for s in ("00000", "00001") for k in range(2)]
    assert not is_labelled_name(str(folder))


def test_img2datasets_tars_and_tables_are_told_apart(tmp_path: Path) -> None:
    links = pa.table({"url": ["u"], "caption": ["c"]})
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "00000.tar", sample_members(0))
    pq.write_table(links, tmp_path / "tars" / "00000.parquet")
    assert open_pairs(str(tmp_path / "tars")).key(0) == "00000/000000"
    (tmp_path / "inside").mkdir()
    pq.write_table(pa.table({"jpg": [encoded(0)], "caption": ["c"]}), tmp_path / "inside" / "00000.parquet")
    assert open_pairs(str(tmp_path / "inside")).image_bytes(0) == encoded(0)


# ---- one text is one caption


class OneText(MemoryPairs):
    """A source that gives its only caption as it is."""

    def captions(self, i: int) -> Any:
        return f"picture {i}"


def test_one_text_is_one_caption_wherever_captions_are_taken(tmp_path: Path) -> None:
    assert clean_all("a red square", "k", Problems()) == ["a red square"]
    indexed: Any = IndexedPairs.__new__(type("Plain", (IndexedPairs,), {"image_bytes": lambda self, i: b""}))
    indexed.__init__("plain", ["a", "b"], ["a dog", ["one", "two"]], Problems(), 100)
    assert [indexed.captions(i) for i in range(2)] == [("a dog",), ("one", "two")]
    (batch,) = PairLoader(OneText(4), batch_size=4, student=FakeModel(), steps=1)
    assert sorted(batch.captions) == [f"picture {i}" for i in range(4)]
    assert len(OneText(2).fingerprint()) == 64
    assert check_templates("a photo of a {}", "here") == ("a photo of a {}",)
    (tmp_path / "a.jpg").write_bytes(encoded(0))
    for document in (
        {"images": [{"filename": "a.jpg", "sentences": "a red square"}]},
        {"images": [{"filename": "a.jpg", "sentences": ["a red square"]}]},
        {"images": [{"file_name": "a.jpg", "id": 1}], "annotations": [{"image_id": 1, "caption": ["a red square"]}]},
    ):
        (tmp_path / "d.json").write_text(json.dumps(document))
        assert everything(open_pairs(str(tmp_path / "d.json"))) == {"a.jpg": ("a red square",)}
    record = json.dumps({"captions": "a red square"}).encode()
    path = write_tar(tmp_path / "s.tar", [("a.jpg", encoded(0)), ("a.json", record)])
    assert open_pairs(str(path)).captions(0) == ("a red square",)


# ---- our own list of bad samples


GOOD_LINE = b'{"key": "a", "reason": "corrupt image"}\n'


@pytest.mark.parametrize(
    ("content", "damaged"),
    [
        (b"", 0), (GOOD_LINE, 0), (GOOD_LINE + b'{"key": "b", "rea', 1), (b"\0" * 300, 1),
        (b"[1, 2]\n3\nnull\n\"x\"\n", 4),
        (b"\xff\xfe\x80\n" + GOOD_LINE, 1), (b'{"key": ["a"], "reason": {}}\n', 1), (b"[" * 100_000 + b"\n", 1),
        (b'{"reason": "x"}\n{}\n\n', 2), (GOOD_LINE[: len(GOOD_LINE) // 2], 1),
    ],
)  # fmt: skip
def test_a_damaged_list_of_bad_samples_is_counted_and_continued(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, damaged: int
) -> None:
    path = tmp_path / "bad_samples.jsonl"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        ledger = BadSampleLedger(path, 0.5)
    assert ledger.damaged == damaged
    assert (f"{damaged} damaged lines" in caplog.text) == bool(damaged)
    ledger.record([("a", "corrupt image"), ("z", "empty image file")], 100)
    added = path.read_bytes()[len(content) :].strip(b"\n").split(b"\n")
    expected = (
        [("z", "empty image file")] if GOOD_LINE in content else [("a", "corrupt image"), ("z", "empty image file")]
    )
    assert [(row["key"], row["reason"]) for row in map(json.loads, added)] == expected
    assert path.read_bytes().startswith(content)


@pytest.mark.parametrize("state", [{}, [], None, {"seen": 1, "bad": 0, "by_reason": []}, {"seen": "x", "bad": 0}])
def test_a_damaged_count_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(InputError, match=r"the count of bad samples kept for .* is damaged"):
        BadSampleLedger(tmp_path / "b.jsonl", 0.5).restore(state)


def test_a_list_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(InputError, match=r"b\.jsonl: the list of bad samples cannot be opened"):
        BadSampleLedger(tmp_path / "b.jsonl", 0.5)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with a mark"])
@pytest.mark.parametrize("form", ["txt", "tar txt", "tar lines", "tar json", "csv", "karpathy"])
def test_captions_are_read_in_the_encodings_that_windows_writes(form: str, encoding: str, tmp_path: Path) -> None:
    def written(text: str) -> bytes:
        return b"\xfe\xff" + text.encode("utf-16-be") if "mark" in encoding else text.encode(encoding)

    said, column = "красный круг 日本 é", None
    (tmp_path / "0.jpg").write_bytes(encoded(0))
    place = tmp_path / {"csv": "t.csv", "karpathy": "k.json"}.get(form, "x.tar" if "tar" in form else "")
    if form == "txt":
        (tmp_path / "0.txt").write_bytes(written(said + "\r\n"))
    elif form == "csv":
        place.write_bytes(written(f"filepath,title\r\n0.jpg,{said}\r\n"))
    elif form == "karpathy":
        record = {"images": [{"filename": "0.jpg", "sentences": [{"raw": said}]}]}
        place.write_bytes(written(json.dumps(record, ensure_ascii=False)))
    else:
        ending, column = form.split()[1], "txt:lines" if "lines" in form else None
        content = json.dumps({"caption": said}, ensure_ascii=False) if ending == "json" else said
        write_tar(place, [("0.jpg", encoded(0)), (f"0.{ending.replace('lines', 'txt')}", written(content))])
    source = open_pairs(DataConfig(path=str(place), **({} if column is None else {"caption_column": column})))
    assert source.captions(0) == (said,)
    assert source.problems.total == 0
