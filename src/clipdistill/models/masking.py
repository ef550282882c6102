"""Masked image input (CLIP-KD's masked feature distillation): the image tower sees a random part of the patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from clipdistill.errors import InputError


class KeepRandomTokens(nn.Module):
    """Keeps `int(L * (1 - mask_ratio))` randomly chosen patch tokens of each image, and all prefix (class) tokens.

    Input (B, prefix + L, width) with positions already added; output (B, prefix + kept, width), kept tokens in their
    order. Random numbers come from `generator`, or from torch's global generator on the CPU: the same tokens on every
    device.
    """

    def __init__(self, mask_ratio: float, prefix: int = 1, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.mask_ratio, self.prefix, self.generator = mask_ratio, prefix, generator

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        batch, length, width = tokens.shape
        patches = length - self.prefix
        # the added millionth undoes 100 * (1 - 0.9) = 9.99...98, which int() would cut to 9
        kept = max(1, int(patches * (1 - self.mask_ratio) + 1e-6))
        order = torch.rand(batch, patches, generator=self.generator).topk(kept, dim=1).indices.sort(dim=1).values
        index = (order + self.prefix).to(tokens.device).unsqueeze(-1).expand(-1, -1, width)
        return torch.cat([tokens[:, : self.prefix], tokens.gather(1, index)], dim=1)


@contextmanager
def masked_image_tokens(
    module: nn.Module, mask_ratio: float = 0.75, *, generator: torch.Generator | None = None
) -> Iterator[nn.Module]:
    """Inside the context, `module.encode_image` drops a random part of each image's patches, never the class token.

    The patches are dropped after the positional embedding, as in CLIP-KD (mask ratio 0.75: 49 of 196 kept), in training
    and in evaluation mode alike. A ratio of 0 changes nothing. Raises InputError for a ratio outside [0, 1) and for
    image towers without tokens (ResNets and other convolutional networks), for which dropping patches has no meaning.
    """
    if not 0 <= mask_ratio < 1:
        raise InputError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
    owner, attribute, prefix = _dropping_place(module)
    if mask_ratio == 0:
        yield module
        return
    usual = getattr(owner, attribute)
    setattr(owner, attribute, KeepRandomTokens(mask_ratio, prefix, generator))
    try:
        yield module
    finally:
        setattr(owner, attribute, usual)


def _dropping_place(module: nn.Module) -> tuple[nn.Module, str, int]:
    """Owner and name of the module that all tokens pass through, and the number of prefix tokens."""
    from open_clip.transformer import VisionTransformer

    visual = getattr(module, "visual", None)
    if isinstance(visual, VisionTransformer):
        return visual, "patch_dropout", 1
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

        if isinstance(trunk, TimmVisionTransformer):
            return trunk, "patch_drop", trunk.num_prefix_tokens
    kind = type(visual if trunk is None else trunk).__name__
    raise InputError(
        f"masked images need a vision transformer, and this image tower is a {kind}: use the term without a mask ratio"
    )
