"""Every format behind every kind of URL: the same pairs, in the same order, to the bit."""

from __future__ import annotations

import sys
from importlib import import_module

import fsspec
import pytest

from clipdistill.data.files import read_ahead
from clipdistill.data.open import check_data_name, is_labelled_name, open_labelled, open_pairs
from clipdistill.errors import InputError
from clipdistill.remote import RemoteError, store
from tests.data.helpers import encoded
from tests.remote.conftest import LABELLED, PAIRS

KINDS = ["memory", "web", "s3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gs", "az"))]


def _same_pairs(far, near):
    assert far.fingerprint() == near.fingerprint()
    assert [far.key(i) for i in range(len(far))] == [near.key(i) for i in range(len(near))]
    assert [far.captions(i) for i in range(len(far))] == [near.captions(i) for i in range(len(near))]
    order = [*range(1, len(far), 2), *range(0, len(far), 2)]
    read_ahead(far, order)
    assert [far.image_bytes(i) for i in order] == [near.image_bytes(i) for i in order]
    assert far.images_fingerprint() == near.images_fingerprint()
    assert far.problems.counts == near.problems.counts


def _same_labels(far, near):
    assert far.fingerprint() == near.fingerprint()
    read_ahead(far, range(len(far)))
    assert all(far.image(i).tobytes() == near.image(i).tobytes() for i in range(len(far)))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(3)
def test_pairs_are_the_same_as_from_a_disk(kind, name, request, everything, monkeypatch):
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "5")
    base = _base(kind, request, everything)
    check_data_name(f"{base}/{name}")
    assert not is_labelled_name(f"{base}/{name}")
    _same_pairs(open_pairs(f"{base}/{name}"), open_pairs(f"{everything}/{name}"))


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("kind", KINDS)
def test_labelled_sets_are_the_same_as_from_a_disk(kind, name, request, everything, monkeypatch):
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "5")
    base = _base(kind, request, everything)
    assert is_labelled_name(f"{base}/{name}")
    _same_labels(open_labelled(f"{base}/{name}"), open_labelled(f"{everything}/{name}"))


def _base(kind, request, everything) -> str:
    found = request.getfixturevalue(kind)
    if kind == "web":
        found.serve_folder(everything)
        return found.url
    return found if kind == "memory" else f"{kind}://pairs"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gs", "az"])
def test_changed_removed_and_missing_objects_of_other_stores(kind, request, shards, monkeypatch):
    """`gs` and `az` cannot compare versions while they read: what was looked at ten seconds ago is looked at again."""
    request.getfixturevalue(kind)
    monkeypatch.setenv("CLIPDISTILL_REMOTE_ATTEMPTS", "2")
    monkeypatch.setattr("clipdistill.remote.store._CHECKED", 0.0)
    fs = fsspec.filesystem(kind, skip_instance_cache=True, use_listings_cache=False)
    fs.pipe("pairs/own.tar", (shards / "00001.tar").read_bytes())
    far = open_pairs(f"{kind}://pairs/own.tar")
    far.image_bytes(1)
    fs.pipe("pairs/own.tar", (shards / "00002.tar").read_bytes())
    with pytest.raises(RemoteError, match=rf"{kind}://pairs/own\.tar changed since it was opened"):
        far.image_bytes(2)
    assert open_pairs(f"{kind}://pairs/own.tar").captions(0) == open_pairs(str(shards / "00002.tar")).captions(0)
    fs.rm("pairs/own.tar")
    with pytest.raises(RemoteError, match=rf"{kind}://pairs/own\.tar: gone since it was opened"):
        far.image_bytes(3)
    for name in ("pairs/none.tar", "nowhere/00000.tar", "pairs/none/"):
        with pytest.raises(InputError, match="nothing of that name"):
            open_pairs(f"{kind}://{name}")


def test_a_table_on_this_machine_names_images_of_a_store(memory, everything):
    from clipdistill.data.pairs import DataConfig

    far = open_pairs(DataConfig(path=str(everything / "pairs.csv"), image_root=memory))
    _same_pairs(far, open_pairs(str(everything / "pairs.csv")))


def test_class_names_are_read_from_a_url(memory, everything):
    far = open_labelled(f"{memory}/labelled/0.tar", classes=f"{memory}/labelled/classes.txt")
    assert far.class_names == ("cat", "dog")


def test_images_of_a_server_without_index_pages_are_asked_for_one_by_one(web, everything):
    web.serve_folder(everything)
    web.always |= {"": 403, "images/": 403}
    _same_pairs(open_pairs(f"{web.url}/pairs.csv"), open_pairs(str(everything / "pairs.csv")))


def test_a_missing_image_is_counted_as_on_a_disk(web, everything):
    web.serve_folder(everything)
    del web.objects["images/001.jpg"]
    far = open_pairs(f"{web.url}/pairs.csv")
    assert len(far) == 11
    assert far.problems.counts == {"missing image file": 1}


def test_a_name_in_a_table_leads_nowhere_else(web, everything, tmp_path):
    web.serve_folder(everything)
    (tmp_path / "secret.jpg").write_bytes(web.objects["images/001.jpg"])
    rows = [tmp_path / "secret.jpg", "../../secret.jpg", f"{web.url}/images/002.jpg", "images/001.jpg"]
    web.objects["names.csv"] = ("filepath,title\n" + "".join(f"{row},a caption\n" for row in rows)).encode()
    far = open_pairs(f"{web.url}/names.csv")
    assert [far.key(i) for i in range(len(far))] == ["images/001.jpg"]
    assert far.problems.counts == {"missing image file": 3}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("memory://nothing/here.tar", "nothing of that name"),
        ("memory://formats/shards/{00000..00009}.tar", "7 of 10 shards do not exist"),
        ("foo://bucket/x.tar", "no way to read foo://"),
        ("gs://bucket/x.tar", "clipdistill\\[gs\\]"),
        ("az://bucket/x.tar", "clipdistill\\[az\\]"),
        ("s3://", "not the URL of a file"),
        ("http://127.0.0.1:notaport/x.tar", "not the address"),
    ],
)
def test_a_wrong_url_is_one_sentence(name, said, memory, monkeypatch):
    for package, scheme in (("gcsfs", "gs"), ("adlfs", "az")):  # as where the extras are not installed
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(import_module("fsspec.registry")._registry, scheme, raising=False)
    monkeypatch.setattr(store, "_stores", {})
    with pytest.raises(InputError, match=said) as caught:
        open_pairs(name)
    assert "\n" not in str(caught.value)


def test_pictures_and_texts_alone(web):
    from clipdistill.data.open import open_training
    from clipdistill.data.pairs import DataConfig

    web.objects |= {f"pictures/a/{k}.jpg": encoded(k) for k in range(5)}
    web.objects["texts.tsv"] = "\n".join(f"sentence {k}\tSatz {k}" for k in range(4)).encode()
    pictures, texts = (open_training(DataConfig(path=f"{web.url}/{name}")) for name in ("pictures", "texts.tsv"))
    assert (len(pictures), pictures.captioned, pictures.image_bytes(3)) == (5, False, encoded(3))
    assert texts.captions(2) == ("sentence 2", "Satz 2")


def test_a_file_url_is_this_machine(shards):
    _same_pairs(open_pairs(f"file://{shards}"), open_pairs(str(shards)))
