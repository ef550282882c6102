"""Names of models: wrong ones are refused with the nearest right one, and before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import open_clip.factory
import open_clip.pretrained
import pytest
import timm

from clipdistill.errors import InputError
from clipdistill.models import known
from clipdistill.models.architecture import build_module
from clipdistill.models.clip_model import count_parameters
from clipdistill.models.names import check_model_name, check_student_name, check_teacher_names
from clipdistill.models.students import named_architecture

WRONG = [
    (["eval", "abent", "--data", "scenes:val"], "'abent' is no model"),
    (["eval", "scenes-teacher", "--teacher", "ViT-B-61", "--data", "scenes:val"], "did you mean 'ViT-B-16'"),
    (["eval", "ViT-B-16/laion400m_e23", "--data", "scenes"], "did you mean 'laion400m_e32'"),
    (["eval", "ViT-B-61/openai", "--data", "scenes"], "open_clip has no architecture 'ViT-B-61'"),
    (["eval", "timm:resnet81", "--data", "scenes"], "timm has no architecture 'resnet81' (did you mean"),
    (["eval", "module:Mine", "--data", "scenes"], "the program which began this work"),
    (["export", "ViT-B16", "--to", "onnx", "--out", "absent"], "did you mean 'ViT-B-16'"),
    (["bench", "ViT-B-16", "hf:abc"], "expected  hf:owner/name"),
    (["bench", "ViT-B-61@absent.pt"], "did you mean 'ViT-B-16'"),
    (["bench", "ViT-B-16@absent.pt"], "absent.pt: no such file"),
    (["cache", "--teacher", "onnx:absent", "--data", "scenes", "--out", "absent"], "onnx:absent: no such folder"),
    (["cache", "--teacher", "./absent", "--data", "scenes", "--out", "absent"], "./absent: no such file or folder"),
    (["search", ".", "--model", "scenes-studnt"], "did you mean 'scenes-student'"),
    (["eval", "inherit:widht=3,from=ViT-B-16", "--data", "scenes"], "unknown key 'widht'"),
    (["eval", "inherit:all,from=ViT-B-61", "--data", "scenes"], "did you mean 'ViT-B-16'"),
]
HEAVY = ("torch", "open_clip", "timm", "transformers", "matplotlib", "scipy")
CODE = """
import contextlib, io, json, sys
from clipdistill.cli import main
said = []
for words in json.loads(sys.argv[1]):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    said.append([code, error.getvalue()])
found = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
peak = next((int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")), 0) / 1024
print(json.dumps([said, found, peak]))
"""


def in_a_new_process(commands: list[list[str]], folder: Path) -> tuple[list[tuple[int, str]], list[str], float]:
    """(exit code and error of each command, heavy modules imported, peak memory in MB)."""
    words = [sys.executable, "-c", CODE, json.dumps(commands), json.dumps(HEAVY)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    said, found, memory = json.loads(done.stdout)
    return [(code, text) for code, text in said], found, memory


def test_wrong_names_are_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    said, heavy, memory = in_a_new_process([words for words, _ in WRONG], tmp_path)
    for (words, expected), (code, text) in zip(WRONG, said, strict=True):
        assert code == 2, (words, text)
        assert expected in text, (words, text)
        assert len(text.strip().splitlines()) == 1, text
    assert not heavy
    assert memory < 150


def test_lists_and_doctor_answer_without_anything_heavy(tmp_path: Path) -> None:
    commands = [["list", "students"], ["list", "recipes"], ["list", "datasets"], ["doctor"]]
    said, heavy, memory = in_a_new_process(commands, tmp_path)
    assert [code for code, _ in said] == [0] * 4
    assert not heavy
    assert memory < 150


def test_what_is_read_from_the_files_of_other_packages_is_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    names = open_clip.list_models()
    tags = {name: open_clip.pretrained.list_pretrained_tags_by_model(name) for name in names}
    monkeypatch.delitem(sys.modules, "open_clip.factory")
    monkeypatch.delitem(sys.modules, "open_clip.pretrained")
    assert known.open_clip_architectures() == names
    for name in names:
        assert known.pretrained_tags(name) in (None, tags[name])
    assert known.architecture_values("ViT-B-16") == open_clip.get_model_config("ViT-B-16")
    assert set(timm.list_models()) <= known.timm_networks()


@pytest.mark.parametrize("name", known.students())
def test_stored_figures_are_those_of_the_built_model(name: str) -> None:
    student = known.students()[name]
    module = build_module(named_architecture(name), device="meta")
    counts = count_parameters(module)
    assert student.parameters == {key: counts[key] for key in ("image", "text_transformer", "total")}
    for key, millions in (student.published_millions or {}).items():
        assert round(student.parameters[key] / 1e6, 2) == millions
    assert student.image_size == named_architecture(name)["vision_cfg"]["image_size"]


def test_names_that_are_right(tmp_path: Path) -> None:
    (tmp_path / "x.pt").touch()
    for name in ("ViT-B-16", "ViT-B-16/OPENAI", "ViT-T-16", "scenes-teacher", f"ViT-T-16@{tmp_path / 'x.pt'}",
                 str(tmp_path), "hf:owner/name", "timm:resnet18.a1_in1k", f"local-dir:{tmp_path}",
                 "inherit:ViT-T-16,from=ViT-B-16/laion400m_e32", "ViT-B-16-quickgelu/openai"):  # fmt: skip
        check_model_name(name)
    check_student_name("inherit:all")
    check_teacher_names(["ViT-B-16/openai", f"cache:{tmp_path}"])
    with pytest.raises(InputError, match="no such folder: fill one with  clipdistill cache"):
        check_teacher_names([f"cache:{tmp_path / 'absent'}"])
    with pytest.raises(InputError, match=r"unknown student or architecture 'ViT-T16' \(did you mean 'ViT-T-16'"):
        check_student_name("ViT-T16")
