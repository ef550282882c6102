"""Which models can be named, found without importing torch, open_clip or timm: a wrong name is refused at once.

Registered students are the files models/students/*.json: architecture, tokenizer, source, parameter counts (those of
the built model, by the rule of ClipModel.parameter_counts) and the published sizes, where there are any, in millions.
open_clip's architectures and pretrained tags, and timm's networks, are read from the files of those packages.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.arguments import checked
from clipdistill.errors import InputError
from clipdistill.registry import STUDENTS
from clipdistill.runtime.files import digest_of, read_json

SHIPPED = Path(__file__).parent / "shipped"
"""Trained model folders that come with the package, by name."""
HELD = "module:"
"""How the name of a module that the program itself holds begins."""
OPEN_CLIP_CONFIG, HUGGING_FACE_CONFIG, EXPORT_MANIFEST = "open_clip_config.json", "config.json", "manifest.json"
"""The file by which a folder of each form is recognised."""
BLOCK_SIZES, IMAGE_PROMPTS = "block_sizes", "image_prompts"
"""Keys of an architecture: layers of different sizes (models/sized.py), prompts (models/prompts.py)."""
TOWERS = ("image", "text")
"""What a CLIP is made of, as settings, files and graphs name it."""
PHONES = ("litert", "executorch", "coreml")
"""Forms of an export for a phone."""
SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite", "executorch": ".pte", "coreml": ".mlpackage"}
"""Runtime of an export -> how the names of its graphs end."""
OWN_EMBEDDINGS = "teacher_embeddings"
"""The method of a teacher that makes its embeddings of a batch itself."""
_held: dict[str, Any] = {}
_offered: list[Any] = []


@dataclass(frozen=True)
class Student:
    """One registered student. `tokenizer`: "clip-bpe", or "words" where the vocabulary comes from training captions.

    `architecture` is open_clip's configuration, or names a timm network as image tower in short: {"timm": NAME}.
    `parameters`: image, text_transformer (the blocks alone, as the papers count) and total; those of "words" students
    are with the vocabulary size of their architecture. `published_millions`: the same as the paper gives them.
    """

    name: str
    source: str
    tokenizer: str
    architecture: dict[str, Any]
    image_size: int
    parameters: dict[str, int]
    published_millions: dict[str, float] | None = None

    @property
    def embed_dim(self) -> int:
        return int(self.architecture["embed_dim"])

    @property
    def image_parameters(self) -> int:
        return self.parameters["image"]

    @property
    def text_parameters(self) -> int:
        return self.parameters["text_transformer"]

    @property
    def total_parameters(self) -> int:
        return self.parameters["total"]


@functools.cache
def students() -> dict[str, Student]:
    """Every student of the package by name."""
    folder = Path(__file__).parent / "students"
    files = [read_json(folder / f"{name}.json") for name in ("clip_kd", "tinyclip", "small")]
    return {name: Student(name, **values) for file in files for name, values in file.items()}


def table(name: str) -> dict[str, Any]:
    """Plain data of the models room, models/tables/NAME.json."""
    return read_json(Path(__file__).parent / "tables" / f"{name}.json")


def list_students() -> tuple[Student, ...]:
    """The students of the package, one row of `clipdistill list students` each."""
    return tuple(students().values())


@checked
def register_student(name: str, build: Callable[..., Any]) -> Callable[..., Any]:
    """Make `name` a student: usable as `--student NAME`, in recipes and wherever a model is named.

    `build` returns an nn.Module (see own.clip_model_of), a ClipModel or an open_clip architecture. Of the keyword
    arguments `seed`, `tokenizer` (the teacher's or a stored one, or None) and `captions` it gets those that it
    declares; torch's generator is seeded around it. Returns `build`. Raises InputError for a name that is taken.
    """
    if name in students() or name in open_clip_architectures():
        raise InputError(f"the student '{name}' is taken already, by clipdistill itself: choose another name")
    if any(mark in name for mark in ":@/,"):
        raise InputError(f"'{name}' cannot be the name of a student: use letters, digits, '-', '_' and '.'")
    return STUDENTS.register(name, build)


def shipped_models() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/model.json"))


def needs_vocabulary(name: str) -> bool:
    """Whether `name` is a student of the package that takes its words from its training captions."""
    return name in students() and students()[name].tokenizer == "words"


def known_architectures() -> tuple[str, ...]:
    """Names of all students, plug-ins' included, and of open_clip's architectures; a name in both means ours."""
    own = [*students(), *STUDENTS.names()]
    return (*own, *(name for name in open_clip_architectures() if name not in own))


def open_clip_architectures() -> list[str]:
    """open_clip's architectures, in its order; with those that a program has added to it."""
    loaded = sys.modules.get("open_clip.factory")
    if loaded is not None:
        return list(loaded.list_models())
    folder = _package("open_clip")
    names = [] if folder is None else [path.stem for path in (folder / "model_configs").glob("*.json")]
    return sorted(names, key=lambda name: [int(s) if s.isdigit() else s.lower() for s in re.split(r"(\d+)", name)])


def architecture_values(name: str) -> dict[str, Any]:
    """The description of a known architecture as it is written down, unchecked; a copy.

    Raises InputError with the nearest name.
    """
    if name in students():
        return copy.deepcopy(students()[name].architecture)
    if name not in open_clip_architectures():
        raise InputError(f"unknown student or architecture '{name}'{near(name, known_architectures())}")
    loaded, folder = sys.modules.get("open_clip.factory"), _package("open_clip")
    if loaded is not None:
        return copy.deepcopy(dict(loaded.get_model_config(name)))
    assert folder is not None
    return read_json(folder / "model_configs" / f"{name}.json")


def pretrained_tags(architecture: str) -> list[str] | None:
    """open_clip's pretrained tags of an architecture; None where its files do not tell without running them."""
    loaded, folder = sys.modules.get("open_clip.pretrained"), _package("open_clip")
    if loaded is not None:
        return list(loaded.list_pretrained_tags_by_model(architecture))
    if folder is None or architecture.endswith("-quickgelu"):  # those are made from the others
        return None
    tables = _assignments((folder / "pretrained.py").read_text(encoding="utf-8"))
    for key, value in tables.get("_PRETRAINED", {}).items():
        if key == architecture:
            return list(tables.get(value, {}) if isinstance(value, str) else value)
    return []


def require_pretrained(architecture: str, tag: str) -> None:
    """Raise InputError, with the nearest name, unless open_clip has weights `tag` for `architecture`."""
    if architecture not in open_clip_architectures():
        raise InputError(
            f"'{architecture}/{tag}' is no file or folder, and open_clip has no architecture '{architecture}'"
            f"{near(architecture, open_clip_architectures())}"
        )
    tags = pretrained_tags(architecture)
    if tags is not None and tag.lower().replace("-", "_") not in tags:
        known = f"; it has: {', '.join(tags)}" if tags else "; open_clip has no pretrained weights for it"
        raise InputError(f"'{architecture}' has no pretrained weights '{tag}'{near(tag, tags) or known}")


@functools.cache
def _assignments(source: str) -> dict[str, dict[str, Any]]:
    """Names -> keys (-> names or nested keys) of the dictionaries that a module assigns, without running it."""

    def keys(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            return {keyword.arg: keys(keyword.value) for keyword in node.keywords}
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return {key.value: keys(value) for key, value in pairs if isinstance(key, ast.Constant)}
        return None

    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = keys(node.value)
            if isinstance(value, dict):
                found[node.targets[0].id] = value
    return found


@functools.cache
def timm_networks() -> frozenset[str]:
    """Names of timm's networks, by the functions in its files."""
    folder = _package("timm")
    files = [] if folder is None else (folder / "models").glob("*.py")
    texts = (path.read_text(encoding="utf-8") for path in files)
    return frozenset(name for text in texts for name in re.findall(r"^def (\w+)\(\s*pretrained", text, re.MULTILINE))


def near(name: str, options: Iterable[str]) -> str:
    """' (did you mean ...?)', or nothing: unlike errors.nearest it never prints some 160 names."""
    lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean '{lower[close[0]]}'?)" if close else ""


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def hold(value: Any, role: str) -> Any:
    """Names for modules in a configuration: 'module:MyClip' for a student, 'module:MyClip.teacher' for a teacher.

    `value` is one name or module, or several; names come back as they are. The name is the same whenever the same
    program runs again, so that a run can be resumed; it stands for the module last held under it.
    """
    if isinstance(value, list | tuple):
        return tuple(hold(one, role if i == 0 else f"{role}{i + 1}") for i, one in enumerate(value))
    marks = ("encode_image", "state_dict", OWN_EMBEDDINGS, "parameter_counts")  # the last: a ClipModel
    if isinstance(value, type) or not any(hasattr(value, mark) for mark in marks):
        return value
    name = f"{HELD}{type(value).__name__}" + ("" if role == "student" else f".{role}")
    _held[name] = value
    return name


def held(name: str) -> Any:
    """The module behind a name of `hold`. Raises InputError where this program holds none."""
    if name not in _held:
        raise InputError(
            f"'{name}' is a module that the program which began this work made itself: run that program again, or "
            "register what builds it (clipdistill.register_student) and name that"
        )
    return _held[name]


@contextlib.contextmanager
def copies_held() -> Iterator[None]:
    """Within, what is held as a student is a copy, which may be trained; what the program gave stays as it was."""
    kept = dict(_held)
    try:
        _held.update({name: copy.deepcopy(module) for name, module in kept.items() if "." not in name})
        yield
    finally:
        _held.update(kept)


@contextlib.contextmanager
def offering(module: Any) -> Iterator[None]:
    """Within, a folder whose model is a module from outside is read into `module`; None changes nothing."""
    _offered.append(module)
    try:
        yield
    finally:
        _offered.pop()


def offered() -> Any:
    """The module of the innermost `offering`, or None."""
    return _offered[-1] if _offered else None


def is_own_module(architecture: Mapping[str, Any]) -> bool:
    """Whether an architecture is that of a module from outside, which only its own code can build."""
    return "module" in architecture


def architecture_fingerprint(architecture: Any) -> str:
    """12 hexadecimal digits of an architecture dictionary, "" when there is none. Equal ones run equally fast."""
    return digest_of(architecture)[:12] if isinstance(architecture, dict) else ""
