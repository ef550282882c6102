"""Public functions refuse an argument of another kind in one sentence that names it."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import clipdistill as cd
from clipdistill.arguments import checked
from clipdistill.errors import InputError


def _functions():
    for name in cd.__all__:
        found = getattr(cd, name)
        found = found.function if inspect.ismodule(found) else found
        if inspect.isfunction(found):
            yield pytest.param(name, found, id=name)


@pytest.mark.parametrize(("name", "function"), _functions())
def test_each_public_function_refuses_what_no_argument_of_it_can_be(name, function):
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
    wrong = {p.name: _wrong(p.annotation) for p in parameters}
    wrong = {name: value for name, value in wrong.items() if value is not ...}
    assert wrong, "nothing of this function's arguments is held against its annotations"
    for parameter, value in wrong.items():
        given = {p.name: None for p in parameters if p.default is p.empty and p.annotation in ("Any", "Data")}
        given |= {p.name: _right(p.annotation) for p in parameters if p.default is p.empty and p.name not in given}
        with pytest.raises(InputError, match=f"^{name}: {parameter} must be "):
            function(**given | {parameter: value})


def _wrong(annotation):
    """A value of a kind that the annotation does not name; ... where it says nothing of kinds."""
    sides = {side.partition("[")[0].strip() for side in annotation.split("|")}
    silent = {"Any", "Literal", "Data", "Say", "EngineName"}
    return ... if sides & silent else "x" if "float" in sides else 1.5


def _right(annotation):
    known = {"Callable": len, "Sequence": [], "list": [], "int": 1, "float": 1.0, "bool": True, "Term": object()}
    return known.get(annotation.partition("[")[0], {} if "Config" in annotation else "x")


def test_a_device_is_a_name_or_torch_s_own_everywhere():
    takers = [f for f in (p.values[1] for p in _functions()) if "device" in inspect.signature(f).parameters]
    assert len(takers) > 10
    for function in takers:
        assert "torch.device" in inspect.signature(function).parameters["device"].annotation, function.__name__
    rows = cd.embed("scenes-teacher", "scenes:val?size=4", device=torch.device("cpu"), progress=False)
    assert len(rows.image) == 4
    cd.Objective({"task": 1}, np.int64(4), np.int32(4))  # a width out of numpy, too


def test_kinds_and_words():
    @checked
    def f(
        a: "str | Path",
        b: "int | None" = None,
        c: "Sequence[int]" = (),  # noqa: F821
        d: "str | Sequence[str]" = "",  # noqa: F821
        e: "torch.device | Mapping[str, Any] | None" = None,  # noqa: F821
        f: "float" = 0.0,
        g: "list[str | Path] | None" = None,
    ) -> tuple:
        """Words."""
        return a, b, c, d, e, f

    assert f(Path("x"), np.int64(3), range(2), ["y"], torch.device("cpu"), 1)[1] == 3
    assert (f.__name__, f.__doc__, str(inspect.signature(f))[:17]) == ("f", "Words.", "(a: 'str | Path',")
    for given, sentence in (
        ({"a": 3}, "f: a must be a text or a path, got 3"),
        ({"a": "x", "b": True}, "f: b must be a whole number or None, got True"),
        ({"a": "x", "c": 5}, "f: c must be a list of whole numbers, got 5"),
        ({"a": "x", "c": (1, "2")}, r"f: c must be a list of whole numbers, got '2' at \[1\]"),
        ({"a": "x", "g": [[], "y", 3.5]}, r"f: g must be a list of texts or paths or None, got \[\] at \[0\]"),
        ({"a": "x", "c": (i for i in range(3))}, "f: c must be a list of whole numbers, got <generator"),
        ({"a": "x", "d": 1}, "f: d must be a text or a list of texts, got 1"),
        ({"a": "x", "e": "cpu"}, "f: e must be device, a mapping or None, got 'cpu'"),
        ({"a": "x", "f": "1"}, "f: f must be a number, got '1'"),
        ({"a": "x" * 500, "b": "y" * 500}, "f: b must be a whole number or None, got '(y{79})$"),
    ):
        with pytest.raises(InputError, match=sentence):
            f(**given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bb'"):
        f("x", bb=3)
    with pytest.raises(InputError, match=r"ablate: drop must be a list of texts, got 'xrd'; write \['xrd'\]"):
        cd.ablate(["clip-rd"], "out", drop="xrd")


def test_what_the_classes_and_lists_take():
    rows = torch.ones(2, 4)
    for call, sentence in (
        (lambda: cd.Objective(["task"], 4, 4), "weights must be a mapping of terms and numbers"),
        (lambda: cd.Objective({"task": 1}, 4.5, 4), "embedding widths 4.5 and 4 must be positive whole numbers"),
        (
            lambda: cd.Objective({"task": 1}, 4, 4)(cd.Embeddings(rows.numpy(), rows.numpy(), 1.0)),
            "a torch.Tensor, got",
        ),
        (lambda: cd.retrieval([[1, 2], [3]], rows, [0, 1]), "the image embeddings must be numbers"),
        (lambda: cd.retrieval(rows.to(torch.complex64), rows, [0, 1]), "the image embeddings must be numbers"),
        (lambda: cd.claims([], []), "no run: give run folders"),
        (lambda: cd.Scores([3]), "results of the kind Score, got 3"),
        (lambda: cd.cache([], "scenes:val", "out"), "teacher: .*name at least one model"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()
