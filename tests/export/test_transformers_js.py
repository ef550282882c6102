"""The folder of `--to hf` in transformers.js itself, under Node, and in sentence-transformers.

Needs `npm install @huggingface/transformers` in the repository, or CLIPDISTILL_NODE_MODULES naming such a node_modules.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdistill.data.views import EVALUATION_VIEW, render
from clipdistill.models import build_student
from clipdistill.models.tokenizers import ClipBpeTokenizer
from tests.conftest import REPOSITORY
from tests.export.conftest import tiny_architecture

for package in ("onnx", "onnxscript", "onnxruntime", "tokenizers", "transformers"):
    pytest.importorskip(package)

from clipdistill.export.foreign import export_foreign  # noqa: E402
from clipdistill.export.tokenizer_json import AWKWARD  # noqa: E402

CAPTIONS = ["a red square", "the picture is blue, isn't it?", "two dogs"]
PROGRAM = """
import { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, Tensor,
  env } from "@huggingface/transformers";
import { readFileSync, writeFileSync } from "node:fs";
env.allowRemoteModels = false;
env.localModelPath = "./";
const { captions, awkward, pixels, shape, picture } = JSON.parse(readFileSync("given.json", "utf8"));
const tokenizer = await AutoTokenizer.from_pretrained("model");
const processor = await AutoProcessor.from_pretrained("model");
const ids = (text) => Array.from(tokenizer(text, { truncation: true }).input_ids.data, Number);
const out = { ids: awkward.map(ids), dtypes: {} };
for (const dtype of ["fp32", "fp16", "q8"]) {
  const text = await CLIPTextModelWithProjection.from_pretrained("model", { dtype });
  const vision = await CLIPVisionModelWithProjection.from_pretrained("model", { dtype });
  const { text_embeds } = await text(tokenizer(captions, { padding: true, truncation: true }));
  const given = { pixel_values: new Tensor("float32", Float32Array.from(pixels), shape) };
  const read = await processor(await RawImage.read(picture));
  out.dtypes[dtype] = { text: text_embeds.tolist(), image: (await vision(given)).image_embeds.tolist(),
    read: (await vision(read)).image_embeds.tolist() };
}
import { pipeline } from "@huggingface/transformers";
for (const dtype of ["fp32", "fp16", "q8"]) {
  const classify = await pipeline("zero-shot-image-classification", "model", { dtype });
  out.dtypes[dtype].labels = await classify(picture, captions, { hypothesis_template: "{}" });
  out.dtypes[dtype].one = await classify(picture, captions.slice(0, 1), { hypothesis_template: "{}" });
}
writeFileSync("found.json", JSON.stringify(out));
"""


def node_modules() -> Path:
    folder = Path(os.environ.get("CLIPDISTILL_NODE_MODULES", REPOSITORY / "node_modules"))
    if shutil.which("node") is None or not (folder / "@huggingface" / "transformers").is_dir():
        pytest.skip("needs Node and  npm install @huggingface/transformers")
    return folder


def clip_student():
    architecture = tiny_architecture(quick_gelu=True)
    architecture["text_cfg"]["vocab_size"] = 49_408
    return build_student(architecture, seed=3, tokenizer=ClipBpeTokenizer(12))


def cosines(found, expected) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def waves(width: int, height: int) -> Image.Image:
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    return Image.fromarray((127 + 120 * np.sin(x / 9 + np.array([0, 1, 2])) * np.cos(y / 7)).astype(np.uint8))


@pytest.mark.slow
def test_both_towers_are_one_graph_too(tiny, tmp_path):
    import onnxruntime

    assert export_foreign(tiny, tmp_path / "model", "hf") == []
    module = tiny.module.eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captions = [*CAPTIONS[:2], "a"]
    with torch.inference_mode():
        image, text = module.encode_image(pixels), module.encode_text(tiny.tokenizer(captions))
        image, text = (torch.nn.functional.normalize(rows, dim=1) for rows in (image, text))
        expected = (module.logit_scale.exp() * image @ text.T).numpy()
    for suffix, least in (("", 1e-3), ("_fp16", 0.05), ("_quantized", 1.0)):
        session = onnxruntime.InferenceSession(str(tmp_path / "model" / "onnx" / f"model{suffix}.onnx"))
        given = {"pixel_values": pixels.numpy(), "input_ids": tiny.tokenizer(captions).numpy()}
        names = [output.name for output in session.get_outputs()]
        assert names == ["image_embeds", "text_embeds", "logits_per_image", "logits_per_text"]
        found = dict(zip(names, session.run(None, given), strict=True))
        np.testing.assert_allclose(found["logits_per_image"], expected, atol=least)
        np.testing.assert_allclose(found["logits_per_text"], found["logits_per_image"].T)
        np.testing.assert_allclose(np.linalg.norm(found["text_embeds"], axis=1), 1, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("words", [True, False], ids=["words", "clip-bpe"])
def test_transformers_js_loads_the_folder(words, tiny, tmp_path):
    modules = node_modules()
    model = tiny if words else clip_student()
    assert export_foreign(model, tmp_path / "model", "hf") == []
    (tmp_path / "node_modules").symlink_to(modules)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "main.js").write_text(PROGRAM)
    waves(90, 70).save(tmp_path / "waves.png")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # the names of CLIP's two tokens are others there
    awkward = [text for text in AWKWARD if text.strip() and "<start_of_text>" not in text]
    given = {"captions": CAPTIONS, "awkward": awkward, "pixels": pixels.flatten().tolist(), "shape": [2, 3, 32, 32]}
    (tmp_path / "given.json").write_text(json.dumps(given | {"picture": "waves.png"}))
    done = subprocess.run(["node", "main.js"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())

    lengths = model.tokenizer.lengths(awkward)
    for text, ids, row, length in zip(awkward, found["ids"], model.tokenizer(awkward).tolist(), lengths, strict=True):
        if length <= model.context_length:
            assert ids == row[:length], text
        else:  # it cuts the end token off (docs/deployment.md)
            assert ids[:-1] == row[:-1], text
    module = model.module.eval()
    with torch.inference_mode():
        image, text = module.encode_image(pixels), module.encode_text(model.tokenizer(CAPTIONS))
        read = module.encode_image(render(waves(90, 70), EVALUATION_VIEW, model.image)[None])
        scale = float(module.logit_scale.exp())
    for dtype, least in (("fp32", 0.99999), ("fp16", 0.9999), ("q8", 0.99)):
        embeddings = found["dtypes"][dtype]
        assert cosines(embeddings["text"], text) > least
        assert cosines(embeddings["image"], image) > least
        assert cosines(embeddings["read"], read) > 0.97  # it resizes by a filter of its own
        seen = torch.nn.functional.normalize(torch.tensor(embeddings["read"], dtype=torch.float64), dim=1)
        said = torch.nn.functional.normalize(text.double(), dim=1)
        wanted = dict(zip(CAPTIONS, (scale * seen @ said.T).softmax(1)[0].tolist(), strict=True))
        given = {row["label"]: row["score"] for row in embeddings["labels"]}  # both towers in one graph
        assert given == pytest.approx(wanted, abs=0.1 if dtype == "q8" else 0.01)
        assert embeddings["one"][0]["score"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [True, False], ids=["words", "clip-bpe"])
def test_sentence_transformers_loads_the_folder(words, tiny, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = tiny if words else clip_student()
    export_foreign(model, tmp_path / "model", "hf")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    pictures = [waves(90, 70), waves(40, 64)]
    module = model.module.eval()
    with torch.inference_mode():
        image = module.encode_image(torch.stack([render(p, EVALUATION_VIEW, model.image) for p in pictures]))
        text = module.encode_text(model.tokenizer(CAPTIONS))
    assert cosines(theirs.encode(CAPTIONS), text) > 0.99999
    assert cosines(theirs.encode(pictures), image) > 0.999
