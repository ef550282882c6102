"""Joined towers: named, read with their own weights and settings, saved, locked, trained, exported."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import numpy
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import fill
from clipdistill.cli import main
from clipdistill.config import as_dict, build
from clipdistill.data.objects import hold
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, Subset
from clipdistill.errors import InputError, Preempted
from clipdistill.models import load_model, save_model
from clipdistill.models.names import check_model_name, check_student_name
from clipdistill.models.towers.names import TEXT_KINDS, parse, split_models
from clipdistill.runtime.files import CHECKSUM
from clipdistill.train import features
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.distil import Distillation
from clipdistill.train.run import distill
from tests.conftest import shared_folder
from tests.models.towers.conftest import NETWORK, make_encoder, make_network, pooled

CAPTIONS = ["a red circle above a blue square", "a square", "two photo"]


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def test_the_parts_of_a_name():
    wanted = parse("towers:image=timm:A@a.safetensors+timm:B.tag,text=hf:x/y,dim=64,head=linear,text_layers=2,size=96")
    assert [image.network for image in wanted.images] == ["A", "B.tag"]
    assert (wanted.text, wanted.dim, wanted.head, wanted.text_layers, wanted.size) == ("x/y", 64, "linear", 2, 96)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("text=hf:x/y", "it has no image tower"),
        ("image=timm:resnet18", "it has no text tower"),
        ("image=timm:resnet18,text=hf:x/y,dimm=3", "unknown key 'dimm' .did you mean 'dim'"),
        ("image=timm:resnet18,text=hf:x/y,dim=0", "dim must be a whole number"),
        ("image=timm:resnet18,text=hf:x/y,head=big", "head is mlp or linear"),
        ("image=timm:resnet18,text=hf:x/y,pooling=max", "pooling is mean, cls or end"),
        ("image=resnet18,text=hf:x/y", "an image tower is"),
        ("image=timm:resnet18,text=x/y", "a text tower is"),
        ("image=timm:resnet18,text=hf:xy", "no folder, and no name on the hub"),
        ("image=timm:resnet81,text=hf:x/y", "timm has no architecture 'resnet81'"),
        ("image=timm:resnet18@nowhere.safetensors,text=hf:x/y", "nowhere.safetensors: no such file"),
        ("image=timm:resnet18@README.md,text=hf:x/y", "read from .safetensors files only"),
    ],
)
def test_a_wrong_name_is_one_sentence(settings, message):
    with pytest.raises(InputError, match=message):
        check_model_name(f"towers:{settings}")


def test_a_wrong_name_is_refused_without_torch():
    program = (
        "import sys\nfrom clipdistill.models.names import check_model_name\n"
        "from clipdistill.errors import InputError\n"
        "try: check_model_name('towers:image=timm:resnet81,text=hf:x/y')\n"
        "except InputError: pass\nassert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_commas_of_a_name_do_not_part_teachers():
    one = "towers:image=timm:a,text=hf:b/c,dim=3"
    assert split_models(f"ViT-B-16/openai,{one},runs/x") == ("ViT-B-16/openai", one, "runs/x")


def test_towers_compute_what_their_libraries_do(name, files):
    transformers = pytest.importorskip("transformers")
    model = load_model(name(), teacher=True)
    network = timm.create_model(NETWORK, pretrained=False, num_classes=0).eval()
    own = {n: t.float() for n, t in load_file(files[0]).items() if not n.startswith("classifier")}
    network.load_state_dict(own, strict=False)
    torch.testing.assert_close(model.module.visual.features(images()), network(images()))
    encoder = transformers.AutoModel.from_pretrained(files[1]).eval()
    tokens = model.tokenizer(CAPTIONS)
    mask = (tokens != 0).long()
    states = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(model.module.text.features(tokens), mean, atol=1e-5, rtol=1e-4)
    assert model.image.size == 32
    assert tuple(model.image.mean) == tuple(network.default_cfg["mean"])
    assert model.parameter_counts()["total"] == sum(p.numel() for p in model.module.parameters())


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_every_kind_of_text_encoder(kind, name, tmp_path):
    model = load_model(name("text_layers=2", text=f"hf:{make_encoder(tmp_path / kind, kind)}"), teacher=True)
    assert model.reads_only_text
    assert model.module.encode_text(model.tokenizer(CAPTIONS)).shape == (3, 8)
    counts = model.parameter_counts()
    assert 0 < counts["text_transformer"] < counts["text_total"]
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", teacher=True)
    assert again.fingerprint() == model.fingerprint()
    tokens = again.tokenizer(CAPTIONS)
    assert torch.equal(again.module.encode_text(tokens), model.module.encode_text(tokens))


def test_first_layers_are_those_of_the_whole_encoder(name):
    whole, part = load_model(name()).module.text, load_model(name("text_layers=1")).module.text
    assert len(part.transformer.encoder.layer) == 1
    for key, tensor in part.transformer.state_dict().items():
        assert torch.equal(tensor, whole.transformer.state_dict()[key])


@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "end")])
def test_pooling_is_what_the_encoder_was_trained_with(mode, pooling, name, files, tmp_path):
    folder = pooled(shutil.copytree(files[1], tmp_path / "encoder"), **{f"pooling_mode_{mode}": True})
    model = load_model(name(text=f"hf:{folder}"), teacher=True)
    text = model.module.text
    assert text.pooling == pooling
    assert model.context_length == 24
    tokens = model.tokenizer(CAPTIONS)
    states = text.transformer(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    last = (tokens != 0).sum(1) - 1
    expected = {"cls": states[:, 0], "end": states[torch.arange(3), last]}.get(pooling)
    if expected is not None:
        assert torch.equal(text.features(tokens), expected)
    assert load_model(name("pooling=cls", text=f"hf:{folder}")).module.text.pooling == "cls"
    unknown = pooled(shutil.copytree(files[1], tmp_path / "other"), pooling_mode_max_tokens=True)
    with pytest.raises(InputError, match="pooling by pooling_mode_max_tokens is not supported"):
        load_model(name(text=f"hf:{unknown}"))


def test_image_towers_side_by_side_each_see_their_own_pixels(name, files, tmp_path):
    other = make_network(tmp_path / "vit.safetensors", "test_vit")
    both = f"timm:{NETWORK}@{files[0]}+timm:test_vit@{other}"
    model = load_model(name(image=both), teacher=True)
    first = load_model(name(), teacher=True).module.visual
    features = model.module.visual.features(images())
    torch.testing.assert_close(features[:, : first.head.widths[0]], first.features(images()))
    assert features.shape[1] == sum(model.module.visual.head.widths)
    save_model(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved").fingerprint() == model.fingerprint()
    own_sizes = load_model(name(image=both).replace(",size=32", ""), teacher=True)
    assert own_sizes.module.encode_image(images(own_sizes.image.size)).shape == (2, 8)


def test_heads_are_a_function_of_the_seed(name):
    models = [load_model(name(), seed=seed) for seed in (0, 0, 1)]
    assert models[0].fingerprint() == models[1].fingerprint() != models[2].fingerprint()
    check_student_name(name())


def test_weights_that_do_not_fit_are_refused(name, files, tmp_path):
    with pytest.raises(InputError, match="the weights are not those of timm's test_vit"):
        load_model(name(image=f"timm:test_vit@{files[0]}"))
    folder = shutil.copytree(files[1], tmp_path / "encoder")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "layer.1." not in n}, folder / "model.safetensors")
    with pytest.raises(InputError, match="the weights are not those of the encoder"):
        load_model(name(text=f"hf:{folder}"))
    save_file(tensors | {"encoder.layer.0.attention.self.extra.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="which is no part of a bert encoder"):
        load_model(name("text_layers=2", text=f"hf:{folder}"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the weights of a text tower are read from"):
        load_model(name(text=f"hf:{folder}"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "llama"}))
    with pytest.raises(InputError, match="text encoders of the kind 'llama' cannot be a tower"):
        check_model_name(name(text=f"hf:{folder}"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("embed_dim",), 1 << 30),
        (("towers", "hidden"), 0),
        (("towers", "image", "trunks", 0, "network"), "hf-hub:a/b"),
        (("towers", "image", "std"), [1.0, 0.0, 1.0]),
        (("towers", "text", "kind"), "auto"),
        (("towers", "text", "config", "hidden_size"), 1 << 30),
        (("towers", "text", "config", "auto_map"), {"AutoModel": "evil.Model"}),
    ],
)
def test_a_hostile_description_is_refused(path, value, name, tmp_path):
    save_model(load_model(name()), tmp_path / "saved")
    file = tmp_path / "saved" / "model.json"
    values = json.loads(file.read_text())
    values.pop(CHECKSUM)
    part = values["architecture"]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"model.json: architecture"):
        load_model(tmp_path / "saved")


def config(name, out, **train):
    settings = {
        "student": name,
        "out": str(out),
        "data": {"path": "scenes:train", "size": 48},
        "train": {"steps": 2, "batch_size": 16, "warmup_steps": 1, "epochs": None, "precision": "fp32", **train},
    }
    return resolve("lit", settings)


def data_of(pairs):
    return DataConfig(path=hold(pairs))


def changed(before, run):
    after = load_model(run).module.state_dict()
    return {key.split(".")[0] + "." + key.split(".")[1] for key, old in before.items()
            if not torch.equal(old, after[key]) and "." in key}  # fmt: skip


def test_lit_trains_the_heads_and_the_text_tower_alone(name, tmp_path, capsys):
    before = load_model(name(), seed=0).module.state_dict()
    distill(config(name(), tmp_path / "run"), quiet=False)
    assert changed(before, tmp_path / "run") == {"visual.head", "text.head", "text.transformer"}
    said = capsys.readouterr()
    assert "parameters train" in said.out + said.err
    assert "batch normalisations keep their statistics" in said.out + said.err


def test_last_groups_train_at_their_own_rate(name, tmp_path):
    from clipdistill.train.setup import build

    made = build(config(name(), tmp_path / "run", lock_image=2, lock_text=1, learning_rate_image=0.1), "cpu")
    module = made.student.module
    trained = {key for key, p in module.named_parameters() if p.requires_grad}
    assert any(key.startswith("visual.trunks") for key in trained)
    assert "visual.trunks.0.conv_stem.weight" not in trained
    assert {key.split(".")[4] for key in trained if key.startswith("text.transformer")} == {"2"}
    rates = {p: g["lr"] for g in made.optimiser.param_groups for p in g["params"]}
    for key, parameter in module.named_parameters():
        if parameter in rates:
            factor = 0.1 if "trunks" in key else 0.05 if "transformer" in key else 1.0
            assert rates[parameter] == pytest.approx(made.config.train.learning_rate * factor), key
    layers = [part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert layers
    assert not any(layer.training for layer in layers)
    live = build(config(name(), tmp_path / "live", lock_image="none", batch_statistics="live"), "cpu").student.module
    assert all(part.training for part in live.modules() if isinstance(part, torch.nn.BatchNorm2d))
    with pytest.raises(InputError, match=r"train.lock_text=40: the text tower has \d+ groups"):
        build(config(name(), tmp_path / "none", lock_text=40), "cpu")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("text", ["all", "none"])
def test_features_of_locked_towers_are_computed_once_and_change_nothing(text, name, tmp_path, monkeypatch, capsys):
    def trained(out):
        settings = {"steps": 5, "batch_size": 16, "lock_text": text, "views": "fixed", "learning_rate_text": 1.0}
        return load_model(distill(config(name(), out, **settings), quiet=False).student).module.state_dict()

    calls = []
    whole = timm.models.EfficientNet.forward
    monkeypatch.setattr(timm.models.EfficientNet, "forward", lambda self, x: calls.append(len(x)) or whole(self, x))
    once = trained(tmp_path / "once")
    assert sum(n for n in calls if n > 1) == 48, "each picture is encoded once; single ones tell a width"
    said = capsys.readouterr()
    towers = "image and text towers" if text == "all" else "image tower"
    assert f"features of the locked {towers} computed once" in said.out + said.err
    monkeypatch.setattr(features, "can_keep", lambda *_: False)
    each = trained(tmp_path / "each")
    for key, tensor in once.items():
        torch.testing.assert_close(tensor, each[key], atol=1e-4, rtol=1e-3, msg=key)


def test_what_a_run_is_measured_on_goes_through_locked_towers_once(name, tmp_path, monkeypatch):
    """The curve and the final scores come from heads, and are those of the towers; stored for the next run."""

    def trained(out, **given):
        train = {"steps": 4, "batch_size": 16, "lock_text": "all", "views": "fixed", "evaluate_every": 2}
        settings = as_dict(config(name(), tmp_path / out, **train, **given))
        settings |= {"validation": {"path": "scenes:val", "size": 20}}
        settings["evaluation"] = {"curve_images": 10}
        run = distill(build(RunConfig, settings, "test"), quiet=True)
        curve = [json.loads(line) for line in (tmp_path / out / "eval.jsonl").read_text().splitlines()]
        return [(s.metric, s.value, s.low, s.high) for s in run.scores], [point["scores"] for point in curve]

    calls = []
    whole = timm.models.EfficientNet.forward
    monkeypatch.setattr(timm.models.EfficientNet, "forward", lambda self, x: calls.append(len(x)) or whole(self, x))
    kept = str(tmp_path / "kept")
    once = trained("once", features_folder=kept)
    assert sum(n for n in calls if n > 1) == 48 + 20
    calls.clear()
    assert trained("again", features_folder=kept) == once
    assert sum(n for n in calls if n > 1) == 0
    monkeypatch.setattr(features, "can_keep", lambda *_: False)
    assert trained("each") == once


@pytest.mark.sampled(2)
@pytest.mark.parametrize("views", ["fixed", "stored"])
def test_a_locked_student_of_a_cached_teacher_is_encoded_once(views, name, tmp_path, monkeypatch):
    values = {"teacher": name(), "data": {"path": "scenes:train", "size": 48}, "out": tmp_path / "cache", "views": 2}
    fill(build(CacheConfig, values, "cache"))

    def trained(out, **train):
        settings = as_dict(config(name(), tmp_path / out, lock_text="all", **train))
        settings |= {"teacher": f"cache:{tmp_path / 'cache'}", "preflight": {"allow_weak_teacher": True}}
        settings["objective"]["weights"] = {"task": 1, "fd": 10, "vrd_kl": 1}
        return load_model(distill(build(RunConfig, settings, "test"), quiet=True).student).module.state_dict()

    once = trained("once", views=views, features_folder=str(tmp_path / "kept"))
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(features, "prepared", None)  # what another run has left is not computed again
        again = trained("again", views=views, features_folder=str(tmp_path / "kept"))
    monkeypatch.setattr(features, "can_keep", lambda *_: False)
    each = trained("each", views=views)
    for key, tensor in once.items():
        assert torch.equal(tensor, again[key]), key
        torch.testing.assert_close(tensor, each[key], atol=1e-4, rtol=1e-3, msg=key)


def test_views_of_a_locked_tower_are_drawn_once_and_a_part_takes_its_rows(name, tmp_path):
    settings = config(name(), tmp_path / "run", views="stored", stored_views=3, features_folder=str(tmp_path / "kept"))
    student, source = load_model(name()), open_pairs(settings.data)
    student.module.visual.trunks.requires_grad_(False)
    whole = features.locked_features(student, source, settings, torch.device("cpu"))
    assert whole.image.shape[:2] == (3, 48)
    assert not torch.equal(whole.image[0], whole.image[1])
    part = features.locked_features(student, Subset(source, indices=[5, 40]), settings, torch.device("cpu"))
    assert torch.equal(part.image, whole.image[:, [5, 40]])
    distill(settings, quiet=True)
    with pytest.raises(InputError, match="a cache stores views"):
        config(name(), tmp_path / "open", views="stored", lock_image=1)


def test_heads_hear_noise_in_training_alone_and_some_pairs_take_the_mean_caption(name, tmp_path):
    from clipdistill.train.setup import build

    pairs = [(numpy.full((32, 32, 3), 20 * i, dtype="uint8"), ["a square", "a red circle"]) for i in range(8)]
    settings = {
        "lock_text": "all",
        "views": "fixed",
        "batch_size": 8,
        "mean_captions": 0.5,
        "feature_noise": 0.5,
        "seed": 1,
    }
    made = build(config(name(), tmp_path / "run", **settings).model_copy(update={"data": data_of(pairs)}), "cpu")
    (batch,) = made.loader(0, 1)
    first, second = made.features.text[:2]
    wanted = {"single": (first, second), "mean": ((first + second) / 2,)}
    found = {
        kind: sum(any(torch.allclose(row, one, atol=1e-5) for one in ones) for row in batch.student_tokens)
        for kind, ones in wanted.items()
    }
    assert found == {"single": 4, "mean": 4}
    head, features_ = made.student.module.visual.head, batch.student_images
    assert not torch.equal(head(features_), head(features_))
    assert torch.equal(head.eval()(features_), head(features_))
    with pytest.raises(InputError, match=r"train.mean_captions: .*lock_text=all"):
        config(name(), tmp_path / "open", mean_captions=0.5)


def test_a_run_is_resumed_and_evaluated_by_name(name, tmp_path, monkeypatch):
    whole = distill(config(name(), tmp_path / "whole", steps=4, checkpoint_every=2), quiet=True)
    run, gradients = tmp_path / "run", Distillation.gradients

    def stopping(task, step, batch):
        if step == 2:
            raise Preempted("asked to stop")
        return gradients(task, step, batch)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Distillation, "gradients", stopping)
        distill(config(name(), run, steps=4, checkpoint_every=2), quiet=True)
    again = distill(config(name(), run, steps=4, checkpoint_every=2), quiet=True)
    assert load_model(again.student).fingerprint() == load_model(whole.student).fingerprint()
    assert main(["eval", str(run), "--data", "scenes:val?size=16", "--device", "cpu"]) == 0


@pytest.mark.slow
def test_towers_are_exported_with_their_tokenizer(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", name(), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()
    exported, model = load_model(f"onnx:{tmp_path / 'onnx'}"), load_model(name(), teacher=True)
    tokens = model.tokenizer(CAPTIONS)
    torch.testing.assert_close(
        exported.module.encode_text(tokens), model.module.encode_text(tokens), atol=1e-4, rtol=1e-3
    )
    with pytest.raises(InputError, match="export it with --to onnx"):
        from clipdistill.export.foreign import export_foreign

        export_foreign(model, tmp_path / "open_clip", "open_clip")


def test_list_towers(capsys):
    assert main(["list", "towers"]) == 0
    assert "distilbert" in capsys.readouterr().out


def test_real_towers_know_the_world():
    folder = shared_folder("towers")
    image = f"timm:tf_efficientnet_lite0@{folder}/tf_efficientnet_lite0.safetensors"
    model = load_model(f"towers:image={image},text=hf:{folder}/minilm_l6", teacher=True)
    text = model.module.text.features(model.tokenizer(["a dog runs", "a puppy is running", "stock markets fell"]))
    close, far = torch.nn.functional.cosine_similarity(text[:1], text[1:]).tolist()
    assert close > 0.5 > 0.3 > far
    assert model.image.mean == (0.5, 0.5, 0.5)


def test_joined_towers_reach_another_process(name):
    model = load_model(name())
    back = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for method, given in (("encode_image", images()), ("encode_text", model.tokenizer(CAPTIONS))):
            same = getattr(back.module.eval(), method)(given), getattr(model.module.eval(), method)(given)
            torch.testing.assert_close(*same, rtol=0, atol=0)
