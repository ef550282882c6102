"""Model folders: round trips to the bit, atomic writing, and refusal of damaged or hostile files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdistill.errors import InputError
from clipdistill.models import ClipModel, load_model, save_model
from clipdistill.runtime import files
from clipdistill.runtime.files import read_json, write_json

Make = Callable[..., ClipModel]


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.json"
    values = read_json(path)
    change(values)
    write_json(path, values, checked=True)


@pytest.fixture
def saved(make_tiny: Make, tmp_path: Path) -> Path:
    save_model(make_tiny(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"init_logit_bias": -10.0},
        {"custom_text": True},
        {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}},
        {"vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}},
        {"vision_cfg": {"image_size": 96, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}},
    ],
    ids=["vit", "quick_gelu", "bias", "custom_text", "resnet", "timm", "timm vit resized"],
)
def test_round_trip_is_equal_to_the_bit(make_tiny: Make, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = make_tiny(**changes)
    folder = tmp_path / "a" / "model"
    save_model(model, folder)
    again = load_model(folder)
    assert again.fingerprint() == model.fingerprint()
    assert (again.name, again.image, again.tokenizer, again.embed_dim, again.context_length) == (
        model.name,
        model.image,
        model.tokenizer,
        model.embed_dim,
        model.context_length,
    )
    assert again.architecture == model.architecture
    images = torch.rand(2, 3, model.image.size, model.image.size)
    ids = model.tokenizer(["a red dog", "cats"])
    for module in (model.module.eval(), again.module.eval()):
        module.requires_grad_(False)
    assert torch.equal(model.module.encode_image(images), again.module.encode_image(images))
    assert torch.equal(model.module.encode_text(ids), again.module.encode_text(ids))
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert not list(folder.parent.glob(".*"))


def test_activation_is_stored_and_changes_the_embeddings(make_tiny: Make, tmp_path: Path) -> None:
    plain, quick = make_tiny(), make_tiny(quick_gelu=True)
    save_model(quick, tmp_path / "quick")
    assert json.loads((tmp_path / "quick" / "model.json").read_text())["activation"] == "quick_gelu"
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        again = load_model(tmp_path / "quick").module.encode_image(images)
        assert torch.equal(again, quick.module.encode_image(images))
        assert not torch.allclose(again, plain.module.encode_image(images))
    assert plain.fingerprint() != quick.fingerprint()


def test_half_precision_file_is_half_the_size_and_loads_as_fp32(make_tiny: Make, tmp_path: Path) -> None:
    model = make_tiny()
    save_model(model, tmp_path / "full")
    save_model(model, tmp_path / "half", dtype=torch.float16)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    again = load_model(tmp_path / "half")
    weight = again.module.visual.conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.module.visual.conv1.weight.half().float())


def test_writing_over_a_model_replaces_it_whole(make_tiny: Make, saved: Path) -> None:
    other = make_tiny(seed=9)
    (saved / "README.md").write_text("mine")
    save_model(other, saved)
    assert (saved / "README.md").read_text() == "mine"
    assert load_model(saved).fingerprint() == other.fingerprint()
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_failed_write_leaves_the_old_model_and_no_rubbish(
    make_tiny: Make, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_model(saved).fingerprint()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(make_tiny(seed=9), saved)
    assert load_model(saved).fingerprint() == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_foreign_folders_are_never_replaced(make_tiny: Make, tmp_path: Path) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("years of work")
    with pytest.raises(InputError, match="no model folder that may be replaced"):
        save_model(make_tiny(), precious)
    assert (precious / "chapter1.txt").read_text() == "years of work"


def test_files_hold_no_pickles(saved: Path) -> None:
    assert (saved / "model.safetensors").read_bytes()[8:9] == b"{"
    json.loads((saved / "model.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=2), "format 2 is not known"),
        (lambda v: v.pop("format"), "no 'format'"),
        (lambda v: v.pop("tokenizer"), "'tokenizer' is missing"),
        (lambda v: v.update(activation="quick_gelu"), "contradicts the architecture"),
        (lambda v: v["architecture"].update(quick_gelu=True), "contradicts the architecture"),
        (lambda v: v["architecture"]["vision_cfg"].update(width=64), r"visual.conv1.weight is \(32, 3, 8, 8\) instead"),
        (lambda v: v["architecture"]["vision_cfg"].update(layers=10**9), "'layers' must be a number from 1 to 256"),
        (lambda v: v["architecture"]["vision_cfg"].update(width="64"), "'width' must be a number"),
        (
            lambda v: v["architecture"]["vision_cfg"].update(timm_model_name="hf-hub:evil/model"),
            "timm has no architecture",
        ),
        (lambda v: v["architecture"]["vision_cfg"].update(timm_model_name=["x"]), "timm has no architecture"),
        (lambda v: v["architecture"]["text_cfg"].update(hf_model_name="evil/model"), "HF_HUB_OFFLINE"),
        (lambda v: v["architecture"]["text_cfg"].update(act_kwargs={"x": 1}), "cannot be built"),
        (lambda v: v["architecture"].update(vision_config={}), "did you mean 'vision_cfg'"),
        (lambda v: v.update(architecture=[]), "expected a mapping"),
        (lambda v: v.update(image={"size": 32, "mean": [0, 0]}), "image: .*mean"),
        (lambda v: v["image"].update(size=48), "not that of the image tower, 32"),
        (lambda v: v["tokenizer"]["words"].append("new"), "tokenizer does not fit"),
        (lambda v: v["tokenizer"].update(context_length=9), "tokenizer does not fit"),
        (lambda v: v.update(weights_sha256="0" * 64), "not what model.json recorded"),
        (lambda v: v.update(name=3), "'name' must be text"),
    ],
)
def test_edited_descriptions_are_refused(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(saved, change)
    with pytest.raises(InputError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_descriptions_that_are_not_json_objects_are_refused(saved: Path, content: bytes) -> None:
    (saved / "model.json").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.json"):
        load_model(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for kept in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError, match="not readable as safetensors"):
            load_model(saved)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match=r"not what model\.json recorded"):
        load_model(saved)
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_model(saved)


def test_missing_and_extra_tensors_are_listed(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["visual.extra"] = tensors.pop("visual.proj")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(
        InputError, match=r"visual.extra is \(32, 24\) instead of absent; visual.proj is absent instead"
    ):
        load_model(saved)
