"""A region store that version 0.1.0 wrote is read to the bit and found complete; damaged stores say so in a sentence.

tests/kept/regions was made by `fill_store` from scenes:val?size=5, boxes.json and scenes-teacher, two images a block,
whole_image="never"; read.npz is what its `read` gave.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError
from clipdistill.models import load_model
from clipdistill.regions.box_file import BoxFile
from clipdistill.regions.store import RegionStore, fill_store
from clipdistill.train.region_config import BoxLimits, MetaTeacherConfig

KEPT = Path(__file__).parents[1] / "kept" / "regions"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the kept store."""
    shutil.copytree(KEPT, tmp_path / "kept")
    (found,) = (tmp_path / "kept").glob("regions-*")
    return found


def test_the_kept_store_gives_what_it_gave(folder: Path) -> None:
    store = RegionStore(folder)
    batch = store.read(range(5))
    with np.load(KEPT / "read.npz", allow_pickle=False) as wanted:
        for name in ("embeddings", "mask", "areas", "confidences"):
            found = getattr(batch, name).numpy()
            assert found.dtype == wanted[name].dtype
            np.testing.assert_array_equal(found, wanted[name])
        assert store.counts().tolist() == wanted["counts"].tolist()
        assert store.readable().tolist() == wanted["readable"].tolist()


def test_the_kept_store_is_not_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load_model("scenes-teacher", teacher=True)
    spec = MetaTeacherConfig().crop_spec(clip.image)
    boxes = BoxFile(folder.parent / "boxes.json")

    def never(images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the kept store is complete")

    with monkeypatch.context() as patch:
        patch.setattr(clip.module, "encode_image", never)
        store = fill_store(folder.parent, open_pairs("scenes:val?size=5"), boxes, clip, spec, BoxLimits(), "never")
    assert store.folder == folder
    # a block that is missing is made in the new form, beside the old ones
    before = RegionStore(folder).read([2, 3])
    (folder / "block-00001.safetensors").unlink()
    with pytest.raises(InputError, match="incomplete"):
        RegionStore(folder)
    after = fill_store(folder.parent, open_pairs("scenes:val?size=5"), boxes, clip, spec, BoxLimits(), "never")
    torch.testing.assert_close(after.read([2, 3]).embeddings, before.embeddings, rtol=1e-2, atol=1e-2)
    assert torch.equal(after.read([2, 3]).areas, before.areas)


def read_all(folder: Path) -> None:
    RegionStore(folder).read(range(5))


MANIFESTS = (b"", bytes(300), b"[]", b"null", b"3", b'{"format": 1}', b'{"format": 2}', b"\xff\xfe{", b"[" * 5000)
CHANGES: list[dict[str, object]] = [
    {"images": 0}, {"images": -3}, {"images": "five"}, {"images": 10**9}, {"images": None}, {"images": 5.5},
    {"width": 127}, {"width": []}, {"block": 0}, {"block": 3}, {"crops": {"size": "big"}},
    {"limits": {"most": 0}}, {"data_sha256": 3}, {"format": "1"}, {"unknown": 1},
]  # fmt: skip


@pytest.mark.parametrize("content", [*MANIFESTS, *CHANGES], ids=lambda value: str(value)[:40])
def test_a_damaged_manifest_is_one_sentence(folder: Path, content: bytes | dict[str, object]) -> None:
    path = folder / "regions.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_bytes()), **content}).encode()
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def remade(folder: Path) -> Path:
    """The store as this version writes it."""
    clip = load_model("scenes-teacher", teacher=True)
    spec = MetaTeacherConfig().crop_spec(clip.image)
    boxes = BoxFile(folder.parent / "boxes.json")
    root = folder.parent / "new"
    return fill_store(root, open_pairs("scenes:val?size=5"), boxes, clip, spec, BoxLimits(), "never").folder


def test_every_flipped_bit_and_every_cut_is_found(folder: Path) -> None:
    new = remade(folder)
    wanted = RegionStore(new).read(range(5)).embeddings
    generator, refused = np.random.default_rng(0), 0
    for name in ("block-00000.safetensors", "regions.json"):
        path = new / name
        whole = path.read_bytes()
        for place in generator.choice(len(whole), 150, replace=False).tolist():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            try:
                found = RegionStore(new).read(range(5)).embeddings
            except InputError:
                refused += 1
            else:  # a blank, or the name of the field with the header's checksum: nothing that is read has changed
                assert torch.equal(found, wanted), (name, place)
        for length in generator.choice(len(whole), 40, replace=False).tolist():
            path.write_bytes(whole[:length])
            if whole[length:].strip():
                with pytest.raises(InputError):
                    read_all(new)
        path.write_bytes(whole)
    read_all(new)
    assert refused > 240


def test_an_old_block_of_another_shape_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "block-00000.safetensors"
    good = load_file(path)
    rows = len(good["areas"])
    for change in (
        {"embeddings": torch.zeros(rows, 7, dtype=torch.float16)},
        {"embeddings": good["embeddings"].float()},
        {"counts": torch.tensor([5000, 1])},
        {"counts": torch.tensor([-7, rows])},
        {"counts": torch.tensor([2**62, 2**62])},
        {"counts": torch.tensor([rows])},
        {"areas": torch.zeros(rows + 1)},
        {"confidences": torch.zeros(rows, 1)},
        {"more": torch.zeros(1)},
    ):
        save_file({**good, **change}, path)
        with pytest.raises(InputError, match="damaged block"):
            read_all(folder)
    for content in (b"", bytes(64), b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged block"):
            read_all(folder)
