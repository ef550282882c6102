"""Prompts of an image transformer: what the blocks see, what is saved, where they can stand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.models import build_student, load_model
from clipdistill.models.architecture import check_architecture
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.prompts import with_prompts
from clipdistill.models.save import save_model
from clipdistill.ternary.weights import matrices

CAPTIONS = ["a red ball"]


def student() -> ClipModel:
    return build_student("scenes-teacher", seed=0, captions=CAPTIONS)


def pictures(model: ClipModel, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, model.image.size, model.image.size, generator=torch.Generator().manual_seed(0))


def test_each_block_sees_its_own_prompts_and_the_pooling_none() -> None:
    model = student()
    plain = copy.deepcopy(model.module.visual)
    layers = len(plain.transformer.resblocks)
    assert layers >= 3
    prompted = with_prompts(model, 3, layers - 1, seed=0).module.visual
    x = pictures(model)
    tokens = prompted.transformer.prompt_tokens
    assert tokens.shape == (layers - 1, 3, plain.transformer.width)
    rows = plain._embeds(x)
    length = rows.shape[1]
    for layer, block in enumerate(plain.transformer.resblocks):
        if layer < layers - 1:  # the last block goes on with the prompts of the one before
            rows = torch.cat([rows[:, :length], tokens[layer].expand(2, -1, -1)], dim=1)
        rows = block(rows)
    pooled, _ = plain._pool(rows[:, :length])
    expected = pooled @ plain.proj
    torch.testing.assert_close(prompted(x), expected)
    assert not torch.allclose(prompted(x), plain(x), atol=1e-3)
    prompted.transformer.grad_checkpointing = True
    torch.testing.assert_close(prompted.train()(x), expected)


def test_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    model = with_prompts(student(), "auto", 9, seed=1)
    assert model.architecture["image_prompts"] == {"count": 4, "depth": 9}
    save_model(model, tmp_path / "m")
    again = load_model(str(tmp_path / "m"))
    x = pictures(model)
    assert torch.equal(again.module.eval().encode_image(x), model.module.eval().encode_image(x))
    kept = copy.deepcopy(again.module.visual.transformer.prompt_tokens)
    assert with_prompts(again, 7, 1, seed=2) is again  # a model that has some keeps them
    assert torch.equal(again.module.visual.transformer.prompt_tokens, kept)
    assert not any("prompt_tokens" in name for name in matrices(model.module, "both"))


def test_joined_towers_prompt_the_transformers_among_them(tmp_path: Path) -> None:
    save_model(student(), tmp_path / "m")
    for depth in (1, 2):  # a tower out of joined towers too
        source = tmp_path / ("m" if depth == 1 else "joined")
        joined = load_model(f"towers:image=clip:{source},text=whole:{tmp_path / 'm'}")
        prompted = with_prompts(joined, 2, 2, seed=0)
        names = [name for name, _ in prompted.module.named_parameters() if name.endswith("prompt_tokens")]
        assert names == [f"visual.{'trunks.0.' * depth}transformer.prompt_tokens"]
        save_model(prompted, tmp_path / f"prompted-{depth}")
        again = load_model(str(tmp_path / f"prompted-{depth}"))
        x = pictures(joined)
        assert torch.equal(again.module.eval().encode_image(x), prompted.module.eval().encode_image(x))
        if depth == 1:
            save_model(joined, tmp_path / "joined")


def test_a_tower_without_tokens_has_none() -> None:
    model = build_student("flickr-student", seed=0, captions=CAPTIONS)
    assert with_prompts(model, "auto", 9, seed=0) is model
    with pytest.raises(InputError, match=r"train\.image_prompts=4: .* has no tokens"):
        with_prompts(model, 4, 9, seed=0)


@pytest.mark.parametrize(
    "values", [{"count": 4}, {"count": 0, "depth": 1}, {"count": True, "depth": 1}, {"count": 4, "depth": 999}, [4, 9]]
)
def test_a_description_with_impossible_prompts_is_refused(values: Any) -> None:
    with pytest.raises(InputError, match="image_prompts"):
        check_architecture({**student().architecture, "image_prompts": values})


@pytest.mark.slow
def test_an_export_has_the_prompts(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import clipdistill as cd

    model = with_prompts(student(), 4, 2, seed=0)
    save_model(model, tmp_path / "m")
    cd.export(str(tmp_path / "m"), to="onnx", out=tmp_path / "onnx")
    loaded = load_model(f"onnx:{tmp_path / 'onnx'}")
    x = pictures(model)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.module.eval().encode_image(x), dim=-1).numpy()
    found = torch.nn.functional.normalize(loaded.module.encode_image(x), dim=-1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(InputError, match="has prompts"):
        cd.export(str(tmp_path / "m"), to="open_clip", out=tmp_path / "foreign")
