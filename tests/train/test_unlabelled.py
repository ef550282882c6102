"""Training from pictures without captions: every form of them, the other tower, caches, and what is refused."""

from __future__ import annotations

import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from clipdistill.cache.check import verify
from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import fill
from clipdistill.cli import main
from clipdistill.errors import InputError, Preempted
from clipdistill.models import load_model
from clipdistill.runs.folder import read_rows
from clipdistill.scenes.pairs import open_scenes
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from tests.train.support import COUNT, require_same_run, stop_after


def run(out, data, *assignments, recipe="images-only", **settings):
    given = {"out": str(out), "data": str(data), **settings}
    changes = ("train.batch_size=8", "train.steps=4", *assignments)
    return distill(resolve(recipe, given, size="debug", assignments=changes), quiet=True)


def losses(out):
    return [line["terms"] for line in read_rows(out / "log.jsonl")]


def test_every_form_of_the_same_pictures_trains_alike(photographs, tmp_path):
    names = sorted(path.name for path in photographs.iterdir())
    (tmp_path / "table.csv").write_text("filepath\n" + "".join(f"{photographs / name}\n" for name in names))
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in names:
            archive.add(photographs / name, name)
    cells = [(photographs / name).read_bytes() for name in names]
    pq.write_table(pa.table({"image": cells}), tmp_path / "cells.parquet")
    run(tmp_path / "folder", photographs)
    expected = losses(tmp_path / "folder")
    assert set(expected[0]) == {"cosine_image", "within_image"}
    assert expected[-1]["cosine_image"] < expected[0]["cosine_image"]
    for form in ("table.csv", "shard.tar", "cells.parquet"):
        run(tmp_path / f"run-{form}", tmp_path / form)
        assert losses(tmp_path / f"run-{form}") == expected, form


def test_captions_that_no_term_reads_change_nothing(photographs, tmp_path):
    captioned = tmp_path / "captioned"
    shutil.copytree(photographs, captioned)
    for path in captioned.glob("*.png"):
        path.with_suffix(".txt").write_text("a caption")
    run(tmp_path / "with", captioned)
    run(tmp_path / "without", photographs)
    # a caption would be drawn from the generator of the views, so these are equal only where none is read
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_the_result_is_a_whole_clip_with_the_teachers_texts(photographs, tmp_path):
    finished = run(tmp_path / "run", photographs, validation={"path": "scenes:val", "size": 16})
    assert finished.scores is not None
    student, teacher = load_model(finished.student, teacher=True), load_model("scenes-teacher", teacher=True)
    tokens = teacher.tokenizer(["a red circle", "two blue squares"])
    assert student.tokenizer == teacher.tokenizer
    assert torch.equal(student.module.encode_text(tokens), teacher.module.encode_text(tokens))
    assert torch.equal(student.module.logit_scale, teacher.module.logit_scale)
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["objective"] == {"cosine_image": 1, "within_image": 1}


def test_the_tower_of_a_student_given_by_name_is_kept(photographs, tmp_path):
    first = run(tmp_path / "first", "scenes", recipe="clip-kd").student
    second = run(tmp_path / "second", photographs, "train.learning_rate=1e-2", student_weights=str(first)).student
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("visual.") for name in changed)
    assert not any(name.startswith(("text", "token", "transformer")) for name in changed)
    third = run(tmp_path / "third", photographs, f"train.other_tower={first}").student
    tokens = load_model(first).tokenizer(["a red circle"])
    rows = [load_model(folder, teacher=True).module.encode_text(tokens) for folder in (first, third)]
    assert torch.equal(*rows)


def test_a_cache_of_pictures_gives_the_losses_of_the_live_teacher(photographs, tmp_path):
    store = tmp_path / "cache"
    fill(CacheConfig(teacher="scenes-teacher", data={"path": str(photographs)}, out=store, workers=0))
    assert verify(store).good
    run(tmp_path / "live", photographs, "train.views=fixed")
    run(tmp_path / "cached", photographs, teacher=f"cache:{store}")
    for live, cached in zip(losses(tmp_path / "live"), losses(tmp_path / "cached"), strict=True):
        assert cached == pytest.approx(live, rel=2e-3)


def test_plain_embeddings_need_no_texts(photographs, tmp_path):
    rows = np.random.default_rng(0).normal(size=(COUNT, 128)).astype(np.float32)
    keys = np.array(sorted(path.name for path in photographs.iterdir()))
    np.savez(tmp_path / "t.npz", keys=keys, image=rows / np.linalg.norm(rows, axis=1, keepdims=True))
    teacher = f"cache:{tmp_path / 't.npz'}"
    run(tmp_path / "run", photographs, "train.other_tower=scenes-teacher", teacher=teacher)
    assert losses(tmp_path / "run")[0]["cosine_image"] > 0
    keys = np.array([open_scenes("train", COUNT).key(i) for i in range(COUNT)])
    np.savez(tmp_path / "s.npz", keys=keys, image=rows / np.linalg.norm(rows, axis=1, keepdims=True))
    with pytest.raises(InputError, match=r"holds no text embeddings, and scenes.* has captions"):
        run(tmp_path / "x", f"scenes:train?size={COUNT}", teacher=f"cache:{tmp_path / 's.npz'}")


@pytest.mark.parametrize(
    "extra", [("train.micro_batch=3",), pytest.param(("train.workers=1",), marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_to_the_bit(photographs, tmp_path, monkeypatch, extra):
    run(tmp_path / "whole", photographs, *extra)
    stop_after(monkeypatch, 2)
    with pytest.raises(Preempted, match="after step 2"):
        run(tmp_path / "parts", photographs, *extra)
    monkeypatch.undo()
    run(tmp_path / "parts", photographs, *extra)
    require_same_run(tmp_path / "whole", tmp_path / "parts", 4)


def test_unreadable_pictures_are_counted(photographs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(photographs, broken)
    (broken / "003.png").write_bytes(b"no picture")
    run(tmp_path / "run", broken, "train.steps=3")
    assert json.loads((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()[0])["key"] == "003.png"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "clip-kd",
            r"^the terms task, crd, icl, fd need captions, and photographs\d+ has none \(the folder .* holds 24",
        ),
        ("clip", r"^the term task needs captions, .*: take --recipe images-only"),
    ],
)
def test_terms_that_need_captions_are_refused_by_name(photographs, tmp_path, recipe, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", photographs, recipe=recipe)


def test_a_slip_in_a_column_is_no_table_of_pictures(photographs, tmp_path):
    (tmp_path / "t.csv").write_text(f"filepath,titel\n{photographs / '000.png'},a caption\n")
    with pytest.raises(InputError, match="did you mean 'titel'"):
        run(tmp_path / "run", tmp_path / "t.csv")


def test_without_the_terms_for_it_there_is_no_other_tower(tmp_path):
    with pytest.raises(InputError, match="train both towers, so there is no other one"):
        run(tmp_path / "run", "scenes", "train.other_tower=teacher", recipe="clip-kd")


def test_a_random_tower_that_nothing_trains_is_told(photographs, tmp_path, capsys):
    words = ["--recipe", "images-only", "--size", "debug", "--data", str(photographs), "--out", str(tmp_path / "run")]
    assert main(["train", *words, "train.other_tower=own", "train.steps=1"]) == 0
    said = capsys.readouterr().err
    assert "the text tower has random weights and no term trains it" in said
    assert "the image tower learns through a new linear map" in said


def test_a_skipped_step_of_pictures_is_replayed(photographs, tmp_path, monkeypatch, capsys):
    from clipdistill.train.distil import Distillation

    original = Distillation.gradients

    def failing(self, step, batch):
        output, norm = original(self, step, batch)
        return output, float("nan") if step == 2 else norm

    monkeypatch.setattr(Distillation, "gradients", failing)
    run(tmp_path / "run", photographs)
    monkeypatch.undo()
    main(["replay", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "step 2" in said
    assert "finite" in said
