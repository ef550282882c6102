"""The weighted sum of published distillation terms, as one module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.objective import explain
from clipdistill.objective.engines.dense import dense, gathered_names
from clipdistill.objective.engines.engine import UNKNOWN_MEMORY, EngineName, EngineOptions, choose_engine, load_engine
from clipdistill.objective.features import Embeddings, FeatureBuilder, blocks_of, check
from clipdistill.objective.gather import World, current_world, gather_rows, sum_over_ranks
from clipdistill.objective.mix import Mix, checked_weights
from clipdistill.objective.pairings import Setting
from clipdistill.objective.term import LocalBatch
from clipdistill.runtime.machine import free_memory

INITIAL_SCALE = math.log(1 / 0.07)
SCALES = ("image", "text", "cross", "fusion")


def _scale_dtype() -> torch.dtype:
    """float64 for the scales, so that setting one and then calling .double() loses no digit; Apple's GPUs have none."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


@dataclass(frozen=True)
class ObjectiveOutput:
    """total: weighted sum over the whole batch, 0-dimensional, differentiable, the same on every rank.

    terms: unweighted value of each term with a non-zero weight, detached, the same on every rank.
    engine: what computed it, "dense" or "tiled".
    """

    total: Tensor
    terms: dict[str, Tensor]
    engine: str


class Objective(nn.Module):
    """Any mix of the published terms, with the few parameters they own.

    weights: term name -> weight; a weight of 0 is as if the term were not named. See `objective.terms.TERMS`.
    student_dim, teacher_dim: widths of the embeddings (for a teacher ensemble the sum of its blocks).
    scales: "released": the scales k_i, k_t, k_c, k_f are the multipliers themselves, started at ln(1/0.07) = 2.66, as
        in the published codes; "exponential": they are logarithms of the multipliers, which start at 1/0.07 = 14.3.
    projection: where student features are projected to the teacher's width when the widths differ: "after-task"
        (CLIP-KD: task, crd, affinity and the other student-only similarities see unprojected features) or "before-task"
        (CLIP-RD: all terms see projected features). Nothing is projected when the widths are equal.
    engine: "dense", "tiled" (memory linear in the batch) or "auto"; products: "exact", or "bfloat16" (tiled only).
    feature_units, gd_temperature, sigmoid_targets, vrd_target, reinforced_lambda: see the terms fd, gd, sigmoid,
        vrd_kl, reinforced.

    Parameters that the mix does not use do not exist (None); those it only reads as a detached target do not require a
    gradient. Under torch.distributed each rank calls the module with its local rows and gets the whole batch's value;
    gradients of features and parameters become those of one process after averaging over ranks.
    """

    image_projection: nn.Linear | None
    text_projection: nn.Linear | None
    image_fusion: nn.Linear | None
    text_fusion: nn.Linear | None
    image_scale: nn.Parameter | None
    text_scale: nn.Parameter | None
    cross_scale: nn.Parameter | None
    fusion_scale: nn.Parameter | None

    def __init__(
        self,
        weights: Mapping[str, float],
        student_dim: int,
        teacher_dim: int,
        scales: Literal["released", "exponential"] = "released",
        projection: Literal["after-task", "before-task"] = "after-task",
        engine: Literal["dense", "tiled", "auto"] = "auto",
        *,
        feature_units: Literal["released", "cosine"] = "released",
        gd_temperature: Literal["released", "fixed"] = "released",
        sigmoid_targets: Literal["pairs", "teacher"] = "pairs",
        vrd_target: Literal["text", "image"] = "text",
        reinforced_lambda: float = 1.0,
        products: Literal["exact", "bfloat16"] = "exact",
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("scales", scales, ("released", "exponential")),
            ("projection", projection, ("after-task", "before-task")),
            ("engine", engine, ("dense", "tiled", "auto")),
            ("feature_units", feature_units, ("released", "cosine")),
            ("gd_temperature", gd_temperature, ("released", "fixed")),
            ("sigmoid_targets", sigmoid_targets, ("pairs", "teacher")),
            ("vrd_target", vrd_target, ("text", "image")),
            ("products", products, ("exact", "bfloat16")),
        ):
            if value not in allowed:
                raise InputError(f"objective: {name} is {value!r}, expected one of {', '.join(allowed)}")
        if not 0 <= reinforced_lambda <= 1:
            raise InputError(f"objective: reinforced_lambda is {reinforced_lambda}, expected a share between 0 and 1")
        if student_dim < 1 or teacher_dim < 1:
            raise InputError(f"objective: embedding widths {student_dim} and {teacher_dim} must be positive")
        self.weights = checked_weights(weights)
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.scales, self.projection, self.engine = scales, projection, engine
        self.options = EngineOptions(products=products)
        self.setting = Setting(
            sigmoid_targets=sigmoid_targets,
            vrd_target=vrd_target,
            feature_units=feature_units,
            gd_temperature=gd_temperature,
            reinforced_lambda=reinforced_lambda,
        )
        self._mixes: dict[Setting, Mix] = {}
        self._choices: dict[tuple[int, int, Setting], tuple[EngineName, str]] = {}
        self._add_parameters()

    def _add_parameters(self) -> None:
        mix = self.mix(self.setting)
        early = self.projection == "before-task"
        for modality in ("image", "text"):
            unequal = self.student_dim != self.teacher_dim
            needed = unequal and (early or mix.reads_projected(modality))
            layer = nn.Linear(self.student_dim, self.teacher_dim) if needed else None
            if layer is not None:
                layer.requires_grad_(mix.trains(modality, early))
            setattr(self, f"{modality}_projection", layer)
            fusion = f"fused_{modality}" in mix.reads
            setattr(
                self,
                f"{modality}_fusion",
                nn.Linear(2 * self.teacher_dim, self.student_dim) if fusion else None,
            )
        for name in SCALES:
            parameter = None
            if name in mix.reads:
                start = torch.tensor(INITIAL_SCALE, dtype=_scale_dtype())
                parameter = nn.Parameter(start, requires_grad=name in mix.trained)
            self.register_parameter(f"{name}_scale", parameter)

    @classmethod
    def from_recipe(cls, name: str, *, student_dim: int, teacher_dim: int, **changes: Any) -> Objective:
        """The objective of a shipped recipe (or of a recipe file); `changes` replace settings of its `objective:`
        part.
        """
        from clipdistill.config import build, merge
        from clipdistill.objective.config import ObjectiveConfig
        from clipdistill.recipes import load_recipe

        values = merge(load_recipe(name).get("objective", {}), changes)
        if "weights" in changes:
            values["weights"] = dict(changes["weights"])
        return build(ObjectiveConfig, values, f"recipe {name}: objective").build(student_dim, teacher_dim)

    def mix(self, setting: Setting) -> Mix:
        """The terms of this objective worked out for one kind of step."""
        if setting not in self._mixes:
            self._mixes[setting] = Mix.of(self.weights, setting)
        return self._mixes[setting]

    def set_scales(
        self,
        *,
        image: float | None = None,
        text: float | None = None,
        cross: float | None = None,
        fusion: float | None = None,
    ) -> None:
        """Set the effective multipliers, in either reading of `scales`; those of terms outside the mix are ignored."""
        for name, value in (("image", image), ("text", text), ("cross", cross), ("fusion", fusion)):
            if value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"objective: the {name} scale is {value}, expected a positive number")
            parameter = getattr(self, f"{name}_scale")
            if parameter is not None:
                with torch.no_grad():
                    parameter.fill_(math.log(value) if self.scales == "exponential" else value)

    def effective_scales(self) -> dict[str, float]:
        """The multipliers of the scales this mix has, by name."""
        found = {}
        for name in SCALES:
            parameter = getattr(self, f"{name}_scale")
            if parameter is not None:
                found[name] = float(parameter.detach().exp() if self.scales == "exponential" else parameter.detach())
        return found

    def parameter_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Optimiser groups of the trained parameters: matrices decay, scales and biases never do; empty groups are left
        out.

        The released codes give these parameters AdamW's default decay of 0.01, the scales included.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def choose(
        self, n: int, device: torch.device, *, world_size: int = 1, itemsize: int = 4, setting: Setting | None = None
    ) -> tuple[EngineName, str]:
        """The engine for a whole batch of n rows and why; the same on every rank. Decided once for each n."""
        if self.engine != "auto":
            return self.engine, "as asked"
        setting = setting or self.setting
        key = (n, world_size, setting)
        if key not in self._choices:
            memory = free_memory(device) or UNKNOWN_MEMORY
            if world_size > 1 and dist.is_initialized():
                # the ranks see different free memory and must still agree
                least = torch.tensor([memory], dtype=torch.int64, device=device)
                dist.all_reduce(least, op=dist.ReduceOp.MIN)
                memory = int(least.item())
            self._choices[key] = choose_engine(
                n,
                device,
                self.mix(setting).all_primitives,
                world_size=world_size,
                itemsize=itemsize,
                memory=memory,
            )
        return self._choices[key]

    def estimate_bytes(self, n: int, device: torch.device | None = None, world_size: int = 1) -> int:
        """Roughly the bytes one forward and backward pass over a whole batch of n rows adds on one rank (float32)."""
        return explain.estimate_bytes(self, n, device or torch.device("cpu"), world_size)

    def explain(self, n: int | None = None, device: torch.device | None = None, world_size: int = 1) -> str:
        """The objective in symbols: terms with weights, gradient flow, scales, projections, and the engine for n
        rows.
        """
        return explain.explain(self, n, device or torch.device("cpu"), world_size)

    def forward(self, student: Embeddings, teacher: Embeddings | None = None) -> ObjectiveOutput:
        """The value for a batch; `teacher` may be None when no term of the mix reads one.

        Similarities are computed in float32 (float64 if any embedding is), also under autocast.
        Raises InputError when shapes do not fit, or a term and an ensemble of teachers do not go together.
        """
        with torch.autocast(student.image.device.type, enabled=False):
            return self._forward(student, teacher)

    def _forward(self, student: Embeddings, teacher: Embeddings | None) -> ObjectiveOutput:
        rows = check("student", student, self.student_dim)
        mix = self.mix(self._setting(student, teacher, rows))
        features = FeatureBuilder(self, student, teacher, mix.setting.teachers).features(mix.reads)
        world = current_world(rows, student.image.device)
        names: dict[str, None] = dict.fromkeys(name for term in mix.feature_terms.values() for name in term.gathers)
        like = next(iter(features.matrices.values()))
        engine, _ = self.choose(
            world.total,
            like.device,
            world_size=world.size,
            itemsize=like.element_size(),
            setting=mix.setting,
        )
        if engine == "dense":
            names.update(dict.fromkeys(gathered_names(mix.plan, world)))
        whole = dict(zip(names, gather_rows([features.matrices[name] for name in names], world)))
        total, terms = self._feature_terms(mix, LocalBatch(features, whole, world, mix.setting), like)
        if mix.plan.primitives:
            if engine == "dense":
                result = dense(features, mix.plan, world, self.options, whole)
            else:
                result = load_engine(engine)(features, mix.plan, world, self.options)
            total = total + result.total
            terms |= result.terms
        return ObjectiveOutput(total, {name: terms[name] for name in self.weights}, engine)

    def _feature_terms(self, mix: Mix, batch: LocalBatch, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum and detached values of the terms that compare rows rather than pairs."""
        if not mix.feature_terms:
            return like.new_zeros(()), {}
        shares = [term.feature_loss(batch) for term in mix.feature_terms.values() if term.feature_loss is not None]
        values = sum_over_ranks(torch.stack(shares), batch.world)
        total = values @ values.new_tensor([self.weights[name] for name in mix.feature_terms])
        return total, dict(zip(mix.feature_terms, values.detach()))

    def _setting(self, student: Embeddings, teacher: Embeddings | None, rows: int) -> Setting:
        """How this step's terms are set, after checking that teacher and student fit."""
        synthetic = student.synthetic_text is not None
        one = self.mix(self.setting)
        if not one.reads_teacher:
            return replace(self.setting, synthetic=synthetic)
        if teacher is None:
            raise InputError(
                f"objective: the terms {', '.join(self.weights)} need the teacher's embeddings, none given"
            )
        teacher_rows = check("teacher", teacher, self.teacher_dim)
        if teacher_rows != rows:
            raise InputError(f"objective: {rows} rows from the student and {teacher_rows} from the teacher")
        teachers = len(blocks_of(teacher))
        if teachers > 1:
            one.check_ensemble(teachers)
        setting = replace(self.setting, synthetic=synthetic, teachers=teachers)
        if synthetic and teacher.synthetic_text is None and self.mix(setting).reads_teacher_synthetic:
            raise InputError(
                "objective: the student's embeddings carry a synthetic caption, the teacher's do not; "
                f"the terms {', '.join(self.weights)} need both"
            )
        return setting

    def extra_repr(self) -> str:
        listed = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return f"{listed}, scales={self.scales}, projection={self.projection}, engine={self.engine}"


__all__ = ["INITIAL_SCALE", "Embeddings", "Objective", "ObjectiveOutput", "World"]
