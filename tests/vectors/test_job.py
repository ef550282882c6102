"""Embeddings in files: three forms, their keys, pictures without captions, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.data.mixture.pictures import open_pictures
from clipdistill.data.pairs import Subset
from clipdistill.errors import InputError
from clipdistill.scenes.pairs import open_scenes
from clipdistill.vectors import job
from tests.conftest import shared_folder
from tests.data.helpers import encoded, sample_members, write_tar

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


@pytest.fixture
def begun(model, pictures, tmp_path, monkeypatch):
    """(the whole file of rows, a call that goes on with work that was stopped after two of four parts)."""
    settings = {"batch_size": 2, "progress": False}
    whole = cd.embed_to_file(model, str(pictures), tmp_path / "whole.npy", **settings).path.read_bytes()
    write, written = job._write, []

    def stopping(*arguments):
        write(*arguments)
        written.append(1)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_write", stopping)
        cd.embed_to_file(model, str(pictures), tmp_path / "x.npy", part=2, **settings)
    return whole, lambda part=2: cd.embed_to_file(model, str(pictures), tmp_path / "x.npy", part=part, **settings)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)


CHANGED = {
    "another number of rows a part": None,
    "a bit of a part": lambda parts: flipped(parts[0]),
    "a part under another's name": lambda parts: shutil.copy(parts[0], parts[1]),
    "parts of other work": lambda parts: (parts[0].parent / "identity.json").unlink(),
    "an empty part": lambda parts: parts[1].write_bytes(b""),
    "killed between the file and its description": lambda parts: [
        (parts[0].parent / job._ASSEMBLING).touch(),
        (parts[0].parent.with_suffix("")).write_bytes(b"half of it"),
    ],
}


@pytest.mark.parametrize("change", CHANGED)
def test_work_that_goes_on_ends_with_the_same_rows(change, begun, tmp_path):
    whole, again = begun
    parts = sorted((tmp_path / "x.npy.parts").glob("part-*.safetensors"))
    assert len(parts) == 2
    if change == "parts of other work":
        for path in parts:
            flipped(path)
    if CHANGED[change] is not None:
        CHANGED[change](parts)
    report = again(3 if CHANGED[change] is None else 2)
    assert report.path.read_bytes() == whole
    assert report.left_out[0][0] == "3.png"
    assert not (tmp_path / "x.npy.parts").exists()


def test_another_picture_is_noticed_when_work_goes_on(begun, pictures):
    _, again = begun
    flipped(pictures / "4.png")
    with pytest.raises(InputError, match="begun with other pictures"):
        again()


def test_exchanged_pixels_of_an_archive_are_noticed_when_work_goes_on(model, tmp_path, monkeypatch):
    """Pictures that are kept as pixels have no encoded bytes to compare."""
    settings = {"batch_size": 2, "part": 2, "progress": False}
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), dtype=np.uint8)
    about = {"labels": np.arange(6) % 2, "classnames": np.array(["a", "b"])}
    np.savez(tmp_path / "x.npz", images=pixels, **about)

    def stopping(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "_assemble", stopping)
        cd.embed_to_file(model, str(tmp_path / "x.npz"), tmp_path / "y.npy", **settings)
    np.savez(tmp_path / "x.npz", images=255 - pixels, **about)
    with pytest.raises(InputError, match="begun with other pictures"):
        cd.embed_to_file(model, str(tmp_path / "x.npz"), tmp_path / "y.npy", **settings)


@pytest.mark.parametrize("name", ["x{0}", "x.jsonl", "x{0}.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_finished_file_is_believed_with_its_checksum_only(suffix, damage, name, model, tmp_path):
    path = tmp_path / f"x{suffix}"
    cd.embed_to_file(model, None, path, texts=TEXTS, progress=False)
    assert cd.embed_to_file(model, None, path, texts=TEXTS, progress=False).known
    file = tmp_path / name.format(suffix)
    if not file.exists():
        return
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    else:
        flipped(file)
    if damage == "gone" and file == path:
        assert not cd.embed_to_file(model, None, path, texts=TEXTS, progress=False).known
        return
    with pytest.raises(InputError, match=r"is not what|not readable|checksum|not from clipdistill embed"):
        cd.embed_to_file(model, None, path, texts=TEXTS, progress=False)


def test_files_of_the_user_are_never_replaced(model, pictures, tmp_path):
    def refused(message, out):
        with pytest.raises(InputError, match=message):
            cd.embed_to_file(model, str(pictures), out, progress=False)

    (tmp_path / "x.jsonl").write_text('{"mine": 1}')
    (tmp_path / "y.npy.json").write_text('{"mine": 1}')
    (tmp_path / "z.npy.parts").mkdir()
    (tmp_path / "z.npy.parts" / "thesis.txt").write_text("mine")
    refused("exists and is no file of keys", tmp_path / "x.npy")
    refused("exists and is no file of embeddings", tmp_path / "y.npy")
    refused("holds other things .thesis.txt", tmp_path / "z.npy")
    refused("lies in the folder of the data", pictures / "below" / "x.npy")
    assert (tmp_path / "x.jsonl").read_text() == (tmp_path / "y.npy.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "z.npy.parts" / "thesis.txt").read_text() == "mine"


def test_a_line_is_what_ends_with_a_newline(model, tmp_path):
    texts = ["a red\u2028circle", "b\x0cc\x1dd", "e\x85f"]
    (tmp_path / "t.txt").write_bytes("\r\n".join(texts).encode("utf-8-sig"))
    cd.embed_to_file(model, None, tmp_path / "t.npy", texts=tmp_path / "t.txt", progress=False)
    assert [entry["text"] for entry in cd.read_embeddings(tmp_path / "t.npy")[1]] == texts


def test_what_cannot_be_is_one_sentence(model, pictures, tmp_path):
    def refused(message, data=None, out="x.npy", **settings):
        with pytest.raises(InputError, match=message):
            cd.embed_to_file(model, data, tmp_path / out, progress=False, **settings)

    refused("embeddings are written as .npy, .parquet, .safetensors", "scenes:val?size=4", "x.csv")
    refused("name either pictures .* or texts")
    refused("name either pictures", "scenes:val", texts=["a"])
    refused("no such file of texts", texts=tmp_path / "nowhere.txt")
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


ROWS = np.eye(3, 4, dtype=np.float32)


@pytest.mark.parametrize("kind", ["<f4", ">f4", ">f8", "<f2", ">f2", "fortran"])
def test_rows_of_any_order_of_bytes_are_read(kind, tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(ROWS) if kind == "fortran" else ROWS.astype(kind))
    (tmp_path / "x.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n{"key": "c"}\n')
    rows, keys = cd.read_embeddings(tmp_path / "x.npy")
    assert torch.equal(torch.from_numpy(rows), torch.from_numpy(ROWS))
    assert [entry["key"] for entry in keys] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rows", "lines", "message"),
    [
        (ROWS[0], '{"key": "a"}\n' * 4, "of shape"),
        (ROWS, '{"key": "a"}\n' * 2, "2 keys, and float32 numbers of shape"),
        (ROWS.astype(int), '{"key": "a"}\n' * 3, "int64 numbers"),
        (ROWS * [[1], [np.nan], [1]], '{"key": "a"}\n' * 3, "row 1 is zero or not finite"),
        (ROWS * [[1], [0], [0]], '{"key": "a"}\n' * 3, r"row 1 is zero or not finite \(2 such rows"),
        (ROWS.astype(np.float64) * 1e300, '{"key": "a"}\n' * 3, "row 0 is zero or not finite"),
        (ROWS, '{"key": "a"}\n{"name": "b"}\n{"key": "c"}\n', "without its key"),
        (ROWS, '{"key": "a"}\n[]\n{"key": "c"}\n', "without its key"),
    ],
)
def test_a_file_whose_rows_mean_nothing_is_refused(rows, lines, message, tmp_path):
    np.save(tmp_path / "x.npy", rows)
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        cd.read_embeddings(tmp_path / "x.npy")


@pytest.mark.parametrize("more", [[], ["--captions", "all"]])
def test_what_was_found_when_the_data_were_opened_is_said(more, tmp_path, capsys):
    write_tar(tmp_path / "s.tar", [*sample_members(0), ("p1.v2.jpg", encoded(1)), ("p1.v2.txt", b"lost")])
    places = ["--data", str(tmp_path / "s.tar"), "--out", str(tmp_path / "x.npy")]
    for _ in range(2):  # the second time everything is there already
        assert main(["embed", "scenes-teacher", *places, *more]) == 0
        assert "s: found when it was opened: 2 dotted member name" in capsys.readouterr().out


@pytest.mark.slow
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
