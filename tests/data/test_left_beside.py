"""What lies beside the data that are read, and what stands twice in them: counted or refused, never taken for one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdistill.cache.plain import PlainEmbeddings
from clipdistill.data.open import open_labelled, open_pairs
from clipdistill.errors import InputError
from clipdistill.regions.box_file import BoxFile
from tests.data.helpers import encoded, sample_members, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "indexes"))


def pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(number))
    return folder


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_compressed_files_and_folders_beside_the_ones_that_are_read_are_counted(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "more").mkdir(parents=True)
    for place in (folder / "0", folder / "more" / "1"):
        if form == "tar":
            write_tar(place.with_suffix(".tar"), sample_members(0))
        else:
            pq.write_table(pa.table({"image": [encoded(0)], "caption": ["a dog"]}), place.with_suffix(".parquet"))
    for ending in ("gz", "zst", "GZ"):
        (folder / f"1.{form}.{ending}").write_bytes(b"x")
    for other in ("notes.txt.gz", "x.gz", "pictures.zip"):
        (folder / other).write_bytes(b"x")
    (folder / "empty").mkdir()
    source = open_pairs(str(folder))
    assert len(source) == 1
    assert source.problems.counts == {"compressed file beside the others": 3, "folder of such files beside them": 1}


def test_a_class_folder_without_images_is_counted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "set", "cat/a.jpg", "dog/b.jpg")
    for name in ("bird", ".hidden", "__MACOSX"):
        (folder / name).mkdir()
    source = open_labelled(folder)
    assert source.class_names == ("cat", "dog")
    assert source.problems.rows == [("bird", "class folder without images")]


def coco(folder: Path, images: list[tuple[Any, str]], captions: list[tuple[Any, str]]) -> str:
    pictures(folder, *{name for _, name in images})
    content = {
        "images": [{"id": identity, "file_name": name} for identity, name in images],
        "annotations": [{"image_id": identity, "caption": caption} for identity, caption in captions],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return str(folder / "captions.json")


def test_an_image_id_of_several_files_gives_none_of_them_captions(tmp_path: Path) -> None:
    """The captions of the second file went to the first."""
    images = [(1, "a.jpg"), (1, "b.jpg"), (1, "d.jpg"), (2, "c.jpg"), (3, "c.jpg"), (2, "c.jpg")]
    captions = [(1, "of a"), (1, "of b"), (2, "of c"), (3, "of c too")]
    source = open_pairs(coco(tmp_path, images, captions))
    assert {source.key(i): source.captions(i) for i in range(len(source))} == {"c.jpg": ("of c", "of c too")}
    assert source.problems.counts == {
        "image id of several files": 3, "image listed again": 2, "caption of an unknown image": 2,
    }  # fmt: skip
    assert source.problems.dropped == 3


def test_image_ids_are_compared_as_numbers_or_as_texts(tmp_path: Path) -> None:
    """Tables of pandas write 1.0; "1" and 1 are two ids."""
    source = open_pairs(coco(tmp_path / "x", [(1.0, "a.jpg"), (2, "b.jpg")], [(1, "of a"), (2.0, "of b")]))
    assert [source.captions(i) for i in range(2)] == [("of a",), ("of b",)]
    source = open_pairs(coco(tmp_path / "y", [("1", "a.jpg"), (2, "b.jpg")], [(1, "of a"), (2, "of b")]))
    assert source.problems.counts == {"caption of an unknown image": 1, "image without caption": 1}


def test_boxes_of_an_image_id_that_stands_twice_are_refused_and_of_unlisted_images_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}]
    boxes = [{"image_id": number, "bbox": [0, 0, 5, 5]} for number in (1, 9, 9)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes}))
    assert len(BoxFile(path)) == 1
    assert "2 boxes are of images that it does not list" in caplog.text
    path.write_text(json.dumps({"images": [*images, {"id": 1, "file_name": "b.jpg"}], "annotations": boxes}))
    with pytest.raises(InputError, match="the image id 1 comes more than once"):
        BoxFile(path)


def archive(path: Path, *arrays: tuple[str, Any]) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        for name, values in arrays:
            with opened.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(values))
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_stands_twice_in_an_archive_is_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 5, 3), dtype=np.uint8)
    named = [("images", images), ("labels", [0, 1]), ("classnames", ["a", "b"])]
    assert len(open_labelled(archive(tmp_path / "good.npz", *named))) == 2
    with pytest.raises(InputError, match="an array stands in it twice"):
        open_labelled(archive(tmp_path / "x.npz", *named, ("labels", [1, 0])))
    rows = np.eye(2, dtype=np.float32)
    with pytest.raises(InputError, match="an array stands in it twice"):
        PlainEmbeddings(archive(tmp_path / "y.npz", ("keys", ["a", "b"]), ("image", rows), ("image", -rows)))


@pytest.mark.parametrize("kind", ["category", "view", "large"])
def test_texts_of_any_arrow_kind_are_texts(kind: str, tmp_path: Path) -> None:
    def column(values: list[str | None]) -> pa.Array:
        types = {"view": pa.string_view(), "large": pa.large_string()}
        return pa.array(values).dictionary_encode() if kind == "category" else pa.array(values, types[kind])

    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    table = {"filepath": column(["a.jpg", "b.jpg", "b.jpg"]), "title": column(["one", "two", "größe"])}
    pq.write_table(pa.table({**table, "split": column(["train", "val", "val"])}), tmp_path / "t.parquet")
    source = open_pairs(str(tmp_path / "t.parquet"), split="val")
    assert {source.key(i): source.captions(i) for i in range(len(source))} == {"b.jpg": ("two", "größe")}


@pytest.mark.parametrize("name", ["x/*.tar", "x/?.tar", "x/[ab].tar", "x/a.tar::x/b.tar"])
def test_patterns_of_other_programs_are_told_ours(name: str) -> None:
    with pytest.raises(InputError, match=r"name a folder, or shards as in cc3m/\{00000\.\.00331\}\.tar"):
        open_pairs(name)


def test_labels_of_saved_data_sets_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    picture = {"bytes": encoded(0), "path": None}

    def saved(labels: list[Any], kind: Any, images: list[Any]) -> str:
        features = library.Features({"image": library.Image(), "label": kind})
        made = library.Dataset.from_dict({"image": images, "label": labels}, features=features)
        made.save_to_disk(tmp_path / str(len(list(tmp_path.iterdir()))))
        return f"hf:{max(tmp_path.iterdir(), key=lambda path: int(path.name))}?label=label"

    names = library.ClassLabel(names=["cat", "dog"])
    for labels, kind in (
        ([0, None], names),
        (["cat", "dog"], library.Value("string")),
        ([0.5, 1.5], library.Value("float32")),
    ):
        with pytest.raises(InputError, match="of 'label' is no class number"):
            open_labelled(saved(labels, kind, [picture] * 2))
    source = open_labelled(saved([0, 1], names, [picture, None]))
    assert source.image(0).size
    with pytest.raises(Exception, match="missing image"):
        source.image(1)
