"""Stores that are filled over hours, killed at random moments: each time whole, and at the end the undisturbed ones.

CLIPDISTILL_KILLS sets how many kills each gets.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clipdistill.cache.check import verify
from clipdistill.cache.fill import fill
from clipdistill.data.open import open_pairs
from clipdistill.models import load_model
from clipdistill.regions import box_file
from clipdistill.regions import store as stores
from clipdistill.regions.box_file import BoxFile, detect
from clipdistill.regions.detectors import open_detector
from clipdistill.regions.store import RegionStore, fill_store
from clipdistill.runs.folder import run_folders
from clipdistill.scenes import write
from clipdistill.scenes.write import write_scenes
from clipdistill.train.region_config import BoxLimits, MetaTeacherConfig
from clipdistill.vectors.job import embed_to_file
from tests.cache.support import cache_config, saved_teacher
from tests.reliability.support import Launcher, wait_for

COUNT = int(os.environ.get("CLIPDISTILL_KILLS", "4"))
VIEWS = {"views": 2, "view": {"kind": "crop", "scale": [0.3, 1.0], "flip": 0.5}}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store, hidden ones too, by its path; locks are who is at work, not what was made."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed(work: Callable[[], object], folder: Path, look: Callable[[], object]) -> None:
    """`work` in processes that are killed at random moments, `look` after each kill; ended undisturbed, and compared.

    What it makes in `folder` must be the same to the byte as what it makes in peace, and nothing else.
    """
    torch.set_num_threads(1)
    began = time.monotonic()
    work()
    lasted, wanted = time.monotonic() - began, contents(folder)
    shutil.rmtree(folder)
    rng, fork = random.Random(1), multiprocessing.get_context("fork")
    kills = 0
    while kills < COUNT:
        child = fork.Process(target=work)
        child.start()
        child.join(rng.random() * lasted)
        child.kill()
        child.join()
        kills += child.exitcode != 0
        look()
        if child.exitcode == 0:
            assert contents(folder) == wanted
            shutil.rmtree(folder)
    work()
    found = contents(folder)
    assert sorted(found) == sorted(wanted)
    assert [name for name in found if found[name] != wanted[name]] == []


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, so that a kill comes between them; what is left of a block is old at once."""
    monkeypatch.setattr(stores, "BLOCK", 4)
    for module in (stores, write):
        monkeypatch.setattr(module, "ABANDONED", 0.0)
    monkeypatch.setattr(box_file, "_IMAGES", 4)


def test_a_cache_that_is_filled(tmp_path: Path) -> None:
    teacher = saved_teacher(tmp_path / "teacher")
    config = cache_config(tmp_path / "cache", teacher, 60, block=4, **VIEWS)

    def look() -> None:
        if (tmp_path / "cache" / "manifest.json").exists():
            assert verify(tmp_path / "cache").problems == []

    killed(lambda: fill(config), tmp_path / "cache", look)


def test_a_cache_that_grows(tmp_path: Path) -> None:
    """Samples are added to a full cache: a kill leaves the old one or the grown one, never a mixture."""
    teacher = saved_teacher(tmp_path / "teacher")
    small, large = (cache_config(tmp_path / "cache", teacher, size, block=4) for size in (24, 60))

    def work() -> None:
        fill(small)
        fill(large)

    def look() -> None:
        if (tmp_path / "cache" / "manifest.json").exists():
            assert verify(tmp_path / "cache").problems == []

    fill(small)
    began = {path.name for path in (tmp_path / "cache" / "teacher-0").iterdir()}
    fork, rng = multiprocessing.get_context("fork"), random.Random(2)
    for _ in range(COUNT):
        child = fork.Process(target=fill, args=(large,))
        child.start()
        child.join(rng.random() * 0.4)
        child.kill()
        child.join()
        assert verify(tmp_path / "cache").problems == []
        assert began <= {path.name for path in (tmp_path / "cache" / "teacher-0").iterdir()}
    fill(large)
    assert verify(tmp_path / "cache").good
    assert not [path for path in tmp_path.rglob(".*") if "writing" in path.name]


def test_boxes_that_are_detected_and_their_regions(tmp_path: Path) -> None:
    source, detector = open_pairs("scenes:val?size=12"), open_detector("grid", torch.device("cpu"))
    clip = load_model("scenes-teacher", teacher=True)
    spec, folder = MetaTeacherConfig().crop_spec(clip.image), tmp_path / "store"

    def boxes() -> BoxFile:
        return detect(source, detector, folder / "boxes")

    def work() -> None:
        fill_store(folder, source, boxes(), clip, spec, BoxLimits(most=2), "missing", batch_size=8)

    def look() -> None:
        for path in folder.glob("regions-*/regions.json"):
            if len([*path.parent.glob("block-*.safetensors")]) == 3:
                assert len(RegionStore(path.parent).read(range(12)).mask) == 12

    killed(work, folder, look)


def ended_before_each_name(work: Callable[[Path], object], folder: Path) -> int:
    """`work` in a process that ends just before its n-th file takes its name, then again, undisturbed, for every n.

    The second must make what is made in peace. Returns how many places there were.
    """
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")

    def child(out: Path, last: int) -> None:
        names = 0
        for method in ("replace", "rename"):
            named = getattr(Path, method)

            def ends(self: Path, target: Path, named: Callable[[Path, Path], Path] = named) -> Path:
                nonlocal names
                names += 1
                return named(self, target) if names != last else os._exit(9)

            setattr(Path, method, ends)
        work(out)

    work(folder / "peace")
    wanted = contents(folder / "peace")
    for last in itertools.count(1):
        out = folder / f"ended-{last}"
        for at, code in ((last, 9), (0, 0)):
            process = fork.Process(target=child, args=(out, at))
            process.start()
            process.join()
            if process.exitcode == 0 and at:
                return last - 1
            assert process.exitcode == code
        assert contents(out) == wanted
    raise AssertionError


def test_the_place_where_a_file_takes_its_name(tmp_path: Path) -> None:
    """What a kill leaves before there is anything to go by is no reason to refuse the folder."""
    source, model = open_pairs("scenes:val?size=6"), load_model("scenes-teacher", teacher=True)
    detector, teacher = open_detector("grid", torch.device("cpu")), saved_teacher(tmp_path / "teacher")

    def embed(out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        embed_to_file(model, source, out / "rows.npy", progress=False)

    works: dict[str, Callable[[Path], object]] = {
        "boxes": lambda out: detect(source, detector, out),
        "scenes": lambda out: write_scenes(out, "webdataset", "val", 4, shard_size=2, workers=1),
        "cache": lambda out: fill(cache_config(out, teacher, 8, block=4)),
        "embeddings": embed,
    }
    for name, work in works.items():
        assert ended_before_each_name(work, tmp_path / name) > 1


@pytest.mark.slow
def test_an_ablation(launcher: Launcher, tmp_path: Path) -> None:
    """Killed while runs are trained, measured and summed up: what was finished is not trained again."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("size: debug\nseeds: 2\nvariants: {clip: {recipe: clip}, kd: {recipe: clip-kd}}\n")
    quick = ["--quiet", "train.steps=3", "train.checkpoint_every=1"]

    def command(out: str) -> list[str]:
        return ["ablate", str(plan), "--out", str(tmp_path / out), *quick]

    launcher.start(*command("peace")).finish()
    rng, out = random.Random(3), tmp_path / "killed"
    for number in range(COUNT // 2):
        child = launcher.start(*command("killed"))
        wait_for(out, ("*/checkpoints/step-*", "*/.student*", "*/scores.json", "*/run.json")[number % 4], child)
        child.wait(rng.random() * 0.3)
        done = {path.parent.name for path in out.glob("*/run.json") if '"finished"' in path.read_text()}
        times = {name: (out / name / "student" / "model.safetensors").stat().st_mtime_ns for name in done}
        child.send(9)
        child.wait()
        if child.code == 0:
            break
    assert "Traceback" not in launcher.start(*command("killed")).finish()
    assert all((out / name / "student" / "model.safetensors").stat().st_mtime_ns == at for name, at in times.items())
    for run in run_folders(tmp_path / "peace"):
        require_same_weights(run, out / run.name)
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "checkpoints" not in path.parts}
        for folder in (tmp_path / "peace", out)
    ]
    assert names[0] == names[1]


def require_same_weights(one: Path, two: Path) -> None:
    assert (one / "student/model.safetensors").read_bytes() == (two / "student/model.safetensors").read_bytes(), one
    assert json.loads((two / "run.json").read_text())["status"] == "finished"
