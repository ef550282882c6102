"""Hostile checkpoints run no code: field.md E2 row 28."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipdistill.data.open import open_labelled
from clipdistill.errors import InputError
from clipdistill.models import build_student, load_model, save_model
from clipdistill.models.save import read_model
from clipdistill.models.tokenizers import build_words_tokenizer
from clipdistill.runtime.files import read_json, write_json
from clipdistill.train.checkpoint import newest_checkpoint
from tests.fuzz.mutate import mangle_json
from tests.security.conftest import Fence


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(pickled: bytes, name: str = "archive/data.pkl") -> bytes:
    """An archive such as torch.save writes, with this pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return buffer.getvalue()


def by_name(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls any function by name, written by hand."""
    return b"c%s\n%s\n(V%s\ntR." % (module.encode(), name.encode(), argument.encode())


WRITERS: dict[str, Callable[[Fence], bytes]] = {
    **{f"pickle {p}": lambda f, p=p: pickle.dumps({"state_dict": {"x": f.payload}}, p) for p in range(6)},
    "torch": lambda f: saved({"state_dict": {"x": torch.zeros(2), "y": f.payload}}),
    "torch, old form": lambda f: saved({"x": f.payload}, _use_new_zipfile_serialization=False),
    "torch, payload as a key": lambda f: saved({("k", f.payload): torch.zeros(1)}),
    "torch, payload in a tensor's attribute": lambda f: saved({"x": _with_attribute(f.payload)}),
    "zip": lambda f: zipped(pickle.dumps(f.payload)),
    "zip, eval by name": lambda f: zipped(by_name("builtins", "eval", f"__import__('os').mkdir({str(f.marker)!r})")),
    "zip, getattr by name": lambda f: zipped(by_name("builtins", "getattr", "x")),
    "eval by name": lambda f: by_name("builtins", "exec", f"open({str(f.marker)!r}, 'w')"),
    "os.mkdir by name": lambda f: by_name("os", "mkdir", str(f.marker)),
    "torch function that reads files": lambda f: by_name("torch", "load", str(f.marker)),
    "numpy objects": lambda f: _numpy(f),
}


def _with_attribute(payload: object) -> torch.Tensor:
    tensor = torch.zeros(2)
    tensor.extra = payload  # type: ignore[attr-defined]
    return tensor


def _numpy(fence: Fence) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([fence.payload], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("writer", WRITERS)
def test_row_28_pickles_in_checkpoint_files_are_not_run(fence: Fence, writer: str) -> None:
    content = WRITERS[writer](fence)
    for suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        path = fence.inside / f"weights{suffix}"
        path.write_bytes(content)
        for name in (str(path), f"ViT-B-32@{path}"):
            with pytest.raises(InputError) as caught:
                load_model(name)
            assert "\n" not in str(caught.value)


def test_row_28_the_payload_would_have_run(fence: Fence) -> None:
    """The tests above mean something: Python's own pickle runs it."""
    pickle.loads(pickle.dumps(fence.payload))
    assert fence.marker.exists()
    fence.marker.unlink()


def test_row_28_torchscript_archives_are_not_run(fence: Fence) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    path = fence.inside / "weights.pt"
    torch.jit.save(torch.jit.script(Module()), str(path))
    with pytest.raises(InputError, match="TorchScript archive, which holds code"):
        load_model(path)


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        ({"open_clip_config.json": {"model_cfg": {"embed_dim": 8}}}, "open_clip_pytorch_model.bin"),
        ({"config.json": {"model_type": "clip", "architectures": ["CLIPModel"]}}, "pytorch_model.bin"),
        (
            {"config.json": {"model_type": "clip", "auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True}},
            "pytorch_model.bin",
        ),
        ({"config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}}, "model.safetensors"),
    ],
)
def test_row_28_folders_of_other_libraries(fence: Fence, files: dict[str, Any], weights: str) -> None:
    folder = fence.inside / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for code in ("evil.py", "modeling_clip.py", "__init__.py"):
        (folder / code).write_text(f"open({str(fence.marker)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    (folder / weights).write_bytes(saved({"x": fence.payload}))
    with pytest.raises(InputError):
        load_model(folder)
    with pytest.raises(InputError):
        load_model(f"hf:{folder}")


def test_row_28_checkpoints_of_a_run(fence: Fence) -> None:
    """What resuming reads is safetensors and JSON; pickles under those names are passed over, not run."""
    folder = fence.inside / "run" / "checkpoints" / "step-00000010"
    (folder / "student").mkdir(parents=True)
    evil = pickle.dumps(fence.payload)
    for name in ("student/model.safetensors", "objective.safetensors", "optimizer.safetensors", "optimizer.pt"):
        (folder / name).write_bytes(evil)
    for state in (
        b"",
        evil,
        b"{}",
        b'{"format": 1, "files": {"../../../../outside/secret.txt": [1, "x"]}}',
        b"[[" * 9999,
    ):
        (folder / "state.json").write_bytes(state)
        found, rejected = newest_checkpoint(folder.parent)
        assert found is None
        assert len(rejected) == 1
    with pytest.raises(InputError):
        load_model(fence.inside / "run")


def test_row_28_numpy_archives_of_objects(fence: Fence) -> None:
    path = fence.inside / "set.npz"
    labels = np.array([fence.payload, fence.payload], dtype=object)
    images, names = np.zeros((2, 4, 4, 3), np.uint8), np.array(["a", "b"])
    np.savez(path, images=images, labels=labels, classnames=names)
    with pytest.raises(InputError, match="cannot be read"):
        open_labelled(path)
    np.savez(path, images=images, labels=np.zeros(2, int), classnames=np.array([fence.payload, "b"], dtype=object))
    with pytest.raises(InputError, match="cannot be read"):
        open_labelled(path)


ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    save_model(build_student(ARCHITECTURE, seed=0, tokenizer=build_words_tokenizer(["a red dog"], 8)), folder)
    return folder


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vision_cfg", {"width": 10**9}),
        ("vision_cfg", {"layers": 10**6}),
        ("vision_cfg", {"timm_model_name": "hf-hub:attacker/evil"}),
        ("vision_cfg", {"timm_model_name": "local-dir:../outside"}),
        ("vision_cfg", {"timm_model_name": "../outside/evil"}),
        ("text_cfg", {"hf_model_name": "attacker/evil"}),
        ("text_cfg", {"hf_model_name": "../outside"}),
        ("text_cfg", {"vocab_size": 10**12}),
        ("text_cfg", {"hf_tokenizer_name": "attacker/evil", "tokenizer_kwargs": {"trust_remote_code": True}}),
    ],
)
def test_hostile_architectures(fence: Fence, good_folder: Path, part: str, changes: dict[str, Any]) -> None:
    values = read_json(good_folder / "model.json")
    values["architecture"][part] |= changes
    folder = fence.inside / "model"
    folder.mkdir()
    write_json(folder / "model.json", values, checked=True)
    (folder / "model.safetensors").write_bytes((good_folder / "model.safetensors").read_bytes())
    if part == "text_cfg" and "hf_tokenizer_name" in changes:
        read_model(folder)  # the name is not used: the tokenizer stands in the file
        return
    with pytest.raises(InputError):
        read_model(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**40))
def test_mangled_descriptions_are_read_or_refused(fence: Fence, good_folder: Path, seed: int) -> None:
    folder = fence.inside / "model"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes((good_folder / "model.safetensors").read_bytes())
    content = json.dumps(read_json(good_folder / "model.json")).encode()  # no checksum hides what is behind it
    (folder / "model.json").write_bytes(mangle_json(content, random.Random(seed)))
    try:
        model = read_model(folder)
    except InputError as error:
        assert str(error)  # noqa: PT017 - either outcome is right
    else:
        assert model.tokenizer(["a dog"]).shape == (1, 8)
