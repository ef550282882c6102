"""`onnx:DIR` as a teacher that fills a store: exported towers run by onnxruntime behind the face of a ClipModel.

The folder holds image.onnx (float32 (B, 3, H, W) -> (B, D)), text.onnx (int64 (B, L) -> (B, D)) and model.json with
`image` (ImageSpec), `tokenizer` (Tokenizer.to_dict) and `logit_scale` (the multiplier). Whoever has such graphs of a
model from another framework can distil from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.config import build
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError, MissingExtraError
from clipdistill.models import ClipModel, load_model
from clipdistill.models.tokenizers import tokenizer_from_dict

PREFIX = "onnx:"
GRAPHS = ("image.onnx", "text.onnx")
DESCRIPTION = "model.json"


def load_fill_teacher(name: str) -> ClipModel:
    """The teacher called `name`: `onnx:DIR`, or any model that `load_model` knows."""
    return (
        read_onnx(Path(name.removeprefix(PREFIX)), name) if name.startswith(PREFIX) else load_model(name, teacher=True)
    )


def read_onnx(folder: Path, name: str) -> ClipModel:
    """The exported towers in `folder`. Raises InputError for missing or unusable files."""
    for file in (*GRAPHS, DESCRIPTION):
        if not (folder / file).is_file():
            raise InputError(
                f"{folder / file}: no such file; an ONNX teacher is a folder of {', '.join(GRAPHS)}, {DESCRIPTION}"
            )
    try:
        values: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        spec = build(ImageSpec, values["image"], f"{folder / DESCRIPTION}: image")
        tokenizer = tokenizer_from_dict(values["tokenizer"])
        logit_scale = float(values.get("logit_scale", 100.0))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / DESCRIPTION}: not a description of exported towers ({error!r})") from error
    module = OnnxTowers(folder, logit_scale)
    probe = module.encode_text(tokenizer(["a photo"]))
    return ClipModel(name, module, spec, tokenizer, probe.shape[1], tokenizer.context_length, {})


class OnnxTowers(nn.Module):
    """Two onnxruntime sessions called like a CLIP module. `weights_sha256` stands for its weights in fingerprints."""

    def __init__(self, folder: Path, logit_scale: float) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "export", f"the teacher 'onnx:{folder}'") from error
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)), requires_grad=False)
        digest = hashlib.sha256()
        self._sessions = []
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        for file in GRAPHS:
            path = folder / file
            for part in sorted(p for p in folder.iterdir() if p.name == file or p.name.startswith(f"{file}.")):
                with part.open("rb") as content:  # large graphs keep their weights in a file beside them
                    digest.update(hashlib.file_digest(content, "sha256").digest())
            try:
                session = onnxruntime.InferenceSession(
                    str(path), options, providers=onnxruntime.get_available_providers()
                )
            except Exception as error:  # onnxruntime's own exception types share no base class
                raise InputError(f"{path}: onnxruntime cannot load it ({str(error).splitlines()[0][:200]})") from error
            self._sessions.append(session)
        self.weights_sha256 = digest.hexdigest()

    def _run(self, graph: int, values: Tensor) -> Tensor:
        session = self._sessions[graph]
        given = session.get_inputs()[0]
        array = values.detach().cpu().numpy()
        if given.type == "tensor(int32)":
            array = array.astype("int32")
        elif given.type == "tensor(float16)":
            array = array.astype("float16")
        output = session.run(None, {given.name: array})[0]
        return torch.from_numpy(output).to(values.device)

    def encode_image(self, images: Tensor) -> Tensor:
        """float32 (B, 3, H, W) -> (B, D), not normalised."""
        return self._run(0, images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) -> (B, D), not normalised."""
        return self._run(1, tokens)
