"""Objects of a user's program as data, and formats registered from outside."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipdistill as cd
from clipdistill.data.labelled import LabelledSource
from clipdistill.data.loader import PairLoader
from clipdistill.data.objects import as_pairs, hold
from clipdistill.data.open import is_labelled_name, open_labelled, open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.registry import FORMATS, LABELLED_FORMATS
from tests.data.helpers import FakeModel, MemoryPairs, encoded, picture


@pytest.fixture(autouse=True)
def forget_formats() -> Iterator[None]:
    yield
    for registry in (FORMATS, LABELLED_FORMATS):
        registry._forget("this program")


class Items:
    """A torch Dataset in all but name: item i is what `give(i)` returns."""

    def __init__(self, count: int, give: Callable[[int], Any]) -> None:
        self._count, self._give = count, give

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Any:
        return self._give(i)


@pytest.mark.parametrize(
    "image",
    [
        lambda i, folder: picture(i),
        lambda i, folder: np.asarray(picture(i)),
        lambda i, folder: torch.from_numpy(np.asarray(picture(i)).copy()).permute(2, 0, 1),
        lambda i, folder: encoded(i, "PNG"),
        lambda i, folder: str(folder / f"{i}.png"),
        lambda i, folder: folder / f"{i}.png",
    ],
    ids=["picture", "array", "tensor", "bytes", "text", "path"],
)
@pytest.mark.parametrize("form", ["pair", "captions", "mapping"])
def test_every_form_of_image_and_item_gives_the_same_pixels(tmp_path: Path, image: Any, form: str) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, "PNG"))
    rows: list[Any] = [(image(i, tmp_path), f"caption {i}") for i in range(3)]
    if form == "captions":
        rows = [(one, [text, "another"]) for one, text in rows]
    if form == "mapping":
        rows = [{"image": one, "text": text, "key": f"k{i}"} for i, (one, text) in enumerate(rows)]
    source = as_pairs(rows)
    assert [source.key(i) for i in range(3)] == (["k0", "k1", "k2"] if form == "mapping" else ["0", "1", "2"])
    assert source.captions(2) == (("caption 2", "another") if form == "captions" else ("caption 2",))
    for i in range(3):
        assert np.array_equal(np.asarray(source.image(i)), np.asarray(picture(i)))
    assert pickle.loads(pickle.dumps(source)).image(1).tobytes() == source.image(1).tobytes()


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1), (30, 40, 4)])
def test_arrays_of_other_channels(shape: tuple[int, ...]) -> None:
    assert as_pairs([(np.full(shape, 255, np.uint8), "white")]).image(0).getpixel((3, 3)) == (255, 255, 255)


def test_the_object_itself_is_not_changed() -> None:
    own = picture(1)
    own.info["mine"] = "kept"
    as_pairs([(own, "a picture")]).image(0).paste((0, 0, 0), (0, 0, 40, 30))
    assert own.info == {"mine": "kept"}
    assert own.tobytes() == picture(1).tobytes()


def test_the_methods_of_a_source_are_enough() -> None:
    class Source:
        name = "own"

        def __len__(self) -> int:
            return 2

        def key(self, i: int) -> str:
            return f"k{i}"

        def captions(self, i: int) -> str:
            return f"one string is one caption {i}"

        def image_bytes(self, i: int) -> bytes:
            return encoded(i)

    source = as_pairs(Source())
    assert source.captions(1) == ("one string is one caption 1",)
    assert source.image_bytes(1) == encoded(1)
    assert source.name == "own"
    assert as_pairs(source) is source


def fails_at(*bad: int) -> Callable[[int], Any]:
    def give(i: int) -> Any:
        if i in bad:
            raise KeyError(f"row {i}")
        return picture(i), f"caption {i}"

    return give


def test_errors_of_the_objects_code_are_bad_samples() -> None:
    source = as_pairs(Items(5, fails_at(1, 3)))
    assert [source.key(i) for i in range(3)] == ["0", "2", "4"]
    assert source.problems.dropped == 2
    assert source.problems.counts == {"error of the data object": 2}
    assert source.problems.rows[0] == (
        "item 1", "error of the data object: KeyError: 'row 1' (test_objects.py, line " + _line(source) + ")",
    )  # fmt: skip
    later = as_pairs(Items(3, fails_at()))
    later._data._give = fails_at(1)  # type: ignore[attr-defined]
    with pytest.raises(BadSample, match=r"1: error of the data object: KeyError: 'row 1'"):
        later.image(1)
    loader = PairLoader(later, batch_size=3, student=FakeModel(), steps=1)
    (batch,) = loader
    assert [key for key, _ in batch.problems] == ["1"]
    assert len(batch.keys) == 2


def _line(source: PairSource) -> str:
    return source.problems.rows[0][1].rsplit(" ", 1)[1].rstrip(")")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"data object list: none of its 0 items is an image with a caption"),
        ([(1, "a")], r"item 0: no image: int, expected a PIL picture"),
        ([(np.zeros((4, 4, 3), np.float32), "a")], r"no image: ndarray float32 \(4, 4, 3\)"),
        ([(picture(0), 7)], r"item 0: a caption of the type int, not text"),
        ([("a.jpg",)], r"item 0: tuple, not \(image, caption\)"),
        ([{"picture": 1}], r"item 0: no 'image' with 'caption', but picture"),
        ([(picture(0), " ")], r"item 0: no caption"),
        (iter([(picture(0), "a")]), r"data object list_iterator: it has no length .*list\(\.\.\.\)"),
        (Items(3, lambda i: {"image": picture(i), "caption": "x", "key": "same"}),
         r"data object Items: items 0 and 1 have the same key 'same'"),
        (Items(3, lambda i: (picture(i), f"{np.random.default_rng().random()}")),
         r"data object Items: item 0 has another key or caption when it is asked for again"),
        (Items(2, lambda i: 1 / 0), r"item 0: ZeroDivisionError: division by zero \(test_objects.py, line"),
        (3, r"data object int: it has no length"),
        (DataConfig, r"data: ModelMetaclass .* is no set of image-caption pairs"),
    ],
)  # fmt: skip
def test_an_object_that_is_no_data_is_named(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_pairs(data)


def test_an_object_has_a_name_that_says_what_it_holds() -> None:
    one, same, other = (Items(3, lambda i, word=word: (picture(i), f"{word} {i}")) for word in ("a", "a", "b"))
    assert hold(one) == hold(same) != hold(other)
    assert open_pairs(hold(one)).captions(2) == ("a 2",)
    with pytest.raises(InputError, match=r"'object:Items@0123' was an object of the program that named it \(Items\)"):
        open_pairs("object:Items@0123")
    assert not is_labelled_name(hold(one))


def test_a_format_of_ones_own_is_asked_before_the_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("whatever\n")
    seen: list[DataConfig] = []

    def opens(config: DataConfig) -> Any:
        seen.append(config)
        return [(picture(0), "a caption")]

    cd.register_format("mine", lambda name: name.endswith("mine.csv"), opens)
    source = open_pairs(DataConfig(path=str(tmp_path / "mine.csv"), caption_column="anything"), default_split="train")
    assert source.captions(0) == ("a caption",)
    assert (seen[0].caption_column, seen[0].split) == ("anything", "train")
    with pytest.raises(InputError, match="the data format 'tars' is taken already, by clipdistill itself"):
        cd.register_format("tars", lambda name: True, opens)


@pytest.mark.parametrize("where", ["matches", "open", "result"])
def test_mistakes_of_a_format_are_told_with_its_name(where: str) -> None:
    def matches(name: str) -> bool:
        return bool(1 / 0) if where == "matches" else name == "wrong"

    def opens(config: DataConfig) -> Any:
        return 1 / 0 if where == "open" else 5

    cd.register_format("wrong", matches, opens)
    with pytest.raises(InputError, match=r"^data format 'wrong' of this program") as caught:
        open_pairs("wrong")
    assert ("division by zero (test_objects.py" in str(caught.value)) == (where != "result")


def test_a_format_of_classification_sets() -> None:
    class Two(LabelledSource):
        def _bytes(self, i: int) -> bytes:
            return encoded(i)

    def opens(config: Any) -> LabelledSource:
        return Two(config.path, ["a", "b"], [0, 1], ["cat", "dog"])

    cd.register_format("two", lambda name: name == "two:animals", opens, labelled=True)
    assert is_labelled_name("two:animals")
    assert open_labelled("two:animals").class_names == ("cat", "dog")
    cd.register_format("three", lambda name: name == "three:", lambda config: 3, labelled=True)
    with pytest.raises(InputError, match="format of classification sets 'three' of this program: its open returned"):
        open_labelled("three:")


def test_settings_that_a_format_does_not_apply_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(0))
    (tmp_path / "a.txt").write_text("a caption\n")
    for settings in ({"caption_column": "x"}, {"image_column": "x"}, {"separator": ","}, {"size": 3}, {"seed": 3},
                     {"image_root": "x"}):  # fmt: skip
        (name,) = settings
        with pytest.raises(InputError, match=rf"data\.{name}=.* is not applied to '.*', which is read as folder"):
            open_pairs(DataConfig(path=str(tmp_path), **settings))
    for settings in ({"size": 3}, {"seed": 2}):
        with pytest.raises(InputError, match="contradicts the name 'scenes:val\\?size=4&seed=1': give one of them"):
            open_pairs(DataConfig(path="scenes:val?size=4&seed=1", **settings))
    assert len(open_pairs(DataConfig(path="scenes:val?size=4", size=4, seed=3))) == 4
    with pytest.raises(InputError, match="read as scenes: leave it out"):
        open_pairs(DataConfig(path="scenes", caption_column="words"))


def test_a_source_of_ones_own_is_taken_as_it_is() -> None:
    source = MemoryPairs(3)
    assert as_pairs(source) is source
