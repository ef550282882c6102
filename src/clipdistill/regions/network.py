"""The meta-teacher's network: regions and tokens attend to each other, each side is pooled, the two are averaged.

With regions r (R x D) and tokens t (L x D) of one image (D the width of the CLIP embedding):
    t' = LN(t + MHA(t, r, r)),   r' = LN(r + MHA(r, t, t))            8 heads, weights of their own each way
    pool(x) = sum_l w_l x_l,     w = softmax_l(cos(x_l, mean_l x) / 2)
    g = 1/2 pool(t') + 1/2 pool(r')
Padding is masked everywhere: an image's embedding does not depend on what else is in its batch. The released code masks
nothing (`padding="released"`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.train.region_config import MetaTeacherConfig


class MetaTeacherNetwork(nn.Module):
    """Fuses region and token embeddings of a batch into one image embedding each; see the module and the settings."""

    def __init__(self, width: int, config: MetaTeacherConfig) -> None:
        super().__init__()
        if width % config.heads:
            divisors = [n for n in range(1, 65) if width % n == 0]
            raise InputError(
                f"meta_teacher.heads: {config.heads} heads do not divide the embedding width {width}; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        self.config = config
        self.image_to_text = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.norm_image = nn.LayerNorm(width)
        if config.image_side != "regions":
            self.text_to_image = nn.MultiheadAttention(width, config.heads, batch_first=True)
            self.norm_text = nn.LayerNorm(width)
        if config.image_side == "query":
            self.query = nn.Parameter(torch.randn(config.queries, width) * width**-0.5)

    def forward(
        self,
        regions: Tensor,
        region_mask: Tensor,
        areas: Tensor,
        confidences: Tensor,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Image embeddings (B, D), not normalised.

        regions (B, R, D), region_mask (B, R) true where there is a region, areas and confidences (B, R);
        tokens (B, L, D), token_mask (B, L): of the captions; not read in the caption-free forms.
        """
        config = self.config
        regions = regions * region_mask[..., None]  # padding is zero, whatever it held
        if config.caption_free:
            tokens, token_mask = None, None
        else:
            if tokens is None or token_mask is None:
                raise InputError("this region teacher needs the caption's tokens (image_side='caption')")
            tokens = tokens * token_mask[..., None]
        weights = None
        if config.weights != "none":
            weights = region_weights(regions, region_mask, areas, confidences, tokens, token_mask)
        if config.weights == "scale":
            assert weights is not None
            regions, weights = regions * weights[..., None], None
        if config.image_side == "query":
            tokens = self.query.expand(len(regions), -1, -1)
            token_mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if config.padding == "released":
            assert token_mask is not None
            region_mask, token_mask = torch.ones_like(region_mask), torch.ones_like(token_mask)
        if tokens is None or token_mask is None:
            image = self.norm_image(regions + attend(self.image_to_text, regions, regions, region_mask))
            return similarity_pool(image, region_mask, config.pool_temperature, weights)
        text = self.norm_text(tokens + attend(self.text_to_image, tokens, regions, region_mask))
        image = self.norm_image(regions + attend(self.image_to_text, regions, tokens, token_mask))
        pooled_text = similarity_pool(text, token_mask, config.pool_temperature)
        pooled_image = similarity_pool(image, region_mask, config.pool_temperature, weights)
        return 0.5 * pooled_text + 0.5 * pooled_image


def attend(attention: nn.MultiheadAttention, queries: Tensor, others: Tensor, mask: Tensor) -> Tensor:
    """Attention of queries (B, Q, D) over the true positions of others (B, K, D); zero where there are none."""
    some = mask.any(dim=1)
    # a softmax over nothing is not a number: such rows look at one (zero) position, and what they see is discarded
    open_mask = mask | (~some[:, None] & (torch.arange(mask.shape[1], device=mask.device) == 0))
    output, _ = attention(queries, others, others, key_padding_mask=~open_mask, need_weights=False)
    return torch.where(some[:, None, None], output, torch.zeros_like(output))


def similarity_pool(rows: Tensor, mask: Tensor, temperature: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """Weighted sum (B, D) of the true positions of rows (B, L, D): softmax of their cosine to their mean / temperature.

    weights (B, L), at least 0, multiply the softmax, which is normalised again. No position at all gives zero.
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    kept = rows * mask[..., None]
    mean = kept.sum(dim=1, keepdim=True) / count[..., None]
    similarity = F.cosine_similarity(rows, mean.expand_as(rows), dim=2) / temperature
    share = torch.where(mask, similarity, torch.full_like(similarity, -torch.inf))
    share = torch.where(mask.any(dim=1, keepdim=True), share, torch.zeros_like(share)).softmax(dim=1) * mask
    if weights is not None:
        share = share * weights
        share = share / share.sum(dim=1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    return (kept * share[..., None]).sum(dim=1)


def region_weights(
    regions: Tensor,
    region_mask: Tensor,
    areas: Tensor,
    confidences: Tensor,
    tokens: Tensor | None,
    token_mask: Tensor | None,
) -> Tensor:
    """Area x confidence x similarity to the best-fitting token, (B, R), summing to 1 over an image's regions.

    Negative similarities count as 0. Without tokens (caption-free) area x confidence. Where all are 0: equal shares.
    """
    weights = areas * confidences * region_mask
    if tokens is not None and token_mask is not None:
        cosines = F.normalize(regions, dim=-1) @ F.normalize(tokens, dim=-1).transpose(1, 2)
        cosines = torch.where(token_mask[:, None, :], cosines, torch.full_like(cosines, -1.0))
        weights = weights * cosines.amax(dim=2).clamp(min=0)
    total = weights.sum(dim=1, keepdim=True)
    equal = region_mask / region_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(weights.dtype).tiny), equal.to(weights.dtype))
