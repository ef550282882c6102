"""One training step's forward and backward pass, whole or in micro-batches that keep the whole batch's negatives.

Gradient caching (Gao et al. 2021, arXiv 2101.06983): contrastive and relational terms compare every pair of the batch,
so plain accumulation changes the objective. Here the micro-batches are encoded without a graph first, the objective
sees all embeddings at once, and each micro-batch is then encoded again with the gradient of its embeddings as the
weight. Gradients equal those of the whole batch up to rounding; the price is a second forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipdistill.data.loader import Batch
from clipdistill.models.text_length import encode_by_length
from clipdistill.objective import Embeddings, Objective, ObjectiveOutput

LEAST_GROUP = 16
"""Captions that are worth a pass of their own through the text tower."""


class Towers(nn.Module):
    """The student as one module whose forward gives everything the objective needs (so that DDP can wrap it)."""

    module: Any

    def __init__(
        self,
        module: Any,
        fixed_logit_scale: float | None = None,
        mask_ratio: float | None = None,
        masks: Any = None,
        group_captions: bool = False,
    ):
        super().__init__()
        self.module = module
        self.masks = masks
        self.fixed_logit_scale = fixed_logit_scale
        self.mask_ratio = mask_ratio
        self.group_captions = group_captions and masks is None  # gates are drawn once a pass
        self._compiled: tuple[int, Any, Any] | None = None
        if fixed_logit_scale is not None:
            module.logit_scale.requires_grad_(False)

    def compile_for(self, rows: int | None) -> None:
        """Compile the towers for passes of `rows` images and captions of any length; None: not at all.

        Passes of other sizes (bad samples, the last micro-batch) stay eager: what a batch is computed with must not
        depend on the batches before it.
        """
        if rows is None:
            self._compiled = None
        elif self._compiled is None or self._compiled[0] != rows:
            ways = (torch.compile(self.module.encode_image), torch.compile(self.module.encode_text))
            self._compiled = (rows, *ways)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Within, nothing compiled is used."""
        kept, self._compiled = self._compiled, None
        try:
            yield
        finally:
            self._compiled = kept

    def _encoders(self, images: Tensor | None, tokens: Tensor | None) -> tuple[Any, Any]:
        rows = {len(given) for given in (images, tokens) if given is not None}
        if self._compiled is None or not self.training or rows != {self._compiled[0]}:
            return self.module.encode_image, self.module.encode_text
        if tokens is not None:  # one graph for all lengths where the tower takes any, from the first batch on
            torch._dynamo.maybe_mark_dynamic(tokens, 1)
        return self._compiled[1:]

    def _encode_captions(self, encode_text: Any, captions: Tensor) -> Tensor:
        by_tokens = not captions.is_floating_point()  # and not by the features of a locked tower
        if self.group_captions and by_tokens and encode_text == self.module.encode_text:
            return encode_by_length(encode_text, captions, least=max(LEAST_GROUP, len(captions) // 8)).float()
        return encode_text(captions).float()

    def forward(self, images: Any, tokens: Any) -> tuple[Any, Any, Tensor, Tensor | None]:
        """images (B, 3, H, W), tokens (B, L) -> raw features (B, D), (B, D), the logit multiplier, the logit bias.

        tokens (B, C, L) of C captions an image give text features (B, C, D). None, for a modality that the step does
        not have, gives None.
        """
        hiding: AbstractContextManager[object] = nullcontext()
        if self.mask_ratio is not None and self.training:
            from clipdistill.models.masking import masked_image_tokens

            hiding = masked_image_tokens(self.module, self.mask_ratio)
        masks = nullcontext() if self.masks is None else self.masks.acting(sampled=self.training)
        captions = None if tokens is None else tokens.flatten(0, -2)
        encode_image, encode_text = self._encoders(images, captions)
        with hiding, masks:
            image = None if images is None else encode_image(images).float()
            text = None if captions is None else self._encode_captions(encode_text, captions)
        if text is not None and tokens.ndim == 3:
            text = text.reshape(*tokens.shape[:2], text.shape[-1])
        if self.fixed_logit_scale is not None:
            scale = self.module.logit_scale.new_tensor(self.fixed_logit_scale, dtype=torch.float32)
        else:
            scale = self.module.logit_scale.float().exp()
        bias = getattr(self.module, "logit_bias", None)
        return image, text, scale, bias


def inputs_of(batch: Batch, device: torch.device) -> tuple[Any, Any]:
    """What the student's towers take, on the device: pictures and `captions_of`; None for what the batch has not."""
    images, tokens = batch.student_images, captions_of(batch)
    return tuple(None if given is None else given.to(device, non_blocking=True) for given in (images, tokens))  # type: ignore[return-value]


def captions_of(batch: Batch) -> Tensor:
    """The student's tokens: (B, L), or (B, 2, L) when each image comes with a synthetic caption too."""
    if batch.synthetic_tokens is None:
        return batch.student_tokens
    return torch.stack([batch.student_tokens, batch.synthetic_tokens], 1)


def student_embeddings(image: Any, text: Any, scale: Tensor, bias: Tensor | None) -> Embeddings:
    """What the objective takes; text (B, D), or (B, 2, D) with a synthetic caption each; None for one that is not."""
    if text is None or text.ndim == 2:
        return Embeddings(image, text, scale, logit_bias=bias)
    return Embeddings(image, text[:, 0], scale, logit_bias=bias, synthetic_text=text[:, 1])


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast for the encoders in "bf16" or "fp16", or nothing in "fp32"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[precision])


def attention_by(way: str) -> AbstractContextManager[object]:
    """default: torch's choice of attention; math: plain products, whose backward pass is faster on some CPUs."""
    if way == "default":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def step_seed(seed: int, step: int, rank: int, part: int) -> int:
    """The seed of all randomness on the device in one part of one step, so that no generator state needs saving."""
    mixed = (seed * 1_000_003 + step) * 1_000_003 + rank
    return (mixed * 8191 + part) % (2**63 - 1)


def forward_backward(
    towers: nn.Module,
    objective: Objective,
    images: Any,
    tokens: Any,
    teacher: Embeddings | None,
    *,
    micro_batch: int | None,
    precision: str,
    seed: tuple[int, int, int],
    attention: str = "default",
    loss_scale: float | Tensor = 1.0,
) -> ObjectiveOutput:
    """Accumulate the gradients of one step's objective into the parameters.

    images (B, 3, H, W) and tokens (B, L) are this rank's rows, `teacher` its embeddings of the same rows; tokens
    (B, 2, L) are a real and a synthetic caption each; either may be None. `seed` is (run seed, step, rank). B may
    differ between ranks and may be 0. `attention` is that of `attention_by`. The gradients are those of the objective
    times `loss_scale`.
    """
    with attention_by(attention):
        some = tokens if images is None else images
        rows, device = len(some), some.device
        if micro_batch is None or micro_batch >= rows:
            torch.manual_seed(step_seed(*seed, 0))
            with autocast(device, precision):
                image, text, scale, bias = towers(images, tokens)
            output = objective(student_embeddings(image, text, scale, bias), teacher)
            ((output.total + _touch(scale, bias)) * loss_scale).backward()
            return output
        parts = split_inputs(images, tokens, micro_batch)
        leaves, scale_leaf, bias_leaf = _embed(towers, parts, precision, seed)
        output = objective(student_embeddings(*leaves, scale_leaf, bias_leaf), teacher)
        (output.total * loss_scale).backward()
        gradients = [None if leaf is None or leaf.grad is None else leaf.grad.split(micro_batch) for leaf in leaves]
        for index, (part_images, part_tokens) in enumerate(parts):
            last = index == len(parts) - 1
            torch.manual_seed(step_seed(*seed, index))
            with sum_over_microbatches(towers, enabled=not last):
                with autocast(device, precision):
                    image, text, scale, bias = towers(part_images, part_tokens)
                surrogate = _touch(scale, bias)
                for features, gradient in zip((image, text), gradients, strict=True):
                    if gradient is not None:
                        surrogate = surrogate + (features * gradient[index]).sum()
                if last:  # the scalars entered the objective once
                    for scalar, leaf in ((scale, scale_leaf), (bias, bias_leaf)):
                        if scalar is not None and leaf is not None and leaf.grad is not None and scalar.requires_grad:
                            surrogate = surrogate + (scalar * leaf.grad).sum()
                surrogate.backward()
        return output


def split_inputs(images: Any, tokens: Any, size: int) -> list[tuple[Any, Any]]:
    """Pictures and tokens in parts of `size` rows, the last smaller; None stays None."""
    parts = [None if given is None else given.split(size) for given in (images, tokens)]
    count = max(len(part) for part in parts if part is not None)
    return [tuple(None if part is None else part[n] for part in parts) for n in range(count)]  # type: ignore[misc]


def _embed(
    towers: nn.Module, parts: list[tuple[Any, Any]], precision: str, seed: tuple[int, int, int]
) -> tuple[tuple[Any, Any], Tensor, Tensor | None]:
    """The whole batch's embeddings as leaves, encoded part by part without a graph."""
    encoded = []
    with torch.no_grad(), frozen_batch_statistics(towers):
        for index, (part_images, part_tokens) in enumerate(parts):
            torch.manual_seed(step_seed(*seed, index))
            with autocast((part_tokens if part_images is None else part_images).device, precision):
                *both, scale, bias = towers(part_images, part_tokens)
            encoded.append(both)
    leaves = joined(encoded)
    bias_leaf = None if bias is None else bias.detach().clone().requires_grad_()
    return leaves, scale.detach().clone().requires_grad_(), bias_leaf


def joined(encoded: list[list[Any]]) -> tuple[Any, Any]:
    """Embeddings of both modalities, put together from parts, as leaves of a new graph."""
    image, text = (None if rows[0] is None else torch.cat(rows).requires_grad_() for rows in zip(*encoded))
    return image, text


def _touch(scale: Tensor, bias: Tensor | None) -> Tensor:
    """Zero that depends on the scalars: DDP needs a gradient for each parameter even when no term uses it."""
    zero = 0.0 * scale.sum()
    return zero if bias is None else zero + 0.0 * bias.sum()


@contextmanager
def sum_over_microbatches(towers: nn.Module, enabled: bool) -> Iterator[None]:
    """Keep DDP from averaging until the step's last micro-batch."""
    if enabled and isinstance(towers, DistributedDataParallel):
        with towers.no_sync():
            yield
    else:
        yield


@contextmanager
def frozen_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Batch-norm layers normalise with the batch but leave their running statistics alone (the pass is repeated)."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in layers]
    for m in layers:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, (momentum, seen) in zip(layers, kept, strict=True):
            m.momentum = momentum
            if seen is not None and m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(seen)


class Statistics:
    """The running statistics of batch-norm layers, which a forward pass changes although its step is skipped."""

    def __init__(self, module: nn.Module) -> None:
        layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._live = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
        self._counters = [m.num_batches_tracked for m in layers if m.num_batches_tracked is not None]
        self._kept = [b.clone() for b in self._live]
        self._kept_counters = [b.clone() for b in self._counters]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them as they are now."""
        for kept, live in ((self._kept, self._live), (self._kept_counters, self._counters)):
            if live:
                torch._foreach_copy_(kept, live)

    @torch.no_grad()
    def restore(self) -> None:
        """Make them what they were at the last `keep`."""
        for kept, live in ((self._kept, self._live), (self._kept_counters, self._counters)):
            if live:
                torch._foreach_copy_(live, kept)


def settle_buckets(towers: DistributedDataParallel, images: Tensor | None, tokens: Tensor | None) -> None:
    """One backward pass whose gradients are thrown away, before the first step.

    DDP sorts its buckets anew after the first backward pass that it sees, and the order in which numbers are summed
    over three or more ranks follows from that: without this, the first step after a resume would round differently
    from the same step of an uninterrupted run.
    """
    with frozen_batch_statistics(towers):
        *both, scale, bias = towers(images, tokens)
        (sum(0.0 * rows.sum() for rows in both if rows is not None) + _touch(scale, bias)).backward()
    towers.zero_grad(set_to_none=True)
