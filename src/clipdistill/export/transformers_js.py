"""The towers as onnx/text_model*.onnx and onnx/vision_model*.onnx, where transformers.js looks for them, and both as
one graph, onnx/model*.onnx, which its pipeline "zero-shot-image-classification" runs.

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
BOTH = "model"
_LARGEST = 2_000_000_000  # bytes of one file


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
    scale = float(model.module.logit_scale.detach().exp())
    for suffix in ("", *_SUFFIXES.values()):
        sources = [folder / FOLDER / f"{name}{suffix}.onnx" for name, _, _ in NAMES.values()]
        target = folder / FOLDER / f"{BOTH}{suffix}.onnx"
        if all(path.is_file() for path in sources):
            if sum(path.stat().st_size for path in sources) > _LARGEST:
                notes.append(f"{target.name} is left out: both towers in one file have more than 2 GB")
                continue
            join_towers(sources[0], sources[1], target, scale)
            _require_joined(model, target, scale, Tolerance() if not suffix else None)
    return notes


def join_towers(image: Path, text: Path, target: Path, scale: float) -> None:
    """Write one graph of both: `pixel_values` (I, ...) and `input_ids` (T, L) to embeddings of length 1 and to logits.

    `logits_per_image` (I, T) is `scale` times the cosines, `logits_per_text` its transpose.
    """
    import onnx
    from onnx import TensorProto, compose, helper, numpy_helper

    merged: Any = None
    outputs, rows = [], {"image": "images", "text": "texts"}
    for tower, path in (("image", image), ("text", text)):
        _, given, result = NAMES[tower]
        one = onnx.load(str(path))
        del one.graph.value_info[:]
        one = compose.add_prefix(one, f"{tower}.")
        graph = one.graph
        for node in graph.node:  # the input keeps its name, the output is the embedding before it gets length 1
            for i, used in enumerate(node.input):
                if used == f"{tower}.{given}":
                    node.input[i] = given
        graph.input[0].name = given
        for value in (graph.input[0], graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_param = rows[tower]
        graph.initializer.append(numpy_helper.from_array(np.array([1], dtype=np.int64), f"{tower}.axis"))
        raw = f"{tower}.{result}"
        graph.node.extend(
            [
                helper.make_node("ReduceL2", [raw, f"{tower}.axis"], [f"{tower}.length"], keepdims=1),
                helper.make_node("Div", [raw, f"{tower}.length"], [result]),
            ]
        )
        outputs.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, [rows[tower], None]))
        if merged is None:
            merged = one
            continue
        merged.graph.node.extend(graph.node)
        merged.graph.initializer.extend(graph.initializer)
        merged.graph.input.extend(graph.input)
        merged.functions.extend(one.functions)
    graph = merged.graph
    graph.initializer.append(numpy_helper.from_array(np.array(scale, dtype=np.float32), "logit_scale"))
    (_, _, images), (_, _, texts) = NAMES["image"], NAMES["text"]
    graph.node.extend(
        [
            helper.make_node("Transpose", [texts], ["texts.turned"], perm=[1, 0]),
            helper.make_node("MatMul", [images, "texts.turned"], ["cosines"]),
            helper.make_node("Mul", ["cosines", "logit_scale"], ["logits_per_image"]),
            helper.make_node("Transpose", ["logits_per_image"], ["logits_per_text"], perm=[1, 0]),
        ]
    )
    outputs.append(helper.make_tensor_value_info("logits_per_image", TensorProto.FLOAT, ["images", "texts"]))
    outputs.append(helper.make_tensor_value_info("logits_per_text", TensorProto.FLOAT, ["texts", "images"]))
    del graph.output[:]
    graph.output.extend(outputs)
    onnx.save(merged, str(target))


def _require_joined(model: ClipModel, path: Path, scale: float, tolerance: Tolerance | None) -> None:
    """Compare both embeddings and the logits of a joined graph; without a tolerance its towers were compared before."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    pixels = np.zeros((1, 3, model.image.size, model.image.size), dtype=np.float32)
    tokens = model.tokenizer(["a photo"]).numpy()
    (_, picture, images), (_, caption, texts) = NAMES["image"], NAMES["text"]

    def image(values: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([images], {picture: values, caption: tokens})[0])

    def text(values: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([texts], {picture: pixels, caption: values})[0])

    if tolerance is not None:
        require(compare(model, {"image": image, "text": text}, normalised=True), tolerance, path.name)
    a, b, logits = session.run([images, texts, "logits_per_image"], {picture: pixels, caption: tokens})
    if not np.allclose(logits, scale * a @ b.T, rtol=1e-3, atol=1e-3):
        raise InputError(f"{path.name}: its logits are not the cosines of its embeddings: leave this export out")


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
