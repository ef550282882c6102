"""Batches do not depend on workers, ranks or interruptions; field.md E2 rows 7, 11, 12, 17, 18 and 26."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdistill.data.loader import Batch, PairLoader, copied_ahead, truncated
from clipdistill.data.open import open_pairs
from clipdistill.data.views import ImageSpec, View, ViewPolicy, render
from clipdistill.errors import InputError
from tests.conftest import shared_folder
from tests.data.helpers import FakeModel, Letters, MemoryPairs

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CROP = ViewPolicy(kind="crop", scale=(0.3, 1.0), flip=0.5, color_jitter=0.3, randaugment_ops=1)
SOURCE = MemoryPairs(23, bad={4: "corrupt image: test", 11: "truncated image: test"})
TEACHER = FakeModel(ImageSpec(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)), Letters(24))


def batches(source: Any = SOURCE, **changes: Any) -> list[Batch]:
    settings: dict[str, Any] = {
        "batch_size": 6,
        "student": FakeModel(),
        "teacher": TEACHER,
        "view": CROP,
        "seed": 5,
        "steps": 8,
    }
    return list(PairLoader(source, **(settings | changes)))


def content(batch: Batch) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()}


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert content(a) == content(b)


@pytest.fixture(scope="module")
def reference() -> list[Batch]:
    """Eight steps over nearly three epochs, by one process without workers."""
    return batches()


def test_the_reference_is_what_it_should_be(reference: list[Batch]) -> None:
    assert [b.step for b in reference] == list(range(8))
    assert [b.epoch for b in reference] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sum(len(b.problems) for b in reference) > 0
    for batch in reference:
        count = len(batch.keys)
        assert count + len(batch.problems) == 6
        assert batch.student_images.shape == (count, 3, 24, 24)
        assert batch.teacher_images is not None
        assert batch.teacher_images.shape == (count, 3, 32, 32)
        assert batch.student_images.dtype == torch.float32
        assert batch.student_tokens.shape == (count, 32)
        assert batch.teacher_tokens is not None
        assert batch.teacher_tokens.shape == (count, 24)
        assert len(batch.captions) == len(batch.views) == count
        assert set(batch.problems) <= {
            ("sample-0004", "corrupt image: test"),
            ("sample-0011", "truncated image: test"),
        }


def test_every_row_belongs_together(reference: list[Batch]) -> None:
    for batch in reference:
        for row, index in enumerate(batch.indices.tolist()):
            assert batch.keys[row] == SOURCE.key(index)
            assert batch.captions[row] == SOURCE.captions(index)[batch.caption_indices[row]]
            image, view = SOURCE.image(index), batch.views[row]
            assert torch.equal(batch.student_images[row], render(image, view, FakeModel().image))
            assert torch.equal(batch.teacher_images[row], render(image, view, TEACHER.image))  # type: ignore[index]
            assert torch.equal(batch.student_tokens[row], Letters()([batch.captions[row]])[0])
            assert torch.equal(batch.teacher_tokens[row], Letters(24)([batch.captions[row]])[0])  # type: ignore[index]


@pytest.mark.parametrize("workers", [1, 3])
def test_row_11_workers_change_nothing(workers: int, reference: list[Batch]) -> None:
    assert_same(batches(workers=workers), reference)


@pytest.mark.slow
def test_spawned_workers_change_nothing(reference: list[Batch]) -> None:
    assert_same(batches(workers=1, start_method="spawn", steps=2), reference[:2])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_row_12_ranks_together_are_the_batch_of_one(world: int, reference: list[Batch]) -> None:
    ranks = [batches(rank=rank, world=world, workers=rank % 2) for rank in range(world)]
    for step, whole in enumerate(reference):
        parts = [rank[step] for rank in ranks]
        assert [k for p in parts for k in p.keys] == whole.keys
        assert [c for p in parts for c in p.captions] == whole.captions
        assert [x for p in parts for x in p.problems] == whole.problems
        assert torch.equal(torch.cat([p.indices for p in parts]), whole.indices)
        assert torch.equal(torch.cat([p.student_images for p in parts]), whole.student_images)
        assert torch.equal(torch.cat([p.teacher_images for p in parts]), whole.teacher_images)  # type: ignore[misc, arg-type]
        assert torch.equal(torch.cat([p.student_tokens for p in parts]), whole.student_tokens)


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (3, 2), (4, 1), (8, 0)])
def test_row_18_resuming_equals_never_having_stopped(start: int, workers: int, reference: list[Batch]) -> None:
    assert_same(batches(start_step=start, workers=workers), reference[start:])


def test_large_batches_are_prepared_in_parts() -> None:
    source = MemoryPairs(150, captions=1, size=8)
    alone = batches(source, batch_size=150, steps=2, teacher=None)
    shared = batches(source, batch_size=150, steps=2, teacher=None, workers=2)
    assert_same(alone, shared)
    assert len(alone[0].keys) == 150
    assert alone[0].keys != alone[1].keys


def test_epochs_differ_in_order_caption_and_view() -> None:
    runs = batches(MemoryPairs(12), batch_size=12, steps=2)
    first, second = ({b.keys[i]: (b.caption_indices[i].item(), b.views[i]) for i in range(12)} for b in runs)
    assert runs[0].keys != runs[1].keys
    assert set(first) == set(second)
    assert sum(first[k][1] == second[k][1] for k in first) == 0
    assert 0 < sum(first[k][0] == second[k][0] for k in first) < 12


def test_first_caption_and_evaluation_view() -> None:
    (batch,) = batches(steps=1, caption="first", view=ViewPolicy())
    assert batch.caption_indices.tolist() == [0] * len(batch.keys)
    assert set(batch.views) == {View()}
    random_captions = batches(steps=1)[0]
    assert batches(steps=1, caption="first")[0].views == random_captions.views


def test_row_26_what_both_models_want_is_made_once() -> None:
    (same,) = batches(steps=1, teacher=FakeModel())
    assert same.teacher_images is same.student_images
    assert same.teacher_tokens is same.student_tokens
    other = ImageSpec(size=24, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    (normalised,) = batches(steps=1, teacher=FakeModel(other))
    assert normalised.teacher_tokens is normalised.student_tokens
    assert normalised.teacher_images is not None
    for row, index in enumerate(normalised.indices.tolist()):
        expected = render(SOURCE.image(index), normalised.views[row], other)
        assert torch.equal(normalised.teacher_images[row], expected)
    (alone,) = batches(steps=1, teacher=None)
    assert alone.teacher_images is None
    assert alone.teacher_tokens is None


def test_row_7_cut_captions_are_counted_per_model() -> None:
    (batch,) = batches(steps=1, student=FakeModel(tokenizer=Letters(28)), teacher=FakeModel(tokenizer=Letters(12)))
    lengths = [len(caption) + 2 for caption in batch.captions]
    assert batch.truncated_student == sum(n > 28 for n in lengths)
    assert batch.truncated_teacher == len(batch.captions)
    assert truncated(Letters(10), ["12345678", "123456789", "é" * 8, "é" * 9]) == 2


def test_row_7_two_hundred_words_with_clip_tokens() -> None:
    from clipdistill.models.tokenizers import ClipBpeTokenizer

    tokenizer = ClipBpeTokenizer()
    assert truncated(tokenizer, ["a dog " * 100, "a dog", "many short words " * 10]) == 1


def test_a_batch_without_a_single_good_sample() -> None:
    broken = MemoryPairs(4, bad=dict.fromkeys(range(4), "corrupt image"))
    (batch,) = batches(broken, batch_size=4, steps=1)
    assert batch.student_images.shape == (0, 3, 24, 24)
    assert batch.student_tokens.shape == (0, 32)
    assert batch.indices.dtype == torch.int64
    assert len(batch.problems) == 4


def test_sets_smaller_than_batch_and_workers() -> None:
    runs = batches(MemoryPairs(3), batch_size=64, steps=4, workers=3)
    assert [sorted(b.indices.tolist()) for b in runs] == [[0, 1, 2]] * 4


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    batches(steps=2, workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fast_pixels_are_close() -> None:
    fast = batches(MemoryPairs(12, size=300), steps=1, exact=False, view=ViewPolicy())
    exact = batches(MemoryPairs(12, size=300), steps=1, view=ViewPolicy())
    assert fast[0].keys == exact[0].keys
    assert (fast[0].student_images - exact[0].student_images).abs().mean() < 0.05
    assert fast[0].views == exact[0].views


def test_row_17_workers_leave_signals_to_the_parent() -> None:
    others = set(_children(os.getpid()))
    source = MemoryPairs(64)
    loader = iter(PairLoader(source, batch_size=4, student=FakeModel(), steps=60, workers=2))
    next(loader)  # the other worker may still be starting: it must not be caught either
    children = set(_children(os.getpid())) - others
    assert len(children) == 2
    for child in children:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(int(child), number)
    assert len(list(loader)) == 59
    del loader
    deadline = time.monotonic() + 10
    while set(_children(os.getpid())) & children and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(_children(os.getpid())) & children


def _children(parent: int) -> list[str]:
    listing = Path(f"/proc/{parent}/task/{parent}/children")
    if not listing.exists():
        pytest.skip("needs Linux's list of child processes")
    return listing.read_text().split()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_step": 9}, "cannot start at step 9 of 8"),
        ({"caption": "last"}, "caption must be 'random' or 'first'"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"world": 7, "rank": 0}, "7 processes cannot share batches of 6"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        batches(**changes)


def test_row_18_on_photographs_with_all_kinds_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path))
    folder = shared_folder("data/flickr8k")
    karpathy = open_pairs(str(folder / "dataset_flickr8k.json"), split="train")
    table = open_pairs(str(folder / "openclip_train.csv"))
    tars = open_pairs(str(folder / "wds_train"))
    assert pickle.loads(pickle.dumps(karpathy)).fingerprint() == karpathy.fingerprint()
    settings = {"batch_size": 16, "steps": 2}
    first, second = batches(karpathy, **settings), batches(table, **settings, workers=2)
    for a, b in zip(first, second):
        assert a.captions == b.captions
        assert torch.equal(a.student_images, b.student_images)
    assert_same(batches(tars, **settings), batches(tars, **settings, workers=2))
    (resumed,) = batches(tars, **settings, start_step=1, workers=1)
    assert_same([resumed], batches(tars, **settings)[1:])


class _Streams:
    """What `copied_ahead` uses of torch.cuda, noting in which order."""

    def __init__(self) -> None:
        self.noted: list[Any] = []
        self.computing = self

    def Stream(self, device: torch.device) -> Any:  # noqa: N802
        return "copies"

    @contextlib.contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        self.noted.append(("on", stream))
        yield

    def current_stream(self, device: torch.device) -> Any:
        return self.computing

    def wait_stream(self, stream: str) -> None:
        self.noted.append(("wait for", stream))


def test_on_a_gpu_the_next_batch_is_copied_while_a_step_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of its own, which each step waits for before it begins; nothing is freed under a step that reads."""
    streams, steps = _Streams(), batches(steps=3)
    for batch in steps:
        batch.student_images = torch.empty_like(batch.student_images, device="meta")  # stands for the GPU
        batch.stored = {"image": torch.empty(6, 2, device="meta")}
    noted = streams.noted
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: noted.append(("kept", stream is streams)), raising=False
    )

    def made() -> Iterator[Batch]:
        for batch in steps:
            noted.append(("made", batch.step))
            yield batch

    for batch in copied_ahead(made(), torch.device("cuda"), streams):
        noted.append(("step", batch.step))
    begun = [("on", "copies"), ("made", 0)]
    turn = [("wait for", "copies"), ("kept", True), ("kept", True), ("on", "copies")]
    assert noted == [
        *begun, *turn, ("made", 1), ("step", 0), *turn, ("made", 2), ("step", 1), *turn, ("step", 2),
    ]  # fmt: skip
