"""Runs the pre-flight before step 0 and prints what it found."""

from __future__ import annotations

import torch

from clipdistill.data.loader import Batch
from clipdistill.errors import InputError
from clipdistill.objective import Embeddings, Objective
from clipdistill.runtime.distributed import is_main, world_size
from clipdistill.runtime.machine import free_memory
from clipdistill.train import preflight
from clipdistill.train.logs import Display
from clipdistill.train.setup import Setup
from clipdistill.train.step import frozen_batch_statistics


def run(setup: Setup, display: Display, explain: bool) -> None:
    """Teacher against chance, truncation rates, memory, the objective; raises InputError when training cannot work."""
    config = setup.config
    display.say(
        f"{config.run_name}: {setup.source.name}, {len(setup.source)} images; student {setup.student.name} "
        f"{setup.student.parameter_counts()['total'] / 1e6:.1f} M parameters"
        + (f"; teacher {setup.teacher.name}" if setup.teacher else "")
        + f"; {setup.total_steps} steps of {config.train.batch_size}"
    )
    for note in setup.teacher.notes if setup.teacher else []:
        display.say(note)
    if setup.source.problems.total:
        display.say(f"left out when opening the data: {setup.source.problems.summary()}")
    batches = _sample(setup)
    _check_teacher(setup, batches, display)
    student_cut, teacher_cut = preflight.truncation(batches)
    display.say(f"captions cut at the context length: student {student_cut:.1%}, teacher {teacher_cut:.1%} of a sample")
    _check_memory(setup, batches[0], display)
    if not explain:
        weights = setup.objective.weights.items()
        terms = " + ".join(term if weight == 1 else f"{weight:g} {term}" for term, weight in weights)
        display.say(f"objective: {terms}   (--explain shows it in symbols)")
        return
    display.say(setup.objective.explain(config.train.batch_size, setup.device, world_size()))
    if is_main():
        _magnitudes(setup, batches, display)


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


def _check_teacher(setup: Setup, batches: list[Batch], display: Display) -> None:
    if setup.teacher is None:
        return
    embeddings = _teacher_embeddings(setup, batches, setup.config.preflight.samples)
    check = preflight.check_teacher(embeddings, embeddings.blocks)
    display.say(
        f"teacher on {check.pairs} training pairs: R@1 text-to-image {check.text_to_image:.1%}, image-to-text "
        f"{check.image_to_text:.1%} (guessing {check.chance:.1%})"
    )
    preflight.require_working_teacher(check, setup.teacher.name, setup.config)


def _check_memory(setup: Setup, batch: Batch, display: Display) -> None:
    config = setup.config.train
    teacher = setup.teacher.model if setup.teacher is not None else None
    estimate = preflight.estimate_memory(
        setup.bare_towers,
        0 if teacher is None else sum(p.numel() for p in teacher.module.parameters()),
        setup.objective,
        batch,
        rows=-(-config.batch_size // world_size()),
        micro_batch=config.micro_batch,
        global_batch=config.batch_size,
        precision=config.precision,
        device=setup.device,
    )
    display.say(estimate.sentence())
    available = free_memory(setup.device)
    if available is not None and estimate.total > available:
        share = max(int(config.batch_size * 0.8 * available / estimate.total), 1)
        display.say(
            f"warning: {available / 1e9:.2f} GB are free; train.micro_batch={share} would encode fewer pairs at a time "
            "and keep the whole batch's negatives"
        )


def _magnitudes(setup: Setup, batches: list[Batch], display: Display) -> None:
    """Each term's value on the first batch, its weighted share, and the size of its gradient at the embeddings."""
    batch = batches[0]
    towers = setup.bare_towers
    with torch.no_grad(), frozen_batch_statistics(towers):
        image, text, scale, bias = towers(batch.student_images.to(setup.device), batch.student_tokens.to(setup.device))
    teacher = None if setup.teacher is None else setup.teacher(batch)
    display.say(f"{'term':<12}{'weight':>10}{'value':>12}{'weighted':>12}{'gradient norm':>16}")
    for name, weight in setup.objective.weights.items():
        images, texts = leaves = image.clone().requires_grad_(), text.clone().requires_grad_()
        alone = one_term(setup, name)
        output = alone(Embeddings(images, texts, scale, logit_bias=bias), teacher)
        gradients = torch.autograd.grad(output.total, leaves, allow_unused=True)
        norm = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
        value = float(output.terms[name])
        display.say(f"{name:<12}{weight:>10.4g}{value:>12.4g}{weight * value:>12.4g}{norm:>16.4g}")


def one_term(setup: Setup, name: str) -> Objective:
    """The objective with one term at weight 1 and the same scales and projections."""
    single = setup.config.objective.model_copy(update={"weights": {name: 1.0}})
    whole = setup.objective
    teachers = None if setup.teacher is None else setup.teacher.blocks
    blocks = teachers if teachers is not None and len(teachers) > 1 else None
    alone = Objective.from_config(single, whole.student_dim, whole.teacher_dim, teacher_blocks=blocks).to(setup.device)
    known = whole.state_dict()
    alone.load_state_dict({key: known[key] for key in alone.state_dict()})
    return alone
