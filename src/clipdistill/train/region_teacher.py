"""The task of training a region teacher (DCLIP's meta-teacher): a small network on the regions of a frozen CLIP."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.data.loader import Batch
from clipdistill.data.sampler import steps_per_epoch
from clipdistill.models import ClipModel
from clipdistill.models.clip_model import hash_tensors
from clipdistill.models.parameters import decays
from clipdistill.objective import Embeddings, Objective, ObjectiveOutput
from clipdistill.regions.task import MEASURED, build_task, check_settings
from clipdistill.runtime.distributed import average_gradients, broadcast_module, is_main, on_main, rank, world_size
from clipdistill.runtime.files import write_json
from clipdistill.train.config import RunConfig
from clipdistill.train.sources import Sources
from clipdistill.train.task import Outcome, Point, Say, Traced


class RegionTeaching:
    """The network learns to fuse region and token embeddings (train.task.Task)."""

    def __init__(self, config: RunConfig, device: torch.device, sources: Sources | None = None, say: Say = print):
        import hashlib

        check_settings(config.teachers, config.regions, config.objective)
        assert config.meta_teacher is not None
        assert config.regions is not None
        self.config, self.device = config, device
        train, sources = config.train, sources or Sources()
        pairs, validation = sources.training(config), sources.validation(config)

        def parts() -> Any:
            assert config.meta_teacher is not None
            assert config.regions is not None
            return build_task(
                config.teachers[0],
                config.meta_teacher,
                config.regions,
                pairs,
                validation,
                config.out,
                device,
                batch_size=train.batch_size,
                seed=train.seed,
                caption=train.caption,
                fixed_logit_scale=train.fixed_logit_scale,
                rank=rank(),
                world=world_size(),
                say=say if is_main() else lambda _: None,
            )

        made = on_main(parts, train.rank_timeout)  # the others find boxes and embeddings made
        self.parts = parts() if made is None else made
        self.source = self.parts.source
        per_epoch = steps_per_epoch(len(self.source), train.batch_size)
        self.steps_per_epoch = self.parts.sampler.steps_per_epoch
        self.total_steps = train.steps if train.steps is not None else max(round((train.epochs or 0) * per_epoch), 1)
        self.validation_name = None if validation is None else validation.name
        self.network = self.parts.teacher.network
        width = self.parts.teacher.clip.embed_dim
        self.objective = Objective.from_config(config.objective, width, width).to(device)
        broadcast_module(self.network)
        broadcast_module(self.objective)
        digest = hashlib.sha256()
        hash_tensors(self.network.state_dict(), digest)
        self._initial = digest.hexdigest()
        named = [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": train.weight_decay},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
            *self.objective.parameter_groups(weight_decay=train.weight_decay),
        ]
        groups = [{"lr": train.learning_rate, "initial_lr": train.learning_rate, **group} for group in groups]
        self.optimiser: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=train.learning_rate, betas=train.betas, eps=train.epsilon
        )

    def preflight(self, say: Say, explain: bool, check: Callable[[Embeddings, str], str]) -> None:
        first, *others = self.parts.notes()
        say(f"{self.config.run_name}: {first}; {self.total_steps} steps of {self.config.train.batch_size}")
        for note in others:
            say(note)
        # the mean of an image's regions is what the network starts from
        indices = self.parts.samples.indices[: self.config.preflight.samples].tolist()
        regions = self.parts.store.read(indices).to(self.device)
        means = (regions.embeddings * regions.mask[..., None]).sum(1) / regions.mask.sum(1, keepdim=True).clamp(min=1)
        captions = [self.source.captions(i)[0] for i in indices]
        clip = self.parts.teacher.clip
        with torch.no_grad():
            texts = clip.module.encode_text(clip.tokenizer(captions).to(self.device))
        pairs = Embeddings(F.normalize(means.float(), dim=-1), F.normalize(texts.float(), dim=-1), self.parts.scale)
        say(check(pairs, f"mean region of {clip.name}"))
        if explain:
            say(self.objective.explain(self.config.train.batch_size, self.device, world_size()))

    def tune(self, known: dict[str, Any] | None, say: Say) -> dict[str, Any]:
        return {}  # no tower is trained

    def loader(self, start_step: int, steps: int | None = None) -> Iterator[Batch]:
        """Batches without pixels: regions are looked up by sample."""
        sampler, nothing = self.parts.sampler, torch.empty(0)
        for step in range(start_step, self.total_steps if steps is None else steps):
            indices, captions = self.parts.batch(step)
            yield Batch(
                indices=torch.tensor(indices),
                keys=[self.source.key(i) for i in indices],
                caption_indices=torch.tensor(
                    [self.source.captions(i).index(c) for i, c in zip(indices, captions, strict=True)]
                ),
                student_images=nothing,
                student_tokens=nothing,
                teacher_images=None,
                teacher_tokens=None,
                captions=captions,
                step=step,
                epoch=sampler.epoch(step),
            )

    def before_step(self, step: int) -> str | None:
        return None

    def gradients(self, step: int, batch: Batch) -> tuple[ObjectiveOutput, float]:
        self.optimiser.zero_grad(set_to_none=True)
        output = self.objective(self.parts.embeddings(batch.indices.tolist(), batch.captions))
        output.total.backward()
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip_grad_norm or math.inf)
        return output, float(norm)

    def after_step(self, updated: bool) -> None:
        """The network has no running statistics."""

    def schedule(self, step: int) -> tuple[int, int, int]:
        return step, self.total_steps, self.config.train.warmup_steps

    def numbers(self, step: int) -> dict[str, Any]:
        return {"logit_scale": self.parts.scale, "scales": self.objective.effective_scales()}

    def evaluate(self) -> Point | None:
        """Retrieval of the network's image embeddings, made with each image's own caption where the form wants one."""
        measured = self.parts.measured()
        self.network.train()
        if measured is None:
            return None
        name = "regions alone" if "regions alone" in measured.scores else "own caption"
        return Point(dict(measured.scores[name]), measured.images[name])

    def end(self) -> None:
        """Nothing is left to do."""

    def finish(self, folder: Path, say: Say) -> Outcome:
        self.network.eval()
        self.parts.teacher.save(folder / "student")
        if self.parts.validation is not None:
            say(f"measuring on {self.validation_name}")
            measured = self.parts.measured()
            assert measured is not None
            write_json(folder / MEASURED, measured.to_json())
            for line in measured.table().lines():
                say(line)
        described = json.loads((folder / "student" / "meta_teacher.json").read_text(encoding="utf-8"))
        return Outcome(None, str(described["weights_sha256"]))

    def checkpoint(self) -> tuple[ClipModel | None, Mapping[str, torch.nn.Module]]:
        return None, {"network": self.network, "objective": self.objective}

    def resume(self, folder: Path, files: Iterable[str]) -> None:
        """Nothing changes its shape in the middle of a run."""

    def identity(self) -> dict[str, str]:
        return {
            "training data": self.source.fingerprint(),
            "teacher": self.parts.teacher.clip.fingerprint(),
            "regions": self.parts.store.folder.name,  # named after everything the embeddings depend on
            "starting student": self._initial,
        }

    def facts(self) -> dict[str, Any]:
        return {
            **self.parts.facts(),
            "validation": self.validation_name,
            "dtype": "fp32",
            "initial_weights": self._initial,
        }

    def trace(self, step: int, batch: Batch, precision: str) -> Iterator[Traced]:
        yield Traced("weights", dict(self.network.named_parameters()))
        regions = self.parts.store.read(batch.indices.tolist())
        yield Traced("embeddings of the regions", regions.embeddings, batch.keys)
        found = self.parts.embeddings(batch.indices.tolist(), batch.captions)
        yield Traced("image embeddings", found.image, batch.keys)
        yield Traced("text embeddings", found.text, batch.keys)
        self.optimiser.zero_grad(set_to_none=True)
        output = self.objective(found)
        for name, value in output.terms.items():
            yield Traced(f"term {name}", torch.as_tensor(value))
        output.total.backward()
        yield Traced("total", output.total)
        gradients: dict[str, Tensor] = {n: p.grad for n, p in self.network.named_parameters() if p.grad is not None}
        yield Traced("gradients", gradients)
        self.optimiser.zero_grad(set_to_none=True)
