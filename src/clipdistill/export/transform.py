"""The evaluation transform as data (`transform.json`) and the example that shows how to use an export.

`example.py` needs onnxruntime (or openvino), tokenizers, pillow and numpy, and nothing of ours; its pixels equal those
of `data.views.render` to the last bit but one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipdistill.data.views import ImageSpec
from clipdistill.runtime.files import write_json, write_text

FILE, EXAMPLE = "transform.json", "example.py"


def transform_json(image: ImageSpec) -> dict[str, Any]:
    """Size, resize rule, mean and standard deviation, with the steps in words."""
    steps = {
        "shortest": "resize the shorter side to `size`, crop the centre",
        "longest": "resize the longer side to `size`, lay it in the centre of a black square",
        "squash": "resize to a square of `size`, whatever the aspect ratio",
    }
    return {
        "size": image.size,
        "resize_mode": image.resize_mode,
        "interpolation": image.interpolation,
        "mean": list(image.mean),
        "std": list(image.std),
        "steps": ["RGB", steps[image.resize_mode], "divide by 255", "subtract mean, divide by std", "channels first"],
    }


_RESIZE = {
    # sides are cut to whole pixels and the crop begins at the rounded middle, as torchvision does
    "shortest": """\
    w, h = (n, int(n * h / w)) if w <= h else (int(n * w / h), n)
    box = (x := round((w - n) / 2), y := round((h - n) / 2), x + n, y + n)
    picture = picture.resize((w, h), method).crop(box)
""",
    "longest": """\
    w, h = max(1, round(w / (max(w, h) / n))), max(1, round(h / (max(w, h) / n)))
    box = (x := -((n - w) // 2), y := -((n - h) // 2), x + n, y + n)
    picture = picture.resize((w, h), method).crop(box)
""",
    "squash": """\
    picture = picture.resize((n, n), method)
""",
}

_RUN = {
    "onnx": (
        "onnxruntime",
        'session = onnxruntime.InferenceSession(here / f"{tower}.onnx")',
        "session.run(None, {session.get_inputs()[0].name: batch})[0]",
    ),
    "openvino": ("openvino", 'session = openvino.compile_model(here / f"{tower}.xml", "CPU")', "session(batch)[0]"),
}


def example(image: ImageSpec, runtime: str = "onnx") -> str:
    """The program example.py of an export for `runtime` ("onnx" or "openvino")."""
    package, loaded, called = _RUN[runtime]
    return f'''\
"""How well captions fit a picture:  python example.py PICTURE "a caption" "another caption" """
import json, pathlib, sys
import numpy as np, {package}
from PIL import Image, ImageOps
from tokenizers import Tokenizer

here = pathlib.Path(__file__).parent
transform = json.loads((here / "transform.json").read_text())

def pixels(path):
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    (w, h), n, method = picture.size, transform["size"], Image.Resampling[transform["interpolation"].upper()]
{_RESIZE[image.resize_mode]}\
    values = (np.asarray(picture, np.float32) / 255 - np.float32(transform["mean"])) / np.float32(transform["std"])
    return values.transpose(2, 0, 1)[None].copy()

def embed(tower, batch):
    {loaded}
    rows = {called}
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

captions = sys.argv[2:]
tokens = Tokenizer.from_file(str(here / "tokenizer.json")).encode_batch(captions)
fits = embed("image", pixels(sys.argv[1])) @ embed("text", np.array([t.ids for t in tokens], np.int64)).T
for caption, fit in zip(captions, fits[0]):
    print(f"{{fit:.6f}}  {{caption}}")
'''


def write_transform(folder: Path, image: ImageSpec, runtime: str = "onnx") -> None:
    """Write transform.json and example.py."""
    write_json(folder / FILE, transform_json(image))
    write_text(folder / EXAMPLE, example(image, runtime))
