"""Training from stored embeddings: the same losses as live, the same pixels for both, exact resume."""

import json
import os
import random
import signal

import numpy as np
import pytest
import torch

from clipdistill.cache.stored import StoredRows
from clipdistill.cache.tars import export_shards, read_shard
from clipdistill.cache.teacher import CacheUse, open_cached_teacher
from clipdistill.data.loader import PairLoader
from clipdistill.data.open import open_pairs
from clipdistill.data.views import render
from clipdistill.errors import InputError, Preempted
from clipdistill.models import load_model
from clipdistill.objective import Embeddings
from clipdistill.runs.folder import read_rows as read_lines
from clipdistill.train import loop
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from tests.cache.support import filled, saved_teacher, scenes
from tests.cache.test_fill import VIEWS

SIZE = 24


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return saved_teacher(tmp_path_factory.mktemp("student") / "student", seed=3, image_size=48)


@pytest.fixture(scope="module")
def store(tmp_path_factory, teacher):
    return filled(tmp_path_factory.mktemp("cache") / "c", teacher, SIZE)


@pytest.fixture(scope="module")
def viewed(tmp_path_factory, teacher):
    return filled(tmp_path_factory.mktemp("viewed") / "c", teacher, SIZE, **VIEWS)


def _config(out, teacher, student, *assignments, recipe="clip-rd", data=None):
    given = {
        "student": "tiny",
        "student_weights": student,
        "teacher": teacher,
        "data": data or {"path": "scenes:train", "size": SIZE},
        "out": str(out),
        "preflight": {"allow_weak_teacher": True},
        "train": {"steps": 6, "batch_size": 8, "warmup_steps": 1, "precision": "fp32", "log_every": 1},
    }
    return resolve(recipe, given, assignments=list(assignments))


def _losses(out, *arguments, **settings):
    distill(_config(out, *arguments, **settings), quiet=True)
    return [line["terms"] for line in read_lines(out / "log.jsonl")]


def test_training_from_an_fp16_cache_equals_live_training_with_the_same_view(tmp_path, teacher, student, store):
    live = _losses(tmp_path / "live", teacher, student, "train.views=fixed")
    cached = _losses(tmp_path / "cached", f"cache:{store.folder}", student, "train.views=fixed")
    assert len(live) == len(cached) == 6
    for a, b in zip(live, cached):
        assert a.keys() == b.keys()
        for term in a:
            assert b[term] == pytest.approx(a[term], rel=2e-3, abs=1e-5), term
    described = json.loads((tmp_path / "cached" / "run.json").read_text())
    assert described["teacher"] == teacher


@pytest.mark.parametrize("workers", [0, 2])
def test_teacher_and_student_see_the_same_stored_view(teacher, student, viewed, workers):
    teacher_model, student_model = load_model(teacher, teacher=True), load_model(student)
    source = scenes(SIZE)
    stored = StoredRows(viewed, "stored", (0,))
    loader = PairLoader(source, batch_size=8, student=student_model, stored=stored, seed=1, steps=6, workers=workers)
    met = set()
    for batch in loader:
        assert batch.teacher_images is None
        for row, index in enumerate(batch.indices.tolist()):
            view = batch.views[row]
            options = [viewed.view(index, n) for n in (1, 2)]
            assert view in options
            met.add((index, options.index(view)))
            image = source.image(index)
            assert torch.equal(batch.student_images[row], render(image, view, student_model.image))
            with torch.no_grad():
                expected = teacher_model.module.encode_image(render(image, view, teacher_model.image)[None])
                tokens = teacher_model.tokenizer([batch.captions[row]])
                text = teacher_model.module.encode_text(tokens)
            for name, wanted in (("image", expected), ("text", text)):
                assert torch.nn.functional.cosine_similarity(batch.stored[name][row : row + 1], wanted).item() > 0.99999
    assert len(met) > 1.3 * SIZE  # two epochs: most images were seen under both views


def test_batches_do_not_depend_on_workers_ranks_or_where_they_start(student, viewed):
    model, stored = load_model(student), StoredRows(viewed, "stored", (0,))
    settings = {"batch_size": 8, "student": model, "stored": stored, "seed": 4, "steps": 5}
    whole = list(PairLoader(scenes(SIZE), **settings))
    for others in (
        list(PairLoader(scenes(SIZE), **settings, workers=2)),
        [None, None, *PairLoader(scenes(SIZE), **settings, start_step=2)],
    ):
        for a, b in zip(whole, others):
            if b is not None:
                assert torch.equal(a.stored["image"], b.stored["image"])
                assert torch.equal(a.stored["text"], b.stored["text"])
                assert torch.equal(a.student_images, b.student_images)
    halves = [list(PairLoader(scenes(SIZE), **settings, rank=rank, world=2)) for rank in (0, 1)]
    for whole_batch, first, second in zip(whole, *halves):
        joined = torch.cat([first.stored["image"], second.stored["image"]])
        assert torch.equal(joined, whole_batch.stored["image"])


def test_an_interrupted_run_from_a_cache_continues_to_the_bit(tmp_path, student, viewed, monkeypatch):
    teacher = f"cache:{viewed.folder}"
    whole = _losses(tmp_path / "whole", teacher, student)
    original, steps = loop.set_learning_rate, []

    def stop(optimiser, factor):
        steps.append(factor)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(optimiser, factor)

    monkeypatch.setattr(loop, "set_learning_rate", stop)
    with pytest.raises(Preempted):
        distill(_config(tmp_path / "parts", teacher, student), quiet=True)
    monkeypatch.setattr(loop, "set_learning_rate", original)
    assert _losses(tmp_path / "parts", teacher, student) == whole


def _synthetic(path):
    source = scenes(SIZE)
    captions = {
        source.key(i): [f"drawing number {i}", f"picture {i} again", "a drawing"][: 1 + i % 3] for i in range(SIZE)
    }
    path.write_text(json.dumps(captions))
    return path


@pytest.mark.parametrize("extra", [(), ("train.micro_batch=3",)])
def test_the_mobileclip_recipe_runs_from_an_ensemble_with_added_captions(
    tmp_path, teacher, second_teacher, student, extra
):
    file = _synthetic(tmp_path / "captions.json")
    store = filled(tmp_path / "c", f"{teacher},{second_teacher}", SIZE, synthetic=file, **VIEWS)
    assert store.manifest.synthetic.captions == sum(1 + i % 3 for i in range(SIZE))
    assert store.synthetic(4) == ("drawing number 4", "picture 4 again")
    settings = ("train.batch_size=8", "train.steps=6", *extra)
    losses = _losses(tmp_path / "run", f"cache:{store.folder}", student, *settings, recipe="mobileclip")
    assert [set(line) for line in losses] == [{"reinforced"}] * 6
    reference = tmp_path / "plain"
    plain = _losses(
        reference, f"cache:{store.folder}", student, "train.batch_size=8", "train.steps=6", recipe="mobileclip"
    )
    assert losses[0]["reinforced"] == pytest.approx(plain[0]["reinforced"], rel=1e-5)
    assert losses[5]["reinforced"] == pytest.approx(plain[5]["reinforced"], rel=1e-3)


def test_the_student_gets_the_added_caption_whose_embedding_the_teacher_gives(
    tmp_path, teacher, second_teacher, student
):
    store = filled(
        tmp_path / "c", f"{teacher},{second_teacher}", SIZE, synthetic=_synthetic(tmp_path / "captions.json")
    )
    opened = open_cached_teacher(f"cache:{store.folder}", scenes(SIZE), torch.device("cpu"), CacheUse())
    model = load_model(student)
    teachers = [load_model(name, teacher=True) for name in (teacher, second_teacher)]
    batch = next(iter(PairLoader(scenes(SIZE), batch_size=8, student=model, stored=opened.stored, steps=1)))
    output = opened(batch)
    assert isinstance(output, Embeddings)
    assert output.blocks == (32, 16)
    assert output.logit_scale.shape == (2,)
    for row, index in enumerate(batch.indices.tolist()):
        matching = [
            c for c in store.synthetic(index) if torch.equal(model.tokenizer([c])[0], batch.synthetic_tokens[row])
        ]
        assert matching
        start = 0
        for one in teachers:
            with torch.no_grad():
                wanted = one.module.encode_text(one.tokenizer(matching[:1]))
            part = output.synthetic_text[row : row + 1, start : start + one.embed_dim]
            assert torch.nn.functional.cosine_similarity(part, wanted).item() > 0.99999
            start += one.embed_dim


def test_samples_without_a_stored_image_are_bad_samples(tmp_path, teacher, student):
    from clipdistill.cache.fill import fill
    from tests.cache.support import cache_config
    from tests.cache.test_fill import _Broken

    config = cache_config(tmp_path / "c", teacher, SIZE)
    store = fill(config, source=_Broken(scenes(SIZE), {3})).store
    loader = PairLoader(
        scenes(SIZE), batch_size=SIZE, student=load_model(student), stored=StoredRows(store, "fixed", (0,)), steps=1
    )
    batch = next(iter(loader))
    assert batch.problems == [(scenes(SIZE).key(3), batch.problems[0][1])]
    assert "no stored embedding" in batch.problems[0][1]
    assert len(batch.keys) == len(batch.stored["image"]) == SIZE - 1


@pytest.mark.parametrize("form", ["npz", "parquet", "parquet nested"])
def test_a_plain_table_of_vectors_is_a_teacher(tmp_path, student, store, form):
    source = scenes(SIZE)
    order = random.Random(0).sample(range(SIZE), SIZE)
    keys = [source.key(i) for i in order]
    image = np.stack([store.read(0, [i], [0], [0])[0][0].numpy() for i in order])
    text = np.stack([[store.read(0, [i], [c], [0])[1][0].numpy() for c in range(5)] for i in order])
    scale = store.manifest.teachers[0].logit_scale
    path = tmp_path / f"vectors.{form.split()[0]}"
    if form == "npz":
        np.savez(
            path,
            keys=np.array(keys),
            image=image,
            text=text.reshape(-1, 32),
            captions=np.full(SIZE, 5),
            logit_scale=scale,
        )
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = text.tolist() if form == "parquet nested" else text[:, 0].tolist()
        table = pa.table({"key": keys, "image": image.tolist(), "text": pa.array(texts)})
        pq.write_table(table.replace_schema_metadata({"logit_scale": repr(scale)}), path)
    caption = "train.caption=first" if form == "parquet" else "train.caption=random"
    plain = _losses(tmp_path / "plain", f"cache:{path}", student, caption)
    stored = _losses(tmp_path / "stored", f"cache:{store.folder}", student, caption)
    for a, b in zip(plain, stored):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_tars_beside_data_tars(tmp_path, teacher, student):
    from clipdistill.scenes.write import write_scenes

    write_scenes(tmp_path / "data", format="webdataset", size=SIZE, split="train", shard_size=10)
    pattern = str(tmp_path / "data")
    store = filled(tmp_path / "c", teacher, data={"path": pattern}, **VIEWS)
    source = open_pairs(pattern)
    written = export_shards(store, source, tmp_path / "tars")
    assert len(written) == 3
    assert sum(len(list(read_shard(path))) for path in written) == SIZE
    first = next(read_shard(written[0]))
    assert torch.equal(first.image[0][1], store.read(0, [0], [0], [1])[0][0])
    assert first.views == (store.view(0, 1), store.view(0, 2))
    data = {"path": pattern}
    tars = _losses(tmp_path / "a", f"cache:{tmp_path / 'tars'}", student, "train.workers=2", data=data)
    blocks = _losses(tmp_path / "b", f"cache:{store.folder}", student, data=data)
    assert tars == blocks


@pytest.mark.parametrize(
    ("teacher_name", "assignment", "message"),
    [
        ("live", "train.views=stored", "a cache stores views"),
        ("cache", "train.views=stored", "holds the evaluation view only"),
        ("cache", "train.views=live", "need a live teacher"),
        ("first", "train.caption=random", "set train.caption=first"),
        ("two", "train.caption=random", "stands alone"),
        ("none", "train.caption=random", "does not exist"),
    ],
)
def test_policies_that_cannot_be_kept_are_refused(tmp_path, teacher, student, store, teacher_name, assignment, message):
    names = {
        "live": teacher,
        "cache": f"cache:{store.folder}",
        "two": f"cache:{store.folder},{teacher}",
        "none": f"cache:{tmp_path / 'nothing'}",
    }
    if teacher_name == "first":
        names["first"] = f"cache:{filled(tmp_path / 'f', teacher, SIZE, captions='first').folder}"
    with pytest.raises(InputError, match=message):
        distill(_config(tmp_path / "run", names[teacher_name], student, assignment), quiet=True)
