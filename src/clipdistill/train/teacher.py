"""The teacher during training: frozen, in evaluation mode, giving unit-length embeddings without a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from clipdistill.cache.names import is_cached
from clipdistill.data.loader import Batch, StoredTeacher
from clipdistill.data.pairs import PairSource
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError
from clipdistill.models import ClipModel, Tokenizer, load_model
from clipdistill.models.known import OWN_EMBEDDINGS
from clipdistill.objective import Embeddings
from clipdistill.registry import TEACHER_FOLDERS, WHOLE_SET, describe
from clipdistill.runs.folder import STUDENT
from clipdistill.runtime.distributed import agree, is_main
from clipdistill.runtime.files import digest_of
from clipdistill.train.config import RunConfig


class Teacher(Protocol):
    """Whatever can give the teacher's embeddings of a batch: live models, or a cache of them."""

    @property
    def name(self) -> str: ...

    @property
    def blocks(self) -> tuple[int, ...]:
        """Embedding width of each teacher."""
        ...

    @property
    def notes(self) -> list[str]:
        """What was found when it was opened, for the terminal."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with whatever the embeddings depend on: weights, regions, the content of a cache."""
        ...

    def __call__(self, batch: Batch) -> Embeddings: ...

    @property
    def model(self) -> ClipModel | None:
        """The model that batches are prepared for; None for stored embeddings."""
        ...

    @property
    def stored(self) -> StoredTeacher | None:
        """What the loader reads embeddings and views from; None for a live teacher."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...


class LiveTeacher:
    """One or more CLIP models run on every batch.

    Several teachers are concatenated in `blocks`, each keeping its own logit multiplier (term `reinforced`).
    `logit_scale` replaces the models' own multipliers (a number for all, or one each).
    """

    def __init__(
        self,
        models: Sequence[ClipModel],
        device: torch.device,
        precision: str,
        logit_scale: float | Sequence[float] | None = None,
    ) -> None:
        first = models[0]
        for other in models[1:]:
            if other.image != first.image or other.tokenizer.to_dict() != first.tokenizer.to_dict():
                raise InputError(
                    f"teachers '{first.name}' and '{other.name}' want different images or tokens; "
                    "live teachers must agree on both: use a cache, which stores each teacher's own view"
                )
        self.models = list(models)
        self.device = device
        for model in self.models:
            model.module.requires_grad_(False).eval().to(device)
        self.encoders = [Encoder(model, device=device, dtype=precision) for model in self.models]
        own = [float(m.module.logit_scale.detach().float().exp()) for m in self.models]
        if isinstance(logit_scale, (int, float)):
            own = [float(logit_scale)] * len(own)
        elif logit_scale is not None:
            own = [float(s) for s in logit_scale]
        self.scales = own

    @property
    def model(self) -> ClipModel:
        """What the loader prepares images and tokens for."""
        return self.models[0]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a teacher without a text tower."""
        return self.model.tokenizer if hasattr(self.model.module, "encode_text") else None

    @property
    def stored(self) -> None:
        """Nothing is stored: the loader prepares images and tokens for `model`."""
        return None

    @property
    def notes(self) -> list[str]:
        return []

    @property
    def name(self) -> str:
        return " + ".join(m.name for m in self.models)

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(m.embed_dim for m in self.models)

    @cached_property
    def fingerprint(self) -> str:
        return digest_of({"scales": self.scales, "models": [model.fingerprint() for model in self.models]})

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Embeddings:
        """The teacher's embeddings of this rank's rows: (B, sum of D_k) each."""
        own = getattr(self.models[0].module, OWN_EMBEDDINGS, None)
        if own is not None and len(self.models) == 1:
            return own_embeddings(self.model, own, batch, self.device, self.scales[0])
        return self.encode(batch.teacher_images, batch.teacher_tokens)

    @torch.no_grad()
    def encode(self, images: Tensor | None, tokens: Tensor | None) -> Embeddings:
        """images (B, 3, H, W), tokens (B, L), on any device; None gives no embeddings."""
        image: Any = None
        text: Any = None
        if images is not None:
            images = images.to(self.device, non_blocking=True)
            image_blocks = [encoder.encode_images(images) for encoder in self.encoders]
            image = torch.cat(image_blocks, 1)
        if tokens is not None:
            tokens = tokens.to(self.device, non_blocking=True)
            text_blocks = [
                # without a text tower the pictures stand for their captions
                encoder.encode_tokens(tokens) if hasattr(encoder.model.module, "encode_text") else image_blocks[number]
                for number, encoder in enumerate(self.encoders)
            ]
            text = torch.cat(text_blocks, 1)
        single = len(self.models) == 1
        scale = torch.tensor(self.scales[0] if single else self.scales, device=self.device)
        return Embeddings(image, text, scale, blocks=None if single else self.blocks)


def own_embeddings(
    model: ClipModel, make: Callable[[Batch], Any], batch: Batch, device: torch.device, scale: float
) -> Embeddings:
    """What a teacher from outside makes of a batch: Embeddings, (image, text), or image embeddings alone, (B, D)."""
    try:
        found = make(batch)
    except Exception as error:
        raise InputError(f"teacher '{model.name}': {OWN_EMBEDDINGS} failed ({describe(error)})") from error
    if isinstance(found, Embeddings):
        return found
    image, text = found if isinstance(found, tuple | list) else (found, found)
    rows = []
    for part in (image, image if text is None else text):
        if not isinstance(part, Tensor) or tuple(part.shape) != (len(batch.keys), model.embed_dim):
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise InputError(
                f"teacher '{model.name}': {OWN_EMBEDDINGS} gave {shape}, "
                f"expected ({len(batch.keys)}, {model.embed_dim})"
            )
        rows.append(torch.nn.functional.normalize(part.detach().to(device).float(), dim=-1))
    return Embeddings(rows[0], rows[1], torch.tensor(scale, device=device))


def load_teacher(
    names: Sequence[str],
    device: torch.device,
    precision: str,
    logit_scale: float | Sequence[float] | None = None,
) -> LiveTeacher:
    """The live teacher of one or more model names."""
    return LiveTeacher([load_model(name, teacher=True) for name in names], device, precision, logit_scale)


def open_teacher(config: RunConfig, source: PairSource, device: torch.device) -> Teacher:
    """The run's teacher: models, a region teacher, or a cache of embeddings checked against data and models."""
    train = config.train
    scale = train.fixed_logit_scale if train.fixed_logit_scale is not None else train.teacher_logit_scale
    for mark in TEACHER_FOLDERS.names():
        folders = [Path(name).expanduser() / inside for name in config.teachers for inside in ("", STUDENT)]
        if any((folder / mark).is_file() for folder in folders):
            return TEACHER_FOLDERS.get(mark)(config, source, device, scale)
    if not is_cached(config.teachers):
        return load_teacher(config.teachers, device, train.precision, scale)
    from clipdistill.cache.teacher import CacheUse, open_cached_teacher

    use = CacheUse(
        views=train.views,
        caption=train.caption,
        random_policy=train.view.random,
        logit_scale=scale,
        samples=train.cache_samples,
        allow_versions=train.cache_allow_versions,
    )
    # one rank computes the sample of embeddings again; a cache that is wrong for one stops them all
    return agree(lambda: open_cached_teacher(config.teachers[0], source, device, use, check=is_main()))


def prepare_teacher(teacher: Teacher | None, config: RunConfig, source: PairSource, width: int) -> Teacher | None:
    """The teacher with what the run wants of its rows of the whole set (a bank, cleaned targets of `width`), and with
    its class vectors."""
    train, bank, made = config.train, config.objective.needs_bank, teacher
    if made is not None and (bank or train.teacher_targets != "raw"):
        made = WHOLE_SET.get("cache")(
            made,
            source,
            captions=train.caption,
            targets=train.teacher_targets,
            width=width,
            bank=bank,
            samples=train.bank_samples,
            seed=train.seed,
        )
    if made is not None and config.objective.needs_classes:
        made = WHOLE_SET.get("classes")(made, train.classes)
    return made
