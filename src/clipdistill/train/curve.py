"""The quick retrieval score drawn as a curve during training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from clipdistill.data.pairs import PairSource
from clipdistill.data.subset import Subset
from clipdistill.evaluate.encode import encode_pairs
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models.parameters import hold_frozen_statistics
from clipdistill.train.setup import Setup


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
