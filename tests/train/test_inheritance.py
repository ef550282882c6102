"""Runs that inherit: from the teacher, with masks and pruning, in stages; all resumable to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.errors import InputError, Preempted
from clipdistill.models import load_model
from clipdistill.models.inheritance.parts import transformer_sizes
from clipdistill.models.sized import SizedAttention
from clipdistill.runs.folder import read_rows as read_lines
from clipdistill.runs.folder import run_folders
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.run import distill
from clipdistill.train.setup import build
from clipdistill.train.stages import distill_stages, resolve_stages
from tests.train.support import require_same_run, stop_after


def is_sized(module):
    """Whether any block of the model has a size of its own."""
    return any(isinstance(part, SizedAttention) for part in module.modules())


def settings(out: Path, recipe: str, *assignments: str) -> RunConfig:
    return resolve(recipe, {"out": str(out)}, size="debug", assignments=["evaluation.curve_images=16", *assignments])


def test_the_student_starts_as_part_of_its_teacher(tmp_path: Path) -> None:
    setup = build(settings(tmp_path / "run", "tinyclip-manual"), torch.device("cpu"))
    teacher = load_model("scenes-teacher").module.state_dict()
    student = setup.student.module.state_dict()
    assert torch.equal(student["visual.conv1.weight"], teacher["visual.conv1.weight"][:64])
    assert torch.equal(student["token_embedding.weight"], teacher["token_embedding.weight"][:, :64])
    assert setup.student.image == setup.teacher.model.image  # type: ignore[union-attr]
    assert transformer_sizes(setup.student.module, "image").layers == 2
    control = build(
        settings(tmp_path / "run", "tinyclip-manual", "student=inherit:layers=2,width=64,weights=random"),
        torch.device("cpu"),
    )
    random = control.student.module.state_dict()
    assert random["visual.conv1.weight"].shape == (64, 3, 8, 8)
    assert not torch.equal(random["visual.conv1.weight"], teacher["visual.conv1.weight"][:64])


def test_an_inherited_student_needs_one_teacher_or_a_model_named(tmp_path: Path) -> None:
    config = settings(tmp_path, "clip", "student=inherit:layers=2", "teacher=null")
    with pytest.raises(InputError, match="without ,from=MODEL"):
        build(config, torch.device("cpu"))
    config = settings(tmp_path, "clip", "student=inherit:layers=2,from=scenes-teacher", "teacher=null")
    assert transformer_sizes(build(config, torch.device("cpu")).student.module, "image").layers == 2


@pytest.fixture(scope="module")
def automatic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "auto"
    distill(settings(out, "tinyclip-auto", *CHANGES), quiet=True)
    return out


CHANGES = ("train.steps=6", "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.evaluate_every=2")


def test_masks_close_and_are_pruned_on_the_way(automatic: Path) -> None:
    lines = read_lines(automatic / "log.jsonl")
    assert ["sparsity" in line for line in lines] == [True, True, True, False, False, False]
    assert lines[1]["sparsity"]["joint/expected"] > lines[0]["sparsity"]["joint/expected"] > 0
    assert lines[1]["sparsity"]["joint/target"] == 0.5
    assert lines[1]["sparsity"]["image/lambda1"] > 10
    # the schedule starts again after pruning at step 3, without warm-up
    rates = [line["learning_rate"] for line in lines]
    assert rates[3] == pytest.approx(1e-4)
    assert rates[2] < rates[1]
    assert rates[3] > rates[4] > rates[5]
    student, teacher = load_model(automatic), load_model("scenes-teacher")
    described = json.loads((automatic / "run.json").read_text())
    assert described["parameters"]["total"] == student.parameter_counts()["total"] < teacher.parameter_counts()["total"]
    assert is_sized(student.module)
    assert (automatic / "scores.json").is_file()


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_interrupted_before_at_and_after_pruning(
    automatic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    stop_after(monkeypatch, step)
    with pytest.raises(Preempted):
        distill(settings(tmp_path / "parts", "tinyclip-auto", *CHANGES), quiet=True)
    monkeypatch.undo()
    folder = tmp_path / "parts" / "checkpoints" / f"step-{step:08d}"
    assert (folder / "masks.safetensors").exists() == (step <= 3)
    parts = distill(settings(tmp_path / "parts", "tinyclip-auto", *CHANGES), quiet=True)
    assert parts.status == "finished"
    require_same_run(automatic, parts.folder, 6)


def test_micro_batches_see_the_same_masks(tmp_path: Path) -> None:
    changes = ("train.steps=2", "train.masks.prune_step=2")
    whole = distill(settings(tmp_path / "whole", "tinyclip-auto", *changes), quiet=True)
    parts = distill(settings(tmp_path / "parts", "tinyclip-auto", *changes, "train.micro_batch=5"), quiet=True)
    one, two = (load_file(run.folder / "student/model.safetensors") for run in (whole, parts))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    # Adam's first steps are signs of the gradient: compare the log, which is linear in the rounding
    logs = [read_lines(run.folder / "log.jsonl") for run in (whole, parts)]
    for a, b in zip(*logs, strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_run_as_long_as_its_masks_still_ends_pruned(tmp_path: Path) -> None:
    run = distill(settings(tmp_path / "run", "tinyclip-auto", "train.steps=3", "train.masks.prune_step=9"), quiet=True)
    assert load_model(run.folder).parameter_counts()["total"] < load_model("scenes-teacher").parameter_counts()["total"]


def test_masks_and_compile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.compile"):
        settings(tmp_path, "tinyclip-auto", "train.compile=true")


def staged(out: Path, recipe: str, *assignments: str) -> list[RunConfig]:
    return resolve_stages(recipe, {"out": str(out)}, size="debug", assignments=assignments)


def test_stages_shrink_step_by_step_and_make_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    configs = staged(out, "tinyclip-auto-stages")
    assert [config.train.masks.sparsity for config in configs] == [0.25, 0.5, 0.75]  # type: ignore[union-attr]
    assert [config.train.seed for config in configs] == [0, 1, 2]
    assert configs[1].student == f"inherit:all,from={out / 'stage-1-75' / 'student'}"
    assert {config.teacher for config in configs} == {"scenes-teacher"}
    stop_after(monkeypatch, 6)  # in the second stage
    with pytest.raises(Preempted):
        distill_stages(configs, quiet=True)
    monkeypatch.undo()
    listed = json.loads((out / "stages.json").read_text())
    assert listed["status"] == "stopped"
    assert [stage["status"] for stage in listed["stages"]] == ["finished", "stopped", "waiting"]
    assert [folder.name for folder in run_folders(out)] == ["stage-1-75", "stage-2-50"]
    runs = distill_stages(configs, quiet=True)
    assert json.loads((out / "stages.json").read_text())["status"] == "finished"
    sizes = [load_model("scenes-teacher").parameter_counts()["total"]]
    sizes += [load_model(run.folder).parameter_counts()["total"] for run in runs]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    assert load_model(out).parameter_counts()["total"] == sizes[-1]
    page = (out / "report.html").read_text()
    assert all(f"run {name}" in page for name in ("75", "50", "25"))
    before = (out / "stage-3-25" / "run.json").stat().st_mtime_ns
    assert [run.status for run in distill_stages(configs, quiet=True)] == ["finished"] * 3
    assert (out / "stage-3-25" / "run.json").stat().st_mtime_ns == before


def test_a_chain_of_teacher_assistants(tmp_path: Path) -> None:
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(
        "from: clip-kd\n"
        "stages:\n"
        "  assistant: {student: 'inherit:layers=3'}\n"
        "  student: {student: scenes-student, teacher: previous, train: {steps: 2}}\n"
    )
    out = tmp_path / "run"
    configs = resolve_stages(
        recipe,
        {"out": str(out)},
        size="debug",
        assignments=["preflight.allow_weak_teacher=true", "stages.assistant.train.steps=1"],
    )
    assert [config.train.steps for config in configs] == [1, 2]
    assistant, student = distill_stages(configs, quiet=True)
    described = json.loads((student.folder / "run.json").read_text())
    assert configs[1].teacher == str(assistant.student)
    assert described["teacher_parameters"] == json.loads((assistant.folder / "run.json").read_text())["parameters"]


def test_settings_of_one_stage_and_of_all(tmp_path: Path) -> None:
    configs = staged(tmp_path, "tinyclip-manual-stages", "train.steps=7", "stages.50.train.steps=9", "train.seed=4")
    assert [config.train.steps for config in configs] == [7, 9]
    assert [config.train.seed for config in configs] == [4, 5]
    assert [config.out.name for config in configs] == ["stage-1-75", "stage-2-50"]
    assert resolve_stages("clip-rd", {"out": str(tmp_path)}, size="debug") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {a: {teacher: previous}}", "no stage before the first"),
        ("stages: {a: {student: 'inherit:all,from=previous'}}", "no stage before the first"),
        ("stages: {a/b: {}}", "a name has letters"),
        ("stages: [a]", "'stages' must map"),
        ("stages: {}", "'stages' must map"),
        ("stages: {a: {studnet: x}}", "unknown key 'studnet'"),
    ],
)
def test_refused_stages(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"from: clip-kd\n{text}\n")
    with pytest.raises(InputError) as caught:
        resolve_stages(recipe, {"out": str(tmp_path / "run")}, size="debug")
    assert message in str(caught.value)


def test_a_recipe_of_stages_is_no_single_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="describes a run in stages"):
        resolve("tinyclip-auto-stages", {"out": str(tmp_path)}, size="debug")


@pytest.mark.parametrize("locked", ["image", "text"])
def test_a_locked_tower_stays_as_it_is(tmp_path: Path, locked: str) -> None:
    """LiT: one tower keeps its weights to the bit, the other trains."""
    run = distill(
        settings(tmp_path / "run", "clip", "student_weights=scenes-teacher", f"train.freeze=[{locked}]"), quiet=True
    )
    before = load_model("scenes-teacher").module.state_dict()
    after = load_model(run.folder).module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    image = {name for name in before if name.startswith("visual.")}
    text = set(before) - image - {"logit_scale"}
    assert not changed & (image if locked == "image" else text)
    assert changed & (text if locked == "image" else image)


def test_a_locked_resnet_keeps_its_statistics(tmp_path: Path) -> None:
    """Batch statistics of a frozen tower move neither in training nor by the evaluation between steps."""
    config = settings(
        tmp_path / "run", "clip", "student=flickr-student", "train.freeze=[image]", "train.evaluate_every=1"
    )
    setup = build(config, torch.device("cpu"))
    before = {name: value.clone() for name, value in setup.student.module.visual.named_buffers()}
    run = distill(config, quiet=True)
    after = dict(load_model(run.folder).module.visual.named_buffers())
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_layer_decay_reaches_the_optimiser_and_the_schedule(tmp_path: Path) -> None:
    config: Any = settings(tmp_path / "run", "clip", "train.layer_decay=0.5", "train.steps=3")
    setup = build(config, torch.device("cpu"))
    peak = config.train.learning_rate
    rate = {id(p): group["initial_lr"] for group in setup.optimiser.param_groups for p in group["params"]}
    rates = {name: rate[id(p)] for name, p in setup.student.module.named_parameters()}
    assert rates["visual.proj"] == rates["logit_scale"] == peak
    assert rates["visual.transformer.resblocks.2.ln_1.weight"] == pytest.approx(peak / 2)
    assert rates["visual.conv1.weight"] == pytest.approx(peak / 16)
    assert rates["token_embedding.weight"] == pytest.approx(peak / 8)
    run = distill(config, quiet=True)
    assert run.status == "finished"
