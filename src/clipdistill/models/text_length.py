"""Text computed only where there is text: captions cut to the longest of their batch, where that changes nothing.

A tower with a causal mask that is read at its end token, or one whose attention leaves the padding out, gives the same
embedding whatever stands behind a caption's end, so those places need not be computed: a median caption of Flickr8k has
14 tokens, CLIP's context 77. A tower that reads its padding (SigLIP, CoCa's class token, pooling at the last place)
must get all of it. Which kind a tower is, is asked of the tower itself: does its embedding change when the tail is cut?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipdistill.models.blocks import looked_at, read
from clipdistill.models.derived import Derived, derives
from clipdistill.models.parameters import evaluation_mode

STEP = 8
"""Lengths are rounded up to multiples of this, so that compiled graphs and GPU kernels see few different ones."""
_PROBES = ("a", "two words", "a longer caption of several more words")
_TOLERANCE = 1e-4
"""Largest difference of an embedding, as a share of its length, that is rounding; padding makes far more."""


def needed_lengths(tokens: Tensor) -> Tensor:
    """(N,) for tokens (N, L): places of each row before its padding, rounded up to a multiple of STEP, at most L.

    Padding is whatever a row repeats at its end; one place of it is kept, since it may be the end token itself.
    """
    length = tokens.shape[1]
    places = torch.arange(1, length + 1, device=tokens.device)
    last = ((tokens != tokens[:, -1:]) * places).amax(1)
    return ((last + STEP) // STEP * STEP).clamp(max=length)


def by_length(tokens: Tensor, least: int = 32) -> list[Tensor]:
    """The rows of tokens (N, L) in groups of like length, the shortest first, each of at least `least` rows."""
    return _groups(needed_lengths(tokens).cpu(), least)


def _groups(lengths: Tensor, least: int) -> list[Tensor]:
    order = lengths.argsort(stable=True)
    ends = torch.bincount(lengths[order] // STEP).cumsum(0).tolist()
    groups, start = [], 0
    for end in ends:
        if end - start >= least and len(lengths) - end >= least:
            groups.append(order[start:end])
            start = end
    return [*groups, order[start:]]


def encode_by_length(encode: Callable[[Tensor], Tensor], tokens: Tensor, least: int) -> Tensor:
    """encode(tokens) (N, D) of tokens (N, L), computed in groups of like length, each cut to its longest caption.

    For towers that read only text. A batch has one caption of 30 places or 77 and many of 16.
    """
    lengths = needed_lengths(tokens).cpu()  # once: a GPU is waited for here and nowhere below
    groups = _groups(lengths, least)
    if len(groups) == 1:
        return encode(tokens[:, : int(lengths.max())])
    rows = torch.cat([encode(tokens[g.to(tokens.device), : int(lengths[g[-1]])]) for g in groups])
    return rows[torch.cat(groups).argsort().to(rows.device)]


def reads_only_text(module: Any, tokenizer: Any) -> bool:
    """Whether `module.encode_text` gives the same embedding without the padding behind a caption, asked by trying it.

    False as well for a tower that takes no other length, or whose captions leave no padding. An export knows it.
    """
    known = getattr(module, "reads_only_text", None)
    if isinstance(known, bool):
        return known
    parameter = next(iter(getattr(module, "parameters", list)()), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    if device.type == "meta":
        return False
    try:
        with evaluation_mode(module), torch.no_grad(), torch.autocast(device.type, enabled=False):
            tokens = tokenizer(list(_PROBES)).to(device)
            if int(needed_lengths(tokens).max()) >= tokens.shape[1]:
                return False
            whole = module.encode_text(tokens).cpu().double()
            lengths = needed_lengths(tokens).tolist()
            cut = torch.cat([module.encode_text(row[None, :n]) for row, n in zip(tokens, lengths)]).cpu().double()
    except Exception:  # towers of any origin: one that cannot take other lengths is left alone
        return False
    if whole.shape != cut.shape or not bool(torch.isfinite(whole).all()):
        return False
    scale = whole.norm(dim=-1)
    same = bool(((whole - cut).norm(dim=-1) <= _TOLERANCE * scale).all())
    # a tower that gives every caption the same embedding tells nothing
    return same and bool((whole[0] - whole[-1]).norm() > 100 * _TOLERANCE * scale[0])


@derives
def any_length(kind: Any) -> Any:
    """`kind`, an open_clip model or text tower, as a class that takes tokens (B, L) of any L up to its context.

    At the whole context it computes what `kind` does, up to rounding.
    """
    from open_clip import CLIP
    from open_clip.transformer import TextTransformer

    if issubclass(kind, TextTransformer):

        class AnyLengthText(kind, metaclass=Derived):  # type: ignore[misc]
            def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
                x, mask = super()._embeds(text)
                if mask is not None and mask.ndim == 2:
                    mask = mask[: x.shape[1], : x.shape[1]]
                return x, mask

            def forward(self, text: Tensor) -> Any:
                if self.output_tokens or self.cls_emb is not None:
                    return super().forward(text)
                x, mask = self._embeds(text)
                return _pooled(self, x, mask, text, self.pool_type, self.eos_id)

        return AnyLengthText
    if not issubclass(kind, CLIP):
        return kind

    class AnyLengthClip(kind, metaclass=Derived):  # type: ignore[misc]
        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            length, number_format = text.shape[1], self.transformer.get_cast_dtype()
            x = self.token_embedding(text).to(number_format) + self.positional_embedding[:length].to(number_format)
            mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
            x = _pooled(self, x, mask, text, self.text_pool_type, self.text_eos_id)
            return torch.nn.functional.normalize(x, dim=-1) if normalize else x

    return AnyLengthClip


def _pooled(tower: Any, x: Tensor, mask: Tensor | None, text: Tensor, pool_type: str, end: int | None) -> Tensor:
    """(B, D) of token embeddings x (B, L, width), read where open_clip reads captions `text` (B, L)."""
    from open_clip.transformer import text_global_pool

    numbers = torch.arange(text.shape[1], device=text.device).expand_as(text)
    places = text_global_pool(numbers, text, pool_type, eos_token_id=end)
    if places.ndim == 1 and not looked_at(tower.ln_final):
        x = tower.ln_final(read(tower.transformer, x, mask, places)).squeeze(1)
    else:  # all of them are wanted
        x = text_global_pool(tower.ln_final(tower.transformer(x, attn_mask=mask)), text, pool_type, eos_token_id=end)
    if tower.text_projection is None:
        return x
    return tower.text_projection(x) if isinstance(tower.text_projection, torch.nn.Linear) else x @ tower.text_projection
