"""A cache that does not belong to its data, teacher or machine stops a run, and the message names the field."""

import contextlib

import numpy as np
import pytest
import torch

from clipdistill.cache import check
from clipdistill.cache.blocks import Block, write_block
from clipdistill.cache.check import verify
from clipdistill.cache.fill import fill
from clipdistill.cache.fingerprint import version_differences
from clipdistill.cache.store import CacheStore
from clipdistill.cache.teacher import CacheUse, open_cached_teacher
from clipdistill.data.pairs import Subset
from clipdistill.errors import InputError
from clipdistill.models import load_model, save_model
from clipdistill.runtime.files import read_json, write_json
from tests.cache.support import cache_config, filled, saved_teacher, scenes, tiny_model
from tests.cache.test_fill import VIEWS, _Reordered

CPU = torch.device("cpu")


@pytest.fixture
def own_teacher(tmp_path):
    return saved_teacher(tmp_path / "teacher")


def _open(folder, source=None, **use):
    return open_cached_teacher(f"cache:{folder}", source or scenes(16), CPU, CacheUse(**use))


def _edit(folder, path, value):
    """Change one value of the manifest."""
    values = read_json(folder / "manifest.json")
    node = values
    *parents, leaf = path
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    write_json(folder / "manifest.json", values, checked=True)


def test_a_cache_that_fits_is_opened_and_its_embeddings_computed_again(tmp_path, own_teacher):
    store = filled(tmp_path / "c", own_teacher, 16, **VIEWS)
    opened = _open(tmp_path / "c")
    assert "16 embeddings of" in opened.notes[0]
    assert "least cosine 1.0000" in opened.notes[0] or "least cosine 0.9999" in opened.notes[0]
    assert "one of 2 stored views" in opened.notes[1]
    assert opened.blocks == store.dims == (32,)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("teachers", 0, "weights"), "0" * 64, "weights"),
        (("teachers", 0, "transform", "mean"), [0.5, 0.5, 0.5], "transform"),
        (("teachers", 0, "transform", "interpolation"), "bilinear", "transform"),
        (("teachers", 0, "transform", "size"), 48, "transform"),
        (("teachers", 0, "tokenizer"), "0" * 64, "tokenizer"),
        (("teachers", 0, "precision"), "bf16", "precision"),
        (("teachers", 0, "logit_scale"), 99.0, "logit_scale"),
        (("teachers", 0, "dim"), 16, "shape"),
        (("dtype",), "bf16", "dtype"),
        (("captions",), "first", "captions"),
        (("view_seed",), 3, "views"),
        (("view_policy", "flip"), 0.1, "views"),
        (("versions", "torch"), "1.13.1", "versions: .*torch 1.13.1"),
        (("versions", "pillow"), "9.0.0", "versions: .*pillow 9.0.0"),
        (("data", "fingerprint"), "x", None),
        (("samples",), "samples-0.arrow", "table of samples is missing"),
        (("segments",), [15], "segments"),
        (("format",), 99, "format 99"),
    ],
)
def test_every_field_of_the_manifest_counts(tmp_path, teacher, path, value, message):
    filled(tmp_path / "c", teacher, 16, **VIEWS)
    _edit(tmp_path / "c", path, value)
    if message is None:  # the digests of the samples still fit: only the sum over them was lost
        assert _open(tmp_path / "c").blocks == (32,)
        return
    with pytest.raises(InputError, match=message):
        _open(tmp_path / "c", caption="first" if path == ("captions",) else "random")


def test_other_library_versions_can_be_accepted(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    _edit(tmp_path / "c", ("versions", "torch"), "1.13.1")
    assert _open(tmp_path / "c", allow_versions=True).blocks == (32,)
    with pytest.raises(InputError, match="accept the difference with --allow-versions"):
        fill(cache_config(tmp_path / "c", teacher, 20))
    assert fill(cache_config(tmp_path / "c", teacher, 20, allow_versions=True)).samples == 4


def test_patch_releases_do_not_count():
    assert version_differences({"torch": "2.7.0", "timm": "1.0.1"}, {"torch": "2.7.1", "timm": "1.0.9"}) == []
    assert version_differences({"torch": "2.7.0", "gone": "1"}, {"torch": "2.8.0"}) == ["torch 2.7.0 -> 2.8.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.module.visual.conv1.weight.data.mul_(1.001), "weights"),
        (lambda m: m.module.logit_scale.data.add_(0.1), "weights|logit_scale"),
        (
            lambda m: setattr(m, "image", m.image.model_copy(update={"interpolation": "bilinear"})),
            "transform.interpolation",
        ),
        (
            lambda m: setattr(
                m, "tokenizer", m.tokenizer.with_context_length(24).__class__(m.tokenizer.words[::-1], 24)
            ),
            "tokenizer",
        ),
    ],
)
def test_a_teacher_that_changed_since_is_noticed_at_the_start_and_when_filling(tmp_path, own_teacher, change, message):
    filled(tmp_path / "c", own_teacher, 16)
    model = load_model(own_teacher)
    change(model)
    save_model(model, tmp_path / "teacher")
    with pytest.raises(InputError, match=message):
        _open(tmp_path / "c")
    with pytest.raises(InputError, match=message):
        fill(cache_config(tmp_path / "c", own_teacher, 16))


def test_a_teacher_that_is_not_here_is_said_so(tmp_path, own_teacher):
    filled(tmp_path / "c", own_teacher, 16)
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    assert "is not on this machine" in _open(tmp_path / "c").notes[0]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([1, 0, *range(2, 16)], "data order: the keys are the same in another order"),
        (list(range(12)), "data keys: the cache has 4 that the data has not"),
        (list(range(18)), "data keys: 2 are not in the cache"),
        ([*range(1, 16), 17], "data keys: 1 are not in the cache .* and 1 of the cache's are gone"),
    ],
)
def test_other_data_is_refused(tmp_path, teacher, order, message):
    filled(tmp_path / "c", teacher, 16)
    with pytest.raises(InputError, match=message):
        _open(tmp_path / "c", Subset(scenes(20), indices=order))


def test_a_changed_caption_is_refused(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    source = _Reordered(scenes(16), list(range(16)))
    source.captions = lambda i: ("another caption",) if i == 5 else scenes(16).captions(i)
    with pytest.raises(InputError, match=f"data captions: those of '{source.key(5)}' have changed"):
        _open(tmp_path / "c", source)


def test_changed_pictures_are_noticed_although_keys_and_captions_fit(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    source = _Reordered(scenes(16), list(range(16)))
    source.fingerprint = scenes(16).fingerprint
    source.image = lambda i, at_least=None: scenes(16).image((i + 1) % 16)
    with pytest.raises(InputError, match="now gives another embedding for the image"):
        _open(tmp_path / "c", source)


def test_a_block_of_another_store_is_refused(tmp_path, teacher, own_teacher):
    filled(tmp_path / "c", teacher, 16)
    filled(tmp_path / "d", saved_teacher(tmp_path / "other", seed=9), 16)
    name = "teacher-0/000001.safetensors"
    (tmp_path / "c" / name).write_bytes((tmp_path / "d" / name).read_bytes())
    with pytest.raises(InputError, match=r"weights: .* it belongs to another cache"):
        _open(tmp_path / "c")
    filled(tmp_path / "e", teacher, 16)
    (tmp_path / "e" / name).write_bytes((tmp_path / "e" / "teacher-0/000000.safetensors").read_bytes())
    with pytest.raises(InputError, match="rows"):
        _open(tmp_path / "e")


def test_an_unfinished_cache_is_refused(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    (tmp_path / "c" / "teacher-0" / "000001.safetensors").unlink()
    with pytest.raises(InputError, match="1 of 2 blocks are not filled"):
        _open(tmp_path / "c")


def test_verify_finds_a_flipped_byte_and_filling_again_mends_it(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    path = tmp_path / "c" / "teacher-0" / "000001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-20] + bytes([good[-20] ^ 4]) + good[-19:])
    report = verify(tmp_path / "c")
    assert len(report.problems) == 1
    assert "checksum" in report.problems[0]
    assert "delete the file" in report.problems[0]
    path.unlink()
    assert verify(tmp_path / "c").missing == 1
    fill(cache_config(tmp_path / "c", teacher, 16))
    assert path.read_bytes() == good
    assert verify(tmp_path / "c").good


def test_verify_finds_a_damaged_table_and_tokenizer(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    table = next((tmp_path / "c").glob("samples-*.arrow"))
    content = bytearray(table.read_bytes())
    place = content.find(b"scenes")
    assert place > 0 or content
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    assert any("damaged" in problem for problem in verify(tmp_path / "c").problems)
    tokenizer = tmp_path / "c" / "teacher-0" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("red", "rad"))
    assert any("tokenizer" in problem for problem in verify(tmp_path / "c").problems)


def test_settings_of_an_existing_cache_cannot_change(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    for settings, message in (
        ({"dtype": "int8"}, "dtype: fp16 -> int8"),
        ({"captions": "first"}, "captions: all -> first"),
        ({"views": 1}, "views: 0 -> 1"),
        ({"block": 4}, "block: 8 -> 4"),
        ({"precision": "bf16"}, "precision: fp32 -> bf16"),
    ):
        with pytest.raises(InputError, match=message):
            fill(cache_config(tmp_path / "c", teacher, 16, **settings))


def test_one_member_of_an_ensemble(tmp_path, teacher, second_teacher):
    filled(tmp_path / "c", f"{teacher},{second_teacher}", 16)
    source = scenes(16)
    both = open_cached_teacher(f"cache:{tmp_path / 'c'}", source, CPU, CacheUse())
    assert both.blocks == (32, 16)
    one = open_cached_teacher(f"cache:{tmp_path / 'c'}?teacher={second_teacher}", source, CPU, CacheUse())
    assert one.blocks == (16,)
    assert one.name == second_teacher
    with pytest.raises(InputError, match="it holds no teacher '7'"):
        open_cached_teacher(f"cache:{tmp_path / 'c'}?teacher=7", source, CPU, CacheUse())
    with pytest.raises(InputError, match="3 values for 2 stored teachers"):
        open_cached_teacher(f"cache:{tmp_path / 'c'}", source, CPU, CacheUse(logit_scale=(1.0, 2.0, 3.0)))


def test_a_cache_of_a_random_order_of_rows_is_read_by_key(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    order = np.random.default_rng(0).permutation(16).tolist()
    source = _Reordered(scenes(16), order)
    assert fill(cache_config(tmp_path / "c", teacher, 16), source=source).samples == 0  # only the table is written anew
    store = CacheStore(tmp_path / "c")
    assert [store.samples.key(i) for i in range(16)] == [source.key(i) for i in range(16)]
    assert "least cosine" in open_cached_teacher(f"cache:{tmp_path / 'c'}", source, CPU, CacheUse()).notes[0]


def test_tiny_models_differ_by_seed():
    assert tiny_model(0).fingerprint() != tiny_model(1).fingerprint()


def test_the_fingerprint_of_a_cache_is_that_of_what_it_serves(tmp_path, teacher, second_teacher):
    def fingerprint(name, choice="", size=16):
        return open_cached_teacher(
            f"cache:{tmp_path / name}{choice}", scenes(size), torch.device("cpu"), CacheUse(samples=0)
        ).fingerprint

    first = filled(tmp_path / "a", teacher, 16)
    filled(tmp_path / "b", teacher, 16)
    assert fingerprint("a") == fingerprint("b")
    filled(tmp_path / "c", second_teacher, 16)
    filled(tmp_path / "d", teacher, 16, dtype="int8")
    filled(tmp_path / "e", teacher, 17)
    filled(tmp_path / "f", [teacher, second_teacher], 16)
    found = {fingerprint(name) for name in "acd"} | {fingerprint("e", size=17), fingerprint("f")}
    found |= {fingerprint("f", "?teacher=0"), fingerprint("f", "?teacher=1")}
    assert len(found) == 7
    assert first.fingerprint() == CacheStore(tmp_path / "b").fingerprint()


def test_the_fingerprint_of_a_cache_sees_other_numbers_in_one_block(tmp_path, teacher):
    before = filled(tmp_path / "c", teacher, 16).fingerprint()
    path = tmp_path / "c" / "teacher-0" / "000001.safetensors"
    block = Block(path)
    arrays = {name: torch.from_numpy(array.copy()) for name, array in block.arrays.items()}
    arrays["image"][0] = -arrays["image"][0]
    fields = {name: text for name, text in block.metadata.items() if not name.endswith("crc32")}
    write_block(path, arrays, fields)
    assert CacheStore(tmp_path / "c").fingerprint() != before


def test_a_changed_bit_of_a_block_is_found_at_the_start_of_training(tmp_path, teacher):
    filled(tmp_path / "c", teacher, 16)
    path = tmp_path / "c" / "teacher-0" / "000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"000001\.safetensors: damaged block"):
        _open(tmp_path / "c")


def test_a_large_cache_says_that_its_checksums_were_not_compared(tmp_path, teacher, monkeypatch):
    filled(tmp_path / "c", teacher, 16)
    monkeypatch.setattr(check, "CHECKED_BYTES", 100)
    assert any("were not compared with their checksums" in note for note in _open(tmp_path / "c").notes)


@pytest.mark.parametrize("name", ["manifest.json", "samples", "tokenizer.json", "000000.safetensors"])
def test_any_damage_of_a_cache_is_one_sentence(tmp_path, teacher, name):
    filled(tmp_path / "c", teacher, 16)
    (path,) = (p for p in (tmp_path / "c").rglob("*") if p.name.startswith(name))
    content, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [content[: int(len(content) * share)] for share in (0, 0.01, 0.3, 0.9, 0.999)]
    damaged += [b"\0" * len(content), b"[]", b"7", b"{}", b"null", b"\xff\xfe", b"[" * 5000, content + b"x"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(InputError):
            _open(tmp_path / "c", samples=0)
    for place in rng.integers(len(content), size=60):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.integers(8))]) + content[place + 1 :])
        if name == "manifest.json":  # names and places may be believed
            with contextlib.suppress(InputError):
                _open(tmp_path / "c", samples=0)
        else:
            with pytest.raises(InputError):
                _open(tmp_path / "c", samples=0)
