"""The task of training a region teacher (DCLIP's meta-teacher): a small network on the regions of a frozen CLIP.

The recipe's `meta_teacher:` part makes a run train this network instead of a student:

    clipdistill train --recipe dclip-teacher --teacher ViT-B-16/openai --data D --out runs/teacher regions.boxes=B

The CLIP is frozen and regions are embedded once, so a step is a small network and the text tower's forward pass.
Which samples and captions a step sees is a function of (seed, step), as in the training of a student.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.config import as_dict
from clipdistill.data.loader import Batch
from clipdistill.data.mixture.opening import require_terms
from clipdistill.data.pairs import Subset
from clipdistill.data.sampler import StepSampler, sample_generator, steps_per_epoch
from clipdistill.errors import InputError
from clipdistill.models import ClipModel, load_model
from clipdistill.models.clip_model import hash_tensors
from clipdistill.models.parameters import decays
from clipdistill.objective import Embeddings, Objective, ObjectiveOutput
from clipdistill.regions.measure import Measured, measure
from clipdistill.regions.meta_teacher import DESCRIPTION, MetaTeacher
from clipdistill.regions.store import RegionStore
from clipdistill.regions.teacher import open_store
from clipdistill.runs.folder import MEASURED, STUDENT
from clipdistill.runtime.distributed import average_gradients, broadcast_module, is_main, on_main, rank, world_size
from clipdistill.runtime.files import read_json, write_json
from clipdistill.train.config import RunConfig
from clipdistill.train.region_config import MetaTeacherConfig, RegionsConfig
from clipdistill.train.sources import Sources
from clipdistill.train.task import Outcome, Point, Say, Traced


class RegionTeaching:
    """The network learns to fuse region and token embeddings (train.task.Task).

    source: the pairs, of which `samples` are those whose image could be read; store: their regions; measured_on: pairs
    to measure on and their regions; scale: the multiplier of similarities.
    """

    def __init__(self, config: RunConfig, device: torch.device, sources: Sources | None = None, say: Say = print):
        network, regions = _checked(config)
        self.config, self.device = config, device
        train, sources = config.train, sources or Sources()
        self.source, validation = sources.training(config), sources.validation(config)
        require_terms(config.objective.modalities, self.source)
        clip = config.teachers[0]
        self.teacher = MetaTeacher.start(load_model(clip, teacher=True), network, train.seed).to(device)

        def stores() -> list[RegionStore]:
            """Of both sets, made where they are not there: the validation set's boxes are looked at before training."""
            wanted = [(self.source, regions.boxes)]
            if validation is not None:
                wanted.append((validation, regions.validation_boxes or regions.boxes))
            tell = say if is_main() else lambda _: None
            return [
                open_store(
                    regions.model_copy(update={"boxes": boxes}),
                    pairs,
                    self.teacher.clip,
                    network,
                    config.out,
                    device,
                    tell,
                )
                for pairs, boxes in wanted
            ]

        made = on_main(stores, train.rank_timeout)  # the others find boxes and embeddings made
        self.store, *others = stores() if made is None else made
        self.measured_on = None if validation is None else (validation, others[0])
        readable = torch.nonzero(self.store.readable()).flatten().tolist()
        if len(readable) < 2:
            raise InputError(f"data '{self.source.name}': {len(readable)} readable images; training needs at least 2")
        self.samples = Subset(self.source, indices=readable)
        self.sampler = StepSampler(len(self.samples), train.batch_size, train.seed, rank(), world_size())
        own = float(self.teacher.clip.module.logit_scale.detach().float().exp())
        self.scale = own if train.fixed_logit_scale is None else train.fixed_logit_scale
        per_epoch = steps_per_epoch(len(self.source), train.batch_size)
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.total_steps = train.steps if train.steps is not None else max(round((train.epochs or 0) * per_epoch), 1)
        self.validation_name = None if validation is None else validation.name
        self.network = self.teacher.network
        width = self.teacher.clip.embed_dim
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

    def batch(self, step: int) -> tuple[list[int], list[str]]:
        """Sample indices (of the store) and captions of this rank's share of a step."""
        indices, epoch = self.sampler.indices(step).tolist(), self.sampler.epoch(step)
        captions = []
        for index in indices:
            known = self.samples.captions(index)
            drawn = int(sample_generator(self.sampler.seed, epoch, index).integers(len(known)))
            captions.append(known[drawn if self.config.train.caption == "random" else 0])
        return [int(self.samples.indices[i]) for i in indices], captions

    def embeddings(self, indices: Sequence[int], captions: Sequence[str]) -> Embeddings:
        """What the objective takes: image rows (B, D) with a graph, the frozen CLIP's sentence rows (B, D)."""
        with torch.no_grad():
            sentence, states, mask = self.teacher.text(captions)
        image = self.teacher.image(self.store.read(indices).to(self.device), states, mask)
        return Embeddings(image, sentence, self.scale)

    def measured(self) -> Measured | None:
        """The teacher on the validation set: with its own caption, without it, and the plain CLIP beside it."""
        if self.measured_on is None:
            return None
        self.teacher.network.eval()
        return measure(self.teacher, *self.measured_on, device=self.device)

    @property
    def parameters(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.teacher.network.parameters())

    def notes(self) -> list[str]:
        """What is trained on what, for the terminal."""
        found = [
            f"{self.source.name}, {len(self.samples)} images, {self.store.counts().float().mean():.1f} regions each "
            f"({self.store.manifest.without_boxes} images without boxes); frozen CLIP {self.teacher.clip.name}; "
            f"{self.parameters / 1e6:.2f} M parameters train"
        ]
        if not self.teacher.config.caption_free:
            found.append("the image embeddings contain the caption (the published form): see docs/dclip.md")
        return found

    def preflight(self, say: Say, explain: bool, check: Callable[[Embeddings, str], str]) -> None:
        first, *others = self.notes()
        say(f"{self.config.run_name}: {first}; {self.total_steps} steps of {self.config.train.batch_size}")
        for note in others:
            say(note)
        # the mean of an image's regions is what the network starts from
        indices = self.samples.indices[: self.config.preflight.samples].tolist()
        regions = self.store.read(indices).to(self.device)
        means = (regions.embeddings * regions.mask[..., None]).sum(1) / regions.mask.sum(1, keepdim=True).clamp(min=1)
        captions = [self.source.captions(i)[0] for i in indices]
        clip = self.teacher.clip
        with torch.no_grad():
            texts = clip.module.encode_text(clip.tokenizer(captions).to(self.device))
        pairs = Embeddings(F.normalize(means.float(), dim=-1), F.normalize(texts.float(), dim=-1), self.scale)
        say(check(pairs, f"mean region of {clip.name}"))
        if explain:
            say(self.objective.explain(self.config.train.batch_size, self.device, world_size()))

    def tune(self, known: dict[str, Any] | None, say: Say) -> dict[str, Any]:
        return {}  # no tower is trained

    def loader(self, start_step: int, steps: int | None = None) -> Iterator[Batch]:
        """Batches without pixels: regions are looked up by sample."""
        sampler, nothing = self.sampler, torch.empty(0)
        for step in range(start_step, self.total_steps if steps is None else steps):
            indices, captions = self.batch(step)
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
        output = self.objective(self.embeddings(batch.indices.tolist(), batch.captions))
        output.total.backward()
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip_grad_norm or math.inf)
        return output, float(norm)

    def after_step(self, updated: bool) -> bool:
        """The network has no running statistics, and no loss scale."""
        return False

    def schedule(self, step: int) -> tuple[int, int, int]:
        return step, self.total_steps, self.config.train.warmup_steps

    def numbers(self, step: int) -> dict[str, Any]:
        return {"logit_scale": self.scale, "scales": self.objective.effective_scales()}

    def evaluate(self) -> Point | None:
        """Retrieval of the network's image embeddings, made with each image's own caption where the form wants one."""
        measured = self.measured()
        self.network.train()
        if measured is None:
            return None
        name = "regions alone" if "regions alone" in measured.scores else "own caption"
        return Point(dict(measured.scores[name]), measured.images[name])

    def end(self) -> None:
        """Nothing is left to do."""

    def finish(self, folder: Path, say: Say) -> Outcome:
        self.network.eval()
        self.teacher.save(folder / STUDENT)
        if self.measured_on is not None:
            say(f"measuring on {self.validation_name}")
            measured = self.measured()
            assert measured is not None
            write_json(folder / MEASURED, measured.to_json(), checked=True)
            for line in measured.table().lines():
                say(line)
        described = read_json(folder / STUDENT / DESCRIPTION)
        return Outcome(None, str(described["weights_sha256"]))

    def checkpoint(self) -> tuple[ClipModel | None, Mapping[str, torch.nn.Module]]:
        return None, {"network": self.network, "objective": self.objective}

    def resume(self, folder: Path, files: Iterable[str]) -> None:
        """Nothing changes its shape in the middle of a run."""

    def identity(self) -> dict[str, str]:
        return {
            "training data": self.source.fingerprint(),
            "teacher": self.teacher.clip.fingerprint(),
            "regions": self.store.folder.name,  # named after everything the embeddings depend on
            "starting student": self._initial,
        }

    def facts(self) -> dict[str, Any]:
        return {
            "kind": "region teacher",
            "teacher": self.teacher.clip.name,
            "student": self.teacher.name,
            "boxes": self.store.manifest.boxes,
            "regions": int(self.store.counts().sum()),
            "parameters": {"total": self.parameters},
            "teacher_parameters": self.teacher.clip.parameter_counts(),
            "meta_teacher": as_dict(self.teacher.config),
            "bad_samples": int((~self.store.readable()).sum()),
            "validation": self.validation_name,
            "dtype": "fp32",
            "initial_weights": self._initial,
        }

    def trace(self, step: int, batch: Batch, precision: str) -> Iterator[Traced]:
        yield Traced("weights", dict(self.network.named_parameters()))
        regions = self.store.read(batch.indices.tolist())
        yield Traced("embeddings of the regions", regions.embeddings, batch.keys)
        found = self.embeddings(batch.indices.tolist(), batch.captions)
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


def _checked(config: RunConfig) -> tuple[MetaTeacherConfig, RegionsConfig]:
    """The settings of network and regions. Raises InputError for what the training needs or cannot follow."""
    assert config.meta_teacher is not None
    if len(config.teachers) != 1:
        raise InputError("meta_teacher: name the CLIP to freeze, for example  --teacher ViT-B-16/openai")
    if config.regions is None:
        raise InputError(
            "meta_teacher: name the boxes of the images, a file or a detector, for example  "
            "regions.boxes=boxes.parquet  or  regions.boxes=grid:1+2"
        )
    if config.objective.needs_teacher:
        raise InputError(
            f"meta_teacher: is trained without a teacher of its own; its terms ({', '.join(config.objective.weights)}) "
            "need one: use objective.weights.task=1"
        )
    return config.meta_teacher, config.regions
