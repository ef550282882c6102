"""An export for browsers in headless Chromium beside the model in torch: embeddings, R@1, times.

    python benchmarks/web.py RUN --data dataset_flickr8k.json [--images 200] [--index 1000] [--out docs/performance/web]

The pictures of the test split are given to the page as files, their captions as questions. R@1 (standard protocol) is
counted from the browser's embeddings and from torch's. With weights of sixteen bits `--index` pictures are indexed, the
page is opened anew, and the first answer after that is timed. Needs Chromium and onnxruntime-web (npm fetches it).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.browser import Browser, served

from clipdistill.bench.device import describe_device, describe_libraries
from clipdistill.data.pairs import PairSource
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.export.accuracy import embed, open_test
from clipdistill.export.hub import public_text
from clipdistill.export.web.runtime import web_runtime
from clipdistill.export.web.site import export_web
from clipdistill.models import load_model
from clipdistill.runtime.console import say
from clipdistill.runtime.files import write_json, write_text

CHUNK = 50  # captions a question


def ready(browser: Browser) -> None:
    """Wait for the model; the first visit loads the page twice."""
    for _ in range(3000):
        with contextlib.suppress(AssertionError):  # the page is just being replaced
            if browser.evaluate("Boolean(window.clipdistill)"):
                return
        time.sleep(0.1)
    raise SystemExit(f"the page did not start: {browser.console}")


def index(browser: Browser, files: list[Path]) -> float:
    """Give files to the page; seconds until all are in the index."""
    begin = time.perf_counter()
    wanted = browser.evaluate("clipdistill.store().pictures.length") + len(files)
    browser.choose("#files", *files)
    browser.until(f"clipdistill.store().pictures.length >= {wanted} && document.getElementById('indexing').hidden")
    return time.perf_counter() - begin


def vectors(browser: Browser, texts: list[str]) -> np.ndarray:
    rows = []
    for i in range(0, len(texts), CHUNK):
        asked = json.dumps(texts[i : i + CHUNK])
        rows += browser.evaluate(f"clipdistill.ask('text', {{texts: {asked}}}).then((a) => [...a.vectors])")
    return np.array(rows, dtype=np.float32).reshape(len(texts), -1)


def written(source: PairSource, folder: Path, count: int) -> list[Path]:
    files = []
    for i in range(min(count, len(source))):
        files.append(folder / f"{i:05d}.jpg")
        files[-1].write_bytes(source.image_bytes(i))
    return files


def cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Least and median cosine of the rows."""
    rows = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return [round(float(rows.min()), 6), round(float(np.median(rows)), 6)]


def recall(image: np.ndarray, text: np.ndarray, own: torch.Tensor) -> dict[str, float]:
    found = retrieval(torch.from_numpy(image), torch.from_numpy(text), own, ks=(1,))
    return {name: round(100 * float(found[name]), 2) for name in ("i2t_R@1", "t2i_R@1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--index", type=int, default=1000)
    parser.add_argument("--query", default="two dogs run on the beach")
    parser.add_argument("--out", type=Path, default=Path("docs/performance/web"))
    arguments = parser.parse_args()
    model, libraries = load_model(arguments.model, teacher=True), web_runtime()
    source, whole = open_test(arguments.data, limit=arguments.images), open_test(arguments.data)
    captions = [caption for i in range(len(source)) for caption in source.captions(i)]
    torch_rows = embed(model, source)
    images, texts = torch_rows.image.numpy(), torch_rows.text.numpy()
    own = torch_rows.text_to_image
    result: dict[str, Any] = {
        "model": public_text(model.name),
        "data": source.name,
        "images": len(source),
        "captions": len(captions),
    }
    result["parameters"] = model.parameter_counts()["total"]
    result["torch"] = recall(images, texts, own)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "few").mkdir(), (folder / "many").mkdir()
        few, many = written(source, folder / "few", len(source)), written(whole, folder / "many", arguments.index)
        for weights in ("float16", "int8"):
            site = folder / weights
            exported = export_web(model, site, libraries, int8=weights == "int8").folder
            size = sum((exported / f"{tower}.onnx").stat().st_size for tower in ("image", "text"))
            with served(site) as (url, _), Browser(folder / f"profile-{weights}", wait=3600) as browser:
                browser.open(url)
                ready(browser)
                index(browser, few)
                rows = dict(browser.evaluate("clipdistill.store().pictures.map((p) => [p.name, [...p.vector]])"))
                image = np.array([rows[file.name] for file in few], dtype=np.float32)
                text = vectors(browser, captions)
                found: dict[str, Any] = {"megabytes": round(size / 1e6, 1), **recall(image, text, own)}
                found["image_cosine"] = cosines(image, images)
                found["text_cosine"] = cosines(text, texts)
                found["backend"] = browser.evaluate("document.getElementById('backend').textContent")
                if weights == "float16":
                    browser.evaluate("clipdistill.store().clear()")
                    found["indexed"] = len(many)
                    found["index_seconds"] = round(index(browser, many), 1)
                    found["parts"] = browser.evaluate("document.getElementById('cost').textContent")
                    begin = time.perf_counter()
                    browser.open(url)
                    ready(browser)
                    found["ready_seconds"] = round(time.perf_counter() - begin, 2)
                    begin = time.perf_counter()
                    browser.evaluate(f"document.getElementById('q').value = {json.dumps(arguments.query)}")
                    browser.evaluate("document.getElementById('search').requestSubmit()")
                    browser.until("document.getElementById('answer').textContent")
                    found["first_answer_seconds"] = round(time.perf_counter() - begin, 3)
                    found["first_answer"] = browser.evaluate("document.getElementById('answer').textContent")
                result[weights] = found
                say(f"{weights}: {found}")
    result["device"], result["libraries"] = (
        describe_device(torch.device("cpu"))["label"],
        describe_libraries(("torch", "onnxruntime")),
    )
    write_json(arguments.out.with_suffix(".json"), result)
    write_text(arguments.out.with_suffix(".md"), report(result))
    say(f"written: {arguments.out}.json and .md")


def report(result: dict[str, Any]) -> str:
    light, small = result["float16"], result["int8"]
    rows = [("torch", result["torch"], "", "", ""), *(
        (name, found, f"{found['megabytes']:.1f}", f"{found['image_cosine'][0]:.5f}", f"{found['text_cosine'][0]:.5f}")
        for name, found in (("browser, float16", light), ("browser, int8", small))
    )]  # fmt: skip
    table = "\n".join(
        f"| {name} | {megabytes} | {image} | {text} | {found['i2t_R@1']:.1f} | {found['t2i_R@1']:.1f} |"
        for name, found, megabytes, image, text in rows
    )
    size, device = f"{result['parameters'] / 1e6:.1f} M parameters", result["device"]
    seconds = f"{light['ready_seconds']:.1f} s and gave its first answer {light['first_answer_seconds']:.2f} s later"
    return f"""# An export in the browser

`python benchmarks/web.py RUN --data ...`: {size}, headless Chromium ({light["backend"]}), {device}.
{result["images"]:,} pictures and {result["captions"]:,} captions of {result["data"]}, standard protocol.

| | megabytes | least cosine, pictures | captions | image to text R@1 | text to image R@1 |
|---|---|---|---|---|---|
{table}

{light["indexed"]:,} pictures were indexed in {light["index_seconds"]:.0f} s: {light["parts"]}.
Opened anew, the page was ready in {seconds}: {light["first_answer"].partition(":")[2].strip()}
"""


if __name__ == "__main__":
    main()
