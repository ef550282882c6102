"""ClipModel: an image tower and a text tower, with what is needed to feed them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.config import LARGEST_SCALE, as_dict
from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError
from clipdistill.models.architecture import text_tower
from clipdistill.models.text_length import needed_lengths, reads_only_text
from clipdistill.models.tokenizers import Tokenizer

_CHUNK = 1 << 24  # elements hashed at a time, so that a model on a GPU is never copied whole


@dataclass
class ClipModel:
    """A CLIP model with its own preprocessing.

    `module.encode_image` maps float images (B, 3, H, W), prepared as `image` says, to raw embeddings (B, embed_dim);
    `module.encode_text` maps the ids (B, context_length) of `tokenizer` to (B, embed_dim). Neither is normalised.
    `module.logit_scale` is a parameter holding the logarithm of the multiplier; `module.logit_bias` one or None.
    `architecture` is open_clip's configuration of the module (see models/architecture.py); for a module from outside
    {"module": its class, "student": the registered name that builds it or None} (models/own.py).
    """

    name: str
    module: Any  # an nn.Module; its towers are methods that nn.Module does not declare
    image: ImageSpec
    tokenizer: Tokenizer
    embed_dim: int
    context_length: int
    architecture: dict[str, Any]
    counts: dict[str, int] | None = None
    """Parameter counts of a model whose module does not tell (an export, a module from outside)."""
    _only_text: bool | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def reads_only_text(self) -> bool:
        """Whether padding changes no embedding (models/text_length.py); the text tower is asked once."""
        if self._only_text is None:
            self._only_text = reads_only_text(self.module, self.tokenizer)
        return self._only_text

    def shorten(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens (B, L), each batch cut to the longest caption of all, where the padding changes no embedding."""
        if not self.reads_only_text or not sum(map(len, tokens)):
            return tokens
        length = int(needed_lengths(torch.cat(tokens)).max())
        return tuple(part[:, :length] for part in tokens)

    def fingerprint(self) -> str:
        """sha256 (hex) over weights, architecture, image specification and tokenizer; the same on every device.

        Weights count with their names, shapes and number formats: a model rounded to fp16 is another model.
        """
        digest = hashlib.sha256()
        description = {
            "architecture": self.architecture,
            "image": as_dict(self.image),
            "tokenizer": self.tokenizer.to_dict(),
        }
        digest.update(json.dumps(description, sort_keys=True).encode())
        hash_tensors(self.module.state_dict(), digest)
        return digest.hexdigest()

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: image, text_transformer, text_total, total.

        "image" is the whole image tower with its projection. "text_transformer" is what the distillation papers quote:
        the transformer blocks alone, without token and position embeddings, final norm and projection (docs/models.md).
        "text_total" is the whole text tower. "total" adds the logit scale (and bias).
        """
        if self.counts is not None:
            return {key: self.counts.get(key, 0) for key in ("image", "text_transformer", "text_total", "total")}
        return count_parameters(self.module)


def require_usable(model: ClipModel) -> None:
    """Raise InputError unless all weights and running statistics are finite and the logit multiplier a usable one."""
    named = [*getattr(model.module, "named_parameters", list)()]
    named += [pair for pair in getattr(model.module, "named_buffers", list)() if "running_" in pair[0]]
    # one look at the device for all of them
    named = [(n, t.detach()) for n, t in named if t.is_floating_point() and n not in ("logit_scale", "logit_bias")]
    broken = torch.stack([~torch.isfinite(t).all() for _, t in named]).nonzero().tolist() if named else []
    if broken:
        raise InputError(
            f"'{model.name}': {len(broken)} of its {len(named)} tensors hold NaN or infinity (the first is "
            f"{named[broken[0][0]][0]}): the file is damaged, or the training that wrote it had failed"
        )
    scale = getattr(model.module, "logit_scale", None)
    if scale is not None:
        values = scale.detach().cpu().double().exp()
        if not bool(((values > 0) & (values <= LARGEST_SCALE)).all()):
            raise InputError(
                f"'{model.name}': its logit scale is {scale.detach().flatten().tolist()}, and it must be the logarithm "
                f"of a positive number up to {LARGEST_SCALE:g}: the file is damaged, or the training that wrote it "
                "had failed"
            )
    bias = getattr(model.module, "logit_bias", None)
    if bias is not None and not bool(torch.isfinite(bias.detach()).all()):
        raise InputError(f"'{model.name}': its logit bias is {bias.detach().flatten().tolist()}, not a number")


def count_parameters(module: nn.Module) -> dict[str, int]:
    """See ClipModel.parameter_counts; works on the meta device."""
    total = sum(p.numel() for p in module.parameters())
    image = sum(p.numel() for name, p in module.named_parameters() if name.startswith("visual."))
    scales = sum(p.numel() for name, p in module.named_parameters() if name in ("logit_scale", "logit_bias"))
    decoder = getattr(module, "text_decoder", None)
    extra = 0 if decoder is None else sum(p.numel() for p in decoder.parameters())
    return {
        "image": image,
        "text_transformer": sum(p.numel() for p in _text_blocks(module).parameters()),
        "text_total": total - image - scales - extra,
        "total": total,
    }


def _text_blocks(module: nn.Module) -> nn.Module:
    """The stack of transformer blocks of the text tower."""
    transformer: Any = text_tower(module).transformer
    if hasattr(transformer, "tower"):  # of a CLIP, in joined towers
        return _text_blocks(transformer.tower)
    if hasattr(transformer, "resblocks"):
        return transformer.resblocks
    encoder: Any = getattr(transformer, "encoder", transformer)  # a Hugging Face text tower
    encoder = getattr(encoder, "transformer", encoder)  # DistilBERT
    blocks = getattr(encoder, "layer", getattr(encoder, "block", encoder))
    return blocks


def hash_tensors(tensors: Mapping[str, torch.Tensor], digest: Any) -> None:
    """Feed names, number formats, shapes and contents of `tensors` to a hashlib object, in the order of their names."""
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            part = flat[start : start + _CHUNK].cpu().contiguous()
            digest.update(part.view(torch.uint8).numpy().tobytes())
