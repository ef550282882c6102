"""Settings of automatic inheritance: `train.masks` of a recipe."""

from __future__ import annotations

import pydantic

from clipdistill.config import Config


class MaskConfig(Config):
    """Train masks over width, heads and MLP units, then prune. Defaults are those of TinyCLIP's released code."""

    sparsity: float = pydantic.Field(gt=0, lt=1)
    """Share of the prunable weights (attention and MLP matrices) to remove; of both towers together when `joint`."""
    text_sparsity: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """The text tower's own target; only without `joint`."""
    joint: bool = True
    """One budget for both towers, which may trade it; otherwise each tower meets its own target."""
    prune_step: int = pydantic.Field(ge=1)
    """After so many steps masks become a smaller model and the learning rate starts again without warm-up."""
    start: float | None = pydantic.Field(default=None, ge=0, lt=1)
    """The target at step 0; None: what the student lacks of `reference` already."""
    warmup_steps: int = pydantic.Field(default=1000, ge=0)
    """Steps over which the target rises from `start` to `sparsity`."""
    reference: str | None = None
    """The model whose weights are 100 %: 'teacher', a model name, or None for the student as it starts."""
    learning_rate: float = pydantic.Field(default=0.02, gt=0)
    """Of the masks and, upwards, of the multipliers; constant, whatever the schedule of the weights."""
    initial_log_alpha: float = 10.0
    """Start of the masks' logits: 10 is a mask of 1 to four digits."""
    initial_multiplier: float = pydantic.Field(default=10.0, ge=0)
    """Start of the Lagrange multipliers that hold the target."""
    towers: tuple[str, ...] = ("image", "text")
    """Towers that have masks."""
    parts: tuple[str, ...] = ("width", "heads", "mlp")
    """What is masked: channels of the residual stream, attention heads, neurons of the MLPs."""

    @pydantic.field_validator("towers", "parts")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: pydantic.ValidationInfo) -> tuple[str, ...]:
        known = ("image", "text") if info.field_name == "towers" else ("width", "heads", "mlp")
        if not value or len(set(value)) < len(value) or not set(value) <= set(known):
            raise ValueError(f"expected some of {', '.join(known)}")
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> MaskConfig:
        if self.joint and self.text_sparsity is not None:
            raise ValueError("masks.text_sparsity is a target of its own, so it needs masks.joint=false")
        return self
