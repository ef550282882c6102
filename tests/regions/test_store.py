"""Regions embedded once: crops, counts, resuming, sharing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as vision

from clipdistill.data.open import open_pairs
from clipdistill.data.problems import BadSample
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError
from clipdistill.models import load_model
from clipdistill.regions import store as stores
from clipdistill.regions.box_file import BoxFile
from clipdistill.regions.store import crop, fill_store
from clipdistill.train.region_config import BoxLimits, MetaTeacherConfig

SOURCE = "scenes:val?size=5"


def boxes_file(folder: Path, rows: list[dict[str, Any]]) -> BoxFile:
    path = folder / "boxes.json"
    path.write_text(json.dumps(rows))
    return BoxFile(path)


def filled(
    folder: Path, boxes: BoxFile, whole: str = "missing", limits: BoxLimits | None = None, **changes: Any
) -> Any:
    clip = changes.pop("clip", None) or load_model("scenes-teacher", teacher=True)
    spec = MetaTeacherConfig(**changes).crop_spec(clip.image)
    source = open_pairs(SOURCE)
    return fill_store(folder, source, boxes, clip, spec, limits or BoxLimits(), whole, batch_size=3)


def some_boxes(folder: Path) -> BoxFile:
    source = open_pairs(SOURCE)
    keys = [source.key(i) for i in range(3)]
    return boxes_file(
        folder,
        [
            {"key": keys[0], "boxes": [[2, 3, 30, 40], [5, 5, 25, 20]], "confidences": [0.5, 0.75]},
            {"key": keys[1], "boxes": []},
            {"key": keys[2], "boxes": [[0, 0, 10, 10]]},
        ],
    )


def test_a_crop_is_cut_squashed_and_normalised_as_by_hand() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    for released in (False, True):
        settings = MetaTeacherConfig(crops="released" if released else "normalised")
        spec = settings.crop_spec(ImageSpec(size=24))
        found = crop(picture, (5, 10, 20, 40), spec)
        resample = Image.Resampling.BILINEAR if released else Image.Resampling.BICUBIC
        own = vision.to_tensor(picture.crop((10, 5, 50, 25)).resize((24, 24), resample))
        if not released:
            own = vision.normalize(own, list(spec.mean), list(spec.std))
        assert torch.equal(found, own)


def test_stored_embeddings_are_those_of_the_crops(tmp_path: Path) -> None:
    clip = load_model("scenes-teacher", teacher=True)
    store = filled(tmp_path / "store", some_boxes(tmp_path), clip=clip)
    assert store.counts().tolist() == [2, 1, 1, 1, 1]  # whole images where there are no boxes
    for outside in (-1, len(store)):
        with pytest.raises(InputError, match="is not one of its"):
            store.read([0, outside])
    found = store.read([2, 0])
    assert found.mask.tolist() == [[True, False], [True, True]]
    picture = open_pairs(SOURCE).image(0)
    spec = MetaTeacherConfig().crop_spec(clip.image)
    crops = torch.stack([crop(picture, box, spec) for box in ((3, 2, 37, 28), (5, 5, 15, 20))])
    with torch.no_grad():
        own = clip.module.encode_image(crops)
    torch.testing.assert_close(found.embeddings[1], own, rtol=2e-3, atol=2e-3)  # kept as float16
    width, height = picture.size
    assert found.areas[1].tolist() == pytest.approx([28 * 37 / (width * height), 300 / (width * height)])
    assert found.confidences.tolist() == [[1, 0], [0.5, 0.75]]
    assert found.embeddings[0, 1].abs().max() == 0
    whole = store.read([1])
    assert whole.areas.tolist() == [[1.0]]


def test_forms_without_boxes(tmp_path: Path) -> None:
    boxes = some_boxes(tmp_path)
    never = filled(tmp_path / "store", boxes, whole="never")
    found = never.read([1, 0])
    assert found.mask.tolist() == [[True, False], [True, True]]  # released: one zero row
    assert found.embeddings[0].abs().max() == 0
    always = filled(tmp_path / "store", boxes, whole="always")
    assert always.counts().tolist() == [3, 1, 2, 1, 1]
    assert always.read([0]).areas[0, 0] == 1
    assert always.folder != never.folder  # the same root, by what they were made of
    few = filled(tmp_path / "store", boxes, limits=BoxLimits(most=1))
    assert few.read([0]).confidences.tolist() == [[0.75]]


def test_a_store_is_continued_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BLOCK", 2)
    boxes = some_boxes(tmp_path)
    clip = load_model("scenes-teacher", teacher=True)
    calls: list[int] = []
    encode = clip.module.encode_image

    def counting(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if sum(calls) > 4:
            raise KeyboardInterrupt
        return encode(images)

    monkeypatch.setattr(clip.module, "encode_image", counting)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "store", boxes, clip=clip)
    assert sum(calls) == 5  # 3 of the first block, 2 of the second when it ended
    calls.clear()
    monkeypatch.setattr(clip.module, "encode_image", lambda images: calls.append(len(images)) or encode(images))
    store = filled(tmp_path / "store", boxes, clip=clip)
    assert sum(calls) == 3
    assert len(store) == 5
    calls.clear()
    filled(tmp_path / "store", boxes, clip=clip)
    assert not calls
    (store.folder / "block-00001.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="damaged"):
        filled(tmp_path / "store", boxes, clip=clip).read([2])


def test_an_unreadable_image_has_no_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_pairs(SOURCE)
    image = type(source).image

    def broken(self: Any, i: int, at_least: int | None = None) -> Image.Image:
        if i == 4:
            raise BadSample("truncated image", self.key(i))
        return image(self, i, at_least)

    monkeypatch.setattr(type(source), "image", broken)
    store = filled(tmp_path / "store", some_boxes(tmp_path))
    assert store.readable().tolist() == [True, True, True, True, False]
    assert store.read([4]).mask.tolist() == [[False]]


def test_boxes_of_other_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="belongs to other images"):
        filled(tmp_path / "store", boxes_file(tmp_path, [{"key": "x", "boxes": []}]))


def test_what_is_not_finite_is_neither_stored_nor_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load_model("scenes-teacher", teacher=True)
    store = filled(tmp_path / "store", some_boxes(tmp_path), clip=clip)
    (block,) = store.folder.glob("block-*.safetensors")
    header, tensors = stores.Block(block).metadata, stores.Block(block).arrays
    damaged = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    damaged["embeddings"][0, 0] = float("nan")
    stores.BlockFolder(store.folder, what="s", remedy="r").write(
        block.stem, damaged, {name: header[name] for name in ("store", "images")}
    )
    with pytest.raises(InputError, match=r"block-00000\.safetensors: damaged block \(a number is not finite\)"):
        filled(tmp_path / "store", some_boxes(tmp_path), clip=clip).read([0])
    monkeypatch.setattr(clip.module, "encode_image", lambda images: torch.full((len(images), 128), 1e6))
    with pytest.raises(InputError, match="gives NaN or infinite embeddings for regions"):
        filled(tmp_path / "other", some_boxes(tmp_path), clip=clip)
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_a_killed_writers_leftover_is_taken_away_and_a_living_ones_is_not(tmp_path: Path) -> None:
    store = filled(tmp_path / "store", some_boxes(tmp_path))
    old, new = (store.folder / f".block-00000.safetensors.writing-{name}" for name in ("old", "new"))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (1, 1))
    filled(tmp_path / "store", some_boxes(tmp_path))
    assert new.exists()
    assert not old.exists()
