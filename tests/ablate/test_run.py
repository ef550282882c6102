"""Training a grid on built-in data: what is shared, skipped, resumed, recorded; and that sharing changes nothing."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file

from clipdistill import cli
from clipdistill.ablate import run as ablate_run
from clipdistill.ablate.grid import build_grid
from clipdistill.ablate.run import failures, run_grid
from clipdistill.errors import ClipdistillError, Preempted
from clipdistill.runtime.files import write_json
from clipdistill.train import sources
from clipdistill.train.config import resolve
from clipdistill.train.distil import Distillation
from clipdistill.train.run import distill
from tests.ablate.synthetic import plan_of

VARIANTS = {"clip": {"recipe": "clip"}, "kd": {"recipe": "clip-kd", "drop": ["icl"]}}


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two variants with two seeds, and how often data and teachers were opened for them."""
    out = tmp_path_factory.mktemp("grid")
    opened = []
    patch = pytest.MonkeyPatch()
    for name in ("open_training", "open_pairs", "open_teacher"):
        original = getattr(sources, name)
        patch.setattr(sources, name, lambda *a, _f=original, _n=name, **k: opened.append(_n) or _f(*a, **k))
    grid = build_grid(plan_of(VARIANTS, seeds=2), out)
    outcome = run_grid(grid, out, quiet=True)
    patch.undo()
    return grid, outcome, opened


def test_everything_is_opened_once_for_all_runs(trained):
    grid, outcome, opened = trained
    assert outcome.finished == [run.name for run in grid]
    assert sorted(opened) == ["open_pairs", "open_teacher", "open_training"]  # validation, teacher, training


def test_the_runs_of_a_seed_start_alike_and_end_apart(trained):
    grid, _, _ = trained
    facts = {run.name: json.loads((run.folder / "run.json").read_text()) for run in grid}
    starts = {run.seed: {facts[r.name]["initial_weights"] for r in grid if r.seed == run.seed} for run in grid}
    assert [len(found) for found in starts.values()] == [1, 1]
    assert starts[0] != starts[1]
    assert {f["method"] for f in facts.values()} == set(VARIANTS)
    ends = [weights(run.folder)["visual.proj"] for run in grid]
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[3])
    assert not (grid[0].folder / "checkpoints").exists()


def test_a_run_of_the_grid_is_the_run_by_itself(trained, tmp_path):
    grid, _, _ = trained
    settings = {"out": str(tmp_path / "alone"), "train": {"seed": 1}, "objective": {"weights": {"icl": 0}}}
    config = resolve("clip-kd", settings, size="debug")
    alone = distill(config, quiet=True)
    inside = next(run for run in grid if run.name == "kd.seed-1")
    ours, theirs = weights(inside.folder), weights(alone.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    stored = json.loads((inside.folder / "scores.json").read_text())["scores"]
    assert {score["model"] for score in stored} == {"student", "teacher"}
    expected = json.loads((alone.folder / "scores.json").read_text())["scores"]
    key = lambda s: (s["model"], s["metric"])  # noqa: E731
    assert [(key(s), s["value"]) for s in sorted(stored, key=key)] == [
        (key(s), s["value"]) for s in sorted(expected, key=key)
    ]


def test_what_is_finished_is_not_trained_again(trained, monkeypatch):
    grid, _, _ = trained
    monkeypatch.setattr(ablate_run, "distill", lambda *a, **k: pytest.fail("trained again"))
    again = run_grid(build_grid(plan_of(VARIANTS, seeds=2), grid[0].folder.parent), grid[0].folder.parent, quiet=True)
    assert again.skipped == [run.name for run in grid]
    assert not again.finished


def test_what_a_kill_after_a_runs_last_word_leaves_is_taken_away(trained, tmp_path):
    out = tmp_path / "grid"
    shutil.copytree(trained[0][0].folder.parent, out)
    grid = build_grid(plan_of(VARIANTS, seeds=2), out)
    whole = sorted(out.rglob("*"))
    dead = json.dumps({"host": socket.gethostname(), "pid": 2**22 + 5, "started": "1"})
    for path in (grid[0].folder / ".lock", out / ".locks" / f"{grid[0].name}.lock"):
        path.write_text(dead)
    (grid[1].folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    (out / ".failures").mkdir()
    write_json(out / ".failures" / f"{grid[2].name}.json", {"error": "E", "message": "m"})
    with ablate_run._claimed(grid[3], out):  # at work: its locks are left
        (grid[3].folder / "checkpoints").mkdir()
        assert run_grid(grid, out, quiet=True).skipped == [run.name for run in grid]
        assert (grid[3].folder / "checkpoints").exists()
    assert run_grid(grid, out, quiet=True).skipped == [run.name for run in grid]
    assert sorted(path for path in out.rglob("*") if path.name != ".failures") == whole
    assert failures(out) == {}


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    original = ablate_run.distill

    def fragile(config, **options):
        if config.method == "kd" and not (tmp_path / "mended").exists():
            raise RuntimeError("the wire came off")
        return original(config, **options)

    monkeypatch.setattr(ablate_run, "distill", fragile)
    (tmp_path / "plan.yaml").write_text(
        "size: debug\nseeds: 1\nvariants: {kd: {recipe: clip-kd}, clip: {recipe: clip}}\n"
    )
    command = ["ablate", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--quiet", "train.steps=2"]
    assert cli.main(command) == 1
    assert "failed: kd.seed-0: RuntimeError: the wire came off" in capsys.readouterr().err
    assert list(failures(tmp_path / "out")) == ["kd.seed-0"]
    assert json.loads((tmp_path / "out" / "clip.seed-0" / "run.json").read_text())["status"] == "finished"
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["missing"] == ["kd.seed-0"]
    (tmp_path / "mended").touch()
    assert cli.main(command) == 0
    assert failures(tmp_path / "out") == {}
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["missing"] == []


def test_an_interrupted_run_goes_on_where_it_stopped(trained, tmp_path, monkeypatch):
    settings = {"train": {"checkpoint_every": 2, "steps": 3}}
    grid = build_grid(plan_of({"kd": VARIANTS["kd"]}, seeds=[1], settings=settings), tmp_path)
    original, steps = Distillation.gradients, []

    def stopping(task, step, batch):
        steps.append(step)
        if len(steps) == 3:
            raise Preempted("asked to stop")
        return original(task, step, batch)

    monkeypatch.setattr(Distillation, "gradients", stopping)
    with pytest.raises(Preempted):
        run_grid(grid, tmp_path, quiet=True)
    assert grid[0].state() == "interrupted"
    assert failures(tmp_path) == {}
    assert run_grid(grid, tmp_path, quiet=True).finished == ["kd.seed-1"]
    assert steps == [0, 1, 2, 2]
    uninterrupted = weights(next(run.folder for run in trained[0] if run.name == "kd.seed-1"))
    assert all(torch.equal(value, uninterrupted[name]) for name, value in weights(grid[0].folder).items())


def test_a_run_at_work_elsewhere_is_left_alone(tmp_path):
    grid = build_grid(plan_of({"clip": VARIANTS["clip"], "kd": VARIANTS["kd"]}, seeds=1), tmp_path)
    with ablate_run._claimed(grid[1], tmp_path) as taken:
        assert taken
        outcome = run_grid(grid, tmp_path, quiet=True)
    assert (outcome.finished, outcome.elsewhere) == (["clip.seed-0"], ["kd.seed-0"])


def test_the_command_reads_recipes_and_switches(tmp_path, capsys):
    command = ["ablate", "--recipe", "clip-rd", "--drop", "vrd,xrd", "--seeds", "2", "--size", "debug"]
    command += ["--out", str(tmp_path), "--list", "train.steps=2"]
    assert cli.main(command) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = ["clip-rd", "clip-rd-without-vrd", "clip-rd-without-xrd"]
    assert listed == [["new", f"{name}.seed-{seed}"] for seed in (0, 1) for name in names]
    assert cli.main(["ablate", "--out", str(tmp_path)]) == 2
    assert "name one file of variants" in capsys.readouterr().err
    plan = tmp_path / "plan.yaml"
    plan.write_text("variants: {a: {recipe: clip}}")
    assert cli.main(["ablate", str(plan), "--drop", "xrd", "--out", str(tmp_path / "x")]) == 2
    assert "--drop makes variants of recipes" in capsys.readouterr().err


def test_under_torchrun_a_failure_ends_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate_run, "world_size", lambda: 2)
    monkeypatch.setattr(ablate_run, "distill", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("lost")))
    grid = build_grid(plan_of({"clip": VARIANTS["clip"]}, seeds=1), tmp_path)
    with pytest.raises(ClipdistillError, match=r"clip\.seed-0 failed"):
        run_grid(grid, tmp_path, quiet=True)
    assert list(failures(tmp_path)) == ["clip.seed-0"]
