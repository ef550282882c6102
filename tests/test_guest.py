"""Public functions are guests in a program: they leave its state as it was, whatever it is, and whatever happens."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import os
import pickle
import pkgutil
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import clipdistill
import clipdistill as cd
from clipdistill.arguments import as_guest
from clipdistill.errors import ClipdistillError, InputError, MissingExtraError
from clipdistill.objective.term import Term
from clipdistill.registry import TERMS
from clipdistill.runtime.signals import StopSignal

PAIRS, CLASSES = "scenes:val?size=4", "scenes:zeroshot/shapes?size=16"
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}
SETTINGS: dict[str, Any] = {
    "recipe": "clip-rd", "size": "debug", "device": "cpu", "data": {"path": "scenes", "size": 8},
    "validation": PAIRS, "preflight": {"enabled": False},
    "train": {"steps": 1, "workers": 0, "batch_size": 4, "compile": False, "deterministic": True},
}  # fmt: skip
CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "ablate": lambda run, out: cd.ablate(["clip-rd"], out / "grid", settings=SETTINGS, drop=["absent"]),
    "before_after": lambda run, out: cd.before_after(run, run, PAIRS, device="cpu"),
    "bench": lambda run, out: cd.bench([run], seconds=0.01, rounds=3, batch_sizes=[1], threads=1, device="cpu"),
    "cache": lambda run, out: cd.cache(run, PAIRS, out / "store", device="cpu", workers=0, quiet=True),
    "claims": lambda run, out: cd.claims("published", run),
    "compare": lambda run, out: cd.compare(run, run),
    "distill": lambda run, out: cd.distill({**SETTINGS, "out": out / "run"}, quiet=True),
    "dry_run": lambda run, out: cd.dry_run({**SETTINGS, "teacher": "absent"}, quiet=True),
    "embed": lambda run, out: cd.embed(run, PAIRS, **QUIET),
    "embed_to_file": lambda run, out: cd.embed_to_file(run, PAIRS, out / "rows.npy", **QUIET),
    "evaluate": lambda run, out: cd.evaluate(run, [PAIRS, CLASSES], **QUIET),
    "export": lambda run, out: cd.export(run, "open_clip", out / "folder", quiet=True),
    "fetch": lambda run, out: cd.fetch("absent"),
    "load_model": lambda run, out: cd.load_model("scenes-student", seed=3),
    "load_student": lambda run, out: cd.load_student(run),
    "probe": lambda run, out: cd.probe(run, CLASSES, f"{CLASSES}&seed=1", shots=[1], seeds=2, **QUIET),
    "read_embeddings": lambda run, out: cd.read_embeddings(out / "absent.npy"),
    "region_boxes": lambda run, out: cd.region_boxes("grid:2", PAIRS, out / "boxes", device="cpu", quiet=True),
    "region_embeddings": lambda run, out: cd.region_embeddings(run, PAIRS, "grid:2", device="cpu", quiet=True),
    "region_scores": lambda run, out: cd.region_scores(run, PAIRS, "grid:2", device="cpu", quiet=True),
    "region_vectors": lambda run, out: cd.region_vectors(run, PAIRS, "grid:2", out / "x", device="cpu", quiet=True),
    "register_callback": lambda run, out: cd.register_callback("not a name", list),
    "register_format": lambda run, out: cd.register_format("not a name", bool, list),
    "register_student": lambda run, out: cd.register_student("not a name", list),  # type: ignore[arg-type]
    "register_term": lambda run, out: cd.register_term(None),  # type: ignore[arg-type]
    "replay": lambda run, out: cd.replay(run, 1),
    "report": lambda run, out: cd.report(run, out / "page.html"),
    "retrieval": lambda run, out: cd.retrieval(torch.eye(4, device="cpu"), np.eye(4), [0, 1, 2, 3]),
    "search": lambda run, out: cd.search(out, "a red square", model=run, device="cpu"),
    "serve": lambda run, out: cd.serve(run, port=70000),
}  # fmt: skip
MODES: dict[str, Callable[[], Any]] = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("guest")
    return cd.distill({**SETTINGS, "out": out / "run"}, quiet=True)


def state() -> dict[str, Any]:
    """What a program sets for itself and all of its parts share."""
    mask = os.umask(0o022)
    os.umask(mask)
    root = logging.getLogger()
    matmul = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return {
        "random numbers": random.getstate(),
        "numpy's": pickle.dumps(np.random.get_state()),
        "torch's": torch.get_rng_state().numpy().tobytes(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "number format": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "products": (torch.get_float32_matmul_precision(), [part.fp32_precision for part in matmul]),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "variables": {
            k: v for k, v in os.environ.items() if k not in ("TOKENIZERS_PARALLELISM", "PYTEST_CURRENT_TEST")
        },
        "folder": (Path.cwd(), mask, list(sys.path)),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGCHLD}},
        "log": (list(root.handlers), root.level, root.manager.disable),
        "our log": (logging.getLogger("clipdistill").handlers, logging.getLogger("clipdistill").level),
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook, warnings.showwarning),
        "streams": (sys.stdout, sys.stderr),
        "threads that run": set(threading.enumerate()),
    }


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("number", range(len(CALLS)), ids=list(CALLS))
def test_a_public_function_leaves_the_program_as_it_was(number: int, run: Any, tmp_path: Path) -> None:
    name, call = list(CALLS.items())[number]
    with ExitStack() as held:
        held.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        held.enter_context(MODES[list(MODES)[number % len(MODES)]]())
        before = state()
        with suppress(InputError):
            call(run, tmp_path)
        after = state()
    assert {what for what in before if before[what] != after[what]} == set(), name


def test_every_public_function_is_asked() -> None:
    functions = {n for n in cd.__all__ if n != "__version__" and not inspect.isclass(getattr(cd, n))}
    assert functions == CALLS.keys()


def test_results_and_weights_are_the_same_whatever_the_program_has_set(run: Any, tmp_path: Path) -> None:
    expected = cd.embed(run, PAIRS, **QUIET)
    with ExitStack() as held:
        held.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        for mode in MODES.values():
            held.enter_context(mode())
        found = cd.embed(run, PAIRS, **QUIET)
        again = cd.distill({**SETTINGS, "out": tmp_path / "run"}, quiet=True)
        module, *_ = cd.load_student(again)
    assert found.image.equal(expected.image)
    assert found.text.dtype is torch.float32
    assert cd.load_model(again).fingerprint() == cd.load_model(run).fingerprint()
    first = next(module.parameters())
    assert (first.dtype, first.device.type, first.is_inference()) == (torch.float32, "cpu", False)


def test_of_calls_at_once_the_last_puts_back_what_the_first_found() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with as_guest():
            inside.set()
            leave.wait(10)
            torch.manual_seed(1)

    before = state()
    thread = threading.Thread(target=other)
    with pytest.raises(KeyboardInterrupt), as_guest():
        thread.start()
        assert inside.wait(10)
        torch.rand(3), random.random(), np.random.rand()
        torch.use_deterministic_algorithms(True)
        raise KeyboardInterrupt
    assert state()["torch's"] != before["torch's"], "the other one still runs"
    leave.set()
    thread.join()
    assert {what for what, value in state().items() if value != before[what]} == set()


class Clip(nn.Module):
    """A module of a program, part of it frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.embed_dim = 32, 16
        self.logit_scale = nn.Parameter(torch.tensor(2.6))
        self.pictures, self.norm, self.words = nn.Linear(3 * 32 * 32, 16), nn.BatchNorm1d(16), nn.Embedding(49408, 16)
        self.pictures.weight.requires_grad_(False)
        self.norm.eval()

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.pictures(images.flatten(1)))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.words(tokens).mean(1)

    def state(self, weights: bool = True) -> Any:
        given = [(p.requires_grad, p.grad is None) for p in self.parameters()]
        return [part.training for part in self.modules()], given, weights and pickle.dumps(self.state_dict())


LENT: dict[str, Callable[[Clip, Path], Any]] = {
    "ablate": lambda clip, out: cd.ablate(
        ["clip"], out / "grid", size="debug", seeds=2, quiet=True,
        settings={k: SETTINGS[k] for k in ("device", "data", "train")} | {"student": clip},
    ),
    "distill": lambda clip, out: cd.distill({**SETTINGS, "teacher": clip, "out": out / "run"}, quiet=True),
    "dry_run": lambda clip, out: cd.dry_run({**SETTINGS, "student": clip}, quiet=True),
    "embed": lambda clip, out: cd.embed(clip, PAIRS, **QUIET),
    "evaluate": lambda clip, out: cd.evaluate(cd.load_model(clip), PAIRS, teacher=clip, **QUIET),
    "probe": lambda clip, out: cd.probe(clip, CLASSES, f"{CLASSES}&seed=1", shots=[1], seeds=2, **QUIET),
}  # fmt: skip


@pytest.mark.parametrize("name", LENT)
def test_a_module_that_is_lent_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    clip = Clip()
    before = clip.state()
    LENT[name](clip, tmp_path)
    assert clip.state() == before


def test_a_student_that_is_trained_keeps_its_mode_and_what_is_frozen(tmp_path: Path) -> None:
    clip = Clip()
    before, weights = clip.state(weights=False), clip.state()
    cd.distill({**SETTINGS, "student": clip, "out": tmp_path / "run"}, quiet=True)
    assert clip.state(weights=False) == before
    assert clip.state() != weights


def results(run: Any, out: Path) -> Iterator[tuple[str, Any]]:
    for name, call in CALLS.items():
        if name not in ("ablate", "distill", "dry_run", "export", "report"):
            with suppress(InputError):
                yield name, call(run, out)
    yield "run", run
    for name, term in ((name, TERMS.get(name)) for name in TERMS.names()):
        yield f"term {name}", term
        if name != "task":
            yield f"objective {name}", cd.Objective({"task": 1, name: 1}, 4, 4, schedules={"task": [[0, 1], [1, 0]]})


def test_results_reach_another_process_and_can_be_copied(run: Any, tmp_path: Path) -> None:
    seen = 0
    for name, result in results(run, tmp_path):
        for back in (pickle.loads(pickle.dumps(result)), copy.copy(result), copy.deepcopy(result)):
            assert type(back) is type(result), name
            assert " at 0x" in repr(result) or repr(back) == repr(result), name
        seen += 1
    assert seen > 50


def test_an_objective_with_a_program_s_own_term_is_the_same_in_another_process() -> None:
    TERMS._values["guest"] = Term(
        "guest", row_loss=lambda batch: batch["student_image"][:, 0], reads=("student_image",)
    )
    try:
        objective = cd.Objective({"task": 1, "guest": 2}, 4, 4)
        rows = cd.Embeddings(torch.rand(3, 4), torch.rand(3, 4), 10.0)
        expected = objective(rows).total
        for back in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective), AveragedModel(objective)):
            assert back(rows).total.equal(expected)
    finally:
        del TERMS._values["guest"]


def errors() -> Iterator[type[BaseException]]:
    for found in pkgutil.walk_packages(clipdistill.__path__, "clipdistill."):
        if found.name.rpartition(".")[2] in ("errors", "problems", "retry", "checkpoint"):
            for kind in vars(importlib.import_module(found.name)).values():
                if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == found.name:
                    yield kind


def test_errors_reach_another_process_whole() -> None:
    kinds = set(errors())
    assert {ClipdistillError, MissingExtraError} < kinds
    assert len(kinds) > 10
    for kind in kinds:
        made = getattr(kind.__init__, "__code__", None)
        error = kind(*(f"part {n}" for n in range(1 if made is None else max(made.co_argcount - 1, 1))))
        for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (type(back), str(back), back.args, vars(back)) == (kind, str(error), error.args, vars(error))


def test_a_second_signal_at_a_prompt_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_of_the_program_around_python_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = signal.getsignal(signal.SIGINT), signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGINT else asked(number))
    with StopSignal():
        assert asked(signal.SIGINT) is before
        assert asked(signal.SIGTERM) is not signal.SIG_DFL
    assert asked(signal.SIGTERM) is signal.SIG_DFL
