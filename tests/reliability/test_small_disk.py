"""Row 16 for every command that writes: on a disk that is too small, one sentence with the place and exit code 74;
nothing half-written has taken its final name, and with room the same command makes what it makes on a large disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from clipdistill import cli
from tests.conftest import REPOSITORY

RUN = str(REPOSITORY / "tests" / "kept" / "run")
SLOW = ("train", "ablate", "onnx", "openvino", "hf")
COMMANDS: dict[str, str] = {
    "train": "train --recipe clip-rd --size debug --out OUT/run train.steps=3 train.checkpoint_every=1",
    "ablate": "ablate --recipe clip --seeds 1 --size debug --out OUT/a --quiet train.steps=2",
    "scenes as tars": "scenes --out OUT/s --size 60 --shard-size 20 --workers 1",
    "scenes by several": "scenes --out OUT/s --size 60 --shard-size 20 --workers 2",
    "scenes as a table": "scenes --out OUT/s --size 20 --format karpathy --workers 1",
    "cache": "cache --teacher scenes-teacher --data scenes:train --out OUT/c --block 8 --device cpu data.size=24",
    "embed npy": f"embed {RUN} --data scenes:val?size=20 --out OUT/e.npy",
    "embed parquet": f"embed {RUN} --data scenes:val?size=40 --out OUT/e.parquet",
    "embed safetensors": f"embed {RUN} --data scenes:val?size=20 --captions all --out OUT/e.safetensors",
    "eval": f"eval {RUN} --data scenes:val?size=20 --json OUT/s.json --geometry OUT/g.json",
    "compare": f"compare {RUN} OTHER --json OUT/c.json",
    "claims": f"claims published {RUN} --json OUT/c.json",
    "report": f"report {RUN} --out OUT/r.html",
    "bench": f"bench {RUN} --batch 1 --seconds 0.05 --rounds 3 --json OUT/b.json",
    "open_clip": f"export {RUN} --to open_clip --out OUT/x",
    "hf": f"export {RUN} --to hf --out OUT/x",
    "onnx": f"export {RUN} --to onnx --out OUT/x",
    "openvino": f"export {RUN} --to openvino --out OUT/x",
    "search": f"search PHOTOS --model {RUN} --index OUT/i --query red",
    "search vectors": f"search PHOTOS --model {RUN} --index INDEX --vectors OUT/v.parquet",
    "embed texts": f"embed {RUN} --texts TEXTS --out OUT/t.npy",
    "embed classes": f"embed {RUN} --classes CLASSES/train --out OUT/k.parquet",
    "probe": f"probe {RUN} --train CLASSES/train --test CLASSES/test --seeds 1 --json OUT/p.json --quiet",
    "cache merge": "cache merge OUT/m CACHE/0 CACHE/1",
    "cache export": "cache export CACHE/tars OUT/e --data CACHE/data",
    "boxes": "regions boxes --data scenes:val?size=20 --detector grid --out OUT/b",
}


class SmallDisk:
    """A disk in memory whose size can be set."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()

    def new(self, size: int) -> None:
        """An empty one of `size` bytes."""
        self.end()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        (self.place / "out").mkdir()

    def grow(self) -> None:
        self.size(100 << 20)

    def size(self, size: int) -> None:
        self._mount("-o", f"remount,size={size}")

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(self.place)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting a small disk is not permitted here")

    def end(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], capture_output=True, check=False)

    def used(self) -> int:
        status = os.statvfs(self.place)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.place)) for path in self.place.rglob("*") if path.is_file())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if os.name != "posix":
        pytest.skip("needs mount")
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.end()


def require_whole(folder: Path) -> None:
    """No file with a temporary name, and none that is cut."""
    readers: dict[str, Callable[[Path], object]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".safetensors": lambda path: safe_open(path, "np"),
        ".npy": np.load,
        ".npz": np.load,
    }
    for path in folder.rglob("*"):
        assert ".writing" not in path.name, path
        if path.is_file() and path.suffix in readers:
            readers[path.suffix](path)


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data: tars; tars: a cache of them; 0 and 1: shares of another one."""
    here = tmp_path_factory.mktemp("caches")
    assert cli.main(f"scenes --out {here}/data --size 24 --shard-size 12 --workers 1".split()) == 0
    fill = "cache --teacher scenes-teacher --block 8 --device cpu --workers 0 --quiet --data"
    assert cli.main(f"{fill} {here}/data --out {here}/tars".split()) == 0
    for share in (0, 1):
        assert cli.main(f"{fill} scenes:train --out {here}/{share} --part {share}/2 data.size=24".split()) == 0
    return here


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in COMMANDS])
@pytest.mark.sampled(2)
def test_row_16_every_command_on_a_disk_that_is_too_small(
    name: str, disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if name in ("onnx", "openvino"):
        pytest.importorskip(name)
    for number in range(4):
        picture(tmp_path / "photos" / f"{number}.png", number)
        for kind in ("cat", "dog"):
            picture(tmp_path / "classes" / "train" / kind / f"{number}.png", 2 * number + (kind == "dog"))
            picture(tmp_path / "classes" / "test" / kind / f"{number}.png", 10 + 2 * number + (kind == "dog"))
    (tmp_path / "texts").write_text("a red circle\n" * 600)
    other = tmp_path / "other.json"
    other.write_bytes(Path(RUN, "scores.json").read_bytes())
    other.with_suffix(".npz").write_bytes(Path(RUN, "scores.npz").read_bytes())
    places = {"OUT": str(disk.place / "out"), "PHOTOS": str(tmp_path / "photos"), "OTHER": str(other)}
    places |= {"TEXTS": str(tmp_path / "texts"), "CLASSES": str(tmp_path / "classes"), "INDEX": str(tmp_path / "index")}
    command = COMMANDS[name]
    if "CACHE" in command:
        places["CACHE"] = str(request.getfixturevalue("caches"))
    for word, path in places.items():
        command = command.replace(word, path)
    disk.new(100 << 20)
    assert cli.main(command.split()) == 0, capsys.readouterr().err
    wanted, used = disk.names(), disk.used()
    for share in (0, 0.5, 0.97):
        disk.new(max(4096, int(used * share) // 4096 * 4096))
        capsys.readouterr()
        code = cli.main(command.split())
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipdistill:")]
        if code != 0:  # some write less than the smallest disk has
            assert code == 74, said
            assert len(said) == 1, said
            assert str(disk.place) in said[0] or name in ("train", "ablate"), said
            assert "make room" in said[0]
            assert ".writing" not in said[0]
        require_whole(disk.place)
        if code == 0 and name == "search vectors":  # which replaces nothing
            continue
        disk.grow()
        assert cli.main(command.split()) == 0, capsys.readouterr().err
        if name != "search":  # whose parts are numbered on
            assert disk.names() == wanted


@pytest.mark.parametrize("kind", ["report", "eval", "embed"])
def test_row_16_of_the_files_of_one_result_all_are_new_or_all_old(
    kind: str, disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = disk.place / "out"
    commands = {
        "report": f"report {RUN} --out {out}/r.html --title",
        "eval": f"eval {RUN} --json {out}/s.json --data",
        "embed": f"embed {RUN} --out {out}/e.npy --data",
    }
    names = {"report": ("first", "other"), "eval": ("scenes:val?size=12", "scenes:val?size=16")}
    first, second = names.get(kind, names["eval"])
    disk.new(100 << 20)
    assert cli.main([*commands[kind].split(), first]) == 0, capsys.readouterr().err
    before, used = {name: (disk.place / name).read_bytes() for name in disk.names()}, disk.used()
    assert len(before) > 1
    if kind == "embed":  # which replaces nothing
        before, used = {}, 0
        shutil.rmtree(out)
        out.mkdir()
    failed = 0
    for more in range(4096, disk.used() + 65536, 4096):
        disk.size(used + more)
        code = cli.main([*commands[kind].split(), second])
        after = {name: (disk.place / name).read_bytes() for name in disk.names() if ".parts/" not in name}
        if code == 0:
            assert after != before
            break
        assert code == 74
        if kind == "embed":  # the description follows when both are there, and the same command goes on
            assert ("out/e.npy" in after) == ("out/e.jsonl" in after)
        else:
            assert after == before
        failed += 1
    assert failed > 1
