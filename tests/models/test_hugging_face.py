"""CLIP models of transformers: the same embeddings after conversion; what has no equivalent is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.models import load_model
from clipdistill.models.hugging_face import architecture_from

transformers = pytest.importorskip("transformers")


def configuration(**changes: Any) -> Any:
    text = {
        "vocab_size": 49_408,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "eos_token_id": 49_407,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
    }
    return transformers.CLIPConfig(
        text_config=text | changes.get("text", {}), vision_config=vision | changes.get("vision", {}), projection_dim=20
    )


def embeddings(model: Any, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Projected, not normalised embeddings by transformers' own parts, whatever its version returns."""
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
        text = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    return image, text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "text": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
            "vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
        },
        {"text": {"eos_token_id": 2}},
        {"text": {"vocab_size": 60, "eos_token_id": 7, "bos_token_id": 1}},
    ],
    ids=["quick_gelu", "gelu and other norms", "historical end id", "end id in the middle"],
)
@pytest.mark.parametrize("safe", [True, False])
def test_embeddings_equal_transformers(tmp_path: Path, changes: dict[str, Any], safe: bool) -> None:
    torch.manual_seed(0)
    config = configuration(**changes)
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # larger than the usual start, so that differences would show
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    vocabulary = config.text_config.vocab_size
    if vocabulary == 60:
        write_word_tokenizer(tmp_path)
    model = load_model(tmp_path, teacher=True)
    end = vocabulary - 1 if config.text_config.eos_token_id == 2 else config.text_config.eos_token_id
    ids = torch.tensor([[1, 5, 6, end] + [0] * 12, [1, 9, end, 11] + [end] * 12])
    images = torch.randn(2, 3, 32, 32)
    expected_image, expected_text = embeddings(theirs, images, ids)
    with torch.no_grad():
        torch.testing.assert_close(model.module.encode_image(images), expected_image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.module.encode_text(ids), expected_text, rtol=1e-5, atol=1e-5)
    assert float(model.module.logit_scale) == pytest.approx(float(theirs.logit_scale))
    assert model.embed_dim == 20
    assert model.context_length == 16


def write_word_tokenizer(folder: Path) -> None:
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    vocabulary = {"[PAD]": 0, "[BOS]": 1, "dog": 2, "[UNK]": 3, "cat": 4, "[EOS]": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 7)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")
    fast.save_pretrained(folder)


def test_tokenizer_and_preprocessing_come_from_the_folder(tmp_path: Path) -> None:
    transformers.CLIPModel(
        configuration(text={"vocab_size": 60, "eos_token_id": 7, "bos_token_id": 1})
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_model(tmp_path)
    write_word_tokenizer(tmp_path)
    settings = {
        "image_mean": [0.5, 0.5, 0.5],
        "resample": 2,
        "do_center_crop": False,
        "size": {"height": 32, "width": 32},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = load_model(tmp_path)
    assert model.tokenizer(["dog bird cat"])[0, :6].tolist() == [1, 2, 3, 4, 7, 0]
    assert (model.image.mean, model.image.interpolation, model.image.resize_mode) == ((0.5,) * 3, "bilinear", "squash")


def test_clip_vocabulary_needs_no_extra_package(tmp_path: Path) -> None:
    transformers.CLIPModel(configuration()).save_pretrained(tmp_path)
    assert load_model(tmp_path).tokenizer.to_dict() == {"kind": "clip-bpe", "context_length": 16, "clean": "lower"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip"}, "the model type is 'siglip'"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "activations 'gelu' .text. and 'quick_gelu'"),
        (
            {"model_type": "clip", "text_config": {"hidden_act": "silu"}, "vision_config": {"hidden_act": "silu"}},
            "activations 'silu'",
        ),
        ({"model_type": "clip", "vision_config": {"num_channels": 1}}, "vision tower"),
        ({"model_type": "clip", "vision_config": [1]}, "not a mapping"),
    ],
)
def test_other_models_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        architecture_from(config, "config.json")


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    transformers.CLIPModel(configuration()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["patch_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"visual.conv1.weight is \(48, 3, 8, 8\) instead of \(48, 3, 16, 16\)"):
        load_model(tmp_path)


def test_sharded_weights(tmp_path: Path) -> None:
    theirs = transformers.CLIPModel(configuration())
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = load_model(tmp_path)
    assert torch.equal(model.module.visual.proj, theirs.visual_projection.weight.T)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["logit_scale"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="weight files of its own folder"):
        load_model(tmp_path)
