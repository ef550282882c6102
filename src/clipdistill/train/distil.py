"""The task of distilling a student: what the training loop does with the parts of `setup`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from clipdistill.data.loader import Batch
from clipdistill.data.pairs import PairSource, Subset
from clipdistill.models import ClipModel, save_model
from clipdistill.objective import Embeddings, ObjectiveOutput
from clipdistill.runtime.distributed import average_gradients, rank
from clipdistill.runtime.files import digest_of
from clipdistill.train.config import RunConfig
from clipdistill.train.health import Movement
from clipdistill.train.setup import build
from clipdistill.train.sources import Sources
from clipdistill.train.step import Statistics, forward_backward, inputs_of
from clipdistill.train.task import Outcome, Point, Say, Traced


class Distillation:
    """A student learns from a teacher, or from the pairs alone (train.task.Task)."""

    def __init__(self, config: RunConfig, device: torch.device, sources: Sources | None = None, say: Say = print):
        self.config, self.device = config, device
        self.setup = build(config, device, sources)
        self.source = self.setup.source
        self.total_steps, self.steps_per_epoch = self.setup.total_steps, self.setup.steps_per_epoch
        self.validation_name = "" if self.setup.validation is None else self.setup.validation.name
        self._statistics = Statistics(self.setup.student.module)
        pretrained = config.student_weights is not None or config.student.startswith(("towers:", "inherit:"))
        self._movement = Movement(self.setup.student.module, pretrained)
        self._average = self._scale = None
        if config.train.ema_decay is not None:
            from clipdistill.train.average import WeightAverage

            self._average = WeightAverage(self.setup.student.module, config.train.ema_decay)
        if config.train.precision == "fp16":
            from clipdistill.train.loss_scale import LossScale

            self._scale = LossScale().to(device)

    def _evaluated(self) -> AbstractContextManager[object]:
        """Within, the student is the one that is measured and saved."""
        return nullcontext() if self._average is None else self._average.applied()

    @property
    def optimiser(self) -> torch.optim.Optimizer:
        return self.setup.optimiser

    def preflight(self, say: Say, explain: bool, check: Callable[[Embeddings, str], str]) -> None:
        from clipdistill.train.preflight import inspect

        inspect(self.setup, say, explain, check)

    def tune(self, known: dict[str, Any] | None, say: Say) -> dict[str, Any]:
        from clipdistill.train.tune import tune

        return tune(self.setup, known, say)

    def loader(self, start_step: int, steps: int | None = None) -> Iterable[Batch]:
        return self.setup.loader(start_step, steps)

    def before_step(self, step: int) -> str | None:
        masking, said = self.setup.masking, None
        if masking is not None and step >= masking.config.prune_step:
            self.end()
            said = f"pruned at step {step}: {self.setup.student.parameter_counts()['total']:,} parameters"
        self._statistics.keep()
        return said

    def gradients(self, step: int, batch: Batch) -> tuple[ObjectiveOutput, float]:
        setup, train = self.setup, self.config.train
        setup.optimiser.zero_grad(set_to_none=True)
        setup.objective.progress = step / self.total_steps
        if setup.masking is not None:
            setup.masking.masks.draw(train.seed, step)
        output = forward_backward(
            setup.towers,
            setup.objective,
            *inputs_of(batch, self.device),
            None if setup.teacher is None else setup.teacher(batch),
            micro_batch=train.micro_batch,
            precision=train.precision,
            seed=(train.seed, step, rank()),
            attention=setup.attention,
            loss_scale=1.0 if self._scale is None else self._scale.factor,
        )
        average_gradients(setup.objective.parameters())
        if self._scale is not None:
            self._scale.take_out(p for group in setup.optimiser.param_groups for p in group["params"])
        if setup.masking is not None:
            setup.masking.constraint.add_gradients(setup.masking.masks, step)
        # bf16 needs no loss scaling, so the norm is that of the true gradients
        clipped = [p for g in setup.optimiser.param_groups if g.get("clipped", True) for p in g["params"]]
        norm = torch.nn.utils.clip_grad_norm_(clipped, train.clip_grad_norm or math.inf)
        others = [p.grad for g in setup.optimiser.param_groups if not g.get("clipped", True) for p in g["params"]]
        if not all(bool(gradient.isfinite().all()) for gradient in others if gradient is not None):
            return output, math.nan
        return output, float(norm)

    def after_step(self, updated: bool) -> bool:
        expected = self._scale is not None and self._scale.follow(updated)
        if not updated:
            self._statistics.restore()
            return expected
        with torch.no_grad():
            self.setup.student.module.logit_scale.clamp_(0, math.log(self.config.train.max_logit_scale))
        if self.setup.masking is not None:
            self.setup.masking.masks.clamp()
        if self._average is not None:
            self._average.update()
        return expected

    def schedule(self, step: int) -> tuple[int, int, int]:
        train = self.config.train
        if train.masks is None or self.setup.masking is not None:
            return step, self.total_steps, train.warmup_steps
        before = train.masks.prune_step  # after pruning the schedule starts again, without warm-up
        return step - before, self.total_steps - before, 0

    def numbers(self, step: int) -> dict[str, Any]:
        masking = self.setup.masking
        moved = self._movement(self.setup.student.module)
        return {
            "logit_scale": float(self.setup.student.module.logit_scale.detach().float().exp()),
            "scales": self.setup.objective.effective_scales(),
            **({"moved": moved} if moved else {}),
            **({} if self._scale is None else {"loss_scale": float(self._scale.factor)}),
            **({"weights": self.setup.objective.current_weights} if self.config.objective.schedules else {}),
            **({} if masking is None else {"sparsity": masking.log(step)}),
        }

    def evaluate(self) -> Point | None:
        """R@K of the student on at most `evaluation.curve_images` images of the validation set."""
        from clipdistill.embed.encode import encode_pairs
        from clipdistill.evaluate.retrieval import retrieval

        setup, config = self.setup, self.config
        source: PairSource | None = setup.validation
        if source is None:
            return None
        if len(source) > config.evaluation.curve_images:
            source = Subset(source, config.evaluation.curve_images)
        masks: AbstractContextManager[object] = nullcontext()
        if setup.masking is not None:
            masks = setup.masking.masks.acting(sampled=False)
        with masks, self._evaluated():
            captions = "first" if config.evaluation.protocol == "first-caption" else "all"
            encoded = self._by_heads(source, captions) or encode_pairs(
                setup.student,
                source,
                batch_size=config.evaluation.batch_size,
                captions=captions,
                device=self.device,
                workers=config.train.workers,
                progress=False,
            )
        found = retrieval(encoded.image, encoded.text, encoded.text_to_image)
        first = torch.cat([(rows @ encoded.image.T).argmax(1) for rows in encoded.text.split(4096)])  # (texts,)
        share = int(first.bincount().max()) / len(first)
        return Point({name: float(value) for name, value in found.items()}, len(source), round(share, 4))

    def _by_heads(self, source: PairSource, captions: str) -> Any:
        """Its EncodedPairs from the features of locked towers, None where they are not kept."""
        kept = self.setup.features
        return kept and kept.encoded(source, self.setup.student, self.config, self.device, captions)

    def end(self) -> None:
        """Masks that are still there (the run was only as long as they) are pruned: a new, smaller student."""
        if self.setup.masking is not None:
            self.setup.prune()
            self._statistics = Statistics(self.setup.student.module)

    def finish(self, folder: Path, say: Say) -> Outcome:
        with self._evaluated():
            return self._finish(folder, say)

    def _finish(self, folder: Path, say: Say) -> Outcome:
        setup = self.setup
        setup.student.module.eval()
        save_model(setup.student, folder / "student")
        fingerprint = setup.student.fingerprint()
        data: list[Any] = [setup.validation] if setup.validation is not None else []
        data += setup.sources.labelled(self.config)
        if not data:
            return Outcome(None, fingerprint)
        from clipdistill.evaluate.evaluate import evaluate
        from clipdistill.statistics.protocol import captions_rule

        teacher: Any = self.config.evaluation.teacher
        if teacher is None and setup.teacher is not None and len(setup.teacher.blocks) == 1:
            live = setup.teacher.model
            # a teacher from outside may have no text tower, and then no retrieval to measure
            teacher = live if live is not None and hasattr(live.module, "encode_text") else None
        known = None if teacher is None else setup.sources.teacher_scores(self.config)
        say("evaluating the student" + (" and the teacher" if teacher is not None and known is None else ""))
        protocol, rows = self.config.evaluation.protocol, {}
        if (pairs := setup.validation) is not None:
            rows["student", pairs.name] = self._by_heads(pairs, captions_rule(protocol, pairs.name))
        scores = evaluate(
            setup.student,
            data,
            protocol=protocol,
            encoded_pairs={name: encoded for name, encoded in rows.items() if encoded is not None},
            teacher=teacher if known is None else None,
            batch_size=self.config.evaluation.batch_size,
            device=self.device,
            progress=False,
        )
        if known is None:
            setup.sources.keep_teacher_scores(self.config, scores)
        else:
            scores.add(known)
        return Outcome(scores, fingerprint)

    def checkpoint(self) -> tuple[ClipModel | None, Mapping[str, torch.nn.Module]]:
        modules: dict[str, torch.nn.Module] = {"objective": self.setup.objective}
        if self.setup.masking is not None:
            modules["masks"] = self.setup.masking.state()
        if self._average is not None:
            modules["average"] = self._average
        if self._scale is not None:
            modules["loss_scale"] = self._scale
        return self.setup.student, modules

    def resume(self, folder: Path, files: Iterable[str]) -> None:
        if self.setup.masking is not None and "masks.safetensors" not in set(files):
            from clipdistill.models.save import read_model

            self.setup.replace_student(read_model(folder / "student"))
            self._statistics = Statistics(self.setup.student.module)

    def identity(self) -> dict[str, str]:
        setup = self.setup
        found = {"training data": setup.source.fingerprint(), "starting student": setup.initial}
        if setup.validation is not None:
            found["validation data"] = setup.validation.fingerprint()
        if setup.teacher is not None:
            found["teacher"] = setup.teacher.fingerprint
        found["tokenizer"] = digest_of(setup.student.tokenizer.to_dict())
        return found

    def facts(self) -> dict[str, Any]:
        setup = self.setup
        model = None if setup.teacher is None else setup.teacher.model
        return {
            "teacher": None if setup.teacher is None else setup.teacher.name,
            "student": self.config.student,
            "validation": None if setup.validation is None else setup.validation.name,
            "dtype": self.config.train.precision,
            "parameters": setup.student.parameter_counts(),
            "teacher_parameters": None if model is None else model.parameter_counts(),
            "initial_weights": setup.initial,
            **(
                {}
                if self._average is None
                else {"averaged": {"decay": self._average.decay, "updates": int(self._average.updates)}}
            ),
        }

    def trace(self, step: int, batch: Batch, precision: str) -> Iterator[Traced]:
        from clipdistill.train.trace import trace

        self.setup.objective.progress = step / self.total_steps
        return trace(self.setup, step, batch, precision)
