"""open_clip's blocks without their copies, the last one only where it is read: equal to open_clip's own, and fewer."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.models.architecture import build_module
from clipdistill.models.blocks import LeanAttention, as_open_clip
from clipdistill.models.masking import masked_image_tokens
from tests.models.conftest import tiny_architecture

CONTEXT, VOCABULARY = 12, 40
IMAGE = {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 3}
READ_AT_ONE_PLACE: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "custom text": {"custom_text": True},
    "bias": {"custom_text": True, "text": {"proj_bias": True}},
    "layer scale": {"image": {"ls_init_value": 0.3}, "text": {"ls_init_value": 0.3}},
    "norm after": {"image": {"final_ln_after_pool": True}},
    "no norm before": {"image": {"no_ln_pre": True}},
    "one layer": {"image": {"layers": 1}, "text": {"layers": 1}},
    "first": {"custom_text": True, "text": {"pool_type": "first"}},
    "last": {"custom_text": True, "text": {"pool_type": "last"}},
    "end": {"custom_text": True, "text": {"pool_type": "eos", "eos_id": VOCABULARY - 1}},
    "both ways": {"custom_text": True, "text": {"no_causal_mask": True, "pool_type": "first"}},
}
READ_WHOLE: dict[str, dict[str, Any]] = {
    "mean": {"image": {"pool_type": "avg"}},
    "attention pool": {"image": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}},
    "own blocks": {"custom_text": True, "image": {"qk_norm": True}, "text": {"scale_heads": True}},
    "class token": {"custom_text": True, "text": {"embed_cls": True}},
}


def architecture_of(image: Any = None, text: Any = None, **top: Any) -> dict[str, Any]:
    vision, words = {**IMAGE, **(image or {})}, {**TEXT, **(text or {})}
    return {**tiny_architecture(vision_cfg=vision, text_cfg=words), **top}


def pair_of(**values: Any) -> tuple[Any, Any]:
    """(ours, open_clip's own of the same weights), float64."""
    architecture = architecture_of(**values)
    ours: Any = build_module(architecture, seed=1).double()
    plain = dict(copy.deepcopy(architecture))
    kind = open_clip.CustomTextCLIP if plain.pop("custom_text", False) else open_clip.CLIP
    theirs: Any = kind(**plain).double()
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norms start at 0 and 1, where some mistakes do not show
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double() * 0.1)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator).double()
    tokens = torch.zeros(4, CONTEXT, dtype=torch.long)
    for row, length in enumerate((1, 4, 7, CONTEXT - 1)):
        tokens[row, :length] = torch.randint(1, VOCABULARY - 1, (length,), generator=generator)
        tokens[row, length] = VOCABULARY - 1
    return images, tokens


def embeddings_and_gradients(module: Any) -> list[Tensor]:
    images, tokens = inputs()
    rows = [module.encode_image(images), module.encode_text(tokens)]
    sum((each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum() for each in rows).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    module.zero_grad()
    return [*rows, *gradients]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*READ_AT_ONE_PLACE, *READ_WHOLE])
def test_equals_open_clip(name: str, training: bool) -> None:
    ours, theirs = pair_of(**{**READ_AT_ONE_PLACE, **READ_WHOLE}[name])
    for module in (ours, theirs):
        module.train(training)
    for found, expected in zip(embeddings_and_gradients(ours), embeddings_and_gradients(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", READ_AT_ONE_PLACE)
def test_the_last_block_is_computed_at_one_place(name: str) -> None:
    ours, theirs = pair_of(**READ_AT_ONE_PLACE[name])
    images, tokens = inputs()
    for method, given, length, width in (("encode_image", images, 17, 32), ("encode_text", tokens, CONTEXT, 24)):
        counted = []
        for module in (ours, theirs):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                getattr(module.train(), method)(given)
            counted.append(counter.get_total_flops())
        # of each other place all but key and value: query, output and MLP, and attention's own two products (which
        # the counter does not see before torch 2.15)
        rest = 2 * 4 * (length - 1) * 10 * width * width
        assert counted[1] - counted[0] in (rest, rest + 2 * 4 * (length - 1) * 2 * length * width), method


def test_attention_equals_torch_however_it_is_asked() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).double()
    ours = copy.deepcopy(theirs)
    ours.__class__ = LeanAttention
    query, other = torch.randn(2, 4, 24).double(), torch.randn(2, 5, 24).double()
    added = torch.randn(6, 4, 5).double()
    for key, value, mask, weights in (
        (query, query, None, False), (other, other, None, False), (other, other, added, False),
        (other, other, added[0], False), (other, other.flip(1), None, False), (query, query, None, True),
        (other, other, added > 1, False),
    ):  # fmt: skip
        for found, expected in zip(
            ours(query, key, value, need_weights=weights, attn_mask=mask),
            theirs(query, key, value, need_weights=weights, attn_mask=mask),
            strict=True,
        ):
            if expected is not None:
                torch.testing.assert_close(found, expected)


def test_checkpointed_blocks_and_hidden_patches_are_the_same() -> None:
    ours, theirs = pair_of()
    for module in (ours, theirs):
        module.train().set_grad_checkpointing(True)
    for found, expected in zip(embeddings_and_gradients(ours), embeddings_and_gradients(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    rows = []
    for module in (ours, theirs):
        with masked_image_tokens(module, 0.5, generator=torch.Generator().manual_seed(3)), torch.no_grad():
            rows.append(module.encode_image(inputs()[0]))
    torch.testing.assert_close(*rows, rtol=1e-10, atol=1e-10)


def test_hooks_see_all_tokens_and_change_nothing() -> None:
    ours, theirs = pair_of()
    images, tokens = inputs()
    last = "transformer.resblocks.2"
    for place in ("transformer", last, f"{last}.ln_1", f"{last}.ln_2", f"{last}.mlp", "ln_post"):
        seen: list[Tensor] = []
        part = ours.visual.get_submodule(place)
        handle = part.register_forward_hook(lambda part, given, output, seen=seen: seen.append(output))
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), rtol=1e-10, atol=1e-10)
        handle.remove()
        assert [tuple(each.shape) for each in seen] == [(4, 17, 32)], place
    for place in ("transformer", last, f"{last}.ln_2", f"{last}.mlp", "ln_final"):
        words: list[Tensor] = []
        handle = ours.get_submodule(place).register_forward_hook(
            lambda part, given, output, words=words: words.append(output)
        )
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-10, atol=1e-10)
        handle.remove()
        assert [tuple(each.shape) for each in words] == [(4, CONTEXT, 24)], place
    gradients: list[Tensor] = []
    handle = ours.visual.get_submodule(f"{last}.mlp").register_full_backward_hook(
        lambda part, into, out: gradients.append(out[0])
    )
    ours.encode_image(images).sum().backward()
    handle.remove()
    assert [tuple(each.shape) for each in gradients] == [(4, 17, 32)]
    halved = ours.visual.transformer.register_forward_pre_hook(lambda part, given: (given[0] * 0.5, *given[1:]))
    theirs.visual.transformer.register_forward_pre_hook(lambda part, given: (given[0] * 0.5, *given[1:]))
    torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), rtol=1e-10, atol=1e-10)
    halved.remove()


def test_towers_are_one_graph() -> None:
    ours, _ = pair_of()
    for method, given in zip((ours.encode_image, ours.encode_text), inputs(), strict=True):
        whole = torch.compile(method, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(given), method(given), rtol=1e-10, atol=1e-10)


def test_open_clips_own_code_comes_back() -> None:
    ours, theirs = pair_of()
    before = embeddings_and_gradients(ours)
    as_open_clip(ours)
    for found, expected in zip(embeddings_and_gradients(ours), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert type(ours.visual) is type(theirs.visual)
    assert type(ours.visual.transformer.resblocks[0].attn) is nn.MultiheadAttention


def test_tokens_are_whole_where_they_are_asked_for() -> None:
    ours, theirs = pair_of()
    images, _ = inputs()
    for module in (ours, theirs):
        module.visual.output_tokens = True
    for found, expected in zip(ours.visual(images), theirs.visual(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
