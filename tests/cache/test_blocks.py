"""Block files: whole or absent, and no byte can change unnoticed."""

import contextlib
import random

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.cache.blocks import Block, remove_leftovers, write_block
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
    described = dict(Block(path).metadata)
    shapes = {name: array.shape for name, array in Block(path).arrays.items()}
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            block = Block(path)
            block.verify()
            # a flip in the description is left to whoever compares it with the manifest
            changed = block.metadata != described or {n: a.shape for n, a in block.arrays.items()} != shapes
            assert changed, f"byte {place} was changed and nothing was noticed"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_damaged(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="damaged block"):
        Block(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(InputError, match="missing"):
        Block(tmp_path / "000003.safetensors")


def test_leftovers_of_a_killed_writer_are_removed(path):
    leftover = path.with_name(f".{path.name}.123.writing")
    leftover.write_bytes(b"half")
    other = path.with_name(".000001.safetensors.123.writing")
    other.write_bytes(b"of another block")
    remove_leftovers(path)
    assert not leftover.exists()
    assert other.exists()
