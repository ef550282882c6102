"""The grid: one configuration a run, shards that share nothing, changes that are refused with their key."""

import os
import re
from pathlib import Path

import pytest

from clipdistill.ablate.grid import build_grid, shard
from clipdistill.ablate.plan import read_plan
from clipdistill.errors import InputError
from tests.ablate.synthetic import plan_of, write_run

VARIANTS = {"clip": {"recipe": "clip"}, "kd": {"recipe": "clip-kd", "settings": {"train.weight_decay": 0.5}}}


def test_every_variant_gets_every_seed_and_the_same_budget(tmp_path):
    plan = plan_of(VARIANTS, seeds=[3, 7], settings={"train": {"steps": 5}})
    grid = build_grid(plan, tmp_path, {"train": {"batch_size": 8}}, ["train.learning_rate=0.25"])
    assert [run.name for run in grid] == ["clip.seed-3", "kd.seed-3", "clip.seed-7", "kd.seed-7"]
    for run in grid:
        train = run.config.train
        assert (train.seed, train.steps, train.batch_size, train.learning_rate) == (run.seed, 5, 8, 0.25)
        assert run.config.method == run.variant
        assert train.precision == "fp32"
    assert [run.config.train.weight_decay for run in grid] == [0.1, 0.5, 0.1, 0.5]
    assert grid[0].config.teacher == grid[1].config.teacher == "scenes-teacher"


@pytest.mark.parametrize(
    ("variants", "settings"),
    [
        ({"a": {"recipe": "clip", "batch_size": 8}, "b": {"recipe": "clip", "batch_size": 16}}, "train.batch_size=4"),
        ({"a": {"recipe": "clip-kd"}, "b": {"recipe": "clip-kd", "weights": {"fd": 2000}}}, "train.weight_decay=0"),
        ({"a": {"recipe": "clip-kd"}, "b": {"recipe": "clip-kd", "drop": ["fd"]}}, "objective.weights.fd=0"),
    ],
)
def test_variants_that_are_one_and_the_same_are_refused(variants, settings, tmp_path):
    with pytest.raises(InputError, match="variants 'a' and 'b' have the same settings"):
        build_grid(plan_of(variants), tmp_path, assignments=[settings])


def test_a_variant_may_have_more_seeds_than_the_others(tmp_path):
    variants = {"clip": {"recipe": "clip"}, "kd": {"recipe": "clip-kd", "seeds": 3}}
    grid = build_grid(plan_of(variants, seeds=[0, 1]), tmp_path)
    assert [run.name for run in grid] == ["clip.seed-0", "kd.seed-0", "clip.seed-1", "kd.seed-1", "kd.seed-2"]


PLANS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("ablation_*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_of_the_benchmarks_makes_its_runs(path, tmp_path, monkeypatch):
    assert len(PLANS) > 5
    monkeypatch.setattr("clipdistill.ablate.grid.check_names", lambda config: None)  # whether files and caches are here
    plan = read_plan(path)
    named = {"student": "scenes-student", "data": {"path": "scenes"}, "teacher": "cache:somewhere"}
    grid = build_grid(plan, tmp_path, named)
    assert {run.variant for run in grid} == set(plan.variants)


def test_shards_cover_the_grid_and_share_no_run(tmp_path, monkeypatch):
    grid = build_grid(plan_of(VARIANTS, seeds=5), tmp_path)
    parts = [shard(grid, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in grid)
    assert sum(len(part) for part in parts) == len(grid)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shard(grid, None) == grid
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert shard(grid, "ranks") == parts[1]
    assert "WORLD_SIZE" not in os.environ  # the process trains alone
    for key, value in (("ID", "7"), ("COUNT", "3"), ("MIN", "5")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    assert shard(grid, "slurm") == parts[2]


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "a/b", "ranks"])
def test_shards_that_make_no_sense_are_refused(tmp_path, text):
    with pytest.raises(InputError, match=re.escape("--shard")):
        shard(build_grid(plan_of(VARIANTS), tmp_path), text)


def test_what_is_on_disk_is_recognised(tmp_path):
    plan = plan_of(VARIANTS, seeds=1)
    grid = build_grid(plan, tmp_path)
    assert [run.state() for run in grid] == ["new", "new"]
    write_run(grid[0], 0.3)
    write_run(grid[1], 0.3, status="failed")
    assert [run.state() for run in build_grid(plan, tmp_path)] == ["finished", "interrupted"]
    changed = build_grid(plan, tmp_path, {"train": {"learning_rate": 0.5}})
    with pytest.raises(InputError, match=r"clip.seed-0 holds .*train.learning_rate: 0.001 -> 0.5"):
        changed[0].state()
    stored = grid[0].folder / "recipe.yaml"  # as an older version wrote it, without a setting that came later
    stored.write_text("".join(line for line in stored.open() if "max_logit_scale" not in line))
    assert "max_logit_scale" not in stored.read_text()
    assert grid[0].state() == "finished"
    faster = build_grid(plan, tmp_path, {"train": {"log_every": 7}})  # changes nothing that is learned
    assert faster[0].state() == "finished"


def test_a_recipe_in_stages_is_no_variant(tmp_path):
    with pytest.raises(InputError, match="variant 'a': recipe tinyclip-manual-stages describes a run in stages"):
        build_grid(plan_of({"a": {"recipe": "tinyclip-manual-stages"}}), tmp_path)
