"""The evaluation transform as data (`transform.json`) and the example that shows how to use an export.

`example.py` needs the runtime (onnxruntime, openvino, ...), tokenizers, pillow and numpy, and nothing of ours; its
pixels equal those of `data.views.render` to the last bit but one. Its parts are in example.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipdistill.config import read_yaml
from clipdistill.data.views import ImageSpec
from clipdistill.runtime.files import write_json, write_text

FILE, EXAMPLE = "transform.json", "example.py"
_PARTS = Path(__file__).with_name("example.yaml")


def transform_json(image: ImageSpec) -> dict[str, Any]:
    """Size, resize rule, mean and standard deviation, with the steps in words."""
    step = read_yaml(_PARTS)["steps"][image.resize_mode]
    return {
        "size": image.size,
        "resize_mode": image.resize_mode,
        "interpolation": image.interpolation,
        "mean": list(image.mean),
        "std": list(image.std),
        "steps": ["RGB", step, "divide by 255", "subtract mean, divide by std", "channels first"],
    }


def example(image: ImageSpec, runtime: str = "onnx") -> str:
    """The program example.py of an export for `runtime`."""
    parts = read_yaml(_PARTS)
    return parts["program"].format(resize=parts["resize"][image.resize_mode], **parts["runtimes"][runtime])


def write_transform(folder: Path, image: ImageSpec, runtime: str = "onnx") -> None:
    """Write transform.json and example.py."""
    write_json(folder / FILE, transform_json(image))
    write_text(folder / EXAMPLE, example(image, runtime))
