"""Captions are cut where, and only where, the text tower reads nothing behind their end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clipdistill.data.loader import PairLoader
from clipdistill.embed.encode import Encoder
from clipdistill.models import ClipModel, build_student
from clipdistill.models.architecture import build_module
from clipdistill.models.text_length import STEP, any_length, by_length, needed_lengths
from clipdistill.models.tokenizers import build_words_tokenizer
from clipdistill.scenes.pairs import open_scenes
from clipdistill.train.step import Towers
from tests.models.conftest import tiny_architecture

WORDS = [f"word{i}" for i in range(30)]
CAPTIONS = [" ".join(WORDS[i % 30] for i in range(n)) for n in (1, 3, 5, 6, 7, 12, 20, 40, 60, 100)]
CONTEXT = 48


def model_of(seed: int = 0, **text: Any) -> ClipModel:
    tokenizer = build_words_tokenizer(CAPTIONS, CONTEXT)
    values = {"context_length": CONTEXT, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2, **text}
    custom = values.pop("custom_text", False)
    architecture = tiny_architecture(text_cfg=values, **({"custom_text": True} if custom else {}))
    model = build_student(architecture, seed=seed, tokenizer=tokenizer)
    with torch.no_grad():  # position embeddings start so small that what stands where hardly matters
        for name, parameter in model.module.named_parameters():
            if "positional" in name or "cls_emb" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


READ_AT_THE_END = [
    {},
    {"custom_text": True},
    {"proj_bias": True, "custom_text": True},
    {"proj_type": "none"},
]
READ_THEIR_PADDING = [
    {"pool_type": "last"},
    {"custom_text": True, "pool_type": "last"},
    {"custom_text": True, "no_causal_mask": True, "pool_type": "last"},  # SigLIP
    {"custom_text": True, "no_causal_mask": True, "pool_type": "first"},
    {"custom_text": True, "embed_cls": True},  # CoCa
]


@pytest.mark.parametrize("text", READ_AT_THE_END, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_what_stands_behind_the_end_is_left_out(text: dict[str, Any], training: bool) -> None:
    if text.get("proj_type") == "none":
        text = {**text, "width": 24}
    model = model_of(**text)
    model.module.train(training)
    assert model.reads_only_text
    assert model.module.training is training
    for captions in (CAPTIONS[:1], CAPTIONS[:5], CAPTIONS, CAPTIONS[::-1], CAPTIONS[4:5] * 3):
        tokens = model.tokenizer(captions)
        (cut,) = model.shorten(tokens)
        assert cut.shape[1] == min(CONTEXT, -(-(max(len(c.split()) for c in captions) + 2) // STEP) * STEP)
        whole, short = model.module.encode_text(tokens), model.module.encode_text(cut)
        torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", READ_THEIR_PADDING, ids=str)
def test_towers_that_read_their_padding_get_all_of_it(text: dict[str, Any]) -> None:
    model = model_of(**text)
    assert not model.reads_only_text
    tokens = model.tokenizer(CAPTIONS[:3])
    assert model.shorten(tokens)[0] is tokens


def test_gradients_are_those_of_the_whole_context() -> None:
    model = model_of()
    tokens, found = model.tokenizer(CAPTIONS[:6]), []
    weight = torch.randn(6, model.embed_dim, generator=torch.Generator().manual_seed(0))
    for part in (tokens, *model.shorten(tokens)):
        model.module.zero_grad()
        (model.module.encode_text(part) * weight).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


def test_a_tower_that_takes_one_length_only_is_left_alone() -> None:
    model = model_of()
    plain = model.module.encode_text

    def strict(tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == CONTEXT
        return plain(tokens)

    model.module.encode_text = strict
    assert not model.reads_only_text
    model = model_of()
    model.module.encode_text = lambda tokens: torch.ones(len(tokens), 4)  # tells nothing
    assert not model.reads_only_text


def test_at_the_whole_context_it_computes_what_open_clip_does() -> None:
    from open_clip import CLIP

    architecture = tiny_architecture()
    ours = build_module(architecture, seed=3)
    theirs = CLIP(**tiny_architecture())
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 40, (5, 12), generator=torch.Generator().manual_seed(0))
    assert type(ours) is any_length(CLIP)
    for normalize in (False, True):
        found, expected = (module.double().encode_text(tokens, normalize=normalize) for module in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("row", "length"),
    [
        ([1, 5, 2] + [0] * 21, 8),
        ([1] + [5] * 5 + [2] + [0] * 17, 8),
        ([1] + [5] * 6 + [2] + [0] * 16, 16),
        ([1] + list(range(5, 27)) + [2], 24),  # no padding: the end token is the last
        ([1, 5, 9] + [9] * 21, 8),  # padded with the end token itself, which is kept once
        ([0] * 24, 8),
    ],
)
def test_the_end_token_is_never_cut(row: list[int], length: int) -> None:
    assert needed_lengths(torch.tensor([row])).tolist() == [length]


def test_groups_hold_every_row_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5, 31, 32, 64, 500):
        ends = torch.randint(1, 76, (count,), generator=generator)
        tokens = torch.where(torch.arange(77) < ends[:, None], 7, 0)
        groups = by_length(tokens)
        assert torch.cat(groups).sort().values.tolist() == list(range(count))
        assert all(len(group) >= min(32, count) for group in groups)
        highest = [int(needed_lengths(tokens[group]).max()) for group in groups]
        assert highest == sorted(highest)
    assert len(groups) > 3


def test_towers_in_groups_give_each_caption_its_own_embedding_and_gradient() -> None:
    texts = [CAPTIONS[(7 * i) % 10] + f" word{i % 30}" * (i % 5) for i in range(70)]
    model = model_of()
    module, tokens = model.module.train(), model.shorten(model.tokenizer(texts))[0]
    images = torch.zeros(70, 3, model.image.size, model.image.size)
    weights = torch.randn(70, model.embed_dim, generator=torch.Generator().manual_seed(0))
    found, widths = [], []
    encode = module.encode_text
    for grouped in (False, True):
        module.zero_grad()
        module.encode_text = lambda part: widths.append(tuple(part.shape)) or encode(part)
        text = Towers(module, group_captions=grouped)(images, tokens)[1]
        (text * weights).sum().backward()
        found.append([text.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert widths[0] == tuple(tokens.shape)
    assert len(widths) > 2
    assert sum(rows for rows, _ in widths[1:]) == 70
    assert min(length for _, length in widths[1:]) < tokens.shape[1]
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_the_encoder_gives_each_caption_its_own_row() -> None:
    model = model_of()
    texts = [CAPTIONS[(7 * i) % 10] + f" word{i % 30}" for i in range(150)]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.module.eval().encode_text(model.tokenizer(texts)), dim=-1)
    encoder = Encoder(model, batch_size=64, progress=False)
    torch.testing.assert_close(encoder.texts(texts), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder.encode_tokens(model.tokenizer(texts)), expected, rtol=1e-5, atol=1e-6)


def test_training_batches_are_cut_for_student_and_teacher() -> None:
    student, teacher = model_of(), model_of(pool_type="last")
    source = open_scenes("train", 32, 0)
    batch = next(iter(PairLoader(source, batch_size=16, student=student, teacher=teacher, steps=1)))
    assert batch.student_tokens.shape[1] < CONTEXT
    assert batch.teacher_tokens is not None
    assert batch.teacher_tokens.shape[1] == CONTEXT
    alike = next(iter(PairLoader(source, batch_size=16, student=student, teacher=model_of(1), steps=1)))
    assert alike.teacher_tokens is alike.student_tokens
