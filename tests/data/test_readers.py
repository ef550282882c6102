"""Karpathy and COCO JSON, folders with text files: what is read, what is counted, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipdistill.data.files import read_image_file
from clipdistill.data.formats import Place, forms
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from tests.conftest import shared_folder
from tests.data.helpers import encoded


def everything(source: PairSource) -> dict[str, tuple[str, ...]]:
    return {source.key(i): source.captions(i) for i in range(len(source))}


def images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return folder


def karpathy_entry(name: Any, split: str = "train", *captions: Any, **more: Any) -> dict[str, Any]:
    sentences = [{"raw": c, "tokens": []} for c in captions or (f"about {name}",)]
    return {"filename": name, "split": split, "sentences": sentences, **more}


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def karpathy(tmp_path: Path) -> str:
    images(tmp_path / "pictures", *(f"{n}.jpg" for n in range(6)))
    entries = [
        karpathy_entry("0.jpg", "train", "first ", "second\tone"),
        karpathy_entry("1.jpg", "restval"),
        karpathy_entry("2.jpg", "val"),
        karpathy_entry("3.jpg", "test"),
        karpathy_entry("4.jpg", "train", "  ", None, 5),
        karpathy_entry("missing.jpg", "train"),
        karpathy_entry("../escape.jpg", "train"),
        karpathy_entry(None, "train"),
        {"filename": "5.jpg", "split": "train"},
        "no entry",
    ]
    return write_json(tmp_path / "dataset.json", {"images": entries, "dataset": "tiny"})


def test_karpathy_splits(karpathy: str) -> None:
    assert everything(open_pairs(karpathy, split="train")) == {"0.jpg": ("first", "second one")}
    assert list(everything(open_pairs(karpathy, split="train+restval"))) == ["0.jpg", "1.jpg"]
    assert list(everything(open_pairs(karpathy, split="all"))) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert list(everything(open_pairs(f"{karpathy}:val"))) == ["2.jpg"]
    assert list(everything(open_pairs(karpathy, default_split="test"))) == ["3.jpg"]
    assert open_pairs(karpathy, split="val").name == "dataset/val"


def test_karpathy_counts_what_it_leaves_out(karpathy: str) -> None:
    problems = open_pairs(karpathy, split="train").problems
    assert problems.counts == {
        "unreadable entry": 1,
        "empty caption": 1,
        "missing caption": 2,
        "image without caption": 2,
        "missing image file": 1,
        "unusable image name": 2,
    }
    assert problems.dropped == 5
    assert ("missing.jpg", "missing image file") in problems.rows


def test_karpathy_errors(karpathy: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"several splits: train \(6\), restval \(1\), val \(1\), test \(1\); name"):
        open_pairs(karpathy)
    with pytest.raises(InputError, match=r"has no split 'tran' \(did you mean 'train'\?\)"):
        open_pairs(karpathy, split="tran")
    with pytest.raises(InputError, match=r"image_root '.*nowhere' is not a folder"):
        open_pairs(DataConfig(path=karpathy, split="val", image_root=str(tmp_path / "nowhere")))
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"image_root '.*other' holds none of the first 1 images \('2.jpg'"):
        open_pairs(DataConfig(path=karpathy, split="val", image_root=str(tmp_path / "other")))
    alone = tmp_path / "away" / "from" / "pictures"  # folders beside the file's own are searched too
    alone.mkdir(parents=True)
    moved = str(Path(karpathy).rename(alone / "dataset.json"))
    with pytest.raises(
        InputError, match=r"images of 'dataset.json' are not found \('2.jpg' is neither in .*image_root"
    ):
        open_pairs(moved, split="val")


def test_karpathy_with_folders_as_in_coco(tmp_path: Path) -> None:
    images(tmp_path / "coco", "train2014/a.jpg", "val2014/b.jpg")
    entries = [karpathy_entry("a.jpg", filepath="train2014"), karpathy_entry("b.jpg", filepath="val2014")]
    path = write_json(tmp_path / "dataset_coco.json", {"images": entries})
    source = open_pairs(path)
    assert list(everything(source)) == ["train2014/a.jpg", "val2014/b.jpg"]
    assert source.image_bytes(1) == encoded(1)


def test_the_shared_karpathy_file() -> None:
    path = str(shared_folder("data/flickr8k") / "dataset_flickr8k.json")
    train, val = open_pairs(path, split="train"), open_pairs(path, split="val")
    for source, count in ((train, 6000), (val, 1000)):
        assert len(source) == count
        assert {len(source.captions(i)) for i in range(count)} == {5}
        assert len({source.key(i) for i in range(count)}) == count
        assert not source.problems
        assert source.image(0).size == (144, 144)
    assert train.fingerprint() != val.fingerprint()
    assert train.fingerprint() == open_pairs(path, split="train").fingerprint()


def coco_content() -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}, {"id": 4, "file_name": "c.jpg"}],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "b one"},
            {"image_id": 7, "id": 2, "caption": "a one"},
            {"image_id": 3, "id": 3, "caption": "b two\n"},
            {"image_id": 99, "id": 4, "caption": "of nothing"},
            {"image_id": 7, "id": 5, "caption": ""},
            {"image_id": [1], "caption": "odd"},
            "odd",
        ],
    }


def test_coco(tmp_path: Path) -> None:
    images(tmp_path / "val2017", "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "annotations").mkdir()
    source = open_pairs(write_json(tmp_path / "annotations" / "captions_val2017.json", coco_content()))
    assert everything(source) == {"a.jpg": ("a one",), "b.jpg": ("b one", "b two")}
    assert source.problems.counts == {"caption of an unknown image": 3, "empty caption": 1, "image without caption": 1}
    assert source.image_bytes(0) == encoded(0)


def test_coco_errors(tmp_path: Path) -> None:
    path = write_json(tmp_path / "captions.json", coco_content())
    with pytest.raises(InputError, match="has no splits: leave split='val' out"):
        open_pairs(path, split="val")
    boxes = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    with pytest.raises(InputError, match=r"its annotations have no 'caption' \(it holds boxes"):
        open_pairs(write_json(tmp_path / "instances_val.json", boxes))


def test_the_shared_coco_files() -> None:
    folder = shared_folder("data/coco_mini") / "annotations"
    train, val = (open_pairs(str(folder / f"captions_{name}.json")) for name in ("train2017", "val_a"))
    for source, count in ((train, 130), (val, 50)):
        assert len(source) == count
        assert sum(len(source.captions(i)) for i in range(count)) == 5 * count
        assert not source.problems
        assert min(source.image(0).size) == 224
    with pytest.raises(InputError, match="its annotations have no 'caption'"):
        open_pairs(str(folder / "instances_val_a.json"))


def test_folder_of_images_with_text_files(tmp_path: Path) -> None:
    images(tmp_path, "b.jpg", "a.PNG", "deep/c.webp", "lonely.jpg", ".hidden.jpg")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\n\n  two \r\n")
    (tmp_path / "a.txt").write_bytes(b"caf\xc3\xa9 \xff\n")
    (tmp_path / "deep" / "c.txt").write_text("three")
    source = open_pairs(str(tmp_path))
    assert everything(source) == {"a.PNG": ("café",), "b.jpg": ("one", "two"), "deep/c.webp": ("three",)}
    assert source.problems.counts == {
        "hidden image": 1,
        "missing caption": 1,
        "image without caption": 1,
        "undecodable characters removed": 1,
    }
    assert source.name == tmp_path.name
    with pytest.raises(InputError, match="has no splits: leave split='train' out"):
        open_pairs(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("   \n", "is empty"),
        ('{"images": [', r"not JSON \(line 1"),
        ("[1, 2]", "neither Karpathy's .* it holds a list"),
        ('{"a": 1, "b": 2}', "neither Karpathy's .* it holds the keys a, b"),
        ("{}", "neither Karpathy's"),
        ('{"images": []}', "neither Karpathy's"),
        ('{"images": [], "annotations": []}', "no usable image-caption pair|are not found"),
        ('{"images": 3, "annotations": 4}', "neither Karpathy's"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("just words", "not JSON"),
        ("\udcff\udcfe", "not JSON|known format"),
    ],
)
def test_json_that_is_not_what_it_says(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "captions.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        open_pairs(str(path))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a.jpg", "b.jpg", "train"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "images",
                    "annotations",
                    "filename",
                    "file_name",
                    "id",
                    "image_id",
                    "caption",
                    "sentences",
                    "raw",
                    "split",
                    "x",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON, st.lists(JSON, max_size=4), st.lists(JSON, max_size=4))
def test_any_json_is_read_or_refused(tmp_path: Path, first: Any, some: list[Any], others: list[Any]) -> None:
    images(tmp_path, "a.jpg", "b.jpg") if not (tmp_path / "a.jpg").exists() else None
    good = karpathy_entry("a.jpg")
    for content in (first, {"images": [*some, good]}, {"images": some, "annotations": others}):
        path = write_json(tmp_path / "any.json", content)
        try:
            source = open_pairs(path, default_split="train")
        except InputError as error:
            assert str(error)  # noqa: PT017 - either outcome is right
        else:
            for key, captions in everything(source).items():
                assert key in ("a.jpg", "b.jpg")
                assert all(captions)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="missing image file"):
        read_image_file(tmp_path / "nothing")
    with pytest.raises(BadSample, match="unreadable image file"):
        read_image_file(tmp_path)
    with pytest.raises(BadSample, match="unreadable image file"):
        read_image_file("with\0null")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BadSample, match="not a regular file"):
            read_image_file(tmp_path / "pipe")
        with pytest.raises(BadSample, match="not a regular file"):
            read_image_file("/dev/zero")


def test_an_image_that_disappears_is_a_bad_sample(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    path = write_json(tmp_path / "d.json", {"images": [karpathy_entry("a.jpg"), karpathy_entry("b.jpg")]})
    source = open_pairs(path)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(BadSample) as caught:
        source.image(1)
    assert (caught.value.key, caught.value.reason) == ("b.jpg", "missing image file")
    (tmp_path / "b.jpg").write_bytes(encoded(0)[:200])
    with pytest.raises(BadSample) as caught:
        source.image(1)
    assert caught.value.key == "b.jpg"
    assert caught.value.reason.startswith("truncated image: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is not the name of a data set"),
        ("a\0b", "is not the name of a data set"),
        ("no/such/place.json", r"no such file or folder \(the folder 'no/such' does not exist\)"),
        ("x" * 5000, "no such file or folder"),
        ("/dev/null", "neither a file nor a folder"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_pairs(name)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("object:Flags@0", "OBJECT"),
        ("hf:owner/name", "HUB"),
        ("saved", "SAVED"),
        ("a.csv", "TABLE"),
        ("pairs", "FOLDER"),
    ],
)
def test_a_form_whose_reader_is_not_installed_is_nobodys(name, form, tmp_path, monkeypatch) -> None:
    for folder in ("saved", "pairs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "pairs" / "a.jpg").write_bytes(encoded(0))
    (tmp_path / "pairs" / "a.txt").write_text("a square\n")
    (tmp_path / "a.csv").write_text("filepath\ttitle\na.jpg\ta square\n")
    place = name if ":" in name else str(tmp_path / name)
    assert getattr(forms, form).matches(Place(place))
    monkeypatch.setattr(forms, "wing", lambda place: None)
    assert not getattr(forms, form).matches(Place(place))
    with pytest.raises(InputError):
        open_pairs(place)


def test_a_near_name_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(InputError, match=r"\(did you mean 'captions.json'\?\)"):
        open_pairs(str(tmp_path / "caption.json"))


def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither tars, Parquet files nor images"):
        open_pairs(str(tmp_path))
    images(tmp_path, "a.jpg")
    with pytest.raises(InputError, match=r"holds 1 images, but no .txt file with captions"):
        open_pairs(str(tmp_path))
    (tmp_path / "captions.csv").write_text("filepath,title\n")
    with pytest.raises(InputError, match=r"name the file, for example '.*captions.csv'"):
        open_pairs(str(tmp_path))


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    folder = images(tmp_path / "coco_flickr_karpathy.tar", "a.jpg")
    write_json(folder / "captions.csv", {"images": [karpathy_entry("a.jpg")]})
    assert everything(open_pairs(str(folder / "captions.csv"))) == {"a.jpg": ("about a.jpg",)}
    (folder / "table.json.txt").write_text("filepath,title\na.jpg,told\n")
    assert everything(open_pairs(str(folder / "table.json.txt"))) == {"a.jpg": ("told",)}
    (folder / "noise.csv").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(InputError, match="is no text, since it holds NUL bytes"):
        open_pairs(str(folder / "noise.csv"))


def test_scenes_are_opened_by_name() -> None:
    source = open_pairs("scenes:train?size=12&seed=3")
    assert len(source) == 12
    assert source.image(0).mode == "RGB"
    assert source.captions(0)
    assert len(open_pairs(DataConfig(path="scenes", size=5), default_split="val")) == 5
    with pytest.raises(InputError, match=r"unknown setting 'sizes' \(did you mean 'size'"):
        open_pairs("scenes:train?sizes=12")
    with pytest.raises(InputError, match="size and seed are whole numbers"):
        open_pairs("scenes:train?size=many")
