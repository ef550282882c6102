"""The mechanism behind every door: built-in names, registration, plug-in files, blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipdistill.cli import _without_shared
from clipdistill.errors import InputError
from clipdistill.registry import Registry, load_plugin


@pytest.fixture
def things() -> Registry:
    return Registry("thing", {"join": "os.path:join"})


def test_built_in_names_load_on_use_and_cannot_be_taken(things: Registry) -> None:
    assert things.get("join")("a", "b") == "a/b"
    assert "join" in things
    assert "joint" not in things
    with pytest.raises(InputError, match=r"unknown thing 'joim' \(did you mean 'join'\?\)"):
        things.get("joim")
    with pytest.raises(InputError, match="taken already, by clipdistill itself"):
        things.register("join", 1)


@pytest.mark.parametrize("name", ["", "a b", "a\n", 3])
def test_what_can_be_no_name(things: Registry, name: object) -> None:
    with pytest.raises(InputError, match="cannot be the name of a thing"):
        things.register(name, 1)  # type: ignore[arg-type]


def test_a_plugin_registers_under_its_own_name(tmp_path: Path, things: Registry) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from clipdistill.registry import _REGISTRIES\n"
        "def broken():\n    return {}['key']\n"
        "things = [r for r in _REGISTRIES if r.kind == 'thing'][-1]\n"
        "things.register('broken', broken)\n"
    )
    module = load_plugin(file)
    assert load_plugin(str(file)) is module
    assert things.origin("broken") == "plug-in mine.py"
    assert things.names() == ["join", "broken"]
    with (
        pytest.raises(
            InputError, match=r"thing 'broken' of plug-in mine.py failed: KeyError: 'key' \(mine.py, line 3\)"
        ),
        things.blaming("broken"),
    ):
        things.get("broken")()
    with pytest.raises(InputError, match=r"taken already, by plug-in mine\.py"):
        things.register("broken", 1)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("def f(:\n", r"bad.py, line 1: SyntaxError"),
        ("x = 1\nraise ValueError('no  way')\n", r"bad.py: ValueError: no way \(bad.py, line 4\)"),
        ("import not_installed_anywhere\n", "ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "SystemExit"),
    ],
)
def test_a_plugin_that_fails_is_named_and_leaves_nothing(
    tmp_path: Path, things: Registry, content: str, sentence: str
) -> None:
    file = tmp_path / "bad.py"
    head = """from clipdistill.registry import _REGISTRIES
[r for r in _REGISTRIES if r.kind == 'thing'][-1].register('half', 1)
"""
    file.write_text(content if content.startswith("def") else head + content)
    with pytest.raises(InputError, match=sentence):
        load_plugin(file)
    assert "half" not in things


def test_a_missing_plugin(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_plugin(tmp_path / "none.py")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"must end in \.py"):
        load_plugin(tmp_path / "a.txt")


def test_plugins_are_taken_out_of_the_arguments() -> None:
    rest, shared = _without_shared(["--plugin", "a.py", "x", "--plugin=b.py", "--out", "y"])
    assert (rest, shared[0]) == (["x", "--out", "y"], ["a.py", "b.py"])
