"""Manual inheritance: exact copies, the released and the even rule, widths, importance, published sizes, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.models import ClipModel, load_model, save_model
from clipdistill.models.architecture import build_module
from clipdistill.models.clip_model import count_parameters
from clipdistill.models.inheritance.cut import inherit, inherited_architecture, kept_layers
from clipdistill.models.inheritance.importance import head_scores, top, unit_scores
from clipdistill.models.inheritance.parts import TransformerSizes, transformer_sizes
from clipdistill.models.inherited import parse
from clipdistill.models.students import named_architecture

Make = Callable[..., ClipModel]
VIT = {"image_size": 32, "layers": 5, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 4, "layers": 4}
RESNET = {"image_size": 64, "layers": [2, 1, 3, 2], "width": 8, "patch_size": None}
TIMM = {"image_size": 160, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}


def outputs(model: ClipModel) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, 3, model.image.size, model.image.size, generator=generator)
    model.module.eval()
    with torch.no_grad():
        text = model.module.encode_text(model.tokenizer(["a red dog", "the cat", "two cats asleep"]))
        return model.module.encode_image(images), text


@pytest.mark.parametrize("channels", ["leading", "importance"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision_cfg": RESNET},
        {"vision_cfg": TIMM},
        {"custom_text": True, "text_cfg": TEXT | {"proj_bias": True}},
        {"vision_cfg": VIT | {"no_ln_pre": True, "ls_init_value": 0.1}, "init_logit_bias": -10.0, "quick_gelu": True},
    ],
    ids=["vit", "resnet", "timm", "custom text", "variants"],
)
def test_all_layers_and_widths_equal_the_teacher_to_the_bit(
    make_tiny: Make, changes: dict[str, object], channels: str
) -> None:
    teacher = make_tiny(**changes)
    student = inherit(teacher, f"inherit:all,channels={channels}")
    assert student.module is not teacher.module
    assert type(student.module) is type(teacher.module)
    assert all(torch.equal(a, b) for a, b in zip(outputs(student), outputs(teacher), strict=True))
    assert all(torch.equal(t, student.module.state_dict()[n]) for n, t in teacher.module.state_dict().items())
    assert student.parameter_counts() == teacher.parameter_counts()


@pytest.mark.parametrize(
    ("teacher", "student", "released", "even"),
    [
        (12, 6, [0, 2, 4, 6, 8, 10], [0, 2, 4, 7, 9, 11]),
        (12, 3, [0, 4, 8], [0, 6, 11]),
        (12, 10, list(range(10)), [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]),
        (12, 9, list(range(9)), [0, 1, 3, 4, 6, 7, 8, 10, 11]),
        (9, 6, [0, 1, 2, 3, 4, 5], [0, 2, 3, 5, 6, 8]),
        (4, 1, [0], [0]),
        (3, 3, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_depth_rules(teacher: int, student: int, released: list[int], even: list[int]) -> None:
    assert list(kept_layers(teacher, student, "released")) == released
    assert list(kept_layers(teacher, student, "even")) == even


def test_leading_slices_by_hand(make_tiny: Make) -> None:
    """The released rule written out a second time for every kind of tensor."""
    teacher = make_tiny(vision_cfg=VIT, text_cfg=TEXT)
    student = inherit(teacher, "inherit:layers=2,width=16,text_layers=3,text_width=24,embed=20,depth=even")
    big, small = teacher.module.state_dict(), student.module.state_dict()
    assert torch.equal(small["visual.conv1.weight"], big["visual.conv1.weight"][:16])
    assert torch.equal(small["visual.positional_embedding"], big["visual.positional_embedding"][:, :16])
    assert torch.equal(small["visual.proj"], big["visual.proj"][:16, :20])
    assert torch.equal(small["token_embedding.weight"], big["token_embedding.weight"][:, :24])
    assert torch.equal(small["text_projection"], big["text_projection"][:24, :20])
    source, target = "visual.transformer.resblocks.4.", "visual.transformer.resblocks.1."
    qkv = big[f"{source}attn.in_proj_weight"].reshape(3, 4, 8, 32)[:, :2, :, :16]
    assert torch.equal(small[f"{target}attn.in_proj_weight"], qkv.reshape(48, 16))
    bias = big[f"{source}attn.in_proj_bias"].reshape(3, 4, 8)[:, :2]
    assert torch.equal(small[f"{target}attn.in_proj_bias"], bias.reshape(48))
    assert torch.equal(small[f"{target}attn.out_proj.weight"], big[f"{source}attn.out_proj.weight"][:16, :16])
    assert torch.equal(small[f"{target}mlp.c_fc.weight"], big[f"{source}mlp.c_fc.weight"][:64, :16])
    assert torch.equal(small[f"{target}mlp.c_proj.bias"], big[f"{source}mlp.c_proj.bias"][:16])
    # text: 4 -> 3 evenly is 0, 2, 3
    assert torch.equal(small["transformer.resblocks.1.ln_2.weight"], big["transformer.resblocks.2.ln_2.weight"][:24])
    assert torch.equal(
        small["transformer.resblocks.2.mlp.c_proj.weight"], big["transformer.resblocks.3.mlp.c_proj.weight"][:24, :96]
    )
    assert torch.equal(small["logit_scale"], big["logit_scale"])
    image, text = outputs(student)
    assert image.shape == text.shape == (3, 20)


def test_resnet_by_hand(make_tiny: Make) -> None:
    teacher = make_tiny(vision_cfg=RESNET)
    for name, buffer in teacher.module.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    student = inherit(teacher, "inherit:layers=2-1-2-1,width=4,depth=even")
    big, small = teacher.module.state_dict(), student.module.state_dict()
    assert torch.equal(small["visual.conv1.weight"], big["visual.conv1.weight"][:2])
    assert torch.equal(small["visual.conv3.weight"], big["visual.conv3.weight"][:4, :2])
    assert torch.equal(small["visual.layer1.0.conv1.weight"], big["visual.layer1.0.conv1.weight"][:4, :4])
    # layer 3 has 3 -> 2 blocks: 0 and 2, of 16 and 64 channels
    assert torch.equal(small["visual.layer3.1.conv2.weight"], big["visual.layer3.2.conv2.weight"][:16, :16])
    assert torch.equal(small["visual.layer3.1.bn3.running_var"], big["visual.layer3.2.bn3.running_var"][:64])
    downsample = "visual.layer3.0.downsample.0.weight"
    assert torch.equal(small[downsample], big[downsample][:64, :32])
    assert torch.equal(small["visual.attnpool.q_proj.weight"], big["visual.attnpool.q_proj.weight"][:128, :128])
    assert torch.equal(small["visual.attnpool.c_proj.weight"], big["visual.attnpool.c_proj.weight"][:, :128])
    assert all(o.shape == (3, 24) and o.isfinite().all() for o in outputs(student))


PUBLISHED = [
    ("ViT-8M/16+3M", "ViT-B-16", (8.28, 2.37, 23.45)),
    ("ViT-39M/16+19M", "ViT-B-16", (38.59, 18.91, 83.10)),
    ("ViT-40M/32+19M", "ViT-B-32", (39.69, 18.91, 84.21)),
    ("ViT-61M/32+29M", "ViT-B-32", (61.41, 28.37, 115.38)),
    ("RN-19M+19M", "RN50", (18.60, 18.91, 63.37)),
    ("RN-30M+29M", "RN50", (29.58, 28.37, 83.82)),
]


@pytest.mark.parametrize(("name", "teacher", "millions"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_parameter_counts(name: str, teacher: str, millions: tuple[float, float, float]) -> None:
    architecture, _ = inherited_architecture(named_architecture(teacher), parse(f"inherit:{name}"))
    counts = count_parameters(build_module(architecture, device="meta"))
    found = tuple(round(counts[key] / 1e6, 2) for key in ("image", "text_transformer", "total"))
    assert found == millions
    assert "block_sizes" not in architecture


def test_importance_keeps_what_carries_weight(make_tiny: Make) -> None:
    teacher = make_tiny(vision_cfg=VIT, text_cfg=TEXT)
    state = teacher.module.state_dict()
    first = "visual.transformer.resblocks.0."
    with torch.no_grad():
        for name, tensor in state.items():
            if ".resblocks." in name and name.endswith("weight") and "ln_" not in name:
                tensor.mul_(0.01)
        state[f"{first}attn.in_proj_weight"][64 + 16 : 64 + 24] = 5.0  # value rows of head 2 of 4
        state[f"{first}attn.out_proj.weight"][:, 16:24] = 5.0
        state[f"{first}mlp.c_fc.weight"][[7, 90]] = 3.0
        state["visual.proj"][:, [3, 9]] = 10.0
        for layer in range(5):  # channel 30 is written and read more than the others
            block = f"visual.transformer.resblocks.{layer}."
            state[f"{block}mlp.c_proj.weight"][30] = 1.0
            state[f"{block}mlp.c_fc.weight"][:, 30] += 1.0
    student = inherit(teacher, "inherit:heads=1,mlp=2,width=8,embed=2,channels=importance")
    small = student.module.state_dict()
    sizes = transformer_sizes(teacher.module, "image")
    assert top(head_scores(state, "visual.transformer.", 0, sizes), 1).tolist() == [2]
    assert {7, 90} == set(top(unit_scores(state, "visual.transformer.", 0), 2).tolist())
    kept = [
        channel
        for channel in range(32)
        if any(torch.equal(row, state["visual.conv1.weight"][channel]) for row in small["visual.conv1.weight"])
    ]
    assert len(kept) == 8
    assert 30 in kept
    assert torch.equal(small["visual.proj"], state["visual.proj"][kept][:, [3, 9]])
    assert torch.equal(small[f"{first}mlp.c_fc.weight"], state[f"{first}mlp.c_fc.weight"][[7, 90]][:, kept])


def test_free_heads_and_units_make_blocks_of_their_own_size(make_tiny: Make, tmp_path: object) -> None:
    teacher = make_tiny(vision_cfg=VIT, text_cfg=TEXT)
    student = inherit(teacher, "inherit:heads=3,text_width=20,text_heads=2")
    assert student.architecture["block_sizes"]["image"]["heads"] == [3] * 5
    assert transformer_sizes(student.module, "text") == TransformerSizes(20, 8, (2,) * 4, (80,) * 4)
    save_model(student, f"{tmp_path}/student")
    again = load_model(f"{tmp_path}/student")
    assert all(torch.equal(a, b) for a, b in zip(outputs(student), outputs(again), strict=True))
    # and they can be inherited from in their turn
    third = inherit(again, "inherit:layers=2,text_heads=1")
    assert transformer_sizes(third.module, "image") == TransformerSizes(32, 8, (3, 3), (128, 128))
    assert transformer_sizes(third.module, "text").heads == (1,) * 4


def test_a_student_is_named_like_any_model(make_tiny: Make, tmp_path: object) -> None:
    save_model(make_tiny(vision_cfg=VIT, text_cfg=TEXT), f"{tmp_path}/teacher")
    student = load_model(f"inherit:layers=2,from={tmp_path}/teacher")
    assert student.architecture["vision_cfg"]["layers"] == 2
    whole = load_model(f"inherit:from={tmp_path}/teacher")
    assert whole.parameter_counts() == load_model(f"{tmp_path}/teacher").parameter_counts()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inherit:", "say what to inherit"),
        ("inherit:widht=16", "unknown key 'widht' (did you mean 'width'?)"),
        ("inherit:width=16,width=8", "'width' is given twice"),
        ("inherit:width=a", "width must be a whole number from 1 on, got 'a'"),
        ("inherit:width=0", "width must be a whole number"),
        ("inherit:width", "'width' is no published configuration"),
        ("inherit:all,nonsense", "'nonsense' is not a size"),
        ("inherit:ViT-39M/16+91M", "did you mean 'ViT-39M/16+19M'"),
        ("inherit:auto-45M/32+18M", "--recipe tinyclip-auto"),
        ("inherit:layers=2,depth=odd", "depth is released or even, not 'odd'"),
        ("inherit:layers=2,from=", "name a model after 'from='"),
        ("inherit:layers=9", "9 layers asked for, and the teacher has 5"),
        ("inherit:width=64", "64 channels asked for, and the teacher has 32"),
        ("inherit:width=12", "12 channels are no multiple of the head width 8"),
        ("inherit:heads=5", "5 heads asked for, and the teacher has 4"),
        ("inherit:text_mlp=500", "500 MLP units asked for"),
        ("inherit:embed=25", "embedding 25 is more than the teacher's 24"),
        ("inherit:layers=1-1-1-1", "one number of layers, not 1-1-1-1"),
        ("inherit:ViT-39M/16+19M", "16-pixel patches, and the teacher reads 8-pixel ones"),
        ("inherit:MobileViT-S", "tower of another library"),
    ],
)
def test_refusals(make_tiny: Make, name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        inherit(make_tiny(vision_cfg=VIT, text_cfg=TEXT), name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vision", "name", "message"),
    [
        (RESNET, "inherit:layers=3", "write layers as 3-4-6-3"),
        (RESNET, "inherit:layers=2-2-3-2", "2 blocks in a stage asked for, and the teacher has 1"),
        (RESNET, "inherit:width=5", "must be even"),
        (RESNET, "inherit:heads=1", "whose sizes are layers"),
        (TIMM, "inherit:width=8", "can only be taken whole"),
        (TIMM, "inherit:embed=8", "can only be taken whole"),
    ],
)
def test_refusals_of_other_towers(make_tiny: Make, vision: dict[str, object], name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        inherit(make_tiny(vision_cfg=vision), name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_to_inherit_from_must_be_named() -> None:
    with pytest.raises(InputError, match="say which model to inherit from"):
        load_model("inherit:layers=2")
