"""WebGPU and what comes in its place: every way in which a browser can lack it, refuse it or lose it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.browser import Browser, needs_chromium, served
from tests.conftest import shared_folder

for package in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
    pytest.importorskip(package)

from clipdistill.export.web.site import export_web  # noqa: E402
from tests.export.web.test_page import VECTORS, ask, expected, index, libraries, ready, text, unit  # noqa: E402

__all__ = ["libraries"]
pytestmark = needs_chromium
SOFTWARE = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
"""Chromium's flags for an adapter that runs on the processor."""

FAKE_ADAPTER = (
    "{ limits: {}, features: new Set(), info: {}, requestDevice: async () => { throw new Error('no device today'); } }"
)
LACKING = {
    "none": ("undefined", "WebGPU is not used: this browser has none."),
    "null": ("{ requestAdapter: async () => null }", "WebGPU is not used: there is no adapter."),
    "rejects": ("{ requestAdapter: async () => { throw new Error('not here'); } }", "WebGPU is not used: not here."),
    "throws": ("{ requestAdapter: () => { throw new Error('blocked\\nline'); } }", "WebGPU is not used: blocked."),
    "silent": ("{ requestAdapter: () => new Promise(() => {}) }", "WebGPU is not used: it does not answer."),
    "emulated": (
        "{ requestAdapter: async () => ({ info: { isFallbackAdapter: true } }) }",
        "WebGPU is not used: it is emulated here.",
    ),
    "device": (f"{{ requestAdapter: async () => ({FAKE_ADAPTER}) }}", "WebGPU was tried and left: "),
}
"""Of a browser's navigator.gpu: what it is, and what the page says then."""

FAKE_RUNTIME = """
const told = await (await fetch(new URL("../manifest.json", import.meta.url))).json();
let lose, runs = 0;
const lost = new Promise((resolve) => { lose = resolve; });
export const env = { wasm: {}, webgpu: { device: Promise.resolve({ lost }) } };
export class Tensor { constructor(kind, data, shape) { Object.assign(this, { kind, data, shape }); } }
const session = (tower) => ({
  inputNames: ["in"], outputNames: ["out"],
  async run({ in: { shape } }) {
    const right = told.web.check[tower];
    const length = shape[0] * right.length, width = right.length;
    const numbers = (value) => Float32Array.from({ length }, (_, i) => value(i % width));
    const out = (value) => ({ out: { getData: async () => numbers(value) } });
    runs += 1;
    FAULT
    return out((i) => right[i]);
  },
});
export const InferenceSession = { create: async () => { CREATE return session(made++ ? "text" : "image"); } };
let made = 0;
"""
AT_THE_START = {
    "creation": ("", "throw new Error('no such operator');", "no such operator"),
    "other numbers": ("return out((i) => (i % 2 ? 1 : -1));", "", "embeddings differ from the model's"),
    "zeros": ("return out(() => 0);", "", "the model gives no embedding"),
    "no numbers": ("return out(() => NaN);", "", "the model gives no embedding"),
    "run": ("throw new Error('out of memory');", "", "out of memory"),
    "lost": ("lose({ reason: 'unknown' }); await new Promise(() => {});", "", "its device was lost: unknown"),
}
LATER = "if (runs > 4) {{ {} }}"  # two runs of the check, and two pictures, come before
IN_THE_MIDDLE = {
    "lost": ("lose({ message: 'the driver was reset' }); await new Promise(() => {});", "the driver was reset"),
    "lost and told late": ("setTimeout(lose, 20, { message: 'gone' }); throw new Error('mapAsync');", "gone"),
    "an error": ("throw new Error('out of memory\\nat buffer.cc');", "out of memory"),
    "zeros": ("return out(() => 0);", "the model gives no embedding"),
    "no numbers": ("return out(() => NaN);", "the model gives no embedding"),
}


@pytest.fixture(scope="module")
def site(tiny, libraries, tmp_path_factory) -> Path:
    return export_web(tiny, tmp_path_factory.mktemp("webgpu") / "site", libraries).folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def files(squares, tmp_path) -> list[Path]:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(squares.image_bytes(i))
    return [tmp_path / f"{i}.png" for i in range(6)]


def changed(site: Path, folder: Path, gpu: str | None = None, runtime: str | None = None) -> Path:
    """The site with another navigator.gpu in its worker, or another library for WebGPU."""
    (folder / "runtime").mkdir(parents=True)
    for path in [*site.iterdir(), *(site / "runtime").iterdir()]:
        if path.is_file():
            (folder / path.relative_to(site)).symlink_to(path)
    if gpu is not None:
        engine = (site / "engine.js").read_text().replace("PATIENCE = 10000", "PATIENCE = 300")
        (folder / "engine.js").unlink()
        stub = f"Object.defineProperty(navigator, 'gpu', {{ value: {gpu} }});\n"
        (folder / "engine.js").write_text(engine + stub)
    if runtime is not None:
        (folder / "runtime" / "ort.webgpu.min.js").unlink()
        (folder / "runtime" / "ort.webgpu.min.js").write_text(runtime)
    return folder


def answers(browser: Browser, model, files: list[Path]) -> None:
    """Its embeddings are the model's, of pictures and of words."""
    found = dict(browser.evaluate(VECTORS))
    for path in files:
        assert unit(found[path.name]) @ expected(model, path) > 0.999
    words = "a red square number 2"
    row = browser.evaluate(f"clipdistill.ask('text', {{ texts: [{json.dumps(words)}] }}).then((a) => [...a.vectors])")
    with torch.inference_mode():
        assert unit(row) @ unit(model.module.encode_text(model.tokenizer([words]))[0].numpy()) > 0.999


@pytest.mark.sampled(7)
@pytest.mark.parametrize("kind", LACKING)
def test_a_browser_without_it(kind, site, tiny, browser, files, tmp_path):
    gpu, sentence = LACKING[kind]
    with served(changed(site, tmp_path / "site", gpu=gpu)) as (url, asked):
        browser.open(url)
        ready(browser)
        assert browser.evaluate("clipdistill.about.backend") == "wasm"
        assert sentence in text(browser, "about")
        index(browser, files)
        answers(browser, tiny, files)
        assert any("ort.webgpu" in path for path in asked) == (kind == "device")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", AT_THE_START)
def test_it_fails_at_the_start(kind, site, tiny, browser, files, tmp_path):
    fault, create, reason = AT_THE_START[kind]
    runtime = FAKE_RUNTIME.replace("FAULT", fault).replace("CREATE", create)
    with served(changed(site, tmp_path / "site", runtime=runtime)) as (url, _):
        browser.open(f"{url}?backend=webgpu")
        ready(browser)
        assert browser.evaluate("clipdistill.about.backend") == "wasm"
        assert f"WebGPU was tried and left: {reason}" in text(browser, "about")
        index(browser, files)
        answers(browser, tiny, files)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", IN_THE_MIDDLE)
def test_it_stops_in_the_middle_of_the_work(kind, site, tiny, browser, files, tmp_path):
    fault, reason = IN_THE_MIDDLE[kind]
    runtime = FAKE_RUNTIME.replace("FAULT", LATER.format(fault)).replace("CREATE", "")
    with served(changed(site, tmp_path / "site", runtime=runtime)) as (url, _):
        browser.open(f"{url}?backend=webgpu")
        ready(browser)
        assert browser.evaluate("clipdistill.about.backend") == "webgpu"
        index(browser, files)
        assert text(browser, "count") == "6 pictures in the index."  # none was passed over
        assert browser.evaluate("clipdistill.about.backend") == "wasm"
        assert text(browser, "problem").startswith("WebGPU stopped in the middle of the work (")
        assert reason in text(browser, "problem")
        assert "buffer.cc" not in text(browser, "problem")
        assert text(browser, "backend").startswith("WASM")
        answers(browser, tiny, files[2:])  # the first two are the stand-in's


def test_a_question_moves_it_as_well(site, tiny, browser, files, tmp_path):
    runtime = FAKE_RUNTIME.replace("FAULT", "if (runs > 2 && tower === 'text') { throw new Error('reset'); }")
    with served(changed(site, tmp_path / "site", runtime=runtime.replace("CREATE", ""))) as (url, _):
        browser.open(f"{url}?backend=webgpu")
        ready(browser)
        index(browser, files[:1])
        ask(browser, "a red square")
        assert "ms for the question" in text(browser, "answer")
        assert "WebGPU stopped in the middle of the work (reset)" in text(browser, "problem")


def test_where_the_model_cannot_be_had_again_each_picture_says_so(site, browser, files, tmp_path):
    fault = "self.fetch = async () => { throw new TypeError('Failed to fetch'); }; throw new Error('reset');"
    runtime = FAKE_RUNTIME.replace("FAULT", LATER.format(fault)).replace("CREATE", "")
    with served(changed(site, tmp_path / "site", runtime=runtime)) as (url, _):
        browser.open(f"{url}?backend=webgpu")
        ready(browser)
        index(browser, files)
        assert text(browser, "count") == "2 pictures in the index."
        passed = browser.evaluate("[...document.querySelectorAll('#passed li')].map((e) => e.textContent)")
        assert passed == [f"{path.name}: image.onnx: Failed to fetch" for path in files[2:]]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("int8", [False, True], ids=["float16", "int8"])
def test_webgpu_itself(int8, libraries, tmp_path):
    """On Chromium's own adapter in software: photographs and captions as the model has them, then a lost device."""
    from clipdistill.models import load_model

    photographs = sorted((shared_folder("data/flickr8k") / "Flicker8k_Dataset").glob("*.jpg"))[:6]
    model = load_model("scenes-teacher", teacher=True)
    folder = export_web(model, tmp_path / "site", libraries, int8=int8).folder
    spy = """
const asked = navigator.gpu.requestAdapter.bind(navigator.gpu);
navigator.gpu.requestAdapter = async (...wishes) => {
  const adapter = await asked(...wishes), made = adapter.requestDevice.bind(adapter);
  adapter.requestDevice = async (wish) => (self.device = await made(wish));
  return adapter;
};
self.addEventListener("message", ({ data }) => { if (data.kind === "lose") { self.device.destroy(); } });
work.lose = () => true;
"""
    (folder / "engine.js").write_text((folder / "engine.js").read_text() + spy)
    with served(folder) as (url, _), Browser(tmp_path / "profile", 600, SOFTWARE) as browser:
        browser.open(url)
        ready(browser)
        assert "it is emulated here" in text(browser, "about")
        browser.open(f"{url}?backend=webgpu")
        ready(browser)
        if browser.evaluate("clipdistill.about.backend") != "webgpu":
            pytest.skip(f"this Chromium gives no adapter: {text(browser, 'about')}")
        index(browser, photographs[:4])
        found = dict(browser.evaluate(VECTORS))
        least = 0.99 if int8 else 0.9999
        assert min(unit(found[path.name]) @ expected(model, path) for path in photographs[:4]) > least
        captions = ["a red circle on a green square", "two blue rings", "a photo of a dog, isn't it?"]
        asking = f"clipdistill.ask('text', {{ texts: {json.dumps(captions)} }}).then((a) => [...a.vectors])"
        with torch.inference_mode():
            rows = model.module.encode_text(model.tokenizer(captions)).numpy()
        for row, own in zip(np.array(browser.evaluate(asking)).reshape(len(rows), -1), rows, strict=True):
            assert unit(row) @ unit(own) > least
        assert browser.evaluate("clipdistill.ask('lose')")
        index(browser, photographs[4:])
        assert browser.evaluate("clipdistill.about.backend") == "wasm"
        assert text(browser, "count") == "6 pictures in the index."
        found = dict(browser.evaluate(VECTORS))
        assert min(unit(found[path.name]) @ expected(model, path) for path in photographs[4:]) > least
