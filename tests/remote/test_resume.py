"""Training from a store is training from a disk: the same weights, and a run stopped by a store goes on to them."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from clipdistill.cli import main
from clipdistill.data.loader import PairLoader
from clipdistill.data.open import open_pairs
from clipdistill.data.views import ImageSpec
from tests.data.helpers import FakeModel


def _train(data: str, out) -> int:
    settings = [
        "train.steps=6",
        "train.batch_size=8",
        "train.workers=0",
        "train.checkpoint_every=2",
        "preflight.allow_weak_teacher=true",
    ]
    return main(
        ["train", "--recipe", "clip-kd", "--size", "debug", "--data", data, "--out", str(out), "--quiet", *settings]
    )


def _student(out):
    return {name: value.tolist() for name, value in load_file(next(out.rglob("model.safetensors"))).items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_to_the_bit(workers, web, shards):
    web.serve_folder(shards)
    near, far = open_pairs(str(shards)), open_pairs(f"{web.url}/{{00000..00002}}.tar")
    settings = {"batch_size": 5, "student": FakeModel(ImageSpec(size=16)), "workers": workers, "steps": 9, "seed": 3}
    for a, b in zip(PairLoader(near, **settings), PairLoader(far, **settings), strict=True):
        assert a.keys == b.keys
        assert a.captions == b.captions
        assert a.student_images.equal(b.student_images)
        assert a.student_tokens.equal(b.student_tokens)
        assert a.problems == b.problems == []


def test_a_run_that_a_store_stopped_ends_like_one_from_a_disk(web, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIPDISTILL_REMOTE_ATTEMPTS", "2")
    web.serve_folder(shards)
    assert _train(str(shards), tmp_path / "near") == 0, capsys.readouterr().err
    far = f"{web.url}/{{00000..00002}}.tar"
    from clipdistill.remote.path import RemotePath

    whole, broken = RemotePath.ranged, [True]

    def failing(self, start, end):
        if broken and any((tmp_path / "far" / "checkpoints").glob("step*")):
            web.always |= {f"{k:05d}.tar": 500 for k in range(3)}
        return whole(self, start, end)

    monkeypatch.setattr(RemotePath, "ranged", failing)
    assert _train(far, tmp_path / "far") == 69
    assert "HTTP 500" in capsys.readouterr().err
    assert (tmp_path / "far" / "run.json").exists()
    broken.clear()
    web.always.clear()
    assert _train(far, tmp_path / "far") == 0, capsys.readouterr().err
    assert _student(tmp_path / "far") == _student(tmp_path / "near")
