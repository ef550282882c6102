"""Public functions: arguments held against their annotations, and the program they run in left as it was found.

An argument of another kind ends in a sentence at once. Held against are the kinds that everybody can give wrongly:
text, paths, numbers, flags, lists, mappings and functions. What values they may have is for the function to say, and so
is what an annotation means that names a class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import numbers
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from clipdistill.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])
Part = tuple[str, tuple[Any, ...]]
"""A kind and those of its items, none where nothing is said of them."""


def _number(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


def _listed(value: Any) -> bool:
    return isinstance(value, Iterable) and hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
    "int": ("a whole number", _number(numbers.Integral)),
    "float": ("a number", _number(numbers.Real)),
    "bool": ("True or False", lambda value: type(value).__name__ in ("bool", "bool_")),  # numpy's, too
    "None": ("None", lambda value: value is None),
    "Sequence": ("a list", _listed),
    "list": ("a list", _listed),
    "Mapping": ("a mapping", lambda value: isinstance(value, Mapping)),
    "dict": ("a mapping", lambda value: isinstance(value, Mapping)),
    "Callable": ("a function", callable),
}
_SEVERAL = {"str": "texts", "Path": "paths", "int": "whole numbers", "float": "numbers", "None": "None"}
_PLAIN = ("builtins", "pathlib")
_SILENT = ("Any", "Literal")


def checked(function: Function, *, lent: bool = True) -> Function:
    """`function` as a guest, which first raises InputError for an argument of no kind that its annotation names.

    lent: modules in its arguments are given back as they came.
    """
    signature = inspect.signature(function)

    @functools.cache
    def parts() -> dict[str, tuple[Part, ...]]:
        named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {p.name: _alternatives(p.annotation) for p in named}

    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        try:
            bound = signature.bind(*arguments, **settings)
        except TypeError:
            return function(*arguments, **settings)  # Python's own words for an argument too many or too few
        for name, value in bound.arguments.items():
            kinds = parts().get(name, ())
            if kinds and not any(_fits(value, part, function) for part in kinds):
                what = f"{function.__name__}: {name} must be {_words(kinds)}, got {_wrong(value, kinds, function)}"
                in_list = isinstance(value, str) and any(items[:1] == (("str", ()),) for _, items in kinds)
                raise InputError(f"{what}; write [{value!r}]" if in_list else what)
            places = type(value) in (list, tuple) and any(("Path", ()) in items for _, items in kinds)
            bound.arguments[name] = [_placed(item) for item in value] if places else _placed(value)
        with as_guest(bound.arguments.values() if lent else ()):
            return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


_guests: list[list[tuple[Callable[[Any], Any], Any]]] = []
"""For each call that runs, in any thread, what it found, behind what puts it back; the first call's counts."""
_lock = threading.RLock()


@contextmanager
def as_guest(lent: Iterable[Any] = ()) -> Iterator[None]:
    """Within, torch has its own defaults, whatever the program set; afterwards all is as the program had it.

    Within: float32 on the CPU, with gradients, without inference mode and autocast. Afterwards: also the random numbers
    of Python, numpy and torch, torch's choice of deterministic algorithms, and mode, freezing and absent gradients of
    the modules in `lent`. Of calls at once in several threads the last to return puts back what the first one found.
    """
    numpy, torch = (sys.modules.get(name) for name in ("numpy", "torch"))
    found: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
    if numpy is not None:
        found.append((numpy.random.set_state, numpy.random.get_state()))
    with ExitStack() as held:
        if torch is not None:
            found.append((torch.set_default_dtype, torch.get_default_dtype()))
            found.append((torch.set_rng_state, torch.get_rng_state()))
            found.append((torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode()))
            if torch.cuda.is_initialized():
                found.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
            for module in _modules(torch.nn.Module, lent):
                for part in module.modules():
                    held.callback(setattr, part, "training", part.training)
                for parameter in module.parameters():
                    held.callback(parameter.requires_grad_, parameter.requires_grad)
                    if parameter.grad is None:
                        held.callback(setattr, parameter, "grad", None)
            held.enter_context(torch.inference_mode(False))
            held.enter_context(torch.enable_grad())
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):
                held.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device() != torch.device("cpu"):
                held.enter_context(torch.device("cpu"))
        with _lock:
            _guests.append(found)
            if torch is not None:
                torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            with _lock:
                first = _guests.pop()
                for put_back, value in () if _guests else first:
                    put_back(value)


def _modules(kind: type, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        module = value if isinstance(value, kind) else getattr(value, "module", None)  # of a ClipModel
        if isinstance(module, kind):
            yield module
        elif isinstance(value, Mapping):
            yield from _modules(kind, value.values())


def _placed(value: Any) -> Any:
    """What names a place as a name: `~` is the home folder, what stands for a path (a Run) is it; in settings, too."""
    if type(value) is dict:
        placed = {key: str(_placed(v)) if isinstance(v, os.PathLike) else _placed(v) for key, v in value.items()}
        changed = any(placed[key] is not v for key, v in value.items())
        return placed if changed else value  # the caller's own: it may be to be filled
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else value  # noqa: PTH111 - no home is no error
    return Path(os.path.expanduser(os.fsdecode(value))) if isinstance(value, os.PathLike) else value  # noqa: PTH111


def _alternatives(annotation: Any) -> tuple[Part, ...]:
    """What the text of an annotation allows, one part for each side of a |."""
    if not isinstance(annotation, str):
        return (("Any", ()),)

    def read(node: ast.expr) -> tuple[Part, ...]:
        if isinstance(node, ast.BinOp):
            return read(node.left) + read(node.right)
        if isinstance(node, ast.Subscript):
            name = ast.unparse(node.value)
            return ((name, read(node.slice) if name in ("Sequence", "list") else ()),)
        return ((ast.unparse(node), ()),)

    return read(ast.parse(annotation, mode="eval").body)


def _fits(value: Any, part: Part, function: Callable[..., Any]) -> bool:
    name, items = part
    if name in _SILENT:
        return True
    if name in _KINDS:
        return _KINDS[name][1](value) and (not items or all(any(_fits(v, i, function) for i in items) for v in value))
    known = function.__globals__.get(name)
    # an alias says nothing here; a class (also one that only types know) is no plain value, and may be stood in for
    return (known is not None and not isinstance(known, type)) or type(value).__module__ not in _PLAIN


def _wrong(value: Any, kinds: tuple[Part, ...], function: Callable[..., Any]) -> str:
    """The value, or the first item of a list that does not fit, by its place."""
    items = [item for name, inner in kinds if inner and _KINDS[name][1](value) for item in inner]
    bad = (
        f"{v!r:.80} at [{n}]"
        for n, v in enumerate(value if items else ())
        if not any(_fits(v, i, function) for i in items)
    )
    return " ".join(next(bad, f"{value!r:.80}").split())


def _words(parts: tuple[Part, ...]) -> str:
    """'a text, a path or a list of texts or paths'."""
    found = []
    for name, items in parts:
        inner = [_SEVERAL[item] for item, _ in items if item in _SEVERAL]
        what = _KINDS[name][0] if name in _KINDS else name.rpartition(".")[2]
        found.append(f"{what} of {' or '.join(inner)}" if inner else what)
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
