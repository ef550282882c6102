"""Joined towers on their way: exported with text encoder and tokenizer, run without the libraries they came from,
pushed to the hub and pulled, and as a teacher of several ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdistill.cli import main
from clipdistill.export.hub import push_to_hub
from clipdistill.models import load_model
from clipdistill.scenes.pairs import open_scenes
from tests.conftest import REPOSITORY
from tests.models.towers.conftest import NETWORK, make_encoder, make_network

CAPTIONS = ["a red circle above a blue square", "a square", "two photo"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('transformers', 'timm', 'open_clip', 'sentencepiece'):
            raise ImportError(f'{name} is not where the export runs')
sys.meta_path.insert(0, Blocked())
from clipdistill.cli import main
"""
FORMS = {
    "onnx": ("onnx", "onnx", []),
    "openvino": ("openvino", "openvino", []),
    "int8": ("onnx", "onnx", ["--int8", "--data", "scenes:val?size=16", "--budget", "100"]),
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names: one pair with a network of timm and a BERT, one with towers out of a CLIP."""
    folder = tmp_path_factory.mktemp("joined")
    image = f"timm:{NETWORK}@{make_network(folder / 'net.safetensors')}"
    settings = "dim=8,hidden=16,size=32"
    return {
        "files": f"towers:image={image},text=hf:{make_encoder(folder / 'bert')},{settings}",
        "clip": f"towers:image=clip:scenes-teacher,text=clip:scenes-teacher,{settings}",
    }


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    source = open_scenes("val", 6, 0)
    for i in range(6):
        source.image(i).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "pair"),
    [(f, p) for f in FORMS for p in ("files", "clip")],
)
def test_an_export_runs_without_the_libraries_of_its_towers(form, pair, towers, photographs, tmp_path):
    to, runtime, options = FORMS[form]
    for package in ("onnxruntime", "onnxscript") if to == "onnx" else ("openvino",):
        pytest.importorskip(package)
    assert main(["export", towers[pair], "--to", to, "--out", str(tmp_path / "out"), *options]) == 0
    exported, model = load_model(f"{runtime}:{tmp_path / 'out'}"), load_model(towers[pair], teacher=True)
    tokens = exported.tokenizer(CAPTIONS)
    assert torch.equal(tokens, model.tokenizer(CAPTIONS))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for found, wanted in (
        (exported.module.encode_text(tokens), model.module.encode_text(tokens)),
        (exported.module.encode_image(pixels), model.module.encode_image(pixels)),
    ):
        cosine = torch.nn.functional.cosine_similarity(found, wanted)
        assert cosine.min() > (0.9 if form == "int8" else 0.99999)
    name = f"{runtime}:{tmp_path / 'out'}"
    scores = str(tmp_path / "scores.json")
    program = BLOCKED + (
        f"assert main(['eval', {name!r}, '--data', 'scenes:val?size=8', '--json', {scores!r}]) == 0\n"
        f"assert main(['search', {str(photographs)!r}, '--index', {str(tmp_path / 'index')!r}, '--model', {name!r},"
        " '--query', 'a red circle', '--json', '--quiet']) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_pushed_to_the_hub_and_pulled_is_the_same_model(towers, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from clipdistill.models import save_model

    model = load_model(towers["files"])
    save_model(model, tmp_path / "mine")
    store = tmp_path / "hub"

    class Fake:
        def create_repo(self, repository: str, **_: Any) -> str:
            (store / repository).mkdir(parents=True)
            return repository

        def upload_folder(self, *, repo_id: str, folder_path: Any, **_: Any) -> None:
            shutil.copytree(folder_path, store / repo_id, dirs_exist_ok=True)

        def upload_file(self, *, path_or_fileobj: Any, path_in_repo: str, repo_id: str, **_: Any) -> None:
            data = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
            (store / repo_id / path_in_repo).write_bytes(data)

    monkeypatch.setattr(hub, "HfApi", Fake)
    monkeypatch.setattr("clipdistill.export.hub.check_push", lambda repository: None)
    push_to_hub(tmp_path / "mine", "me/joined")
    pulled = load_model(f"hf:{store / 'me' / 'joined'}")
    assert pulled.fingerprint() == model.fingerprint()
    tokens = pulled.tokenizer(CAPTIONS)
    assert torch.equal(pulled.module.eval().encode_text(tokens), model.module.eval().encode_text(tokens))


@pytest.mark.slow
def test_joined_towers_teach_two_ranks_as_one_process(towers, tmp_path):
    command = ["-m", "clipdistill", "train", "--recipe", "clip-kd", "--teacher", towers["clip"], "--student",
               "scenes-student", "--data", "scenes:train?size=48", "--quiet", "train.steps=3", "train.batch_size=15",
               "train.epochs=null", "train.precision=fp32", "train.warmup_steps=1",
               "preflight.allow_weak_teacher=true"]  # fmt: skip
    for ranks in (1, 2):
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks == 2 else []
        done = subprocess.run(
            [sys.executable, *several, *command, "--out", str(tmp_path / str(ranks))],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = ((tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("1", "2"))
    for first, second in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert second["total"] == pytest.approx(first["total"], rel=2e-5)
        assert second["terms"] == pytest.approx(first["terms"], rel=2e-4)
