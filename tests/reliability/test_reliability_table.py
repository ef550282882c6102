"""docs/reliability.md lists all 36 faults, and every test that it names exists."""

from __future__ import annotations

import ast
import re

from clipdistill import errors
from tests.conftest import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "reliability.md"
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
LINK = re.compile(r"\[(\w+)\]\(\.\./(tests/[\w/]+\.py)\)")


def table() -> list[tuple[int, str]]:
    text = DOCUMENT.read_text(encoding="utf-8").partition("## The table")[2]
    return [(int(number), tests) for number, _, _, tests in ROW.findall(text)]


def functions(path: str) -> set[str]:
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_all_rows_are_there() -> None:
    assert [number for number, _ in table()] == list(range(1, 37))


def test_every_named_test_exists() -> None:
    for number, tests in table():
        links = LINK.findall(tests)
        assert links, number
        assert len(links) == tests.count("](")
        for name, path in links:
            assert f"test_{name}" in functions(path), f"row {number}: {path} has no test_{name}"


def test_every_kind_of_fault_has_tests_that_exist() -> None:
    part = DOCUMENT.read_text(encoding="utf-8").partition("## Nothing silent")[2].partition("## The table")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ") and not line.startswith("| kind |")]
    assert len(rows) >= 19
    for row in rows:
        links = LINK.findall(row)
        assert links, row
        assert len(links) == row.count("]("), row
        for name, path in links:  # a test, or all of a file
            found = functions(path)
            assert f"test_{name}" in found or path.endswith(f"/test_{name}.py"), f"{path} has no test_{name}"


def test_every_row_test_of_this_folder_is_in_the_table() -> None:
    named = {name for _, tests in table() for name, _ in LINK.findall(tests)}
    for path in sorted((REPOSITORY / "tests" / "reliability").glob("test_rows_*.py")):
        for function in functions(str(path.relative_to(REPOSITORY))):
            if re.match(r"test_row_\d\d_", function):
                assert function.removeprefix("test_") in named, function


def test_exit_codes_are_those_of_the_errors() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for error in (errors.InputError, errors.BudgetError, errors.StorageError, errors.Preempted, errors.RankError):
        assert f"| {error.exit_code} | " in text, error
