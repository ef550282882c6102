"""Classification sets in every layout, and what is said about bad ones."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdistill.data.class_names import class_labels
from clipdistill.data.labelled import BadSample
from clipdistill.data.open import is_labelled_name, open_labelled
from clipdistill.errors import InputError
from tests.conftest import shared_folder


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (shade, 2 * shade % 256, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root: Path, classes: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            (root / name / f"{k:03d}.png").write_bytes(png(20 * number + k))
    return root


def make_tar(path: Path, samples: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_npz(path: Path, **changes: Any) -> Path:
    arrays = {
        "images": np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3),
        "labels": np.array([0, 1, 2, 0, 1, 2]),
        "classnames": np.array(["red_car", "bus", "bike"]),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


# ---- folders


def test_folder_per_class(tmp_path: Path) -> None:
    source = open_labelled(make_folder(tmp_path / "cars", {"red_car": 2, "bus": 3}))
    assert source.name == "cars"
    assert source.class_names == ("bus", "red car")
    assert [source.label(i) for i in range(5)] == [0, 0, 0, 1, 1]
    assert source.key(3) == "red_car/000.png"
    assert source.image(3).getpixel((0, 0)) == (0, 0, 10)
    assert open_labelled(tmp_path / "cars", names="stored").class_names == ("bus", "red_car")
    assert pickle.loads(pickle.dumps(source)).image(4).tobytes() == source.image(4).tobytes()


def test_folder_with_class_names(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 1, "b": 1})
    (tmp_path / "list.txt").write_text("first thing\nsecond_thing\n")
    assert open_labelled(root, classes=tmp_path / "list.txt").class_names == ("first thing", "second_thing")
    (tmp_path / "map.json").write_text(json.dumps({"x": "unseen", "b": "bee", "a": "ay"}))
    source = open_labelled(root, classes=tmp_path / "map.json")
    assert source.class_names == ("unseen", "bee", "ay")
    assert [source.class_names[source.label(i)] for i in range(2)] == ["ay", "bee"]


def test_numbered_folders_are_class_numbers(tmp_path: Path) -> None:
    """As in ImageNet-V2: '10' is class 10, not the third folder."""
    root = make_folder(tmp_path / "v2", {"0": 1, "2": 1, "10": 1})
    (tmp_path / "names.txt").write_text("\n".join(f"name {k}" for k in range(11)))
    source = open_labelled(root, classes=tmp_path / "names.txt")
    assert sorted(source.label(i) for i in range(3)) == [0, 2, 10]
    assert source.class_names[source.label(1)] == f"name {source.key(1).split('/')[0]}"
    v2 = open_labelled(f"imagenet-v2@{root}")
    assert v2.class_names[10] == "brambling"
    assert len(v2.class_names) == 1000
    assert "3 images where 10,000" in str(v2.deviation())


def test_wnid_folders_are_scored_among_their_classes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "r", dict.fromkeys(class_labels("imagenet-r"), 1))
    source = open_labelled(root)
    assert source.known == "imagenet-r"
    assert len(source.class_names) == 200
    assert source.class_names[0] == "goldfish"
    assert source.deviation() == "ImageNet-R: 200 images where 30,000 (test) are expected"


def test_known_set_declared(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "euro", {"Forest": 1, "SeaLake": 2})
    source = open_labelled(f"eurosat@{root}")
    assert len(source.class_names) == 10
    assert source.class_names[source.label(0)] == "forest"
    assert source.class_names[source.label(2)] == "sea or lake"
    assert source.templates == "satellite"
    with pytest.raises(InputError, match="folder 'Forest' is no class of food101"):
        open_labelled(f"food101@{root}")
    with pytest.raises(InputError, match="did you mean 'eurosat'"):
        open_labelled(f"eurosa@{root}")


def test_sun397_layout(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "SUN", {"a/abbey": 1, "a/apse/indoor": 2, "b/bar": 1})
    source = open_labelled(root)
    assert source.class_names == ("abbey", "indoor apse", "bar")
    assert [source.label(i) for i in range(4)] == [0, 1, 1, 2]
    assert open_labelled(f"sun397@{root}").class_names[9] == "indoor apse"


def test_mean_per_class_where_that_is_the_custom(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "c", {name: 1 for name in class_labels("caltech101") if name != "BACKGROUND_Google"})
    source = open_labelled(f"caltech101@{root}")
    assert (len(source.class_names), source.metric) == (101, "mean-per-class")
    assert source.class_names[0] == "person's face in a scene"


def test_split_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "d" / "train", {"a": 2, "b": 1})
    make_folder(tmp_path / "d" / "valid", {"a": 1, "b": 1})
    assert len(open_labelled(tmp_path / "d", split="val")) == 2
    with pytest.raises(InputError, match="splits train, val: name one"):
        open_labelled(tmp_path / "d")
    with pytest.raises(InputError, match="no split 'test'"):
        open_labelled(tmp_path / "d", split="test")
    with pytest.raises(InputError, match="no splits"):
        open_labelled(tmp_path / "d" / "train", split="val")


def test_stray_images_are_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", {"a": 1, "b": 1})
    (root / "stray.png").write_bytes(png(3))
    source = open_labelled(root)
    assert len(source) == 2
    assert source.problems.summary() == "1 image outside the class folders"


def test_bad_images_are_bad_samples(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", {"a": 2, "b": 1})
    (root / "a" / "000.png").write_bytes(png(1)[:50])
    (root / "a" / "001.png").write_bytes(b"")
    source = open_labelled(root)
    with pytest.raises(BadSample, match=r"a/000.png: truncated image") as caught:
        source.image(0)
    assert caught.value.key == "a/000.png"
    with pytest.raises(BadSample, match="empty image file"):
        source.image(1)
    (root / "b" / "000.png").unlink()
    with pytest.raises(BadSample, match="missing image file"):
        source.image(2)
    with pytest.raises(IndexError):
        source.image(3)


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        open_labelled(tmp_path / "empty")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.png").write_bytes(png(1))
    with pytest.raises(InputError, match="no class folders"):
        open_labelled(tmp_path / "flat")
    with pytest.raises(InputError, match="no such file or folder"):
        open_labelled(tmp_path / "nowhere")
    root = make_folder(tmp_path / "d", {"a": 1, "b": 1})
    (tmp_path / "three.txt").write_text("x\ny\nz\n")
    with pytest.raises(InputError, match="2 class folders, but 3 class names"):
        open_labelled(root, classes=tmp_path / "three.txt")
    (tmp_path / "map.json").write_text(json.dumps({"a": "ay"}))
    with pytest.raises(InputError, match="none for the folder 'b'"):
        open_labelled(root, classes=tmp_path / "map.json")
    (tmp_path / "text.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="expected a folder per class"):
        open_labelled(tmp_path / "text.csv")


# ---- files of class names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "", "no name in it"),
        ("c.txt", "a\n\nb\n", "line 2 is empty"),
        ("c.json", "{", "not JSON"),
        ("c.json", "7", "expected a list"),
        ("c.json", "[]", "no name in it"),
        ("c.json", '[{"index": 0}]', "a whole number 'index' and a text 'name'"),
        ("c.json", '[{"index": 1, "name": "b"}]', "none has the index 0"),
        ("c.json", '{"0": "a", "2": "c"}', "none has the index 1"),
        ("c.json", '{"a": ["b"]}', "expected class names as texts"),
    ],
)
def test_bad_class_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        open_labelled(make_npz(tmp_path / "x.npz"), classes=tmp_path / name)


@pytest.mark.parametrize("content", ['["a", "b", "c"]', '{"0": "a", "2": "c", "1": "b"}', '{"a": 0, "b": 1, "c": 2}'])
def test_forms_of_class_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.json").write_text(content)
    assert open_labelled(make_npz(tmp_path / "x.npz"), classes=tmp_path / "c.json").class_names == ("a", "b", "c")


# ---- numpy archives


def test_npz(tmp_path: Path) -> None:
    source = open_labelled(make_npz(tmp_path / "cars.npz"))
    assert source.class_names == ("red car", "bus", "bike")
    assert source.label(5) == 2
    assert np.asarray(source.image(5)).tobytes() == np.load(tmp_path / "cars.npz")["images"][5].tobytes()
    assert source.key(5) == "000005"
    copy = pickle.loads(pickle.dumps(source))
    assert copy.image(2).tobytes() == source.image(2).tobytes()
    # keys are numbers only, so the fingerprint covers the pixels
    other = open_labelled(make_npz(tmp_path / "zeros.npz", images=np.zeros((6, 4, 4, 3), np.uint8)))
    assert other.fingerprint() != source.fingerprint()
    assert copy.fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "no array 'labels'"),
        ({"classnames": None}, "no class names"),
        ({"classnames": np.array([{"a": 1}], dtype=object)}, "cannot be read"),
        ({"labels": np.array([0, 1, 2, 0, 1, 3])}, r"label 3 of '000005'.*outside 0..2"),
        ({"labels": np.array([0, -1, 2, 0, 1, 0])}, "label -1"),
        ({"labels": np.zeros(6)}, "whole numbers"),
        ({"labels": np.array([0, 1])}, r"shape \(2, height, width, 3\)"),
        ({"images": np.zeros((6, 4, 4), np.uint8)}, "images must be uint8"),
        ({"images": np.zeros((6, 4, 4, 3), np.float32)}, "images must be uint8"),
        ({"filenames": np.array(["a"] * 6)}, "6 labels but 1 different filenames"),
        ({"labels": np.array([], dtype=np.int64), "images": np.zeros((0, 4, 4, 3), np.uint8)}, "no labelled image"),
    ],
)
def test_bad_npz(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_labelled(make_npz(tmp_path / "x.npz", **changes))


# ---- tars


@pytest.mark.parametrize("name", ["images", "labels", "classnames", "filenames"])
def test_a_member_of_an_npz_that_is_no_array(tmp_path: Path, name: str) -> None:
    """numpy gives back the bytes of a member whose first letters are not its own."""
    with np.load(make_npz(tmp_path / "whole.npz", filenames=np.array([*"abcdef"]))) as whole:
        arrays = dict(whole)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as file:
        for member, array in arrays.items():
            data = io.BytesIO()
            np.save(data, array)
            file.writestr(f"{member}.npy", data.getvalue() if member != name else b"x" + data.getvalue()[1:])
    with pytest.raises(InputError, match=f"'{name}' is no array"):
        open_labelled(tmp_path / "set.npz")


def test_tars(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps([{"index": k, "name": f"kind_{k}"} for k in range(30)]))
    for shard in range(2):
        samples = []
        for k in range(3):
            samples += [(f"{k:06d}.png", png(10 * shard + k)), (f"{k:06d}.cls", str(7 * k + shard).encode())]
            samples.append((f"{k:06d}.json", b"{}"))
        make_tar(tmp_path / f"{shard:05d}.tar", samples)
    for name in (str(tmp_path), f"{tmp_path}/{{00000..00001}}.tar"):
        source = open_labelled(name)
        assert [source.label(i) for i in range(6)] == [0, 7, 14, 1, 8, 15]
        assert source.key(4) == "00001/000001"
        assert source.image(4).getpixel((0, 0)) == (11, 22, 10)
        assert source.class_names[14] == "kind 14"
    one = open_labelled(tmp_path / "00001.tar")
    assert one.key(2) == "000002"
    assert pickle.loads(pickle.dumps(one)).image(2).getpixel((0, 0)) == (12, 24, 10)


def test_incomplete_samples_of_tars_are_counted(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n")
    members = [("0.png", png(1)), ("0.cls", b"1\n"), ("1.png", png(2)), ("2.cls", b"0"), ("notes.md", b"x")]
    source = open_labelled(make_tar(tmp_path / "x.tar", members))
    assert len(source) == 1
    assert source.label(0) == 1
    assert source.problems.summary() == "1 sample without image, 1 sample without label"
    assert source.problems.dropped == 2


def test_cut_tars_keep_what_is_whole(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a\nb\n")
    members = [(f"{k}.{kind}", png(k) if kind == "png" else b"1") for k in range(20) for kind in ("cls", "png")]
    path = make_tar(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[:10_000])
    source = open_labelled(path)
    assert 1 < len(source) < 20
    assert "truncated archive" in source.problems.summary()
    source.image(len(source) - 1)


def test_bad_tars(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("0.png", png(1)), ("0.cls", b"dog")])
    with pytest.raises(InputError, match=r"no class names: neither classes\.json"):
        open_labelled(path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="label of '0' is 'dog'"):
        open_labelled(path)
    with pytest.raises(InputError, match="no splits"):
        open_labelled(path, split="val")
    with pytest.raises(InputError, match="no labelled image"):
        open_labelled(make_tar(tmp_path / "y.tar", [("0.txt", b"a caption")]))
    with pytest.raises(InputError, match="does not exist"):
        open_labelled(f"{tmp_path}/{{8..9}}.tar")


# ---- the shared sets


def test_shared_sets() -> None:
    data = shared_folder("data")
    expected = {
        "cifar10/cifar10_test_a.npz": (5000, 10, "cifar10"),
        "cifar10/cifar10_train5k.npz": (5000, 10, "cifar10"),
        "imagenet_sample/imagenet1_even.tar": (500, 1000, None),
        "imagenette/imagenette_val_a.tar": (500, 10, None),
        "flowers5/flowers5_a.tar": (250, 5, None),
    }
    for name, (images, classes, known) in expected.items():
        source = open_labelled(data / name)
        assert (len(source), len(source.class_names), source.known) == (images, classes, known)
        assert is_labelled_name(str(data / name))
        assert source.image(images - 1).mode == "RGB"
    imagenette = open_labelled(data / "imagenette" / "imagenette_val_a.tar")
    assert imagenette.class_names[:2] == ("tench", "English Springer Spaniel")
    assert np.bincount(imagenette.labels).tolist() == [50] * 10
    sample = open_labelled(data / "imagenet_sample" / "imagenet1_even.tar")
    assert sorted(sample.labels.tolist()) == list(range(0, 1000, 2))


def test_pairs_are_not_taken_for_labelled_sets(tmp_path: Path) -> None:
    data = shared_folder("data")
    for name in ("flickr8k", "flickr8k/wds_train", "flickr8k/captions.csv", "flickr8k/Flicker8k_Dataset", "coco_mini"):
        assert not is_labelled_name(str(data / name))


def test_labelled_names(tmp_path: Path) -> None:
    for name in ("scenes:zeroshot/shapes", "torchvision:CIFAR10@x", "imagenet-a@x", "hf:a/b?label=y"):
        assert is_labelled_name(name)
    for name in ("scenes:val", "hf:a/b", "nothing/here", "x@y"):
        assert not is_labelled_name(name)
    assert is_labelled_name(str(make_folder(tmp_path / "d", {"a": 1, "b": 1})))
    (tmp_path / "d" / "a" / "000.txt").write_text("a caption")
    assert not is_labelled_name(str(tmp_path / "d"))
    make_folder(tmp_path / "splits", {"train": 1, "val": 1})
    assert not is_labelled_name(str(tmp_path / "splits"))


# ---- through other libraries


def test_torchvision_image_folder(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "d", {"red_car": 2, "bus": 1})
    source = open_labelled(f"torchvision:ImageFolder@{root}")
    assert source.class_names == ("bus", "red car")
    assert [source.key(i) for i in range(3)] == ["bus/000.png", "red_car/000.png", "red_car/001.png"]
    assert source.image(2).getpixel((0, 0)) == (1, 2, 10)
    (root / "bus" / "000.png").write_bytes(b"broken")
    with pytest.raises(BadSample, match=r"bus/000\.png: not an image"):
        source.image(0)


def test_torchvision_sun397_order_is_that_of_the_names(tmp_path: Path) -> None:
    base = tmp_path / "SUN397"
    for folder, shade in (("b/bar", 50), ("a/abbey", 10), ("a/apse/indoor", 20)):
        (base / folder).mkdir(parents=True)
        (base / folder / "sun_x.jpg").write_bytes(png(shade))
    (base / "ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n/b/bar\n")
    source = open_labelled(f"torchvision:SUN397@{tmp_path}")
    assert [source.key(i) for i in range(3)] == [
        "SUN397/a/abbey/sun_x.jpg",
        "SUN397/a/apse/indoor/sun_x.jpg",
        "SUN397/b/bar/sun_x.jpg",
    ]
    assert [source.class_names[source.label(i)] for i in range(3)] == ["abbey", "indoor apse", "bar"]
    assert source.image(2).getpixel((0, 0)) == (50, 100, 10)
    assert source.known == "sun397"


def test_torchvision_errors(tmp_path: Path) -> None:
    for name, message in (
        ("torchvision:CIFAR1@x", "did you mean 'CIFAR1"),
        ("torchvision:CIFAR10", "say in which folder"),
        (f"torchvision:CIFAR10@{tmp_path / 'no'}", "does not exist"),
        (f"torchvision:CIFAR10@{tmp_path}", "not found.*nothing is downloaded"),
        (f"torchvision:CIFAR10:val@{tmp_path}", "no split 'val'"),
    ):
        with pytest.raises(InputError, match=message):
            open_labelled(name)


def test_hub_data_set_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=["red_car", "bus"]),
            "coarse": datasets.Value("int64"),
        }
    )
    rows = {
        "img": [{"bytes": png(5), "path": None}, {"bytes": b"junk", "path": None}],
        "fine": [1, 0],
        "coarse": [0, 0],
    }
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "saved")
    source = open_labelled(f"hf:{tmp_path / 'saved'}")
    assert source.class_names == ("red car", "bus")
    assert source.labels.tolist() == [1, 0]
    assert source.image(0).getpixel((0, 0)) == (5, 10, 10)
    with pytest.raises(BadSample, match="not an image"):
        source.image(1)
    for name, message in (
        (f"hf:{tmp_path / 'saved'}?split=train", "no split 'train'"),
        (f"hf:{tmp_path / 'saved'}?label=nope", "no column 'nope'"),
        (f"hf:{tmp_path / 'saved'}?lable=fine", "did you mean 'label'"),
    ):
        with pytest.raises(InputError, match=message):
            open_labelled(name)
