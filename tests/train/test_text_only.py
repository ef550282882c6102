"""A text tower distilled from texts alone: pairs, lines, parallel sentences; the teacher's image tower stays."""

from __future__ import annotations

import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.models import load_model
from clipdistill.runs.folder import read_rows
from clipdistill.scenes.pairs import open_scenes
from clipdistill.train.config import resolve
from clipdistill.train.run import distill

WORDS = {"a": "ein", "red": "rot", "blue": "blau", "above": "ueber", "circle": "Kreis", "square": "Quadrat"}


def sentences(count):
    source = open_scenes("train", count)
    return [source.captions(i)[0] for i in range(count)]


def translated(text):
    return " ".join(WORDS.get(word, f"{word}en") for word in text.split())


def run(out, data, *assignments, recipe="text-only", **settings):
    given = {"out": str(out), "data": str(data), **settings}
    changes = ("train.batch_size=8", "train.steps=6", "train.learning_rate=2e-3", *assignments)
    return distill(resolve(recipe, given, size="debug", assignments=changes), quiet=True)


def losses(out):
    return [line["terms"]["cosine_text"] for line in read_rows(out / "log.jsonl")]


@pytest.fixture
def parallel(tmp_path):
    path = tmp_path / "parallel.tsv"
    path.write_text("".join(f"{text}\t{translated(text)}\n" for text in sentences(24)))
    return path


def test_captions_of_pairs_train_it_and_pictures_are_never_read(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("clipdistill.data.loader.render_pixels", lambda *_, **__: pytest.fail("a picture was read"))
        finished = run(tmp_path / "run", "scenes:train")
    first, *_, last = losses(tmp_path / "run")
    assert last < first
    student, teacher = load_model(finished.student, teacher=True), load_model("scenes-teacher", teacher=True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(student.module.encode_image(images), teacher.module.encode_image(images))
    assert student.image == teacher.image


def test_translations_learn_the_rows_of_their_sentences(parallel, tmp_path):
    finished = run(tmp_path / "run", parallel, "train.steps=60", validation={"path": "scenes:val", "size": 16})
    assert finished.scores is not None
    student, teacher = load_model(finished.student, teacher=True), load_model("scenes-teacher", teacher=True)
    texts = sentences(8)
    unit = torch.nn.functional.normalize
    target = unit(teacher.module.encode_text(teacher.tokenizer(texts)), dim=1)
    for words in (texts, [translated(text) for text in texts]):
        found = unit(student.module.encode_text(student.tokenizer(words)), dim=1)
        assert float((found * target).sum(1).mean()) > 0.6
    # with the words of both languages, which the teacher's vocabulary lacks
    assert student.tokenizer != teacher.tokenizer
    assert "kreis" in str(student.tokenizer.to_dict()).lower()


def test_lines_train_it_too(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(sentences(16)))
    run(tmp_path / "run", tmp_path / "t.txt")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_terms_that_need_pictures_are_refused_by_name(parallel, tmp_path):
    with pytest.raises(
        InputError, match=r"^the terms task, crd, icl, fd need pictures, and parallel has none .*text-only"
    ):
        run(tmp_path / "run", parallel, recipe="clip-kd")


def test_texts_fill_no_cache(parallel, tmp_path):
    from clipdistill.cache.config import CacheConfig
    from clipdistill.cache.fill import fill

    with pytest.raises(InputError, match="parallel: texts without pictures: a cache is filled from pictures"):
        fill(CacheConfig(teacher="scenes-teacher", data={"path": str(parallel)}, out=tmp_path / "c", workers=0))
