"""The evaluation transform as data (`transform.json`) and the example that shows how to use an export.

`example.py` needs onnxruntime (or openvino), tokenizers, pillow and numpy, and nothing of ours; its pixels equal those
of `data.views.render` to the last bit but one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipdistill.data.views import ImageSpec

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
    (w, h), n = picture.size, transform["size"]
    w, h = (n, int(n * h / w)) if w <= h else (int(n * w / h), n)
    x, y = round((w - n) / 2), round((h - n) / 2)
    picture = picture.resize((w, h), method).crop((x, y, x + n, y + n))
""",
    "longest": """\
    (w, h), n = picture.size, transform["size"]
    w, h = max(1, round(w / (max(w, h) / n))), max(1, round(h / (max(picture.size) / n)))
    x, y = -((n - w) // 2), -((n - h) // 2)
    picture = picture.resize((w, h), method).crop((x, y, x + n, y + n))
""",
    "squash": """\
    picture = picture.resize((transform["size"], transform["size"]), method)
""",
}

_LOAD = {
    "onnx": (
        "import onnxruntime",
        'image, text = (onnxruntime.InferenceSession(here / f"{t}.onnx") for t in ("image", "text"))',
        "tower.run(None, {tower.get_inputs()[0].name: batch})[0]",
    ),
    "openvino": (
        "import openvino",
        'image, text = (openvino.compile_model(here / f"{t}.xml", "CPU") for t in ("image", "text"))',
        "tower(batch)[0]",
    ),
}


def example(image: ImageSpec, runtime: str = "onnx") -> str:
    """The program example.py of an export for `runtime` ("onnx" or "openvino")."""
    imported, loaded, called = _LOAD[runtime]
    return f'''\
"""How well captions fit a picture:  python example.py PICTURE "a caption" "another caption" """
import json, pathlib, sys
import numpy as np
{imported}
from PIL import Image, ImageOps
from tokenizers import Tokenizer

here = pathlib.Path(__file__).parent
transform, manifest = (json.loads((here / f"{{n}}.json").read_text()) for n in ("transform", "manifest"))
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
{loaded}

def pixels(path):
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    method = Image.Resampling[transform["interpolation"].upper()]
{_RESIZE[image.resize_mode]}\
    values = (np.asarray(picture, np.float32) / 255 - np.float32(transform["mean"])) / np.float32(transform["std"])
    return values.transpose(2, 0, 1)[None].copy()

def embed(tower, batch):
    rows = {called}
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

if __name__ == "__main__":
    tokens = np.array([e.ids for e in tokenizer.encode_batch(sys.argv[2:])], np.int64)
    for caption, fit in zip(sys.argv[2:], (embed(image, pixels(sys.argv[1])) @ embed(text, tokens).T)[0]):
        print(f"{{fit:.6f}}  {{caption}}")
'''


def write_transform(folder: Path, image: ImageSpec, runtime: str = "onnx") -> None:
    """Write transform.json and example.py."""
    from clipdistill.export.folder import write_json

    write_json(folder / FILE, transform_json(image))
    (folder / EXAMPLE).write_text(example(image, runtime), encoding="utf-8")
