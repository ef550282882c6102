"""Published sets by name, CLIP_benchmark's tars, Crossmodal-3600 and XTD: small sets of the same shape."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.data.benchmarks import places
from clipdistill.data.class_names import KNOWN_SETS
from clipdistill.data.open import check_evaluated_name, is_labelled_name, open_labelled, open_pairs, parts_of
from clipdistill.errors import InputError
from tests.conftest import shared_folder
from tests.data.helpers import encoded, write_tar
from tests.data.test_labelled import make_folder, make_npz
from tests.remote.servers import WebServer


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """An empty folder of fetched sets, and the current folder empty as well."""
    monkeypatch.setenv("CLIPDISTILL_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "indexes"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "sets"


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def webdataset(folder: Path, shards: int = 2, *, kind: str | None = None, split: str = "test") -> Path:
    """Three samples a shard as clip_benchmark.webdataset_builder writes them."""
    (folder / split).mkdir(parents=True)
    for shard in range(shards):
        members = []
        for k in range(3):
            number = 3 * shard + k
            label, ending = str(k).encode(), "cls"
            if kind == "retrieval":
                label, ending = f"one {number}\n two {number}\n".encode(), "txt"
            elif kind == "multilabel":  # the third of each shard has two classes
                label, ending = npy(np.array([k != 1, k == 1, k == 2], dtype=np.float32)), "npy"
            members.append((f"s{number:07d}.{ending}", label))
            members.append((f"s{number:07d}.webp", encoded(number, "WEBP")))
        write_tar(folder / split / f"{shard}.tar", members)
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("AM General Hummer SUV 2000\nred_car\nblue car\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\ni love my {c}!\n")
    return folder


# ---- by name


def test_every_listed_set_says_how_it_is_brought(root: Path) -> None:
    assert set(places.sources()) == set(KNOWN_SETS)
    for name in KNOWN_SETS:
        assert is_labelled_name(name)
        with pytest.raises(InputError, match=rf"^{name} is not in '{root}/{name}'") as found:
            open_labelled(name)
        wanted = "image-net.org" if name == "imagenet" else f"clipdistill fetch {name} "
        assert wanted in str(found.value)


def test_a_name_is_found_in_the_folder_of_sets_and_a_path_of_that_name_comes_first(root: Path) -> None:
    make_folder(root / "eurosat", {"Forest": 1, "River": 2})
    with pytest.raises(InputError, match=r"'eurosat:train'|no splits"):
        open_labelled("eurosat:train")
    source = open_labelled("eurosat")
    assert (source.known, len(source), len(source.class_names)) == ("eurosat", 3, 10)
    assert "27,000" in str(source.deviation())
    make_folder(Path("eurosat"), {"Forest": 2, "River": 2})
    assert len(open_labelled("eurosat")) == 4


def test_splits_of_a_named_set(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        make_folder(root / "eurosat" / split, {"Forest": count, "River": 1})
    assert len(open_labelled("eurosat")) == 3  # the one that is measured on
    assert len(open_labelled("eurosat:train")) == 4
    assert open_labelled("eurosat").class_names[0] == "annual crop land"


def test_a_folder_of_arrays_has_its_splits_in_their_names(root: Path) -> None:
    (root / "mine").mkdir(parents=True)
    make_npz(root / "mine" / "mine_train.npz")
    with pytest.raises(InputError, match=r"0 of them are called 'val'"):
        open_labelled("mine:val")
    assert open_labelled("mine").name == "mine_train"  # the only one
    make_npz(root / "mine" / "mine_test.npz")
    assert open_labelled("mine").name == "mine_test"
    assert open_labelled("mine", split="train").name == "mine_train"


def test_names_are_looked_at_before_anything_is_loaded(root: Path, tmp_path: Path) -> None:
    (tmp_path / "le").mkdir()
    check_evaluated_name(f"cifar10@{tmp_path / 'le'}")
    for name, words in (
        ("cifar10@nowhere", "data 'nowhere': no such file or folder"),
        ("cifar11", r"did you mean 'cifar10'"),
        ("winoground", "examples.jsonl"),
        ("sugar-crepe/data", "add_att.json"),
        ("sugar_crepe", "add_att.json"),
        ("xm3600:de+en", "captions.jsonl"),
        ("XTD10", "test_image_names.txt"),
    ):
        with pytest.raises(InputError, match=words):
            check_evaluated_name(name)


def test_the_real_sample_of_cifar10(monkeypatch) -> None:
    folder = shared_folder("data/cifar10")
    monkeypatch.setenv("CLIPDISTILL_DATA", str(folder.parent))
    for name in ("cifar10", str(folder), f"cifar10@{folder}"):
        source = open_labelled(name)
        assert (source.name, len(source), source.known) == ("cifar10_test_a", 5000, "cifar10")
    assert open_labelled("cifar10:train").name == "cifar10_train5k"
    assert open_labelled("flowers5").class_names[0] == "daisy"


# ---- fetched


@pytest.fixture
def archive(monkeypatch) -> Iterator[WebServer]:
    """A server of a small CIFAR-10 in torchvision's form."""
    from torchvision.datasets import CIFAR10

    def batch(name: str, count: int) -> tuple[str, bytes]:
        rng = np.random.default_rng(count)
        values = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [k % 10 for k in range(count)]}
        return name, pickle.dumps(values)

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files = dict([batch("data_batch_1", 30), batch("test_batch", 20)])
    files["batches.meta"] = pickle.dumps({"label_names": names})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with WebServer({"cifar-10-python.tar.gz": packed.getvalue()}) as server:
        monkeypatch.setattr(CIFAR10, "url", f"{server.url}/cifar-10-python.tar.gz")
        yield server


def test_cifar10_is_fetched_when_asked_for_and_then_read_by_name(archive, root, capsys, tmp_path) -> None:
    with pytest.raises(InputError, match="clipdistill fetch cifar10 "):
        open_labelled("cifar10")
    assert main(["fetch", "cifar10"]) == 0
    said = capsys.readouterr().out
    assert f"170 MB from www.cs.toronto.edu, by torchvision, into '{root}/cifar10'" in said
    assert "read with  --data cifar10" in said
    source = open_labelled("cifar10")
    assert (source.name, len(source), source.known) == ("CIFAR10/test", 20, "cifar10")
    assert len(open_labelled("cifar10:train")) == len(open_labelled("cifar10", split="train")) == 30
    # elsewhere, it is named with its folder
    fetched = cd.fetch("cifar10", root=str(tmp_path / "other"))
    assert Path(fetched) == tmp_path / "other" / "cifar10"
    assert fetched.data == f"cifar10@{fetched}"
    assert re.fullmatch(r"cifar10@\S+: 4 files, \d+\.\d kB, in '\S+'", repr(fetched))
    assert "kB" in fetched._repr_html_()
    for name in (fetched.data, Path(fetched)):
        assert open_labelled(name).fingerprint() == source.fingerprint()


def test_a_failed_download_is_one_sentence_and_leaves_nothing(archive, root, capsys) -> None:
    archive.objects["cifar-10-python.tar.gz"] = b"<html>moved</html>"
    assert main(["fetch", "cifar10"]) == 2
    assert "torchvision could not bring it into" in capsys.readouterr().err
    with pytest.raises(InputError, match="clipdistill fetch cifar10 "):
        open_labelled("cifar10")
    archive.objects.clear()
    (root / "cifar10" / "cifar-10-python.tar.gz").unlink(missing_ok=True)
    assert main(["fetch", "cifar10"]) == 2
    assert not (root / "cifar10").exists()


def test_the_hub_gives_the_sets_of_clip_benchmark(root, monkeypatch, capsys) -> None:
    import huggingface_hub

    asked = []

    def download(repository: str, *, repo_type: str, local_dir: Path, allow_patterns: list[str]) -> None:
        asked.append((repository, repo_type, allow_patterns))
        webdataset(Path(local_dir))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main(["fetch", "wds/vtab/dtd", "resisc45"]) == 0
    assert asked == [
        ("clip-benchmark/wds_vtab-dtd", "dataset", ["*.txt", "test/*"]),
        ("clip-benchmark/wds_vtab-resisc45", "dataset", ["*.txt", "test/*"]),
    ]
    assert f"huggingface.co/datasets/clip-benchmark/wds_vtab-dtd into '{root}/wds/vtab-dtd'" in capsys.readouterr().out
    for name in ("wds/vtab/dtd", "wds/vtab-dtd", "resisc45"):
        assert len(open_labelled(name)) == 6
    assert open_labelled("wds/vtab/dtd").name == "vtab-dtd/test"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cifar10", "--split", "train"], "the split 'train' is for sets of the hub, and cifar10 comes whole"),
        (["wds/cars", "cifar10", "--split", "test"], "cifar10 comes whole"),
        (["wds/cars", "--split", ","], "--split: a comma with nothing before or behind it"),
        (["wds/cars", "--split", "../test"], "'../test' is no name of a split"),
    ],
)
def test_a_split_that_cannot_be_fetched_is_said_before_anything_is(words, sentence, root, capsys) -> None:
    assert main(["fetch", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not root.exists()


def test_what_cannot_be_fetched_is_said_before_anything_is(root, capsys) -> None:
    for names, said in (
        (["cifar10", "imagenet"], "imagenet is not in .* put there its validation pictures"),
        (["cifar11"], "did you mean 'cifar10'"),
    ):
        assert main(["fetch", *names]) == 2
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(capsys.readouterr().err)
    assert not root.exists()


# ---- CLIP_benchmark's tars


def test_classes_and_templates_are_those_of_the_set(tmp_path: Path) -> None:
    folder = webdataset(tmp_path / "wds_cars")
    assert is_labelled_name(str(folder))
    source = open_labelled(folder)
    assert source.name == "cars/test"
    assert source.class_names == ("AM General Hummer SUV 2000", "red_car", "blue car")  # as they are written
    assert source.templates == ("a photo of a {}.", "i love my {}!")
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert [source.key(i) for i in (0, 5)] == ["0/s0000000", "1/s0000005"]
    assert source.image(5).size == (40, 30)


def test_splits_and_damage_of_the_layout(tmp_path: Path) -> None:
    folder = webdataset(tmp_path / "cars")
    webdataset(tmp_path / "cars", 1, split="train")
    assert len(open_labelled(folder, split="train")) == 3
    with pytest.raises(InputError, match="has no split 'val'"):
        open_labelled(folder, split="val")
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(InputError, match=r"is not whole: 2 shards, and '1.tar' is not there"):
        open_labelled(folder)
    (folder / "test" / "nshards.txt").write_text("two")
    with pytest.raises(InputError, match="'two' is no number of shards"):
        open_labelled(folder)
    (folder / "zeroshot_classification_templates.txt").write_text("no place\n")
    (folder / "test" / "nshards.txt").write_text("1")
    with pytest.raises(InputError, match=r"exactly one \{\} for the class name"):
        open_labelled(folder)
    (folder / "dataset_type.txt").write_text("segmentation")
    with pytest.raises(InputError, match="is a segmentation set"):
        open_labelled(folder)


def test_a_set_with_several_classes_a_picture(tmp_path: Path) -> None:
    folder = webdataset(tmp_path / "wds_voc2007_multilabel", kind="multilabel")
    assert is_labelled_name(str(folder))
    source = open_labelled(folder)
    assert source.several is not None
    assert source.several.tolist() == 2 * [[True, False, False], [False, True, False], [True, False, True]]
    single = open_labelled(webdataset(tmp_path / "voc2007_multilabel"))
    assert single.several is None
    assert single.fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"2", "is no array of numpy's"),
        (npy(np.array([1, 0])), r"must hold 0 or 1 for each of the 3 classes, and is int64 \(2,\)"),
        (npy(np.array([1, 0, 2])), "must hold 0 or 1"),
        (npy(np.array([None, 1, 0], dtype=object)), "is no array of numpy's"),
    ],
)
def test_a_damaged_array_of_classes_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    folder = webdataset(tmp_path / "voc", 1, kind="multilabel")
    write_tar(folder / "test" / "0.tar", [("s0000000.npy", content), ("s0000000.webp", encoded(0, "WEBP"))])
    with pytest.raises(InputError, match=f"the label of 's0000000' {said}"):
        open_labelled(folder)


def test_retrieval_sets_have_a_caption_a_line(tmp_path: Path, root: Path) -> None:
    folder = webdataset(tmp_path / "wds_flickr8k", kind="retrieval")
    assert not is_labelled_name(str(folder))
    source = open_pairs(str(folder))
    assert (source.name, len(source)) == ("flickr8k/test", 6)
    assert source.captions(4) == ("one 4", "two 4")
    webdataset(root / "wds" / "flickr8k", kind="retrieval")
    assert not is_labelled_name("wds/flickr8k")
    assert open_pairs("wds/flickr8k").fingerprint() == open_pairs("wds/flickr8k:test").fingerprint()
    assert open_pairs("wds/flickr8k").captions(0) == ("one 0", "two 0")


# ---- several languages


def crossmodal(folder: Path, languages: tuple[str, ...] = ("de", "en", "quz")) -> Path:
    (folder / "images").mkdir(parents=True)
    lines = []
    for k in range(4):
        (folder / "images" / f"{k:016x}.jpg").write_bytes(encoded(k))
        record = {"image/key": f"{k:016x}", "image/locale": "en"}
        for language in languages:
            captions = [f"{language} {k} {way}" for way in range(1 + k % 2)]
            tokenized = [text.split() for text in captions]
            record[language] = {"caption": captions, "caption/tokenized": tokenized}
        lines.append(json.dumps(record))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_crossmodal_3600_in_one_language(tmp_path: Path) -> None:
    folder = crossmodal(tmp_path / "xm3600")
    for name in (f"{folder}:de", f"{folder}/captions.jsonl:de"):
        source = open_pairs(name)
        assert source.name == "crossmodal3600/de"
        assert [source.captions(k) for k in (0, 1)] == [("de 0 0",), ("de 1 0", "de 1 1")]
        assert source.key(1) == "0000000000000001.jpg"
        assert source.image(3).size == (40, 30)
    with pytest.raises(InputError, match=r"captions in 3 languages \(de, en, quz\): name one"):
        open_pairs(str(folder))
    with pytest.raises(InputError, match=r"has no captions in 'dee' .did you mean 'de'"):
        open_pairs(str(folder), split="dee")


def test_an_evaluation_takes_all_languages_or_those_that_are_named(tmp_path: Path) -> None:
    folder = str(crossmodal(tmp_path / "xm3600"))
    assert parts_of(folder, None) == [(folder, "de"), (folder, "en"), (folder, "quz")]
    assert parts_of(f"{folder}:quz+de", None) == parts_of(folder, "quz,de") == [(folder, "quz"), (folder, "de")]
    assert parts_of("scenes", "val") == [("scenes", "val")]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = crossmodal(tmp_path / "xm3600")
    lines = (folder / "captions.jsonl").read_text().splitlines()
    for bad, said in (("{", "line 3: not JSON"), ("[]", "line 3: no object with an 'image/key'")):
        (folder / "captions.jsonl").write_text("\n".join([*lines[:2], bad, *lines[3:]]))
        with pytest.raises(InputError, match=said):
            open_pairs(f"{folder}:de")
    escaping = json.dumps({"image/key": "../../etc/x", "de": {"caption": ["y"]}})
    (folder / "captions.jsonl").write_text("\n".join([*lines, escaping, lines[0]]))
    source = open_pairs(f"{folder}:de")
    assert len(source) == 4
    assert source.problems.counts["unusable image name"] == source.problems.counts["image listed again"] == 1


def test_xtd_reads_its_lists_line_for_line(tmp_path: Path) -> None:
    names = [f"COCO_val2014_{k:012d}.jpg" for k in range(3)]
    for folder in ("XTD10", "MIC", "STAIR", "val2014"):
        (tmp_path / folder).mkdir()
    for k, name in enumerate(names):
        (tmp_path / "val2014" / name).write_bytes(encoded(k))
    (tmp_path / "XTD10" / "test_image_names.txt").write_text("\n".join(names) + "\n")
    for folder, language in (("XTD10", "es"), ("XTD10", "zh"), ("MIC", "fr"), ("STAIR", "jp")):
        captions = [f"{language} {k}" for k in range(3)]
        (tmp_path / folder / f"test_1kcaptions_{language}.txt").write_text("\n".join(captions) + "\n")
    assert [part for _, part in parts_of(str(tmp_path), None)] == ["es", "fr", "jp", "zh"]
    for name in (str(tmp_path), str(tmp_path / "XTD10")):
        source = open_pairs(name, split="fr")
        assert (source.name, source.captions(2), source.key(2)) == ("xtd/fr", ("fr 2",), names[2])
    (tmp_path / "MIC" / "test_1kcaptions_fr.txt").write_text("fr 0\nfr 1\n")
    with pytest.raises(InputError, match=r"2 lines, and .* names 3 pictures"):
        open_pairs(str(tmp_path), split="fr")


def test_clip_benchmark_reads_the_same_from_its_layout(tmp_path: Path) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    theirs = builder.build_wds_dataset("cars", lambda image: image.size, data_dir=str(webdataset(tmp_path / "cars")))
    ours = open_labelled(tmp_path / "cars")
    assert tuple(theirs.classes) == ours.class_names
    assert tuple(text.replace("{c}", "{}") for text in theirs.templates) == ours.templates
    rows = list(theirs)
    assert [int(label) for _, label in rows] == ours.labels.tolist()
    assert [size for size, _ in rows] == [ours.image(k).size for k in range(len(ours))]
    folder = str(webdataset(tmp_path / "voc", kind="multilabel"))
    theirs = builder.build_wds_dataset("voc", lambda image: image, data_dir=folder)
    assert [classes.tolist() for _, classes in theirs] == open_labelled(folder).several.tolist()
    folder = str(webdataset(tmp_path / "flickr8k", kind="retrieval"))
    captions = [lines for _, lines in builder.build_wds_dataset("flickr8k", lambda image: image, data_dir=folder)]
    pairs = open_pairs(folder)
    assert [[text.strip() for text in lines] for lines in captions] == [list(pairs.captions(k)) for k in range(6)]
