"""Old and new versions: format numbers are refused by name, settings that were not known yet take their defaults."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from clipdistill.cache.store import CacheStore
from clipdistill.errors import InputError
from clipdistill.runtime.files import CHECKSUM
from clipdistill.train.checkpoint import newest_checkpoint
from clipdistill.train.run import distill
from tests.cache.support import filled
from tests.conftest import REPOSITORY
from tests.reliability.support import Launcher, require_same_run, training


@pytest.fixture
def stopped(launcher: Launcher, models: Path, tmp_path: Path) -> Path:
    """A run that was asked to stop after two of its six steps."""
    out = tmp_path / "run"
    launcher.start(*training(models, out), fault="stop_at", step=1).finish(75)
    return out


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    values.pop(CHECKSUM, None)
    values |= changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def test_a_checkpoint_of_a_later_version_is_refused_and_not_passed_over(
    launcher: Launcher, models: Path, stopped: Path
) -> None:
    newest = stopped / "checkpoints" / "step-00000002" / "state.json"
    edit(newest, format=3, sha256=...)
    with pytest.raises(InputError, match="checkpoint format 3, this version reads 2; resume it with the version"):
        newest_checkpoint(stopped / "checkpoints")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    said = launcher.start(*training(models, stopped)).finish(2)
    assert "checkpoint format 3" in said
    after = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert after == before, "whoever wrote it can still go on from it"


def test_a_run_of_an_earlier_version_goes_on(
    launcher: Launcher, models: Path, stopped: Path, undisturbed: Path
) -> None:
    """Counters and settings that came later are absent there."""
    edit(stopped / "checkpoints" / "step-00000002" / "state.json", evaluation_due=..., format=1, sha256=...)
    recipe = stopped / "recipe.yaml"
    kept = [line for line in recipe.read_text().splitlines() if "rank_timeout" not in line]
    recipe.write_text("\n".join(kept) + "\n")
    assert "from step 2" in launcher.start(*training(models, stopped)).finish()
    require_same_run(undisturbed, stopped)


def test_a_run_folder_of_a_later_version_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    from clipdistill.config import build, read_yaml
    from clipdistill.train.config import RunConfig

    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    config = build(RunConfig, {**read_yaml(out / "recipe.yaml"), "out": str(out)}, "here")
    assert distill(config, quiet=True).status == "finished"
    edit(out / "run.json", format=7)
    with pytest.raises(InputError, match="format 7, this version reads 1: go on with the version that wrote it"):
        distill(config, quiet=True)


def test_a_cache_of_a_later_version_is_refused(models: Path, tmp_path: Path) -> None:
    store = filled(tmp_path / "c", str(models / "teacher"), 8)
    edit(store.folder / "manifest.json", format=2)
    with pytest.raises(InputError, match="format 2, this version reads 1: use the version that wrote it"):
        CacheStore(store.folder)


def test_the_oldest_versions_are_the_declared_ones() -> None:
    """`make test-oldest` installs what pyproject.toml says is enough: neither can change without the other."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (REPOSITORY / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    optional = project["optional-dependencies"]
    declared = [*project["dependencies"], *optional["hf"], *optional["dev"]]
    bounds = {m[1].lower(): m[2] for d in declared if (m := re.match(r"([\w-]+)>=([\d.]+)", d))}
    assert {d.split(">=")[0].lower() for d in project["dependencies"]} <= pinned.keys()
    for name, version in pinned.items():
        assert version == bounds[name] or version.startswith(bounds[name] + "."), name
