"""What to fill a store with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from clipdistill.cache.names import Dtype
from clipdistill.config import Config
from clipdistill.data.pairs import DataConfig
from clipdistill.data.views import ViewPolicy
from clipdistill.embed.names import ENGINES, on_cluster
from clipdistill.errors import nearest
from clipdistill.models.towers.names import split_models


class CacheConfig(Config):
    """Settings of `clipdistill cache`."""

    teacher: str | tuple[str, ...]
    """Model to embed with; several, separated by commas, for an ensemble."""
    data: DataConfig
    """The pairs to embed; a plain name stands for `data.path`."""
    out: Path
    """Folder of the store."""
    dtype: Dtype = "fp16"
    """Number format of the stored rows."""
    views: int = pydantic.Field(default=0, ge=0, le=255)
    """Augmented views stored beside the evaluation view."""
    view: ViewPolicy = ViewPolicy(kind="crop")
    """How the stored views are drawn."""
    view_seed: int = pydantic.Field(default=0, ge=0)
    """Of the stored views."""
    captions: Literal["all", "first"] = "all"
    """All of an image's captions, or its first."""
    synthetic: Path | None = None
    """A file of added captions by key: JSON, JSON lines or Parquet."""
    block: int | None = pydantic.Field(default=None, ge=1, le=65_536)
    """Samples a file (None: from the size of the data)."""
    batch_size: int = pydantic.Field(default=64, ge=1)
    """Pictures a forward pass."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the teacher's forward pass (auto: bf16 on a GPU, else fp32)."""
    engine: str = "torch"
    """What runs the teacher (auto: the fastest installed, where the set pays for it; a store keeps its engine; ray,
    ray:onnx, ray:workers=8: on a Ray cluster)."""
    workers: int | None = pydantic.Field(default=None, ge=0, le=1024)
    """Processes that decode (None: as many as keep the teacher busy, measured)."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps (None: a GPU when there is one)."""
    part: str | None = pydantic.Field(default=None, pattern=r"^\d+/\d+$")
    """A static share of the blocks: 1/4 fills only the second of four."""
    allow_versions: bool = False
    """Go on although libraries have changed since the store was begun."""

    @pydantic.field_validator("teacher")
    @classmethod
    def _named(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or (not isinstance(value, str) and "" in value):
            raise ValueError("name at least one model")
        return value

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, (str, Path)) else value

    @pydantic.field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if on_cluster(value) is None and value not in ENGINES:
            raise ValueError(f"unknown engine '{value}'{nearest(value, (*ENGINES, 'ray'))}")
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> CacheConfig:
        if self.views and not self.view.random:
            raise ValueError(
                "views: several stored views of kind 'evaluation' would all be the same; set view.kind=crop"
            )
        share, of = self.share
        if not 0 <= share < of:
            known = f"one of the shares 0/{of} to {of - 1}/{of}" if of else "a share, for example 0/4"
            raise ValueError(f"part: '{self.part}' is not {known}")
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        return split_models(self.teacher) if isinstance(self.teacher, str) else self.teacher

    @property
    def share(self) -> tuple[int, int]:
        """Which static share of the blocks to fill, of how many."""
        if self.part is None:
            return 0, 1
        share, _, of = self.part.partition("/")
        return int(share), int(of)
