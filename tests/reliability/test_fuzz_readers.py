"""Bad files do not crash, hang or change what good samples yield: field.md E2 rows 1 to 10, 21, 29.

The same targets are tried a hundred thousand times by `make fuzz`; here a few of each, and every fault it ever found.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipdistill.data.captions import clean
from clipdistill.data.loader import PairLoader
from clipdistill.data.open import is_labelled_name, open_labelled, open_pairs
from clipdistill.data.pairs import BadSample, Strings
from clipdistill.data.problems import Problems, valid_text
from clipdistill.errors import InputError
from clipdistill.models.tokenizers import ClipBpeTokenizer
from tests.data.helpers import FakeModel, MemoryPairs, encoded, write_tar
from tests.fuzz import seeds
from tests.fuzz.__main__ import read_files
from tests.fuzz.cache_targets import cache_targets
from tests.fuzz.coverage import Coverage
from tests.fuzz.engine import SILENT, _receive, fuzz, replay
from tests.fuzz.mutate import mangle
from tests.fuzz.own_targets import own_targets
from tests.fuzz.run_targets import run_targets
from tests.fuzz.targets import Target, targets

TARGETS = {target.name: target for target in (*targets(), *cache_targets(), *run_targets(), *own_targets())}


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_taken(name: str) -> None:
    target = TARGETS[name]
    outcomes = [replay(target, data) for data in target.seeds]
    assert all(kind in ("accepted", "refused") for kind, _ in outcomes), outcomes
    assert sum(kind == "accepted" for kind, _ in outcomes) >= min(len(outcomes) / 2, len(outcomes) - 5)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(0, 2**40))
@pytest.mark.sampled(2)
def test_spoiled_inputs_are_taken_or_refused(name: str, data: st.DataObject, seed: int) -> None:
    target, rng = TARGETS[name], random.Random(seed)
    content = data.draw(st.sampled_from(list(target.seeds)))
    if target.generate is not None and seed % 3 == 0:
        content = target.generate(rng)
    if target.structured and seed % 2:
        content = target.structured[0](content, rng)
    else:
        content = mangle(content, rng, target.words, target.seeds)
        for repair in target.repairs:
            content = repair(content)
    kind, detail = replay(target, content)
    assert kind in ("accepted", "refused"), detail


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.integers(0, 11), st.binary(max_size=60), max_size=8), st.integers(0, 2**40))
def test_spoiled_images_leave_the_other_samples_of_a_batch_alone(spoiled: dict[int, bytes], seed: int) -> None:
    good, bad = MemoryPairs(12), MemoryPairs(12)
    rng = random.Random(seed)
    for i, noise in spoiled.items():
        whole = bad._images[i]
        bad._images[i] = noise if rng.random() < 0.5 else mangle(whole, rng, (), (noise,))

    def rows(source: MemoryPairs) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor, str]], set[str]]:
        found, problems = {}, set()
        loader = PairLoader(source, batch_size=6, student=FakeModel(), seed=3, steps=2)
        for batch in loader:
            problems |= {key for key, _ in batch.problems}
            for row, i in enumerate(batch.indices.tolist()):
                found[i] = (batch.student_images[row], batch.student_tokens[row], batch.captions[row])
        return found, problems

    expected, none = rows(good)
    found, problems = rows(bad)
    assert len(expected) == 12
    assert not none
    assert {int(key[-4:]) for key in problems} | set(found) == set(range(12))
    assert {int(key[-4:]) for key in problems} <= set(spoiled)
    for i in set(range(12)) - set(spoiled):
        for a, b in zip(expected[i][:2], found[i][:2]):
            assert torch.equal(a, b)
        assert expected[i][2] == found[i][2]


TOKENIZER = ClipBpeTokenizer()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=120), st.binary(max_size=120)), min_size=1, max_size=4))
def test_row_8_any_caption_can_be_tokenised(values: list[str | bytes]) -> None:
    texts = [clean(value)[0] for value in values]
    tokens = TOKENIZER(texts)
    assert tokens.shape == (len(texts), TOKENIZER.context_length)
    assert (tokens.max(dim=1).values == tokens.max()).all()  # the end mark is never cut away
    for text, row, length in zip(texts, tokens, TOKENIZER.lengths(texts)):
        assert min(length, TOKENIZER.context_length) == int((row != 0).sum()) or "!" in text  # "!" is number 0


# --- what `make fuzz` found ------------------------------------------------------------------------------------------


@pytest.fixture
def odd_names(tmp_path: Path) -> Path:
    """Images and captions whose names are no UTF-8 (as unpacked from an old archive), beside usual ones."""
    for name in (b"a", b"\xff\xfe", "é".encode()):
        try:
            (tmp_path / os.fsdecode(name + b".jpg")).write_bytes(encoded())
        except OSError:
            pytest.skip("this file system takes only Unicode names")
        (tmp_path / os.fsdecode(name + b".txt")).write_text("a bird")
    return tmp_path


def test_names_that_are_no_unicode(odd_names: Path) -> None:
    entries = [{"filename": n, "sentences": [{"raw": "x"}]} for n in ("a.jpg", "\udcff\udcfe.jpg", "\ud800.jpg")]
    (odd_names / "k.json").write_text(json.dumps({"images": entries}))
    (odd_names / "t.csv").write_bytes(b"filepath,title\na.jpg,x\n\xff\xfe.jpg,y\n")
    write_tar(odd_names / os.fsdecode(b"\xfd.tar"), [("a.jpg", encoded()), ("a.txt", b"x")])
    odd = "\\udcff\\udcfe.jpg"
    names = (("k.json", ["a.jpg", odd]), ("t.csv", ["a.jpg", odd]), (os.fsdecode(b"\xfd.tar"), ["\\udcfd/a"]))
    for name, keys in names:
        source = open_pairs(str(odd_names / name))
        assert [source.key(i) for i in range(len(source))] == keys
        for i in range(len(source)):
            source.image(i)
        json.dumps([source.name, source.problems.rows], ensure_ascii=False).encode()
        assert source.fingerprint()
    assert source.shard_of("\\udcfd/a") == str(odd_names / os.fsdecode(b"\xfd.tar"))
    for path in odd_names.glob("[!a-zé]*.tar"):
        path.unlink()
    source = open_pairs(str(odd_names))
    assert [source.key(i) for i in range(3)] == ["a.jpg", "é.jpg", odd]
    assert source.image(2).size == source.image(0).size
    (odd_names / "set").mkdir()
    for kind in ("cat", os.fsdecode(b"d\xf6g")):
        (odd_names / "set" / kind).mkdir()
        (odd_names / "set" / kind / os.fsdecode(b"\xff.jpg")).write_bytes(encoded())
    labelled = open_labelled(odd_names / "set")
    assert [labelled.key(i) for i in range(2)] == ["cat/\\udcff.jpg", "d\\udcf6g/\\udcff.jpg"]
    assert labelled.class_names == ("cat", "d\\udcf6g")
    assert labelled.image(1).size == labelled.image(0).size


def test_parquet_files_need_a_unicode_name(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.parquet")
    try:
        path.write_bytes(seeds.parquets()[0])
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    with pytest.raises(InputError, match="valid UTF-8: rename it"):
        open_pairs(str(path))


@pytest.mark.parametrize("name", ["a\0b", "~no-such-user/x", "x" * 5000, "{a,b\0}", "~no-such-user/{0..1}"])
def test_names_that_are_none(name: str) -> None:
    for opened in (open_pairs, open_labelled):
        with pytest.raises(InputError):
            opened(name)
    assert not is_labelled_name(name)


def damaged_zip(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    content, at = bytearray(data), data.rindex(mark) + offset
    content[at : at + len(value)] = value
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged_zip(seeds.npz(), b"PK\x05\x06", 16, b"\xff\xff\xff\x7f"), "cannot be read|not readable"),
        (damaged_zip(seeds.npz(), b"PK\x01\x02", 6, b"\x51\x00"), r"zip file version 8\.1"),
        (damaged_zip(seeds.npz(), b"PK\x01\x02", 10, b"\x0c\x00"), "cannot be read"),
        (seeds.npz(classnames=np.array(3)), r"'classnames' must be texts in one row, got the shape \(\)"),
        (seeds.npz(filenames=np.array("a")), "'filenames' must be texts in one row"),
        (seeds.npz(images=np.zeros((3, 0, 5, 3), np.uint8)), "images must be uint8 of shape"),
    ],
)
def test_numpy_archives(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    is_labelled_name(str(path))
    with pytest.raises(InputError, match=message) as caught:
        open_labelled(path)
    assert "\n" not in str(caught.value)


def test_labels_and_class_names(tmp_path: Path) -> None:
    members = [("a.png", encoded(0, "PNG")), ("a.cls", b"9" * 30)]
    write_tar(tmp_path / "s.tar", members)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match="not a whole number"):
        open_labelled(tmp_path / "s.tar")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.json").write_bytes(b'["cat", "d\xf6g"]')
    with pytest.raises(InputError, match="holds undecodable characters"):
        open_labelled(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("array", "place", "value"),
    [
        ("offsets", 0, -1),
        ("sizes", 1, 1 << 62),
        ("caption_offsets", 1, 0),
        ("starts", 1, 0),
        ("starts", 1, 4),
        ("starts", 0, 1),
        ("starts", -1, 2),
    ],
)
def test_a_remembered_index_that_cannot_be_true_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: str, place: int, value: int
) -> None:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "s.tar"
    path.write_bytes(seeds.tar(seeds.pair_members()))
    good = open_pairs(str(path))
    (remembered,) = (tmp_path / "cache").rglob("*.npz")
    with np.load(remembered) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays[array][place] = value
    np.savez(remembered, **arrays)
    again = open_pairs(str(path))
    assert again.fingerprint() == good.fingerprint()
    assert [again.image_bytes(i) for i in range(len(again))] == [good.image_bytes(i) for i in range(len(good))]


@given(st.lists(st.text(st.characters(codec=None, exclude_categories=()), max_size=20), max_size=8))
def test_packed_strings_come_back_as_they_went_in(texts: list[str]) -> None:
    packed = Strings.pack(texts)
    assert list(packed) == texts
    assert [packed[i] for i in range(len(texts))] == texts
    for text in texts:
        assert valid_text(valid_text(text)) == valid_text(text)
        valid_text(text).encode("utf-8")
    problems = Problems()
    problems.add("reason: \udcff", "key \udcff")
    json.dumps(problems.rows, ensure_ascii=False).encode()


# --- the fuzzer itself -----------------------------------------------------------------------------------------------


def picky(data: bytes, folder: Path) -> None:
    """Finds fault with inputs that a blind search would hardly make: one good step leads to the next."""
    if data[:1] == b"a":
        raise InputError("a")
    if data[:1] == b"x":
        raise KeyError("x")
    if data[:1] == b"k":
        os.kill(os.getpid(), signal.SIGKILL)
    if data[:1] == b"e":
        raise BadSample("e")
    (folder / "out").write_bytes(data)


def test_the_fuzzer_finds_exceptions_and_crashes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = Target("picky", [b"b"], picky, words=(b"a", b"x", b"k", b"e"))
    here = Path.cwd()
    result = fuzz([target], [Path(__file__)], tmp_path, inputs=150, seconds=60, each=1e9)
    assert Path.cwd() == here
    assert result.tried == 150
    kinds = sorted(failure.kind for failure in result.failures)
    assert kinds == ["KeyError", f"crash (exit code -{int(signal.SIGKILL)})"]
    assert result.refused > 5
    assert result.accepted > 5
    assert result.kept > 0
    for failure in result.failures:
        data = Path(failure.input).read_bytes()
        assert data[:1] in (b"x", b"k")
        if data[:1] == b"x":
            assert replay(target, data)[0] == "KeyError"
    assert "FAILURE in picky" in capfd.readouterr().err


def test_the_fuzzer_finds_endless_loops_and_hunger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.engine.SECONDS", 0.2)
    monkeypatch.setattr("tests.fuzz.engine.MEMORY", 40 << 20)

    def loop(data: bytes, folder: Path) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                sum(range(1000))
            except Exception:
                continue

    def eat(data: bytes, folder: Path) -> None:
        # more than the process has had at any time before
        need = int(Path("/proc/self/status").read_text().split("VmPeak:")[1].split()[0]) * 1024
        io.BytesIO(b"x" * min(need, 1 << 30))

    assert replay(Target("loop", [], loop), b"")[0] == "slow"
    if Path("/proc/self/status").exists():
        monkeypatch.setattr("tests.fuzz.engine.SECONDS", 20.0)
        peaks = iter((0, 100 << 20))
        monkeypatch.setattr("tests.fuzz.engine._peak", lambda: next(peaks))
        assert replay(Target("eat", [], lambda data, folder: None), b"")[0] == "memory"


def test_a_pause_of_all_processes_is_no_hang() -> None:
    class Pipe:
        """Says nothing for some polls, each of which may have lasted an hour."""

        def __init__(self, silent: int) -> None:
            self.silent = silent

        def poll(self, seconds: float) -> bool:
            assert seconds <= 1
            self.silent -= 1
            return self.silent < 0

        def recv(self) -> str:
            return "message"

    answers = [_receive(cast(Connection, Pipe(silent)), 120.0) for silent in (0, 1, 119, 120)]
    assert answers == ["message", "message", "message", SILENT]


def test_coverage_counts_the_lines_of_functions() -> None:
    coverage = Coverage([Path(__file__)])
    with coverage.recording():
        damaged_zip(b"abc", b"b", 0, b"")
    assert coverage.found_new
    with coverage.recording():
        damaged_zip(b"abc", b"b", 0, b"")
    assert not coverage.found_new
    run, there = coverage.summary()[__file__]
    assert run == 3
    assert there > 100
    assert all(path.is_file() for path in read_files())
