"""To open_clip and Hugging Face, and back: equal embeddings, or one clear refusal."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.export.foreign import export_foreign, hugging_face_config
from clipdistill.models import build_student, load_model, save_model
from clipdistill.models.tokenizers import ClipBpeTokenizer
from tests.export.conftest import tiny_architecture

CAPTIONS = ["a red square", "the picture is blue, isn't it?", "a " * 30]


def embeddings(model, images, captions=CAPTIONS):
    module = model.module.eval()
    with torch.no_grad():
        return module.encode_image(images), module.encode_text(model.tokenizer(captions))


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def clip_model(**changes):
    architecture = tiny_architecture(**changes)
    architecture["text_cfg"]["vocab_size"] = 49_408
    return build_student(architecture, seed=3, tokenizer=ClipBpeTokenizer(12))


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("open_clip", True),
        pytest.param("hf", False, marks=pytest.mark.slow),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("open_clip", False), ("hf", True))),
    ],
)
def test_there_and_back(to, words, tiny, images, tmp_path):
    if to == "hf" or words:
        pytest.importorskip("transformers")
    model = tiny if words else clip_model(quick_gelu=True)
    export_foreign(model, tmp_path / "out", to)
    back = load_model(tmp_path / "out", teacher=True)
    for found, expected in zip(embeddings(back, images), embeddings(model, images)):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert back.image == model.image
    assert back.module.logit_scale.item() == pytest.approx(model.module.logit_scale.item())
    assert back.architecture["quick_gelu"] == model.architecture["quick_gelu"]


def test_open_clip_loads_it_without_this_package(images, tmp_path):
    import open_clip

    model = clip_model()
    save_model(model, tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "open_clip", "--out", str(tmp_path / "out")]) == 0
    module, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert tokenizer(CAPTIONS).tolist() == model.tokenizer(CAPTIONS).tolist()
    assert "size=32" in str(transform)
    with torch.no_grad():
        torch.testing.assert_close(module.eval().encode_image(images), embeddings(model, images)[0])


@pytest.mark.slow
def test_transformers_loads_it_with_its_own_tokenizer(images, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = clip_model()
    export_foreign(model, tmp_path / "out", "hf")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(
        CAPTIONS, return_tensors="pt", padding="max_length", truncation=True, return_token_type_ids=False
    )
    with torch.no_grad():
        found = theirs.text_projection(theirs.text_model(**tokens).pooler_output)
    torch.testing.assert_close(found, embeddings(model, images)[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("flickr-student", "no timm image tower .test_resnet"), ("TinyCLIP-ResNet-19M-Text-19M", "no ResNet")],
)
def test_what_clip_model_cannot_be_is_refused(name, reason, tiny):
    from clipdistill.models.students import named_architecture

    with pytest.raises(InputError, match=reason):
        hugging_face_config(dataclasses.replace(tiny, architecture=named_architecture(name)))


@pytest.mark.parametrize(
    ("part", "setting"), [("vision_cfg", {"qk_norm": True}), ("text_cfg", {"no_causal_mask": True})]
)
def test_settings_that_clip_model_has_not(part, setting, tmp_path):
    architecture = tiny_architecture()
    architecture[part] = architecture[part] | setting
    tokenizer = ClipBpeTokenizer(12)
    model = build_student(architecture, seed=0, tokenizer=tokenizer)
    with pytest.raises(InputError, match=next(iter(setting))):
        export_foreign(model, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_different_sizes_are_refused_by_both(tiny, tmp_path):
    from clipdistill.models.architecture import build_module

    architecture = tiny.architecture | {"block_sizes": {"text": {"head_width": 16, "heads": [1], "mlp": [24]}}}
    model = dataclasses.replace(tiny, architecture=architecture, module=build_module(architecture))
    for to in ("open_clip", "hf"):
        with pytest.raises(InputError, match="block_sizes"):
            export_foreign(model, tmp_path / "out", to)


def test_files_are_what_the_libraries_expect(tiny, tmp_path):
    pytest.importorskip("transformers")
    export_foreign(tiny, tmp_path / "out", "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == tiny.tokenizer.end == config["text_config"]["vocab_size"] - 1
    graphs = {path.name for path in (tmp_path / "out" / "onnx").glob("*")}
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"onnx"} == {
        "config.json", "model.safetensors", "modules.json", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert graphs == {f"{t}model{k}.onnx" for t in ("text_", "vision_", "") for k in ("", "_fp16", "_quantized")} or (
        importlib.util.find_spec("onnx") is None and not graphs
    )


@pytest.mark.parametrize("to", ["hf", "open_clip"])
def test_a_model_from_elsewhere_is_not_replaced_and_an_own_one_keeps_what_is_the_users(to, tiny, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("clipdistill.export.foreign.find_spec", lambda name: None)
    out = tmp_path / "out"
    export_foreign(tiny, out, to)
    (out / "README.md").write_text("mine")
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("mine")
    export_foreign(tiny, out, "open_clip")
    kept = {path.name for path in out.iterdir()}
    assert kept >= {"README.md", ".git", "open_clip_config.json"}
    assert "preprocessor_config.json" not in kept
    assert (out / ".git" / "HEAD").read_text() == "mine"
    (weights,) = out.glob("*.safetensors")
    save_file(load_file(weights), weights, metadata={"format": "pt"})  # as other programs write them
    before = weights.read_bytes()
    with pytest.raises(InputError, match="is no export that may be replaced"):
        export_foreign(tiny, out, to)
    assert weights.read_bytes() == before


def test_without_the_extra_there_is_no_onnx_folder_and_that_is_said(tiny, tmp_path, monkeypatch):
    from clipdistill.export import foreign

    monkeypatch.setattr(foreign, "find_spec", lambda name: None)
    (note,) = export_foreign(tiny, tmp_path / "out", "hf")
    assert "transformers.js" in note
    assert "clipdistill[export]" in note
    assert not (tmp_path / "out" / "onnx").exists()
