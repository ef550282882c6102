"""Learnable prompts of an image transformer: tokens beside its patches that train while its weights are locked.

Before each of the first `depth` blocks stand `count` tokens of that block's own behind the patches; those that the
block before made of its own are taken away. The later blocks go on with the last ones, and behind the last block they
are gone: pooling never sees them (VPT-deep, arXiv 2203.12119; PromptKD, arXiv 2403.02781). An architecture says so:

    {"image_prompts": {"count": 4, "depth": 9}, ...}
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipdistill.errors import InputError
from clipdistill.models.derived import Derived, derives
from clipdistill.models.known import IMAGE_PROMPTS

TOKENS = "prompt_tokens"
_DEFAULT = 4
_LIMITS = {"count": 1024, "depth": 256}


def check_prompts(values: Any, where: str) -> None:
    """Raise InputError unless `values` is a valid entry `image_prompts` of an architecture."""
    if not isinstance(values, dict) or set(values) != set(_LIMITS):
        raise InputError(f"{where}: '{IMAGE_PROMPTS}' must be a mapping with count and depth, got {values!r:.200}")
    for key, limit in _LIMITS.items():
        if not isinstance(values[key], int) or isinstance(values[key], bool) or not 1 <= values[key] <= limit:
            raise InputError(
                f"{where}: {IMAGE_PROMPTS}: '{key}' must be a number from 1 to {limit}, got {values[key]!r:.200}"
            )


def put_prompts(visual: Any, values: Mapping[str, int]) -> None:
    """Give an open_clip vision transformer its prompts, from the global generator. Raises InputError for another."""
    if not _takes(visual):
        raise InputError(f"'{IMAGE_PROMPTS}': the image tower is no vision transformer of open_clip")
    transformer = visual.transformer
    kind: Any = type(transformer)
    transformer.__class__ = _prompted(kind)
    tokens = torch.empty(min(values["depth"], transformer.layers), values["count"], transformer.width)
    transformer.register_parameter(TOKENS, nn.Parameter(nn.init.normal_(tokens, std=0.02)))


@derives
def _prompted(kind: Any) -> Any:
    class Prompted(kind, metaclass=Derived):  # type: ignore[misc]
        """The transformer with prompts."""

        reads_places = False  # models/blocks.py

        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            """(B, L, width) -> (B, L, width)."""
            length, tokens = x.shape[1], self.prompt_tokens.to(x.dtype)
            for layer, block in enumerate(self.resblocks):
                if layer < len(tokens):
                    x = torch.cat([x[:, :length], tokens[layer].expand(x.shape[0], -1, -1)], dim=1)
                if self.grad_checkpointing and self.training:
                    x = checkpoint(block, x, None, None, attn_mask, use_reentrant=False)
                else:
                    x = block(x, attn_mask=attn_mask)
            return x[:, :length]

    return Prompted


def with_prompts(model: Any, count: int | Literal["auto"], depth: int, *, seed: int) -> Any:
    """The ClipModel with prompts in its image tower, their starting values drawn under `seed`; one that has some keeps
    them.

    count: 0 for none; "auto": 4 where the tower is a transformer of open_clip, or of a CLIP in joined towers, else
    none. Raises InputError for a number and a tower without tokens.
    """
    architecture = copy.deepcopy(model.architecture)
    places = list(_towers(architecture, getattr(model.module, "visual", None)))
    if count == 0 or any(IMAGE_PROMPTS in inner for inner, _ in places) or (count == "auto" and not places):
        return model
    if not places:
        raise InputError(
            f"train.image_prompts={count}: the image tower of {model.name} has no tokens: leave it out, and the map "
            "behind the tower learns alone"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inner, visual in places:
            inner[IMAGE_PROMPTS] = {"count": _DEFAULT if count == "auto" else count, "depth": depth}
            put_prompts(visual, inner[IMAGE_PROMPTS])
    model.architecture = architecture
    return model


def unlock_prompts(module: nn.Module) -> None:
    """Let the prompts train, whatever is locked around them."""
    for name, parameter in module.named_parameters():
        if name.endswith(TOKENS):
            parameter.requires_grad_(True)


def _towers(architecture: dict[str, Any], visual: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """(architecture, image tower) of each CLIP in the model whose tower can have prompts."""
    if "towers" in architecture:
        for trunk, tower in zip(architecture["towers"]["image"]["trunks"], visual.trunks, strict=True):
            if "clip" in trunk:
                yield from _towers(trunk["clip"], tower)
    elif "vision_cfg" in architecture and _takes(visual):
        yield architecture, visual


def _takes(visual: Any) -> bool:
    from open_clip.transformer import VisionTransformer

    return isinstance(visual, VisionTransformer) and visual.transformer.batch_first
