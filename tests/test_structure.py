"""The house: no circle of imports, no arrow that runs back up, no class name twice, files of a readable length."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from PIL import Image

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "docs" / "architecture.py"


WITHOUT_WINGS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({wings!r}):
            raise ModuleNotFoundError(f"{{name}} is absent")

sys.meta_path.insert(0, Absent())
from clipdistill.cli import main

for command in {commands!r}:
    code = main(command)
    if code:
        sys.exit(code)
    if command[0] == "train":
        print("FILES", len([name for name in sys.modules if name.split(".")[0] == "clipdistill"]))
"""


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("architecture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(house):
    return house.modules()


@pytest.fixture(scope="module")
def arrows(house, files):
    return house.imports(files)


def test_no_files_import_each_other_in_a_circle(house, arrows):
    assert house.circles(arrows) == []


def test_no_room_imports_from_one_above_it(house, arrows):
    assert house.back_up(arrows) == []


def test_the_core_imports_no_wing_also_not_inside_a_function(house, arrows):
    assert house.into_wings(arrows) == []
    known = {"clipdistill.data.a": {"clipdistill.search.b"}, "clipdistill.search.b": {"clipdistill.data.a"}}
    assert house.into_wings(known) == ["clipdistill.data.a -> clipdistill.search.b"]


def test_the_core_is_small_enough(house, files):
    assert house.lines(files, wings=False) <= 34_000


def test_every_wing_is_a_room(house):
    assert {wing.split(".")[0] for wing in house.WINGS} <= {name for names in house.ORDER for name in names}


def test_the_core_trains_evaluates_and_reports_without_the_wings(house, tmp_path):
    draw_pictures(tmp_path / "data", 8)
    train = ["train", "--recipe", "clip-rd", "--size", "debug", "--teacher", "scenes-teacher"]
    train += ["--student", "scenes-student", "--data", f"{tmp_path}/data", "--validation", f"{tmp_path}/data"]
    train += ["--out", f"{tmp_path}/run", "train.steps=2", "train.batch_size=4", "device=cpu"]
    train += ["preflight.allow_weak_teacher=true"]
    commands = [
        train,
        ["eval", f"{tmp_path}/run", "--data", f"{tmp_path}/data", "--json", f"{tmp_path}/scores.json"],
        ["report", f"{tmp_path}/run", "--out", f"{tmp_path}/report.html"],
    ]
    code = WITHOUT_WINGS.format(wings=tuple(f"clipdistill.{name}" for name in house.WINGS), commands=commands)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "absent" not in done.stderr
    # what every run loads; a set or a teacher of a wing adds its own
    assert int(re.findall("^FILES ([0-9]+)$", done.stdout, re.MULTILINE)[0]) <= 115
    at = train.index("--data")
    asked = [*train[:at], *train[at + 2 :], f"data.sets=[{{name: a, path: {tmp_path}/data}}]"]
    code = WITHOUT_WINGS.format(wings=("clipdistill.data.mixture",), commands=[asked])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "data.sets is part of clipdistill.data.mixture.opening, which is not installed" in done.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]


def draw_pictures(folder, count):
    folder.mkdir()
    for number in range(count):
        picture = Image.new("RGB", (40, 40), (30 * number, 200 - 20 * number, 90))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a square of colour {number}\n")


def test_circles_and_arrows_back_up_are_found(house):
    known = {"clipdistill.errors": set(), "clipdistill.data.a": {"clipdistill.train.b"}, "clipdistill.train.b": set()}
    assert house.back_up(known) == ["clipdistill.data.a -> clipdistill.train.b"]
    known["clipdistill.train.b"] = {"clipdistill.data.a"}
    assert house.circles(known) == [["clipdistill.data.a", "clipdistill.train.b"]]
    assert "no floor" in house.back_up({"clipdistill.attic.a": set()})[0]


def test_imports_inside_functions_and_for_types_count(house, tmp_path):
    (tmp_path / "clipdistill" / "data").mkdir(parents=True)
    (tmp_path / "clipdistill" / "data" / "a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from clipdistill.data import b\n"
        "def f():\n    import clipdistill.data.c\n"
    )
    for name in ("b", "c"):
        (tmp_path / "clipdistill" / "data" / f"{name}.py").write_text("")
    found = house.imports(house.modules(tmp_path))
    assert found["clipdistill.data.a"] == {"clipdistill.data.b", "clipdistill.data.c"}


def test_no_class_name_stands_twice(files):
    places = defaultdict(list)
    for name, path in files.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_files_are_short_enough_to_read(files):
    assert [name for name, path in files.items() if path.read_text(encoding="utf-8").count("\n") > 500] == []


def test_the_picture_of_the_rooms_is_up_to_date(house, files, arrows):
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name in files if f"| `{house.room(name)}` |" not in page] == []
