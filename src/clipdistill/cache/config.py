"""What to fill a store with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from clipdistill.cache.names import Dtype
from clipdistill.config import Config
from clipdistill.data.pairs import DataConfig
from clipdistill.data.views import ViewPolicy


class CacheConfig(Config):
    """Settings of `clipdistill cache`.

    views: stored augmented views beside the evaluation view, drawn as `view` says with `view_seed`; captions: all of an
    image's or its first; synthetic: a file of added captions; block: samples a file (None: from the size of the data);
    batch_size: pictures a forward pass; precision: of the teacher's forward pass ("auto": bf16 on a GPU, else fp32);
    part: "1/4" fills only the second of four static shares; allow_versions: go on although libraries have changed.
    """

    teacher: str | tuple[str, ...]
    data: DataConfig
    out: Path
    dtype: Dtype = "fp16"
    views: int = pydantic.Field(default=0, ge=0, le=255)
    view: ViewPolicy = ViewPolicy(kind="crop")
    view_seed: int = pydantic.Field(default=0, ge=0)
    captions: Literal["all", "first"] = "all"
    synthetic: Path | None = None
    block: int | None = pydantic.Field(default=None, ge=1, le=65_536)
    batch_size: int = pydantic.Field(default=64, ge=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    workers: int | None = pydantic.Field(default=None, ge=0)
    device: str | None = None
    part: str | None = pydantic.Field(default=None, pattern=r"^\d+/\d+$")
    allow_versions: bool = False

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, (str, Path)) else value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> CacheConfig:
        if self.views and not self.view.random:
            raise ValueError(
                "views: several stored views of kind 'evaluation' would all be the same; set view.kind=crop"
            )
        share, of = self.share
        if not 0 <= share < of:
            raise ValueError(f"part: '{self.part}' is not one of the shares 0/{of} to {of - 1}/{of}")
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        names = self.teacher.split(",") if isinstance(self.teacher, str) else self.teacher
        return tuple(name.strip() for name in names)

    @property
    def share(self) -> tuple[int, int]:
        """Which static share of the blocks to fill, of how many."""
        if self.part is None:
            return 0, 1
        share, _, of = self.part.partition("/")
        return int(share), int(of)
