"""A mistake is told before anything heavy is loaded: every command, each with its typical mistakes, in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipdistill.cli import COMMANDS
from clipdistill.commands import command_parser
from tests.conftest import REPOSITORY
from tests.report.synthetic import write_run

HEAVY = ("torch", "torchvision", "open_clip", "timm", "transformers", "matplotlib", "scipy", "pyarrow", "onnxruntime")
WATCHED = f"""
import sys
from clipdistill.cli import main
code = main(sys.argv[1:])
print("LOADED", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
TRAIN = ["train", "--recipe", "clip", "--size", "debug", "--out", "{tmp}/out"]
CASES = {
    "no such command": (["trian"], "did you mean 'train'"),
    "train, recipe": (["train", "--recipe", "clip-dr"], "did you mean 'clip-rd'"),
    "train, recipe file": (["train", "--recipe", "absent.yaml"], "absent.yaml"),
    "train, key": ([*TRAIN, "train.stesp=3"], "did you mean 'steps'"),
    "train, value": ([*TRAIN, "train.steps=many"], "train.steps"),
    "train, term": ([*TRAIN, "objective.weights.vrdkl=1"], "vrd_kl"),
    "train, student": ([*TRAIN, "--student", "ViT-T16"], "did you mean 'ViT-T-16'"),
    "train, teacher": (
        ["train", "--recipe", "clip-rd", *TRAIN[3:], "--teacher", "ViT-B16/laion400m_e32"],
        "did you mean 'ViT-B-16'",
    ),
    "train, tag": (["train", "--recipe", "clip-rd", *TRAIN[3:], "--teacher", "ViT-B-16/laion400m"], "laion400m_e3"),
    "train, data": ([*TRAIN, "--data", "absent.json"], "absent.json"),
    "train, validation": ([*TRAIN, "--validation", "absent.json"], "absent.json"),
    "train, no student": (["train", "--recipe", "clip", "--data", "scenes", "--out", "{tmp}/out"], "no student"),
    "replay": (["replay", "absent"], "absent"),
    "ablate, recipe": (["ablate", "--recipe", "clip-dr", "--out", "{tmp}/out"], "did you mean 'clip-rd'"),
    "ablate, plan": (["ablate", "absent.yaml", "--out", "{tmp}/out"], "absent.yaml"),
    "ablate, term": (
        ["ablate", "--recipe", "clip-rd", "--size", "debug", "--drop", "xdr", "--out", "{tmp}/out"],
        "xdr",
    ),
    "ablate, student": (
        ["ablate", "--recipe", "clip", "--size", "debug", "--student", "ViT-T16", "--out", "{tmp}/out"],
        "did you mean 'ViT-T-16'",
    ),
    "fetch": (["fetch", "cifar11"], "did you mean 'cifar10'"),
    "fetch, what cannot be": (["fetch", "imagenet"], "put there its validation pictures"),
    "regions": (["regions", "boxes", "--data", "absent.json", "--detector", "grid:1", "--out", "x"], "absent.json"),
    "cache, teacher": (["cache", "--teacher", "ViT-B16", "--data", "scenes", "--out", "{tmp}/c"], "did you mean"),
    "cache, setting": (
        ["cache", "--teacher", "scenes-teacher", "--data", "scenes", "--out", "{tmp}/c", "blok=3"],
        "did you mean 'block'",
    ),
    "embed": (["embed", "absent-run", "--data", "scenes:val", "--out", "x.npy"], "absent-run"),
    "embed data": (["embed", "scenes-teacher", "--data", "absent", "--out", "x.npy"], "absent"),
    "probe": (["probe", "absent-run", "--train", "a", "--test", "b"], "absent-run"),
    "probe data": (["probe", "scenes-teacher", "--train", "absent", "--test", "absent"], "absent"),
    "eval, data": (["eval", "scenes-teacher", "--data", "absent.json"], "absent.json"),
    "eval, set": (["eval", "scenes-teacher", "--data", "cifar100"], "clipdistill fetch cifar100"),
    "eval": (["eval", "absent-run", "--data", "scenes:val"], "absent-run"),
    "export": (["export", "absent-run", "--to", "onnx", "--out", "{tmp}/e"], "absent-run"),
    "compare": (["compare", "absent-a", "absent-b"], "absent-a"),
    "claims, file": (["claims", "absent.yaml", "{tmp}/run"], "absent.yaml"),
    "claims, run": (["claims", "published", "absent-run"], "absent-run"),
    "bench, model": (["bench", "absent-run"], "absent-run"),
    "bench, back end": (["bench", "scenes-student", "--backend", "egaer"], "did you mean 'eager'"),
    "report, run": (["report", "absent-run", "--out", "{tmp}/r.html"], "absent-run"),
    "report, place": (["report", "{tmp}/run", "--out", "{tmp}/r.pdf"], "ends in .html"),
    "search, folder": (["search", "absent-folder", "--model", "scenes-student"], "absent-folder"),
    "search, model": (["search", "{tmp}", "--model", "ViT-T16"], "did you mean"),
    "serve": (["serve", "absent-run"], "absent-run"),
    "serve, limits": (["serve", "scenes-teacher", "--queue", "3"], "--queue 3"),
    "scenes": (["scenes", "--out", "{tmp}/s", "--splits", "vla"], "vla"),
    "demo": (["demo", "--recipes", "clip-dr", "--out", "{tmp}/d"], "did you mean 'clip-rd'"),
    "list": (["list", "student"], "students"),
    "completion": (["completion", "fish"], "zsh"),
    "plug-in": (["list", "recipes", "--plugin", "absent.py"], "absent.py"),
}


def watched(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    words = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    return subprocess.run([sys.executable, "-c", WATCHED, *words], capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_before_anything_heavy_is_loaded(case: str, tmp_path: Path) -> None:
    arguments, told = CASES[case]
    if "{tmp}/run" in arguments:
        write_run(tmp_path / "run")
    done = watched(arguments, tmp_path)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    loaded = [line for line in done.stderr.splitlines() if line.startswith("LOADED")]
    assert loaded in (["LOADED []"], [])  # none where argparse itself refused


@pytest.mark.parametrize("what", ["recipes", "students", "datasets", "settings"])
def test_lists_load_nothing_heavy(what: str, tmp_path: Path) -> None:
    done = watched(["list", what], tmp_path)
    assert done.returncode == 0
    assert "LOADED []" in done.stderr


def test_the_doctor_loads_nothing_heavy(tmp_path: Path) -> None:
    assert "LOADED []" in watched(["doctor"], tmp_path).stderr


def test_every_command_has_a_case() -> None:
    assert set(COMMANDS) - {arguments[0] for arguments, _ in CASES.values()} <= {"doctor"}


def test_a_plan_of_variants_is_checked_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    plan = {"variants": {"a": {"recipe": "clip", "settings": {"train.stesp": 3}}}, "size": "debug"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    done = watched(["ablate", "plan.yaml", "--out", "x"], tmp_path)
    assert done.returncode == 2
    assert "LOADED []" in done.stderr


RUN = str(REPOSITORY / "tests" / "kept" / "run")
COMPLETE = {
    "train": [*TRAIN, "train.steps=1"],
    "replay": ["replay", RUN],
    "ablate": ["ablate", "--recipe", "clip", "--size", "debug", "--out", "{tmp}/out"],
    "cache": ["cache", "--teacher", "scenes-teacher", "--data", "scenes:val?size=4", "--out", "{tmp}/out"],
    "embed": ["embed", RUN, "--data", "scenes:val?size=4", "--out", "{tmp}/e.npy"],
    "eval": ["eval", RUN, "--data", "scenes:val?size=4"],
    "probe": ["probe", RUN, "--train", "scenes-classes:train", "--test", "scenes-classes:test"],
    "bench": ["bench", RUN],
    "export": ["export", RUN, "--to", "onnx", "--out", "{tmp}/out", "--data", "scenes:val?size=4"],
    "search": ["search", "{tmp}", "--model", RUN, "--index", "{tmp}/i", "--query", "red"],
    "serve": ["serve", RUN],
    "scenes": ["scenes", "--out", "{tmp}/out", "--size", "4"],
    "demo": ["demo", "--out", "{tmp}/out"],
}
SEVERAL = """
import contextlib, io, json, sys
from clipdistill.cli import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
    print(json.dumps([words, code, "torch" in sys.modules, said.getvalue().strip().splitlines()[-1]]))
"""


@pytest.mark.parametrize("command", COMPLETE)
def test_a_number_that_an_option_cannot_have_is_told_before_anything_heavy_is_loaded(command, tmp_path):
    options = [a for a in command_parser(command)[1]._actions if a.option_strings and a.type in (int, float)]
    words = [word.replace("{tmp}", str(tmp_path)) for word in COMPLETE[command]]
    if command == "export":  # whose packages need not be there
        options = [option for option in options if option.option_strings[-1] != "--opset"]
    tried = [[*words, f"{option.option_strings[-1]}={value}"] for option in options for value in (-1, "nan", "inf")]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(tried)], capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == len(tried) > 0
    for line in done.stdout.splitlines():
        given, code, loaded, said = json.loads(line)
        assert (code, loaded) == (2, False), (given, said)
        assert given[-1].partition("=")[0].strip("-").split("-")[0] in said.replace("_", "-"), (given, said)
    assert [path for path in tmp_path.iterdir() if path.name != "i"] == []
