"""open_clip's transformer blocks with fewer passes over memory, and the last one only where it is read.

nn.MultiheadAttention copies query, key and value once more than its products need, and backward fills and adds three
tensors of their size: a tenth of a training step on a CPU. And what a tower that is read at one token (CLIP's class
token, a caption's end) computes of the others in its last block, behind that block's keys and values, nobody reads.
Both are left out here; values are the same up to rounding, parameters and their names open_clip's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from clipdistill.models.derived import Derived, derives


def mixed_values(
    query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None, heads: int, mask: Tensor | None
) -> Tensor:
    """(B, heads, Q, head width): values of `key` (B, K, W), mixed by each query (B, Q, W).

    `weight` (3 x heads x head width, W) and `bias` are stacked as in nn.MultiheadAttention; `mask` (Q, K) or
    (B x heads, Q, K) is added to the scores.
    """
    if key is query:
        parts = linear(query, weight, bias).chunk(3, dim=-1)
    else:
        inner = len(weight) // 3
        of_query, of_key = (None, None) if bias is None else (bias[:inner], bias[inner:])
        parts = linear(query, weight[:inner], of_query), *linear(key, weight[inner:], of_key).chunk(2, dim=-1)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, heads))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


class LeanAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention as open_clip's blocks ask it: batch first, no weights wanted, key and value the same."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """query (B, Q, W), key (B, K, W) -> (B, Q, W)."""
        mask = kwargs.get("attn_mask")
        asked = not args and kwargs.keys() <= {"need_weights", "attn_mask"} and kwargs.get("need_weights") is False
        if not asked or key is not value or query.ndim != 3 or (mask is not None and mask.dtype == torch.bool):
            return super().forward(query, key, value, *args, **kwargs)
        mixed = mixed_values(query, key, self.in_proj_weight, self.in_proj_bias, self.num_heads, mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def lean(module: nn.Module) -> None:
    """Let the open_clip towers of `module` compute their blocks so."""
    from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer

    for part in list(module.modules()):
        attention: Any = getattr(part, "attn", None)
        plain = type(part) is ResidualAttentionBlock and type(attention) is nn.MultiheadAttention
        if plain and attention.batch_first and attention.dropout == 0:
            attention.__class__ = LeanAttention
        if isinstance(part, VisionTransformer) or type(part) is Transformer:
            kind: Any = type(part)
            part.__class__ = _read_at_class_token(kind) if isinstance(part, VisionTransformer) else _reading(kind)


@derives
def _read_at_class_token(kind: Any) -> Any:
    class ReadAtClassToken(kind, metaclass=Derived):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            whole = self.output_tokens or self.attn_pool is not None or self.pool_type != "tok"
            if whole or looked_at(self.ln_post):
                return super().forward(x)
            pooled, _ = self._pool(read(self.transformer, self._embeds(x), None, None))
            return pooled if self.proj is None else pooled @ self.proj

    return ReadAtClassToken


def read(transformer: Any, x: Tensor, mask: Tensor | None, places: Tensor | None) -> Tensor:
    """(B, 1, width): what an open_clip transformer makes of x (B, L, width) at `places` (B,), None for the first ones.

    `mask` (L, L) is added to the scores. A transformer of another kind, and one that a hook looks at, computes all.
    """
    from open_clip.transformer import ResidualAttentionBlock

    last = transformer.resblocks[-1]
    known = getattr(transformer, "reads_places", False) and type(last) is ResidualAttentionBlock
    known = known and transformer.batch_first and (mask is None or mask.ndim == 2)
    if known and not looked_at(transformer, *last.modules()):
        return transformer(x, attn_mask=mask, at=_At(places))  # type: ignore[no-any-return]
    return _At(places).take(transformer(x, attn_mask=mask))


def looked_at(*modules: nn.Module) -> bool:
    """Whether one of `modules` has a hook, which must find all tokens."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for module in modules for kind in hooks)


@dataclass(frozen=True)
class _At:
    """One place of each row: `places` (B,), None for the first ones."""

    places: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, 1, width)."""
        if self.places is None:
            return x[:, :1]
        return x[torch.arange(x.shape[0], device=x.device), self.places][:, None]

    def mask_of(self, mask: Tensor, heads: int) -> Tensor:
        """(L, L) -> (1, L), or (B x heads, 1, L)."""
        return mask[:1] if self.places is None else mask[self.places][:, None].repeat_interleave(heads, 0)


@derives
def _reading(kind: Any) -> Any:
    class ReadingTransformer(kind, metaclass=Derived):  # type: ignore[misc]
        reads_places = True

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, at: _At | None = None) -> Tensor:
            """(B, L, width) -> the same, or (B, 1, width) at those places."""
            if at is None:
                return super().forward(x, attn_mask=attn_mask)  # type: ignore[no-any-return]
            *blocks, last = self.resblocks

            def through(block: Callable[..., Tensor], *given: Tensor | None) -> Tensor:
                if self.grad_checkpointing:
                    return checkpoint(block, *given, use_reentrant=False)  # type: ignore[no-any-return]
                return block(*given)

            def of_the_last(x: Tensor, mask: Tensor | None) -> Tensor:
                normed = last.ln_1(x)
                mixed = last.attention(q_x=at.take(normed), k_x=normed, v_x=normed, attn_mask=mask)
                x = at.take(x) + last.ls_1(mixed)
                return x + last.ls_2(last.mlp(last.ln_2(x)))  # type: ignore[no-any-return]

            for block in blocks:
                x = through(block, x, None, None, attn_mask)
            if attn_mask is not None:
                attn_mask = at.mask_of(attn_mask, getattr(last.attn, "num_heads", None) or last.attn.heads)
            return through(of_the_last, x, attn_mask)

    return ReadingTransformer


def as_open_clip(module: nn.Module) -> nn.Module:
    """`module` itself, its blocks computed by open_clip's and torch's own code again: what ours is compared with."""
    from open_clip.transformer import Transformer, VisionTransformer

    for part in module.modules():
        for own in (nn.MultiheadAttention, Transformer, VisionTransformer):
            if isinstance(part, own) and type(part).__module__ == __name__:
                part.__class__ = own
    return module
