"""Scenes written to disk hold the same pairs as scenes drawn on demand."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from pathlib import Path

import pytest

from clipdistill import cli
from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError
from clipdistill.scenes import write
from clipdistill.scenes.pairs import open_scenes
from clipdistill.scenes.write import write_scenes


@pytest.mark.parametrize("format", ["webdataset", "karpathy"])
def test_written_scenes_are_the_drawn_ones(tmp_path: Path, format: str) -> None:
    written = write_scenes(tmp_path / "s", format, "val", 45, 2, shard_size=20, workers=1)
    drawn, stored = open_scenes("val", 45, 2), open_pairs(str(written))
    assert len(stored) == 45
    assert not stored.problems
    for i in range(45):
        assert stored.captions(i) == drawn.captions(i)
        assert stored.image(i).tobytes() == drawn.image(i).tobytes()


def test_tar_layout_is_img2datasets(tmp_path: Path) -> None:
    write_scenes(tmp_path, "webdataset", "train", 25, shard_size=10, workers=1)
    assert sorted(f.name for f in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(tmp_path / "00002.tar") as archive:
        names = archive.getnames()
        assert names[:3] == ["000020000.png", "000020000.txt", "000020000.json"]
        assert len(names) == 15
        about = json.load(archive.extractfile("000020004.json"))  # type: ignore[arg-type]
    assert about["captions"][0] == about["caption"]
    assert about["status"] == "success"
    assert about["scene"]["things"][0]["shape"] == open_scenes("train", 25).scene(24).things[0].shape
    assert json.loads((tmp_path / "00002_stats.json").read_text())["successes"] == 5


def test_files_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    one = write_scenes(tmp_path / "one", "webdataset", "val", 12, shard_size=6, workers=1)
    two = write_scenes(tmp_path / "two", "webdataset", "val", 12, shard_size=6, workers=2)
    for name in ("00000.tar", "00001.tar"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    write_scenes(tmp_path, "webdataset", "val", 30, shard_size=10, workers=1)
    kept, lost = tmp_path / "00000.tar", tmp_path / "00001.tar"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    (tmp_path / "00001_stats.json").unlink()
    lost.write_bytes(b"half")
    write_scenes(tmp_path, "webdataset", "val", 30, shard_size=10, workers=1)
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content


@pytest.mark.parametrize("format", ["webdataset", "karpathy"])
def test_what_a_kill_leaves_is_taken_away_by_the_next_run(tmp_path: Path, format: str) -> None:
    write_scenes(tmp_path, format, "val", 4, shard_size=2, workers=1)
    folder = tmp_path if format == "webdataset" else tmp_path / "images" / "00000"
    old, new = (folder / f".00001.tar.writing-{name}" for name in ("old", "new"))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (1, 1))
    write_scenes(tmp_path, format, "val", 4, shard_size=2, workers=1)
    assert new.exists()  # another process may be writing it
    assert not old.exists()


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write, "_write_tar", _killed)
    command = ["scenes", "--out", str(tmp_path / "s"), "--size", "8", "--shard-size", "2", "--workers", "2"]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "a data worker died, usually for lack of memory" in said
    assert "Traceback" not in said
    monkeypatch.undo()
    assert cli.main(command) == 0
    assert len([*(tmp_path / "s").glob("*.tar")]) == 4


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'webdataset'"):
        write_scenes(tmp_path, "webdatset")
    with pytest.raises(InputError, match="shard_size"):
        write_scenes(tmp_path, shard_size=0)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_scenes(tmp_path, size=3)
    other = tmp_path / "other"
    write_scenes(other, "webdataset", "val", 3, workers=1)
    with pytest.raises(InputError, match="other scenes"):
        write_scenes(other, "webdataset", "val", 4, workers=1)
    with pytest.raises(InputError, match="cannot be written"):
        write_scenes(tmp_path / "notes.txt" / "x", size=3)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scenes", "--out", str(tmp_path / "k"), "--format", "karpathy", "--split", "val", "--size", "4"]
    assert cli.main(arguments) == 0
    assert "dataset.json" in capsys.readouterr().out
    assert len(open_pairs(str(tmp_path / "k" / "dataset.json"))) == 4
    assert cli.main(["scenes", "--out", str(tmp_path / "v"), "--split", "vall"]) == 2
