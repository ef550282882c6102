"""Models by name: every form, the nearest name for a wrong one, checkpoints of other writers, hostile files."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip.factory
import open_clip.pretrained
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from clipdistill.errors import InputError
from clipdistill.models import ClipModel, hub, load, load_model, load_student, save_model
from clipdistill.models.architecture import build_module, check_architecture
from tests.models.conftest import tiny_architecture

Make = Callable[..., ClipModel]


def tiny_open_clip(**changes: Any) -> dict[str, Any]:
    """The tiny architecture with CLIP's vocabulary."""
    values = tiny_architecture(**changes)
    values["text_cfg"] = values["text_cfg"] | {"vocab_size": 49_408, "context_length": 12}
    return values


@pytest.fixture
def tiny_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """open_clip with two tiny architectures (one also with QuickGELU), two tags, and an empty hub cache."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-16", tiny_open_clip())
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-16-quickgelu", tiny_open_clip(quick_gelu=True))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Other-16", tiny_open_clip(embed_dim=16))
    tags = {
        "plain": {"hf_hub": "tests/plain/", "resize_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.25,) * 3},
        "quick": {"hf_hub": "tests/quick/weights.pt", "interpolation": "bilinear", "quick_gelu": True},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-16", tags)
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def put_in_cache(cache: Path, repository: str, filename: str) -> Path:
    """The path at which the hub's client finds a downloaded file."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / "abc" / filename


def tiny_module(seed: int = 1, **changes: Any) -> torch.nn.Module:
    return build_module(check_architecture(tiny_open_clip(**changes)), seed=seed).eval().requires_grad_(False)


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[49406, 5, 49407] + [0] * 9, [49406, 8, 9, 49407] + [0] * 8])


def same_embeddings(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    # not to the bit: the products of some libraries round otherwise where weights lie elsewhere in memory
    a.eval(), b.eval()
    with torch.no_grad():
        images = torch.allclose(a.encode_image(IMAGES), b.encode_image(IMAGES), rtol=0, atol=1e-5)
        return images and torch.allclose(a.encode_text(IDS), b.encode_text(IDS), rtol=0, atol=1e-5)


# --- pretrained tags of open_clip -------------------------------------------------------------------------------------


def test_pretrained_tag_brings_weights_activation_and_preprocessing(tiny_known: Path) -> None:
    module = tiny_module(quick_gelu=True)
    torch.save(module.state_dict(), put_in_cache(tiny_known, "tests/quick", "weights.pt"))
    model = load_model("Tiny-16/quick", teacher=True)
    assert same_embeddings(model.module, module)
    assert model.architecture["quick_gelu"] is True
    assert model.image.interpolation == "bilinear"
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())

    plain = tiny_module()
    save_file(plain.state_dict(), put_in_cache(tiny_known, "tests/plain", "open_clip_model.safetensors"))
    model = load_model("Tiny-16/plain")
    assert same_embeddings(model.module, plain)
    assert model.architecture["quick_gelu"] is False
    assert (model.image.mean, model.image.resize_mode, model.image.size) == ((0.5, 0.5, 0.5), "squash", 32)


def test_every_tag_of_open_clip_gets_the_activation_it_was_trained_with() -> None:
    # the rule of read_pretrained, over the whole table: the tag or its architecture says quick_gelu
    for architecture, tags in open_clip.pretrained._PRETRAINED.items():
        config = open_clip.factory._MODEL_CONFIGS[architecture]
        for tag, settings in tags.items():
            if tag == "openai" or architecture.endswith("-quickgelu"):
                assert settings.get("quick_gelu") or config.get("quick_gelu"), (architecture, tag)


def test_weights_that_are_not_here_say_so_before_any_attempt(tiny_known: Path) -> None:
    with pytest.raises(InputError, match=r"the weights of Tiny-16/plain must be fetched .* HF_HUB_OFFLINE forbids"):
        load_model("Tiny-16/plain")


def test_unreachable_hub_is_one_sentence(tiny_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "offline", lambda: False)  # and connecting fails, by the fixture no_network
    with pytest.raises(InputError, match="cannot be reached from here") as caught:
        load_model("Tiny-16/plain")
    assert "\n" not in str(caught.value)


def test_fetching_is_announced(
    tiny_known: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "offline", lambda: False)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    source = tmp_path / "there.safetensors"
    save_file(tiny_module().state_dict(), source)

    def download(repository: str, filename: str) -> str:
        assert "fetching it from the Hugging Face hub (tests/plain)" in caplog.text
        assert (repository, filename) == ("tests/plain", "open_clip_model.safetensors")
        return str(source)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with caplog.at_level(logging.WARNING):
        assert same_embeddings(load_model("Tiny-16/plain").module, tiny_module())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tiny-16/plan", "'Tiny-16' has no pretrained weights 'plan' .did you mean 'plain'"),
        ("Other-16/openai", "open_clip has no pretrained weights for it"),
        ("ViT-B16/openai", "no architecture 'ViT-B16' .did you mean 'ViT-B-16'"),
        ("ViT-T16", "did you mean 'ViT-T-16'"),
        ("no-runs/nothing", "'no-runs/nothing' is no file or folder"),
        ("./nothing", "no such file or folder"),
        ("nothing.pt", "no such file or folder"),
        ("hf:owner", "expected  hf:owner/name"),
        ("hf:owner/name", "HF_HUB_OFFLINE forbids"),
        ("timm:resnet19", "did you mean 'resnet18'"),
        ("timm:resnet18.a1_in1kk", "did you mean 'a1_in1k'"),
        ("timm:resnet18.a1_in1k", "the weights of timm:resnet18.a1_in1k must be fetched"),
        ("timm:hf-hub:a/b", "timm has no architecture"),
        ("onnx:folder", "needs a folder written by  clipdistill export --to onnx"),
        ("ViT-T-16@nothing.pt", "nothing.pt: no such file"),
        ("scenes-student", "takes its vocabulary from"),
        ("ViT-B-16-SigLIP", "the tokenizer of ViT-B-16-SigLIP must be fetched"),
    ],
)
def test_wrong_names_are_one_clear_sentence(tiny_known: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_bare_names_have_random_weights_by_seed(tiny_known: Path) -> None:
    assert load_model("Tiny-16", seed=1).fingerprint() == load_model("Tiny-16", seed=1).fingerprint()
    assert load_model("Tiny-16", seed=1).fingerprint() != load_model("Tiny-16").fingerprint()


def test_timm_tower_with_default_text() -> None:
    model = load_model("timm:test_vit")
    size = timm.get_pretrained_cfg("test_vit").input_size[-1]
    assert model.image.size == size
    assert model.parameter_counts()["text_transformer"] == 21_293_568
    with torch.no_grad():
        assert model.module.encode_image(torch.zeros(1, 3, size, size)).shape == (1, 512)


def test_timm_weights_from_the_cache(tiny_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = timm.create_model("test_resnet")
    settings = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    save_file(trained.state_dict(), put_in_cache(tiny_known, "timm/test_resnet.r160_in1k", "model.safetensors"))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: pytest.fail("timm went to the hub"))
    path = put_in_cache(tiny_known, "timm/test_resnet.r160_in1k", "model.safetensors")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *_, **__: str(path))
    model = load_model("timm:test_resnet.r160_in1k")
    assert torch.equal(model.module.visual.trunk.conv1[0].weight, trained.conv1[0].weight)
    assert model.image.mean == tuple(settings.mean)


# --- checkpoints of other writers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("form", ["bare", "wrapped", "ddp", "tinyclip", "custom text"])
def test_checkpoint_forms_of_open_clip(tiny_known: Path, tmp_path: Path, suffix: str, form: str) -> None:
    module = tiny_module()
    tensors = dict(module.state_dict())
    if form == "ddp":
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    if form == "tinyclip":

        def part(name: str) -> str:
            if name == "logit_scale":
                return f"_logit_scale.module.{name}"
            return f"_image_encoder.module.{name}" if name.startswith("visual.") else f"_text_encoder.module.{name}"

        tensors = {part(name): tensor for name, tensor in tensors.items()}
    if form == "custom text":
        own = ("visual.", "logit_scale")
        tensors = {name if name.startswith(own) else f"text.{name}": tensor for name, tensor in tensors.items()}
    path = tmp_path / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"epoch": 3, "name": "x", "state_dict": tensors} if form != "bare" else tensors, path)
    assert same_embeddings(load_model(f"Tiny-16@{path}").module, module)


def test_half_precision_checkpoints_load_as_fp32(tiny_known: Path, tmp_path: Path) -> None:
    module = tiny_module().half()
    torch.save(module.state_dict(), tmp_path / "half.pt")
    model = load_model(f"Tiny-16@{tmp_path / 'half.pt'}")
    assert model.module.visual.proj.dtype == torch.float32
    assert torch.equal(model.module.visual.proj, module.visual.proj.float())


def test_architecture_is_found_by_shapes_and_never_guessed(tiny_known: Path, tmp_path: Path) -> None:
    module = tiny_module(embed_dim=16)
    torch.save(module.state_dict(), tmp_path / "other.pt")
    model = load_model(tmp_path / "other.pt")
    assert model.name == "Other-16"
    assert same_embeddings(model.module, module)

    torch.save(tiny_module().state_dict(), tmp_path / "ambiguous.pt")
    with pytest.raises(InputError, match=r"Tiny-16, Tiny-16-quickgelu, which differ .* Tiny-16@ambiguous.pt"):
        load_model(tmp_path / "ambiguous.pt")
    assert load_model(f"Tiny-16-quickgelu@{tmp_path / 'ambiguous.pt'}").architecture["quick_gelu"]

    torch.save(tiny_module(embed_dim=17).state_dict(), tmp_path / "unknown.pt")
    with pytest.raises(InputError, match="fit no known architecture"):
        load_model(tmp_path / "unknown.pt")


def test_checkpoint_of_another_architecture_lists_what_differs(tiny_known: Path, tmp_path: Path) -> None:
    torch.save(tiny_module().state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(
        InputError,
        match=r"not those of the architecture 'Other-16': text_projection is \(32, 24\) instead of \(32, 16\)",
    ):
        load_model(f"Other-16@{tmp_path / 'tiny.pt'}")
    with pytest.raises(InputError, match=r"; .*; .*; .* and \d+ more"):
        load_model(f"ViT-T-16@{tmp_path / 'tiny.pt'}")


class Evil:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_malicious_checkpoints_are_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    proof, path = tmp_path / "executed", tmp_path / "evil.pt"
    content = {"state_dict": {"logit_scale": torch.ones(())}, "extra": Evil(proof)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(InputError, match=r"evil\.pt: (refused, because|not readable)"):
        load_model(f"ViT-T-16@{path}")
    assert not proof.exists()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(InputError, match="TorchScript archive, which holds code"):
        load_model(f"ViT-T-16@{tmp_path / 'script.pt'}")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"a: 1\n", b"PK\x03\x04broken", b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"file\.pt: (not readable|holds no tensors)") as raised:
        load_model(tmp_path / "file.pt")
    assert "weights_only" not in str(raised.value)  # torch's advice would have the file's code run


# --- folders ----------------------------------------------------------------------------------------------------------


def test_runs_checkpoints_and_files_in_model_folders(
    make_tiny: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    early, late, final = (make_tiny(seed=seed) for seed in (1, 2, 3))
    run = tmp_path / "runs" / "x"
    save_model(early, run / "checkpoints" / "step-00000100" / "student")
    save_model(late, run / "checkpoints" / "step-00000200" / "student")
    (run / "checkpoints" / "step-00000300").mkdir()  # being written when the power failed
    assert load_model(run).fingerprint() == late.fingerprint()
    assert "has not finished: reading its newest checkpoint, step-00000200" in caplog.text
    assert load_model(run / "checkpoints" / "step-00000100").fingerprint() == early.fingerprint()
    save_model(final, run / "student")
    for name in (run, run / "student", run / "student" / "model.safetensors", str(run)):
        assert load_model(name).fingerprint() == final.fingerprint()


@pytest.mark.parametrize("finished", [False, True])
def test_a_checkpoint_that_gives_way_while_it_is_read_is_followed(
    make_tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    old, new = make_tiny(seed=1), make_tiny(seed=2)
    steps = tmp_path / "checkpoints"
    save_model(old, steps / "step-00000100" / "student")
    save_model(new, steps / ".writing-x" / ("" if finished else "student"))
    read = load.read_model

    def meanwhile(folder: Path) -> ClipModel:
        if (steps / ".writing-x").exists():  # the run goes on between the look at the folder and the reading
            (steps / ".writing-x").rename(tmp_path / "student" if finished else steps / "step-00000200")
            (steps / "step-00000100").rename(steps / ".writing-removed")
        return read(folder)

    monkeypatch.setattr(load, "read_model", meanwhile)
    assert load_model(tmp_path).fingerprint() == new.fingerprint()
    (steps / "step-00000300" / "student").mkdir(parents=True)
    (steps / "step-00000300" / "student" / "model.json").write_text("{")
    if not finished:
        with pytest.raises(InputError, match="step-00000300"):
            load_model(tmp_path)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no model"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="neither a finished student nor a checkpoint"):
        load_model(tmp_path)


def test_open_clip_folder(tmp_path: Path) -> None:
    module = tiny_module(quick_gelu=True)
    config = {
        "model_cfg": tiny_open_clip(quick_gelu=True),
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "size": [32, 32], "mode": "RGB", "fill_color": 0},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"neither open_clip_model\.safetensors"):
        load_model(tmp_path)
    save_file(module.state_dict(), tmp_path / "open_clip_model.safetensors")
    model = load_model(tmp_path)
    assert same_embeddings(model.module, module)
    assert model.image.mean == (0.1, 0.2, 0.3)


def test_hub_repositories_in_the_cache(tiny_known: Path, make_tiny: Make, tmp_path: Path) -> None:
    model = make_tiny()
    save_model(model, tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        shutil.copy(file, put_in_cache(tiny_known, "owner/ours", file.name))
    assert load_model("hf:owner/ours").fingerprint() == model.fingerprint()


def test_load_student_gives_a_ready_model(make_tiny: Make, tmp_path: Path) -> None:
    save_model(make_tiny(), tmp_path / "model")
    module, preprocess, tokenizer = load_student(tmp_path / "model")
    picture = Image.new("L", (50, 40), 128)
    with torch.no_grad():
        assert module.encode_image(preprocess(picture)[None]).shape == (1, 24)
        assert module.encode_text(tokenizer(["a red dog"])).shape == (1, 24)
    assert not module.training


# --- resolution -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vision",
    [
        None,
        {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
        {"image_size": 160, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"},
    ],
    ids=["vit", "resnet", "timm vit", "timm resnet"],
)
def test_other_resolutions_keep_the_weights(make_tiny: Make, tmp_path: Path, vision: dict[str, Any] | None) -> None:
    model = make_tiny(**({} if vision is None else {"vision_cfg": vision}))
    save_model(model, tmp_path / "model")
    size = 96
    resized = load_model(tmp_path / "model", image_size=size)
    assert resized.image.size == size
    resized.module.eval()
    with torch.no_grad():
        assert resized.module.encode_image(torch.rand(1, 3, size, size)).shape == (1, 24)
    kept = {name: tensor for name, tensor in model.module.state_dict().items() if "pos" not in name}
    assert kept
    assert all(torch.equal(resized.module.state_dict()[name], tensor) for name, tensor in kept.items())
    save_model(resized, tmp_path / "resized")
    assert load_model(tmp_path / "resized").fingerprint() == resized.fingerprint()


def test_interpolation_equals_open_clip(make_tiny: Make, tmp_path: Path) -> None:
    model = make_tiny()
    save_model(model, tmp_path / "model")
    resized = load_model(tmp_path / "model", image_size=48)
    expected = dict(model.module.state_dict())
    open_clip.model.resize_pos_embed(expected, resized.module)
    assert torch.equal(resized.module.visual.positional_embedding, expected["visual.positional_embedding"])
    with pytest.raises(InputError, match="not a whole number of its 8-pixel patches"):
        load_model(tmp_path / "model", image_size=50)
