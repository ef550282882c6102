"""Block files: whole or absent, and no byte can change unnoticed."""

import contextlib
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdistill.cache.blocks import Block, BlockFolder, write_block
from clipdistill.errors import InputError

TENSORS = {
    "image": torch.arange(48, dtype=torch.float16).reshape(4, 3, 4),
    "half": torch.arange(8).to(torch.bfloat16).reshape(2, 4),
    "text_start": torch.arange(5),
    "valid": torch.ones(4, dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path):
    write_block(tmp_path / "000000.safetensors", TENSORS, {"part": "pairs"})
    return tmp_path / "000000.safetensors"


def test_arrays_are_what_was_written_and_other_tools_can_read_the_file(path):
    block = Block(path)
    block.verify()
    assert torch.equal(torch.from_numpy(block.arrays["image"].copy()), TENSORS["image"])
    bits = torch.from_numpy(block.arrays["half"].copy().view("int16")).view(torch.bfloat16)
    assert torch.equal(bits, TENSORS["half"])
    assert block.metadata["part"] == "pairs"
    assert block.dtype("half") == "BF16"
    assert torch.equal(load_file(path)["text_start"], TENSORS["text_start"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_any_flipped_byte_is_noticed(path):
    good = path.read_bytes()
    places = range(len(good)) if len(good) < 1200 else random.Random(0).sample(range(len(good)), 1200)
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        if good[place - 12 : place + 12].count(b"header_crc32"):  # without it the rest is still as it was
            continue
        with pytest.raises(InputError, match="damaged block"):
            Block(path).verify()


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_file_that_is_cut_while_it_is_read_is_one_sentence(path, size):
    block = Block(path)
    assert block.arrays["valid"].all()
    os.truncate(path, size % path.stat().st_size)
    for use in (lambda: block.arrays, block.verify):
        with pytest.raises(InputError, match="was cut while it was read"):
            use()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_damaged(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="damaged block"):
        Block(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(InputError, match="missing"):
        Block(tmp_path / "000003.safetensors")


def test_blocks_of_the_safetensors_library_are_read_and_have_no_checksum(tmp_path):
    save_file({"rows": torch.ones(2, 3), "none": torch.zeros(0, 3)}, tmp_path / "old.safetensors")
    block = Block(tmp_path / "old.safetensors")
    assert block.arrays["rows"].shape == (2, 3)
    with pytest.raises(InputError, match="checksum"):
        block.verify()


@pytest.fixture
def folder(tmp_path):
    return BlockFolder(tmp_path / "store", what="store", remedy="make it again", manifest="store.json")


def test_a_folder_of_blocks_gives_back_what_was_written_and_grows(folder):
    folder.describe({"kind": "test", "rows": [4]})
    folder.write("part-1", TENSORS, {"model": "abc"})
    again = pickle.loads(pickle.dumps(folder))
    assert again.description() == {"kind": "test", "rows": [4]}
    assert again.read("part-1", {"model": "abc"}).arrays["text_start"].tolist() == [0, 1, 2, 3, 4]
    folder.write("more/part-2", TENSORS, {"model": "abc"})
    assert (folder.names(), folder.names("more"), folder.names("none")) == ({"part-1"}, {"more/part-2"}, set())
    folder.remove("part-1")
    assert folder.names() == set()


def test_a_block_of_another_store_is_refused_by_the_field_that_differs(folder):
    folder.write("part-1", TENSORS, {"model": "abc"})
    with pytest.raises(InputError, match=r"model: the block was written with 'abc'.*another store"):
        folder.read("part-1", {"model": "xyz"})


def test_any_flipped_bit_of_a_description_is_noticed(folder):
    described = {"kind": "test", "name": "a store"}
    folder.describe(described)
    good = folder.manifest.read_bytes()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << (place % 7)
        folder.manifest.write_bytes(damaged)
        with contextlib.suppress(InputError):
            found = folder.description()
            assert {name: found.get(name) for name in described} == described, f"byte {place}"


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"[1]", b"3", b"{", b"\xff\xfe{}", b"[" * 10_000], ids=repr)
def test_a_description_of_another_shape_is_one_sentence(folder, content):
    folder.describe({})
    folder.manifest.write_bytes(content)
    with pytest.raises(InputError, match=r"store\.json.*make it again"):
        folder.description()


def test_leftovers_of_a_killed_writer_go_with_their_block(folder):
    folder.write("part-1", TENSORS, {})
    leftover = folder.folder / ".part-1.safetensors.writing-xyz"
    other = folder.folder / ".part-2.safetensors.writing-xyz"
    for path in (leftover, other):
        path.write_bytes(b"half")
    folder.remove("part-1")
    assert [p.name for p in folder.folder.iterdir()] == [other.name]
