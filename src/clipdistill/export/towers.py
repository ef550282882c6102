"""The two towers of a CLIP model as ONNX graphs: a copy made plain for the exporter, then torch's own exporter.

nn.MultiheadAttention stacks query, key and value in one weight and works with the sequence first; exported as it is,
every block carries a dozen reshapes and transposes that no runtime recognises as attention. In the copy each attention
is four linear layers and two products, which ONNX Runtime and OpenVINO fuse and quantise; the numbers are the same.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError, first_line, needing
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.known import TOWERS

INPUTS = {"image": "image", "text": "tokens"}
OUTPUTS = {"image": "image_embedding", "text": "text_embedding"}
"""Names of each tower's input and output."""

OPSET = 20
"""ONNX operator set: 20 has Gelu and LayerNormalization whole. From 23 on attention is one operator too."""

_FUSED_ATTENTION_OPSET = 23
_LARGEST_FILE = 1_800_000_000  # bytes; protobuf cannot hold 2 GB, so larger weights go into a file beside the graph


class PlainAttention(nn.Module):
    """The same function as a batch-first nn.MultiheadAttention in evaluation mode. `fused`: as one operator."""

    def __init__(self, source: nn.MultiheadAttention, fused: bool) -> None:
        super().__init__()
        width = source.embed_dim
        self.heads, self.head_width, self.fused = source.num_heads, width // source.num_heads, fused
        stacked, biases = source.in_proj_weight.detach(), source.in_proj_bias
        self.query, self.key, self.value = (nn.Linear(width, width, bias=biases is not None) for _ in range(3))
        for i, layer in enumerate((self.query, self.key, self.value)):
            layer.weight.data = stacked[i * width : (i + 1) * width].clone()
            if biases is not None:
                layer.bias.data = biases.detach()[i * width : (i + 1) * width].clone()
        self.out = copy.deepcopy(source.out_proj)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query (B, L, width), key and value (B, M, width); `attn_mask` (L, M) or (B x heads, L, M) is added."""
        q, k, v = (
            layer(x).view(-1, x.shape[1], self.heads, self.head_width).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(attn_mask, float("-inf"))
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.view(-1, self.heads, *attn_mask.shape[1:])
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        else:
            scores = (q * self.head_width**-0.5) @ k.transpose(-1, -2)
            mixed = (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(-1, query.shape[1], self.heads * self.head_width)), None


class Tower(nn.Module):
    """One encoder of a CLIP module as a module of its own; `normalised`: rows at length 1."""

    def __init__(self, module: Any, tower: str, normalised: bool = False) -> None:
        super().__init__()
        self.module, self.tower, self.normalised = module, tower, normalised

    def forward(self, values: Tensor) -> Tensor:
        """(B, 3, H, W) images or (B, L) tokens -> (B, D)."""
        encode = self.module.encode_image if self.tower == "image" else self.module.encode_text
        embedding: Tensor = encode(values)
        return nn.functional.normalize(embedding, dim=-1) if self.normalised else embedding


def plain_copy(module: nn.Module, *, fused_attention: bool = False) -> nn.Module:
    """A copy in float32 on the CPU in evaluation mode, its attention written out."""
    plain = copy.deepcopy(module).to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    for name, part in list(plain.named_modules()):
        if isinstance(part, nn.MultiheadAttention) and _replaceable(part):
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, PlainAttention(part, fused_attention))
    return plain


def _replaceable(attention: nn.MultiheadAttention) -> bool:
    return (
        attention.batch_first
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def example_inputs(model: ClipModel, tower: str) -> Tensor:
    """A batch of two: with one, the exporter would take the batch size for a constant."""
    if tower == "image":
        return torch.zeros(2, 3, model.image.size, model.image.size)
    return model.tokenizer(["a photo", "a picture of two"])


def free_axes(model: ClipModel, tower: str) -> list[dict[int, Any]]:
    """What may vary in a tower's input, the best first: the batch, and the length of captions where it may be cut."""
    batch = {0: torch.export.Dim("batch")}
    if tower == "image" or not model.reads_only_text:
        return [batch]
    return [{**batch, 1: torch.export.Dim("length", min=2, max=model.context_length)}, batch]


def write_onnx(
    model: ClipModel, folder: Path, *, towers: tuple[str, ...] = TOWERS, normalised: bool = False, opset: int = OPSET
) -> dict[str, Path]:
    """Write image.onnx and text.onnx of `model` into `folder`; the batch size is free, and the length of captions up to
    the context where the tower reads nothing behind their end. Returns tower -> file.

    Raises InputError, one sentence, when an operation of the model has no ONNX form.
    """
    for package in ("onnx", "onnxscript"):
        with needing(package, "export", "the export to ONNX"):
            __import__(package)
    plain = plain_copy(model.module, fused_attention=opset >= _FUSED_ATTENTION_OPSET)
    large = sum(p.numel() * 4 for p in plain.parameters()) > _LARGEST_FILE
    files = {}
    for tower in towers:
        files[tower] = folder / f"{tower}.onnx"
        for axes in (choices := free_axes(model, tower)):
            try:
                with quiet(), torch.no_grad():
                    program = torch.onnx.export(
                        Tower(plain, tower, normalised).eval(),
                        (example_inputs(model, tower),),
                        dynamo=True,
                        opset_version=opset,
                        dynamic_shapes=(axes,),
                        input_names=[INPUTS[tower]],
                        output_names=[OUTPUTS[tower]],
                        verbose=False,
                    )
                    assert program is not None
                    made = dict(program.model.graph.opset_imports).get("", opset)
                    if made != opset:
                        raise ValueError(f"operator set {opset} was asked for and {made} made: leave --opset out")
                    _without_traces(program)
                    program.save(files[tower], external_data=large)
                break
            except Exception as error:  # torch.export, onnxscript and the exporter raise many kinds
                if axes is choices[-1]:
                    reason = reason_of(error)
                    raise InputError(
                        f"the {tower} tower of {model.name} cannot be exported to ONNX: {reason}"
                    ) from error
    return files


def _without_traces(program: Any) -> None:
    """Drop what the exporter notes about source lines: longer than the graph, with paths of this machine."""
    for node in program.model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (
        *program.model.graph.inputs,
        *program.model.graph.outputs,
        *program.model.graph.initializers.values(),
    ):
        value.metadata_props.clear()
    program.model.metadata_props.clear()


def reason_of(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error, 300)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's progress and warnings, and without attention's fast path, which has no ONNX form."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
