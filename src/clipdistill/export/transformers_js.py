"""The towers as onnx/text_model*.onnx and onnx/vision_model*.onnx, where transformers.js looks for them.

transformers.js names the kinds of weights by what follows the name: nothing for float32, `_fp16`, and `_quantized`,
which it takes in browsers. All are computed in float32, as in an export for browsers (web/weights.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.errors import InputError
from clipdistill.export.gate import COSINE, Tolerance, compare, require
from clipdistill.export.towers import write_onnx
from clipdistill.export.web.weights import light_tower
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.exported import load_graph

FOLDER = "onnx"
NAMES = {"image": ("vision_model", "pixel_values", "image_embeds"), "text": ("text_model", "input_ids", "text_embeds")}
"""tower -> the file, its input and its output, as transformers.js calls them."""
_SUFFIXES = {"float16": "_fp16", "int8": "_quantized"}


def write_transformers_js(model: ClipModel, folder: Path) -> list[str]:
    """Write the graphs of `model` into `folder`/onnx, each compared with the model; returns what was left out and why.

    Needs the extra `export`. Raises InputError where a tower has no ONNX form or a graph differs.
    """
    (folder / FOLDER).mkdir()
    notes = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as temporary:
        for tower, source in write_onnx(model, Path(temporary)).items():
            name, given, result = NAMES[tower]
            path = folder / FOLDER / f"{name}.onnx"
            if list(source.parent.glob(f"{source.name}.*")):
                raise InputError(f"the {tower} tower has more than 2 GB, which transformers.js does not load")
            padding = None if tower == "image" else (model.context_length, int(model.tokenizer(["a"])[0, -1]))
            _rename(source, path, given, result, padding)
            require(compare(model, {tower: load_graph(path, "onnx")}), Tolerance(), str(path.name))
            for precision, suffix in _SUFFIXES.items():
                light = path.with_name(f"{name}{suffix}.onnx")
                cosine = min(parity.cosine for parity in light_tower(model, tower, path, light, precision))
                if cosine < COSINE[precision]:
                    light.unlink()
                    notes.append(
                        f"{light.name} is left out: its embeddings differ from the model's (cosine {cosine:.4f})"
                    )
    return notes


def _rename(source: Path, target: Path, given: str, result: str, padding: tuple[int, int] | None) -> None:
    """The graph with its only input and output under other names.

    padding: (context, id) with which a text graph of one length fills shorter rows by itself: transformers.js pads no
    further than the longest caption of a batch.
    """
    import onnx

    model = onnx.load(str(source))
    graph = model.graph
    for value, name in ((graph.input[0], given), (graph.output[0], result)):
        old = value.name
        value.name = name
        for node in graph.node:
            for names in (node.input, node.output):
                for i, used in enumerate(names):
                    if used == old:
                        names[i] = name
    length = graph.input[0].type.tensor_type.shape.dim[1]
    if padding is not None and length.HasField("dim_value"):
        _fill_rows(graph, given, *padding)
        length.dim_param = "length"
    onnx.save(model, str(target))


def _fill_rows(graph: Any, given: str, context: int, filling: int) -> None:
    """Let `graph` take rows of up to `context` ids under the name `given`, filled on the right with `filling`."""
    from onnx import helper, numpy_helper

    whole = f"{given}.whole"
    for node in graph.node:
        for i, used in enumerate(node.input):
            if used == given:
                node.input[i] = whole
    constants = {"context": [context], "second": [1], "left": [0, 0, 0], "filling": filling}
    for name, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), f"{given}.{name}"))
    nodes = [
        helper.make_node("Shape", [given], [f"{given}.shape"]),
        helper.make_node("Gather", [f"{given}.shape", f"{given}.second"], [f"{given}.length"]),
        helper.make_node("Sub", [f"{given}.context", f"{given}.length"], [f"{given}.missing"]),
        helper.make_node("Concat", [f"{given}.left", f"{given}.missing"], [f"{given}.pads"], axis=0),
        helper.make_node("Pad", [given, f"{given}.pads", f"{given}.filling"], [whole]),
    ]
    nodes += list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
