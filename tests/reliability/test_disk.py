"""Row 16: a full disk gives one sentence and exit code 74, costs nothing that was good, and the run goes on later."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipdistill import cli
from clipdistill.cache.check import verify
from clipdistill.errors import storage_error
from clipdistill.train.checkpoint import newest_checkpoint
from tests.reliability.support import Launcher, newest_step, require_same_run, training, wait_for


@pytest.mark.parametrize(
    ("name", "skip", "newest"),
    [
        (".state.json", 2, 2),
        ("log.jsonl", 1, 3),
        pytest.param("eval.jsonl", 0, 2, marks=pytest.mark.slow),
        pytest.param(".scores.json", 0, 6, marks=pytest.mark.slow),
    ],
)
def test_row_16_a_write_that_fails(
    launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path, name: str, skip: int, newest: int
) -> None:
    out = tmp_path / "run"
    said = launcher.start(*training(models, out), fault="full_disk", name=name, skip=skip).finish(74)
    last = said.strip().splitlines()[-1]
    assert last.startswith("clipdistill: ")
    assert "No space left on device" in last
    assert "run the same command again" in last
    assert newest_step(out) == newest
    assert not list(out.glob("checkpoints/.writing-*"))
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    launcher.start(*training(models, out)).finish()
    require_same_run(undisturbed, out)


def test_row_16_files_that_cannot_grow(launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The system itself refuses: the weights are larger than any file may be, as on a disk that fills up."""
    out = tmp_path / "run"
    launcher.start(*training(models, out), fault="stop_at", step=1).finish(75)
    said = launcher.start(*training(models, out), fault="small_files", bytes=60_000).finish(74)
    assert "File too large" in said
    assert newest_step(out) == 2
    launcher.start(*training(models, out)).finish()
    require_same_run(undisturbed, out)


def test_row_16_a_cache_that_does_not_fit(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fill = ["cache", "--teacher", models / "teacher", "--data", "scenes:train", "--out", cache, "--device", "cpu"]
    fill += ["--block", 8, "--quiet", "data.size=20"]
    said = launcher.start(*fill, fault="full_disk", name=".000001.safetensors.writing-").finish(74)
    assert "No space left on device" in said
    assert (cache / "teacher-0" / "000000.safetensors").exists()
    launcher.start(*fill).finish()
    assert verify(cache).good


def test_row_16_an_export_that_does_not_fit(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    command = ["export", models / "student", "--to", "open_clip", "--out", out]
    launcher.start(*command).finish()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said = launcher.start(*command, fault="small_files", bytes=60_000).finish(74)
    assert "File too large" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before  # the last good one is kept
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_row_16_what_counts_as_a_full_disk(tmp_path: Path) -> None:
    error = storage_error(OSError(28, "No space left on device", "/x/y"))
    assert str(error) == "/x/y: No space left on device: make room and run the same command again"
    assert storage_error(OSError(2, "No such file", "/x")) is None
    assert storage_error(ValueError("No space left on device (os error 28)")) is None

    class SafetensorError(Exception):
        """What the library raises, by its name."""

    found = storage_error(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert found is not None
    assert found.exit_code == 74


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if os.name == "posix" else None
    if done is None or done.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=False)


def test_row_16_a_real_disk_that_fills_up_while_training(
    launcher: Launcher, models: Path, undisturbed: Path, small_disk: Path
) -> None:
    out = small_disk / "run"
    child = launcher.start(*training(models, out), fault="stall", step=3, rank=0, seconds=0.5)
    assert wait_for(out, "checkpoints/step-00000003", child)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass
    said = child.finish(74)
    assert "MB are free" in said or "No space left" in said
    checkpoint, rejected = newest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step >= 3
    assert not rejected
    ballast.unlink()
    launcher.start(*training(models, out)).finish()
    require_same_run(undisturbed, out)


def test_row_16_other_commands_say_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clipdistill.scenes import command as scenes_command

    def full(arguments: object) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "x.tar"))

    monkeypatch.setattr(scenes_command, "run", full)
    assert cli.main(["scenes", "--out", str(tmp_path / "out")]) == 74
    assert "No space left on device: make room" in capsys.readouterr().err
