"""The published methods as YAML files, one per method, and the function that reads them.

A recipe is plain settings: `about` (where it comes from, what was published), `objective`, `train`, and `sizes`
(named overlays; every recipe has `debug`, which runs in seconds on a CPU on built-in data, and `demo`).
A user's own YAML file has the same form and may start `from: clip-rd` to lay its settings over a shipped recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipdistill.config import Config, build, merge, read_yaml
from clipdistill.errors import InputError, nearest

FOLDER = Path(__file__).parent
_SHARED_SIZES = (
    "debug",
    "demo",
    "flickr",
)  # `--size debug`: seconds on built-in data; `--size demo`: what the demo trains


class About(Config):
    """Where a recipe comes from: shown by `clipdistill list recipes`."""

    title: str
    source: str
    published: str
    command: str
    hardware: str
    notes: str = ""


def recipe_names() -> list[str]:
    """The shipped recipes by name, sorted."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def load_recipe(name: str | Path, size: str | None = None) -> dict[str, Any]:
    """The settings of a shipped recipe (`clip-rd`) or of a YAML file, with the overlay `size` applied.

    Returns a mapping without the keys `about`, `sizes` and `from`. Raises InputError for an unknown recipe or size.
    """
    values, sizes, path = _resolve(name, seen=())
    if size is not None:
        sizes = {**{shared: read_yaml(FOLDER / f"_{shared}.yaml") for shared in _SHARED_SIZES}, **sizes}
        if size not in sizes:
            raise InputError(f"{path}: no size '{size}'{nearest(size, sizes)}")
        values = lay(values, sizes[size])
    return values


def lay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Settings `over` laid over `base`; a run length in steps replaces one in epochs, and the other way round."""
    values = merge(base, over)
    for ours, other in (("steps", "epochs"), ("epochs", "steps")):
        train = over.get("train")
        if isinstance(train, Mapping) and ours in train and other not in train:
            values["train"].pop(other, None)
    return values


def about(name: str | Path) -> About:
    """What is known about a recipe: title, source, published figure, command, hardware."""
    path = _path(name)
    return build(About, read_yaml(path).get("about", {}), f"{path.name}: about")


def _resolve(name: str | Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]], Path]:
    path = _path(name)
    if path in seen:
        raise InputError(f"{path}: 'from:' leads back to the same recipe")
    values = read_yaml(path)
    values.pop("about", None)
    sizes = values.pop("sizes", None) or {}
    if not isinstance(sizes, dict) or not all(isinstance(size, dict) for size in sizes.values()):
        raise InputError(f"{path}: 'sizes' must hold settings by name, such as  debug: {{train: {{steps: 4}}}}")
    parent = values.pop("from", None)
    if parent is not None:
        base, base_sizes, _ = _resolve(parent, (*seen, path))
        values, sizes = lay(base, values), {**base_sizes, **sizes}
    return values, sizes, path


def _path(name: str | Path) -> Path:
    text = str(name)
    if text in recipe_names():
        return FOLDER / f"{text}.yaml"
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"recipe '{text}': no such file")
        return path
    raise InputError(f"unknown recipe '{text}'{nearest(text, recipe_names())}")
