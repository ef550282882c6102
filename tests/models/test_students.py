"""The registry: published parameter counts, seeds, tokenizers."""

from __future__ import annotations

import open_clip
import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.models import build_student, build_words_tokenizer, list_students
from clipdistill.models.architecture import build_module, check_architecture
from clipdistill.models.clip_model import count_parameters
from clipdistill.models.known import known_architectures, needs_vocabulary, students
from tests.models.conftest import CAPTIONS, tiny_architecture

# millions: image tower, text transformer, total; from the papers' released configurations
PUBLISHED = {
    "ViT-T-16": (5.62, 21.29, 46.12),
    "ViT-S-16": (21.81, 21.29, 62.26),
    "TinyCLIP-ViT-8M-16-Text-3M": (8.28, 2.37, 23.45),
    "TinyCLIP-ViT-39M-16-Text-19M": (38.59, 18.91, 83.10),
    "TinyCLIP-ViT-40M-32-Text-19M": (39.69, 18.91, 84.21),
    "TinyCLIP-ViT-61M-32-Text-29M": (61.41, 28.37, 115.38),
    "TinyCLIP-ResNet-19M-Text-19M": (18.60, 18.91, 63.37),
    "TinyCLIP-ResNet-30M-Text-29M": (29.58, 28.37, 83.82),
}
# the same, counted here: the CLIP-KD paper gives these networks by name only
COUNTED = {
    "MobileViT-S": (5.27, 21.29, 45.76),
    "Swin-T": (27.91, 21.29, 68.41),
    "MobileNetV3-S": (2.04, 21.29, 42.54),
    "EfficientNet-B0": (4.66, 21.29, 45.16),
    "ResNet-18": (11.44, 21.29, 51.93),
}
OPEN_CLIP = {
    "RN50": (38.32, 37.83, 102.01),
    "RN101": (56.26, 37.83, 119.69),
    "ViT-B-16": (86.19, 37.83, 149.62),
    "ViT-L-14": (303.97, 85.05, 427.62),
}


@pytest.mark.parametrize(("name", "expected"), [*PUBLISHED.items(), *COUNTED.items()])
def test_registered_students_have_the_published_sizes(name: str, expected: tuple[float, float, float]) -> None:
    row = next(row for row in list_students() if row.name == name)
    counts = (row.image_parameters, row.text_parameters, row.total_parameters)
    assert tuple(round(count / 1e6, 2) for count in counts) == expected


@pytest.mark.parametrize(("name", "expected"), OPEN_CLIP.items())
def test_counting_rule_gives_the_published_sizes_of_teachers(name: str, expected: tuple[float, float, float]) -> None:
    counts = count_parameters(build_module(check_architecture(open_clip.get_model_config(name)), device="meta"))
    assert tuple(round(counts[key] / 1e6, 2) for key in ("image", "text_transformer", "total")) == expected
    assert counts["total"] == counts["image"] + counts["text_total"] + 1


def test_every_row_is_complete() -> None:
    rows = list_students()
    assert [row.name for row in rows] == list(students())
    for row in rows:
        assert row.source
        assert 0 < row.image_parameters + row.text_parameters < row.total_parameters
        assert (row.tokenizer == "words") == needs_vocabulary(row.name)


@pytest.mark.parametrize("name", [name for name in students() if needs_vocabulary(name)])
def test_small_students_take_their_words_from_captions_and_run(name: str) -> None:
    model = build_student(name, seed=0, captions=CAPTIONS)
    model.module.eval()
    size = model.image.size
    with torch.no_grad():
        image = model.module.encode_image(torch.zeros(2, 3, size, size))
        text = model.module.encode_text(model.tokenizer(CAPTIONS[:2]))
    assert image.shape == text.shape == (2, model.embed_dim)
    assert model.architecture["text_cfg"]["vocab_size"] == model.tokenizer.vocab_size
    assert "dog" in model.tokenizer.to_dict()["words"]
    with pytest.raises(InputError, match="takes its vocabulary from"):
        build_student(name, seed=0)


def test_networks_with_deep_classifiers_project_from_it() -> None:
    # MobileNetV3's classifier is wider than its features; a projection sized for the features would not fit
    model = build_student("MobileNetV3-S", seed=0, image_size=64)
    model.module.eval()
    with torch.no_grad():
        assert model.module.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


def test_weights_are_a_function_of_the_seed_alone() -> None:
    tokenizer = build_words_tokenizer(CAPTIONS, 12)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_student(tiny_architecture(), seed=3, tokenizer=tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = build_student(tiny_architecture(), seed=3, tokenizer=tokenizer)
    other = build_student(tiny_architecture(), seed=4, tokenizer=tokenizer)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_tokenizer_sets_the_text_tower() -> None:
    tokenizer = build_words_tokenizer(CAPTIONS, 9)
    model = build_student(tiny_architecture(), seed=0, tokenizer=tokenizer)
    assert model.context_length == 9
    assert model.module.positional_embedding.shape == (9, 32)
    assert model.module.token_embedding.weight.shape[0] == tokenizer.vocab_size
    assert (
        build_student(tiny_architecture(), seed=0, tokenizer=tokenizer.to_dict()).fingerprint() == model.fingerprint()
    )
    assert build_student(tiny_architecture(), seed=0, tokenizer="clip-bpe").tokenizer.vocab_size == 49_408


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'ViT-T-16'"):
        build_student("vit-t16", seed=0)
    with pytest.raises(InputError, match="unknown tokenizer 'bpe'"):
        build_student(tiny_architecture(), seed=0, tokenizer="bpe")
    assert "ViT-B-16" in known_architectures()
    assert len(set(known_architectures())) == len(known_architectures())
