"""Known classification sets: labels, names, templates, expected counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipdistill.data.class_names import (
    KNOWN_SETS,
    class_labels,
    class_names,
    deviation,
    imagenet_names,
    imagenet_wnids,
    read_labels,
    readable,
    recognise,
)
from clipdistill.data.templates import TEMPLATE_SETS, fill, templates
from clipdistill.errors import InputError
from tests.conftest import shared_folder


@pytest.mark.parametrize("name", KNOWN_SETS)
def test_known_sets_are_complete(name: str) -> None:
    known, labels, names = KNOWN_SETS[name], class_labels(name), class_names(name)
    assert len(labels) in (known.classes, *known.also_classes)
    assert len(set(labels)) == len(labels) == len(names)
    assert all(text and text == text.strip() and "_" not in text for text in names)
    # ImageNet's curated list calls two classes "missile" and two "sunglasses"
    assert len(names) - len(set(names)) == (2 if known.classes == 1000 else 0)
    assert templates(known.templates)
    assert known.title in str(known)


def test_imagenet_order_agrees_with_another_source() -> None:
    classes = json.loads((shared_folder("data/imagenet_sample") / "classes.json").read_text())
    assert [entry["wnid"] for entry in classes] == list(imagenet_wnids())
    same = sum(entry["name"].split()[-1].lower() in name.lower() for entry, name in zip(classes, imagenet_names()))
    assert same > 700


def test_imagenet_subsets() -> None:
    """Spot checks against the lists that the sets' authors publish."""
    r, a = class_labels("imagenet-r"), class_labels("imagenet-a")
    assert (r[0], r[1], r[-1]) == ("n01443537", "n01484850", "n12267677")
    assert class_names("imagenet-a")[:4] == ("stingray", "goldfinch", "junco", "American robin")
    assert set(r) != set(a)
    assert list(r) == sorted(r)
    assert set(r) | set(a) <= set(imagenet_wnids())


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("apple_pie", "apple pie"),
        ("AnnualCrop", "annual crop"),
        ("River", "river"),
        ("a/apartment_building/outdoor", "outdoor apartment building"),
        ("a/abbey", "abbey"),
        ("apse/indoor", "indoor apse"),
        ("Boeing 747-400", "Boeing 747-400"),
        ("English springer", "English springer"),
    ],
)
def test_readable(label: str, name: str) -> None:
    assert readable(label) == name


def test_labels_are_read_by_their_kind() -> None:
    assert read_labels(["n01440764", "n01443537"]) == ("tench", "goldfish")
    assert read_labels(["SeaLake", "Forest"], "eurosat") == ("sea or lake", "forest")
    assert read_labels(["SeaLake", "Forest"]) == ("sea lake", "forest")


def test_recognition() -> None:
    assert recognise(class_labels("cifar10"), 5000) == "cifar10"
    assert recognise(class_names("food101"), 7) == "food101"
    assert recognise(class_labels("caltech101")[1:], 8677) == "caltech101"
    assert recognise(class_labels("imagenet-r"), 30_000) == "imagenet-r"
    assert recognise(imagenet_wnids(), 50_889) == "imagenet-sketch"
    assert recognise(imagenet_wnids(), 500) is None
    assert recognise(imagenet_wnids()[:10], 500) is None
    assert recognise(["cat", "dog"], 10) is None


def test_deviation() -> None:
    assert deviation("cifar10", 10_000, 10) is None
    assert deviation("caltech101", 9_144, 102) is None
    assert deviation("sun397", 19_850, 397) is None
    assert "19,850 images where the test split has 21,750" in str(deviation("sun397", 19_850, 397, "test"))
    assert "5,000 images where 10,000 (test) are expected" in str(deviation("cifar10", 5000, 10))
    assert "9 classes where 10 are expected" in str(deviation("cifar10", 10_000, 9))


def test_unknown_set() -> None:
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        class_labels("cifar-10")


# ---- templates


@pytest.mark.parametrize("name", TEMPLATE_SETS)
def test_named_templates_hold_one_place(name: str) -> None:
    assert all(text.count("{}") == 1 for text in templates(name))
    assert len(set(templates(name))) == len(templates(name))


def test_open_clips_templates() -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    assert len(templates("imagenet")) == 80
    assert len(templates("simple")) == 7
    assert [fill(t, "cat") for t in templates("imagenet")] == [t("cat") for t in OPENAI_IMAGENET_TEMPLATES]


def test_fill_takes_any_name() -> None:
    assert fill("a photo of {}.", "{}") == "a photo of {}."
    assert fill("a photo of {}.", "a {curly} thing") == "a photo of a {curly} thing."


def test_templates_from_files(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("# mine\na photo of {}.\n\nan x-ray of {c}.\n")
    assert templates(str(tmp_path / "own.txt")) == ("a photo of {}.", "an x-ray of {}.")
    (tmp_path / "sets.json").write_text(json.dumps({"a": ["one {c}"], "b": ["two {c}", "three {c}"]}))
    assert templates(f"{tmp_path / 'sets.json'}#b") == ("two {}", "three {}")
    (tmp_path / "list.json").write_text(json.dumps(["four {}"]))
    assert templates(str(tmp_path / "list.json")) == ("four {}",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no place\n", r"template 1: 'no place' must hold exactly one \{\}"),
        ("{} and {}\n", "exactly one"),
        ("a {name}\n", "exactly one"),
        ("\n\n", "no prompt template"),
    ],
)
def test_bad_template_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        templates(str(path))


def test_bad_template_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'imagenet'"):
        templates("imagnet")
    with pytest.raises(InputError, match="no such file"):
        templates(str(tmp_path / "missing.txt"))
    (tmp_path / "sets.json").write_text(json.dumps({"cifar10": ["{}"]}))
    with pytest.raises(InputError, match="several template sets"):
        templates(str(tmp_path / "sets.json"))
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        templates(f"{tmp_path / 'sets.json'}#cifar1")
