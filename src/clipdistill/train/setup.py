"""Everything a run needs before its first step, built from the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipdistill.cache.names import is_cached
from clipdistill.data.loader import Batch, PairLoader
from clipdistill.data.pairs import PairSource
from clipdistill.data.sampler import steps_per_epoch
from clipdistill.data.views import ViewPolicy
from clipdistill.errors import InputError
from clipdistill.models import ClipModel, build_student, load_model
from clipdistill.models.known import needs_vocabulary
from clipdistill.models.own import takes_tokenizer
from clipdistill.models.parameters import (
    checkpoint_gradients,
    freeze,
    freeze_statistics,
    hold_frozen_statistics,
    is_joined,
    lock,
    parameter_groups,
)
from clipdistill.objective import Objective
from clipdistill.objective.term import MODALITIES
from clipdistill.registry import INHERITANCE, needed_wing, wing
from clipdistill.runtime.distributed import broadcast_module, rank, world_size
from clipdistill.train.config import RunConfig, TrainConfig, read_modalities
from clipdistill.train.sources import Sources
from clipdistill.train.step import Towers, settle_buckets
from clipdistill.train.teacher import Teacher, prepare_teacher


@dataclass
class Setup:
    """The parts of a run, on their device."""

    config: RunConfig
    device: torch.device
    source: PairSource
    validation: PairSource | None
    student: ClipModel
    teacher: Teacher | None
    objective: Objective
    towers: nn.Module
    optimiser: torch.optim.Optimizer
    total_steps: int
    steps_per_epoch: int
    sources: Sources
    initial: str
    """Fingerprint of the student before its first step: runs that start alike can be told."""
    masking: Any = None
    """Masks over the student's parts until they are pruned (models.inheritance.masks.Masking), or None."""
    attention: str = "default"
    """Of the student's training passes (train.step.attention_by)."""
    features: Any = None
    """Of locked towers (train.features.LockedFeatures), where they stay the same through the run."""

    @property
    def bare_towers(self) -> Towers:
        wrapped = self.towers.module if isinstance(self.towers, DistributedDataParallel) else self.towers
        assert isinstance(wrapped, Towers)
        return wrapped

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a step reads."""
        return read_modalities(self.config, self.source)

    def loader(self, start_step: int, steps: int | None = None) -> Iterable[Batch]:
        """Batches of this rank from optimiser step `start_step` on."""
        train = self.config.train
        if self.features is not None:
            last = self.total_steps if steps is None else steps
            return self.features.loader(self.source, self.student, self.config, self.teacher, start_step, last)
        return PairLoader(
            self.source,
            batch_size=train.batch_size,
            student=self.student,
            teacher=None if self.teacher is None else self.teacher.model,
            stored=None if self.teacher is None else self.teacher.stored,
            modalities=self.modalities,
            view=ViewPolicy() if train.views == "fixed" else train.view,
            caption=train.caption,
            exact=train.pixels == "exact",
            seed=train.seed,
            rank=rank(),
            world=world_size(),
            workers=train.workers,
            start_step=start_step,
            steps=self.total_steps if steps is None else steps,
            device=self.device,
        )

    def prune(self) -> None:
        """Go on with the smaller model that the masks leave, and a new optimiser."""
        assert self.masking is not None
        self.replace_student(INHERITANCE.get("prune")(self.student, self.masking.masks))

    def replace_student(self, student: ClipModel) -> None:
        self.student, self.masking = student, None
        self.towers = _make_trainable(student, self.config, self.device, None, self.source)
        self.optimiser = build_optimiser(student.module, self.objective, self.config.train)


def build(config: RunConfig, device: torch.device, sources: Sources | None = None) -> Setup:
    """Open the data, load teacher and student, make objective and optimiser. Raises InputError for unusable input.

    sources: where data and teacher are taken from (default: opened for this run).
    """
    train = config.train
    sources = sources or Sources()
    source = sources.training(config)
    for own in getattr(source, "sets", [source]):
        if len(own) < 2:
            raise InputError(
                f"data '{config.data.path or own.name}': {len(own)} usable pairs; training needs at least 2"
            )
    if not (source.captioned and source.pictured) or source.uneven:
        require_terms = wing("clipdistill.data.mixture.opening:require_terms")
        if require_terms is not None:
            require_terms(config.objective.modalities, source)
    validation = sources.validation(config)
    teacher: Teacher | None = None
    if config.needs_teacher:
        teacher = sources.teacher(config, source, device)
    student = _student(config, source, teacher, sources, device)
    teacher = prepare_teacher(teacher, config, source, student.embed_dim)
    initial = student.fingerprint()
    per_epoch = steps_per_epoch(len(source), train.batch_size)
    total = train.steps if train.steps is not None else max(round((train.epochs or 0) * per_epoch), 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        objective = Objective.from_config(
            config.objective,
            student.embed_dim,
            student.embed_dim if teacher is None else sum(teacher.blocks),
            teacher_blocks=None if teacher is None or len(teacher.blocks) == 1 else teacher.blocks,
        )
    objective.to(device)
    masking = None
    if train.masks is not None:
        student, masking = INHERITANCE.get("masks")(student, train.masks, _mask_reference(config, teacher), device)
    towers = _make_trainable(student, config, device, masking, source)
    keep = wing("clipdistill.train.features:features_of_locked_towers") if train.lock_image == "all" else None
    features = None if keep is None else keep(student, source, config, device, teacher)
    if features is None and (train.mean_captions or (teacher is None and train.views == "stored")):
        raise InputError(
            "train.views=stored without a cache, and train.mean_captions: features are kept for them, which takes "
            "joined towers, locked (train.lock_image=all), views that are known beforehand and at most 4 GB"
        )
    broadcast_module(objective)
    groups = () if masking is None else masking.parameter_groups()
    optimiser = build_optimiser(student.module, objective, train, groups)
    return Setup(
        config,
        device,
        source,
        validation,
        student,
        teacher,
        objective,
        towers,
        optimiser,
        total,
        per_epoch,
        sources,
        initial,
        masking,
        features=features,
    )


def _make_trainable(
    student: ClipModel, config: RunConfig, device: torch.device, masking: Any, source: PairSource
) -> nn.Module:
    """The student's towers as the loop calls them: frozen where asked, on the device, the same on every rank."""
    train, module, modalities = config.train, student.module, read_modalities(config, source)
    freeze(module, train.freeze)
    for tower, wanted in (("image", train.lock_image), ("text", train.lock_text)):
        if wanted != "none":
            lock(module, tower, 0 if wanted == "all" else wanted)
    if train.image_prompts:
        wing("clipdistill.models.prompts:unlock_prompts")(module)
    # a tower that no step reads stays as it is
    freeze(module, [tower for tower in MODALITIES if tower not in modalities and hasattr(module, "visual")])
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError("train.lock_image and train.lock_text: nothing is left to train: unlock some groups")
    if statistics_frozen(student, train):
        freeze_statistics(module)
    if train.feature_noise or train.feature_dropout:
        if not is_joined(module):
            raise InputError("train.feature_noise, train.feature_dropout: only joined towers have heads for them")
        for tower in (module.visual, module.text):
            tower.head.noise, tower.head.dropout = train.feature_noise, train.feature_dropout
    hold_frozen_statistics(module.to(device).train())
    if train.grad_checkpointing:
        checkpoint_gradients(module)
    masks = None if masking is None else masking.masks
    grouped = train.group_captions and student.reads_only_text
    towers: nn.Module = Towers(module, train.fixed_logit_scale, train.mask_ratio, masks, grouped)
    broadcast_module(towers)
    if world_size() > 1:
        if masking is not None:
            masking.masks.draw(train.seed, 0)
        devices = [device] if device.type == "cuda" else None
        towers = DistributedDataParallel(towers, device_ids=devices, find_unused_parameters=source.uneven)
        images = torch.zeros(2, 3, student.image.size, student.image.size, device=device)
        tokens = student.tokenizer(["a"] * 2).to(device)
        settle_buckets(towers, images if "image" in modalities else None, tokens if "text" in modalities else None)
    return towers


def statistics_frozen(student: ClipModel, train: TrainConfig) -> bool:
    """Whether the student's batch normalisations keep their running statistics (train.batch_statistics)."""
    towers = student.architecture.get("towers")
    return train.batch_statistics == "frozen" or (
        train.batch_statistics == "auto" and towers is not None and bool(towers["image"]["pretrained"])
    )


def _mask_reference(config: RunConfig, teacher: Teacher | None) -> ClipModel | None:
    """The model whose size is 100 % for the masks; None: the student's own at the start."""
    assert config.train.masks is not None
    name = config.train.masks.reference
    if name is None:
        return None
    if name != "teacher":
        return load_model(name)
    return _teacher_model(config, teacher, "train.masks.reference=teacher")


def _teacher_model(config: RunConfig, teacher: Teacher | None, what: str) -> ClipModel:
    """The one model behind the run's teacher. Raises InputError when there is none, or several."""
    if teacher is not None and teacher.model is not None and len(teacher.blocks) == 1:
        return teacher.model
    if teacher is None and len(config.teachers) == 1 and not is_cached(config.teachers):
        return load_model(config.teachers[0])
    raise InputError(f"{what}: this run has no single teacher model at hand to take it from")


def _student(
    config: RunConfig, source: PairSource, teacher: Teacher | None, sources: Sources, device: torch.device
) -> ClipModel:
    """The student: a named architecture under the run's seed, or given weights to go on from."""
    train = config.train
    if config.student_weights is not None:
        student = load_model(config.student_weights)
    elif config.student.startswith("towers:"):
        student = load_model(config.student, seed=train.seed)
    elif config.student.startswith("inherit:"):
        from clipdistill.models.inherited import parse

        wanted = parse(config.student)
        if wanted.source is not None:
            larger = load_model(wanted.source)
        else:
            larger = _teacher_model(config, teacher, f"student '{config.student}' without ,from=MODEL")
        student = INHERITANCE.get("cut")(larger, wanted, seed=train.seed)
    else:
        # a student whose vocabulary is made from words shares the teacher's, so that both read the same captions; also
        # that of a teacher which is named and not used, so that a run without distillation starts like one with it
        shared = None
        wants_words = needs_vocabulary(config.student) or takes_tokenizer(config.student)
        if wants_words and config.teachers and not source.parallel:  # another language has words of its own
            shared = (teacher or sources.teacher(config, source, device)).tokenizer
        student = build_student(
            config.student,
            seed=train.seed,
            tokenizer=shared,
            captions=(caption for i in range(len(source)) for caption in source.captions(i))
            if source.captioned
            else ["a picture"],
        )
    if train.image_prompts:
        student = needed_wing("clipdistill.models.prompts:with_prompts", "train.image_prompts is")(
            student, train.image_prompts, train.prompt_depth, seed=train.seed
        )
    student = _with_other_tower(student, config, source, teacher)
    with torch.no_grad():
        if train.logit_scale_init is not None:
            student.module.logit_scale.fill_(torch.tensor(train.logit_scale_init).log())
        if train.logit_bias_init is not None:
            if getattr(student.module, "logit_bias", None) is None:
                student.module.logit_bias = nn.Parameter(torch.zeros(()))
            student.module.logit_bias.fill_(train.logit_bias_init)
    return student


def _with_other_tower(student: ClipModel, config: RunConfig, source: PairSource, teacher: Teacher | None) -> ClipModel:
    """The student with the tower that no term trains taken from where train.other_tower says."""
    asked, read = config.train.other_tower, read_modalities(config, source)
    weights = config.student_weights is not None or config.student.startswith("towers:")
    if asked == "own" or (asked == "auto" and weights):
        return student
    if len(read) != 1:
        raise InputError(f"train.other_tower={asked}: the terms of the mix train both towers, so there is no other one")
    if asked in ("auto", "teacher"):
        names = (teacher.name,) if teacher is not None and is_cached(config.teachers) else config.teachers
        if len(names) != 1 or " + " in names[0]:
            raise InputError(f"train.other_tower={asked}: there is no single teacher to take it from: name a model")
        asked = names[0]
    from clipdistill.models.towers.read import read_towers

    parts = {"student": student, "other": load_model(asked)}  # read anew: a model that gives a tower away is of no use
    kinds = ("clip:student", "whole:other") if read == ("image",) else ("whole:other", "clip:student")
    name = "towers:image={},text={},head=linear".format(*kinds)
    made = read_towers(name, lambda part: parts[part], seed=config.train.seed)
    made.architecture["towers"]["image"]["pretrained"] = weights or read == ("text",)
    made.name = f"{student.name} and the other tower of {asked}"
    return made


def build_optimiser(
    module: nn.Module, objective: Objective, config: TrainConfig, extra: Sequence[dict[str, Any]] = ()
) -> torch.optim.Optimizer:
    """The optimiser of `train.optimizer` over the student and the objective's own parameters.

    Biases, norms, scales and other vectors are not decayed; projections are. (The released CLIP-KD and CLIP-RD codes
    leave the objective's parameters at AdamW's default decay of 0.01, scales included.) `extra` groups come last; they
    may say "scheduled": False to keep their rate, and "clipped": False to stay out of gradient clipping.
    """
    groups: list[dict[str, Any]] = parameter_groups(
        module,
        weight_decay=config.weight_decay,
        learning_rate=config.learning_rate,
        layer_decay=config.layer_decay,
        tower_rates={"image": config.learning_rate_image, "text": config.learning_rate_text},
    )
    for group in objective.parameter_groups(weight_decay=config.weight_decay):
        groups.append({"lr": config.learning_rate, **group})
    groups += [dict(group) for group in extra]
    for group in groups:
        group["initial_lr"] = group.get("lr", config.learning_rate)
    if config.optimizer != "adamw":
        return _timm_optimiser(groups, config)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    # one pass over memory instead of ten: a sixth of the time of torch's default on a CPU
    fused = devices <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=fused)


def _timm_optimiser(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_info

    info = get_optimizer_info(config.optimizer)
    taken: dict[str, Any] = {"eps": config.epsilon} if info.has_eps else {}
    if info.has_betas and info.num_betas == 2:  # Adan's three have another meaning
        taken["betas"] = config.betas
    if config.optimizer.startswith("lamb"):
        taken["max_grad_norm"] = None  # train.clip_grad_norm says
    made: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay, **taken
    )
    return made


def one_term(setup: Setup, name: str) -> Objective:
    """The objective with one term at weight 1 and the same scales and projections."""
    single = setup.config.objective.model_copy(update={"weights": {name: 1.0}, "schedules": {}})
    whole = setup.objective
    teachers = None if setup.teacher is None else setup.teacher.blocks
    blocks = teachers if teachers is not None and len(teachers) > 1 else None
    alone = Objective.from_config(single, whole.student_dim, whole.teacher_dim, teacher_blocks=blocks).to(setup.device)
    known = whole.state_dict()
    alone.load_state_dict({key: known[key] for key in alone.state_dict()})
    return alone
