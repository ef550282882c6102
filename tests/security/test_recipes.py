"""Hostile recipes: no tag makes an object, no alias unfolds without end, every mistake is one sentence."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipdistill.config import override, read_yaml
from clipdistill.errors import InputError
from clipdistill.recipes import FOLDER, about, load_recipe
from clipdistill.train.config import RunConfig, resolve
from tests.fuzz.mutate import mangle, mangle_tree
from tests.security.conftest import Fence

TAGS = [
    "!!python/object/apply:os.system ['touch MARKER']",
    "!!python/object/apply:subprocess.check_output [['touch', 'MARKER']]",
    "!!python/object/new:os.system ['touch MARKER']",
    "!!python/object:os.stat_result {}",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('MARKER')\"]",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['MARKER']",
]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_make_no_objects(fence: Fence, tag: str) -> None:
    hostile = tag.replace("MARKER", str(fence.marker))
    path = fence.inside / "recipe.yaml"
    for text in (f"objective: {hostile}\n", f"{hostile}: 1\n", f"train:\n  - {hostile}\n", hostile):
        path.write_text(text)
        with pytest.raises(InputError, match=r"recipe\.yaml.*not readable as YAML"):
            load_recipe(path)
        with pytest.raises(InputError, match="not readable as YAML"):
            about(path)
    with pytest.raises(InputError, match="not readable as YAML"):
        override({}, [f"train.steps={hostile}"])


def bomb(mapping: bool) -> str:
    """Nine lines that stand for ten thousand million values."""
    lines = ["a0: &a0 {x: 1}" if mapping else "a0: &a0 [1]"]
    for level in range(1, 11):
        items = [f"*a{level - 1}"] * 10
        body = ", ".join(f"k{i}: {item}" for i, item in enumerate(items)) if mapping else ", ".join(items)
        lines.append(f"a{level}: &a{level} {'{' if mapping else '['}{body}{'}' if mapping else ']'}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        bomb(mapping=True),
        bomb(mapping=False),
        "train: &a {inner: *a}\n",
        "train: &a [*a]\n",
        "objective: " + "[" * 300 + "]" * 300 + "\n",
    ],
)
def test_aliases_that_unfold_without_end(fence: Fence, text: str) -> None:
    path = fence.inside / "recipe.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(InputError, match="aliases unfold into more than 100000 values"):
        load_recipe(path)
    with pytest.raises(InputError, match="aliases unfold"):
        override({}, ["train={" + text.strip().replace("\n", ", ") + "}"])
    assert time.process_time() - began < 20


def test_common_aliases_are_fine(fence: Fence) -> None:
    path = fence.inside / "recipe.yaml"
    path.write_text("objective: &terms {crd: 1, icl: 1}\ntrain: {steps: 3, objective: *terms}\n")
    assert load_recipe(path)["train"]["objective"] == {"crd": 1, "icl": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: 2000-13-77\n", "not readable as YAML: month must be in 1..12"),
        (b"steps: !!int abc\n", "not readable as YAML"),
        (b"? [a]\n: 1\n", "not readable as YAML: found unhashable key"),
        (b"\xff\xfe\x00", "not readable as text"),
        (b"[" * 3_000, "not readable as YAML"),
        (b"a: 1\n" * 1_000_000, "longer than 4194304 bytes"),
        (b"- a\n- b\n", "expected 'key: value' settings, got list"),
        (b"from: recipe.yaml\n", "leads back to the same recipe"),
        (b"from: [clip-rd]\n", "unknown recipe"),
        (b"from: ../outside/secret.txt\n", "unknown recipe"),
        (b"sizes: [1]\n", "'sizes' must hold settings by name"),
        (b"sizes: {debug: 3}\n", "'sizes' must hold settings by name"),
    ],
)
def test_recipes_that_are_none(fence: Fence, content: bytes, message: str) -> None:
    path = fence.inside / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(Path("recipe.yaml"))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value).replace("secret.txt", "")


def test_a_folder_is_no_recipe(fence: Fence) -> None:
    with pytest.raises(InputError, match="not readable as text"):
        read_yaml(fence.inside)


GOOD = sorted(path for path in FOLDER.glob("*.yaml"))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**40))
def test_mangled_recipes_are_read_or_refused(fence: Fence, seed: int) -> None:
    rng = random.Random(seed)
    content = rng.choice(GOOD).read_bytes()
    if rng.random() < 0.5:
        content = mangle(content, rng, (b": ", b"- ", b"&a", b"*a", b"!!", b"\n", b"{", b"sizes", b"null", b"\t"), ())
    else:
        tree = mangle_tree(yaml.safe_load(content), rng)
        content = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    path = fence.inside / "recipe.yaml"
    path.write_bytes(content)
    for size in (None, "debug"):
        try:
            assert isinstance(load_recipe(path, size), dict)
            assert isinstance(resolve(path, {"out": str(fence.inside / "run")}, size=size), RunConfig)
        except InputError as error:
            assert str(error)  # noqa: PT017 - either outcome is right
