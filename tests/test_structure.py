"""The house: no circle of imports, no arrow that runs back up, no class name twice, files of a readable length."""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict

import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "docs" / "architecture.py"


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
