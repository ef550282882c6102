"""What a model costs whatever the clock says: floating-point operations, memory, bytes on disk.

FLOPs: torch's own counter, one multiply-add counted as two operations (papers that quote MACs quote half of this).
Fused attention fast paths hide their work from the counter, so they are switched off while counting.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.bench.backends import tensor_bytes
from clipdistill.data.pairs import PairSource
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.known import architecture_fingerprint
from clipdistill.models.parameters import evaluation_mode


def describe_model(model: ClipModel) -> dict[str, Any]:
    """Fingerprints, parameters, FLOPs per image and per text, and bytes of the weights of one model."""
    return {
        "name": model.name,
        "fingerprint": model.fingerprint(),
        "architecture": architecture_fingerprint(model.architecture),
        "parameters": model.parameter_counts(),
        "flops": {tower: count_flops(model, tower) for tower in ("image", "text")},
        "size_bytes": getattr(model.module, "size_bytes", None) or tensor_bytes(model.module),
        "image_size": model.image.size,
        "context_length": model.context_length,
    }


def count_flops(model: ClipModel, tower: str) -> int:
    """FLOPs of one image or one text through a tower (a multiply-add is two). An export knows its own."""
    module = model.module
    if isinstance(known := getattr(module, "flops", None), dict):
        return int(known.get(tower, 0))
    device = next(module.parameters()).device
    dtype = next(module.parameters()).dtype
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    inputs = sample_inputs(model, tower, 1, device, dtype)
    try:
        evaluating, math = evaluation_mode(module), sdpa_kernel(SDPBackend.MATH)
        with evaluating, torch.no_grad(), math, FlopCounterMode(display=False) as counter:
            module.encode_image(inputs) if tower == "image" else module.encode_text(inputs)  # type: ignore[operator]
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def sample_inputs(model: ClipModel, tower: str, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A batch as a tower expects it: seeded noise images (B, 3, H, W), or tokens (B, L) of short captions.

    The tokens are those of the whole context, so the words do not matter for speed (`median_caption`: where they do).
    """
    if tower == "image":
        generator = torch.Generator().manual_seed(0)
        size = model.image.size
        return torch.randn(batch, 3, size, size, generator=generator).to(device=device, dtype=dtype)
    captions = [f"a photo of {i} cats on a red sofa" for i in range(batch)]
    return model.tokenizer(captions).to(device)


_MEDIAN = "two brown dogs are running across a field of tall dry grass"
"""14 tokens of CLIP's tokenizer, the median caption of Flickr8k."""
_CAPTIONS = 1000


def median_caption(model: ClipModel, batch: int, device: torch.device, source: PairSource | None) -> Tensor | None:
    """Tokens (B, L) cut to their text: the caption of median length of `source`'s first thousand pictures, B times.

    Without a source one as long as the median caption of Flickr8k; None for a tower that reads its padding.
    """
    if not model.reads_only_text:
        return None
    text = _MEDIAN
    if source is not None:
        captions = [caption for i in range(min(_CAPTIONS, len(source))) for caption in source.captions(i)]
        lengths = model.tokenizer.lengths(captions)
        text = captions[sorted(range(len(captions)), key=lengths.__getitem__)[len(captions) // 2]]
    return model.shorten(model.tokenizer([text] * batch))[0].to(device)


def peak_activation_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most tensor memory one call holds at once beyond what was there before it; None where nothing was seen.

    CUDA: the caching allocator's own count. CPU: the storages that torch operations create and release during the
    call (scratch memory inside an operation is not seen, nor is anything outside torch).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveStorages() as live:
        call()
    return live.peak or None


class _LiveStorages(TorchDispatchMode):
    """Follows the bytes of all storages made inside it (agrees with the profiler's memory events)."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):  # existed before the call, or is known already
                self._bytes.setdefault(tensor.untyped_storage()._cdata, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._bytes:
                    self._bytes[storage._cdata] = storage.nbytes()
                    self.current += storage.nbytes()
                    self.peak = max(self.peak, self.current)
                    weakref.finalize(storage, self._released, storage._cdata)
        return result

    def _released(self, storage: int) -> None:
        self.current -= self._bytes.pop(storage, 0)
