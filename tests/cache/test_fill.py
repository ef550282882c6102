"""Filling: the right numbers, whatever interrupts it and however many do it."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from clipdistill.cache import create
from clipdistill.cache import fill as filling
from clipdistill.cache.check import verify
from clipdistill.cache.fill import fill
from clipdistill.cache.merge import merge
from clipdistill.cache.store import CacheStore
from clipdistill.data.pairs import BadSample
from clipdistill.data.views import EVALUATION_VIEW, render
from clipdistill.errors import BudgetError, ClipdistillError, InputError
from clipdistill.models import load_model
from tests.cache.support import cache_config, contents, filled, scenes
from tests.data.helpers import encoded

VIEWS = {
    "views": 2,
    "view": {"kind": "crop", "scale": [0.3, 1.0], "flip": 0.5, "color_jitter": 0.2, "randaugment_ops": 2},
}
FORK = multiprocessing.get_context("fork")


def _rows(model, tensors):
    with torch.no_grad():
        return torch.nn.functional.normalize(tensors, dim=-1)


def _expected(model, source, index, view):
    with torch.no_grad():
        image = model.module.encode_image(render(source.image(index), view, model.image)[None])
        text = model.module.encode_text(model.tokenizer(list(source.captions(index))))
    return _rows(model, image)[0], _rows(model, text)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("bf16", 8e-3), ("int8", 8e-3)])
def test_rows_are_the_teachers_embeddings_of_every_view_and_caption(
    tmp_path, teacher, second_teacher, dtype, tolerance
):
    store = filled(tmp_path / "c", f"{teacher},{second_teacher}", 20, dtype=dtype, **VIEWS)
    source = scenes(20)
    for number, name in enumerate((teacher, second_teacher)):
        model = load_model(name, teacher=True)
        for index in (0, 7, 8, 19):
            for view in range(3):
                image, text = _expected(model, source, index, store.view(index, view))
                for caption in range(5):
                    found = store.read(number, [index], [caption], [view])
                    assert torch.allclose(found[0][0], image, atol=tolerance)
                    assert torch.allclose(found[1][0], text[caption], atol=tolerance)
    assert store.view(3, 0) == EVALUATION_VIEW
    assert store.view(3, 1) != store.view(3, 2)
    assert verify(tmp_path / "c").good


def test_views_come_back_exactly_and_do_not_depend_on_blocks_or_teachers(tmp_path, teacher, second_teacher):
    one = filled(tmp_path / "a", teacher, 20, **VIEWS)
    two = filled(tmp_path / "b", second_teacher, 20, **{**VIEWS, "block": 5})
    views = [[store.view(i, n) for i in range(20) for n in (1, 2)] for store in (one, two)]
    assert views[0] == views[1]
    assert any(view.operations for view in views[0])
    again = filled(tmp_path / "d", teacher, 20, **VIEWS, view_seed=1)
    assert again.view(0, 1) != one.view(0, 1)


def test_reading_many_equals_reading_one_by_one(tmp_path, teacher):
    store = filled(tmp_path / "c", teacher, 30)
    rng = np.random.default_rng(0)
    indices, captions = rng.integers(30, size=64).tolist(), rng.integers(5, size=64).tolist()
    image, text = store.read(0, indices, captions, [0] * 64)
    for row, (index, caption) in enumerate(zip(indices, captions)):
        one = store.read(0, [index], [caption], [0])
        assert torch.equal(image[row], one[0][0])
        assert torch.equal(text[row], one[1][0])


def test_first_captions_only(tmp_path, teacher):
    store = filled(tmp_path / "c", teacher, 10, captions="first")
    assert store.manifest.data.captions == 10
    with pytest.raises(InputError, match="1 stored captions, number 1"):
        store.read(0, [0], [1], [0])


def test_workers_change_nothing(tmp_path, teacher):
    filled(tmp_path / "a", teacher, 30, **VIEWS)
    filled(tmp_path / "b", teacher, 30, **VIEWS, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def _child(config, report, rank, kill_at, delay):
    """One filling process; `kill_at` (stage, block) ends it as kill -9 would."""
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), "2"
    if kill_at is not None:
        _kill_while_writing(*kill_at)
    if delay is not None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, delay)
    report.put(fill(config).samples)


def _kill_while_writing(stage, block):
    original, written = filling.write_block, []

    def write(path, tensors, metadata):
        written.append(path)
        if len(written) == block + 1:
            if stage == "half written":
                path.parent.mkdir(exist_ok=True)
                path.with_name(f".{path.name}.writing-cut").write_bytes(b"cut")
            if stage == "written, claim not given back":
                original(path, tensors, metadata)
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, tensors, metadata)

    filling.write_block = write


def _run(config, **settings):
    report = FORK.Queue()
    values = {"rank": 0, "kill_at": None, "delay": None, **settings}
    child = FORK.Process(target=_child, args=(config, report, *values.values()))
    child.start()
    return child, report


@pytest.mark.parametrize("stage", ["before writing", "half written", "written, claim not given back"])
@pytest.mark.parametrize("block", [0, 3])
def test_a_killed_fill_goes_on_and_ends_with_the_same_store(tmp_path, teacher, stage, block):
    filled(tmp_path / "whole", teacher, 40, **VIEWS)
    config = cache_config(tmp_path / "killed", teacher, 40, **VIEWS)
    child, _ = _run(config, kill_at=(stage, block))
    child.join()
    assert child.exitcode == -signal.SIGKILL
    store = CacheStore(tmp_path / "killed")
    with pytest.raises(InputError, match="blocks are not filled"):
        store.require_complete()
    done = 5 - len(store.missing_blocks())
    assert fill(config).samples == 40 - 8 * done
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path, teacher):
    filled(tmp_path / "whole", teacher, 120)
    config = cache_config(tmp_path / "killed", teacher, 120)
    for delay in np.random.default_rng(0).uniform(0.005, 0.4, size=20):
        child, _ = _run(config, delay=float(delay))
        child.join()
    fill(config)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_two_processes_share_the_work(tmp_path, teacher):
    filled(tmp_path / "alone", teacher, 64)
    config = cache_config(tmp_path / "both", teacher, 64)
    children = [_run(config, rank=rank) for rank in (0, 1)]
    for child, _ in children:
        child.join(60)
        assert child.exitcode == 0
    assert sum(report.get() for _, report in children) == 64  # nothing was done twice
    assert contents(tmp_path / "alone") == contents(tmp_path / "both")
    assert not list((tmp_path / "both" / "locks").iterdir())


def test_a_living_process_takes_over_from_a_dead_one(tmp_path, teacher):
    config = cache_config(tmp_path / "c", teacher, 40)
    fill(config.model_copy(update={"part": "0/2"}))
    locks = tmp_path / "c" / "locks"
    child = FORK.Process(target=lambda: None)
    child.start()
    child.join()
    (locks / "000001.lock").write_text(json.dumps({"host": os.uname().nodename, "pid": child.pid, "started": "1"}))
    assert fill(config).samples == 16
    CacheStore(tmp_path / "c").require_complete()


def test_growing_computes_only_what_is_new(tmp_path, teacher):
    small = filled(tmp_path / "c", teacher, 20, **VIEWS)
    before = contents(tmp_path / "c")
    report = fill(cache_config(tmp_path / "c", teacher, 33, **VIEWS))
    assert report.samples == 13
    after = contents(tmp_path / "c")
    blocks = [name for name in before if name.endswith(".safetensors")]
    assert all(before[name] == after[name] for name in blocks)
    assert report.store.manifest.segments == (20, 33)
    whole = filled(tmp_path / "whole", teacher, 33, **VIEWS)
    for index in range(33):
        found, expected = (s.read(0, [index], [4], [2]) for s in (report.store, whole))
        assert torch.allclose(found[0], expected[0], atol=2e-3)
        assert torch.allclose(found[1], expected[1], atol=2e-3)
    assert verify(tmp_path / "c").good
    assert small.manifest.data.samples == 20


class _Reordered:
    """A source in another order, for a set whose new shard comes first."""

    def __init__(self, source, order):
        self._source, self._order = source, order
        self.name, self.problems, self.max_pixels = source.name, source.problems, source.max_pixels

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._order)

    def fingerprint(self):
        return f"order {self._order}"

    def key(self, i):
        return self._source.key(self._order[i])

    def captions(self, i):
        return self._source.captions(self._order[i])

    def image(self, i, at_least=None):
        return self._source.image(self._order[i], at_least)


def test_other_pictures_under_the_same_names_are_not_added_to_a_store(tmp_path, teacher):
    """A fill that goes on, a share of another machine, a merge: the rest would be of other pictures."""
    folder = tmp_path / "photographs"
    folder.mkdir()

    def draw(shift):
        for number in range(16):
            (folder / f"{number:02d}.jpg").write_bytes(encoded(number + shift))
            (folder / f"{number:02d}.txt").write_text(f"picture {number}")

    def share(out, part):
        return cache_config(out, teacher, data={"path": str(folder)}, part=part)

    draw(0)
    fill(share(tmp_path / "one", "0/2"))
    draw(100)
    with pytest.raises(InputError, match="the pictures of photographs are not those that it was begun with"):
        fill(share(tmp_path / "one", "1/2"))
    fill(share(tmp_path / "two", "1/2"))
    with pytest.raises(InputError, match="filled from other pictures under the same names"):
        merge(tmp_path / "merged", [tmp_path / "one", tmp_path / "two"])
    draw(0)
    assert not fill(share(tmp_path / "one", "1/2")).store.missing_blocks()


def test_new_samples_may_come_first(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    order = [*range(16, 21), *range(16)]
    source = _Reordered(scenes(21), order)
    report = fill(cache_config(tmp_path / "c", teacher, 21), source=source)
    assert report.samples == 5
    model = load_model(teacher, teacher=True)
    for index in (0, 4, 5, 20):
        image, text = _expected(model, source, index, EVALUATION_VIEW)
        found = report.store.read(0, [index], [2], [0])
        assert torch.allclose(found[0][0], image, atol=1e-3)
        assert torch.allclose(found[1][0], text[2], atol=1e-3)


def test_a_store_cannot_lose_samples(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 20)
    with pytest.raises(InputError, match="data keys: the cache has 4 that the data has not"):
        fill(cache_config(tmp_path / "c", teacher, 16))


def test_another_teacher_is_added_to_a_store(tmp_path, teacher, second_teacher):
    filled(tmp_path / "c", teacher, 16, **VIEWS)
    before = contents(tmp_path / "c")
    store = filled(tmp_path / "c", f"{teacher},{second_teacher}", 16, **VIEWS)
    after = contents(tmp_path / "c")
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    both = filled(tmp_path / "both", f"{teacher},{second_teacher}", 16, **VIEWS)
    assert torch.equal(store.read(1, [3], [1], [2])[0], both.read(1, [3], [1], [2])[0])
    with pytest.raises(InputError, match="teachers: it also holds"):
        fill(cache_config(tmp_path / "c", teacher, 16, **VIEWS))


class _Broken(_Reordered):
    """Two images cannot be read."""

    def __init__(self, source, broken):
        super().__init__(source, list(range(len(source))))
        self.broken = broken

    def fingerprint(self):
        return self._source.fingerprint()

    def image(self, i, at_least=None):
        if i in self.broken:
            raise BadSample("truncated image", self.key(i))
        return super().image(i, at_least)


def test_an_unreadable_image_has_a_place_and_no_embedding(tmp_path, teacher):
    config = cache_config(tmp_path / "c", teacher, 20, **VIEWS)
    report = fill(config, source=_Broken(scenes(20), {3, 12}))
    assert report.bad == 2
    assert [report.store.valid(i) for i in (2, 3, 4, 12)] == [True, False, True, False]
    assert not report.store.read(0, [3], [0], [0])[0].any()
    assert report.store.read(0, [3], [0], [0])[1].any()
    lines = [json.loads(line) for line in (tmp_path / "c" / "bad_samples.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["truncated image"] * 2
    assert verify(tmp_path / "c").invalid_samples == 2


def test_too_many_unreadable_images_stop_the_fill_and_a_new_start_is_no_way_around(tmp_path, teacher):
    config = cache_config(tmp_path / "c", teacher, 40)
    source = _Broken(scenes(40), set(range(2, 20)))
    for _ in range(2):
        with pytest.raises(BudgetError, match="are bad"):
            fill(config, source=source)


def test_a_disk_that_is_too_small_stops_it_before_anything_is_computed(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ClipdistillError, match="are free: make room"):
        fill(cache_config(tmp_path / "c", teacher, 40))
    assert not list((tmp_path / "c").glob("teacher-0/*.safetensors"))


def test_a_teacher_that_gives_nan_is_an_error(tmp_path, teacher):
    model = load_model(teacher, teacher=True)
    model.module.visual.proj.data.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN or infinite embeddings for images"):
        fill(cache_config(tmp_path / "c", teacher, 10), teachers=[model])


def test_a_folder_with_other_files_is_refused(tmp_path, teacher):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds other files \('thesis.txt'\)"):
        fill(cache_config(tmp_path / "c", teacher, 10))


def test_views_without_a_random_policy_are_refused(tmp_path, teacher):
    with pytest.raises(InputError, match="would all be the same"):
        cache_config(tmp_path / "c", teacher, 10, views=2, view={"kind": "evaluation"})


@pytest.mark.parametrize(
    ("samples", "bytes_each", "expected"),
    [(100, 1000, 64), (6000, 6000, 128), (10**7, 6000, 4096), (10**7, 90_000, 512)],
)
def test_block_sizes(samples, bytes_each, expected):
    assert create.block_size(samples, bytes_each) == expected


@pytest.mark.slow
def test_a_fill_keeps_the_engine_it_began_with(tmp_path, teacher):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    said = []
    config = cache_config(tmp_path / "c", teacher, 40, engine="onnx", part="0/2")
    store = fill(config, say=said.append).store
    entry = store.manifest.teachers[0]
    assert entry.engines == {"image": "onnx", "text": "onnx"}
    assert min(entry.agreement.values()) > 0.9999
    assert any("image tower by onnx, text tower by onnx, in float32" in line for line in said)
    again = fill(cache_config(tmp_path / "c", teacher, 40), say=said.append).store  # auto would take torch here
    assert again.manifest.teachers[0] == entry
    assert not again.missing_blocks()
    plain = filled(tmp_path / "p", teacher, 40)
    assert plain.manifest.teachers[0].engines == {}
    assert again.manifest.fingerprint() != plain.manifest.fingerprint()
    for index in (0, 9, 39):
        for a, b in zip(again.read(0, [index], [2], [0]), plain.read(0, [index], [2], [0]), strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-3)


def test_a_store_whose_engine_does_not_run_here_is_not_continued(tmp_path, teacher, monkeypatch):
    from clipdistill.embed import engine

    fill(cache_config(tmp_path / "c", teacher, 40, part="0/2"))
    path = tmp_path / "c" / "manifest.json"
    store = CacheStore(tmp_path / "c")
    entry = store.manifest.teachers[0].model_copy(update={"engines": {"image": "openvino"}})
    create.write_manifest(tmp_path / "c", store.manifest.model_copy(update={"teachers": (entry,)}))
    monkeypatch.setattr(engine, "_converted", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"was run by openvino \(image tower\), which does not run here: install it"):
        fill(cache_config(tmp_path / "c", teacher, 40))
    assert path.read_bytes() == before
