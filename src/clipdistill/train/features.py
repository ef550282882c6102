"""Features of locked towers, computed once: only heads are left to train, at the speed of matrix products.

A locked tower of joined ones (models/towers) is a fixed function of its picture or caption. Where the views are known
beforehand too (the evaluation view, those of a cached teacher, or a few drawn once), its features are computed before
the first step and kept in memory, and for other runs in `train.features_folder`; the batches hold them in the place of
pictures and ids: the towers' encoders take either.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipdistill.cache.blocks import Block, write_block
from clipdistill.cache.stored import StoredRows
from clipdistill.config import as_dict
from clipdistill.data.loader import Batch, Choice, prepared, truncated
from clipdistill.data.pairs import PairSource, Subset, one_or_several
from clipdistill.data.problems import BadSample
from clipdistill.data.sampler import sample_generator
from clipdistill.data.views import EVALUATION_VIEW, normalise
from clipdistill.embed.encode import EncodedPairs, most_captions
from clipdistill.embed.prepare import Item, Preparation
from clipdistill.models import ClipModel
from clipdistill.models.clip_model import hash_tensors
from clipdistill.models.parameters import evaluation_mode, is_joined
from clipdistill.models.text_length import by_length
from clipdistill.runtime.distributed import is_main, rank, world_size
from clipdistill.runtime.files import digest_of
from clipdistill.train.config import RunConfig, read_modalities
from clipdistill.train.step import autocast
from clipdistill.train.teacher import Teacher

LARGEST = 4 << 30
"""Bytes of features that are kept; a larger set is encoded step by step, as without locks."""
_PART = 64


@dataclass
class LockedFeatures:
    """Rows by sample: image (views, N, F); text (captions of all samples, F), those of sample i from first[i] on, or
    None."""

    image: Tensor
    text: Tensor | None
    first: list[int]
    problems: dict[int, str]
    seconds: float
    measured: dict[int, LockedFeatures] = field(default_factory=dict, repr=False)
    """Of the sets that the run is measured on, by the source's id."""

    def sentence(self) -> str:
        """What was computed, for the terminal."""
        size = sum(part.numel() * 4 for part in (self.image, self.text) if part is not None)
        towers = "image tower" if self.text is None else "image and text towers"
        views = f", {len(self.image)} views a picture" if len(self.image) > 1 else ""
        return f"features of the locked {towers} computed once: {size / 1e6:.0f} MB in {self.seconds:.0f} s{views}"

    def loader(
        self,
        source: PairSource,
        student: ClipModel,
        config: RunConfig,
        teacher: Teacher | None,
        start_step: int,
        steps: int,
    ) -> FeatureLoader:
        """The batches of steps `start_step` to `steps` - 1."""
        return FeatureLoader(self, source, student, config, teacher, start_step, steps)

    def encoded(
        self, source: PairSource, student: ClipModel, config: RunConfig, device: torch.device, captions: str
    ) -> EncodedPairs | None:
        """A set to measure on, as embed.encode.encode_pairs gives it, of which only the heads are computed each time.

        None where the towers have to run: the text tower trains, a picture cannot be read, the features are too many.
        """
        start, module = time.perf_counter(), student.module
        whole, some = _whole(source)
        rows = [*range(len(source))] if some is None else some
        if self.text is None or _size(student, whole) > LARGEST:
            return None
        if id(whole) not in self.measured:
            plain = config.train.model_copy(update={"precision": "fp32", "views": "fixed"})
            own = config.model_copy(update={"train": plain})
            self.measured[id(whole)] = locked_features(student, whole, own, device)
        found, most = self.measured[id(whole)], most_captions(captions)
        if found.problems or found.text is None:
            return None
        listed = [one_or_several(whole.captions(i))[:most] for i in rows]
        places = [(row, found.first[i] + n, n) for row, i in enumerate(rows) for n in range(len(listed[row]))]
        owner, at, place = torch.tensor(places, dtype=torch.int64).reshape(-1, 3).T
        with evaluation_mode(module), torch.no_grad():
            image, text = (
                torch.cat([normalize(head(part.to(device)), dim=-1).cpu() for part in table.split(_PART * _PART)])
                for head, table in ((module.encode_image, found.image[0][rows]), (module.encode_text, found.text[at]))
            )
        texts = [caption for own in listed for caption in own]
        return EncodedPairs(
            image=image,
            text=text,
            text_to_image=owner,
            keys=[whole.key(i) for i in rows],
            captions=texts,
            caption_indices=place,
            truncated=truncated(student.tokenizer, texts),
            seconds=time.perf_counter() - start,
        )


def features_of_locked_towers(
    student: ClipModel, source: PairSource, config: RunConfig, device: torch.device, teacher: Teacher | None
) -> LockedFeatures | None:
    """`locked_features` where `can_keep` says so."""
    fits = can_keep(student, config, source, teacher)
    return locked_features(student, source, config, device, teacher) if fits else None


def view_count(config: RunConfig, teacher: Teacher | None) -> int | None:
    """How many known views a picture has beside the evaluation view: 0 for that view alone, None for new ones at each
    step."""
    train = config.train
    if teacher is not None:
        rows = teacher.stored
        if not isinstance(rows, StoredRows) or rows.embeddings.has_synthetic:
            return None
        return 0 if rows.views == "fixed" else rows.embeddings.view_count
    if train.views == "stored":
        return train.stored_views
    return 0 if train.views == "fixed" or not train.view.random else None


def can_keep(student: ClipModel, config: RunConfig, source: PairSource, teacher: Teacher | None = None) -> bool:
    """Whether what the student's image tower makes of each picture stays the same through the run, and fits."""
    module, views = student.module, view_count(config, teacher)
    if views is None or not is_joined(module) or not module.visual.locked or config.train.mask_ratio is not None:
        return False
    if source.part(0) is not source or read_modalities(config, source)[0] != "image":
        return False
    return _size(student, source, views) <= LARGEST


def _whole(source: PairSource) -> tuple[PairSource, list[int] | None]:
    """The set that a subset is of, with its rows there; None for all of them."""
    return (source.source, source.indices.tolist()) if isinstance(source, Subset) else (source, None)


def _size(student: ClipModel, source: PairSource, views: int = 0) -> int:
    """Bytes of the features of a set."""
    module = student.module
    rows = max(views, 1) * len(source) * sum(module.visual.head.widths)
    if module.text.locked and source.captioned:
        rows += sum(len(one_or_several(source.captions(i))) for i in range(len(source))) * sum(module.text.head.widths)
    return 4 * rows


def locked_features(
    student: ClipModel, source: PairSource, config: RunConfig, device: torch.device, teacher: Teacher | None = None
) -> LockedFeatures:
    """Features of every picture's views, and of every caption where the text tower is locked too: float32, on the CPU.

    They are read from `train.features_folder` where another run left them. A part of a larger set takes its rows of
    the whole set's.
    """
    start = time.perf_counter()
    module, train, views = student.module, config.train, view_count(config, teacher) or 0
    whole, rows = _whole(source)
    data = [whole.fingerprint(), whole.images_fingerprint()] if train.features_folder is not None else []
    drawn: list[object] = [views]
    if views:
        drawn += [as_dict(train.view), 0] if teacher is None else [teacher.stored.embeddings.fingerprint()]  # type: ignore[union-attr]
    looks = [*data, *drawn, student.architecture["towers"]["image"], as_dict(student.image), train.precision]
    found = _kept(
        train.features_folder,
        looks,
        module.visual.backbone(),
        lambda: _image_features(student, whole, views, config, device, teacher),
    )
    image, bad = found["image"], [i for i, valid in enumerate(found["valid"].tolist()) if not valid]
    text = None
    if module.text.locked and "text" in read_modalities(config, source):
        reads = [*data, student.tokenizer.to_dict(), student.architecture["towers"]["text"]["pooling"]]
        text = _kept(
            train.features_folder,
            reads,
            module.text.backbone(),
            lambda: {"text": _text_features(student, whole, device)},
        )["text"]
    first, count = [], 0
    for i in range(len(whole)):
        first.append(count)
        count += len(one_or_several(whole.captions(i)))
    problems = dict.fromkeys(bad, "the image could not be read when its features were computed")
    if rows is not None:
        image, first = image[:, rows], [first[i] for i in rows]
        problems = {n: problems[i] for n, i in enumerate(rows) if i in problems}
    return LockedFeatures(image, text, first, problems, time.perf_counter() - start)


def _kept(
    folder: Path | None, what: list[object], tower: nn.Module, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `make` returns, from the block of the folder that holds it; written there if it does not yet."""
    if folder is None:
        return make()
    weights = hashlib.sha256()
    hash_tensors(tower.state_dict(), weights)
    path = folder / f"{digest_of({'what': what, 'weights': weights.hexdigest()})[:32]}.safetensors"
    if path.exists():
        block = Block(path, "delete it, and it is made again")
        block.verify()
        return {name: torch.from_numpy(values.copy()) for name, values in block.arrays.items()}
    made = make()
    if is_main():
        write_block(path, made, {"what": json.dumps(what)})
    return made


def _image_features(
    student: ClipModel, source: PairSource, views: int, config: RunConfig, device: torch.device, teacher: Teacher | None
) -> dict[str, Tensor]:
    """image (views or 1, N, F), valid (N,)."""
    module, count = student.module, len(source)
    image, valid = (
        torch.zeros(max(views, 1), count, sum(module.visual.head.widths)),
        torch.ones(count, dtype=torch.uint8),
    )

    def item(i: int) -> Item:
        known = None if teacher is None else teacher.stored.embeddings  # type: ignore[union-attr]
        usable = known is None or known.valid(i)
        return Item(i, None if known is None or not usable else tuple(known.view(i, n) for n in range(1, views + 1)))

    tasks = [[item(i) for i in range(begin, min(begin + _PART, count))] for begin in range(0, count, _PART)]
    preparation = Preparation(source, [student.image], policy=config.train.view, views=views)
    with evaluation_mode(module), torch.no_grad(), autocast(device, config.train.precision):
        for chunk in prepared(preparation, tasks, config.train.workers, ahead=4):
            pixels = chunk.pixels[0].unflatten(0, (len(chunk.items), 1 + views))
            good = [row for row, problem in enumerate(chunk.problems) if problem is None]
            rows = [chunk.items[row].index for row in good]
            valid[[chunk.items[row].index for row in range(len(chunk.items)) if row not in good]] = 0
            for number in range(1, views + 1) if views else (0,):
                if good:
                    batch = normalise(pixels[good, number].to(device), student.image)
                    image[max(number - 1, 0), rows] = module.visual.features(batch).float().cpu()
    return {"image": image, "valid": valid}


def _text_features(student: ClipModel, source: PairSource, device: torch.device) -> Tensor:
    """Of all captions, one sample after the other: (captions, F)."""
    module = student.module
    texts = [caption for i in range(len(source)) for caption in one_or_several(source.captions(i))]
    text = torch.zeros(len(texts), sum(module.text.head.widths))
    with evaluation_mode(module), torch.no_grad():
        for begin in range(0, len(texts), 64 * _PART):
            tokens = student.tokenizer(texts[begin : begin + 64 * _PART])
            for group in by_length(tokens) if student.reads_only_text else [torch.arange(len(tokens))]:
                for part in group.split(4 * _PART):
                    (cut,) = student.shorten(tokens[part])
                    text[begin + part] = module.text.features(cut.to(device)).float().cpu()
    return text


class FeatureLoader:
    """The batches of data.loader.PairLoader, the same samples and captions, with features in the pictures' place."""

    def __init__(
        self,
        features: LockedFeatures,
        source: PairSource,
        student: ClipModel,
        config: RunConfig,
        teacher: Teacher | None,
        start_step: int,
        steps: int,
    ) -> None:
        train = config.train
        self.stored = None if teacher is None else teacher.stored
        self.features, self.source, self.student, self.caption = features, source, student, train.caption
        self.mean_captions = train.mean_captions
        self.start_step, self.steps = start_step, steps
        self.reads_text = "text" in read_modalities(config, source)
        self.sampler = source.sampler(train.batch_size, train.seed, rank(), world_size())

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start_step, self.steps):
            yield self._batch(step)

    def _batch(self, step: int) -> Batch:
        epoch, features = self.sampler.epoch(step), self.features
        kept: list[tuple[int, int, str]] = []
        choices: list[Choice] = []
        means: list[bool] = []
        problems: list[tuple[str, str]] = []
        for index in self.sampler.indices(step).tolist():
            captions = one_or_several(self.source.captions(index)) if self.reads_text else ()
            rng = sample_generator(self.sampler.seed, epoch, index)
            drawn = int(rng.integers(len(captions))) if captions else -1
            chosen = drawn if self.caption == "random" else min(drawn, 0)
            try:
                if index in features.problems:
                    raise BadSample(features.problems[index])
                if self.stored is not None:
                    choices.append(self.stored.choose(index, rng))
                else:
                    views = len(features.image)
                    choices.append(Choice(index, 1 + int(rng.integers(views)) if views > 1 else 0, EVALUATION_VIEW))
            except BadSample as error:
                problems.append((self.source.key(index), error.reason))
            else:
                kept.append((index, chosen, captions[chosen] if captions else ""))
                means.append(self.mean_captions > 0 and rng.random() < self.mean_captions)
        indices = torch.tensor([index for index, *_ in kept], dtype=torch.int64)
        places = torch.tensor([chosen for _, chosen, _ in kept], dtype=torch.int64)
        texts = [caption for *_, caption in kept] if self.reads_text else []
        tokens: Any = None
        if not self.reads_text:
            pass
        elif features.text is None:
            (tokens,) = self.student.shorten(self.student.tokenizer(texts))
        else:
            rows = [features.first[i] + place for i, place in zip(indices.tolist(), places.tolist(), strict=True)]
            tokens = features.text[rows]
            for row in (row for row, mean in enumerate(means) if mean):
                start = rows[row] - int(places[row])
                tokens[row] = features.text[
                    start : start + len(one_or_several(self.source.captions(kept[row][0])))
                ].mean(0)
        return Batch(
            indices=indices,
            keys=[self.source.key(index) for index, *_ in kept],
            caption_indices=places,
            student_images=features.image[[max(choice.view_number - 1, 0) for choice in choices], indices],
            student_tokens=tokens,
            teacher_images=None,
            teacher_tokens=None,
            captions=texts,
            problems=problems,
            truncated_student=truncated(self.student.tokenizer, texts),
            views=[choice.view for choice in choices],
            step=step,
            epoch=epoch,
            stored=None if self.stored is None else self.stored.read(choices, places.tolist()),
        )
