"""Files that others give: plain embeddings, added captions, exported towers; and the command line."""

import contextlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clipdistill import cli
from clipdistill.cache.plain import PlainEmbeddings
from clipdistill.cache.samples import SampleTable, write_samples
from clipdistill.cache.sizes import sample_bytes
from clipdistill.cache.store import CacheStore
from clipdistill.cache.synthetic import read_synthetic
from clipdistill.embed.prepare import DIGEST_BYTES
from clipdistill.errors import InputError
from clipdistill.runtime.console import file_size
from tests.cache.support import cache_config, filled, scenes
from tests.cache.test_fill import fill


def _npz(path, **changes):
    source = scenes(6)
    rng = np.random.default_rng(0)
    arrays = {
        "keys": np.array([source.key(i) for i in range(6)]),
        "image": rng.normal(size=(6, 8)),
        "text": rng.normal(size=(6, 8)).astype(np.float16),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_plain_embeddings_are_matched_by_key(tmp_path):
    source = scenes(6)
    keys = np.array([source.key(i) for i in (3, 1, 5, 0, 2, 4)])
    table = PlainEmbeddings(_npz(tmp_path / "a.npz", keys=keys))
    table.match(source, "first")
    with np.load(tmp_path / "a.npz") as file:
        expected = torch.from_numpy(file["image"][0]).float()
    assert torch.allclose(table.read(0, [3], [0], [0])[0][0], expected)
    assert table.logit_scale == 100


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
def test_plain_embeddings_of_any_order_of_bytes_are_read(kind, tmp_path):
    rows = np.arange(1.0, 49).reshape(6, 8)
    table = PlainEmbeddings(_npz(tmp_path / "a.npz", image=rows.astype(kind), text=rows.astype(kind)))
    table.match(scenes(6), "first")
    expected = torch.from_numpy(rows[2:4]).float()
    assert all(torch.equal(found, expected) for found in table.read(0, [2, 3], [0, 0], [0, 0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": None}, "the array 'keys' is missing"),
        ({"keys": np.arange(6)}, "'keys' must be a one-dimensional array of text"),
        ({"keys": np.array(["a"] * 6)}, "some keys come more than once"),
        ({"keys": np.array([b"x", object()], dtype=object)}, "without pickles"),
        ({"image": np.ones((5, 8))}, "do not fit together"),
        ({"image": np.ones((6, 9))}, "same width"),
        ({"image": np.ones((6, 8), dtype=np.int8)}, "must be floating point"),
        ({"image": np.full((6, 8), np.nan)}, "image row 0 is zero or not finite"),
        ({"text": np.zeros((6, 8))}, "text row 0 is zero or not finite"),
        ({"captions": np.array([1, 1, 1, 1, 1, 2])}, "do not fit together"),
        ({"captions": np.array([1, 1, 1, 1, 3, -1])}, "do not fit together"),
        ({"captions": np.ones(6)}, "'captions' must be a whole number a key"),
        ({"captions": np.ones((6, 1), dtype=int)}, "'captions' must be a whole number a key"),
        ({"keys": np.array([], dtype=str), "image": np.ones((0, 8)), "text": np.ones((0, 8))}, "holds no embeddings"),
        ({"image": np.ones((6, 0)), "text": np.ones((6, 0))}, "holds no embeddings"),
        ({"keys": np.array(["a", "b", "", "d", "e", "f"])}, "the key of row 2 is empty"),
        ({"keys": np.array([b"a", b"b", b"\xff", b"d", b"e", b"f"])}, "not readable"),
        ({"keys": np.array([["a", "b"]] * 6)}, "'keys' must be a one-dimensional array of text"),
        ({"image": np.ones((6, 8), dtype=complex)}, "must be floating point"),
        ({"image": np.ones(6)}, "two tables of the same width"),
        ({"image": np.full((6, 8), 1e300)}, "image row 0 is zero or not finite"),
        ({"text": np.full((6, 8), np.inf)}, "text row 0 is zero or not finite"),
        ({"logit_scale": -3.0}, "'logit_scale' must be a positive number"),
        ({"logit_scale": 0}, "'logit_scale' must be a positive number"),
        ({"logit_scale": np.nan}, "'logit_scale' must be a positive number"),
        ({"logit_scale": np.inf}, "'logit_scale' must be a positive number"),
        ({"logit_scale": np.array([100.0])}, "'logit_scale' must be one number"),
        ({"logit_scale": np.array("100")}, "'logit_scale' must be one number"),
        ({"logit_scale": np.array(True)}, "'logit_scale' must be one number"),
        ({"logit_scales": 20.0}, r"unknown array 'logit_scales' \(did you mean 'logit_scale'"),
        ({"text": None, "texts": np.ones((6, 8))}, r"unknown array 'texts' \(did you mean 'text'"),
    ],
)
def test_unusable_plain_embeddings_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        PlainEmbeddings(_npz(tmp_path / "a.npz", **changes))


VECTORS = [[float(i == j) for j in range(8)] for i in range(6)]


@pytest.mark.parametrize(
    ("columns", "metadata", "message"),
    [
        ({}, {"logit_scale": "-1"}, "'logit_scale' must be a positive number"),
        ({}, {"logit_scale": "nan"}, "'logit_scale' must be a positive number"),
        ({}, {"logit_scale": "[100]"}, "'logit_scale' must be a positive number"),
        ({"key": [], "image": pa.array([], pa.list_(pa.float32())), "text": pa.array([], pa.list_(pa.float32()))},
         {}, "holds no embeddings"),
        ({"key": ["a", None, "c", "d", "e", "f"]}, {}, "1 keys are missing"),
        ({"key": ["a", "a", "c", "d", "e", "f"]}, {}, r"some keys come more than once \('a' 2 times\)"),
        ({"image": [*VECTORS[:5], [1.0]]}, {}, "'image' are not all of the same length"),
        ({"image": [*VECTORS[:5], None]}, {}, "'image' are not all of the same length"),
        ({"image": [*VECTORS[:5], [None] * 8]}, {}, "image row 5 is zero or not finite"),
        ({"text": [[v] for v in VECTORS[:5]] + [[]]}, {}, "do not fit together"),
        ({"text": [*VECTORS[:5], None]}, {}, "'text' are not all of the same length"),
        ({"image": [[1, 2]] * 6}, {}, "must hold lists of floating-point numbers"),
        ({"image": ["x"] * 6}, {}, "must hold lists of floating-point numbers"),
        ({"text": None, "txt": VECTORS}, {}, "the column 'text' is missing"),
    ],
)  # fmt: skip
def test_unusable_plain_parquet_is_refused(tmp_path, columns, metadata, message):
    values = {"key": list("abcdef"), "image": VECTORS, "text": VECTORS, **columns}
    table = pa.table({name: column for name, column in values.items() if column is not None})
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        PlainEmbeddings(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_damaged_plain_file_is_one_sentence(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        _npz(path)
    else:
        pq.write_table(pa.table({"key": list("abcdef"), "image": VECTORS, "text": VECTORS}), path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [content[: int(len(content) * share)] for share in (0, 0.01, 0.3, 0.9, 0.999)]
    for place in rng.integers(len(content), size=150):
        damaged.append(content[:place] + bytes([content[place] ^ (1 << rng.integers(8))]) + content[place + 1 :])
    damaged += [b"\0" * len(content), b"PAR1", b"PK\x03\x04", b"[]"]
    for data in damaged:
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            PlainEmbeddings(path)


def test_the_fingerprint_of_a_plain_file_is_that_of_its_content(tmp_path):
    first = PlainEmbeddings(_npz(tmp_path / "a.npz")).fingerprint()
    assert PlainEmbeddings(_npz(tmp_path / "b.npz")).fingerprint() == first
    assert PlainEmbeddings(_npz(tmp_path / "b.npz", logit_scale=99.0)).fingerprint() != first
    assert PlainEmbeddings(_npz(tmp_path / "b.npz", image=np.ones((6, 8)))).fingerprint() != first


def test_plain_embeddings_must_cover_the_data_and_its_captions(tmp_path):
    table = PlainEmbeddings(_npz(tmp_path / "a.npz"))
    with pytest.raises(InputError, match="no embeddings for 2 of 8 samples"):
        table.match(scenes(8), "first")
    with pytest.raises(InputError, match="has 5 captions and 1 text embeddings"):
        table.match(scenes(6), "random")
    (tmp_path / "b.npz").write_bytes(b"not a zip")
    with pytest.raises(InputError, match="not readable"):
        PlainEmbeddings(tmp_path / "b.npz")
    with pytest.raises(InputError, match="no such file"):
        PlainEmbeddings(tmp_path / "c.parquet")


@pytest.mark.parametrize("form", ["dict.json", "list.json", "lines.jsonl", "single.jsonl", "table.parquet"])
def test_added_captions_in_every_form(tmp_path, form):
    path = tmp_path / form
    if form == "dict.json":
        path.write_text(json.dumps({"a": ["one", " two  words "], "b": ["three", ""]}))
    elif form == "list.json":
        path.write_text(
            json.dumps([{"key": "a", "captions": ["one", "two words"]}, {"key": "b", "captions": ["three"]}])
        )
    elif form == "lines.jsonl":
        path.write_text('{"key": "a", "captions": ["one", "two words"]}\n\n{"key": "b", "captions": ["three"]}\n')
    elif form == "single.jsonl":
        lines = [{"key": "a", "caption": "one"}, {"key": "b", "caption": "three"}, {"key": "a", "caption": "two words"}]
        path.write_text("\n".join(map(json.dumps, lines)))
    else:
        pq.write_table(pa.table({"key": ["a", "b"], "captions": [["one", "two words"], ["three"]]}), path)
    assert read_synthetic(path) == {"a": ("one", "two words"), "b": ("three",)}
    if path.suffix != ".parquet":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as editors of Windows do
        assert read_synthetic(path) == {"a": ("one", "two words"), "b": ("three",)}
    else:
        pq.write_table(pa.table({"key": [None], "captions": [["one"]]}), path)
        with pytest.raises(InputError, match="expected an object with 'key'"):
            read_synthetic(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "line 1: not readable as JSON"),
        ("a.jsonl", '{"key": "a", "captions": ["x"]}\n{"text": 3}', "line 2: expected an object"),
        ("a.json", '{"a": 5}', "key 'a': expected a caption"),
        ("a.parquet", "x", "not readable as Parquet"),
        ("a.json", '{"a": ["x"],\n "a": ["y"]}', "the key 'a' stands twice"),
        (
            "a.jsonl",
            '{"key": "a", "key": "b", "caption": "x"}\n{}',
            "the key 'key' stands twice",
        ),
        ("a.jsonl", '{"key": null, "caption": "x"}\n', "expected an object with 'key'"),
        ("a.json", '[{"key": ["a"], "caption": "x"}]', "expected an object with 'key'"),
        ("a.json", "[" * 100_000, "not readable as JSON"),
    ],
)
def test_unusable_added_captions_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_synthetic(tmp_path / name)


def test_added_captions_must_cover_the_data_and_can_come_later(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 10)
    source = scenes(10)
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({source.key(i): [f"number {i}"] for i in range(9)}))
    with pytest.raises(InputError, match=rf"no captions for 1 of 10 samples \(the first is '{source.key(9)}'"):
        fill(cache_config(tmp_path / "c", teacher, 10, synthetic=file))
    file.write_text(json.dumps({source.key(i): [f"number {i}"] for i in range(10)}))
    pairs = (tmp_path / "c" / "teacher-0" / "000000.safetensors").stat().st_mtime_ns
    store = fill(cache_config(tmp_path / "c", teacher, 10, synthetic=file)).store
    assert store.has_synthetic
    assert store.synthetic(4) == ("number 4",)
    assert (tmp_path / "c" / "teacher-0" / "000000.safetensors").stat().st_mtime_ns == pairs
    file.write_text(json.dumps({source.key(i): [f"another {i}"] for i in range(10)}))
    with pytest.raises(InputError, match=r"synthetic: .* is not the file of captions it was filled with"):
        fill(cache_config(tmp_path / "c", teacher, 10, synthetic=file))
    with pytest.raises(InputError, match="the 2 new samples need some"):
        fill(cache_config(tmp_path / "c", teacher, 12))


def test_sizes_are_what_is_written(tmp_path, teacher):
    assert sample_bytes([512], "fp16", 0, 1) == 2 * 1024 + 64
    assert sample_bytes([768, 768], "bf16", 30, 6) == 2 * 37 * 1536 + 30 * 35 + 64
    assert sample_bytes([512], "int8", 0, 5) == 6 * 528 + 64
    assert file_size(26_340_000_000) == "26.3 GB"
    store = filled(tmp_path / "c", teacher, 200, block=100, dtype="int8")
    rows = sum(p.stat().st_size for p in (tmp_path / "c" / "teacher-0").glob("0*.safetensors"))
    assert rows / 200 == pytest.approx(store.manifest.pair_bytes() - 64, rel=0.2)


def test_the_command_line_fills_verifies_describes_and_merges(tmp_path, teacher, capsys):
    base = ["cache", "--teacher", teacher, "--data", "scenes:train", "--device", "cpu", "--block", "8", "--quiet"]
    for share in ("0/2", "1/2"):
        assert (
            cli.main(
                [
                    *base,
                    "--out",
                    str(tmp_path / share[0]),
                    "--part",
                    share,
                    "data.size=20",
                    "view.flip=0.5",
                    "--views",
                    "1",
                ]
            )
            == 0
        )
    assert cli.main(["cache", "verify", str(tmp_path / "0")]) == 1
    assert "blocks are not filled" in capsys.readouterr().out
    assert cli.main(["cache", "merge", str(tmp_path / "m"), str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    assert cli.main(["cache", "verify", str(tmp_path / "m")]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    assert cli.main(["cache", "info", str(tmp_path / "m")]) == 0
    described = capsys.readouterr().out
    assert "20 images, 100 captions" in described
    assert '"flip":0.5' in described
    assert CacheStore(tmp_path / "m").manifest.view_policy.flip == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "scenes"], "no teacher was named"),
        (["--teacher", "x", "--data", "scenes", "--out", "o", "vews=3"], "did you mean 'views'"),
        (["verify"], "usage: clipdistill cache verify DIR"),
        (["info", "nowhere"], "this is not a cache"),
        (["export", "a", "b"], "name the data"),
        (["merge", "a", "b"], "usage"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    assert cli.main(["cache", *arguments]) == 2
    assert message in capsys.readouterr().err


class _Towers(torch.nn.Module):
    """One of the two functions of a model as a graph of its own."""

    def __init__(self, module, name):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, values):
        return getattr(self.module, self.name)(values)


@pytest.mark.slow
def test_exported_towers_fill_a_cache(tmp_path, teacher):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from clipdistill.config import as_dict
    from clipdistill.models import load_model

    model = load_model(teacher, teacher=True)
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, method, example in (
        ("image.onnx", "encode_image", torch.zeros(2, 3, 32, 32)),
        ("text.onnx", "encode_text", model.tokenizer(["a circle", "b"])),
    ):
        batch = torch.export.Dim("batch", min=1, max=4096)
        torch.onnx.export(
            _Towers(model.module, method),
            (example,),
            folder / name,
            dynamo=True,
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    description = {"image": as_dict(model.image), "tokenizer": model.tokenizer.to_dict()}
    scale = float(model.module.logit_scale.exp())
    (folder / "model.json").write_text(json.dumps({**description, "logit_scale": scale}))
    exported = filled(tmp_path / "a", f"onnx:{folder}", 16)
    direct = filled(tmp_path / "b", teacher, 16)
    rows = zip(exported.read(0, range(16), [1] * 16, [0] * 16), direct.read(0, range(16), [1] * 16, [0] * 16))
    for found, expected in rows:
        assert torch.allclose(found, expected, atol=2e-3)
    assert exported.manifest.teachers[0].logit_scale == pytest.approx(scale)
    assert "onnxruntime" in exported.manifest.versions


@pytest.mark.parametrize("rows", [[0, 1, 1], [0, 1, 3], [-1, 0, 1], [0, 1, 142936511610884]])
def test_rows_that_are_no_order_are_refused(tmp_path, rows):
    names = ("key", "row", "captions", "digest", "synthetic")
    records = [dict(zip(names, (str(row), row, 1, bytes(DIGEST_BYTES), []))) for row in rows]
    table = SampleTable(tmp_path / write_samples(tmp_path, records))
    with pytest.raises(InputError, match=r"each of the 3 rows once; `clipdistill cache verify`"):
        _ = table.in_row_order
