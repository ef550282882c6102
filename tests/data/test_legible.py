"""Text that no tokenizer keeps (NUL, control characters, half characters, nothing but invisible ones), wherever text
enters: counted where captions are read, refused where somebody means it as it stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import clipdistill as cd
from clipdistill.cache.synthetic import read_synthetic
from clipdistill.data.captions import LONGEST, clean, require_legible
from clipdistill.data.mixture.texts import open_texts
from clipdistill.data.open import open_labelled, open_pairs
from clipdistill.data.pairs import DataConfig
from clipdistill.data.templates import check_templates, templates
from clipdistill.errors import InputError
from clipdistill.evaluate.balanced import _read
from clipdistill.evaluate.matching import open_matching
from clipdistill.search.collection import Collection
from clipdistill.serve.bodies import RequestRefused, check_texts
from tests.data.helpers import encoded, write_tar

SPOILED = {
    "nul": ("do\0g", "control characters"),
    "control": ("do\x08g", "control characters"),
    "bom": ("a\ufeffdog", "control characters"),
    "half": ("do\ud83dg", "undecodable characters"),
    "replaced": ("do\ufffdg", "undecodable characters"),
    "no character": ("do\uffffg", "undecodable characters"),
    "zero width": ("\u200b\u200d", "invisible"),
    "braille blank": ("\u2800", "invisible"),
}
WHOLE = ("größe", "a\tdog", "\U0001f468\u200d\U0001f467", "\u05d0\u200f", "x\u2028y", "a" * (LONGEST + 5), "")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "indexes"))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize("kind", SPOILED)
def test_what_cannot_be_read_is_named(kind: str) -> None:
    text, what = SPOILED[kind]
    with pytest.raises(InputError, match=f"^here: .* holds .*{what}.*: take them out$"):
        require_legible(text, "here")
    assert clean(text)[1]


def test_what_can_be_read_stays() -> None:
    for text in WHOLE:
        require_legible(text, "here")


# ---- refused where it is meant as it stands


def classes(folder: Path, text: str) -> None:
    for name in ("a", "b"):
        (folder / "set" / name).mkdir(parents=True)
        (folder / "set" / name / "0.jpg").write_bytes(encoded(0))
    open_labelled(folder / "set", classes=write(folder / "names.txt", f"cat\n{text}\n"))


def classes_in_json(folder: Path, text: str) -> None:
    for name in ("a", "b"):
        (folder / "set" / name).mkdir(parents=True)
        (folder / "set" / name / "0.jpg").write_bytes(encoded(0))
    open_labelled(folder / "set", classes=write(folder / "names.json", json.dumps({"a": "cat", "b": text})))


def class_folder(folder: Path, text: str) -> None:
    for name in ("a", text):
        (folder / "set" / name).mkdir(parents=True)
        (folder / "set" / name / "0.jpg").write_bytes(encoded(0))
    open_labelled(folder / "set")


def sugar_crepe(folder: Path, text: str) -> None:
    (folder / "a.jpg").write_bytes(encoded(0))
    entry = {"filename": "a.jpg", "caption": "a cat", "negative_caption": f"x {text}"}
    path = folder / "add_att.json"
    path.write_text(json.dumps({"0": entry}))
    open_matching(str(path))


def served(folder: Path, text: str) -> None:
    try:
        check_texts(["a cat", text], "text", 9)
    except RequestRefused as error:
        raise InputError(error.text) from error


MEANT: dict[str, Callable[[Path, str], object]] = {
    "classes": classes,
    "classes in JSON": classes_in_json,
    "class folder": class_folder,
    "templates": lambda folder, text: templates(str(write(folder / "t.txt", f"a {{}}\n{text} {{}}\n"))),
    "given templates": lambda folder, text: check_templates([f"{{}} {text}"], "here"),
    "auxiliary prompts": lambda folder, text: _read(str(write(folder / "p.txt", f"a cat\n{text}\n"))),
    "sugar crepe": sugar_crepe,
    "query": lambda folder, text: Collection.ask_text(object.__new__(Collection), text),
    "texts": lambda folder, text: cd.embed_to_file(
        "scenes-teacher", None, folder / "e.npy", texts=["a cat", text], progress=False
    ),
    "file of texts": lambda folder, text: cd.embed_to_file(
        "scenes-teacher", None, folder / "e.npy", texts=write(folder / "t.txt", f"a cat\n{text}\n"), progress=False
    ),
    "request": served,
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("entrance", MEANT)
def test_it_is_refused_where_somebody_means_it(entrance: str, kind: str, tmp_path: Path) -> None:
    text, what = SPOILED[kind]
    if entrance == "class folder" and kind in ("nul", "half"):
        pytest.skip("no folder can be called that")
    if entrance in ("templates", "given templates", "sugar crepe") and what == "invisible":
        pytest.skip("there are letters beside it")
    with pytest.raises(InputError, match=rf"{what}|is not text in UTF-8|is blank|is empty|undecodable") as caught:
        MEANT[entrance](tmp_path, text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


# ---- counted where captions are read


def beside(folder: Path, text: str) -> object:
    (folder / "s").mkdir()
    for number, own in enumerate(("a cat", text)):
        (folder / "s" / f"{number}.jpg").write_bytes(encoded(number))
        write(folder / "s" / f"{number}.txt", own)
    return open_pairs(str(folder / "s"))


def table(folder: Path, text: str) -> object:
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    return open_pairs(str(write(folder / "t.csv", f"filepath,title\n0.jpg,a cat\n1.jpg,{text}\n")))


def parquet(folder: Path, text: str) -> object:
    captions = [b"a cat", text.encode("utf-8", "surrogatepass")]
    pq.write_table(pa.table({"image": [encoded(0), encoded(1)], "caption": captions}), folder / "t.parquet")
    return open_pairs(str(folder / "t.parquet"))


def tar(folder: Path, text: str, ending: str) -> object:
    members = []
    for number, own in enumerate(("a cat", text)):
        content = own.encode("utf-8", "surrogatepass") if ending == "txt" else json.dumps({"caption": own}).encode()
        members += [(f"{number}.jpg", encoded(number)), (f"{number}.{ending}", content)]
    return open_pairs(str(write_tar(folder / "t.tar", members)))


def document(folder: Path, text: str, form: str) -> object:
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    images = [{"id": k, "file_name": f"{k}.jpg", "filename": f"{k}.jpg", "split": "train"} for k in range(2)]
    content: dict[str, object] = {"images": images}
    if form == "coco":
        content["annotations"] = [{"image_id": k, "caption": own} for k, own in enumerate(("a cat", text))]
    else:
        images = [{**image, "sentences": [{"raw": own}]} for image, own in zip(images, ("a cat", text))]
        content = {"images": images}
    return open_pairs(str(write(folder / "captions.json", json.dumps(content))))


READ: dict[str, Callable[[Path, str], object]] = {
    "folder": beside,
    "table": table,
    "parquet": parquet,
    "tar, txt": lambda folder, text: tar(folder, text, "txt"),
    "tar, json": lambda folder, text: tar(folder, text, "json"),
    "karpathy": lambda folder, text: document(folder, text, "karpathy"),
    "coco": lambda folder, text: document(folder, text, "coco"),
    "texts": lambda folder, text: open_texts(DataConfig(path=str(write(folder / "t.txt", f"a cat\n{text}\n")))),
}


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("form", READ)
def test_it_is_counted_where_captions_are_read(form: str, kind: str, tmp_path: Path) -> None:
    text, what = SPOILED[kind]
    if form == "texts" and kind == "half":
        with pytest.raises(InputError, match="UTF-8"):
            READ[form](tmp_path, text)
        return
    if form == "table" and kind == "nul":
        with pytest.raises(InputError, match="is no text, since it holds NUL bytes"):
            READ[form](tmp_path, text)
        return
    source = READ[form](tmp_path, text)
    assert any(what in reason for reason in source.problems.counts), source.problems.counts
    assert source.captions(0) == ("a cat",)
    assert len(source) == (1 if what == "invisible" else 2)
    if what != "invisible":
        require_legible(source.captions(1)[0], "here")


@pytest.mark.parametrize("kind", SPOILED)
def test_it_is_counted_in_added_captions(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text, what = SPOILED[kind]
    path = tmp_path / "added.json"
    path.write_text(json.dumps({"k": ["a cat", text]}))
    found = read_synthetic(path)["k"]
    assert found[0] == "a cat"
    assert len(found) == (1 if what == "invisible" else 2)
    assert what in caplog.text
