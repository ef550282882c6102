"""Hugging Face data sets, saved ones and (with the network replaced) those of the hub."""

from __future__ import annotations

import builtins
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipdistill.data.images import decode
from clipdistill.data.objects import as_pairs
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig
from clipdistill.errors import InputError, MissingExtraError
from tests.data.helpers import FakeModel, encoded


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("datasets")


def dataset(library: Any, count: int = 4, **columns: Any) -> Any:
    content = {
        "image": [{"bytes": encoded(n), "path": None} for n in range(count)],
        "caption": [f"caption {n}" for n in range(count)],
    }
    made = library.Dataset.from_dict(content | columns)
    return made.cast_column("image", library.Image())


def test_saved_data_set(library: Any, tmp_path: Path) -> None:
    dataset(library, caption=["one", "  ", "three", "four"]).save_to_disk(tmp_path / "saved")
    source = open_pairs(str(tmp_path / "saved"))
    assert [source.key(i) for i in range(len(source))] == ["0", "2", "3"]
    assert source.captions(1) == ("three",)
    assert source.image_bytes(1) == encoded(2)
    assert source.problems.counts == {"empty caption": 1, "image without caption": 1}
    assert pickle.loads(pickle.dumps(source)).image_bytes(2) == encoded(3)
    with pytest.raises(InputError, match="has no splits"):
        open_pairs(str(tmp_path / "saved"), split="train")


def test_saved_splits_and_lists_of_captions(library: Any, tmp_path: Path) -> None:
    parts = {"train": dataset(library, 3), "test": dataset(library, 2, caption=[["a", "b"], ["c"]])}
    library.DatasetDict({"train": parts["train"]}).save_to_disk(tmp_path / "one")
    assert len(open_pairs(str(tmp_path / "one"))) == 3
    (tmp_path / "two").mkdir()
    for name, part in parts.items():
        part.save_to_disk(tmp_path / "two" / name)
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_pairs(str(tmp_path / "two"), split="test")
    assert [source.captions(i) for i in range(2)] == [("a", "b"), ("c",)]
    assert source.key(1) == "test/1"
    with pytest.raises(InputError, match=r"holds several splits: train \(3\), test \(2\)"):
        open_pairs(str(tmp_path / "two"))


def test_rows_without_an_image_are_found_when_opened(library: Any, tmp_path: Path) -> None:
    cells = [{"bytes": encoded(n), "path": None} if n % 2 else None for n in range(6)]
    made = dataset(library, 6, image=cells)
    made.select([5, 4, 3]).save_to_disk(tmp_path / "chosen")
    made.save_to_disk(tmp_path / "saved")
    source = open_pairs(str(tmp_path / "saved"))
    assert [source.key(i) for i in range(len(source))] == ["1", "3", "5"]
    assert source.problems.counts == {"row without image": 3}
    assert source.image_bytes(1) == encoded(3)
    chosen = open_pairs(str(tmp_path / "chosen"))
    assert [(chosen.key(i), chosen.captions(i)) for i in range(2)] == [("0", ("caption 5",)), ("2", ("caption 3",))]


def test_a_data_set_is_an_object_that_can_be_given(library: Any) -> None:
    source = as_pairs(dataset(library, 3).shuffle(seed=1))
    assert source.image(0).tobytes() == decode(encoded(int(source.captions(0)[0][-1]))).tobytes()


def test_a_data_set_in_workers(library: Any, tmp_path: Path) -> None:
    from clipdistill.data.loader import PairLoader

    dataset(library).save_to_disk(tmp_path / "saved")
    source = open_pairs(str(tmp_path / "saved"))
    settings: dict[str, Any] = {"batch_size": 4, "student": FakeModel(), "steps": 2}
    alone, shared = (list(PairLoader(source, workers=workers, **settings)) for workers in (0, 1))
    assert [b.keys for b in alone] == [b.keys for b in shared]
    assert all(a.student_images.equal(b.student_images) for a, b in zip(alone, shared))


def test_hub_data_set(library: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(library, "get_dataset_split_names", lambda name: ["train", "validation"])
    monkeypatch.setattr(library, "load_dataset", lambda name, split: dataset(library, 2 if split == "train" else 3))
    assert len(open_pairs("hf:someone/photos", default_split="train")) == 2
    assert "needs the network unless the data are cached here" in caplog.text
    assert len(open_pairs("hf:someone/photos:validation")) == 3
    assert len(open_pairs("hf:someone/photos", split="all")) == 5
    with pytest.raises(InputError, match="has no split 'test'"):
        open_pairs("hf:someone/photos:test")
    with pytest.raises(InputError, match=r"no column 'pictures'; it has: image, caption; set image_column"):
        open_pairs(DataConfig(path="hf:someone/photos:train", image_column="pictures"))


def test_row_36_without_a_network(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> list[str]:
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr(library, "get_dataset_split_names", unreachable)
    with pytest.raises(
        InputError, match=r"'hf:a/b' cannot be had: Couldn't reach the Hub; without a network, only data"
    ):
        open_pairs("hf:a/b")
    for name in ("hf:", "hf:only", "hf:a/b/c", "hf:/b"):
        with pytest.raises(InputError, match="is not the name of a hub data set"):
            open_pairs(name)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"needs the package 'datasets': .*clipdistill\[hf\]"):
        open_pairs("hf:a/b")


def test_decoded_images_are_encoded_bytes_underneath(library: Any, tmp_path: Path) -> None:
    made = library.Dataset.from_dict({"image": [Image.new("RGB", (8, 6), "red")], "text": ["red"]})
    made.save_to_disk(tmp_path / "saved")
    source = open_pairs(str(tmp_path / "saved"))
    assert source.image(0).size == (8, 6)
