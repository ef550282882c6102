"""What lies in a folder, an archive or a table and is not used is counted where the set is opened."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdistill.data.captions import EMPTY, INVISIBLE, clean, clean_all
from clipdistill.data.files import IMAGE_SUFFIXES
from clipdistill.data.images import MOST_PIECES, decode
from clipdistill.data.objects import hold
from clipdistill.data.open import open_labelled, open_pairs
from clipdistill.data.pairs import DataConfig
from clipdistill.data.problems import BadSample, Problems
from clipdistill.errors import InputError
from tests.data.helpers import encoded, picture, write_tar


def write(folder: Path, *names: str) -> Path:
    """Files below `folder`: pictures for names of images, captions for .txt."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number) if path.suffix.lower() in IMAGE_SUFFIXES else f"caption of {name}".encode())
    return folder


PASSED_OVER = {
    "hidden image": (".hid.jpg", ".hid.txt"),
    "hidden image in a hidden folder": (".thumbs/x.jpg", ".thumbs/x.txt"),
    "text file without image": ("alone.txt",),
    "table beside the images": ("captions.csv",),
}


@pytest.mark.parametrize("reason", PASSED_OVER)
def test_of_a_folder_what_is_not_used_is_counted(tmp_path: Path, reason: str) -> None:
    source = open_pairs(str(write(tmp_path, "a.jpg", "a.txt", *PASSED_OVER[reason])))
    assert [source.key(i) for i in range(len(source))] == ["a.jpg"]
    assert source.problems.counts[reason.removesuffix(" in a hidden folder")] == 1
    assert source.problems.dropped == 0  # nobody meant to give it, so it is no bad sample
    assert source.problems.sentence("photos").startswith("photos: found when it was opened: 1 ")


def test_what_macos_puts_into_archives_is_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", "a.jpg", "a.txt", "__MACOSX/._a.jpg", "__MACOSX/b.jpg", "__MACOSX/b.txt", "._a.jpg")
    assert not open_pairs(str(folder)).problems
    labelled = open_labelled(write(tmp_path / "l", "cat/a.jpg", "dog/b.jpg", "__MACOSX/cat/c.jpg"))
    assert labelled.class_names == ("cat", "dog")
    members = [("__MACOSX/0.jpg", encoded(1)), ("__MACOSX/0.txt", b"x"), ("0.jpg", encoded(0)), ("0.txt", b"a")]
    source = open_pairs(str(write_tar(tmp_path / "x.tar", members)))
    assert len(source) == 1
    assert not source.problems


def test_linked_and_unlisted_folders_are_counted(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", "bird/c.jpg")
    folder = write(tmp_path / "set", "cat/a.jpg", "dog/b.jpg")
    (folder / "bird").symlink_to(elsewhere / "bird")
    (folder / "circle").symlink_to(folder)
    labelled = open_labelled(folder)
    assert labelled.class_names == ("cat", "dog")
    assert labelled.problems.counts == {"link to a folder": 1}  # a circle is nothing


def test_parquet_with_fewer_images_than_it_says_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A footer that counts more rows than the column of images has: fewer samples without a word, or an IndexError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clipdistill.data.formats import parquet

    path = tmp_path / "data.parquet"
    cells = [encoded(0)] * 5
    pq.write_table(pa.table({"image": cells, "caption": ["a red square"] * 5}), path)
    whole, read = open_pairs(str(path)), parquet._read_cells
    monkeypatch.setattr(parquet, "_read_cells", lambda *given: read(*given)[:3])
    with pytest.raises(BadSample, match=r"missing row: row group 0 of data\.parquet holds 3 images"):
        whole.image_bytes(4)
    pq.write_table(pa.table({"image": [*cells[:4], None], "caption": ["a red square"] * 5}), path)
    with pytest.raises(InputError, match=r"damaged Parquet file .*holds 3 images and says 5"):
        open_pairs(str(path))
    monkeypatch.setattr(parquet, "_columns", lambda table, names: iter([("a red square", None)] * 2))
    monkeypatch.setattr(parquet, "_places", lambda *given: iter([(0, row, False) for row in range(5)]))
    with pytest.raises(InputError, match="damaged Parquet file"):
        open_pairs(str(path))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("change", ["cut", "cut, of a group that is kept", "written anew", "removed", "exchanged"])
def test_parquet_that_changes_while_it_is_read_ends_no_process(tmp_path: Path, change: str, compression: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, noise = tmp_path / "p.parquet", np.random.default_rng(0)
    cells = [encoded(k) + noise.bytes(20_000) for k in range(24)]
    table = pa.table({"image": [{"bytes": cell, "path": None} for cell in cells], "caption": ["a thing"] * 24})
    pq.write_table(table, path, row_group_size=4, compression=compression)
    source = open_pairs(str(path))
    assert source.image_bytes(0) == cells[0]
    last = 3 if "kept" in change else 23
    if change == "removed":
        path.unlink()
    elif change == "exchanged":
        (tmp_path / "other").write_bytes(b"another")
        (tmp_path / "other").replace(path)
    elif change == "written anew":
        path.write_bytes(b"another")
    else:
        os.truncate(path, 1000)
    if change in ("removed", "exchanged"):  # what was opened is still there
        assert source.image_bytes(last) == cells[last]
    else:
        with pytest.raises(BadSample, match="shorter than when it was opened"):
            source.image_bytes(last)


def test_endings_of_captions_and_images_in_any_case(tmp_path: Path) -> None:
    source = open_pairs(str(write(tmp_path, "a.JPG", "a.TXT", "b.jfif", "b.txt", "c.JPE", "c.Txt")))
    assert [source.captions(i) for i in range(3)] == [
        ("caption of a.TXT",),
        ("caption of b.txt",),
        ("caption of c.Txt",),
    ]
    assert all(source.image(i).size == (40, 30) for i in range(3))


def test_in_archives_second_and_hidden_images_are_counted(tmp_path: Path) -> None:
    members = [
        ("0.jpg", encoded(0)),
        ("0.png", encoded(1, "PNG")),
        ("0.txt", b"a"),
        (".h.jpg", encoded(2)),
        (".h.txt", b""),
    ]
    write_tar(tmp_path / "x.tar", members)
    write(tmp_path, "9.jpg")
    source = open_pairs(str(tmp_path))
    assert len(source) == 1
    assert source.problems.counts == {
        "image beside another of the same name": 1,
        "hidden image": 1,
        "image beside the shards": 1,
    }


@pytest.mark.parametrize("text", ["\u200b", "\u200b \u2060\ufe0f"[:3], "\u3164", "\u2800\u2800", "\u00ad", "\u200e"])
def test_captions_that_show_nothing_are_empty(text: str) -> None:
    assert clean(text) == ("", (INVISIBLE,))
    problems = Problems()
    assert clean_all([text, "a\u200bb", "\U0001f468\u200d\U0001f469"], "k", problems) == [
        "a\u200bb",
        "\U0001f468\u200d\U0001f469",
    ]
    assert problems.counts == {INVISIBLE: 1, EMPTY: 1}


@pytest.mark.parametrize("header", ["filepath,title,title", "filepath,filepath,title"])
def test_a_column_that_is_named_twice_is_refused(tmp_path: Path, header: str) -> None:
    write(tmp_path, "0.jpg")
    (tmp_path / "d.csv").write_text(f"{header}\n0.jpg,0.jpg,a dog\n")
    with pytest.raises(InputError, match="2 columns are called"):
        open_pairs(str(tmp_path / "d.csv"))


@pytest.mark.parametrize("image", [picture(0, 50, 40), np.zeros((40, 50, 3), np.uint8), encoded(picture(0, 50, 40))])
def test_the_limit_of_pixels_holds_for_objects_too(image: object) -> None:
    name = hold([(image, "a dog")])
    assert open_pairs(name).image(0).size == (50, 40)
    with pytest.raises(BadSample, match="too many pixels"):
        open_pairs(DataConfig(path=name, max_pixels=1999)).image(0)
    assert open_pairs(name).image(0).size == (50, 40)  # the program's own object is as it was


def test_pictures_of_torchvision_are_read_within_the_limits(tmp_path: Path) -> None:
    write(tmp_path, "cat/a.jpg", "dog/b.jpg")
    exif = Image.Exif()
    exif[0x112] = 6
    picture(3, 40, 20).save(tmp_path / "cat/turned.jpg", exif=exif)
    Image.new("1", (9000, 9000)).save(tmp_path / "dog/huge.png")
    source = open_labelled(f"torchvision:ImageFolder@{tmp_path}")
    found = {}
    for i in range(len(source)):
        try:
            found[source.key(i)] = str(source.image(i).size)
        except BadSample as error:
            found[source.key(i)] = error.reason
    assert found["cat/a.jpg"] == "(40, 30)"
    assert found["cat/turned.jpg"] == "(20, 40)"
    assert found["dog/huge.png"].startswith("too many pixels")


def tiff_of_strips(count: int, *, order: str = "<", large: bool = False) -> bytes:
    """A grey TIFF 8 pixels wide with one strip a row; `large`: BigTIFF."""
    entry, head = ("HHQQ", "Q") if large else ("HHII", "H")
    start = 16 if large else 8
    entries = [(256, 4, 1, 8), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    lists = start + 8 + (8 if large else 2) + (len(entries) + 3) * struct.calcsize(order + entry) + (8 if large else 4)
    entries += [(273, 4, count, lists), (278, 4, 1, 1), (279, 4, count, lists + 4 * count)]
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if large else 42)
    first = struct.pack(order + ("HHQ" if large else "I"), *((8, 0, start + 8) if large else (start + 8,)))

    offset = order + ("Q" if large else "I")

    # a value of one 16-bit number stands at the left of its field
    def packed(tag: int, kind: int, number: int, value: int) -> bytes:
        short = struct.pack(order + "H", value % 65536).ljust(struct.calcsize(offset), b"\0")
        field = short if kind == 3 else struct.pack(offset, value)
        return struct.pack(order + entry[:3], tag, kind, number) + field

    body = struct.pack(order + head, len(entries)) + b"".join(packed(*e) for e in sorted(entries))
    body += bytes(8 if large else 4)
    ends = struct.pack(order + "I", start) * count + struct.pack(order + "I", 8) * count
    return mark + first + bytes(8) + body + ends


@pytest.mark.parametrize(("order", "large"), [("<", False), (">", False), ("<", True)])
def test_a_tiff_of_a_million_strips_is_refused_at_once(order: str, large: bool) -> None:
    assert decode(tiff_of_strips(20, order=order, large=large)).size == (8, 20)
    data = tiff_of_strips(1_000_000, order=order, large=large)
    begun = time.process_time()
    with pytest.raises(BadSample, match="too many pieces"):
        decode(data)
    assert time.process_time() - begun < 1
    assert decode(tiff_of_strips(MOST_PIECES // 10, order=order, large=large)).height == MOST_PIECES // 10
