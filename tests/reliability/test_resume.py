"""Row 18: N + N steps are 2 N steps, to the bit, whatever is switched on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.reliability.support import STEPS, Launcher, lines, require_same_run, training

CASES = {
    # two steps an epoch: steps 1, 2 and 3 are the middle, the end and the middle of an epoch
    "bf16, gradient caching, workers": (1, ["train.precision=bf16", "train.micro_batch=3", "train.workers=1"]),
    "masked patches, dropped samples": (2, ["train.mask_ratio=0.5", "data.size=21"]),
    "several epochs in a window of the log": (3, ["train.log_every=5", "train.keep_checkpoints=1"]),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if "masked" in case else []) for case in sorted(CASES)]
)
def test_row_18_two_halves_are_one_run(launcher: Launcher, models: Path, tmp_path: Path, case: str) -> None:
    step, settings = CASES[case]
    whole = training(models, tmp_path / "whole", *settings, "train.checkpoint_every=null")
    launcher.start(*whole).finish()
    parts = training(models, tmp_path / "parts", *settings, "train.checkpoint_every=null")
    assert f"after step {step + 1}; saved" in launcher.start(*parts, fault="stop_at", step=step).finish(75)
    assert f"from step {step + 1}" in " ".join(launcher.start(*parts).finish().split())
    require_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_row_18_with_a_cache_of_stored_views(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fill = ["cache", "--teacher", models / "teacher", "--data", "scenes:train", "--out", cache, "--device", "cpu"]
    launcher.start(*fill, "--views", 2, "--block", 8, "--quiet", "data.size=20").finish()
    settings = ["--teacher", f"cache:{cache}", "train.workers=1", "evaluation.teacher=" + str(models / "teacher")]
    launcher.start(*training(models, tmp_path / "whole"), *settings).finish()
    parts = [*training(models, tmp_path / "parts"), *settings]
    launcher.start(*parts, fault="stop_at", step=2).finish(75)
    launcher.start(*parts).finish()
    require_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_row_18_in_the_second_of_several_stages(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(
        "from: clip-kd\n"
        "stages:\n"
        f"  first: {{train: {{steps: 2}}, student_weights: {models / 'student'}, teacher: {models / 'teacher'}}}\n"
        "  second: {train: {steps: 4}, student_weights: previous, teacher: previous}\n"
    )

    def command(out: Path) -> list[str]:
        words = training(models, out)
        words[words.index("--recipe") + 1] = str(recipe)
        for option in ("--student-weights", "--teacher"):
            at = words.index(option)
            del words[at : at + 2]
        return [word for word in words if not word.startswith("train.steps")]

    launcher.start(*command(tmp_path / "whole")).finish()
    parts = command(tmp_path / "parts")
    launcher.start(*parts, fault="stop_at", step=2).finish(75)  # the first stage has no such step
    listed = json.loads((tmp_path / "parts" / "stages.json").read_text())
    assert [stage["status"] for stage in listed["stages"]] == ["finished", "stopped"]
    launcher.start(*parts).finish()
    for stage, steps in (("stage-1-first", 2), ("stage-2-second", 4)):
        require_same_run(tmp_path / "whole" / stage, tmp_path / "parts" / stage, steps)
    a, b = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_row_18_logs_have_every_step_once(undisturbed: Path) -> None:
    assert [line["step"] for line in lines(undisturbed / "log.jsonl")] == list(range(2, STEPS + 1, 2))
    assert [line["step"] for line in lines(undisturbed / "eval.jsonl")] == [3, 6]


def test_row_18_a_damaged_newest_checkpoint_costs_only_its_own_steps(
    launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Also with one checkpoint kept: the good one stays until a better one is there."""
    out = tmp_path / "run"
    settings = training(models, out, "train.keep_checkpoints=3")
    launcher.start(*settings, fault="stop_at", step=3).finish(75)
    victim = out / "checkpoints" / "step-00000004" / "objective.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    settings = training(models, out, "train.keep_checkpoints=1", "train.checkpoint_every=2")
    said = " ".join(launcher.start(*settings, fault="stop_at", step=3).finish(75).split())
    assert "missing or damaged" in said
    assert "from step 3" in said
    launcher.start(*training(models, out)).finish()
    require_same_run(undisturbed, out)
