"""Ternary weights by hand, straight-through gradients, the packed file, and runs that train, resume and unpack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clipdistill.errors import InputError
from clipdistill.models import build_student, load_model
from clipdistill.runs.folder import RunFolder
from clipdistill.ternary.packed import pack, unpack, unpack_codes
from clipdistill.ternary.weights import applied, dense, matrices, ternary
from clipdistill.train.config import resolve
from clipdistill.train.run import distill

SETTINGS = ["train.steps=2", "preflight.enabled=false", "train.ternary=both"]


def test_two_rows_by_hand() -> None:
    """Means 0.5 and 1: w / s = (0.4, -1.8, 1.4, 0.4) and (0, 3, -1, 0); 3 is held to 1."""
    weight = torch.tensor([[0.2, -0.9, 0.7, 0.2], [0.0, 3.0, -1.0, 0.0]])
    codes, scales = ternary(weight)
    assert codes.tolist() == [[0, -1, 1, 0], [0, 1, -1, 0]]
    torch.testing.assert_close(scales, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(dense(codes, scales), torch.tensor([[0, -0.5, 0.5, 0], [0, 1.0, -1, 0]]))
    assert ternary(torch.zeros(2, 3))[0].tolist() == [[0, 0, 0]] * 2
    assert pack(codes).tolist() == [0b01_10_00_01, 0b01_00_10_01]
    odd = torch.tensor([[1, -1, 0], [0, 0, 1]], dtype=torch.int8)
    assert torch.equal(unpack_codes(pack(odd), (2, 3)), odd)


def test_the_gradient_is_that_at_the_ternary_weight_and_goes_straight_through() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.2, -0.9, 0.7, 0.2], [0.0, 3.0, -1.0, 0.0]]))
    own, x = layer.weight.detach().clone(), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    with applied({"weight": layer.weight}):
        y = layer(x)
        (y**2 / 2).sum().backward()
    assert y.tolist() == [[0.5, -1.0]]
    assert torch.equal(layer.weight.detach(), own)
    # y x^T, whatever the rounding was
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.5], [-1.0]]) @ x)


def test_which_weights_of_which_tower() -> None:
    module = build_student("scenes-student", seed=0, captions=["a red ball"]).module
    both, image, text = (matrices(module, towers) for towers in ("both", "image", "text"))
    assert set(both) == set(image) | set(text)
    assert not set(image) & set(text)
    assert all(name.startswith("visual.") for name in image)
    assert {name for name in both if "embedding" in name or "norm" in name or "ln_" in name} == set()
    assert "text_projection" in text
    module.visual.requires_grad_(False)
    assert matrices(module, "image") == {}


def run(out: Path, *assignments: str) -> Path:
    return distill(
        resolve("clip-kd", {"out": out}, size="debug", assignments=[*SETTINGS, *assignments]), quiet=True
    ).folder


def test_a_run_ends_in_a_ternary_student_and_its_packed_file(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "train.ema_decay=0.9")
    student = load_model(str(folder / "student"))
    for name, weight in matrices(student.module.requires_grad_(True), "both").items():
        assert all(len(row.abs().unique()) <= 2 for row in weight.detach().flatten(1)), name
    figures = json.loads((folder / "packed" / "ternary.json").read_text())
    assert 0.6 < figures["ternary_share"] < 1
    assert 0.1 < figures["sparsity"] < 0.6
    assert figures["compression"] > 2
    unpack(folder / "packed", tmp_path / "again")
    again, known = load_model(str(tmp_path / "again")).module.state_dict(), student.module.state_dict()
    assert all(torch.equal(again[name], value) for name, value in known.items())
    assert RunFolder(folder).status() == "finished"
    whole = (folder / "packed" / "ternary.safetensors").read_bytes()
    for place in (-1, -1000, -20_000):  # wherever a bit flips: codes, scales and what is not ternary are all believed
        damaged = bytearray(whole)
        damaged[place] ^= 4
        (folder / "packed" / "ternary.safetensors").write_bytes(damaged)
        with pytest.raises(InputError, match=r"its weights are not those that model\.json recorded"):
            unpack(folder / "packed", tmp_path / "none")
        assert not (tmp_path / "none").exists()
    save_file({"x": torch.zeros(1)}, folder / "packed" / "ternary.safetensors", {"shapes": '{"y": [2, 2]}'})
    with pytest.raises(InputError, match="does not hold the weights that it lists"):
        unpack(folder / "packed", tmp_path / "none")
    with pytest.raises(InputError, match=r"holds no ternary\.safetensors"):
        unpack(folder, tmp_path / "none")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.keep_best=t2i_R@1: not together with train\.ternary"):
        run(tmp_path / "a", "train.keep_best=t2i_R@1", "train.evaluate_every=1")
    with pytest.raises(InputError, match="nothing to make ternary"):
        run(tmp_path / "b", "train.ternary=image", "train.lock_image=all")
