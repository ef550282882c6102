"""Batches for training: images and captions prepared for student and teacher, in an order that nothing disturbs.

Which samples a step holds, which caption and which view each gets, depends on (seed, epoch, index) alone: not on the
number of workers or ranks, not on where a run was interrupted. Workers send 8-bit pixels; they are normalised once they
have arrived (on the GPU when there is one), to the same bits.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipdistill.data.files import read_ahead
from clipdistill.data.images import decode
from clipdistill.data.pairs import PairSource, one_or_several
from clipdistill.data.problems import BadSample
from clipdistill.data.sampler import StepSampler, sample_generator
from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, View, ViewPolicy, normalise, render_pixels, sample_view
from clipdistill.errors import InputError

CHUNK = 64
"""Samples that a worker prepares at a time: a step's batch is shared out among the workers."""


class FedModel(Protocol):
    """What the loader needs of a model (clipdistill.models.ClipModel has it): how it wants images and captions."""

    @property
    def image(self) -> ImageSpec: ...

    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Choice:
    """What a stored teacher has for a sample: one of its views, and (where it has any) one of its added captions."""

    index: int
    view_number: int
    view: View
    synthetic_number: int = 0
    synthetic: str | None = None


class StoredTeacher(Protocol):
    """A teacher whose embeddings are on disk (clipdistill.cache). Used in the workers, so it can be pickled."""

    def choose(self, index: int, rng: np.random.Generator) -> Choice:
        """The view for student and teacher. Raises BadSample where nothing is stored for the sample's image."""
        ...

    def read(self, choices: Sequence[Choice], captions: Sequence[int]) -> dict[str, Tensor]:
        """Rows by name, each (len(choices), D), for the chosen views and the given captions."""
        ...


@dataclass
class Batch:
    """One step's samples of one rank. B is smaller than the rank's share when samples were bad (`problems` lists them).

    indices, caption_indices: int64 (B,): which sample of the source, which of its captions; images: float32
    (B, 3, size, size); tokens: int64 (B, L), L at most the context length; truncated_*: captions whose tokens were cut.
    The teacher's tensors are the student's own objects where both models want the same, None without a teacher.
    stored: what a stored teacher gave for these rows; synthetic_tokens: one of its added captions for the student.
    Images or tokens are None, and captions empty, where no term reads them or the set has none. part: of several sets
    the one that the batch is of.
    """

    indices: Tensor
    keys: list[str]
    caption_indices: Tensor
    student_images: Tensor
    student_tokens: Tensor
    teacher_images: Tensor | None
    teacher_tokens: Tensor | None
    captions: list[str]
    problems: list[tuple[str, str]] = field(default_factory=list)
    truncated_student: int = 0
    truncated_teacher: int = 0
    views: list[View] = field(default_factory=list)
    step: int = 0
    epoch: int = 0
    stored: dict[str, Tensor] | None = None
    synthetic_tokens: Tensor | None = None
    part: str = ""


class PairLoader:
    """Batches of steps `start_step` to `steps` - 1 (global steps, counted from 0 over all epochs).

    batch_size: over all ranks. caption: which of an image's captions. device: where the batch is wanted.
    stored: a teacher on disk instead of `teacher`; it chooses the views.
    modalities: what to read of each sample; a set that lacks one of them gives batches without it.
    exact: False takes faster, slightly different pixels (views.render_pixels, images.decode with `at_least`).
    start_method: of the workers; None is fork where the system has it safely (Linux), else spawn.
    Raises InputError for impossible sizes; an unreadable sample is never an error here but listed in its batch.
    """

    def __init__(
        self,
        source: PairSource,
        *,
        batch_size: int,
        student: FedModel,
        teacher: FedModel | None = None,
        view: ViewPolicy | None = None,
        caption: Literal["random", "first"] = "random",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start_step: int = 0,
        steps: int,
        device: torch.device | str = "cpu",
        exact: bool = True,
        start_method: str | None = None,
        stored: StoredTeacher | None = None,
        modalities: Sequence[str] = ("image", "text"),
    ) -> None:
        if not 0 <= start_step <= steps:
            raise InputError(f"cannot start at step {start_step} of {steps}")
        self.sampler = source.sampler(batch_size, seed, rank, world)
        self.start_step = start_step
        self.steps = steps
        self.workers = workers
        self.device = torch.device(device)
        self.start_method = start_method
        self._specs = (student.image, None if teacher is None else teacher.image)
        # what knows its text tower leaves out the places that change no embedding (ClipModel.shorten)
        self._shorten = getattr(student, "shorten", lambda *tokens: tokens)
        self._shorten_teacher = getattr(teacher, "shorten", lambda *tokens: tokens)
        self._preparation = _Preparation(
            source, self.sampler, student, teacher, view or ViewPolicy(), caption, exact, stored, modalities
        )

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def __len__(self) -> int:
        """Batches that iterating yields."""
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        preparation = self._preparation
        parts = preparation.parts
        tasks = range(self.start_step * parts, self.steps * parts)
        if self.workers > 0:
            preparation.warm_up()
        chunks = prepared(
            preparation,
            tasks,
            self.workers,
            start_method=self.start_method,
            pin=self.device.type == "cuda",
            # enough for two steps ahead, however many parts a step has
            ahead=max(2, min(16, math.ceil(2 * parts / max(self.workers, 1)))),
        )
        steps = range(self.start_step, self.steps)
        batches = (self._assemble(step, [next(chunks) for _ in range(parts)]) for step in steps)
        yield from copied_ahead(batches, self.device, torch.cuda) if self.device.type == "cuda" else batches

    def _assemble(self, step: int, chunks: list[dict[str, Any]]) -> Batch:
        student_spec, teacher_spec = self._specs
        student_images: Any = None
        student_tokens: Any = None
        teacher_images = teacher_tokens = None
        synthetic_tokens: list[Tensor] = []
        if "student_pixels" in chunks[0]:
            student_images = self._images([c["student_pixels"] for c in chunks], student_spec)
            if teacher_spec is not None:
                name = "student_pixels" if self._preparation.share_pixels else "teacher_pixels"
                same = teacher_spec == student_spec
                teacher_images = student_images if same else self._images([c[name] for c in chunks], teacher_spec)
        shared = "teacher_tokens" not in chunks[0]
        if "student_tokens" in chunks[0]:
            whole = torch.cat([c["student_tokens"] for c in chunks])
            added = [torch.cat([c["synthetic_tokens"] for c in chunks])] if "synthetic_tokens" in chunks[0] else []
            student_tokens, *synthetic_tokens = map(self._on_device, self._shorten(whole, *added))
            if teacher_spec is not None:
                (cut,) = self._shorten_teacher(whole if shared else torch.cat([c["teacher_tokens"] for c in chunks]))
                same = shared and cut.shape == student_tokens.shape
                teacher_tokens = student_tokens if same else self._on_device(cut)
        cut_student = sum(c["truncated_student"] for c in chunks)
        cut_teacher = sum(c.get("truncated_teacher", 0) for c in chunks)
        joined: dict[str, Any] = {
            **{name: torch.cat([c[name] for c in chunks]) for name in ("indices", "caption_indices")},
            **{name: [row for c in chunks for row in c[name]] for name in ("keys", "captions", "problems")},
        }
        return Batch(
            **joined,
            student_images=student_images,
            student_tokens=student_tokens,
            teacher_images=teacher_images,
            teacher_tokens=teacher_tokens,
            truncated_student=cut_student,
            truncated_teacher=cut_student if shared and teacher_spec is not None else cut_teacher,
            views=[View.from_json(view) for c in chunks for view in c["views"]],
            step=step,
            epoch=self.sampler.epoch(step),
            stored=_joined([c["stored"] for c in chunks], self.device) if "stored" in chunks[0] else None,
            synthetic_tokens=synthetic_tokens[0] if synthetic_tokens else None,
            part=chunks[0]["part"],
        )

    def _images(self, parts: list[Tensor], spec: ImageSpec) -> Tensor:
        """Chunks of pixels (b, H, W, 3) normalised into one float tensor (B, 3, H, W) on the device."""
        count = sum(len(part) for part in parts)
        images = torch.empty((count, 3, spec.size, spec.size), device=self.device)
        row = 0
        for part in parts:
            if self.device.type == "cpu":
                for pixels in part:  # one at a time: all passes over a picture stay in the processor's cache
                    normalise(pixels, spec, out=images[row])
                    row += 1
            else:
                pixels = part.to(self.device, non_blocking=True)
                normalise(pixels, spec, out=images[row : row + len(part)])
                row += len(part)
        return images

    def _on_device(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.device, non_blocking=True)


def copied_ahead(batches: Iterator[Batch], device: torch.device, cuda: Any) -> Iterator[Batch]:
    """The batches, each copied and normalised on a stream of its own while the step before is computed.

    cuda: torch.cuda, or what stands for it in tests.
    """
    stream = cuda.Stream(device)

    def next_batch() -> Batch | None:
        with cuda.stream(stream):
            return next(batches, None)

    ahead = next_batch()
    while (batch := ahead) is not None:
        computing = cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in {id(t): t for t in (*vars(batch).values(), *(batch.stored or {}).values())}.values():
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                tensor.record_stream(computing)  # its memory is not for the other stream before the step has read it
        ahead = next_batch()
        yield batch


class _Preparation(torch.utils.data.Dataset):
    """What runs in the workers: item t is part t % parts of step t // parts."""

    def __init__(
        self,
        source: PairSource,
        sampler: StepSampler,
        student: FedModel,
        teacher: FedModel | None,
        view: ViewPolicy,
        caption: str,
        exact: bool,
        stored: StoredTeacher | None,
        modalities: Sequence[str],
    ) -> None:
        if caption not in ("random", "first"):
            raise InputError(f"caption must be 'random' or 'first', got {caption!r}")
        self.source = source
        self.sampler = sampler
        self.parts = max(1, math.ceil(sampler.local_batch_size / CHUNK))
        self.view = view
        self.caption = caption
        self.exact = exact
        self.stored = stored
        self.modalities = tuple(modalities)
        self.student_spec, self.student_tokenizer = student.image, student.tokenizer
        self.teacher_spec: ImageSpec | None = None
        self.teacher_tokenizer: Any = None
        self.share_pixels = self.share_tokens = False
        if teacher is not None:
            self.teacher_spec, self.teacher_tokenizer = teacher.image, teacher.tokenizer
            self.share_pixels = geometry(teacher.image) == geometry(student.image)
            self.share_tokens = teacher.tokenizer is student.tokenizer or teacher.tokenizer == student.tokenizer
        specs = [spec for spec in (self.student_spec, self.teacher_spec) if spec is not None]
        least_area = view.scale[0] if view.random else 1.0
        self.at_least = None
        if not exact and stored is None:  # a stored view may be of any region, so its picture is decoded in full
            # twice what is needed, as Pillow's thumbnails: below that the JPEG's own reduction shows
            self.at_least = math.ceil(2 * max(spec.size for spec in specs) / math.sqrt(least_area))

    def warm_up(self) -> None:
        """Load what every worker would otherwise load for itself (image readers, merge tables, shared libraries)."""
        blank = Image.new("RGB", (2, 2))
        buffer = io.BytesIO()
        blank.save(buffer, "PNG")
        render_pixels(decode(buffer.getvalue()), EVALUATION_VIEW, self.student_spec, exact=self.exact)
        for tokenizer in (self.student_tokenizer, self.teacher_tokenizer):
            if tokenizer is not None:
                tokenizer(["a"])

    def __getitem__(self, task: int) -> dict[str, Any]:
        step, number = divmod(task, self.parts)
        drawn_samples = self.sampler.indices(step)
        part = self.source.part(int(drawn_samples[0]))
        texts_read, images_read = (
            part.captioned and "text" in self.modalities,
            part.pictured and "image" in self.modalities,
        )
        mine = np.array_split(drawn_samples, self.parts)[number]
        epoch = self.sampler.epoch(step)
        count = len(mine)
        student_size, teacher_spec = self.student_spec.size, None if self.share_pixels else self.teacher_spec
        teacher_spec = teacher_spec if images_read else None
        student_pixels = np.empty((count * images_read, student_size, student_size, 3), dtype=np.uint8)
        teacher_pixels = None
        if teacher_spec is not None:
            teacher_pixels = np.empty((count, teacher_spec.size, teacher_spec.size, 3), dtype=np.uint8)
        kept: list[tuple[int, str, int, View]] = []
        texts: list[str] = []
        originals: list[str] = []
        problems: list[tuple[str, str]] = []
        choices: list[Choice] = []
        read_ahead(self.source, mine.tolist())
        for index in mine.tolist():
            key = self.source.key(index)
            rng = sample_generator(self.sampler.seed, epoch, index)
            captions = one_or_several(self.source.captions(index)) if texts_read else ()
            # drawn even if unused: the view must not depend on the mode; -1: no caption
            drawn = int(rng.integers(len(captions))) if captions else -1
            chosen = drawn if (part.rule or self.caption) == "random" else min(drawn, 0)
            try:
                choice = None if self.stored is None else self.stored.choose(index, rng)
                image = self.source.image(index, self.at_least) if images_read else None
            except BadSample as error:
                problems.append((key, error.reason))
                continue
            view = EVALUATION_VIEW
            if choice is not None:
                view = choice.view
                choices.append(choice)
            elif image is not None:
                width, height = image.info.get("source_size", image.size)
                view = sample_view(self.view, width, height, rng)
            row = len(kept)
            if image is not None:
                student_pixels[row] = render_pixels(image, view, self.student_spec, exact=self.exact)
                if teacher_pixels is not None and teacher_spec is not None:
                    teacher_pixels[row] = render_pixels(image, view, teacher_spec, exact=self.exact)
            kept.append((index, key, chosen, view))
            texts += captions[chosen:][:1]
            originals += captions[:1]
        result: dict[str, Any] = {
            "indices": torch.tensor([index for index, *_ in kept], dtype=torch.int64),
            "keys": [key for _, key, *_ in kept],
            "caption_indices": torch.tensor([chosen for _, _, chosen, _ in kept], dtype=torch.int64),
            "captions": texts,
            "views": [view.to_json() for *_, view in kept],
            "problems": problems,
            "truncated_student": truncated(self.student_tokenizer, texts),
            "part": "" if part is self.source else part.name,
        }
        if images_read:
            result["student_pixels"] = torch.from_numpy(student_pixels[: len(kept)])
        if texts_read:
            result["student_tokens"] = self.student_tokenizer(texts)
        if self.stored is not None:
            result["stored"] = self.stored.read(choices, [chosen for _, _, chosen, _ in kept])
            synthetic = [choice.synthetic for choice in choices if choice.synthetic is not None]
            if "synthetic_text" in result["stored"]:
                result["synthetic_tokens"] = self.student_tokenizer(synthetic)
        if teacher_pixels is not None:
            result["teacher_pixels"] = torch.from_numpy(teacher_pixels[: len(kept)])
        if self.teacher_spec is not None and texts_read and (part.parallel or not self.share_tokens):
            read = originals if part.parallel else texts
            result["teacher_tokens"] = self.teacher_tokenizer(read)
            result["truncated_teacher"] = truncated(self.teacher_tokenizer, read)
        return result


def prepared(
    items: torch.utils.data.Dataset,
    tasks: Iterable[Any],
    workers: int,
    *,
    start_method: str | None = None,
    pin: bool = False,
    ahead: int = 2,
) -> Iterator[Any]:
    """`items[task]` for each task in order, made by `workers` processes (0: by this one).

    The one way in which workers are started, for training, evaluation and filling a cache: without a copy of the
    device's state, deaf to signals (the parent decides when to stop), on one thread each, and drawing nothing from the
    global generator. start_method: None is fork where the system has it safely (Linux), else spawn; pin: tensors in
    page-locked memory; ahead: tasks that each worker has waiting. `errors.worker_lost` tells of one that died.
    """
    settings: dict[str, Any] = {}
    if workers > 0:
        settings = {
            "multiprocessing_context": start_method or ("fork" if sys.platform == "linux" else "spawn"),
            "worker_init_fn": _init_worker,
            "prefetch_factor": ahead,
        }
    loader = torch.utils.data.DataLoader(
        items,
        batch_size=None,
        collate_fn=_as_it_is,
        sampler=tasks,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # its own: the global one must not depend on how often loaders were made
        **settings,
    )
    try:
        with _signals_held():
            return iter(loader)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        name = getattr(getattr(items, "source", None), "name", "the data")
        raise InputError(f"{name} cannot be sent to worker processes ({error}): set train.workers=0") from error


def _as_it_is(chunk: Any) -> Any:
    """Chunks are complete: torch's own conversion would turn tuples into lists."""
    return chunk


def _joined(parts: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Rows of all chunks by name, on the device."""
    return {name: torch.cat([part[name] for part in parts]).to(device, non_blocking=True) for name in parts[0]}


def truncated(tokenizer: Any, captions: Sequence[str]) -> int:
    """How many of `captions` the tokenizer cuts."""
    limit = tokenizer.context_length
    # plain text has at most one token a character, beside start and end: most captions need no counting
    long = [caption for caption in captions if len(caption) + 2 > limit or not caption.isascii()]
    return sum(length > limit for length in tokenizer.lengths(long)) if long else 0


def geometry(spec: ImageSpec) -> tuple[Any, ...]:
    """What of an image specification the pixels depend on; the normalisation comes later, on the device."""
    return spec.size, spec.interpolation, spec.resize_mode


_SIGNALS = {getattr(signal, name, signal.SIGTERM) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")}


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait while workers are started: they inherit this, and are deaf from their first moment on."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(_: int) -> None:
    """Workers leave signals to the parent, which decides when to stop, and do not compete for its cores."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
