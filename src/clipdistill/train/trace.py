"""Every value of one step of a distillation, for `clipdistill replay`: nothing here runs while a run trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.data.loader import Batch
from clipdistill.objective import Embeddings
from clipdistill.objective.term import MODALITIES
from clipdistill.train.setup import Setup, one_term
from clipdistill.train.step import (
    autocast,
    forward_backward,
    frozen_batch_statistics,
    inputs_of,
    joined,
    split_inputs,
    step_seed,
    student_embeddings,
)
from clipdistill.train.task import Traced


def trace(setup: Setup, step: int, batch: Batch, precision: str) -> Iterator[Traced]:
    """Samples, weights, embeddings, each term with its gradients, then the gradients of all parameters."""
    keys = batch.keys
    images, tokens = inputs_of(batch, setup.device)
    if images is not None:
        yield Traced("pixels", images, keys)
    towers = setup.bare_towers
    if setup.masking is not None:
        setup.masking.masks.draw(setup.config.train.seed, step)
    yield Traced("weights", _parameters(setup))
    teacher = None if setup.teacher is None else setup.teacher(batch)
    if teacher is not None:
        yield from _embeddings("teacher", (teacher.image, teacher.text), keys)
        yield Traced("teacher, logit scale", torch.as_tensor(teacher.logit_scale))
    watched = _Watched(towers.module)
    encoded = []
    with watched, torch.no_grad(), frozen_batch_statistics(towers):
        size = setup.config.train.micro_batch or max(len(keys), 1)
        for index, (part_images, part_tokens) in enumerate(split_inputs(images, tokens, size)):
            torch.manual_seed(step_seed(setup.config.train.seed, step, 0, index))
            with autocast(setup.device, precision):
                encoded.append(towers(part_images, part_tokens))
    yield from watched.found[:1]
    leaves = joined([part[:2] for part in encoded])
    _, _, scale, bias = encoded[0]
    yield from _embeddings("student", leaves, keys)
    yield Traced("student, logit scale", scale)
    if bias is not None:
        yield Traced("student, logit bias", bias)
    student = student_embeddings(*leaves, scale.detach(), bias)
    there = {tower: leaf for tower, leaf in zip(MODALITIES, leaves) if leaf is not None}
    for name, needed in setup.config.objective.modalities.items():
        if not {*needed} <= {*there}:
            continue
        output = one_term(setup, name)(student, teacher)
        yield Traced(f"term {name}", torch.as_tensor(output.terms[name]))
        found = torch.autograd.grad(output.total, list(there.values()), allow_unused=True)
        for tower, gradient in zip(there, found):
            if gradient is not None:
                yield Traced(f"term {name}, gradient at the {tower}s", gradient, keys)
    yield from _gradients(setup, images, tokens, teacher, step, precision)


def _gradients(
    setup: Setup, images: Any, tokens: Any, teacher: Embeddings | None, step: int, precision: str
) -> Iterator[Traced]:
    """The gradients of the parameters, as the training step makes them."""
    train, towers = setup.config.train, setup.bare_towers
    setup.optimiser.zero_grad(set_to_none=True)
    kept = {name: buffer.clone() for name, buffer in towers.named_buffers()}
    output = forward_backward(
        towers, setup.objective, images, tokens, teacher,
        micro_batch=train.micro_batch, precision=precision, seed=(train.seed, step, 0),
        attention=setup.attention,
    )  # fmt: skip
    for name, buffer in towers.named_buffers():
        buffer.copy_(kept[name])
    yield Traced("total", output.total)
    yield Traced("gradients", {name: p.grad for name, p in _parameters(setup).items() if p.grad is not None})
    setup.optimiser.zero_grad(set_to_none=True)


def _parameters(setup: Setup) -> dict[str, nn.Parameter]:
    return {name: p for module in (setup.bare_towers, setup.objective) for name, p in module.named_parameters()}


def _embeddings(who: str, rows: tuple[Any, Any], keys: list[str]) -> Iterator[Traced]:
    for modality, matrix in zip(MODALITIES, rows):
        if matrix is not None:
            yield Traced(f"{who}, {modality} embeddings", matrix.detach(), keys)


class _Watched:
    """While open, outputs of modules that turn finite input into something else are kept, the innermost first."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.found = module, list[Traced]()
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.module.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._look_at(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look_at(self, name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)]
            inputs = [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
            if all(t.isfinite().all() for t in inputs):
                wrong = next((t for t in outputs if not t.isfinite().all()), None)
                if wrong is not None:
                    what = f"student, output of {name} ({type(module).__name__})"
                    self.found.append(Traced(what, wrong.detach().clone()))

        return hook
