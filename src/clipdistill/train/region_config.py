"""Settings of the region teacher: where boxes come from, and what its network is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from clipdistill.config import Config
from clipdistill.data.views import ImageSpec


class BoxLimits(Config):
    """Which of an image's boxes are used.

    They are clipped to the image; what is then smaller than a pixel is left out.
    """

    most: int | None = pydantic.Field(default=None, ge=1)
    """At most so many, the most confident first (None: all, as DCLIP released)."""
    min_confidence: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Boxes the detector is less sure of are left out."""
    min_area: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Smallest share of the image's area."""


class RegionsConfig(Config):
    """The boxes of a run's images and their embeddings."""

    boxes: str
    """A file or folder of boxes, or a detector (docs/dclip.md)."""
    validation_boxes: str | None = None
    """Those of the validation set, where they are in another file."""
    limits: BoxLimits = BoxLimits()
    """Which of them are used."""
    store: Path | None = None
    """Folder for the embeddings of the regions, made once and shared by runs (None: in the run's folder)."""
    batch_size: int = pydantic.Field(default=64, ge=1)
    """Crops a forward pass."""


class MetaTeacherConfig(Config):
    """The network between region and token embeddings. The defaults are DCLIP as the paper describes it."""

    image_side: Literal["caption", "query", "regions"] = "caption"
    """What the regions attend to: the caption (published: the image embedding then contains it), learned tokens
    in its place, or each other; the last two are free of the caption."""
    heads: int = pydantic.Field(default=8, ge=1)
    """Of both attentions."""
    queries: int = pydantic.Field(default=4, ge=1, le=256)
    """Learned tokens of image_side=query."""
    padding: Literal["masked", "released"] = "masked"
    """released: padded positions take part, so that an embedding depends on the longest caption of its batch."""
    weights: Literal["pool", "scale", "none"] = "pool"
    """pool: area x confidence x similarity to the text enters the pooling of the regions; scale: it multiplies the
    region embeddings before attention (nothing calls it in the released code); none: regions count alike (released)."""
    pool_temperature: float = pydantic.Field(default=2.0, gt=0)
    """Of the similarity pooling."""
    crops: Literal["normalised", "released"] = "normalised"
    """With CLIP's mean and deviation, or as released: pixels in [0, 1], without it."""
    whole_image: Literal["missing", "always", "never"] = "missing"
    """missing: an image without boxes is one region; always: it is a region of every image, before the boxes;
    never: no boxes are one zero row (released)."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> MetaTeacherConfig:
        if self.image_side != "caption" and self.padding == "released":
            raise ValueError("padding: 'released' is a property of the published form, image_side='caption'")
        return self

    @property
    def caption_free(self) -> bool:
        """Whether the image embedding is a function of the image alone."""
        return self.image_side != "caption"

    def crop_spec(self, image: ImageSpec) -> ImageSpec:
        """How crops are prepared for a CLIP that wants `image`: squashed to its square."""
        if self.crops == "normalised":
            return image.model_copy(update={"resize_mode": "squash"})
        return ImageSpec(size=image.size, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", resize_mode="squash")
