"""The weighted sum of distillation terms, as one module."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipdistill.config import build, merge
from clipdistill.errors import InputError, nearest
from clipdistill.objective.config import ObjectiveConfig
from clipdistill.objective.engines import EngineName, EngineOptions
from clipdistill.objective.engines.choose import UNKNOWN_MEMORY, choose_engine, dense_bytes, load_engine
from clipdistill.objective.engines.dense import dense, gathered_names
from clipdistill.objective.features import Embeddings, FeatureBuilder, blocks_of, check, is_matrix
from clipdistill.objective.gather import current_world, gather_rows, sum_over_ranks
from clipdistill.objective.mix import Mix, checked_weights
from clipdistill.objective.plan import SCALES
from clipdistill.objective.term import MODALITIES, LocalBatch, Setting, Term
from clipdistill.recipes import load_recipe
from clipdistill.registry import TERMS
from clipdistill.runtime.machine import free_memory

INITIAL_SCALE = math.log(1 / 0.07)


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
    """Any mix of terms, with the few parameters they own.

    weights: term name -> weight; a weight of 0 is as if the term were not named. See `registry.TERMS`.
    student_dim, teacher_dim: widths of the embeddings (for a teacher ensemble the sum of its blocks).
    scales: "released": the scales k_i, k_t, k_c, k_f are the multipliers themselves, started at ln(1/0.07) = 2.66, as
        in the published codes; "exponential": they are logarithms of the multipliers, which start at 1/0.07 = 14.3.
    projection: where student features are projected to the teacher's width when the widths differ: "after-task"
        (CLIP-KD: task, crd, affinity and the other student-only similarities see unprojected features) or "before-task"
        (CLIP-RD: all terms see projected features). Nothing is projected when the widths are equal.
    engine: "dense", "tiled" (memory linear in the batch) or "auto"; products: "exact", or "bfloat16" (tiled only).
    schedules: factors over the run of a term's weight or of the teacher's multiplier, by `progress`, the share of it
        that is done (0 until it is set).
    options: those of the terms by name, for example vrd_target="image"; docs/methods.md lists them.

    Parameters that the mix does not use do not exist (None); those it only reads as a detached target do not require a
    gradient. Under torch.distributed each rank calls the module with its local rows and gets the whole batch's value;
    gradients of features and parameters become those of one process after averaging over ranks.
    Raises InputError for unknown terms and for settings that are no allowed ones.
    """

    image_projection: nn.Linear | None
    text_projection: nn.Linear | None
    image_fusion: nn.Linear | None
    text_fusion: nn.Linear | None
    image_scale: nn.Parameter | None
    text_scale: nn.Parameter | None
    cross_scale: nn.Parameter | None
    fusion_scale: nn.Parameter | None
    own_scales: nn.ParameterDict

    def __init__(
        self,
        weights: Mapping[str, float],
        student_dim: int,
        teacher_dim: int,
        scales: Literal["released", "exponential"] = "released",
        projection: Literal["after-task", "before-task"] = "after-task",
        engine: Literal["dense", "tiled", "auto"] = "auto",
        *,
        products: Literal["exact", "bfloat16"] = "exact",
        schedules: Mapping[str, Sequence[Sequence[float]]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.weights = checked_weights(weights)
        settings: dict[str, Any] = {"scales": scales, "projection": projection, "engine": engine, "products": products}
        settings["schedules"] = schedules or {}
        self.config = build(ObjectiveConfig, {"weights": self.weights, **settings, **options}, "objective")
        if not all(isinstance(dim, numbers.Integral) and dim > 0 for dim in (student_dim, teacher_dim)):
            raise InputError(
                f"objective: embedding widths {student_dim} and {teacher_dim} must be positive whole numbers"
            )
        self.student_dim, self.teacher_dim = int(student_dim), int(teacher_dim)
        self.scales, self.projection, self.engine = scales, projection, engine
        self.options = EngineOptions(products=products)
        self.setting = Setting(options=self.config.options)
        self.progress = 0.0
        self._mixes: dict[Setting, Mix] = {}
        self._choices: dict[tuple[int, int, Setting], tuple[EngineName, str]] = {}
        self._add_parameters()

    def _add_parameters(self) -> None:
        mix = self.mix(self.setting)
        early = self.projection == "before-task"
        for name in mix.plan.primitives:
            for pairing in TERMS.get(name).pairings:
                left, right = self._width(pairing.rows), self._width(pairing.columns)
                if left != right:
                    with TERMS.blaming(name):
                        raise InputError(
                            f"pairing '{pairing.name}': {pairing.rows} is {left} wide, {pairing.columns} {right}: "
                            "take the projected rows of the student"
                        )
        for modality in ("image", "text"):
            unequal = self.student_dim != self.teacher_dim
            needed = unequal and (early or mix.reads_projected(modality))
            layer = nn.Linear(self.student_dim, self.teacher_dim) if needed else None
            if layer is not None:
                layer.requires_grad_(mix.trains(modality, early))
            setattr(self, f"{modality}_projection", layer)
            fused = f"fused_{modality}" in mix.reads
            fusion = nn.Linear(2 * self.teacher_dim, self.student_dim) if fused else None
            setattr(self, f"{modality}_fusion", fusion)
        for name in SCALES:
            parameter = _scale(INITIAL_SCALE, name in mix.trained) if name in mix.reads else None
            self.register_parameter(f"{name}_scale", parameter)
        log = self.scales == "exponential"
        starts = {name: math.log(start) if log else start for name, start in mix.starts.items()}
        self.own_scales = nn.ParameterDict({n: _scale(start, n in mix.trained) for n, start in starts.items()})

    @classmethod
    def from_config(
        cls, config: ObjectiveConfig, student_dim: int, teacher_dim: int, teacher_blocks: Sequence[int] | None = None
    ) -> Objective:
        """The objective that a recipe describes; teacher_blocks: widths of an ensemble's members, if it is one.

        Raises InputError when a term and an ensemble of teachers do not go together.
        """
        if teacher_blocks is not None and sum(teacher_blocks) != teacher_dim:
            raise InputError(f"objective: teacher blocks {tuple(teacher_blocks)} do not add up to {teacher_dim}")
        settings = {name: getattr(config, name) for name in type(config).model_fields} | config.options
        made = cls(student_dim=student_dim, teacher_dim=teacher_dim, **settings)
        if teacher_blocks is not None and len(teacher_blocks) > 1:
            made.mix(made.setting).check_ensemble(len(teacher_blocks))
        return made

    @classmethod
    def from_recipe(cls, name: str, *, student_dim: int, teacher_dim: int, **changes: Any) -> Objective:
        """The objective of a recipe, shipped or in a file; `changes` replace settings of its `objective:` part."""
        values = merge(load_recipe(name).get("objective", {}), changes)
        if "weights" in changes:
            values["weights"] = dict(changes["weights"])
        config = build(ObjectiveConfig, values, f"recipe {name}: objective")
        return cls.from_config(config, student_dim, teacher_dim)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: what can be worked out again stays here, also the functions of a program's terms."""
        return {**self.__dict__, "_mixes": {}, "_choices": {}}

    def mix(self, setting: Setting) -> Mix:
        """The terms of this objective worked out for one kind of step."""
        if setting not in self._mixes:
            self._mixes[setting] = Mix.of(self.weights, setting)
        return self._mixes[setting]

    @property
    def current_weights(self) -> dict[str, float]:
        """The weights at this point of the run."""
        if not self.config.schedules:
            return self.weights
        return {name: weight * self.config.factor(name, self.progress) for name, weight in self.weights.items()}

    def _parameter(self, name: str) -> nn.Parameter | None:
        found = self.own_scales[name] if name in self.own_scales else getattr(self, f"{name}_scale", None)
        return found if isinstance(found, nn.Parameter) else None

    def set_scales(self, **multipliers: float | None) -> None:
        """Set effective multipliers (image, text, cross, fusion; "term:scale"), in either reading of `scales`.

        Published ones outside the mix are ignored. Raises InputError for a name or a number that is none.
        """
        for name, value in multipliers.items():
            if name not in SCALES and name not in self.own_scales:
                raise InputError(f"objective: unknown scale '{name}'{nearest(name, (*SCALES, *self.own_scales))}")
            if value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"objective: the {name} scale is {value}, expected a positive number")
            parameter = self._parameter(name)
            if parameter is not None:
                with torch.no_grad():
                    parameter.fill_(math.log(value) if self.scales == "exponential" else value)

    def effective_scales(self) -> dict[str, float]:
        """The multipliers of the scales this mix has, by name."""
        found = {name: self._parameter(name) for name in (*SCALES, *self.own_scales)}
        exponential = self.scales == "exponential"
        return {
            name: float(p.detach().exp() if exponential else p.detach()) for name, p in found.items() if p is not None
        }

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
                n, device, self.mix(setting).all_primitives, world_size=world_size, itemsize=itemsize, memory=memory
            )
        return self._choices[key]

    def estimate_bytes(self, n: int, device: torch.device | None = None, world_size: int = 1) -> int:
        """Roughly the bytes one forward and backward pass over a whole batch of n rows adds on one rank (float32)."""
        mix = self.mix(self.setting)
        widths = [self._width(name) for name in mix.reads if is_matrix(name)]
        # rows of all ranks, their gradients, and the normalised copies
        linear = 3 * 4 * n * sum(widths)
        engine, _ = self.choose(n, device or torch.device("cpu"), world_size=world_size)
        if engine == "dense":
            return linear + dense_bytes(n, mix.all_primitives, world_size=world_size)
        stripe = 512
        return linear + 4 * stripe * n * (len(mix.plan.pairings) + 2)

    def _width(self, name: str) -> int:
        """Columns of the feature matrix called `name`."""
        if name.startswith("student") and self.projection == "before-task":
            return self.teacher_dim
        return self.student_dim if name.startswith(("student", "fused")) else self.teacher_dim

    def explain(self, n: int | None = None, device: torch.device | None = None, world_size: int = 1) -> str:
        """The objective in symbols: terms, gradient flow, options, scales, projections, and the engine for n rows."""
        from clipdistill.objective.explain import explain

        line = f"engine: {self.engine}"
        if n is not None:
            line = "engine for N={}: {} ({})".format(
                n, *self.choose(n, device or torch.device("cpu"), world_size=world_size)
            )
        projected = [name for name in ("image", "text") if getattr(self, f"{name}_projection") is not None]
        widths = (self.student_dim, self.teacher_dim)
        return explain(self.config, self.mix(self.setting), self.effective_scales(), widths, projected, line)

    def forward(self, student: Embeddings, teacher: Embeddings | None = None) -> ObjectiveOutput:
        """The value for a batch; `teacher` may be None when no term of the mix reads one.

        Similarities are computed in float32 (float64 if any embedding is), also under autocast.
        Raises InputError when shapes do not fit, or a term and an ensemble of teachers do not go together.
        """
        rows = check("student", student, self.student_dim)
        with torch.autocast(student.any.device.type, enabled=False):
            return self._forward(rows, student, teacher)

    def _forward(self, rows: int, student: Embeddings, teacher: Embeddings | None) -> ObjectiveOutput:
        if teacher is not None and "teacher" in self.config.schedules:
            factor = self.config.factor("teacher", self.progress)
            teacher = replace(teacher, logit_scale=torch.as_tensor(teacher.logit_scale) * factor)
        mix = self.mix(self._setting(student, teacher, rows))
        features = FeatureBuilder(self, student, teacher, mix.setting.teachers).features(mix.reads)
        world = current_world(rows, student.any.device)
        names: dict[str, None] = dict.fromkeys(name for term in mix.feature_terms.values() for name in term.gathers)
        like = next(iter(features.matrices.values()))
        engine, _ = self.choose(
            world.total, like.device, world_size=world.size, itemsize=like.element_size(), setting=mix.setting
        )
        if engine == "dense":
            names.update(dict.fromkeys(gathered_names(mix.plan, world)))
        whole = dict(zip(names, gather_rows([features.matrices[name] for name in names], world)))
        extra = (None, None) if teacher is None else (teacher.bank, teacher.classes)
        total, terms = self._feature_terms(mix, LocalBatch(features, whole, world, mix.setting, *extra), like)
        if mix.plan.primitives:
            plan = mix.plan
            if self.config.schedules:
                plan = replace(plan, weights={name: self.current_weights[name] for name in plan.weights})
            if engine == "dense":
                result = dense(features, plan, world, self.options, whole)
            else:
                result = load_engine(engine)(features, plan, world, self.options)
            total = total + result.total
            terms |= result.terms
        return ObjectiveOutput(total, {name: terms[name] for name in self.weights if name in terms}, engine)

    def _feature_terms(self, mix: Mix, batch: LocalBatch, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum and detached values of the terms that compare rows rather than pairs."""
        if not mix.feature_terms:
            return like.new_zeros(()), {}
        shares = [share_of(term, batch) for term in mix.feature_terms.values()]
        values = sum_over_ranks(torch.stack(shares), batch.world)
        for name, value in zip(mix.feature_terms, values.detach()):
            if TERMS.origin(name) and not bool(torch.isfinite(value)):
                _blame_not_finite(name, batch, float(value))
        total = values @ values.new_tensor([self.current_weights[name] for name in mix.feature_terms])
        return total, dict(zip(mix.feature_terms, values.detach()))

    def _setting(self, student: Embeddings, teacher: Embeddings | None, rows: int) -> Setting:
        """How this step's terms are set, after checking that teacher and student fit."""
        synthetic = student.synthetic_text is not None
        given = tuple(modality for modality in MODALITIES if getattr(student, modality) is not None)
        base = replace(self.setting, synthetic=synthetic, modalities=given)
        one = self.mix(replace(base, synthetic=False))
        if not one.reads:
            raise InputError(f"objective: no term of {', '.join(self.weights)} reads the {given[0]} alone")
        if not one.reads_teacher:
            return base
        if teacher is None:
            raise InputError(
                f"objective: the terms {', '.join(self.weights)} need the teacher's embeddings, none given"
            )
        teacher_rows = check("teacher", teacher, self.teacher_dim)
        if teacher_rows != rows:
            raise InputError(f"objective: {rows} rows from the student and {teacher_rows} from the teacher")
        self._check_bank(teacher)
        teachers = len(blocks_of(teacher))
        if teachers > 1:
            one.check_ensemble(teachers)
        setting = replace(base, teachers=teachers)
        if synthetic and teacher.synthetic_text is None and self.mix(setting).reads_teacher_synthetic:
            raise InputError(
                "objective: the student's embeddings carry a synthetic caption, the teacher's do not; "
                f"the terms {', '.join(self.weights)} need both"
            )
        return setting

    def _check_bank(self, teacher: Embeddings) -> None:
        classes = next((name for name in self.weights if TERMS.get(name).classes), None)
        if classes is not None and (teacher.classes is None or teacher.classes.shape[1] != self.teacher_dim):
            found = "none are given" if teacher.classes is None else f"they have {teacher.classes.shape[1]}"
            raise InputError(
                f"objective: the term '{classes}' compares with the teacher's class vectors, of {self.teacher_dim} "
                f"numbers each, and {found}: name the classes, train.classes=SET, or a file of their vectors"
            )
        needing = [name for name in self.weights if TERMS.get(name).bank]
        if not needing:
            return
        if teacher.bank is None:
            raise InputError(
                f"objective: the term '{needing[0]}' compares with the teacher's embeddings of the whole training set; "
                "these come with a cached teacher: fill a cache with `clipdistill cache` and name it, teacher=cache:DIR"
            )
        for part in (teacher.bank.image, teacher.bank.text):
            if part.ndim != 2 or part.shape[1] != self.teacher_dim:
                raise InputError(
                    f"the teacher's bank has the shape {tuple(part.shape)}: teacher_dim of the objective is "
                    f"{self.teacher_dim}"
                )

    def extra_repr(self) -> str:
        listed = ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        return f"{listed}, scales={self.scales}, projection={self.projection}, engine={self.engine}"


def share_of(term: Term, batch: LocalBatch) -> Tensor:
    """This rank's share of a feature term, 0-dimensional. Raises InputError, naming the plug-in, for what is none."""
    rows = batch.world.counts[batch.world.rank]
    value: Any
    expected: tuple[int, ...] = ()
    given = [batch[name] for name in term.reads] + list(batch.whole.values())
    with TERMS.blaming(term.name):
        if term.feature_loss is not None:
            value = term.feature_loss(batch)
        elif rows == 0 or term.row_loss is None:
            # a rank without rows still takes part in the exchange, forward and backward
            return torch.stack([0 * matrix.sum() for matrix in given]).sum()
        else:
            value, expected = term.row_loss(batch), (rows,)
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
            raise InputError(f"expected a tensor of shape {expected}, got {got}")
        if torch.is_grad_enabled() and not value.requires_grad and any(matrix.requires_grad for matrix in given):
            raise InputError("its value has no gradient: it was detached, or computed outside torch")
    return value if term.feature_loss is not None else value.sum() / max(batch.world.total, 1)


def _blame_not_finite(name: str, batch: LocalBatch, value: float) -> None:
    """InputError when a plug-in's term made NaN or infinity of finite rows; otherwise the rows are to blame."""
    if all(bool(torch.isfinite(batch[read]).all()) for read in TERMS.get(name).reads):
        with TERMS.blaming(name):
            raise InputError(f"its value is {value} although every row it reads is finite")


def _scale(start: float, trained: bool) -> nn.Parameter:
    """float64, so that setting one and then calling .double() loses no digit; Apple's GPUs have none."""
    dtype = torch.float32 if torch.backends.mps.is_available() else torch.float64
    return nn.Parameter(torch.tensor(start, dtype=dtype), requires_grad=trained)
