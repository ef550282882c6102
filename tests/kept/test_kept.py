"""What earlier versions wrote is still read: run folders, checkpoints, grids, caches, search indexes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.data.pairs import DataConfig

KEPT = Path(__file__).parent
STUDENT = "inherit:layers=1,heads=1,width=64,text_layers=1,text_width=64,text_heads=1,embed=32,from=scenes-teacher"


def scores_of(path: Path) -> dict[tuple[str, str], float]:
    return {(row["model"], row["metric"]): row["value"] for row in json.loads(path.read_text())["scores"]}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of the samples, so that nothing can be changed in place."""
    shutil.copytree(KEPT, tmp_path / "kept", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path / "kept"


def test_a_finished_run_is_evaluated_to_the_scores_it_had(kept: Path) -> None:
    found = cd.evaluate(kept / "run", DataConfig(path="scenes:val", size=32))
    before = scores_of(KEPT / "run" / "scores.json")
    assert len(found) >= 8
    for score in found:  # another processor may round a rank otherwise
        assert score.value == pytest.approx(before["student", score.metric], abs=0.011), score.metric


def test_a_finished_run_is_left_as_it_is_by_its_own_command(kept: Path) -> None:
    before = (kept / "run" / "student" / "model.safetensors").stat().st_mtime_ns
    assert train(kept / "run") == 0
    assert (kept / "run" / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_a_stopped_run_goes_on_to_the_same_student(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(kept / "stopped") == 0
    assert "from step 3" in " ".join("".join(capsys.readouterr()).split())
    expected = load_file(KEPT / "run" / "student" / "model.safetensors")
    found = load_file(kept / "stopped" / "student" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():  # another processor may round otherwise
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_runs_are_reported_compared_and_claimed(kept: Path, tmp_path: Path) -> None:
    runs = sorted(str(path) for path in (kept / "grid").glob("*.seed-*"))
    assert len(runs) == 4
    assert main(["report", *runs, str(kept / "run"), "--out", str(tmp_path / "report.html")]) == 0
    assert "CLIP-RD" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["compare", *runs[:2], "--against", *runs[2:]]) == 0
    (tmp_path / "claims.yaml").write_text(
        "claims: [{id: kept, claim: clip-rd > clip-rd-without-vrd on scenes/val t2i_R@1}]"
    )
    assert main(["claims", str(tmp_path / "claims.yaml"), *runs]) == 0


def test_a_grid_of_an_ablation_is_known(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--recipe", "clip-rd", "--drop", "vrd", "--seeds", "2", "--size", "debug", "--student", STUDENT]
    assert main(["ablate", *common, "--out", str(kept / "grid"), "--list"]) == 0
    assert capsys.readouterr().out.count("finished") == 4


@pytest.mark.parametrize("name", ["cache", "cache-int8"])
def test_a_cache_teaches(kept: Path, tmp_path: Path, name: str) -> None:
    assert main(["cache", "verify", str(kept / name)]) == 0
    newer = "train.cache_allow_versions=true"  # libraries' newer versions are refused otherwise
    assert train(tmp_path / "run", "--teacher", f"cache:{kept / name}", newer, recipe="clip-kd", steps=2) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teacher"]


def test_a_search_index_answers_as_it_did(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", kept / "photos", "--model", kept / "run", "--query", "a red square", "--json"]
    assert main([str(a) for a in arguments]) == 0
    found = json.loads(capsys.readouterr().out)["answers"][0]["hits"]
    before = json.loads((KEPT / "photos.json").read_text())["answers"][0]["hits"]
    assert len(found) == len(before) == 4
    assert np.allclose([hit["score"] for hit in found], [hit["score"] for hit in before], atol=1e-3)


def train(out: Path, *more: str, recipe: str = "clip-rd", steps: int = 6) -> int:
    settings = [f"train.steps={steps}", "train.evaluate_every=3", "train.checkpoint_every=3"]
    common = ["--recipe", recipe, "--size", "debug", "--student", STUDENT, "--out", str(out), *more]
    return main(["train", *common, *settings])
