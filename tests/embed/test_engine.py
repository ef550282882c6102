"""Engines of an encoder: which one runs the towers, how near to torch it must be, what happens when it cannot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from clipdistill.embed import engine as engines
from clipdistill.embed.encode import Encoder
from clipdistill.embed.engine import LEAST_COSINE, choose_engine
from clipdistill.embed.prepare import ahead
from clipdistill.errors import InputError
from clipdistill.evaluate.evaluate import evaluate
from clipdistill.models import ClipModel, build_student
from clipdistill.models.parameters import evaluation_mode
from tests.export.conftest import Squares
from tests.export.test_any_length import model_of


@pytest.fixture(scope="module")
def squares() -> Squares:
    return Squares()


@pytest.fixture(scope="module")
def model(squares: Squares) -> ClipModel:
    return model_of(squares)


def _needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package)


@pytest.mark.parametrize(
    ("engine", "dtype", "packages"),
    [
        ("onnx", "float32", ["onnxruntime", "onnxscript"]),
        ("openvino", "float32", ["openvino", "onnxscript"]),
        ("openvino", "bfloat16", ["openvino", "onnxscript"]),
    ],
)
def test_every_engine_gives_the_rows_of_torch(engine, dtype, packages, model, squares):
    _needs(*packages)
    said: list[str] = []
    plain = Encoder(model, progress=False).pairs(squares)
    encoder = Encoder(model, engine=engine, dtype=dtype, batch_size=7, say=said.append, progress=False)
    found = encoder.pairs(squares)
    assert encoder.engine_names() == {"image": engine, "text": engine}
    for rows, expected in ((found.image, plain.image), (found.text, plain.text)):
        assert (rows * expected).sum(1).min() >= LEAST_COSINE[dtype]
    assert len(said) == 2
    assert all(engine in line and dtype in line for line in said)
    assert len(encoder.notes("student")) == 2
    assert all(choice.agreement > LEAST_COSINE[dtype] for choice in encoder.engines.values())
    query = encoder.encode_tokens(model.tokenizer(["a red square number 1"]))
    assert (query[0] * plain.text[plain.captions.index("a red square number 1")]).sum() >= LEAST_COSINE[dtype]


@pytest.mark.slow
def test_scores_say_what_ran_the_towers(model, squares):
    _needs("onnxruntime", "onnxscript")
    plain, found = (
        evaluate(model, squares, intervals=False, progress=False, engine=engine) for engine in ("auto", "onnx")
    )
    assert [s.value for s in found] == pytest.approx([s.value for s in plain])
    assert not any("was run by" in note for note in plain.notes)
    assert sum("tower of the student was run by onnx in float32" in note for note in found.notes) == 2


def choose(
    model: ClipModel, monkeypatch: pytest.MonkeyPatch, made: dict[str, Callable[[Tensor], Tensor]], **settings: Any
) -> tuple[engines.TowerEngine, list[str]]:
    """The choice among made-up engines for the text tower, and what was said."""
    monkeypatch.setattr(engines, "_converted", lambda name, *_: made[name])
    monkeypatch.setattr(engines, "installed", lambda name: name in made)
    said: list[str] = []
    settings = {"dtype": "float32", "items": 100, "wanted": "auto", **settings}
    tokens = model.tokenizer(["a red square number 1", "grey"] * 8)
    wanted = settings.pop("wanted")
    found = choose_engine(model, "text", wanted, model.module.encode_text, tokens, say=said.append, **settings)
    return found, said


def slowed(model: ClipModel, seconds: float, change: float = 0.0) -> Callable[[Tensor], Tensor]:
    def run(tokens: Tensor) -> Tensor:
        time.sleep(seconds)
        rows: Tensor = model.module.encode_text(tokens)
        return rows + change * rows.flip(1)

    return run


def test_auto_takes_the_fastest_where_the_set_is_long_enough(model, monkeypatch):
    truth = model.module.encode_text
    monkeypatch.setattr(model.module, "encode_text", lambda tokens: (time.sleep(0.02), truth(tokens))[1])
    made = {"onnx": truth, "openvino": slowed(model, 0.01)}
    found, said = choose(model, monkeypatch, made)
    assert (found.name, said) == ("torch", [])  # a hundred captions: nothing was converted
    monkeypatch.setattr(engines, "CONVERSION_PAYS", 0.0)
    found, said = choose(model, monkeypatch, made)
    assert found.name == "onnx"
    assert found.agreement == pytest.approx(1)
    assert len(said) == 1
    found, said = choose(model, monkeypatch, {"openvino": slowed(model, 0.03)})
    assert (found.name, said) == ("torch", [])  # it is no faster


@pytest.mark.parametrize("wanted", ["auto", "onnx"])
def test_an_engine_that_computes_something_else_is_not_taken(wanted, model, monkeypatch):
    monkeypatch.setattr(engines, "CONVERSION_PAYS", 0.0)
    found, [line] = choose(model, monkeypatch, {"onnx": slowed(model, 0, change=0.1)}, wanted=wanted)
    assert found.name == "torch"
    assert found.run is None
    assert "text tower: onnx does not run it, torch does (its rows differ from torch's, least cosine" in line


def test_a_failure_to_convert_is_one_line_and_torch_goes_on(model, squares, monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(engines, "_converted", fail)
    said: list[str] = []
    encoder = Encoder(model, engine="compile", say=said.append, progress=False)
    found = encoder.pairs(squares)
    assert said == [
        f"{tower} tower: compile does not run it, torch does (no such operator)" for tower in ("image", "text")
    ] or said == [
        f"{tower} tower: compile does not run it, torch does (no such operator)" for tower in ("text", "image")
    ]
    torch.testing.assert_close(found.image, Encoder(model, progress=False).pairs(squares).image)


def test_what_cannot_be_is_refused_before_anything_is_read(model):
    for settings, text in (
        ({"engine": "onx"}, r"unknown engine 'onx' \(did you mean 'onnx'"),
        ({"engine": "onnx", "dtype": "bf16"}, "runs in float32 only, not in bfloat16"),
        ({"engine": "openvino", "device": "cuda"}, "runs on the CPU"),
    ):
        with pytest.raises(InputError, match=text):
            Encoder(model, **settings)


def test_what_is_not_installed_is_named(model, monkeypatch):
    from clipdistill.embed import names

    monkeypatch.setattr(names, "find_spec", lambda package: None if package == "openvino" else object())
    with pytest.raises(InputError, match=r"needs the package 'openvino': pip install 'clipdistill\[openvino\]'"):
        Encoder(model, engine="openvino")


def test_items_come_in_order_and_other_work_is_done_while_they_are_awaited():
    def slow() -> Iterator[int]:
        for number in range(4):
            time.sleep(0.02)
            yield number

    steps: list[int] = []
    other = iter(lambda: (steps.append(1), time.sleep(0.002))[0], 1)
    assert list(ahead(slow(), other)) == [0, 1, 2, 3]
    assert len(steps) > 3
    steps.clear()
    assert list(ahead(iter(range(50)), iter(()))) == list(range(50))


def test_an_error_of_the_thread_is_raised_and_an_early_end_ends_it():
    import threading

    def breaks() -> Iterator[int]:
        yield 1
        raise InputError("this picture")

    items = ahead(breaks(), iter(()))
    assert next(items) == 1
    with pytest.raises(InputError, match="this picture"):
        next(items)
    items = ahead(iter(range(10**9)), iter(()))
    assert next(items) == 0
    items.close()
    assert not any(thread.name == "pictures ahead" for thread in threading.enumerate())


def test_workers_follow_from_cores_and_from_what_a_picture_takes(model, monkeypatch):
    from clipdistill.embed import encode

    said: list[str] = []
    encoder = Encoder(model, workers=None, say=said.append, progress=False)
    images = torch.zeros(4, 3, 32, 32)
    monkeypatch.setattr(encode, "cpu_count", lambda: 8)
    monkeypatch.setattr(encoder, "_run", lambda tower, batch: (time.sleep(0.04), batch)[1])  # 10 ms a picture
    assert encoder._suited_workers(images, 0.001, 100) == 0  # a tenth of a second of reading
    assert said == []
    assert encoder._suited_workers(images, 0.001, 100_000) == 1
    assert encoder._suited_workers(images, 0.035, 100_000) in (3, 4)
    assert "processes read the pictures: 35.0 ms for one" in said[-1]
    assert encoder._suited_workers(images, 10.0, 100_000) == 8
    monkeypatch.setattr(encode, "cpu_count", lambda: 1)
    assert encoder._suited_workers(images, 10.0, 100_000) == 0


def test_large_batches_run_after_the_graph_file_is_gone_on_many_threads() -> None:
    pytest.importorskip("openvino")
    model = build_student("scenes-student", seed=0, captions=["a red circle"])
    images, threads = torch.randn(64, 3, model.image.size, model.image.size), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with evaluation_mode(model.module), torch.no_grad():
            engine = choose_engine(
                model, "image", "openvino", model.module.encode_image, images, dtype="float32", items=64
            )
            assert engine.name == "openvino"
            torch.testing.assert_close(engine.run(images), model.module.encode_image(images), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(threads)
