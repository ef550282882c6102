"""The checks before step 0: does the teacher fit the data, how much is cut, will it fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipdistill.data.loader import Batch
from clipdistill.errors import InputError
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.objective import Embeddings, Objective
from clipdistill.runtime.distributed import world_size
from clipdistill.train.config import RunConfig
from clipdistill.train.step import Towers, autocast, frozen_batch_statistics


@dataclass(frozen=True)
class TeacherCheck:
    """R@1 of the teacher on a sample of the training pairs, beside the chance level."""

    text_to_image: float
    image_to_text: float
    pairs: int

    @property
    def chance(self) -> float:
        return 1.0 / self.pairs

    @property
    def beats_chance(self) -> bool:
        # three standard errors above guessing, so that a coin cannot pass
        margin = 3 * (self.chance * (1 - self.chance) / self.pairs) ** 0.5
        return max(self.text_to_image, self.image_to_text) > self.chance + margin


def check_teacher(teacher: Embeddings, blocks: Sequence[int] | None) -> TeacherCheck:
    """Retrieval among the sampled pairs, one caption each; `teacher` rows are pairs, (N, D) and (N, D)."""
    size = (blocks or (teacher.image.shape[1],))[0]  # an ensemble is judged by its first member
    count = len(teacher.image)
    scores = retrieval(teacher.image[:, :size].cpu(), teacher.text[:, :size].cpu(), torch.arange(count), ks=(1,))
    return TeacherCheck(scores["t2i_R@1"], scores["i2t_R@1"], count)


def require_working_teacher(check: TeacherCheck, name: str, config: RunConfig) -> None:
    """Raises InputError when the teacher is no better than guessing and the user did not allow that."""
    if not check.beats_chance and not config.preflight.allow_weak_teacher:
        raise InputError(
            f"teacher '{name}' finds the right image for {check.text_to_image:.1%} of {check.pairs} captions of "
            f"'{config.data.path}' (guessing: {check.chance:.1%}): check that captions belong to their images and that "
            "the teacher's weights are loaded, or set preflight.allow_weak_teacher=true"
        )


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
    images, tokens = batch.student_images[:2].to(device), batch.student_tokens[:2].to(device)
    kept = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with kept, frozen_batch_statistics(towers), autocast(device, precision):
        towers(images, tokens)
    per_sample = sum(size for pointer, size in saved.items() if pointer not in known) / max(len(images), 1)
    encoded = min(rows, micro_batch or rows)
    return MemoryEstimate(
        weights=4 * (parameters + trained),
        optimiser=8 * trained,
        activations=int(per_sample * encoded),
        teacher=4 * teacher_parameters,
        objective=objective.estimate_bytes(global_batch, device, world_size()),
    )
