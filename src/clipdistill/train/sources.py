"""Where a run's data and teacher come from: opened anew for one run, or kept for all runs of one process.

Runs that follow each other on the same data (an ablation, several seeds) need not open, decode and check the same
things again. What is kept is read only, so a run with kept parts gives the same result to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from clipdistill.config import Config, as_dict
from clipdistill.data.open import open_labelled, open_pairs, open_training
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.train.config import RunConfig
from clipdistill.train.teacher import Teacher, open_teacher

if TYPE_CHECKING:
    from clipdistill.data.held_out import HeldOutConfig
    from clipdistill.data.labelled import LabelledSource
    from clipdistill.statistics.scores import Scores


class Sources:
    """Opens everything anew: what a single run uses."""

    def training(self, config: RunConfig) -> PairSource:
        """The training pairs, with decoded pictures kept where `train.keep_in_memory` says so."""
        source = _allowed(open_training(config.data), config.held_out)
        return _kept(source) if config.train.keep_in_memory else source

    def validation(self, config: RunConfig) -> PairSource | None:
        """The pairs of the validation set, if one is named."""
        return None if config.validation is None else open_pairs(config.validation, default_split="val")

    def labelled(self, config: RunConfig) -> list[str | LabelledSource]:
        """The sets of `evaluation.zero_shot`."""
        return list(config.evaluation.zero_shot)

    def teacher(self, config: RunConfig, source: PairSource, device: torch.device) -> Teacher:
        """The teacher, live or cached, checked against the data."""
        return open_teacher(config, source, device)

    def teacher_scores(self, config: RunConfig) -> Scores | None:
        """The teacher's scores on this run's evaluation, where they are known already."""
        return None

    def keep_teacher_scores(self, config: RunConfig, scores: Scores) -> None:
        """Take note of the scores of a run that measured its teacher."""


class SharedSources(Sources):
    """Keeps data, decoded pictures, teacher and the teacher's scores for the runs that follow.

    Pictures are kept while the budget of each set lasts (data.memory.BUDGET) and only without loader workers: each
    worker would keep its own.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Any] = {}

    def training(self, config: RunConfig) -> PairSource:
        return self._pairs(config.data, "train", config, config.held_out)

    def validation(self, config: RunConfig) -> PairSource | None:
        return None if config.validation is None else self._pairs(config.validation, "val", config)

    def labelled(self, config: RunConfig) -> list[str | LabelledSource]:
        found: list[str | LabelledSource] = []
        for name in config.evaluation.zero_shot:
            key = ("labelled", name)
            if key not in self._kept:
                from clipdistill.data.memory import KeptLabelled

                self._kept[key] = KeptLabelled(open_labelled(name))
            found.append(self._kept[key])
        return found

    def teacher(self, config: RunConfig, source: PairSource, device: torch.device) -> Teacher:
        train = config.train
        key = (
            "teacher",
            config.teachers,
            source.fingerprint(),
            str(device),
            train.precision,
            train.views,
            train.caption,
            train.view.random,
            train.fixed_logit_scale,
            train.teacher_logit_scale,
            train.cache_samples,
            train.cache_allow_versions,
            repr(config.regions),
        )
        if key not in self._kept:
            self._kept[key] = super().teacher(config, source, device)
        return self._kept[key]

    def teacher_scores(self, config: RunConfig) -> Scores | None:
        return self._kept.get(self._measured(config))

    def keep_teacher_scores(self, config: RunConfig, scores: Scores) -> None:
        from clipdistill.statistics.scores import Scores

        own = Scores([score for score in scores if score.model == "teacher"])
        if not len(own):
            return
        own.queries = {key: queries for key, queries in scores.queries.items() if key[0] == "teacher"}
        own.notes = [note for note in scores.notes if "of the teacher" in note]
        self._kept[self._measured(config)] = own

    def _pairs(
        self, data: DataConfig, default_split: str, config: RunConfig, held_out: HeldOutConfig | None = None
    ) -> PairSource:
        keep = config.train.keep_in_memory or config.train.workers == 0
        key = ("pairs", _frozen(data), default_split, keep, repr(held_out))
        if key not in self._kept:
            training = default_split == "train"
            opened = open_training(data) if training else open_pairs(data, default_split=default_split)
            source = _allowed(opened, held_out)
            self._kept[key] = _kept(source) if keep else source
        return self._kept[key]

    @staticmethod
    def _measured(config: RunConfig) -> tuple[Any, ...]:
        validation = None if config.validation is None else _frozen(config.validation)
        return ("scores", config.teachers, validation, _frozen(config.evaluation), config.device)


def _allowed(source: PairSource, held_out: HeldOutConfig | None) -> PairSource:
    if held_out is None:
        return source
    from clipdistill.data.held_out import without_held_out

    return without_held_out(source, held_out)


def _kept(source: PairSource) -> PairSource:
    from clipdistill.data.memory import KeptInMemory

    return KeptInMemory(source)


def _frozen(config: Config) -> str:
    return repr(as_dict(config))
