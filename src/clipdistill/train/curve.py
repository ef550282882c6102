"""The quick retrieval score drawn as a curve during training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from clipdistill.data.pairs import PairSource, Subset
from clipdistill.embed.encode import encode_pairs
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models.parameters import hold_frozen_statistics
from clipdistill.train.logs import read_lines
from clipdistill.train.setup import Setup

_POINTS = 3
"""Points of the curve in a row that must be at chance before that is said."""


def curve_scores(setup: Setup) -> dict[str, float]:
    """R@K of the student on at most `evaluation.curve_images` images of the validation set."""
    assert setup.validation is not None
    config = setup.config
    source: PairSource = setup.validation
    if len(source) > config.evaluation.curve_images:
        source = Subset(source, config.evaluation.curve_images)
    training = setup.student.module.training
    setup.student.module.eval()
    masks: AbstractContextManager[object] = nullcontext()
    if setup.masking is not None:
        masks = setup.masking.masks.acting(sampled=False)
    try:
        with masks:
            encoded = encode_pairs(
                setup.student,
                source,
                batch_size=config.evaluation.batch_size,
                captions="first" if config.evaluation.protocol == "first-caption" else "all",
                device=setup.device,
                workers=config.train.workers,
                progress=False,
            )
    finally:
        hold_frozen_statistics(setup.student.module.train(training))
    return {k: float(v) for k, v in retrieval(encoded.image, encoded.text, encoded.text_to_image).items()}


def warning_of_chance(setup: Setup, folder: Path, step: int) -> str | None:
    """A sentence when the last points of the curve, all after the warm-up, are no better than guessing."""
    assert setup.validation is not None
    lines = [line for line in read_lines(folder / "eval.jsonl") if line["step"] > setup.config.train.warmup_steps]
    images = min(len(setup.validation), setup.config.evaluation.curve_images)
    chance = 1 / images
    limit = chance + 3 * (chance * (1 - chance) / images) ** 0.5  # a coin stays below three standard errors
    last = [line["scores"]["t2i_R@1"] for line in lines[-_POINTS:]]
    if len(last) < _POINTS or max(last) > limit:
        return None
    scale = float(setup.student.module.logit_scale.detach().float().exp())
    return (
        f"warning: R@1 has been at chance ({chance:.2%}) for {_POINTS} evaluations up to step {step} (logit scale "
        f"{scale:.3g}, limit {setup.config.train.max_logit_scale:g}): the student may have collapsed; "
        "try a lower train.learning_rate, more train.warmup_steps or another seed"
    )
