"""The doors: one small mechanism by which names become terms, formats, students, teachers, callbacks, back ends.

A registry knows its built-in entries as "module:attribute" and loads one when it is asked for, so that naming all costs
nothing. Others are added by `register`, from a program, from a file given as `--plugin FILE.py`, or from an installed
package with an entry point in the group "clipdistill" (a module, or a function that is called).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from clipdistill.errors import ClipdistillError, InputError, nearest

GROUP = "clipdistill"
T = TypeVar("T")
_loading: list[str] = []
"""The plug-ins being loaded, innermost last."""
_loaded: dict[str, Any] = {}
"""Plug-in files by resolved path, and entry points by name."""
_REGISTRIES: list[Registry[Any]] = []


class Registry(Generic[T]):
    """Names of one kind of thing ("term"; in the singular, for error messages). builtin: name -> "module:attribute"."""

    def __init__(self, kind: str, builtin: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._builtin = dict(builtin or {})
        self._values: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        _REGISTRIES.append(self)

    def register(self, name: str, value: T) -> T:
        """Add an entry; returns it. Raises InputError for a name that is taken by something else."""
        if not isinstance(name, str) or not name or not name.isprintable() or any(c.isspace() for c in name):
            raise InputError(f"{name!r} cannot be the name of a {self.kind}: use letters, digits, '-', '_' and '.'")
        if name in self._builtin or (name in self._values and self._origins[name] != _origin()):
            owner = self._origins.get(name, "clipdistill itself")
            raise InputError(f"the {self.kind} '{name}' is taken already, by {owner}: choose another name")
        self._values[name] = value
        self._origins[name] = _origin()
        return value

    def names(self) -> list[str]:
        """All known names: built-in ones in their own order, then the others in the order of registration."""
        load_entry_points()
        present = [name for name, place in self._builtin.items() if _is_here(place.partition(":")[0])]
        return [*present, *(name for name in self._values if name not in self._builtin)]

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._values or name in self.names()

    def get(self, name: str) -> T:
        """The entry called `name`. Raises InputError, with the nearest name, for an unknown one."""
        if name not in self._values and name in self._builtin:
            self._values[name] = needed_wing(self._builtin[name], f"the {self.kind} '{name}' is")
        if name not in self:
            raise InputError(f"unknown {self.kind} '{name}'{nearest(name, self.names())}")
        return self._values[name]

    def origin(self, name: str) -> str | None:
        """What registered the entry ("plug-in my_terms.py", "package acme-clip", "this program"); None if built in."""
        return None if name in self._builtin else self._origins.get(name)

    def _forget(self, origin: str) -> None:
        for name in [name for name, known in self._origins.items() if known == origin]:
            del self._values[name], self._origins[name]

    @contextlib.contextmanager
    def blaming(self, name: str) -> Iterator[None]:
        """Within, an error in code that is not ours becomes an InputError that names the entry and where it is from.

        Built-in entries are left alone: their errors are ours.
        """
        origin = self.origin(name)
        if origin is None:
            yield
            return
        try:
            yield
        except ClipdistillError as error:
            raise type(error)(f"{self.kind} '{name}' of {origin}: {error}") from error
        except Exception as error:
            raise InputError(f"{self.kind} '{name}' of {origin} failed: {describe(error)}") from error


def wing(place: str) -> Any:
    """What "module:attribute" names, None where the module is not installed: the core can go without its wings."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute) if _is_here(module) else None


def needed_wing(place: str, what: str) -> Any:
    """The same where nothing goes without it. Raises InputError: "`what` part of a module that is not installed"."""
    found = wing(place)
    if found is None:
        raise InputError(f"{what} part of {place.partition(':')[0]}, which is not installed")
    return found


def describe(error: BaseException) -> str:
    """'KeyError: 'x' (my_terms.py, line 12)': the error of somebody else's code in a few words."""
    trace, place = error.__traceback__, ""
    while trace is not None:  # the innermost frame outside this package and the libraries
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith((os.path.dirname(__file__), sys.prefix, "<")):  # noqa: PTH120
            place = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"


def lazy_package(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """`__getattr__` of a package whose names are imported when one is first asked for: naming it loads no torch.

    where: module -> the names it gives, separated by blanks. `dir` of the package, which completes names in a notebook,
    gives `__all__`, or these names.
    """
    homes = {name: module for module, names in where.items() for name in names.split()}
    vars(sys.modules[package])["__dir__"] = lambda: sorted(vars(sys.modules[package]).get("__all__", homes))

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return find


def callable_package(package: str, function: str) -> None:
    """Let the package be called: it stands for the function "module:attribute", which is imported when it is called.

    A public function and a package may share their name (`clipdistill.evaluate`), and Python lets the package take it
    as soon as a module inside it is imported. `inspect.signature` shows the function's own.
    """

    def found() -> Any:
        return wing(function)

    class CallablePackage(types.ModuleType):
        def __call__(self, *arguments: Any, **settings: Any) -> Any:
            return found()(*arguments, **settings)

        @property
        def function(self) -> Any:
            """The function it stands for."""
            return found()

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(found())

    CallablePackage.__call__.__doc__ = f"See {function}."
    sys.modules[package].__class__ = CallablePackage


def load_plugin(path: str | Path) -> Any:
    """Run a plug-in file once (it registers what it brings) and return its module.

    Raises InputError that names the file, and line, for one that is missing or fails.
    """
    file = Path(path).expanduser()
    key = os.path.realpath(file)
    if key in _loaded:
        return _loaded[key]
    if not file.is_file():
        raise InputError(f"plug-in {path}: no such file")
    # a name of its own that stays the same, so that what it defines can be sent to worker processes
    name = f"clipdistill_plugin_{''.join(c if c.isalnum() else '_' for c in file.stem)}"
    spec = importlib.util.spec_from_file_location(name, key)
    if spec is None or spec.loader is None:
        raise InputError(f"plug-in {path}: not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _as_plugin(f"plug-in {file.name}"):
            spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        for registry in _REGISTRIES:  # half a plug-in is none
            registry._forget(f"plug-in {file.name}")
        if isinstance(error, ClipdistillError):
            raise type(error)(f"plug-in {path}: {error}") from error
        if isinstance(error, Exception | SystemExit):
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            raise InputError(f"plug-in {path}{line}: {describe(error)}") from error
        raise
    _loaded[key] = module
    return module


def is_loaded(path: str | Path) -> bool:
    """Whether this plug-in file has run in this process."""
    return "\0" not in str(path) and os.path.realpath(Path(path).expanduser()) in _loaded


def load_entry_points() -> None:
    """Load the plug-ins of installed packages, once in a process. Raises InputError that names the package."""
    if "entry points" in _loaded:
        return
    _loaded["entry points"] = True
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        package = f"package {point.dist.name}" if point.dist is not None else f"package of {point.value}"
        try:
            with _as_plugin(package):
                found = point.load()
                if callable(found):
                    found()
        except Exception as error:
            raise InputError(
                f"the plug-in '{point.name}' of {package} cannot be loaded ({describe(error)}): repair or uninstall it"
            ) from error


@contextlib.contextmanager
def _as_plugin(origin: str) -> Iterator[None]:
    _loading.append(origin)
    try:
        yield
    finally:
        _loading.pop()


@functools.cache
def _is_here(module: str) -> bool:
    """Whether a module is installed (whoever wants the core alone may leave wings away); nothing is loaded."""
    path: Sequence[str] | None = None
    for end in [*(k for k, sign in enumerate(module) if sign == "."), len(module)]:
        try:
            specs = (finder.find_spec(module[:end], path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((spec for spec in specs if spec is not None), None)
        except ImportError:
            return False
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def _origin() -> str:
    return _loading[-1] if _loading else "this program"


_TERMS = (
    "task", "crd", "fd", "icl", "gd", "afd", "cross_kd", "vrd_kl", "vrd_ce", "xrd", "affinity", "cosine", "sigmoid",
    "reinforced",
)  # fmt: skip
TERMS: Registry[Any] = Registry(
    "term",
    {name: f"clipdistill.objective.terms.{name}:TERM" for name in _TERMS}
    | {
        name: f"clipdistill.bank.{name}:TERM"
        for name in ("bank_cross", "bank_within", "bank_xrd", "cluster", "class_kd")
    }
    | {
        name: f"clipdistill.objective.one_modality:{name.upper()}"
        for name in ("cosine_image", "cosine_text", "within_image", "within_text")
    }
    | {
        "logit_mse": "clipdistill.objective.logit_matching:LOGIT_MSE",
        "targeted": "clipdistill.objective.targeted:TARGETED",
    },
)
"""Terms of the objective (clipdistill.objective.term.Term)."""

_HOME = "clipdistill.data.formats"
FORMATS: Registry[Any] = Registry(
    "data format",
    {
        "scenes": "clipdistill.scenes.pairs:FORMAT",
        "object": f"{_HOME}.forms:OBJECT",
        "hub": f"{_HOME}.forms:HUB",
        "saved": f"{_HOME}.forms:SAVED",
        "tars": f"{_HOME}.forms:TARS",
        "parquet": f"{_HOME}.forms:PARQUET",
        "karpathy": f"{_HOME}.forms:KARPATHY",
        "coco": f"{_HOME}.forms:COCO",
        "languages": "clipdistill.data.benchmarks.languages:FORMAT",
        "table": f"{_HOME}.forms:TABLE",
        "folder": f"{_HOME}.forms:FOLDER",
        "named": "clipdistill.data.benchmarks.named:PAIRS",
    },
)
"""Readers of image-caption pairs (clipdistill.data.formats.Format), asked in this order whether a name is theirs."""

LABELLED_FORMATS: Registry[Any] = Registry(
    "format of classification sets",
    {
        "scenes": "clipdistill.scenes.zero_shot:FORMAT",
        "named": "clipdistill.data.benchmarks.named:LABELLED",
        "torchvision": f"{_HOME}.labelled_libraries:TORCHVISION",
        "hub": f"{_HOME}.labelled_libraries:HUB",
        "class tars": f"{_HOME}.class_tars:FORMAT",
        "class folders": f"{_HOME}.class_folders:FORMAT",
        "arrays": f"{_HOME}.arrays:FORMAT",
    },
)
"""Readers of images with a label each, asked in this order."""

OTHER_SETS: Registry[Any] = Registry(
    "kind of evaluated set", {"matching": "clipdistill.evaluate.matching:open_matching"}
)
"""Functions from a name to the sets it stands for that measure themselves, or None (neither pairs nor labelled)."""

STUDENTS: Registry[Any] = Registry("student")
"""Functions that build a student."""

TEACHERS: Registry[Any] = Registry("teacher")
"""Functions that open a teacher of a kind of its own, by the word before the colon of its name."""

WHOLE_SET: Registry[Any] = Registry(
    "teacher of a whole set",
    {"cache": "clipdistill.bank.teacher:BankTeacher", "classes": "clipdistill.bank.classes:ClassTeacher"},
)
"""Classes that give a teacher what it knows beside a batch: a bank of all training data, cleaned targets, classes."""

TEACHER_FOLDERS: Registry[Any] = Registry(
    "teacher folder", {"meta_teacher.json": "clipdistill.regions.teacher:open_region_teacher"}
)
"""Functions that open the teacher of a run from a folder that is no model, by the file that marks such folders."""

INHERITANCE: Registry[Any] = Registry(
    "way to a smaller student",
    {
        "cut": "clipdistill.models.inheritance.cut:inherit",
        "masks": "clipdistill.models.inheritance.masks:start_masking",
        "prune": "clipdistill.models.inheritance.prune:prune",
    },
)
"""Functions by which a student is cut out of a larger model (TinyCLIP)."""

CALLBACKS: Registry[Any] = Registry(
    "callback",
    {
        "tensorboard": "clipdistill.train.trackers:TensorBoard",
        "wandb": "clipdistill.train.trackers:WeightsAndBiases",
        "mlflow": "clipdistill.train.trackers:MLflow",
    },
)
"""Classes of callbacks of the training loop."""

TASKS: Registry[Any] = Registry(
    "training task",
    {
        "distillation": "clipdistill.train.distil:Distillation",
        "region teacher": "clipdistill.regions.training:RegionTeaching",
        "curated batches": "clipdistill.curation.training:CuratedDistillation",
        "ternary student": "clipdistill.ternary.training:TernaryDistillation",
    },
)
"""What the training loop can train (clipdistill.train.task.Task)."""

TRIALS: Registry[Any] = Registry("trial of a run", {"dry run": "clipdistill.train.dry_run:dry_run"})
"""Functions that find out something about a run without training it: configuration -> what they found."""

BACKENDS: Registry[Any] = Registry(
    "back end",
    {
        "eager": "clipdistill.bench.backends:EAGER",
        "compile": "clipdistill.bench.backends:COMPILED",
        "onnx": "clipdistill.export.backends:ONNX",
        "openvino": "clipdistill.export.backends:OPENVINO",
        "litert": "clipdistill.export.backends:LITERT",
        "executorch": "clipdistill.export.backends:EXECUTORCH",
    },
)
"""What runs a model when it is measured."""

RETRIEVAL_SCORES: Registry[Any] = Registry("way to score retrieval", {"bsap": "clipdistill.evaluate.balanced:balanced"})
"""Functions that turn encoded pairs into rows whose cosines rank in another way than the model's own do."""

REPORT_PARTS: Registry[Any] = Registry("part of a report", {"exports": "clipdistill.report.exports:read_exports"})
"""Functions that read what only some reports show: (folders, runs, table, notices) -> a part with charts and rows."""

RUNTIMES: Registry[Any] = Registry(
    "runtime", {name: f"clipdistill.export.phone.{name}:load" for name in ("litert", "executorch", "coreml")}
)
"""Functions that load a graph of an export for a phone: path -> a function on arrays."""
