"""The page in Chromium: it indexes, searches, classifies, keeps its index, and computes what the model computes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdistill.data.images import decode
from clipdistill.data.views import EVALUATION_VIEW, render
from clipdistill.errors import InputError
from tests.browser import OVERFLOW, Browser, needs_chromium, served
from tests.conftest import REPOSITORY, shared_folder

for package in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
    pytest.importorskip(package)

from clipdistill.export.web.runtime import web_runtime  # noqa: E402
from clipdistill.export.web.site import export_web  # noqa: E402

pytestmark = needs_chromium
VECTORS = "clipdistill.store().pictures.map((p) => [p.name, [...p.vector]])"


@pytest.fixture(scope="session")
def libraries() -> Path:
    try:
        return web_runtime()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def site(tiny, libraries, tmp_path_factory) -> Path:
    return export_web(tiny, tmp_path_factory.mktemp("web") / "site", libraries).folder


@pytest.fixture(scope="session")
def pictures(squares, tmp_path_factory) -> list[Path]:
    """The squares, and pictures of other kinds: turned by EXIF, transparent, grey, a profile, a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(len(squares)):
        (folder / f"{squares.key(i)}.png").write_bytes(squares.image_bytes(i))
    rng = np.random.default_rng(5)
    noise = Image.fromarray(rng.integers(0, 256, (90, 61, 3)).astype(np.uint8)).resize((300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif, quality=90)
    noise.convert("L").save(folder / "grey.jpg", quality=90)
    noise.save(folder / "webp.webp", lossless=True)
    alpha = noise.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(noise.size))
    alpha.save(folder / "transparent.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is no picture")
    return sorted(folder.iterdir())


def ready(browser: Browser) -> None:
    """Wait for the model, or for the sentence that says why there is none; the first visit loads the page twice."""
    loading = "(document.getElementById('loading') || {textContent: ''}).textContent"
    for _ in range(600):
        with contextlib.suppress(AssertionError):  # the page is just being replaced
            if browser.evaluate(f"Boolean(window.clipdistill) || {loading}.includes('cannot be loaded')"):
                return
        time.sleep(0.1)
    raise AssertionError(browser.console)


def expected(model: Any, path: Path) -> np.ndarray:
    with torch.inference_mode():
        values = render(decode(path.read_bytes()), EVALUATION_VIEW, model.image)[None]
        return unit(model.module.eval().encode_image(values)[0].numpy())


def unit(values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return values / np.linalg.norm(values)


def index(browser: Browser, files: list[Path]) -> None:
    """Add files and wait until all are in the index or passed over."""
    before = browser.evaluate("clipdistill.store().pictures.length + document.querySelectorAll('#passed li').length")
    browser.choose("#files", *files)
    browser.until(
        "document.getElementById('indexing').hidden && clipdistill.store().pictures.length + "
        f"document.querySelectorAll('#passed li').length >= {before + len(files)}"
    )


def ask(browser: Browser, words: str) -> None:
    browser.evaluate("document.getElementById('answer').textContent = ''")
    browser.evaluate(f"document.getElementById('q').value = {json.dumps(words)}")
    browser.evaluate("document.getElementById('search').requestSubmit()")
    browser.until("!document.body.classList.contains('busy')")  # a sentence in `problem` may come before the answer


def text(browser: Browser, name: str) -> str:
    return browser.evaluate(f"document.getElementById('{name}').textContent")


def test_a_visit(site, tiny, pictures, tmp_path):
    with served(site) as (url, asked), Browser(tmp_path / "profile") as browser:
        browser.open(url, width=390, height=800)
        ready(browser)
        assert text(browser, "count") == "No pictures yet."
        assert browser.evaluate("clipdistill.about.agreement") > 0.9999
        assert browser.evaluate("crossOriginIsolated")  # threads, though the host sends no headers
        assert browser.evaluate(OVERFLOW) == {"inner": 390, "scroll": 390, "wide": []}
        ask(browser, "a red square")
        assert "There are no pictures yet" in text(browser, "problem")

        index(browser, pictures)
        assert text(browser, "count") == "20 pictures in the index."
        assert "ms a picture (decode" in text(browser, "cost")
        assert browser.evaluate("document.querySelector('#passed li').textContent").startswith("broken.jpg: ")
        for name, vector in browser.evaluate(VECTORS):
            path = next(path for path in pictures if path.name == name)
            # Chromium mixes transparent pixels in whole numbers, and decodes JPEG by its own library
            assert unit(vector) @ expected(tiny, path) > (0.999 if name != "transparent.png" else 0.998), name
        index_again = browser.evaluate("clipdistill.store().pictures.length")
        browser.choose("#files", *pictures[:3])
        time.sleep(0.3)
        assert browser.evaluate("clipdistill.store().pictures.length") == index_again

        # in words: the order is that of the model's own cosines
        ask(browser, "a green square number 2")
        with torch.inference_mode():
            query = unit(tiny.module.encode_text(tiny.tokenizer(["a green square number 2"]))[0].numpy())
        vectors = {name: unit(vector) for name, vector in browser.evaluate(VECTORS)}
        names = browser.evaluate("[...document.querySelectorAll('.hit')].map((e) => e.dataset.name)")
        scores = [vectors[name] @ query for name in names]
        assert len(names) == 20
        assert scores == sorted(scores, reverse=True)
        shown = float(browser.evaluate("document.querySelector('.score').textContent"))
        assert shown == pytest.approx(scores[0], abs=2e-3)
        assert "ms for the question" in text(browser, "answer")
        ask(browser, "zyx qwv")
        assert "knows no word" in text(browser, "problem")

        # by a picture: the same one comes first
        browser.evaluate("document.getElementById('answer').textContent = ''")
        browser.choose("#example", pictures[4])
        browser.until("document.getElementById('answer').textContent.includes('Pictures like yours')")
        assert browser.evaluate("document.querySelector('.hit').dataset.name") == pictures[4].name

        # labels
        browser.evaluate("document.getElementById('tab-classify').click()")
        browser.evaluate("document.getElementById('labels').value = 'red square, green square\\nblue square'")
        browser.evaluate("document.getElementById('classify').requestSubmit()")
        browser.until("document.querySelectorAll('h2').length > 0")
        with torch.inference_mode():
            sentences = [f"a photo of a {label}" for label in ("red square", "green square", "blue square")]
            labels = [unit(row) for row in tiny.module.encode_text(tiny.tokenizer(sentences)).numpy()]
        counts = np.bincount([int(np.argmax([v @ label for label in labels])) for v in vectors.values()], minlength=3)
        heads = browser.evaluate("[...document.querySelectorAll('h2 span')].map((e) => parseInt(e.textContent))")
        assert sorted(heads) == sorted(count for count in counts.tolist() if count)

        # the keyboard: to a picture, large, the next one, back
        browser.evaluate("document.activeElement.blur()")
        for key in ("ArrowRight", "ArrowRight", "Enter"):
            press(browser, key)
        browser.until("document.getElementById('large').open")
        first = browser.evaluate("document.querySelector('#large p').textContent")
        assert len(browser.evaluate("[...document.querySelectorAll('#bars li')].map((e) => e.textContent)")) == 3
        press(browser, "ArrowRight")
        browser.until(f"document.querySelector('#large p').textContent !== {json.dumps(first)}")
        press(browser, "Escape")
        browser.until("!document.getElementById('large').open")
        press(browser, "s")
        browser.until("document.getElementById('answer').textContent.includes('Pictures like')")
        press(browser, "/")
        assert browser.evaluate("document.activeElement.id") == "q"

        # closed and opened again, the index is there; a picture taken out stays out
        for width, dark in ((390, True), (1200, False)):
            browser.open(url, width=width, height=800, dark=dark)
            ready(browser)
            browser.until("document.querySelectorAll('.hit').length === 20")
            assert browser.evaluate(OVERFLOW) == {"inner": width, "scroll": width, "wide": []}
            colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, colour[4:-1].split(","))) < 150) == dark
        browser.evaluate("document.querySelector('.hit > button').click()")
        browser.evaluate("document.getElementById('remove').click()")
        browser.until("document.querySelectorAll('.hit').length === 19")
        browser.open(url)
        ready(browser)
        browser.until("document.querySelectorAll('.hit').length === 19")
        errors = [line for line in browser.console if "No available adapters" not in line]
        assert errors == []
    assert {path.split("?")[0] for path in asked} <= {f"/{path.relative_to(site)}" for path in site.rglob("*")} | {"/"}


def press(browser: Browser, key: str) -> None:
    """A key as a person presses it; Enter also types."""
    typed = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
    code = {"Enter": 13, "Escape": 27, "ArrowRight": 39}.get(key, 0)
    browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **typed)
    browser.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)


def test_without_webgpu_it_says_so_and_takes_wasm(site, tmp_path):
    with served(site) as (url, _), Browser(tmp_path / "profile") as browser:
        browser.open(f"{url}?backend=webgpu")
        ready(browser)
        assert browser.evaluate("clipdistill.about.backend") == "wasm"
        assert "WebGPU was tried and left" in text(browser, "about")


def test_a_damaged_folder_is_said(site, tmp_path):
    import shutil

    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "image.onnx").write_bytes(b"no graph")
    with served(tmp_path / "site") as (url, _), Browser(tmp_path / "profile") as browser:
        browser.open(url)
        ready(browser)
        assert text(browser, "loading").startswith("The model cannot be loaded: ")


@pytest.mark.slow
@pytest.mark.parametrize(("int8", "least"), [(False, 0.999), (True, 0.99)], ids=["float16", "int8"])
def test_photographs(libraries, int8, least, tmp_path):
    """The shipped teacher on photographs: embeddings and captions of the browser beside the model's."""
    from clipdistill.models import load_model

    photographs = sorted((shared_folder("data/flickr8k") / "Flicker8k_Dataset").glob("*.jpg"))[:24]
    model = load_model("scenes-teacher", teacher=True)
    captions = ["a red circle on a green square", "two blue rings", "a photo of a dog, isn't it?"]
    folder = export_web(model, tmp_path / "site", libraries, int8=int8).folder
    with served(folder) as (url, _), Browser(tmp_path / "profile") as browser:
        browser.open(url)
        ready(browser)
        index(browser, photographs)
        found = dict(browser.evaluate(VECTORS))
        texts = browser.evaluate(
            f"clipdistill.ask('text', {{texts: {json.dumps(captions)}}}).then((a) => [...a.vectors])"
        )
    cosines = [unit(found[path.name]) @ expected(model, path) for path in photographs]
    assert min(cosines) >= least
    with torch.inference_mode():
        rows = model.module.encode_text(model.tokenizer(captions)).numpy()
    for row, own in zip(np.array(texts).reshape(len(captions), -1), rows, strict=True):
        assert unit(row) @ unit(own) >= least


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_retrieval_of_photographs(libraries, tmp_path):
    """R@1 on 200 pictures of Flickr8k, counted from the browser's embeddings and from the model's."""
    data = shared_folder("data/flickr8k") / "dataset_flickr8k.json"
    command = [sys.executable, "benchmarks/web.py", "scenes-teacher", "--data", str(data), "--index", "200"]
    done = subprocess.run([*command, "--out", str(tmp_path / "web")], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "web.json").read_text())
    assert found["images"] == 200
    for weights, least in (("float16", 0.999), ("int8", 0.99)):
        assert min(found[weights]["image_cosine"][0], found[weights]["text_cosine"][0]) >= least
        for metric in ("i2t_R@1", "t2i_R@1"):
            assert abs(found[weights][metric] - found["torch"][metric]) <= 1.0
