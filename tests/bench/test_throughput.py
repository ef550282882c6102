"""The whole benchmark on models of a few thousand weights: what is in the result, what fails alone, what is refused."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipdistill.bench import command
from clipdistill.bench import throughput as throughput_module
from clipdistill.bench.backends import Eager, Loaded, find_backend, find_dtype
from clipdistill.bench.cost import median_caption
from clipdistill.bench.endtoend import Pipeline
from clipdistill.bench.measure import show
from clipdistill.bench.throughput import throughput
from clipdistill.bench.timing import UNTRUSTED
from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample
from clipdistill.data.views import EVALUATION_VIEW, render
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.registry import BACKENDS
from tests.bench.synthetic import tiny

FAST: dict[str, Any] = {"seconds": 0.01, "rounds": 5}


class Pictures(PairSource):
    """Seven pictures, the third of which cannot be decoded."""

    name = "pictures"

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 7

    def key(self, i: int) -> str:
        return str(i)

    def captions(self, i: int) -> tuple[str, ...]:
        return ("a picture",)

    def image_bytes(self, i: int) -> bytes:
        raise NotImplementedError

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        self.read.append(i)
        if i == 2:
            raise BadSample("truncated image", "2")
        return Image.new("RGB", (20 + i, 16), (10 * i, 0, 0))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """However busy the machine that runs the tests is, ratios are not withheld."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput_module, "UNTRUSTED", math.inf)
        yield


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    models = {"student": tiny(8), "teacher": tiny(64)}
    return throughput(models, batch_sizes=(1, 3), source=Pictures(), device="cpu", threads=1, **FAST)


def test_every_setting_is_measured(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result)) == result
    rows = {(r["model"], r["tower"], r["batch"]) for r in result["measurements"]}
    towers = ("image", "text", "pair", "end-to-end")
    assert rows == {(m, t, b) for m in ("student", "teacher") for t in towers for b in (1, 3)}
    for row in result["measurements"]:
        assert 0 < row["low"] <= row["value"] <= row["high"]
        assert math.isfinite(row["high"])
        assert row["rounds"] == 5
        if row["tower"] != "pair":
            assert 0 < row["median_ms"] <= row["p95_ms"]
            assert row["calls"] >= 5
    assert result["failures"] == []
    assert result["device"]["threads"] == 1
    assert result["settings"]["data"] == "pictures"


def test_ratios_refer_to_the_teacher(result: dict[str, Any]) -> None:
    ratios = {(r["tower"], r["batch"]) for r in result["ratios"]}
    assert ratios == {(t, b) for t in ("image", "text", "pair", "end-to-end") for b in (1, 3)}
    assert {(r["model"], r["reference"]) for r in result["ratios"]} == {("student", "teacher")}


def test_memory_is_weights_and_activations(result: dict[str, Any]) -> None:
    [row] = [r for r in result["measurements"] if (r["model"], r["tower"], r["batch"]) == ("student", "image", 3)]
    assert row["activation_bytes"] == 3 * 8 * 4
    assert row["peak_bytes"] == row["activation_bytes"] + result["models"]["student"]["size_bytes"]


def test_the_parts_of_end_to_end(result: dict[str, Any]) -> None:
    for row in result["measurements"]:
        if row["tower"] == "end-to-end":
            assert set(row["parts_ms"]) == {"decode", "transform", "tower"}
            assert all(value > 0 for value in row["parts_ms"].values())


def test_models_and_threads_are_left_as_they_were() -> None:
    model = tiny(8)
    model.module.train()
    model.module.visual.eval()
    threads = torch.get_num_threads()
    throughput({"a": model}, batch_sizes=(2,), towers=("image",), threads=threads + 1, device="cpu", **FAST)
    assert torch.get_num_threads() == threads
    assert model.module.training
    assert not model.module.visual.training
    assert model.module.visual.weight.dtype == torch.float32


def test_other_number_formats_run_on_a_copy() -> None:
    model = tiny(8)
    loaded = Eager().load(model, torch.device("cpu"), "bfloat16")
    assert loaded.towers["image"](torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert model.module.visual.weight.dtype == torch.float32
    result = throughput({"a": model}, batch_sizes=(2,), dtype=("float32", "bf16"), device="cpu", **FAST)
    assert {r["dtype"] for r in result["measurements"]} == {"float32", "bfloat16"}


class Failing(Eager):
    """A back end that cannot run a model called "broken", and knows float32 only."""

    name = "failing"
    dtypes = ("float32",)

    def load(self, model: ClipModel, device: torch.device, dtype: str) -> Loaded:
        loaded = super().load(model, device, dtype)
        if model.name != "broken":
            return loaded

        def refuse(inputs: torch.Tensor) -> object:
            raise RuntimeError("operator not supported\nand a long trace")

        return Loaded({"image": loaded.towers["image"], "text": refuse}, 0, close=loaded.close)


def test_a_back_end_that_fails_on_one_model_measures_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS._values, "failing", Failing())
    models = {"good": tiny(8), "bad": tiny(8, "broken")}
    result = throughput(models, batch_sizes=(1, 2), backends=("failing",), device="cpu", **FAST)
    assert {r["model"] for r in result["measurements"]} == {"good"}
    reason = "RuntimeError: operator not supported"
    assert result["failures"] == [{"model": "bad", "backend": "failing", "dtype": "float32", "reason": reason}]
    with pytest.raises(InputError, match=r"nothing could be measured \(bad with failing: RuntimeError"):
        throughput({"bad": models["bad"]}, batch_sizes=(1,), backends=("failing",), device="cpu", **FAST)
    mixed = throughput(models, batch_sizes=(1,), backends=("eager", "failing"), dtype="bf16", device="cpu", **FAST)
    assert {f["reason"] for f in mixed["failures"]} == {"this back end runs in float32 only"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backends": ("egaer",)}, r"unknown back end 'egaer' \(did you mean 'eager'"),
        ({"dtype": "bf61"}, "unknown number format 'bf61'"),
        ({"towers": ("images",)}, r"unknown tower 'images' \(did you mean 'image'"),
        ({"towers": ()}, "at least one tower"),
        ({"batch_sizes": (0,)}, "batch sizes must be whole numbers above 0"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"rounds": 2}, "at least 3 rounds"),
        ({"seconds": float("nan")}, "seconds must be above 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"reference": "b"}, "unknown reference model 'b'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        throughput({"a": tiny()}, **{"device": "cpu", **FAST, **options})


def test_nothing_to_measure() -> None:
    with pytest.raises(InputError, match="at least one model"):
        throughput({}, device="cpu")


def test_names_of_formats_and_back_ends() -> None:
    assert find_dtype("fp16") == "float16"
    assert find_backend("compile").name == "compile"


def test_the_pipeline_feeds_the_tower_what_evaluation_would() -> None:
    source, model = Pictures(), tiny(8)
    seen: list[torch.Tensor] = []
    pipeline = Pipeline(source, model.image, lambda x: seen.append(x), 4, torch.device("cpu"), torch.float32)
    pipeline()
    pipeline()
    assert source.read[7:] == [0, 1, 3, 4, 5, 6, 0, 1]  # the third picture was left out, the end goes on at the start
    expected = torch.stack([render(source.image(i), EVALUATION_VIEW, model.image) for i in (0, 1, 3, 4)])
    assert torch.equal(seen[0], expected)
    assert pipeline.pictures == 8
    pipeline.clear()
    assert pipeline.parts() == {"decode": 0.0, "transform": 0.0, "tower": 0.0}


def test_a_source_of_which_nothing_can_be_decoded() -> None:
    class Broken(Pictures):
        def image(self, i: int, at_least: int | None = None) -> Image.Image:
            raise BadSample("truncated image", str(i))

    with pytest.raises(InputError, match="none of the first 7 pictures can be decoded"):
        throughput({"a": tiny()}, batch_sizes=(1,), source=Broken(), device="cpu", **FAST)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        "clipdistill.models.load.load_model", lambda name, teacher: tiny(8 if name == "small" else 32, name)
    )
    monkeypatch.setattr("clipdistill.bench.measure.check_model_name", lambda name: None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "results" / "bench.json"
    line = ["small", "big[x]", "--batch", "2", "--seconds", "0.01", "--rounds", "5", "--device", "cpu"]
    assert command.run(parser.parse_args([*line, "--json", str(out)])) == 0
    result = json.loads(out.read_text())
    assert result["settings"]["reference"] == "big[x]"
    assert [r["model"] for r in result["ratios"]] == ["small"] * 3
    assert "small" in capsys.readouterr().out
    file = io.StringIO()
    result["failures"] = [{"model": "small", "backend": "onnx", "dtype": "int8", "reason": "[no] file"}]
    result["warnings"] = ["throttling: slower"]
    show(result, file)
    printed = file.getvalue()
    assert "ratio to big[x]" in printed
    assert "not measured: small with onnx, int8: [no] file" in printed
    assert "warning: throttling: slower" in printed
    with pytest.raises(InputError, match="expected whole numbers separated by commas"):
        command.run(parser.parse_args(["small", "--batch", "1;2"]))
    with pytest.raises(InputError, match="this is a folder"):
        command.run(parser.parse_args(["small", "--json", str(tmp_path)]))


@pytest.mark.slow
def test_compiled_towers_agree_with_eager() -> None:
    model = tiny(8)
    inputs = torch.randn(3, 3, 8, 8)
    eager, compiled = (find_backend(n).load(model, torch.device("cpu"), "float32") for n in ("eager", "compile"))
    with torch.inference_mode():
        torch.testing.assert_close(compiled.towers["image"](inputs), eager.towers["image"](inputs))
    result = throughput({"a": model}, batch_sizes=(3,), backends=("compile",), device="cpu", **FAST)
    assert {r["tower"] for r in result["measurements"]} == {"image", "text", "pair"}
    assert all(r.get("activation_bytes") is None for r in result["measurements"])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    models = {"student": tiny(8), "teacher": tiny(64)}
    result = throughput(models, batch_sizes=(4,), dtype=("float32", "float16"), device="cuda", **FAST)
    assert result["device"]["kind"] == "cuda"
    assert all(r["activation_bytes"] > 0 for r in result["measurements"] if r["tower"] == "image")


def test_ratios_measured_amid_noise_are_withheld_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe took 40 times as long in one round: no ratio in the JSON, a word in the table, none in a report."""
    from clipdistill.report.trade import BenchDevice

    real = throughput_module.measure
    monkeypatch.setattr(throughput_module, "UNTRUSTED", UNTRUSTED)

    def disturbed(*arguments: Any, **settings: Any) -> Any:
        session = real(*arguments, **settings)
        session.probe[0] = 40 * min(session.probe[1:])
        return session

    monkeypatch.setattr(throughput_module, "measure", disturbed)
    models = {"small": tiny(8), "teacher": tiny(64)}
    result = throughput(models, batch_sizes=(2,), dtype=("float32", "bf16"), device="cpu", **FAST)
    assert result["ratios"] == result["setting_ratios"] == []
    assert {row["tower"] for row in result["withheld"]} == {"image", "text", "pair"}
    assert all("longer in some rounds" in row["reason"] for row in result["withheld"])
    assert all(row["noisy"] for row in result["measurements"])
    shown = io.StringIO()
    show(result, shown)
    assert "withheld: noise" in shown.getvalue()
    device = BenchDevice("x", "x", noisy={("eager", "float32", 2)})
    assert device.ratio(None, None, "pair", ("eager", "float32", 2)) is None  # type: ignore[arg-type]


def test_text_is_measured_at_the_length_of_a_median_caption_too() -> None:
    from clipdistill.models import build_student, build_words_tokenizer
    from tests.export.conftest import tiny_architecture

    sentence = "two brown dogs are running across a field of tall dry grass"
    text = {"context_length": 48, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    model = build_student(tiny_architecture(text_cfg=text), seed=0, tokenizer=build_words_tokenizer([sentence], 48))
    last = tiny_architecture(text_cfg={**text, "pool_type": "last"}, custom_text=True)
    reads_padding = build_student(last, seed=0, tokenizer=model.tokenizer)
    result = throughput({"a": model, "b": reads_padding}, batch_sizes=(2,), towers=("text",), device="cpu", **FAST)
    rows = {(row["model"], row["tower"]): row for row in result["measurements"]}
    assert set(rows) == {("a", "text"), ("a", "caption"), ("b", "text")}
    assert rows["a", "caption"]["length"] == 16
    captions = median_caption(model, 3, torch.device("cpu"), None)
    assert captions is not None
    assert captions.shape == (3, 16)
