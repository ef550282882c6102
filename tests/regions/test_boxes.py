"""Boxes: clipping, limits, whole pixels; and every form of file they come in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdistill.errors import InputError
from clipdistill.regions.box_file import BoxFile, write_rows
from clipdistill.regions.boxes import Boxes
from clipdistill.train.region_config import BoxLimits
from tests.conftest import shared_folder

FOUR = [[0, 0, 10, 10], [-5, 5, 25, 15], [18, 0, 18.5, 20], [2.4, 2.6, 7.5, 9.4]]


def test_boxes_are_clipped_and_slivers_left_out() -> None:
    boxes = Boxes.of(20, 20, FOUR, [0.9, 0.2, 1.0, 0.5], ["a", "b", "c", "d"]).usable(BoxLimits())
    assert np.allclose(boxes.corners, [[0, 0, 10, 10], [0, 5, 20, 15], [2.4, 2.6, 7.5, 9.4]])
    assert boxes.labels == ("a", "b", "d")
    assert boxes.areas.tolist() == pytest.approx([0.25, 0.5, 5.1 * 6.8 / 400])


def test_limits_choose_by_confidence_area_and_number() -> None:
    boxes = Boxes.of(20, 20, FOUR, [0.5, 0.2, 1.0, 0.5])
    assert len(boxes.usable(BoxLimits(min_confidence=0.3))) == 2
    assert boxes.usable(BoxLimits(min_area=0.3)).confidence.tolist() == pytest.approx([0.2])
    most = boxes.usable(BoxLimits(most=2))
    assert most.confidence.tolist() == [0.5, 0.5]
    assert most.corners[0].tolist() == [0, 0, 10, 10]  # equals keep their order


def test_whole_pixels_are_inside_and_at_least_one() -> None:
    boxes = Boxes.of(20, 10, [[2.4, 2.6, 7.5, 9.4], [19.7, 9.8, 20, 10], [3, 3, 3.2, 3.2]])
    assert boxes.pixel_boxes() == [(3, 2, 6, 6), (9, 19, 1, 1), (3, 3, 1, 1)]


def test_boxes_of_another_size_are_scaled() -> None:
    boxes = Boxes.of(640, 480, [[64, 48, 320, 240]]).scaled(320, 240)
    assert boxes.corners.tolist() == [[32, 24, 160, 120]]
    assert (boxes.width, boxes.height) == (320, 240)


@pytest.mark.parametrize(
    ("corners", "confidence", "message"),
    [
        ([[0, 0, 1]], None, "four numbers"),
        ([[0, 0, 1, 1]], [0.5, 0.5], "do not fit"),
        ([[0, 0, 1, float("nan")]], None, "not finite"),
        ([[0, 0, 1, 1]], [1.5], "between 0 and 1"),
    ],
)
def test_impossible_boxes_are_refused(corners: list, confidence: list | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Boxes.of(5, 5, corners, confidence)


ROWS = [
    {"key": "folder/a.jpg", "boxes": [[0, 0, 5, 5], [1, 1, 4, 9]], "confidences": [0.5, 1.0], "labels": ["cat", "dog"]},
    {"key": "b.jpg", "boxes": [], "width": 20, "height": 10},
]


def written(folder: Path, form: str) -> Path:
    path = folder / f"boxes.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    else:
        path = folder / "mapping.json"
        path.write_text(json.dumps({row["key"]: {k: v for k, v in row.items() if k != "key"} for row in ROWS}))
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json", "mapping"])
def test_every_form_of_rows_gives_the_same_boxes(tmp_path: Path, form: str) -> None:
    boxes = BoxFile(written(tmp_path, form))
    found = boxes.get("folder/a.jpg", 10, 10)
    assert found is not None
    assert found.corners.tolist() == [[0, 0, 5, 5], [1, 1, 4, 9]]
    assert found.confidence.tolist() == [0.5, 1.0]
    assert found.labels == ("cat", "dog")
    none = boxes.get("elsewhere/b.jpg", 20, 10)  # by file name
    assert none is not None
    assert len(none) == 0
    assert boxes.get("c.jpg", 10, 10) is None
    assert boxes.missing(["folder/a.jpg", "c.jpg"]) == ["c.jpg"]


def test_a_file_name_in_two_folders_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([{"key": f"{folder}/a.jpg", "boxes": []} for folder in "xy"]))
    boxes = BoxFile(path)
    assert "x/a.jpg" in boxes
    assert "a.jpg" not in boxes


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    boxes = Boxes.of(20, 20, FOUR, [0.9, 0.2, 1.0, 0.5], ["a", "b", "c", "d"])
    write_rows(tmp_path / "part-0.parquet", [("x", boxes), ("y", Boxes.none(3, 3))], {})
    read = BoxFile(tmp_path)
    found = read.get("x", 20, 20)
    assert found is not None
    assert np.array_equal(found.corners, boxes.corners)
    assert np.array_equal(found.confidence, boxes.confidence)
    assert found.labels == boxes.labels
    assert len(read) == 2


def test_coco_instances(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 50}, {"id": 8, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 7, "bbox": [10, 5, 30, 20], "category_id": 3, "iscrowd": 0},
            {"image_id": 7, "bbox": [0, 0, 99, 49], "category_id": 3, "iscrowd": 1},
            {"image_id": 7, "bbox": [50, 0, 10, 10], "category_id": 4, "score": 0.25},
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    boxes = BoxFile(path).get("a.jpg", 200, 100)
    assert boxes is not None
    assert boxes.corners.tolist() == [[20, 10, 80, 50], [100, 0, 120, 20]]
    assert boxes.confidence.tolist() == [1, 0.25]
    assert boxes.labels == ("cat", "")


def test_real_coco_boxes_lie_in_their_images() -> None:
    folder = shared_folder("data/coco_mini")
    boxes = BoxFile(folder / "annotations" / "instances_val_a.json")
    assert len(boxes) == 50
    content = json.loads((folder / "annotations" / "instances_val_a.json").read_text())
    objects = sum(not annotation["iscrowd"] for annotation in content["annotations"])
    found = [boxes.get(image["file_name"], image["width"], image["height"]) for image in content["images"]]
    assert sum(len(one) for one in found if one is not None) == objects > 300
    used = [one.usable(BoxLimits()) for one in found if one is not None]
    assert sum(map(len, used)) >= 0.98 * objects  # slivers of less than a pixel exist
    assert all(one.pixel_boxes()[0][0] >= 0 and one.areas.max() <= 1 for one in used if len(one))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected an object"),
        ('[{"boxes": []}]', "no image key"),
        ('[{"key": "a", "boxes": 3}]', "not boxes of four"),
        ('[{"key": "a", "boxes": [[1, 2, 3]]}]', "3 numbers instead of 4"),
        ('[{"key": "a", "boxes": []}, {"key": "a", "boxes": []}]', "more than once"),
        ("[]", "no boxes for any image"),
        ("3", "neither rows"),
        ('[{"key": "a", "boxes": [7]}]', "not boxes of four"),
        ('[{"key": "a", "boxes": [], "width": "wide"}]', "not boxes of four"),
        ('[{"key": "a", "boxes": [[0, 0, 1, 1]], "labels": 3}]', "not boxes of four"),
        ('[{"key": "a", "boxes": [], "width": -4, "height": 3}]', "must be positive"),
        ('{"images": 3, "annotations": []}', "'images' is not a list"),
        ('{"images": [], "annotations": []}', "lists no images"),
        ('{"images": [{"id": [1], "file_name": "a"}], "annotations": []}', "no 'id'"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"bbox": [0, 0, 1, 1], "image_id": [1]}]}',
            "annotations.0",
        ),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"caption": "x", "image_id": 1}]}', "instances_"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": [1, 2]}]}',
            "annotations.0",
        ),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        BoxFile(path)
    assert "\n" not in str(caught.value)


def test_other_images_are_refused(tmp_path: Path) -> None:
    boxes = BoxFile(written(tmp_path, "json"))
    with pytest.raises(InputError, match="none of the 2 images of mine"):
        boxes.require_some(["p.jpg", "q.jpg"], "mine")
    assert boxes.require_some(["b.jpg", "q.jpg"], "mine") == ["q.jpg"]
    with pytest.raises(InputError, match="another picture or another crop"):
        boxes.get("b.jpg", 10, 10)
    with pytest.raises(InputError, match="no such file"):
        BoxFile(tmp_path / "absent.json")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_every_cut_and_every_flipped_bit_is_read_or_one_sentence(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    contents = [whole[:n] for n in generator.integers(0, len(whole), 60).tolist()]
    for place in generator.integers(0, len(whole), 150).tolist():
        contents.append(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    contents += [
        bytes(200),
        b"\xff\xfe" + whole,
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"a": {"boxes": [[1e999, 0, 1, 1]]}}',
        b"null",
    ]
    fingerprint, refused = BoxFile(path).fingerprint(), 0
    for content in contents:
        path.write_bytes(content)
        try:
            boxes = BoxFile(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
        else:  # still boxes, and other ones for whoever compares
            assert boxes.fingerprint() != fingerprint or content == whole
    assert refused > 80


def test_a_folder_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "part.parquet").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        BoxFile(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        BoxFile(tmp_path / ("x" * 300))
