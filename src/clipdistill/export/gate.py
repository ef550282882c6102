"""The gate after every export: does the exported graph compute what the model computes?

Compared are embeddings of unit length, so that one tolerance fits models of any scale. Texts are short, long (cut at
the context length) and of mixed lengths in one batch, because a lost text mask shows only where rows are padded. A
graph that takes any length is compared without the padding too, and always with the model on the whole context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.exported import takes_any_length
from clipdistill.models.parameters import evaluation_mode
from clipdistill.models.tokenizers import WordsTokenizer

BATCHES = (1, 7)
COSINE = {"float16": 0.999, "int8": 0.99}
"""Kinds of weights, and the least cosine with the model, on the gate's inputs, that each must keep."""
_EIGHT_BITS = 0.01
"""What a cosine in eight bits may change by with the length: activations near a step fall to either side of it."""
Runner = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Tolerance:
    """difference: largest allowed difference of an entry of unit-length embeddings; cosine: least allowed cosine."""

    difference: float = 1e-4
    cosine: float = 0.99999


@dataclass(frozen=True)
class Parity:
    """One comparison: largest absolute difference of the raw outputs and of unit-length rows, and the least cosine."""

    tower: str
    case: str
    batch: int
    raw_difference: float
    difference: float
    cosine: float


def gate_inputs(model: ClipModel, seed: int = 0) -> dict[tuple[str, str, int], np.ndarray]:
    """(tower, case, batch) -> input: images of noise and of smooth colours; short, long and padded texts."""
    rng = np.random.default_rng(seed)
    size = model.image.size
    inputs: dict[tuple[str, str, int], np.ndarray] = {}
    for batch in BATCHES:
        noise = rng.standard_normal((batch, 3, size, size)).astype(np.float32)
        inputs["image", "noise", batch] = noise
        waves = np.sin(np.linspace(0, 9, size))[None, None, :, None] * np.cos(np.linspace(0, 7, size))
        inputs["image", "smooth", batch] = (waves + 0.5 * rng.standard_normal((batch, 3, 1, 1))).astype(np.float32)
        lengths = {
            "short": [2] * batch,
            "long": [2 * model.context_length] * batch,
            "padded": [int(n) for n in np.linspace(1, model.context_length - 2, batch + 2)[1:-1]],
        }
        for case, counts in lengths.items():
            texts = [" ".join(rng.choice(_words(model), size=n)) for n in counts]
            inputs["text", case, batch] = model.tokenizer(texts).numpy()
    return inputs


def _words(model: ClipModel) -> list[str]:
    if isinstance(model.tokenizer, WordsTokenizer):
        return list(model.tokenizer.words)
    return ["dog", "cat", "red", "house", "a", "runs", "on", "street", "blue", "sky", "child", "bicycle", "water"]


def compare(
    model: ClipModel, runners: Mapping[str, Runner], *, normalised: bool = False, seed: int = 0
) -> list[Parity]:
    """Run the gate's inputs through torch and through `runners` (tower -> function on arrays)."""
    module = model.module
    found = []
    with evaluation_mode(module):
        for (tower, case, batch), values in gate_inputs(model, seed).items():
            if tower not in runners:
                continue
            encode = module.encode_image if tower == "image" else module.encode_text
            with torch.inference_mode():
                device = next(module.parameters()).device
                expected = encode(torch.from_numpy(values).to(device)).float().cpu().numpy()
            if normalised:
                expected = _unit(expected)
            given = np.asarray(runners[tower](values), dtype=np.float32)
            if given.shape != expected.shape:
                raise InputError(f"the exported {tower} tower gives {given.shape} instead of {expected.shape}")
            found.append(_parity(tower, case, batch, expected, given))
            if tower == "text" and takes_any_length(runners[tower]):
                (cut,) = model.shorten(torch.from_numpy(values))
                if cut.shape[1] < values.shape[1]:
                    given = np.asarray(runners[tower](cut.numpy()), dtype=np.float32)
                    found.append(_parity(tower, f"{case}, cut to {cut.shape[1]}", batch, expected, given))
    return found


def _parity(tower: str, case: str, batch: int, expected: np.ndarray, given: np.ndarray) -> Parity:
    if not np.isfinite(given).all():
        return Parity(tower, case, batch, float("inf"), float("inf"), -1.0)
    a, b = _unit(expected.astype(np.float64)), _unit(given.astype(np.float64))
    cosine = float((a * b).sum(axis=1).min())
    return Parity(
        tower, case, batch, float(np.abs(expected - given).max()), float(np.abs(a - b).max()), min(cosine, 1.0)
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def require(parities: list[Parity], tolerance: Tolerance, what: str) -> None:
    """Raise InputError, one sentence, for the worst comparison when it misses the tolerance."""
    worst = max(parities, key=lambda p: p.difference)
    if not (worst.difference <= tolerance.difference and min(p.cosine for p in parities) >= tolerance.cosine):
        raise InputError(
            f"{what}: the exported {worst.tower} tower differs from the model by {worst.difference:.2g} (cosine "
            f"{worst.cosine:.6f}) on {worst.case} input at batch {worst.batch}, allowed is {tolerance.difference:.2g}"
        )


def require_cosine(parities: list[Parity], precision: str, what: str, advice: str) -> None:
    """Raise InputError, with what to do, for a graph in fewer bits whose worst cosine misses COSINE."""
    worst = min(parities, key=lambda parity: parity.cosine)
    if not worst.cosine >= COSINE[precision]:
        raise InputError(
            f"{what}: with {precision} weights the {worst.tower} tower differs from the model (cosine "
            f"{worst.cosine:.4f} on {worst.case} input, allowed is {COSINE[precision]}): {advice}"
        )


def require_same_at_any_length(parities: list[Parity], what: str) -> None:
    """Raise InputError when a text tower in eight bits is further from the model without the padding than with it."""
    whole = {(p.case, p.batch): p.cosine for p in parities}
    for p in parities:
        case, _, cut = p.case.partition(", cut to ")
        if cut and p.cosine < whole[case, p.batch] - _EIGHT_BITS:
            raise InputError(
                f"{what}: the int8 text tower gives other embeddings for captions cut to {cut} tokens (cosine with the "
                f"model {p.cosine:.4f}, with the padding {whole[case, p.batch]:.4f}): leave --int8 out"
            )


def summary(parities: list[Parity]) -> dict[str, Any]:
    """Per tower the worst of all comparisons, and each of them, as JSON."""
    result: dict[str, Any] = {}
    for tower in dict.fromkeys(p.tower for p in parities):
        own = [p for p in parities if p.tower == tower]
        result[tower] = {
            "difference": max(p.difference for p in own),
            "raw_difference": max(p.raw_difference for p in own),
            "cosine": min(p.cosine for p in own),
            "cases": [{k: v for k, v in asdict(p).items() if k != "tower"} for p in own],
        }
    return result
