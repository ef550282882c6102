"""Towers out of CLIPs in joined ones, groups and rates of their layers, and names with awkward paths."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from clipdistill.errors import InputError
from clipdistill.models import build_student, load_model, save_model
from clipdistill.models.names import check_model_name
from clipdistill.models.parameters import lock, parameter_groups
from clipdistill.models.towers.names import parse, split_models
from clipdistill.runtime.files import CHECKSUM
from tests.models.towers.conftest import NETWORK, make_encoder, make_network

TEACHER = "clip:scenes-teacher"
CAPTIONS = ["a red circle above a blue square", "a square", "two photo"]
_TEXT = {"context_length": 77, "vocab_size": 49_408, "width": 16, "heads": 2, "layers": 2}
_VISION = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2}
ARCHITECTURES = {
    "flat": {"vision_cfg": _VISION, "text_cfg": _TEXT},
    "text of its own": {"vision_cfg": _VISION, "text_cfg": _TEXT, "custom_text": True},
    "ResNet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": _TEXT},
    "timm": {"vision_cfg": {"timm_model_name": NETWORK, "timm_pool": "avg", "timm_proj": "linear", "image_size": 32},
             "text_cfg": _TEXT},
    "CoCa": {
        "vision_cfg": {**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**_TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"width": 16, "heads": 2, "layers": 1, "context_length": 76, "attn_pooler_heads": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_towers_of_a_clip_compute_what_it_does(kind, tmp_path):
    source = build_student({"embed_dim": 16, **ARCHITECTURES[kind]}, seed=0)
    save_model(source, tmp_path / "source")
    name = f"towers:image=clip:{tmp_path / 'source'},text=clip:{tmp_path / 'source'},dim=8,hidden=16"
    joined = load_model(name, teacher=True)
    source.module.eval().requires_grad_(False)
    images, tokens = torch.randn(2, 3, 32, 32), source.tokenizer(CAPTIONS)
    assert joined.tokenizer == source.tokenizer
    assert joined.image == source.image
    torch.testing.assert_close(joined.module.visual.features(images), source.module.encode_image(images))
    assert torch.equal(joined.module.text.features(tokens), source.module.encode_text(tokens))
    save_model(joined, tmp_path / "saved")
    again = load_model(tmp_path / "saved", teacher=True)
    assert again.fingerprint() == joined.fingerprint()
    assert torch.equal(again.module.encode_text(tokens), joined.module.encode_text(tokens))
    counts = joined.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in joined.module.parameters())
    assert counts["text_transformer"] == source.parameter_counts()["text_transformer"]


def test_towers_of_joined_models_can_be_joined_again(name, tmp_path):
    save_model(load_model(name()), tmp_path / "first")
    first = load_model(tmp_path / "first", teacher=True)
    for path, text in (("second", f"clip:{tmp_path / 'first'}"), ("third", TEACHER)):
        model = load_model(f"towers:image=clip:{tmp_path / 'first'}+{TEACHER},text={text},dim=8", teacher=True)
        images = torch.randn(2, 3, model.image.size, model.image.size)
        assert model.module.encode_image(images).shape == (2, 8)
        small = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True)
        factor, shift = model.module.visual._inputs[0][1:]
        small = small * torch.tensor(factor).view(3, 1, 1) + torch.tensor(shift).view(3, 1, 1)
        features = model.module.visual.features(images)
        torch.testing.assert_close(features[:, :8], first.module.encode_image(small))
        save_model(model, tmp_path / path)
        assert load_model(tmp_path / path).fingerprint() == model.fingerprint()
        lock(model.module.requires_grad_(True), "image", 1)
        trained = {n for n, p in model.module.named_parameters() if p.requires_grad and n.startswith("visual.trunks")}
        assert {n.split(".")[2] for n in trained} == {"0", "1"}, "the last groups of towers side by side train together"


def test_a_clip_tower_at_another_size_keeps_its_weights():
    model = load_model(f"towers:image={TEACHER},text={TEACHER},dim=8,size=32,context=16", teacher=True)
    resized = load_model("scenes-teacher", image_size=32, teacher=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.module.visual.features(images), resized.module.encode_image(images))
    assert model.tokenizer(CAPTIONS).shape == (3, 16)
    whole = load_model("scenes-teacher", teacher=True)
    expected = whole.module.encode_text(whole.tokenizer(CAPTIONS))
    torch.testing.assert_close(model.module.text.features(model.tokenizer(CAPTIONS)), expected, atol=1e-5, rtol=1e-4)


def test_random_towers_are_said_aloud(caplog):
    load_model(f"towers:image=clip:ViT-T-16,text={TEACHER},dim=8,size=32")
    assert "ViT-T-16 has random weights" in caplog.text


@pytest.mark.parametrize(
    ("image", "text", "settings", "message"),
    [
        ("clip:", TEACHER, "", "an image tower is"),
        ("hf:x/y", TEACHER, "", "hf: names a text encoder"),
        (TEACHER, "timm:resnet18", "", "timm: names an image tower"),
        (TEACHER, TEACHER, ",text_layers=2", "cut it with  inherit:"),
        (TEACHER, TEACHER, ",pooling=cls", "pooling is its own"),
        (TEACHER, TEACHER, ",context=90", "its captions have 40 tokens, not 90"),
        (TEACHER, TEACHER, ",size=31", "pixels"),
        (TEACHER, "clip:scenes-techer", "", "scenes-techer' is no model"),
        (TEACHER, "clip:onnx:x", "", "no tower can be taken out of onnx:x"),
        ("clip:nowhere/x.pt", TEACHER, "", "no architecture 'nowhere'|no such file"),
    ],
)
def test_a_clip_tower_that_cannot_be_is_one_sentence(image, text, settings, message):
    with pytest.raises(InputError, match=message):
        load_model(f"towers:image={image},text={text}{settings}")


def test_a_hostile_depth_of_towers_is_refused(tmp_path):
    save_model(load_model(f"towers:image={TEACHER},text={TEACHER},dim=8"), tmp_path / "saved")
    path = tmp_path / "saved" / "model.json"
    values = json.loads(path.read_text())
    values.pop(CHECKSUM)
    for _ in range(30):
        outer = json.loads(path.read_text())["architecture"]
        outer["towers"]["text"]["config"] = values["architecture"]
        values["architecture"] = outer
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="towers out of towers, more than 8 times"):
        load_model(tmp_path / "saved")


def test_commas_and_spaces_in_paths_belong_to_them(files, tmp_path):
    place = tmp_path / "a, b=c,d + e"
    network = make_network(tmp_path / "x,dim=3 y.safetensors")
    make_encoder(place)
    text = f" image = timm:{NETWORK}@{network} , text=hf:{place}, dim=8,hidden=16"
    wanted = parse(f"towers:{text}")
    assert (wanted.images[0].file, wanted.text, wanted.dim) == (network, str(place), 8)
    check_model_name(f"towers:{text}")
    assert load_model(f"towers:{text}").embed_dim == 8
    one, run = f"towers:{text.strip()}", tmp_path / "run, one"
    run.mkdir()
    assert split_models(f"ViT-B-16/openai,{one},{run},{one},runs/x") == (
        "ViT-B-16/openai",
        one,
        str(run),
        one,
        "runs/x",
    )
    wrong = "towers:image=timm:a,text=hf:b/c,dimm=3"
    assert split_models(f"{wrong},runs/x") == (wrong, "runs/x"), "a misspelt key is told as one"


def layers_of(network: str) -> dict[str, int]:
    """Parameter -> layer, as timm's optimisers decay them."""
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(network, pretrained=False, num_classes=0)
    names = {id(p): n for n, p in model.named_parameters()}
    scales = {
        names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]
    }
    return {name: round(-torch.tensor(scale).log2().item()) for name, scale in scales.items()}


@pytest.mark.parametrize("network", [NETWORK, "test_vit", "test_resnet", "test_convnext"])
def test_layers_decay_as_timm_groups_them(network, name, tmp_path):
    model = load_model(name(image=f"timm:{network}@{make_network(tmp_path / 'x.safetensors', network)}"))
    groups = parameter_groups(
        model.module, weight_decay=0.1, learning_rate=1.0, layer_decay=0.5, tower_rates={"image": 0.25}
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    below = layers_of(network)
    trunk = dict(model.module.visual.trunks[0].named_parameters())
    assert trunk.keys() == below.keys()
    for parameter, layers in below.items():
        # timm's last group keeps the full rate, ours is the first below the new head
        assert rates[id(trunk[parameter])] == pytest.approx(0.25 * 0.5 ** (layers + 1)), parameter
    assert {rates[id(p)] for p in model.module.visual.head.parameters()} == {1.0}
    assert {rates[id(p)] for p in model.module.text.head.parameters()} == {1.0}
    blocks = model.module.text.transformer.encoder.layer
    assert [{rates[id(p)] for p in block.parameters()} for block in blocks] == [{0.125}, {0.25}, {0.5}]


def test_a_whole_tower_keeps_the_embedding_of_its_model(tmp_path):
    teacher = load_model("scenes-teacher", teacher=True)
    images, tokens = torch.randn(2, 3, 64, 64), teacher.tokenizer(CAPTIONS[:1])
    text = load_model("towers:image=clip:scenes-teacher,text=whole:scenes-teacher,head=linear", teacher=True)
    assert torch.equal(text.module.encode_text(tokens), teacher.module.encode_text(tokens))
    image = load_model(f"towers:image=whole:scenes-teacher,text={TEACHER},hidden=16", teacher=True)
    assert torch.equal(image.module.encode_image(images), teacher.module.encode_image(images))
    for model in (text, image):
        assert model.embed_dim == teacher.embed_dim
        assert torch.equal(model.module.logit_scale, teacher.module.logit_scale)
        save_model(model, tmp_path / model.name[7:12])
        assert load_model(tmp_path / model.name[7:12]).fingerprint() == model.fingerprint()
    lock(text.module.requires_grad_(True), "text", 0)
    assert not any(p.requires_grad for p in text.module.text.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("towers:image=whole:scenes-teacher+clip:scenes-teacher,text=clip:scenes-teacher", "stands alone"),
        ("towers:image=whole:scenes-teacher,text=clip:scenes-teacher,dim=64", r"several widths: \[64, 128\]"),
        ("towers:image=whole:,text=clip:scenes-teacher", "image=whole:MODEL"),
        ("towers:image=clip:scenes-teacher,text=whole:scenes-teacher,text_layers=1", "text_layers is of"),
    ],
)
def test_whole_towers_that_cannot_be(name, message):
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_a_saved_whole_tower_of_another_width_is_refused(tmp_path):
    model = load_model("towers:image=clip:scenes-teacher,text=whole:scenes-teacher,head=linear")
    save_model(model, tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    description = json.loads(path.read_text())
    description.pop(CHECKSUM, None)
    description["architecture"]["embed_dim"] = 64
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match="a whole tower is one of a CLIP of the same embed_dim"):
        load_model(tmp_path / "m")
