"""Test images do not get into training: found by name in any distribution's form, or by picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdistill.data.held_out import HeldOutConfig, held_out_names, plain_name, without_held_out
from clipdistill.data.ledger import BadSampleLedger
from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError
from clipdistill.train.config import resolve
from clipdistill.train.sources import SharedSources, Sources
from tests.conftest import shared_folder


def picture(seed: int) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((90, 60), Image.Resampling.BICUBIC)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """train.csv with images 0 to 5, and a Karpathy file whose test split has 1 and 4 under COCO's old names."""
    rows = ["filepath,title"]
    for number in range(6):
        picture(number).save(tmp_path / f"{number:012d}.jpg", quality=95)
        rows.append(f"{number:012d}.jpg,picture {number}")
    (tmp_path / "train.csv").write_text("\n".join(rows))
    entries = [
        {
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "filepath": "val2014",
            "split": split,
            "sentences": [{"raw": "a"}],
        }
        for number, split in ((1, "test"), (4, "test"), (2, "val"), (77, "test"))
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": entries}))
    return tmp_path


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("val2014/COCO_val2014_000000391895.jpg", "000000391895"),
        ("000000391895.jpg", "000000391895"),
        ("train2017/000000391895.png", "000000391895"),
        ("1000268201_693b08cb0e.jpg", "1000268201_693b08cb0e"),
    ],
)
def test_names_of_one_photograph(key: str, plain: str) -> None:
    assert plain_name(key) == plain


def test_overlap_is_an_error_or_left_out_and_counted(files: Path) -> None:
    source = open_pairs(str(files / "train.csv"))
    config = HeldOutConfig(data=str(files / "karpathy.json"))
    with pytest.raises(InputError, match=r"2 of 6 training images .*000000000001\.jpg.*held_out\.action=drop"):
        without_held_out(source, config)
    kept = without_held_out(source, HeldOutConfig(data=config.data, action="drop"))
    assert [kept.key(i) for i in range(len(kept))] == [f"{n:012d}.jpg" for n in (0, 2, 3, 5)]
    assert kept.problems.summary() == "2 image of the held-out split"
    assert kept.fingerprint() != source.fingerprint()
    # left out on purpose: no bad samples, whatever the budget
    ledger = BadSampleLedger(files / "bad.jsonl", 0.0)
    ledger.record_opening(kept.problems, len(kept))
    assert ledger.bad == 0
    assert len((files / "bad.jsonl").read_text().splitlines()) == 2
    other = HeldOutConfig(data=config.data, split="val", action="drop")
    assert len(without_held_out(source, other)) == 5


def test_nothing_in_common_changes_nothing(files: Path) -> None:
    source = open_pairs(str(files / "train.csv"))
    names = files / "names.txt"
    names.write_text("COCO_val2014_000000000999.jpg\n\n")
    assert without_held_out(source, HeldOutConfig(data=str(names))) is source


def test_pictures_under_other_names_are_found(files: Path) -> None:
    """Resized and compressed anew: neither name nor bytes are the same."""
    test = files / "other"
    test.mkdir()
    picture(3).resize((45, 30)).save(test / "renamed.jpg", quality=70)
    picture(50).save(test / "000000000099.jpg")
    (test / "pairs.csv").write_text("filepath,title\nrenamed.jpg,a\n000000000099.jpg,b\n")
    source = open_pairs(str(files / "train.csv"))
    by_name = HeldOutConfig(data=str(test / "pairs.csv"), split="all", action="drop")
    assert without_held_out(source, by_name) is source
    kept = without_held_out(source, by_name.model_copy(update={"compare": "pictures"}))
    assert [kept.key(i) for i in range(len(kept))] == [f"{n:012d}.jpg" for n in (0, 1, 2, 4, 5)]


def test_refusals(files: Path) -> None:
    with pytest.raises(InputError, match="no split 'tset'; it holds test, val"):
        held_out_names(HeldOutConfig(data=str(files / "karpathy.json"), split="tset"))
    names = files / "names.txt"
    names.write_text("\n".join(f"{number:012d}.jpg" for number in range(6)))
    with pytest.raises(InputError, match="nothing is left"):
        without_held_out(open_pairs(str(files / "train.csv")), HeldOutConfig(data=str(names), action="drop"))


def test_a_run_opens_its_data_without_them(files: Path) -> None:
    settings = {"data": str(files / "train.csv"), "student": "scenes-student", "out": str(files / "run")}
    config = resolve("clip", settings, assignments=[f"held_out.data={files / 'karpathy.json'}", "held_out.action=drop"])
    shared = SharedSources()
    for sources in (Sources(), shared):
        assert len(sources.training(config)) == 4
    plain = config.model_copy(update={"held_out": None})
    assert len(shared.training(plain)) == 6
    refusing = resolve("clip", settings, assignments=[f"held_out.data={files / 'karpathy.json'}"])
    with pytest.raises(InputError, match="held-out"):
        Sources().training(refusing)


def test_flickr8k_splits_have_no_image_in_common() -> None:
    path = shared_folder("data/flickr8k") / "dataset_flickr8k.json"
    source = open_pairs(str(path), split="val")
    assert without_held_out(source, HeldOutConfig(data=str(path), split="train")) is source
    with pytest.raises(InputError, match="1000 of 1000"):
        without_held_out(source, HeldOutConfig(data=str(path), split="val"))
