"""From images and captions to unit-length embeddings: batches, workers, progress, and a count of everything lost.

    encoded = encode_pairs(model, source)          # EncodedPairs, on the CPU
    encoder = Encoder(model, device="cuda")        # keeps the text features it has computed

Images are prepared exactly as in deployment (the evaluation view). An image that cannot be decoded is left out with
its captions and listed; a caption that is too long for the model is cut and counted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from clipdistill.data.loader import prepared, truncated
from clipdistill.data.pairs import PairSource
from clipdistill.data.views import normalise
from clipdistill.embed.names import check_engine, on_cluster
from clipdistill.embed.prepare import Item, Pictures, Preparation, ahead
from clipdistill.errors import InputError, nearest
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.parameters import evaluation_mode
from clipdistill.models.text_length import encode_by_length
from clipdistill.models.tokenizers import as_captions
from clipdistill.runtime.console import Shown
from clipdistill.runtime.console import say as console_say
from clipdistill.runtime.machine import cpu_count
from clipdistill.runtime.progress import Meter

if TYPE_CHECKING:
    from clipdistill.embed.engine import TowerEngine

DTYPES = {
    "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
"""Number formats of a forward pass, by the names of the command line and of recipes."""
FULL_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CHUNK = 32
"""Images a worker prepares at a time."""
_SAMPLE = 4
"""Pictures that are read to see how long one takes."""
_STARTING_PAYS = 2.0
"""Seconds of reading from which processes are started for it."""


@dataclass(repr=False)
class EncodedPairs(Shown):
    """Unit-length float32 embeddings of a pair source, on the CPU.

    image: (N, D) of the images that could be read; text: (M, D); text_to_image: (M,) int64 row of `image`;
    keys: N sample keys; captions: M texts; caption_indices: (M,) which caption of its image;
    problems: (key, reason) of the images left out; truncated: captions that were cut; seconds: time it took.
    """

    image: Tensor
    text: Tensor
    text_to_image: Tensor
    keys: list[str]
    captions: list[str]
    caption_indices: Tensor
    problems: list[tuple[str, str]] = field(default_factory=list)
    truncated: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        images, texts = len(self.image), len(self.text)
        left_out = f"; {len(self.problems)} images left out" if self.problems else ""
        return f"{images:,} images and {texts:,} captions as {self.image.shape[-1]} numbers of length 1{left_out}"


def encode_pairs(model: ClipModel, source: PairSource, *, captions: str = "all", **settings: Any) -> EncodedPairs:
    """Embed every image of `source` and its captions with `model`; settings: those of `open_encoder`.

    captions: "all", "first", or "first 5" (at most so many of each image).
    """
    return open_encoder(model, **settings).pairs(source, captions)


def open_encoder(model: ClipModel, *, engine: str = "torch", **settings: Any) -> Encoder:
    """An `Encoder` in this process, or with the engine "ray" one whose batches the workers of a cluster encode."""
    cluster = on_cluster(engine)
    if cluster is None:
        return Encoder(model, engine=engine, **settings)
    return importlib.import_module("clipdistill.ray_engine.encoder").RayEncoder(model, cluster, **settings)


class Encoder:
    """Embeds images and texts with one model. Texts are embedded once: the features are kept for the encoder's life.

    batch_size: images (texts) a forward pass; device: where (None: where the model is); workers: processes that
    decode images (None: as many as keep the tower busy, measured); dtype: "float32", "bfloat16" or "float16"
    (autocast); progress: a bar on the terminal's error stream; distributed: the ranks of torch.distributed share the
    work and all get the whole result; engine: what runs the towers (embed/engine.py); say: gets what was chosen (None:
    the error stream, with `progress`).
    The model is put into evaluation mode for each pass and left as it was found.
    """

    def __init__(
        self,
        model: ClipModel,
        *,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        workers: int | None = 0,
        progress: bool = True,
        dtype: str = "float32",
        distributed: bool = False,
        engine: str = "torch",
        say: Callable[[str], None] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"unknown number format '{dtype}'{nearest(dtype, DTYPES)}")
        if batch_size < 1 or (workers or 0) < 0:
            raise InputError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}")
        self.model = model
        self.batch_size = batch_size
        self.workers = workers
        self.progress = progress
        self.dtype = dtype
        parameter = next(iter(getattr(model.module, "parameters", list)()), None)
        self.device = torch.device(device or (parameter.device if parameter is not None else "cpu"))
        check_engine(engine, FULL_NAMES.get(dtype, dtype), self.device.type)
        self.engine = engine
        self.say = say or (functools.partial(console_say, file=sys.stderr) if progress else lambda line: None)
        self.engines: dict[str, TowerEngine] = {}
        self.expected = {"image": 0, "text": 0}
        self.rank, self.world = 0, 1
        if distributed and torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            self.progress = progress and self.rank == 0
            self.engine = "torch" if engine == "auto" else engine  # ranks must not choose differently
        self._rows: dict[str, int] = {}
        self._texts: list[Tensor] = []
        self._cut: set[str] = set()

    def pairs(self, source: PairSource, captions: str = "all") -> EncodedPairs:
        """Embed a pair source; see `encode_pairs`."""
        start = time.perf_counter()
        most = most_captions(captions)
        what = f"captions of {source.name}"
        listed = [source.captions(i)[:most] for i in range(len(source))]
        # while the next pictures are being decoded, captions are encoded
        encoding = self._new_texts([text for own in listed for text in own], what)
        image, kept, problems = self.images(source, encoding if self.world == 1 else None)
        texts: list[str] = []
        owner: list[int] = []
        place: list[int] = []
        for row, i in enumerate(kept):
            own = listed[i]
            texts += own
            owner += [row] * len(own)
            place += range(len(own))
        text = self.texts(texts, what, encoding)
        return EncodedPairs(
            image=image,
            text=text,
            text_to_image=torch.tensor(owner, dtype=torch.int64),
            keys=[source.key(i) for i in kept],
            captions=texts,
            caption_indices=torch.tensor(place, dtype=torch.int64),
            problems=problems,
            truncated=sum(caption in self._cut for caption in texts),
            seconds=time.perf_counter() - start,
        )

    def images(
        self, source: Pictures, meanwhile: Iterator[Any] | None = None
    ) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
        """(unit-length embeddings (N, D), the indices they belong to, (key, reason) of images left out).

        meanwhile: other work, of which a step is done whenever the next images are not ready yet.
        """
        if len(source) == 0:
            raise InputError(f"{source.name} holds no images")
        mine = range(self.rank, len(source), self.world)
        found = torch.zeros(len(source), self.model.embed_dim)
        readable = torch.zeros(len(source), dtype=torch.int32)
        unreadable: list[tuple[int, str]] = []
        with Meter(f"images of {source.name}", len(mine), enabled=self.progress) as meter:
            for rows, indices, bad in self.stream(source, mine, meanwhile):
                unreadable += bad
                found[indices] = rows
                readable[indices] = 1
                meter.advance(len(indices) + len(bad))
        problems = [(source.key(i), reason) for i, reason in unreadable]
        if self.world > 1:
            found, readable = self._summed(found), self._summed(readable)
            problems = self._gathered(problems)
        kept = torch.nonzero(readable)[:, 0]
        if len(kept) == 0:
            key, reason = problems[0]
            raise InputError(f"no image of {source.name} can be read (the first, {key}: {reason})")
        return found[kept], kept.tolist(), problems

    def stream(
        self, source: Pictures, indices: Sequence[int], meanwhile: Iterator[Any] | None = None
    ) -> Iterator[tuple[Tensor, list[int], list[tuple[int, str]]]]:
        """For each batch: unit rows (n, D) on the CPU, their indices, (index, reason) of unreadable images.

        meanwhile: as in `images`.
        """
        self.expected["image"] = len(indices)
        batches = _batches(self._prepared(source, indices), self.batch_size)
        for pixels, found, bad in ahead(batches, meanwhile or iter(())):
            rows = torch.zeros(0, self.model.embed_dim)
            if found:
                with self._forward():  # never around a yield: who is left in the middle would leave gradients off
                    rows = self.encode_images(pixels, source.name).cpu()
            yield rows, found, bad

    def texts(self, texts: str | Sequence[str], what: str = "texts", begun: Iterator[int] | None = None) -> Tensor:
        """Unit-length embeddings (M, D) of `texts`; each distinct text is embedded once in the encoder's life.

        begun: what `pairs` has begun to encode of them.
        """
        texts = as_captions(texts)
        new = sum(text not in self._rows for text in dict.fromkeys(texts))
        steps = self._new_texts(texts, what) if begun is None else begun
        with Meter(what, new, enabled=self.progress and new > 1) as meter:
            for count in steps:
                meter.advance(count)
        if len(self._texts) > 1:
            self._texts = [torch.cat(self._texts)]
        return self._texts[0][[self._rows[text] for text in texts]] if texts else torch.zeros(0, self.model.embed_dim)

    def _new_texts(self, texts: Sequence[str], what: str) -> Iterator[int]:
        """Embeds those of `texts` that are new, a batch a step; gives the texts done in each."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if not new:
            return
        new.sort(key=len)  # captions of like length in one batch: what is padded is not computed
        tokenizer = self.model.tokenizer
        self._cut |= {text for text in new if truncated(tokenizer, [text])}
        mine = new[self.rank :: self.world]
        self.expected["text"] = len(mine)
        if self.engine != "torch":  # a batch of middling length, of all the ones to come
            middle = mine[len(mine) // 2 :][: min(64, self.batch_size)]
            with self._forward():
                self._ready("text", *self.model.shorten(tokenizer(middle)))
        embedded: list[Tensor] = []
        batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]
        for rows in self.text_batches(batches, what):
            embedded.append(rows)
            yield len(rows)
        rows = torch.cat(embedded) if embedded else torch.zeros(0, self.model.embed_dim)
        if self.world > 1:
            shared = torch.zeros(len(new), self.model.embed_dim)
            shared[self.rank :: self.world] = rows
            rows = self._summed(shared)
        self._rows |= {text: len(self._rows) + i for i, text in enumerate(new)}
        self._texts.append(rows)

    def text_batches(self, batches: Sequence[Sequence[str]], what: str) -> Iterator[Tensor]:
        """Unit rows (n, D) on the CPU of each batch of texts, in order; nothing is kept."""
        for batch in batches:
            with self._forward():
                rows = self.encode_tokens(self.model.tokenizer(batch), what).cpu()
            yield rows

    def text_parts(self, parts: Iterable[Sequence[str]], what: str) -> Iterator[tuple[int, Tensor, int]]:
        """(number, unit rows, texts that were cut) of each part, whatever the others hold; in any order."""
        for number, texts in enumerate(parts):
            own = Encoder(self.model, batch_size=self.batch_size, dtype=self.dtype, progress=False)
            own.engine, own.engines = self.engine, self.engines
            yield number, own.texts(texts, what), own.truncated(texts)

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of these texts (embedded before) the model's context length cuts."""
        return sum(text in self._cut for text in texts)

    def encode_images(self, images: Tensor, what: str = "", *, at_once: int | None = None, unit: bool = True) -> Tensor:
        """Rows (n, D) float32, on the device, of pixels uint8 (n, H, W, 3) or of prepared images float (n, 3, H, W).

        what: what the images are, for the InputError when the model gives NaN or infinity; without it nothing is
        checked, so that nobody waits for the device. at_once: images a forward pass (None: all). unit: at length 1, or
        as long as the model makes them.
        """
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalise(images, self.model.image)
        return self._encoded("image", images, what, at_once, unit)

    def encode_tokens(self, tokens: Tensor, what: str = "", *, at_once: int | None = None) -> Tensor:
        """Unit rows (n, D) float32, on the device, of tokens (n, L); `what` and `at_once` as in `encode_images`."""
        if tokens.device.type != "cpu" or not len(tokens):  # on another device: who put it there has cut it
            return self._encoded("text", tokens.to(self.device), what, at_once, True)

        def encode(part: Tensor) -> Tensor:
            return self._encoded("text", part.to(self.device, non_blocking=True), what, at_once, True)

        if len(tokens) >= 64 and self.model.reads_only_text:
            return encode_by_length(encode, tokens, least=32)
        return encode(*self.model.shorten(tokens))

    def prepare(
        self, source: PairSource, views: int = 1, most: int | None = None, kept: Mapping[str, str] | None = None
    ) -> int:
        """Choose the engines on a sample of a set of pairs; returns the workers that keep the image tower fed.

        views: of each picture; most: of its captions (None: all); kept: engines by tower instead of the encoder's own,
        torch for a tower that it does not name.
        """
        count, sample = len(source), min(len(source), 64)
        texts = [text for i in range(sample) for text in source.captions(i)[:most]]
        self.expected = {"image": count * views, "text": count * len(texts) // sample}
        several = 16 if self.engine != "torch" or kept or DTYPES[self.dtype] is not None else _SAMPLE
        images, seconds = self._sample(source, range(min(count, several)))
        tokens = self.model.shorten(self.model.tokenizer(sorted(texts, key=len)[len(texts) // 2 :][:64]))[0]
        for tower, batch in (("image", images), ("text", tokens.to(self.device))):
            wanted = self.engine if kept is None else kept.get(tower, "torch").split(" + ")[0]
            small = wanted == "auto" and count <= 2 * _CHUNK
            if len(batch) and not small and (wanted != "torch" or DTYPES[self.dtype] is not None):
                self.settle(tower, batch, wanted)
        return self._suited_workers(images, seconds, count)

    def engine_names(self) -> dict[str, str]:
        """What runs a tower where it is not torch."""
        return {tower: engine.name for tower, engine in self.engines.items() if engine.name != "torch"}

    def describe(self) -> str:
        """'image tower by openvino, text tower by torch, in float32'."""
        names = self.engine_names()
        towers = ", ".join(f"{tower} tower by {names.get(tower, 'torch')}" for tower in ("image", "text"))
        return f"{towers}, in {FULL_NAMES.get(self.dtype, self.dtype)}"

    def settle(self, tower: str, batch: Tensor, engine: str | None = None) -> None:
        """Choose what runs a tower ("image", "text") by a first batch on the device and by how many are `expected`.

        engine: instead of the encoder's own.
        """
        from clipdistill.embed.engine import choose_engine

        self.engines[tower] = choose_engine(
            self.model, tower, engine or self.engine, functools.partial(self._by_torch, tower), batch,
            dtype=FULL_NAMES.get(self.dtype, self.dtype), items=self.expected[tower], say=self.say,
        )  # fmt: skip

    def notes(self, model: str) -> list[str]:
        """A sentence for each tower that was compared with torch in float32: what ran it, and how near it came."""
        dtype = FULL_NAMES.get(self.dtype, self.dtype)
        return [
            f"the {tower} tower of the {model} was run by {engine.name} in {dtype} (cosine with torch in float32 at "
            f"least {engine.agreement:.7f})"
            for tower, engine in self.engines.items()
            if engine.agreement is not None
        ]

    def _ready(self, tower: str, batch: Tensor) -> None:
        if tower not in self.engines and (self.engine not in ("auto", "torch") or self.expected[tower]):
            self.settle(tower, batch.to(self.device))

    def _encoded(self, tower: str, batch: Tensor, what: str, at_once: int | None, unit: bool) -> Tensor:
        with torch.no_grad():
            if self.engine != "torch" and len(batch):
                self._ready(tower, batch)
            rows = [self._run(tower, part) for part in (batch.split(at_once) if at_once else (batch,))]
            features = (rows[0] if len(rows) == 1 else torch.cat(rows)).float()
            if what and not torch.isfinite(features).all():
                raise InputError(
                    f"the model's embeddings of {what} are not finite (NaN or infinity): its weights are damaged,"
                    " or the number format is too narrow for it (try float32)"
                )
            return torch.nn.functional.normalize(features, dim=-1) if unit else features

    def _sample(self, source: Pictures, indices: Sequence[int]) -> tuple[Tensor, float]:
        """(some pictures as the image tower takes them, seconds that reading one of them took)."""
        began = time.perf_counter()
        chunk = Preparation(source, [self.model.image])[[Item(i) for i in indices]]
        seconds = (time.perf_counter() - began) / max(len(indices), 1)
        return normalise(chunk.pixels[0].to(self.device), self.model.image), seconds

    def _suited_workers(self, images: Tensor, seconds: float, count: int) -> int:
        """Processes that keep the image tower fed, from the cores and what a picture takes to read and to encode."""
        cores = cpu_count()
        if cores < 2 or seconds * count < _STARTING_PAYS:
            return 0
        images, times = images[:_SAMPLE], []
        with self._forward():
            for _ in range(2):
                began = time.perf_counter()
                self._run("image", images).cpu()
                times.append((time.perf_counter() - began) / len(images))
        workers = max(1, min(cores, math.ceil(seconds / min(times))))
        self.say(
            f"{workers} {'processes read' if workers > 1 else 'process reads'} the pictures: {1000 * seconds:.1f} ms "
            f"for one, {1000 * min(times):.1f} ms to encode it, {cores} cores"
        )
        return workers

    def _prepared(self, source: Pictures, indices: Sequence[int]) -> Iterator[tuple[Tensor, list[int], list[Any]]]:
        """(pixels (n, H, W, 3) uint8, their indices, (index, reason) of unreadable ones), a chunk at a time."""
        workers = self.workers
        if workers is None:
            many = len(indices) > 2 * _CHUNK
            workers = self._suited_workers(*self._sample(source, indices[:_SAMPLE]), len(indices)) if many else 0
        size = self.batch_size  # no chunk goes beyond its batch
        cuts = [range(i, min(i + size, len(indices)), _CHUNK) for i in range(0, len(indices), size)]
        tasks = [[Item(i) for i in indices[start : min(start + _CHUNK, c.stop)]] for c in cuts for start in c]
        # processes are started here and not in the thread that waits for them
        chunks = prepared(Preparation(source, [self.model.image]), tasks, workers, ahead=4)

        def parts() -> Iterator[tuple[Tensor, list[int], list[Any]]]:
            for chunk in chunks:
                bad = [(item.index, why) for item, why in zip(chunk.items, chunk.problems) if why is not None]
                good = [row for row, why in enumerate(chunk.problems) if why is None]
                yield chunk.pixels[0][good] if bad else chunk.pixels[0], [chunk.items[row].index for row in good], bad

        return parts()

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        module = self.model.module
        if hasattr(module, "to"):
            module.to(self.device)
        with evaluation_mode(module), torch.inference_mode():
            yield

    def _run(self, tower: str, batch: Tensor) -> Tensor:
        engine = self.engines.get(tower)
        return self._by_torch(tower, batch) if engine is None or engine.run is None else engine.run(batch)

    def _by_torch(self, tower: str, batch: Tensor) -> Tensor:
        encode, number_format = getattr(self.model.module, f"encode_{tower}"), DTYPES[self.dtype]
        if number_format is None:
            return encode(batch)
        with torch.autocast(self.device.type, dtype=number_format):
            return encode(batch)

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over ranks; each row is non-zero on one rank only, so the sum is exact."""
        cuda = torch.distributed.get_backend() == "nccl"
        values = values.to(self.device) if cuda else values
        torch.distributed.all_reduce(values)
        return values.cpu()

    def _gathered(self, problems: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The problems of all ranks, as JSON in byte tensors (nothing is unpickled)."""
        data = json.dumps(problems).encode()
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        sizes = self._summed(sizes)
        table = torch.zeros(self.world, int(sizes.max()), dtype=torch.int32)
        table[self.rank, : len(data)] = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int32))
        table = self._summed(table)
        rows = [bytes(row[:size].to(torch.uint8).tolist()) for row, size in zip(table, sizes.tolist(), strict=True)]
        return [(key, reason) for row in rows for key, reason in json.loads(row)]


def _batches(chunks: Any, batch_size: int) -> Iterator[tuple[Tensor, list[int], list[tuple[int, str]]]]:
    """Chunks put together to batches of `batch_size` pictures, of which those that cannot be read are left out: what
    is in a batch depends on no picture before it."""
    pixels: list[Tensor] = []
    indices: list[int] = []
    bad: list[tuple[int, str]] = []
    for chunk, chunk_indices, chunk_bad in chunks:
        pixels.append(chunk)
        indices += chunk_indices
        bad += chunk_bad
        if len(indices) + len(bad) == batch_size:
            yield torch.cat(pixels), indices, bad
            pixels, indices, bad = [], [], []
    if pixels:
        yield torch.cat(pixels), indices, bad


def most_captions(rule: str) -> int | None:
    """How many captions of each image a rule keeps: None for "all", 1 for "first", 5 for "first 5"."""
    if rule == "all":
        return None
    word, _, number = rule.partition(" ")
    if word == "first" and (not number or (number.isdecimal() and int(number) > 0)):
        return int(number or 1)
    raise InputError(f"captions must be 'all', 'first' or 'first 5', got '{rule}'")
