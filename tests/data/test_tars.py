"""WebDataset shards: field.md E2 rows 3, 4 and 29, and the same members as the standard library finds."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import pickle
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipdistill.data import files
from clipdistill.data.files import expand_braces
from clipdistill.data.formats import tar_index
from clipdistill.data.formats.tar_headers import DamagedTar, looks_like_tar, members
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from tests.conftest import shared_folder
from tests.data.helpers import encoded, sample_members, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def shard(path: Path, first: int = 0, count: int = 4) -> Path:
    return write_tar(path, [m for number in range(first, first + count) for m in sample_members(number)])


def captions_of(source: PairSource) -> dict[str, tuple[str, ...]]:
    return {source.key(i): source.captions(i) for i in range(len(source))}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_of_tarfile(tmp_path: Path, layout: int) -> None:
    path = tmp_path / "all.tar"
    deep = "/".join(["folder"] * 12)
    with tarfile.open(path, "w", format=layout) as archive:
        for number, name in enumerate(
            ["plain.txt", f"{deep}/ustar prefix.txt", "a" * 90 + ".jpg", "naïve ü.txt", "zero"]
        ):
            info = tarfile.TarInfo(name)
            info.size = [700, 512, 513, 3, 0][number]
            archive.addfile(info, io.BytesIO(os.urandom(info.size)))
        if layout != tarfile.USTAR_FORMAT:
            long = tarfile.TarInfo("long/" + "n" * 300 + ".txt")
            long.size = 5
            archive.addfile(long, io.BytesIO(b"12345"))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            special = tarfile.TarInfo(f"special{kind!r}")
            special.type, special.linkname = kind, "plain.txt"
            archive.addfile(special)
        last = tarfile.TarInfo("last.txt")
        last.size = 1000
        archive.addfile(last, io.BytesIO(os.urandom(1000)))
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    with path.open("rb") as file:
        found = [(m.name, m.offset, m.size) for m in members(file, path.stat().st_size)]
    assert found == expected
    assert looks_like_tar(path.read_bytes()[:512])


def test_shared_shards_hold_what_the_json_says(own_cache: Path) -> None:
    folder = shared_folder("data/flickr8k")
    source = open_pairs(str(folder / "wds_train"))
    karpathy = open_pairs(str(folder / "dataset_flickr8k.json"), split="train")
    assert len(source) == 2000
    assert sum(len(source.captions(i)) for i in range(2000)) == 10_000
    by_captions = {karpathy.captions(i): i for i in range(len(karpathy))}
    for i in range(0, 2000, 97):
        assert source.image_bytes(i) == karpathy.image_bytes(by_captions[source.captions(i)])
    assert source.key(1000) == "00001/000010000"
    assert source.shard_of(source.key(1000)) == str(folder / "wds_train" / "00001.tar")
    assert not source.problems
    with tarfile.open(folder / "wds_train" / "00001.tar") as archive:
        member = archive.extractfile("000010000.jpg")
        assert member is not None
        assert source.image_bytes(1000) == member.read()
    assert open_pairs(str(folder / "wds_train" / "{00000..00001}.tar")).fingerprint() == source.fingerprint()
    assert len(list(own_cache.rglob("*.npz"))) == 2


def test_captions_come_from_json_lists_then_text_then_json(tmp_path: Path) -> None:
    def record(**fields: object) -> bytes:
        return json.dumps(fields).encode()

    image = encoded()
    write_tar(
        tmp_path / "s.tar",
        [
            ("a.jpg", image), ("a.txt", b"text"), ("a.json", record(captions=["one", "two"], caption="single")),
            ("b.jpg", image), ("b.txt", b"text"), ("b.json", record(caption="single")),
            ("c.png", image), ("c.json", record(caption="single", captions=[])),
            ("d.webp", image), ("d.txt", b"text"), ("d.json", b"{not json"),
            ("e.jpeg", image), ("e.txt", b" \n "),
            ("f.jpg", image),
            ("g.txt", b"no image"),
            ("h.JPG", image), ("h.txt", b"\xff\xfebytes"),
        ],
    )  # fmt: skip
    source = open_pairs(str(tmp_path / "s.tar"))
    assert captions_of(source) == {
        "s/a": ("one", "two"),
        "s/b": ("text",),
        "s/c": ("single",),
        "s/d": ("text",),
        "s/h": ("bytes",),
    }
    assert source.problems.counts["unreadable json"] == 1
    assert source.problems.counts["empty caption"] == 1
    assert source.problems.counts["missing caption"] == 1
    assert source.problems.counts["image without caption"] == 2
    assert source.problems.counts["sample without image"] == 1
    assert source.problems.dropped == 3


def test_row_3_a_shard_cut_anywhere_gives_its_whole_samples(tmp_path: Path) -> None:
    data = shard(tmp_path / "whole.tar").read_bytes()
    whole = captions_of(open_pairs(str(tmp_path / "whole.tar")))
    images = dict(zip(whole, [encoded(n) for n in range(4)]))
    used = len(data.rstrip(b"\0"))
    (tmp_path / "good.tar").write_bytes(data)
    for length in [*range(1, used, 211), used + 512]:
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / "whole.tar").write_bytes(data[:length])
        shard(tmp_path / "cut" / "other.tar", first=100, count=1)
        source = open_pairs(str(tmp_path / "cut"))
        found = captions_of(source)
        assert "other/000100" in found
        for key, texts in found.items():
            if key.startswith("whole/"):
                assert texts == whole[key]
        for i in range(len(source)):
            if source.key(i) in images:
                assert source.image_bytes(i) == images[source.key(i)]
        reasons = {reason for key, reason in source.problems.rows if key == "whole"}
        assert any("archive" in reason for reason in reasons), length


def test_row_3_a_shard_that_is_no_tar_is_counted(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar")
    (tmp_path / "1.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "2.tar").write_bytes(b"")
    source = open_pairs(str(tmp_path / "{0..2}.tar"))
    assert len(source) == 4
    assert source.problems.counts["not an archive"] == 1
    assert source.problems.counts["truncated archive"] == 1
    assert {key for key, _ in source.problems.rows} == {"1", "2"}


def test_row_3_damage_in_the_middle_keeps_what_came_before(tmp_path: Path) -> None:
    data = bytearray(shard(tmp_path / "s.tar").read_bytes())
    with tarfile.open(tmp_path / "s.tar") as archive:
        third = archive.getmembers()[4]
    data[third.offset : third.offset + 512] = b"\xaa" * 512
    (tmp_path / "s.tar").write_bytes(data)
    source = open_pairs(str(tmp_path / "s.tar"))
    assert list(captions_of(source)) == ["s/000000", "s/000001"]
    assert source.problems.counts["damaged archive"] == 1


def test_row_3_a_shard_that_changes_later_gives_bad_samples(tmp_path: Path) -> None:
    source = open_pairs(str(shard(tmp_path / "s.tar")))
    (tmp_path / "s.tar").write_bytes(b"short")
    with pytest.raises(BadSample, match=r"unreadable shard: .*s\.tar: its size changed"):
        source.image_bytes(0)
    (tmp_path / "s.tar").unlink()
    with pytest.raises(BadSample, match="unreadable shard"):
        source.image_bytes(0)


def test_a_pair_of_the_index_takes_less_than_a_hundred_bytes(tmp_path: Path) -> None:
    """Made-up pairs as those of benchmarks/scaling.py: keys of 15 letters, captions of 53."""
    for number in range(5):
        members = []
        for pair in range(500):
            caption = f"a photograph of {pair:06d} things beside a lake at evening"
            members += [(f"{pair:09d}.jpg", b"\xff\xd8" + bytes(98)), (f"{pair:09d}.txt", caption.encode())]
        write_tar(tmp_path / f"{number:05d}.tar", members)
    open_pairs(f"{tmp_path}/00000.tar")  # what a first call imports is none of its memory
    held = {}
    for turn in ("indexed", "remembered"):
        for last in (1, 4):
            tracemalloc.start()
            source = open_pairs(f"{tmp_path}/{{00000..{last:05d}}}.tar")
            gc.collect()
            held[last, turn] = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            assert len(source) == 500 * (last + 1)
            del source
    for turn in ("indexed", "remembered"):
        assert 53 < (held[4, turn] - held[1, turn]) / 1500 < 100, held


def test_negative_sizes_do_not_loop(tmp_path: Path) -> None:
    data = bytearray(shard(tmp_path / "s.tar").read_bytes())
    header = data[:512]
    header[124:136] = b"\xff" * 12  # -1 in GNU's binary form
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[:512] = header
    with pytest.raises(DamagedTar, match="is not whole"):
        list(members(io.BytesIO(bytes(data)), len(data)))


def test_row_4_duplicate_names_become_samples_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("a.jpg", encoded(1)), ("a.txt", b"first"),
            ("b.jpg", encoded(2)), ("b.txt", b"between"),
            ("a.jpg", encoded(3)), ("a.txt", b"second"),
            ("a.b.jpg", encoded(4)),
        ],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        source = open_pairs(str(path))
    assert captions_of(source) == {"s/a": ("first",), "s/b": ("between",), "s/a#2": ("second",)}
    assert source.image_bytes(2) == encoded(3)
    assert source.problems.counts["duplicate member name"] == 1
    assert len([r for r in caplog.records if "duplicate" in r.message]) == 1


def test_samples_of_different_folders_and_shards_do_not_mix(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", [("p/a.jpg", encoded()), ("p/a.txt", folder.encode()), ("a.txt", b"no")])
    source = open_pairs(str(tmp_path / "{x,y}" / "0.tar"))
    assert captions_of(source) == {"x/0.tar/p/a": ("x",), "y/0.tar/p/a": ("y",)}
    assert source.shard_of("y/0.tar/p/a") == str(tmp_path / "y" / "0.tar")


def test_row_29_no_name_leaves_the_archive(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ["../escaped", "/tmp/absolute", "..\\windows", "a/../../b"]
    write_tar(inside / "s.tar", [(n + e, c) for n in names for e, c in ((".jpg", encoded()), (".txt", b"x"))])
    source = open_pairs(str(inside / "s.tar"))
    for i in range(len(source)):
        source.image(i)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "inside"]
    assert [p.name for p in inside.iterdir()] == ["s.tar"]
    assert all(p.suffix == ".npz" for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(encoded())
        archive.addfile(info, io.BytesIO(encoded()))
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.txt")
        archive.addfile(link)
    with pytest.raises(InputError, match="no usable image-caption pair"):
        open_pairs(str(tmp_path / "s.tar"))


def test_remembered_index_is_used_checked_and_replaced(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "s.tar")
    first = open_pairs(str(path))
    (remembered,) = own_cache.rglob("*.npz")
    with monkeypatch.context() as patched:
        patched.setattr(tar_index, "_scan", lambda *_: pytest.fail("scanned again"))
        again = open_pairs(str(path))
    assert again.fingerprint() == first.fingerprint()
    assert again.image_bytes(3) == first.image_bytes(3)

    good = remembered.read_bytes()
    for damaged in (b"", good[: len(good) // 2], good[:300] + b"\xff" * 50 + good[350:]):
        remembered.write_bytes(damaged)
        assert open_pairs(str(path)).fingerprint() == first.fingerprint()

    shard(path, first=50, count=2)
    assert list(captions_of(open_pairs(str(path)))) == ["s/000050", "s/000051"]


def test_problems_are_remembered_with_the_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [*sample_members(0), ("x.jpg", encoded())])
    first, second = open_pairs(str(path)), open_pairs(str(path))
    assert first.problems.counts == second.problems.counts
    assert first.problems.rows == second.problems.rows
    assert second.problems.dropped == 1


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "file"))
    assert len(open_pairs(str(shard(tmp_path / "s.tar")))) == 4


def _open_files() -> int:
    listing = Path("/proc/self/fd")
    return len(list(listing.iterdir())) if listing.exists() else 0


def test_many_shards_threads_and_processes(tmp_path: Path) -> None:
    for number in range(80):
        shard(tmp_path / f"{number:05d}.tar", first=number, count=1)
    source = open_pairs(str(tmp_path / "{00000..00079}.tar"))
    expected = [encoded(number) for number in range(80)]
    copy = pickle.loads(pickle.dumps(source))
    before = _open_files()
    with ThreadPoolExecutor(4) as pool:
        order = [*range(80), *range(79, -1, -1)] * 3
        assert list(pool.map(source.image_bytes, order)) == [expected[i] for i in order]
        assert list(pool.map(copy.image_bytes, range(80))) == expected
    del copy
    if before:
        assert _open_files() - before <= 64
        del source
        assert _open_files() <= before


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("x{a{0..1},b}", ["xa0", "xa1", "xb"]),
    ],
)
def test_expand_braces(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize(
    "pattern", ["{5..1}.tar", "{0..99999999}.tar", "{}.tar", "{a..c}.tar", "{0..1.tar", "{0..99}{0..99}.tar"]
)
def test_senseless_patterns_are_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_SHARDS", 1000)
    with pytest.raises(InputError, match=r"shards|never closed"):
        expand_braces(pattern)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{0..3}.tar", "2 of 4 shards do not exist, the first is '.*2.tar'"),
        ("text.tar", "is not a tar archive"),
        ("s.tar.gz", "is compressed: unpack it first"),
        ("empty.tar", "no usable image-caption pair in 1 shards"),
    ],
)
def test_bad_shards_are_explained(tmp_path: Path, name: str, message: str) -> None:
    shard(tmp_path / "0.tar")
    shard(tmp_path / "1.tar")
    (tmp_path / "text.tar").write_text("hello" * 300)
    write_tar(tmp_path / "empty.tar", [("README.md", b"nothing here")])
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "0.tar")
    with pytest.raises(InputError, match=message):
        open_pairs(str(tmp_path / name))


def test_splits_and_repeated_shards_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar")
    with pytest.raises(InputError, match="tars have no splits"):
        open_pairs(str(tmp_path / "0.tar"), split="val")
    with pytest.raises(InputError, match="is named more than once"):
        open_pairs(str(tmp_path / "{0,0}.tar"))


_ARCHIVE: list[bytes] = []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mangled_archives_end_and_never_reach_outside(tmp_path: Path, data: st.DataObject) -> None:
    if not _ARCHIVE:
        _ARCHIVE.append(shard(tmp_path / "model.tar", count=3).read_bytes())
    mangled = bytearray(_ARCHIVE[0])
    for _ in range(data.draw(st.integers(1, 6))):
        # headers are where damage matters: aim at the first 160 bytes of blocks
        position = data.draw(st.integers(0, len(mangled) // 512 - 1)) * 512 + data.draw(st.integers(0, 160))
        mangled[position : position + 1] = data.draw(st.binary(min_size=1, max_size=12))
    mangled = mangled[: data.draw(st.integers(0, len(mangled)))]
    try:
        for member in members(io.BytesIO(bytes(mangled)), len(mangled)):
            assert 0 <= member.offset <= member.offset + member.size <= len(mangled)
    except DamagedTar as error:
        assert "archive" in str(error)  # noqa: PT017 - either outcome is right
