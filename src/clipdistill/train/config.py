"""What a run is: the typed form of a recipe plus the names the user gives (teacher, student, data, folder)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from clipdistill.cache.names import is_cached
from clipdistill.config import LARGEST_SCALE, Config, agreed, build, override
from clipdistill.data.held_out import HeldOutConfig
from clipdistill.data.open import check_data_name, check_evaluated_name, check_training
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.views import ViewPolicy
from clipdistill.errors import InputError
from clipdistill.models.known import hold
from clipdistill.models.mask_config import MaskConfig
from clipdistill.models.names import check_model_name, check_student_name, check_teacher_names
from clipdistill.models.towers.names import split_models
from clipdistill.objective.config import ObjectiveConfig
from clipdistill.recipes import lay, load_recipe
from clipdistill.registry import TERMS, is_loaded, load_plugin
from clipdistill.runs.folder import RunFolder
from clipdistill.train.region_config import MetaTeacherConfig, RegionsConfig

Beta = Annotated[float, pydantic.Field(ge=0, lt=1)]
Scale = Annotated[float, pydantic.Field(gt=0, le=LARGEST_SCALE)]
Rate = Annotated[float, pydantic.Field(gt=0, le=1000)]
CurveMeasure = Literal[
    "t2i_R@1", "t2i_R@5", "t2i_R@10", "t2i_mAP@10", "t2i_MRR",
    "i2t_R@1", "i2t_R@5", "i2t_R@10", "i2t_mAP@10", "i2t_MRR",
]  # fmt: skip
OptimizerName = Literal[
    "adamw", "adabelief", "adafactor", "adam", "adamax", "adan", "adopt", "adoptw", "cadamw", "lamb", "lambc", "lars",
    "lion", "madgradw", "mars", "muon", "nadamw", "novograd", "radamw", "rmsprop", "sgd", "sgdw",
]  # fmt: skip
"""torch's AdamW, and those of timm's optimisers that a checkpoint holds whole (tests/train/test_optimizers.py)."""
Lock = Literal["none", "all"] | Annotated[int, pydantic.Field(ge=1)]


class TrainConfig(Config):
    """How to train. Counts are optimiser steps unless the name says otherwise; batch_size is global (all ranks)."""

    batch_size: int = pydantic.Field(default=1024, ge=1)
    """Pairs a step over all ranks: how many negatives the contrastive terms see."""
    micro_batch: int | None = pydantic.Field(default=None, ge=1)
    """Pairs a rank encodes at a time; smaller ones keep the whole batch's negatives by gradient caching."""
    epochs: float | None = pydantic.Field(default=None, gt=0)
    """Length of the run in passes over the training images; give this or `steps`."""
    steps: int | None = pydantic.Field(default=None, ge=1)
    """Length of the run in optimiser steps; give this or `epochs`."""
    optimizer: OptimizerName = "adamw"
    """torch's AdamW, or an optimiser of timm, which takes of rate, decay, betas and epsilon what it has a use for."""
    learning_rate: Rate = 1e-3
    """Highest rate of the optimiser, reached after the warm-up."""
    final_learning_rate: float = pydantic.Field(default=0.0, ge=0, le=1000)
    """Rate that the schedules that fall go down to: one step after the last they would be there."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """How the rate goes after the warm-up: down a cosine to `final_learning_rate`; constant; or constant and then, over
    the last `decay_share` of the steps, down a line to `final_learning_rate` (WSD, arXiv 2404.06395)."""
    decay_share: float = pydantic.Field(default=0.2, gt=0, le=1)
    """Share of all steps over which `schedule=wsd` lets the rate fall."""
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    """Steps over which the rate rises linearly from 0."""
    weight_decay: float = pydantic.Field(default=0.1, ge=0, le=1000)
    """Decay of matrices; biases, norms and scales have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Decay of the first and second moments."""
    epsilon: float = pydantic.Field(default=1e-6, gt=0, le=1)
    """Term that keeps the denominator from 0."""
    clip_grad_norm: float | None = pydantic.Field(default=None, gt=0)
    """Largest norm of the whole gradient; larger ones are scaled down to it (None: never)."""
    layer_decay: float | None = pydantic.Field(default=None, gt=0, le=1)
    """Factor of the rate from each layer to the one below it (None: one rate for all)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the encoders. auto: bf16 on CUDA and on CPUs with matrix units for it (AMX), else fp32 (faster there). fp16,
    for GPUs without bf16: the loss is scaled up by a factor that follows the gradients (`loss_scale` in the log)."""
    grad_checkpointing: bool = False
    """Compute the towers' activations again in the backward pass instead of keeping them: less memory, more time."""
    attention: Literal["auto", "math", "default"] = "auto"
    """Of the student's training passes. math: plain products; default: torch's fused kernel. auto: the faster one,
    timed before step 0 on a CPU in runs of 100 steps and more; the run's record keeps it."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the student's towers. auto: in runs long enough to pay for it, where it is found to be faster."""
    group_captions: bool = True
    """Captions of like length pass through the text tower together, each group cut to its longest, where the tower
    reads nothing behind the text and is not compiled. Same embeddings up to rounding."""
    deterministic: bool = False
    """Only deterministic kernels, at some cost in speed: the same command gives the same bits."""
    seed: int = pydantic.Field(default=0, ge=0, lt=2**63)
    """Of the starting weights, the order of the data and the views."""
    workers: int = pydantic.Field(default=0, ge=0, le=1024)
    """Processes a rank that decode pictures (0: in the training process)."""
    keep_in_memory: bool = False
    """Decode each picture once per process (small sets that are passed many times)."""
    pixels: Literal["exact", "fast"] = "exact"
    """How training pictures are decoded and resized. exact: open_clip's bits; fast: within rounding of them, in about
    half the time for photographs of 500 pixels. Evaluation and caches are always exact."""
    view: ViewPolicy = ViewPolicy()
    """How `live` views are drawn."""
    views: Literal["auto", "live", "fixed", "stored"] = "auto"
    """live: drawn anew by `view` for a live teacher; fixed: the evaluation view for teacher and student; stored: one of
    the views in the teacher's cache, or of `stored_views` where the image tower is locked. auto: live without a cache;
    with one, stored views if it has any, else fixed."""
    stored_views: int = pydantic.Field(default=8, ge=2, le=255)
    """Views of a picture that are drawn once, by `view`, for views=stored without a teacher."""
    features_folder: Path | None = None
    """Where features of locked towers are kept for other runs (None: computed for this one)."""
    cache_samples: int = pydantic.Field(default=32, ge=0)
    """Embeddings of a cache computed again at every start, where its teacher is on this machine (0: none)."""
    cache_allow_versions: bool = False
    """Use a cache although library versions have changed since it was filled."""
    caption: Literal["random", "first"] = "random"
    """Which of an image's captions a step takes."""
    mask_ratio: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """Share of the student's image patches hidden (masked feature distillation)."""
    freeze: tuple[str, ...] = ()
    """Parameter name patterns of the student that do not train ('visual.*', 'text', ...)."""
    lock_image: Lock = "none"
    """What of the image tower does not train: none, all, or a number: all but its last so many layer groups."""
    lock_text: Lock = "none"
    """The same for the text tower."""
    learning_rate_image: Rate = 1.0
    """Factor of the learning rate of the image tower; the new heads of joined towers keep the full rate."""
    learning_rate_text: Rate = 1.0
    """The same for the text tower."""
    feature_noise: float = pydantic.Field(default=0.0, ge=0, le=10)
    """Deviation of the normal noise that joined towers' heads add to their features (of deviation 1) in training."""
    feature_dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Share of those features, and of the heads' hidden units, that is hidden in training."""
    mean_captions: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Share of the pairs that take the mean of all the image's captions, as features of a locked text tower."""
    other_tower: str = "own"
    """The tower that no term trains. own: the student's; teacher: the teacher's, kept whole beside the one that trains;
    or the name of a model whose tower is kept. auto: own where the student comes with weights, else the teacher's."""
    batch_statistics: Literal["auto", "frozen", "live"] = "auto"
    """Running statistics of batch normalisations. auto: frozen in pretrained image towers that were joined, else live
    (a locked layer's are always frozen)."""
    masks: MaskConfig | None = None
    """Automatic inheritance: trained masks over the student's parts, then pruning (TinyCLIP)."""
    classes: str | None = None
    """Class names for `class_kd`: a classification set, embedded by the teacher's text tower in the templates that fit
    the set, or a file of class vectors (`clipdistill embed MODEL --classes SET --out FILE`)."""
    image_prompts: Literal["auto"] | Annotated[int, pydantic.Field(ge=0, le=1024)] = 0
    """Learnable tokens beside the patches of an image transformer, which train where its weights are locked. auto: 4,
    and none where the image tower has no tokens."""
    prompt_depth: int = pydantic.Field(default=9, ge=1)
    """Blocks, from the first, that have prompts of their own; the later ones go on with those of the last of them."""
    ternary: Literal["none", "image", "text", "both"] = "none"
    """Towers whose trained weight matrices are -1, 0 and 1 times a scale a row in every pass (docs/more-methods.md)."""
    curation: float = pydantic.Field(default=0.0, ge=0, le=0.99)
    """Share of each super-batch left out by what the student has still to learn and its teacher knows (ACID)."""
    neighbours: int | None = pydantic.Field(default=None, ge=2)
    """Size of the groups of a cached teacher's nearest neighbours that batches are made of (None: no groups)."""
    ema_decay: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """Decay of a running average of the student's weights (0.999, say), which is then what is evaluated and saved;
    checkpoints hold both (None: no average)."""
    max_logit_scale: float = pydantic.Field(default=100.0, ge=1, le=LARGEST_SCALE)
    """The learned multiplier of the student's logits is kept at or below this."""
    logit_scale_init: Scale | None = None
    """Start of the student's logit multiplier (None: the model's own)."""
    logit_bias_init: float | None = pydantic.Field(default=None, ge=-LARGEST_SCALE, le=LARGEST_SCALE)
    """Start of the student's logit bias (SigLIP; None: the model's own)."""
    fixed_logit_scale: Scale | None = None
    """Multiplier of teacher and student at every step, instead of the learned ones (TinyCLIP: 50)."""
    teacher_logit_scale: Scale | tuple[Scale, ...] | None = None
    """Multiplier of the teacher (one each for several teachers) instead of its own."""
    teacher_targets: Literal["raw", "centred", "pca", "whitened"] = "raw"
    """What of a cached teacher's rows is taught. centred: the set's mean row of each modality is taken away; pca: then
    the axes of largest variance, as many as the student's embeddings are wide, in the place of a learned projection;
    whitened: these axes scaled to equal variance."""
    bank_samples: int | None = pydantic.Field(default=None, ge=1)
    """Pictures in the bank of a step, drawn by (seed, step), with all their captions and each row's own (None: all)."""
    log_every: int = pydantic.Field(default=10, ge=1)
    """Steps between two lines of the log."""
    evaluate_every: int | None = pydantic.Field(default=None, ge=1)
    """Steps between two points of the validation curve (None: only at the end)."""
    keep_best: CurveMeasure | None = None
    """Measure of the validation curve by which the student is chosen; the last step's is kept beside
    it as `last` (None: the last is the student)."""
    patience: int | None = pydantic.Field(default=None, ge=1)
    """Points of the curve in a row without a better `keep_best` after which the run ends early (None: never)."""
    checkpoint_every: int | None = pydantic.Field(default=None, ge=1)
    """Steps between two checkpoints (None: at the end and when stopped)."""
    keep_checkpoints: int = pydantic.Field(default=2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    max_skipped_steps: int = pydantic.Field(default=3, ge=0)
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""
    rank_timeout: float = pydantic.Field(default=300.0, gt=0, le=10_000_000)
    """Seconds after which the other ranks stop waiting for one that does not answer, and the run ends."""


class EvaluationConfig(Config):
    """What is measured during and after training."""

    protocol: Literal["standard", "first-caption"] = "standard"
    """What counts as found and how ties rank (docs/protocols.md)."""
    batch_size: int = pydantic.Field(default=256, ge=1)
    """Images or captions a forward pass."""
    curve_images: int = pydantic.Field(default=1000, ge=2)
    """At most so many images of the validation set for the curve during training; the final evaluation uses all."""
    zero_shot: tuple[str, ...] = ()
    """Labelled sets to classify at the end."""
    teacher: str | None = None
    """Model measured beside the student at the end; by default the live teacher (a cache has no model to measure)."""


class PreflightConfig(Config):
    """The checks before step 0."""

    enabled: bool = True
    """Check data, teacher and transforms on a sample before step 0."""
    samples: int = pydantic.Field(default=256, ge=8)
    """Pairs the checks look at."""
    allow_weak_teacher: bool = False
    """Go on even when the teacher does not beat chance on the data (a wrong transform, tokenizer or pairing)."""


class RunConfig(Config):
    """Everything a run depends on."""

    recipe: str
    """Name of a shipped recipe or a YAML file of your own."""
    student: str
    """Name of a student or any open_clip architecture; in Python a module too."""
    data: DataConfig
    """The training pairs; a plain name stands for `data.path`."""
    out: Path
    """Folder of the run; a second call with the same settings continues it."""
    name: str | None = None
    """What reports call the run (None: the folder's name)."""
    method: str | None = None
    """What reports and claims call the way of training; by default the recipe's name."""
    teacher: str | tuple[str, ...] | None = None
    """Model to learn from, several for an ensemble, or cache:DIR; None for recipes without one."""
    student_weights: str | None = None
    """Model whose weights the student starts from (None: random)."""
    validation: DataConfig | None = None
    """Pairs measured during and after training (None: nothing is measured)."""
    held_out: HeldOutConfig | None = None
    """A test split whose images must not be trained on; looked for in the training data before step 0."""
    regions: RegionsConfig | None = None
    """Boxes of the training images, for a region teacher (DCLIP)."""
    meta_teacher: MetaTeacherConfig | None = None
    """Train a region teacher on the frozen `teacher` instead of a student."""
    objective: ObjectiveConfig
    """The terms and their weights; see below."""
    train: TrainConfig = TrainConfig()
    """How to train."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured."""
    preflight: PreflightConfig = PreflightConfig()
    """The checks before step 0."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too."""
    wandb: str | None = None
    """Project name on Weights & Biases; None for none."""
    mlflow: str | None = None
    """Name of an MLflow experiment; None for none."""
    callbacks: tuple[str, ...] = ()
    """Registered callbacks by name."""
    plugins: tuple[str, ...] = ()
    """Python files that register what the run names; loaded again when it is continued or evaluated."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps (None: a GPU when there is one)."""

    @pydantic.field_validator("data", "validation", mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        if not isinstance(value, (str, Path, Mapping, DataConfig, type(None))):
            from clipdistill.data.objects import hold as hold_data

            return {"path": hold_data(value)}  # a list, a Dataset, ...: the configuration holds a name for it
        return {"path": str(value)} if isinstance(value, (str, Path)) else value

    @pydantic.field_validator("student", "teacher", mode="before")
    @classmethod
    def _module_name(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        return hold(value, str(info.field_name))  # an nn.Module is as good as a name

    @property
    def run_name(self) -> str:
        return self.name or self.out.name

    @property
    def teachers(self) -> tuple[str, ...]:
        names = () if self.teacher is None else self.teacher
        return split_models(names) if isinstance(names, str) else names

    @property
    def needs_teacher(self) -> bool:
        """Something reads a teacher: a term, or what chooses the batches."""
        return self.objective.needs_teacher or bool(self.train.curation or self.train.neighbours)


def resolve(
    recipe: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    size: str | None = None,
    assignments: Sequence[str] = (),
) -> RunConfig:
    """The run a recipe, the caller's settings and `key=value` assignments describe, in rising order of precedence.

    A bare training setting in an assignment must be written with its section: `train.batch_size=256`.
    Raises InputError for unknown recipes and keys, and for settings that contradict each other or are given twice.
    """
    given = {k: v for k, v in (settings or {}).items() if v is not None}
    values = lay_own(checked_recipe(recipe, size), lay(given, assigned(assignments, given)))
    if "stages" in values:
        raise InputError(
            f"recipe {recipe}: describes a run in stages, and here one run is needed: choose another recipe"
        )
    return resolve_values(values, recipe)


def assigned(assignments: Sequence[str], given: Mapping[str, Any], **by_option: str) -> dict[str, Any]:
    """`key=value` assignments as nested settings. Raises InputError for what an option sets: one would be ignored.

    given: what options set; by_option: what options alone may set, dots as double underscores: train__seed="--seeds".
    """
    values = override({}, assignments)
    agreed(given, values)
    for name, option in {"recipe": "--recipe", **by_option}.items():
        value: Any = values
        for key in name.split("__"):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            raise InputError(f"{name.replace('__', '.')}={value!s:.80}: is not set so, {option} says it: leave it out")
    return values


def lay_own(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's settings over a recipe's. Own data does away with what is said of the built-in set in its place.

    The sizes `debug` and `demo` name built-in data: a run on the caller's own pairs is not to be measured on scenes.
    """
    base = dict(base)
    if _path_of(over.get("data")) and not _built_in(over["data"]) and _built_in(base.get("data")):
        base.pop("data")
        if _built_in(base.get("validation")):
            base.pop("validation")
        evaluation = base.get("evaluation")
        sets = evaluation.get("zero_shot") if isinstance(evaluation, Mapping) else None
        if evaluation and any(map(_built_in, sets if isinstance(sets, list | tuple) else [sets])):
            base["evaluation"] = {key: value for key, value in evaluation.items() if key != "zero_shot"}
    if _path_of(over.get("validation")) and not _built_in(over["validation"]) and _built_in(base.get("validation")):
        base.pop("validation")
    return lay(base, over)


def _path_of(data: Any) -> Any:
    return data.get("path") or ("several sets" if data.get("sets") else None) if isinstance(data, Mapping) else data


def _built_in(data: Any) -> bool:
    path = _path_of(data)
    return isinstance(path, str) and path.partition(":")[0].partition("?")[0] == "scenes"


def checked_recipe(recipe: str | Path, size: str | None) -> dict[str, Any]:
    """`load_recipe` of a file that may come from anywhere: it can name values, and code only if the user does too."""
    values = load_recipe(recipe, size)
    for name in _plugins(values, recipe):
        if not is_loaded(name):
            raise InputError(f"recipe {recipe}: it names the plug-in {name!r}: give it as --plugin if you trust it")
    return values


def _plugins(values: Mapping[str, Any], recipe: str | Path) -> Sequence[str | Path]:
    named = values.get("plugins")
    plugins: Any = [named] if isinstance(named, str | Path) else [] if named is None else named
    if not isinstance(plugins, list | tuple) or not all(isinstance(name, str | Path) for name in plugins):
        raise InputError(f"recipe {recipe}: 'plugins' must be a list of files, found {named!r:.200}")
    return plugins


def resolve_values(values: Mapping[str, Any], recipe: str | Path) -> RunConfig:
    """The run that nested settings describe, `recipe` being where they come from. Raises InputError as `resolve`.

    Plug-ins that the settings name, or that the run in `out` was begun with, are loaded first.
    """
    values = {**values, "recipe": str(recipe)}
    plugins = _plugins(values, recipe)
    if not plugins and isinstance(values.get("out"), (str, Path)):
        plugins = RunFolder(Path(values["out"])).load_plugins()
    for name in plugins:
        load_plugin(name)
    values["plugins"] = [str(Path(name).expanduser().resolve()) for name in plugins]
    if values.get("student_weights") and "student" not in values:  # then it is only what reports call it
        values["student"] = str(values["student_weights"])
    for key, hint in (("student", "--student ViT-T-16"), ("data", "--data captions.json"), ("out", "--out runs/first")):
        if key not in values:
            raise InputError(f"recipe {recipe}: no {key} was named; give one, for example  {hint}")
    config = build(RunConfig, values, f"recipe {recipe}")
    _check(config)
    return config


def read_modalities(config: RunConfig, source: PairSource) -> tuple[str, ...]:
    """What a step reads of its samples: the modalities that some term needs and that (part of) the source has."""
    needed = {modality for each in config.objective.modalities.values() for modality in each}
    there = {"image": source.pictured, "text": source.captioned}
    return tuple(modality for modality, has in there.items() if has and modality in needed)


def check_names(config: RunConfig) -> None:
    """Raise InputError for a student, teacher, checkpoint or data set that cannot be there, before torch is loaded."""
    if config.meta_teacher is None and config.student_weights is None:  # with weights it is what reports call it
        check_student_name(config.student)
    check_teacher_names(config.teachers)
    if config.evaluation.teacher is not None:
        check_model_name(config.evaluation.teacher)
    if config.student_weights is not None:
        check_model_name(config.student_weights)
    check_training(config.data)
    if isinstance(config.validation, DataConfig):
        check_data_name(config.validation.path)
    for name in config.evaluation.zero_shot:
        check_evaluated_name(name)


def _check(config: RunConfig) -> None:
    """Settings that are fine one by one and wrong together."""
    train = config.train
    if (train.epochs is None) == (train.steps is None):
        raise InputError("train: give the length of the run as train.epochs or as train.steps (one of them)")
    if config.objective.needs_teacher and not config.teachers:
        raise InputError(
            f"recipe {config.recipe}: its terms ({', '.join(config.objective.active_terms)}) need a teacher; "
            "name one, for example  --teacher ViT-B-16/laion400m_e32"
        )
    if train.batch_size < config.objective.least_rows:
        raise InputError(
            f"train.batch_size={train.batch_size}: terms of the mix ({', '.join(config.objective.active_terms)}) "
            f"compare the pairs of a batch with each other, which takes at least {config.objective.least_rows}"
        )
    if train.keep_best is not None and (train.evaluate_every is None or config.validation is None):
        raise InputError(
            f"train.keep_best={train.keep_best}: the best is chosen on the curve; give --validation and "
            "train.evaluate_every, the steps between its points"
        )
    if config.needs_teacher and not config.teachers:
        raise InputError("train.curation, train.neighbours: a teacher weighs the pairs, and none is named: --teacher")
    usual = {name: value.default for name, value in TrainConfig.model_fields.items()}
    both = "grad_checkpointing keep_best ternary curation neighbours ema_decay"
    for others, here, names in (
        ("train.masks, which change the model in mid-run", train.masks, f"image_prompts {both}"),
        ("region teachers", config.meta_teacher, f"optimizer precision {both}"),
        ("train.ternary", train.ternary != "none", "keep_best curation neighbours"),
    ):
        for name in names.split() if here else ():
            if getattr(train, name) not in (usual[name], "fp32"):
                raise InputError(f"train.{name}={getattr(train, name)}: not together with {others}: leave one out")
    if config.objective.needs_classes and (train.classes is None or train.teacher_targets != "raw"):
        raise InputError(
            f"recipe {config.recipe}: the term 'class_kd' needs class names, train.classes=SET, or a file of class "
            "vectors, and the teacher's embeddings as they are, train.teacher_targets=raw"
        )
    if train.patience is not None and train.keep_best is None:
        raise InputError("train.patience: say by which measure, for example  train.keep_best=t2i_R@1")
    if train.schedule != "wsd" and train.decay_share != TrainConfig.model_fields["decay_share"].default:
        raise InputError(f"train.decay_share: only for train.schedule=wsd, and this is {train.schedule}")
    if (train.logit_scale_init or 0) > train.max_logit_scale:
        raise InputError(f"train.logit_scale_init={train.logit_scale_init:g}: is above train.max_logit_scale")
    if train.final_learning_rate > train.learning_rate:
        raise InputError("train.final_learning_rate: above train.learning_rate, and the rate only falls")
    cached = is_cached(config.teachers)
    if len(config.teachers) > 1 and not config.objective.accepts_ensemble:
        raise InputError(
            f"recipe {config.recipe}: several teachers are only for the term 'reinforced'; "
            f"name one teacher instead of {len(config.teachers)}"
        )
    if not cached:
        banked = next((name for name in config.objective.active_terms if TERMS.get(name).bank), None)
        wanted = f"the term '{banked}'" if banked else f"train.teacher_targets={train.teacher_targets}"
        if banked or train.teacher_targets != "raw":
            raise InputError(
                f"recipe {config.recipe}: {wanted} needs the teacher's embeddings of the whole training set: "
                "fill a cache with `clipdistill cache` and name it, --teacher cache:DIR"
            )
    if train.masks is not None and train.compile is True:
        raise InputError("train.compile: masks change the model at every step; compile a run without train.masks")
    if train.views == "stored" and not cached and (config.needs_teacher or train.lock_image != "all"):
        raise InputError(
            "train.views=stored: a cache stores views (--teacher cache:DIR); or, without a teacher, features of "
            "a locked image tower (train.lock_image=all)"
        )
    if train.mean_captions and (config.needs_teacher or train.lock_text != "all"):
        raise InputError(
            "train.mean_captions: features of captions are averaged, of a locked text tower (train.lock_text=all) and "
            "without a teacher, which embeds single captions"
        )
    if not cached and isinstance(scales := train.teacher_logit_scale, tuple) and len(scales) != len(config.teachers):
        raise InputError(
            f"train.teacher_logit_scale: {len(scales)} values for {len(config.teachers)} teachers; "
            "give one number, or one for each teacher"
        )
