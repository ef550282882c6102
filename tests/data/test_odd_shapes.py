"""Odd but legal shapes of text, JSON, tars, archives and tables: read as what they say, counted, or one sentence."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdistill.data.held_out import HeldOutConfig, without_held_out
from clipdistill.data.mixture.pictures import open_pictures
from clipdistill.data.open import open_labelled, open_pairs
from clipdistill.data.templates import templates
from clipdistill.errors import InputError
from clipdistill.evaluate.balanced import _read
from clipdistill.evaluate.matching import open_matching
from clipdistill.runtime.files import lines_of, text_lines
from tests.data.helpers import encoded, sample_members, write_tar

NO_ENDS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
"""What str.splitlines takes for the end of a line, and no system does."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "indexes"))


def picture_file(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number))
    return path


# ---- lines


def caption_beside(folder: Path, text: bytes) -> list[str]:
    picture_file(folder / "a.jpg")
    (folder / "a.txt").write_bytes(text)
    return list(open_pairs(str(folder)).captions(0))


def class_file(folder: Path, text: bytes) -> list[str]:
    for number, name in enumerate(("a", "b")):
        picture_file(folder / "set" / name / "1.jpg", number)
    (folder / "names.txt").write_bytes(text)
    return list(open_labelled(folder / "set", classes=folder / "names.txt").class_names)


def template_file(folder: Path, text: bytes) -> list[str]:
    (folder / "t.txt").write_bytes(text.replace(b"one", b"one {}").replace(b"two", b"two {}"))
    return [line.replace(" {}", "") for line in templates(str(folder / "t.txt"))]


def prompt_file(folder: Path, text: bytes) -> list[str]:
    (folder / "p.txt").write_bytes(text)
    return list(_read(str(folder / "p.txt")))


READERS = {"captions": caption_beside, "classes": class_file, "templates": template_file, "prompts": prompt_file}


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "dos", "mac"])
@pytest.mark.parametrize("reader", READERS)
def test_lines_end_where_any_system_ends_them_and_nowhere_else(
    reader: str, end: str, start: str, tmp_path: Path
) -> None:
    for number, odd in enumerate(NO_ENDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = READERS[reader](folder, f"{start}one{odd}x{end}two{end}".encode())
        assert len(found) == 2, repr(odd)
        assert found[0].startswith("one")
        assert found[1] == "two"


def test_lines_of_a_text() -> None:
    assert lines_of("") == []
    assert lines_of("a") == lines_of("a\n") == ["a"]
    assert lines_of("\n\r\na\r\rb") == ["", "", "a", "", "b"]


def test_a_text_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("größe\r\nb".encode("utf-16"))
    assert text_lines(tmp_path / "t.txt") == ["größe", "b"]
    (tmp_path / "t.txt").write_bytes("größe".encode("latin-1"))
    for name, words in (("t.txt", "is not text in UTF-8"), (".", "cannot be read"), ("no", "cannot be read")):
        with pytest.raises(InputError, match=rf"^class names '.*': {words}"):
            text_lines(tmp_path / name, f"class names '{tmp_path / name}'")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "bom"])
def test_a_held_out_list_of_any_editor_and_system_is_held_out(form: str, start: str, tmp_path: Path) -> None:
    """A first line behind a byte order mark, or a name composed in another way, would stay in training."""
    names = [unicodedata.normalize("NFC", f"größe{number}.jpg") for number in range(3)]
    for number, name in enumerate(names):
        picture_file(tmp_path / name, number)
    table = "".join(f"{name},a picture\n" for name in names)
    (tmp_path / "t.csv").write_text(f"filepath,title\n{table}")
    listed = "\r\n".join(unicodedata.normalize(form, name) for name in names[:2])
    (tmp_path / "held.txt").write_bytes((start + listed).encode())
    source = without_held_out(
        open_pairs(str(tmp_path / "t.csv")), HeldOutConfig(data=str(tmp_path / "held.txt"), action="drop")
    )
    assert [source.key(i) for i in range(len(source))] == names[2:]


# ---- JSON


def karpathy(folder: Path, text: str) -> object:
    (folder / "x.json").write_text(text)
    return open_pairs(str(folder / "x.json"))


def class_json(folder: Path, text: str) -> object:
    (folder / "x.json").write_text(text)
    return open_labelled(folder / "set", classes=folder / "x.json")


TWICE = {
    "karpathy": (karpathy, '{"images": [{"filename": "a.jpg", "sentences": ["x"]}], "images": []}'),
    "a sentence of karpathy's": (karpathy, '{"images": [{"filename": "a.jpg", "sentences": ["x"], "sentences": []}]}'),
    "coco": (karpathy, '{"images": [], "annotations": [], "images": [{"id": 1}]}'),
    "class names": (class_json, '{"a": "dog", "a": "cat"}'),
}


@pytest.mark.parametrize("what", TWICE)
def test_a_key_that_stands_twice_is_refused_in_documents_of_users_too(what: str, tmp_path: Path) -> None:
    picture_file(tmp_path / "a.jpg")
    picture_file(tmp_path / "set" / "a" / "1.jpg")
    read, text = TWICE[what]
    with pytest.raises(InputError, match=r"the key '.*' stands twice"):
        read(tmp_path, text)


def test_a_key_twice_in_the_json_of_a_tar_is_counted(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "s.tar", [*sample_members(0), ("a.jpg", encoded(1)), ("a.json", b'{"caption": "x", "caption": "y"}')]
    )
    source = open_pairs(str(tmp_path / "s.tar"))
    assert len(source) == 1
    assert source.problems.counts["unreadable json"] == 1


def test_a_key_twice_in_lines_of_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").write_text('{"image_0": "a", "image_0": "b"}\n')
    with pytest.raises(InputError, match=r"line 1: not JSON \(the key 'image_0' stands twice\)"):
        open_matching(str(tmp_path / "examples.jsonl"))


CLASSES = {
    '{"dog": 0, "cat": 0}': "more than one class has the index 0",
    '{"0": "dog", "00": "cat"}': "more than one class has the index 0",
    '[{"index": 0, "name": "dog"}, {"index": 0, "name": "cat"}]': "more than one class has the index 0",
    '[{"index": 0, "name": ["tench", "Tinca"]}, {"index": 1, "name": "cat"}]': "expected texts",
    '[{"index": 0, "name": null}, {"index": 1, "name": "cat"}]': "expected texts",
    '[{"index": 0.9, "name": "dog"}, {"index": 1, "name": "cat"}]': "expected texts",
    '[{"index": true, "name": "dog"}, {"index": 0, "name": "cat"}]': "expected texts",
    '{"dog": 0, "cat": 2}': "none has the index 1",
}


@pytest.mark.parametrize("text", CLASSES)
def test_class_names_that_say_two_things_are_refused(text: str, tmp_path: Path) -> None:
    for number, name in enumerate(("0", "1")):
        picture_file(tmp_path / "set" / name / "1.jpg", number)
    with pytest.raises(InputError, match=CLASSES[text]):
        class_json(tmp_path, text)


# ---- tars


def linked(path: Path, kind: bytes, name: str) -> Path:
    """A tar of two samples, in the second of which `name` is a link to the first's."""
    with tarfile.open(path, "w") as archive:
        for member, content in [*sample_members(0), *sample_members(1)]:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            if member == name:
                info.type, info.linkname, info.size = kind, name.replace("000001", "000000"), 0
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
@pytest.mark.parametrize("name", ["000001.jpg", "000001.txt"])
def test_links_in_tars_are_counted(kind: bytes, name: str, tmp_path: Path) -> None:
    source = open_pairs(str(linked(tmp_path / "s.tar", kind, name)))
    assert len(source) == 1
    assert ("s/" + name, "link inside an archive") in source.problems.rows
    assert source.problems.dropped == 1
    again = open_pairs(str(tmp_path / "s.tar"))  # remembered
    assert again.problems.counts == source.problems.counts


def test_links_and_sparse_files_in_tars_of_classes_and_of_pictures_are_counted(tmp_path: Path) -> None:
    members = [("0.jpg", encoded(0)), ("0.cls", b"0"), ("1.jpg", encoded(1)), ("1.cls", b"1")]
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            if member == "1.jpg":
                info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "1.jpg"}
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert open_labelled(tmp_path / "s.tar").problems.counts == {
        "sparse file inside an archive": 1,
        "sample without image": 1,
    }
    assert open_pictures(str(tmp_path / "s.tar")).problems.counts["sparse file inside an archive"] == 1


# ---- arrays


def arrays(path: Path, **more: object) -> Path:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.savez(path, **{"images": images, "labels": np.array([0, 1]), "classnames": np.array(["dog", "cat"]), **more})
    return path


LEGAL = {
    "bytes": {"classnames": np.array([b"dog", "kätzchen".encode()])},
    "numbers": {"classnames": np.array([3, 7])},
    "big-endian labels": {"labels": np.array([0, 1], dtype=">i8")},
    "small labels": {"labels": np.array([0, 1], dtype=np.uint8)},
    "columns first": {"images": np.asfortranarray(np.zeros((2, 4, 5, 3), dtype=np.uint8))},
}


@pytest.mark.parametrize("shape", LEGAL)
def test_arrays_of_any_layout_are_read(shape: str, tmp_path: Path) -> None:
    source = open_labelled(arrays(tmp_path / "x.npz", **LEGAL[shape]))
    names = {"bytes": ("dog", "kätzchen"), "numbers": ("3", "7")}.get(shape, ("dog", "cat"))
    assert source.class_names == names
    assert [source.label(i) for i in range(2)] == [0, 1]
    assert source.image(0).size == (5, 4)


@pytest.mark.parametrize("names", [[1.5, np.nan], [True, False], [b"\xff", b"x"]], ids=["floats", "truth", "latin"])
def test_class_names_of_arrays_that_are_no_texts_are_refused(names: list[object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'classnames' (must be texts|holds bytes that are not UTF-8)"):
        open_labelled(arrays(tmp_path / "x.npz", classnames=np.array(names)))


def test_exchanged_pixels_of_an_archive_change_what_a_set_is_known_by(tmp_path: Path) -> None:
    before = open_pictures(str(arrays(tmp_path / "x.npz"))).images_fingerprint()
    after = open_pictures(str(arrays(tmp_path / "x.npz", images=np.zeros((2, 4, 5, 3), np.uint8)))).images_fingerprint()
    assert before != after
    assert open_labelled(tmp_path / "x.npz").images_fingerprint() == after


# ---- splits


def as_karpathy(folder: Path, splits: list[str | None]) -> Path:
    entries = [
        {"filename": f"{n}.jpg", "sentences": ["x"]} | ({} if split is None else {"split": split})
        for n, split in enumerate(splits)
    ]
    (folder / "x.json").write_text(json.dumps({"images": entries}))
    return folder / "x.json"


def as_csv(folder: Path, splits: list[str | None]) -> Path:
    rows = [f"{n}.jpg,x,{split or ''}" for n, split in enumerate(splits)]
    (folder / "x.csv").write_text("\n".join(["filepath,title,split", *rows]))
    return folder / "x.csv"


def as_parquet(folder: Path, splits: list[str | None]) -> Path:
    columns = {"filepath": [f"{n}.jpg" for n in range(len(splits))], "title": ["x"] * len(splits), "split": splits}
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder / "x.parquet"


def as_cells(folder: Path, splits: list[str | None]) -> Path:
    columns = {"image": [encoded(n) for n in range(len(splits))], "title": ["x"] * len(splits), "split": splits}
    pq.write_table(pa.table(columns), folder / "y.parquet")
    return folder / "y.parquet"


@pytest.mark.parametrize("write", [as_karpathy, as_csv, as_parquet, as_cells])
def test_what_belongs_to_no_split_is_counted_where_one_is_chosen(write, tmp_path: Path) -> None:
    for number in range(5):
        picture_file(tmp_path / f"{number}.jpg", number)
    path = str(write(tmp_path, ["train", "train", "val", None, None]))
    source = open_pairs(path, default_split="train")
    assert len(source) == 2
    assert source.problems.counts == {"image without a split": 2}
    assert open_pairs(path, split="val").problems.counts == {"image without a split": 2}
    whole = open_pairs(path, split="all")
    assert (len(whole), whole.problems.counts) == (5, {})
    with pytest.raises(InputError, match=r"it holds train \(2\), val \(1\), without a split \(2\)"):
        open_pairs(path, split="test")
    one = str(write(tmp_path, ["train", "train", None, None, None]))
    assert len(open_pairs(one, default_split="train")) == 2
    with pytest.raises(InputError, match="holds several splits"):
        open_pairs(one, default_split="val")
    none = open_pairs(str(write(tmp_path, [None] * 5)))
    assert (len(none), none.name) == (5, Path(none.name).name)


@pytest.mark.parametrize("name", ["x.csv:train", "scenes:val", "cifar10:train", "hf:owner/name:train"])
def test_a_split_beside_another_in_the_name_is_refused(name: str, tmp_path: Path, monkeypatch) -> None:
    """The one in the name used to be passed over."""
    if name.startswith("hf:"):
        pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPDISTILL_DATA", str(tmp_path))
    as_csv(tmp_path, ["train", "test"])
    for number in range(2):
        picture_file(tmp_path / f"{number}.jpg", number)
        picture_file(tmp_path / "cifar10" / f"class {number}" / "1.jpg", number)
    opened = open_labelled if name.startswith("cifar") else open_pairs
    with pytest.raises(InputError, match=r"names the split '\w+', and split='test' is given too"):
        opened(name, split="test")


def test_a_split_of_built_in_classes_is_refused() -> None:
    with pytest.raises(InputError, match="has no splits"):
        open_labelled("scenes:zeroshot", split="val")


NAMES = {
    "scenes:val?size=4&size=5": "the setting 'size' stands twice",
    "scenes:val?size=4&size=4": "the setting 'size' stands twice",
    "scenes:val?size=": "the setting 'size' has no value",
    "scenes:val?size": "the setting 'size' has no value",
    "scenes:val?sise=4": "unknown setting 'sise'",
    "examples.jsonl?images=a&images=b": "the setting 'images' stands twice",
    "examples.jsonl?images=": "the setting 'images' has no value",
    "hf:owner/name?label=a&label=b": "the setting 'label' stands twice",
    "hf:owner/name?split=": "the setting 'split' has no value",
}


@pytest.mark.parametrize("name", NAMES)
def test_settings_in_a_name_stand_once_and_say_something(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples.jsonl").write_text("{}\n")
    if name.startswith("hf:"):
        pytest.importorskip("datasets")
    opened = {"s": open_pairs, "e": open_matching, "h": open_labelled}[name[0]]
    with pytest.raises(InputError, match=NAMES[name]):
        opened(name)


# ---- keys


def test_keys_of_files_of_one_name_differ(tmp_path: Path) -> None:
    """Results query by query, lists of bad samples and files of embeddings are told apart by the key alone."""
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", [("x.jpg", encoded(number)), ("x.cls", b"0"), ("x.txt", b"a dog")])
    (tmp_path / "classes.txt").write_text("dog\n")
    (tmp_path / "tables").mkdir()
    for name in ("x.parquet", "x.pq"):
        pq.write_table(pa.table({"image": [encoded(0)], "caption": ["a dog"]}), tmp_path / "tables" / name)
    for source in (
        open_labelled(str(tmp_path / "{a,b}" / "0.tar")),
        open_pairs(str(tmp_path / "{a,b}" / "0.tar")),
        open_pairs(str(tmp_path / "tables")),
    ):
        assert len({source.key(i) for i in range(len(source))}) == len(source) == 2
