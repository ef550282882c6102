"""Hostile caches and archives: no name and no link leads outside, nothing damaged is trusted. field.md E2 row 29."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipdistill.cache.samples import SampleTable
from clipdistill.cache.store import CacheStore
from clipdistill.cache.tars import export_shards, read_shard
from clipdistill.data.open import open_labelled, open_pairs
from clipdistill.data.pairs import BadSample
from clipdistill.errors import InputError
from clipdistill.runtime.files import read_json, refuse_links, write_json
from tests.cache.support import cache_config, filled, saved_teacher
from tests.data.helpers import encoded, write_tar
from tests.fuzz.mutate import mangle, mangle_json
from tests.security.conftest import Fence, state_of

SIZE = 10


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A filled cache and the teacher it was filled with."""
    folder = tmp_path_factory.mktemp("good")
    teacher = saved_teacher(folder / "teacher")
    return filled(folder / "cache", teacher, SIZE).folder, teacher


@pytest.fixture
def cache(fence: Fence, good: tuple[Path, str]) -> Path:
    shutil.copytree(good[0], fence.inside / "cache")
    return fence.inside / "cache"


def change(cache: Path, **values: object) -> None:
    path = cache / "manifest.json"
    write_json(path, {**read_json(path), **values}, checked=True)


@pytest.mark.parametrize("name", ["../outside/secret.txt", "/etc/passwd", "..", "", ".", "teacher-0/../x", "a/b"])
def test_row_29_a_manifest_names_files_of_its_own_folder_only(cache: Path, name: str) -> None:
    change(cache, samples=name)
    with pytest.raises(InputError, match="is not the name of a file in this folder"):
        CacheStore(cache)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**40))
def test_mangled_manifests_are_read_or_refused(cache: Path, good: tuple[Path, str], seed: int) -> None:
    rng = random.Random(seed)
    content = json.dumps(read_json(good[0] / "manifest.json")).encode()  # no checksum hides what is behind it
    content = mangle_json(content, rng) if rng.random() < 0.8 else mangle(content, rng, (b"[[", b"null", b"1e9"), ())
    (cache / "manifest.json").write_bytes(content)
    try:
        store = CacheStore(cache)
        store.require_fields()
        store.read(0, [0, SIZE - 1], [0, 0], [0, 0])
    except InputError as error:
        assert str(error)  # noqa: PT017 - either outcome is right


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**40), st.sampled_from(["samples", "block"]))
def test_mangled_tables_and_blocks_are_read_or_refused(
    cache: Path, good: tuple[Path, str], seed: int, part: str
) -> None:
    rng = random.Random(seed)
    pattern = "samples-*.arrow" if part == "samples" else "teacher-0/000000.safetensors"
    (original,) = good[0].glob(pattern)
    spoiled = cache / original.relative_to(good[0])
    spoiled.write_bytes(mangle(original.read_bytes(), rng, (b"data_offsets", b"shape", b"[-1]", b"F16"), ()))
    try:
        store = CacheStore(cache)
        for index in range(SIZE):
            store.samples.key(index)
            store.synthetic(index)
        store.require_fields()
        store.read(0, [0, 1], [0, 0], [0, 0])
        store.block("pairs", 0, 0).verify()
    except InputError as error:
        assert str(error)  # noqa: PT017 - either outcome is right


def test_offsets_that_lead_out_of_a_table_are_refused(cache: Path) -> None:
    """Arrow trusts the offsets in a file; without a check they read whatever lies behind it in memory."""
    (path,) = cache.glob("samples-*.arrow")
    key = SampleTable(path)._table["key"].combine_chunks()
    offsets = key.buffers()[1].to_pybytes()[: 8 * (SIZE + 1)]
    hostile = b"".join(int(v).to_bytes(8, "little") for v in [0, *[1 << 40] * SIZE])
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, hostile))
    with pytest.raises(InputError, match="not readable as an Arrow file"):
        SampleTable(path)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bad_samples.jsonl", "notes.jsonl"),
        (".samples.writing", "secret.txt"),
        ("teacher-0/000001.safetensors", "secret.txt"),
        ("teacher-1", "folder"),
        ("locks", "folder"),
        ("views", "folder"),
        ("teacher-0/deeper/link", "folder"),
        ("teacher-1", "nothing-yet"),
    ],
)
def test_filling_follows_no_link_out_of_the_folder(
    fence: Fence, cache: Path, good: tuple[Path, str], name: str, target: str
) -> None:
    link = cache / name
    if link.is_dir():
        shutil.rmtree(link)
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(fence.outside / target)
    with pytest.raises(InputError, match="is a link that leads outside the folder"):
        filled(cache, good[1], SIZE + 4)


def test_links_inside_a_folder_and_to_it_are_fine(fence: Fence, cache: Path, good: tuple[Path, str]) -> None:
    (cache / "teacher-0" / "again").symlink_to(cache / "manifest.json")
    (fence.inside / "other-name").symlink_to(cache)
    refuse_links(fence.inside / "other-name", "cache")
    assert len(filled(fence.inside / "other-name", good[1], SIZE)) == SIZE
    refuse_links(fence.inside / "not-there", "cache")


def test_a_run_folder_with_links_is_not_continued(fence: Fence) -> None:
    from clipdistill.train.config import resolve
    from clipdistill.train.opening import opened

    run = fence.inside / "run"
    config = resolve("clip", {"out": str(run)}, size="debug")
    for _ in range(2):
        with opened(config, allow_changes=False):
            pass
    for name, target in (("log.jsonl", "notes.jsonl"), ("checkpoints", "folder"), (".recipe.yaml.tmp", "secret.txt")):
        (run / name).symlink_to(fence.outside / target)
        with pytest.raises(InputError, match=f"'{name}' is a link that leads outside the folder"):
            opened(config, allow_changes=False).__enter__()
        (run / name).unlink()


def hostile_tar(path: Path, fence: Fence, ends: tuple[str, str]) -> None:
    """Names that lead outside, links, devices and pipes, each as image and as text, after one good sample."""
    image, text = ends
    contents = {image: encoded(), text: b"1"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for stem in ("good", "../outside/evil", f"{fence.outside}/evil", "a/../../outside/evil", "..\\outside\\evil"):
            for end, content in contents.items():
                info = tarfile.TarInfo(f"{stem}.{end}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        for number, kind in enumerate(kinds):
            for end in ends:
                info = tarfile.TarInfo(f"special{number}.{end}")
                info.type, info.linkname = kind, str(fence.outside / "secret.txt")
                info.devmajor, info.devminor = 1, 5  # /dev/zero
                archive.addfile(info)


def test_row_29_archives_of_pairs(fence: Fence) -> None:
    (fence.inside / "shards").mkdir()
    hostile_tar(fence.inside / "shards" / "0.tar", fence, ("jpg", "txt"))
    source = open_pairs(str(fence.inside / "shards"))
    assert len(source) == 4  # what lies in the archive is read from there, whatever its name
    for i in range(len(source)):
        assert source.captions(i) == ("1",)
        source.image(i)
    assert sorted(state_of(fence.inside / "shards")) == ["0.tar"]


def test_row_29_archives_of_labelled_images(fence: Fence) -> None:
    (fence.inside / "shards").mkdir()
    hostile_tar(fence.inside / "shards" / "0.tar", fence, ("jpg", "cls"))
    (fence.inside / "shards" / "classes.txt").write_text("cat\ndog\n")
    labelled = open_labelled(fence.inside / "shards")
    assert len(labelled) == 4
    for i in range(len(labelled)):
        labelled.image(i)


def test_row_29_archives_of_embeddings(fence: Fence, good: tuple[Path, str]) -> None:
    from tests.data.helpers import sample_members

    pairs = write_tar(fence.inside / "pairs.tar", [m for n in range(4) for m in sample_members(n)])
    settings_ = {"data": {"path": str(pairs)}, "block": 2}
    from clipdistill.cache.fill import fill

    config = cache_config(fence.inside / "cache", good[1], **settings_)
    store = fill(config).store
    (shard,) = export_shards(store, open_pairs(str(pairs)), fence.inside / "out")
    whole = list(read_shard(shard))
    assert len(whole) == 4
    with tarfile.open(shard, "a", format=tarfile.PAX_FORMAT) as archive:
        for kind, name in ((tarfile.SYMTYPE, "x"), (tarfile.LNKTYPE, "y"), (tarfile.FIFOTYPE, "z")):
            for end in (".teacher.safetensors", ".teacher.json"):
                info = tarfile.TarInfo(f"../outside/{name}{end}")
                info.type, info.linkname = kind, str(fence.outside / "secret.txt")
                archive.addfile(info)
    assert len(list(read_shard(shard))) == 4


def test_descriptions_lead_to_no_file_outside(fence: Fence) -> None:
    """Karpathy's and COCO's JSON name images below their folder only; what a link or a device gives is no image."""
    (fence.inside / "a.jpg").write_bytes(encoded())
    (fence.outside / "b.jpg").write_bytes(encoded())
    names = ["a.jpg", "../outside/b.jpg", str(fence.outside / "b.jpg"), "x/../../outside/b.jpg", "..\\outside\\b.jpg"]
    rows = [{"filename": name, "sentences": [{"raw": "words"}]} for name in names]
    rows.append({"filename": "b.jpg", "filepath": "../outside", "sentences": [{"raw": "words"}]})
    (fence.inside / "k.json").write_text(json.dumps({"images": rows}))
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    captions = [{"image_id": n, "caption": "words"} for n in range(len(names))]
    (fence.inside / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for name in ("k.json", "c.json"):
        source = open_pairs(str(fence.inside / name))
        assert [source.key(i) for i in range(len(source))] == ["a.jpg"]
    (fence.inside / "folder").mkdir()
    for name, target in (("a", fence.outside / "secret.txt"), ("b", "/dev/zero")):
        (fence.inside / "folder" / f"{name}.jpg").symlink_to(target)
        (fence.inside / "folder" / f"{name}.txt").write_text("words")
    os.mkfifo(fence.inside / "folder" / "c.jpg")
    (fence.inside / "folder" / "c.txt").write_text("words")
    source = open_pairs(str(fence.inside / "folder"))
    for i in range(len(source)):
        with pytest.raises(BadSample) as caught:
            source.image(i)
        assert "secret" not in caught.value.reason
    (fence.outside / "b.jpg").unlink()
