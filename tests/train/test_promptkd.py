"""PromptKD: class vectors from a set or a file, what trains, the student that uses them, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clipdistill as cd
from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import fill
from clipdistill.cli import main
from clipdistill.data.open import open_labelled
from clipdistill.embed.classes import choose_templates, class_weights
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError, Preempted
from clipdistill.models import load_model
from clipdistill.runs.folder import read_rows
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from tests.train.support import COUNT, require_same_run, stop_after

CLASSES = "scenes:zeroshot"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A file of the class vectors, from the command line."""
    out = tmp_path_factory.mktemp("classes") / "classes.npy"
    assert main(["embed", "scenes-teacher", "--classes", CLASSES, "--out", str(out), "--quiet"]) == 0
    return out


def run(out, data, *assignments, **settings):
    given = {"out": str(out), "data": str(data), **settings}
    changes = ("train.batch_size=8", "train.steps=4", *assignments)
    return distill(resolve("promptkd", given, size="debug", assignments=changes), quiet=True)


def losses(out):
    return [line["terms"]["class_kd"] for line in read_rows(out / "log.jsonl")]


def test_the_file_holds_the_vectors_that_zero_shot_classifies_by(vectors):
    rows, keys = cd.read_embeddings(vectors)
    labelled, teacher = open_labelled(CLASSES), load_model("scenes-teacher", teacher=True)
    expected = class_weights(Encoder(teacher), labelled.class_names, choose_templates(labelled.templates)[1])
    assert [entry["key"] for entry in keys] == list(labelled.class_names)
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-6)
    described = json.loads(vectors.with_name("classes.npy.json").read_text())
    assert described["identity"]["model"] == teacher.fingerprint()


def test_prompts_and_map_alone_learn_and_the_texts_are_the_teachers(photographs, tmp_path):
    changes = ("train.learning_rate=1e-2", "train.steps=30", "train.batch_size=24", "train.views=fixed")
    finished = run(tmp_path / "run", photographs, *changes)
    found = losses(tmp_path / "run")
    assert found[-1] < 0.5 * found[0]
    first = run(tmp_path / "first", photographs, "train.learning_rate=1e-12", "train.weight_decay=0", "train.steps=1")
    before, after = (load_file(done.student / "model.safetensors") for done in (first, finished))
    moved = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    assert moved == {
        "visual.trunks.0.transformer.prompt_tokens", "visual.head.linear.weight", "visual.head.linear.bias",
    }  # fmt: skip
    student, teacher = load_model(finished.student, teacher=True), load_model("scenes-teacher", teacher=True)
    tokens = teacher.tokenizer(["a red circle", "two blue squares"])
    assert torch.equal(student.module.encode_text(tokens), teacher.module.encode_text(tokens))


def test_a_file_of_vectors_gives_the_losses_of_the_set(photographs, vectors, tmp_path):
    run(tmp_path / "set", photographs)
    run(tmp_path / "file", photographs, f"train.classes={vectors}")
    assert losses(tmp_path / "file") == pytest.approx(losses(tmp_path / "set"), rel=1e-5)


def test_a_cache_gives_the_losses_of_the_live_teacher(photographs, vectors, tmp_path):
    store = tmp_path / "cache"
    fill(CacheConfig(teacher="scenes-teacher", data={"path": str(photographs)}, out=store, workers=0))
    run(tmp_path / "live", photographs, "train.views=fixed")
    run(tmp_path / "cached", photographs, teacher=f"cache:{store}")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=5e-3)
    rows = np.stack([np.eye(128, dtype=np.float32)[i % 3] for i in range(COUNT)])
    keys = np.array(sorted(path.name for path in photographs.iterdir()))
    np.savez(tmp_path / "t.npz", keys=keys, image=rows)
    plain = {"teacher": f"cache:{tmp_path / 't.npz'}"}
    own = "train.other_tower=scenes-teacher"
    run(tmp_path / "plain", photographs, own, f"train.classes={vectors}", **plain)
    assert losses(tmp_path / "plain")[0] > 0
    with pytest.raises(InputError, match=r"train\.classes=scenes:zeroshot: the teacher is stored.*clipdistill embed"):
        run(tmp_path / "refused", photographs, own, **plain)


def test_a_stopped_run_goes_on_to_the_bit_and_not_with_other_classes(photographs, vectors, tmp_path, monkeypatch):
    own = tmp_path / "own.npy"
    for path in (vectors, vectors.with_suffix(".jsonl")):
        shutil.copy(path, own.with_suffix(path.suffix))
    run(tmp_path / "whole", photographs, f"train.classes={own}")
    stop_after(monkeypatch, 2)
    with pytest.raises(Preempted, match="after step 2"):
        run(tmp_path / "parts", photographs, f"train.classes={own}")
    monkeypatch.undo()
    np.save(own, np.load(vectors)[:, ::-1])
    with pytest.raises(InputError, match="teacher"):
        run(tmp_path / "parts", photographs, f"train.classes={own}")
    shutil.copy(vectors, own)
    run(tmp_path / "parts", photographs, f"train.classes={own}")
    require_same_run(tmp_path / "whole", tmp_path / "parts", 4)


def test_what_is_refused(photographs, vectors, tmp_path):
    with pytest.raises(InputError, match=r"'class_kd' needs class names, train\.classes=SET"):
        run(tmp_path / "a", photographs, "train.classes=null")
    with pytest.raises(InputError, match=r"of 128 numbers each, and they have 3"):
        other = tmp_path / "other.npy"
        np.save(other, np.eye(3, dtype=np.float32))
        other.with_suffix(".jsonl").write_text("".join(f'{{"key": "{i}"}}\n' for i in range(3)))
        run(tmp_path / "b", photographs, f"train.classes={other}")
    with pytest.raises(InputError, match="one class is no choice"):
        np.save(other, np.eye(1, 128, dtype=np.float32))
        other.with_suffix(".jsonl").write_text('{"key": "0"}\n')
        run(tmp_path / "c", photographs, f"train.classes={other}")
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path / "d", photographs, f"train.classes={tmp_path / 'absent.npy'}")
    with pytest.raises(InputError, match="not from clipdistill embed"):
        cd.embed_to_file("scenes-teacher", classes=CLASSES, out=other, progress=False)
    with pytest.raises(InputError, match="--templates belongs to --classes"):
        cd.embed_to_file("scenes-teacher", texts=["x"], templates="simple", out=tmp_path / "x.npy")
