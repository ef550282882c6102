"""The checks before step 0: does the teacher fit the data, how much is cut, will it fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from clipdistill.data.loader import Batch
from clipdistill.data.sampler import pairs_a_step
from clipdistill.errors import InputError
from clipdistill.objective import Embeddings, Objective
from clipdistill.objective.term import MODALITIES
from clipdistill.runtime.distributed import is_main, world_size
from clipdistill.runtime.machine import free_memory
from clipdistill.train.config import RunConfig
from clipdistill.train.setup import Setup, one_term
from clipdistill.train.step import Towers, autocast, frozen_batch_statistics, inputs_of
from clipdistill.train.task import Say


def inspect(setup: Setup, say: Say, explain: bool, check: Callable[[Embeddings, str], str]) -> None:
    """Teacher against chance, truncation rates, memory, the objective; raises InputError when training cannot work."""
    config = setup.config
    rows = pairs_a_step(setup.source, config.train.batch_size)
    say(
        f"{config.run_name}: {setup.source.name}, {len(setup.source)} images; student {setup.student.name} "
        f"{setup.student.parameter_counts()['total'] / 1e6:.1f} M parameters"
        + (f"; teacher {setup.teacher.name}" if setup.teacher else "")
        + f"; {setup.total_steps} steps of {rows}"
    )
    parameters = list(setup.student.module.parameters())
    total, trained = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
    layers = [m for m in setup.student.module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    still = sum(not layer.training for layer in layers)
    if trained < total or still:
        say(
            f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters train"
            + (f"; {still} of {len(layers)} batch normalisations keep their statistics" if still else "")
        )
    if trained < 4:
        say("warning: nothing but the logit scale trains: unlock something (train.lock_image, train.lock_text)")
    named = config.student_weights or config.student.startswith(("towers:", "inherit:"))
    if len(setup.modalities) == 1 and config.train.other_tower == "own" and not named:
        other = "text" if setup.modalities[0] == "image" else "image"
        say(
            f"warning: the {other} tower has random weights and no term trains it: train.other_tower=teacher keeps "
            "the teacher's in its place"
        )
    if len(setup.modalities) == 1 and getattr(setup.objective, f"{setup.modalities[0]}_projection") is not None:
        say(
            f"warning: the {setup.modalities[0]} tower learns through a new linear map into the teacher's width, so "
            "nothing holds it to the student's other tower: train.other_tower=teacher gives one that fits"
        )
    group, train = setup.optimiser.param_groups[0], config.train
    applied = (("betas", tuple(group.get("betas") or ()), train.betas), ("epsilon", group.get("eps"), train.epsilon))
    if idle := [f"train.{name}" for name, there, asked in applied if there != asked]:
        say(f"train.optimizer={train.optimizer} has no use for {' and '.join(idle)}")
    if setup.features is not None:
        say(setup.features.sentence())
    if config.teachers and setup.teacher is None:
        say(f"no term reads a teacher: {', '.join(config.teachers)} teaches nothing and gives its vocabulary at most")
    for note in setup.teacher.notes if setup.teacher else []:
        say(note)
    sets, batch = getattr(setup.source, "sets", [setup.source]), config.train.batch_size
    weights = getattr(setup.source, "weights", [1.0])
    for own, weight in zip(sets, weights):
        if len(own) < batch:
            say(f"warning: {own.name} has {len(own)} samples, so its batches have no more, instead of {batch}")
        if setup.total_steps * weight < sum(weights) / 2:
            say(f"warning: {own.name} has so small a weight that none of {setup.total_steps} steps is its turn")
    batches = _sample(setup)
    pairs = [batch for batch in batches if None not in (batch.student_images, batch.student_tokens)]
    if setup.teacher is not None and pairs:
        say(check(_teacher_embeddings(setup, pairs, config.preflight.samples), setup.teacher.name))
    elif setup.teacher is not None:
        say("no pairs are read, so the teacher is not measured on them")
    if any(batch.captions for batch in batches):
        student_cut, teacher_cut = truncation(batches)
        theirs = f", teacher {teacher_cut:.1%}" if setup.teacher else ""
        say(f"captions cut at the context length: student {student_cut:.1%}{theirs} of a sample")
    own = setup.validation
    if own is not None and len(own) == len(setup.source) and own.fingerprint() == setup.source.fingerprint():
        say("warning: validation has the very pairs that are trained on: its scores say nothing of new pictures")
    _check_memory(setup, batches[0], rows, say)
    if not explain:
        weights = setup.objective.weights.items()
        terms = " + ".join(term if weight == 1 else f"{weight:g} {term}" for term, weight in weights)
        say(f"objective: {terms}   (--explain shows it in symbols)")
        return
    say(setup.objective.explain(rows, setup.device, world_size()))
    if is_main():
        _magnitudes(setup, batches, say)


def check_teacher(config: RunConfig, teacher: Embeddings, name: str) -> str:
    """How a teacher retrieves among distinct pairs, rows (N, D); an ensemble is judged by its first member.

    Raises InputError when it is no better than guessing and the user did not allow that.
    """
    from clipdistill.evaluate.retrieval import retrieval

    size, pairs = (teacher.blocks or (teacher.image.shape[1],))[0], len(teacher.image)
    scores = retrieval(teacher.image[:, :size].cpu(), teacher.text[:, :size].cpu(), torch.arange(pairs), ks=(1,))
    to_image, to_text, chance = scores["t2i_R@1"], scores["i2t_R@1"], 1.0 / pairs
    # three standard errors above guessing, so that a coin cannot pass
    limit = chance + 3 * (chance * (1 - chance) / pairs) ** 0.5
    if max(to_image, to_text) <= limit and not config.preflight.allow_weak_teacher:
        raise InputError(
            f"teacher '{name}' finds the right image for {to_image:.1%} of {pairs} captions of "
            f"'{config.data.path}' (guessing: {chance:.1%}): check that captions belong to their images and that "
            "the teacher's weights are loaded, or set preflight.allow_weak_teacher=true"
        )
    return (
        f"teacher on {pairs} training pairs: R@1 text-to-image {to_image:.1%}, image-to-text {to_text:.1%} "
        f"(guessing {chance:.1%})"
    )


def _sample(setup: Setup) -> list[Batch]:
    """The first batches of the run, at least `preflight.samples` pairs where the data has as many."""
    wanted = min(setup.config.preflight.samples, len(setup.source))
    batches: list[Batch] = []
    rows = 0
    steps = max(-(-wanted // setup.config.train.batch_size), 1)
    for batch in setup.loader(0, min(steps, setup.total_steps)):
        batches.append(batch)
        rows += len(batch.keys)
    if rows < 2:
        raise InputError(f"data '{setup.config.data.path}': none of the first {wanted} samples could be used")
    return batches


def _teacher_embeddings(setup: Setup, batches: list[Batch], limit: int) -> Embeddings:
    assert setup.teacher is not None
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for batch in batches:
        output = setup.teacher(batch)
        for index, image, text in zip(batch.indices.tolist(), output.image, output.text, strict=True):
            seen.setdefault(index, (image, text))  # a small set is passed more than once: an image counts once
    rows = list(seen.values())[:limit]
    images, texts = (torch.stack([row[i] for row in rows]) for i in (0, 1))
    return Embeddings(images, texts, output.logit_scale, blocks=output.blocks)


def _check_memory(setup: Setup, batch: Batch, rows: int, say: Say) -> None:
    config = setup.config.train
    teacher = setup.teacher.model if setup.teacher is not None else None
    estimate = estimate_memory(
        setup.bare_towers,
        0 if teacher is None else sum(p.numel() for p in teacher.module.parameters()),
        setup.objective,
        batch,
        rows=-(-rows // world_size()),
        micro_batch=config.micro_batch,
        global_batch=rows,
        precision=config.precision,
        device=setup.device,
    )
    say(estimate.sentence())
    available = free_memory(setup.device)
    if available is not None and estimate.total > available:
        share = max(int(rows * 0.8 * available / estimate.total), 1)
        say(
            f"warning: {available / 1e9:.2f} GB are free; train.micro_batch={share} would encode fewer pairs at a time "
            "and keep the whole batch's negatives"
        )


def _magnitudes(setup: Setup, batches: list[Batch], say: Say) -> None:
    """Each term's value on the first batch, its weighted share, and the size of its gradient at the embeddings."""
    batch = batches[0]
    towers = setup.bare_towers
    with torch.no_grad(), frozen_batch_statistics(towers):
        *encoded, scale, bias = towers(*inputs_of(batch, setup.device))
    there = {modality: rows for modality, rows in zip(MODALITIES, encoded) if rows is not None}
    teacher = None if setup.teacher is None else setup.teacher(batch)
    say(f"{'term':<12}{'weight':>10}{'value':>12}{'weighted':>12}{'gradient norm':>16}")
    for name, weight in setup.objective.weights.items():
        if not {*setup.config.objective.modalities[name]} <= {*there}:
            continue
        leaves = {modality: rows.clone().requires_grad_() for modality, rows in there.items()}
        alone = one_term(setup, name)
        student = Embeddings(leaves.get("image"), leaves.get("text"), scale, logit_bias=bias)  # type: ignore[arg-type]
        output = alone(student, teacher)
        gradients = torch.autograd.grad(output.total, list(leaves.values()), allow_unused=True)
        norm = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
        value = float(output.terms[name])
        say(f"{name:<12}{weight:>10.4g}{value:>12.4g}{weight * value:>12.4g}{norm:>16.4g}")


def truncation(batches: list[Batch]) -> tuple[float, float]:
    """Share of captions cut by the student's and the teacher's context length."""
    captions = max(sum(len(b.keys) for b in batches), 1)
    student = sum(b.truncated_student for b in batches) / captions
    return student, sum(b.truncated_teacher for b in batches) / captions


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes one rank will need, by part."""

    weights: int
    optimiser: int
    activations: int
    teacher: int
    objective: int

    @property
    def total(self) -> int:
        return self.weights + self.optimiser + self.activations + self.teacher + self.objective

    def sentence(self) -> str:
        parts = {
            "weights and gradients": self.weights,
            "optimiser": self.optimiser,
            "activations": self.activations,
            "teacher": self.teacher,
            "objective": self.objective,
        }
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        return f"memory: about {self.total / 1e9:.2f} GB a rank ({listed})"


def estimate_memory(
    towers: Towers,
    teacher_parameters: int,
    objective: Objective,
    batch: Batch,
    *,
    rows: int,
    micro_batch: int | None,
    global_batch: int,
    precision: str,
    device: torch.device,
) -> MemoryEstimate:
    """Activations are measured on two samples (bytes that autograd saves) and scaled; the rest is counted."""
    parameters = sum(p.numel() for p in towers.parameters())
    trained = sum(p.numel() for p in towers.parameters() if p.requires_grad)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    known = {p.untyped_storage().data_ptr() for p in towers.parameters()}
    inputs = [None if given is None else given[:2] for given in inputs_of(batch, device)]
    kept = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with kept, frozen_batch_statistics(towers), autocast(device, precision):
        towers(*inputs)
    per_sample = sum(size for pointer, size in saved.items() if pointer not in known) / max(len(batch.keys[:2]), 1)
    encoded = min(rows, micro_batch or rows)
    return MemoryEstimate(
        weights=4 * (parameters + trained),
        optimiser=8 * trained,
        activations=int(per_sample * encoded),
        teacher=4 * teacher_parameters,
        objective=objective.estimate_bytes(global_batch, device, world_size()),
    )
