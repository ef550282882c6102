"""Embeddings in files: three forms, their keys, pictures without captions, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.data.mixture.pictures import open_pictures
from clipdistill.data.pairs import Subset
from clipdistill.errors import InputError
from clipdistill.scenes.pairs import open_scenes
from clipdistill.vectors import job
from tests.conftest import shared_folder

TEXTS = ["a red circle", "two blue squares", "a red circle", "a green triangle"]


@pytest.fixture(scope="module")
def model():
    return cd.load_model("scenes-teacher", teacher=True)


@pytest.fixture(scope="module")
def expected(model):
    return cd.embed(model, "scenes:val?size=10", progress=False)


@pytest.fixture
def pictures(tmp_path):
    """A folder of six pictures and a damaged one, some in a sub-folder, without captions."""
    folder, source = tmp_path / "photographs", open_scenes("val", 6, 0)
    (folder / "below").mkdir(parents=True)
    for i in range(6):
        source.image(i).save(folder / ("below" if i % 2 else ".") / f"{i}.png")
    (folder / "3.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_rows_are_those_of_embed_with_their_keys(suffix, model, expected, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    report = cd.embed_to_file(
        model, "scenes:val?size=10", tmp_path / f"x{suffix}", part=4, batch_size=3, progress=False
    )
    rows, keys = cd.read_embeddings(report.path)
    np.testing.assert_allclose(rows, expected.image.numpy(), atol=1e-6)
    assert [entry["key"] for entry in keys] == expected.keys
    texts = cd.embed_to_file(
        model, "scenes:val?size=10", tmp_path / f"t{suffix}", captions="all", part=7, progress=False
    )
    rows, keys = cd.read_embeddings(texts.path)
    np.testing.assert_allclose(rows, expected.text.numpy(), atol=1e-5)
    assert [entry["text"] for entry in keys] == expected.captions
    assert [entry["caption"] for entry in keys] == expected.caption_indices.tolist()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def test_a_list_of_texts_from_the_command_line(model, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    out = tmp_path / "texts.safetensors"
    command = ["embed", "scenes-teacher", "--texts", str(tmp_path / "texts.txt"), "--out", str(out), "--quiet"]
    assert main(command) == 0
    assert "4 rows of 128 numbers" in capsys.readouterr().out
    tensors = load_file(out)
    assert tensors["embedding"].shape == (4, 128)
    assert [json.loads(line)["text"] for line in tensors["keys"].tobytes().decode().splitlines()] == TEXTS
    np.testing.assert_array_equal(tensors["embedding"][0], tensors["embedding"][2])
    before = out.read_bytes()
    assert main(command) == 0
    assert "complete already" in capsys.readouterr().out
    assert out.read_bytes() == before


def test_pictures_without_captions_and_one_that_cannot_be_read(model, pictures, tmp_path):
    source = open_pictures(str(pictures))
    assert (len(source), source.captioned, source.captions(0)) == (7, False, ())
    report = cd.embed_to_file(model, str(pictures), tmp_path / "x.npy", part=2, batch_size=4, progress=False)
    rows, keys = cd.read_embeddings(tmp_path / "x.npy")
    assert len(rows) == report.rows == 6
    assert [entry["key"] for entry in keys] == [
        *(f"{i}.png" for i in (0, 2, 4)),
        *(f"below/{i}.png" for i in (1, 3, 5)),
    ]
    assert [key for key, _ in report.left_out] == ["3.png"]
    assert json.loads((tmp_path / "x.npy.json").read_text())["left_out"][0][0] == "3.png"
    with pytest.raises(InputError, match="has no captions to embed"):
        cd.embed_to_file(model, str(pictures), tmp_path / "y.npy", captions="all", progress=False)


def test_a_labelled_set_of_real_photographs(model, tmp_path):
    tar = shared_folder("data") / "flowers5" / "flowers5_a.tar"
    source = open_pictures(str(tar))
    assert source.captioned is False
    report = cd.embed_to_file(model, Subset(source, 6), tmp_path / "x.npy", progress=False)
    assert report.rows == 6


def test_what_is_done_survives_a_stop(model, tmp_path, monkeypatch):
    whole = cd.embed_to_file(model, "scenes:val?size=10", tmp_path / "whole.npy", part=3, batch_size=3, progress=False)
    write, written = job._write, []

    def stopping(folder, first, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(first)
        write(folder, first, *rest)

    settings = {"part": 3, "batch_size": 3, "progress": False}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_write", stopping)
        cd.embed_to_file(model, "scenes:val?size=10", tmp_path / "x.npy", **settings)
    parts = tmp_path / "x.npy.parts"
    assert not (tmp_path / "x.npy").exists()
    assert len(list(parts.glob("part-*"))) == 2
    with pytest.raises(InputError, match="begun with other data"):
        cd.embed_to_file(model, "scenes:val?size=11", tmp_path / "x.npy", **settings)
    first = next(iter(sorted(parts.glob("part-*"))))
    first.write_bytes(first.read_bytes()[:100])  # cut short: done again
    done = []
    monkeypatch.setattr(job, "_write", lambda folder, first, *rest: done.append(first) or write(folder, first, *rest))
    again = cd.embed_to_file(model, "scenes:val?size=10", tmp_path / "x.npy", **settings)
    assert done == [0, 6, 9]
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert not parts.exists()


def test_what_cannot_be_is_one_sentence(model, pictures, tmp_path):
    def refused(message, data=None, out="x.npy", **settings):
        with pytest.raises(InputError, match=message):
            cd.embed_to_file(model, data, tmp_path / out, progress=False, **settings)

    refused("embeddings are written as .npy, .parquet, .safetensors", "scenes:val?size=4", "x.csv")
    refused("name either pictures .* or texts")
    refused("name either pictures", "scenes:val", texts=["a"])
    refused("cannot be read", texts=tmp_path / "nowhere.txt")
    refused("no such file or folder", "nowhere")
    refused("at least 1", "scenes:val?size=4", part=0)
    refused("nothing to embed", texts=[])
    (tmp_path / "blank.txt").write_text("a\n\nb\n")
    refused("line 2 is blank", texts=tmp_path / "blank.txt")
    (tmp_path / "own.npy").write_bytes(b"mine")
    refused("not from clipdistill embed", "scenes:val?size=4", "own.npy")
    assert (tmp_path / "own.npy").read_bytes() == b"mine"
    shutil.rmtree(pictures)
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"no picture")
    refused("no picture of photographs can be read .the first, a.png", str(pictures))
    with pytest.raises(InputError, match="holds no embeddings"):
        cd.read_embeddings(tmp_path / "own.npy")


def test_another_engine_gives_the_same_rows_and_is_recorded(model, expected, tmp_path):
    pytest.importorskip("onnxruntime")
    pictures = cd.embed_to_file(model, "scenes:val?size=10", tmp_path / "x.npy", engine="onnx", part=4, progress=False)
    np.testing.assert_allclose(cd.read_embeddings(pictures.path)[0], expected.image.numpy(), atol=1e-5)
    texts = cd.embed_to_file(
        model, "scenes:val?size=10", tmp_path / "t.npy", captions="all", engine="onnx", part=7, progress=False
    )
    np.testing.assert_allclose(cd.read_embeddings(texts.path)[0], expected.text.numpy(), atol=1e-5)
    for path in (pictures.path, texts.path):
        assert "was run by onnx" in " ".join(json.loads(path.with_name(f"{path.name}.json").read_text())["notes"])
    with pytest.raises(InputError, match="another engine"):
        cd.embed_to_file(model, "scenes:val?size=10", tmp_path / "x.npy", engine="openvino", progress=False)
