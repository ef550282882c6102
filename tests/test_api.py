"""From Python: everything public has a real signature and a complete docstring; results show numbers and intervals."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import clipdistill as cd
from clipdistill.errors import InputError
from clipdistill.scenes.pairs import open_scenes
from tests.conftest import REPOSITORY

FUNCTIONS = [n for n in cd.__all__ if n != "__version__" and not inspect.isclass(getattr(cd, n))]


def documented(name: str) -> Any:
    value = getattr(cd, name)
    return value.function if inspect.ismodule(value) else value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_a_real_signature_and_says_what_it_takes_returns_and_raises(name: str) -> None:
    signature, text = inspect.signature(getattr(cd, name)), inspect.getdoc(documented(name)) or ""
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    missing = [parameter for parameter in signature.parameters if not re.search(rf"\b{parameter}\b", text)]
    assert missing == [], "not in the docstring"
    assert re.search(r"[Rr]aises:?\s+InputError", text)
    assert signature.return_annotation == "None" or re.search(r"[Rr]eturns", text)


def test_every_class_is_documented() -> None:
    for name in set(cd.__all__) - set(FUNCTIONS) - {"__version__"}:
        assert inspect.getdoc(getattr(cd, name)), name


def test_importing_the_package_and_naming_packages_loads_no_torch() -> None:
    code = "import sys, clipdistill as cd; cd.cache, cd.search, cd.evaluate; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_a_package_is_called_also_after_a_module_inside_it_was_imported() -> None:
    importlib.import_module("clipdistill.search.find")
    assert callable(cd.search)
    with pytest.raises(InputError, match="no such folder"):
        cd.search("absent-folder", "a red square", model="scenes-student")


@pytest.fixture(scope="module")
def scores() -> cd.Scores:
    given = {"teacher": "scenes-teacher", "device": "cpu", "progress": False}
    return cd.evaluate("scenes-teacher", "scenes:val?size=24", **given)


def test_scores_show_values_with_intervals(scores: cd.Scores) -> None:
    assert re.search(r"t2i_R@1 +\d+\.\d \[\d+\.\d, \d+\.\d\]", repr(scores))
    assert "<table>" in scores._repr_html_()
    assert "t2i_R@1" in scores._repr_html_()


def test_scores_become_a_frame_where_pandas_is_installed(scores: cd.Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    rows = scores.to_frame()
    first = next(row for row in rows if row["metric"] == "t2i_R@1")
    assert first["model"] == "student"
    assert first["low"] <= first["value"] <= first["high"]
    assert len(rows) == len(scores)


def test_without_pandas_one_sentence_says_so(scores: cd.Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        scores.to_frame()


def test_compare_shows_differences_with_intervals(scores: cd.Scores, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        scores.save(tmp_path / name / "scores.json")
    found = cd.compare(tmp_path / "a" / "scores.json", tmp_path / "b" / "scores.json")
    assert {row.outcome for row in found.differences} == {"undecided"}
    assert "a - b in points (95 % interval)" in repr(found)
    assert "<table>" in found._repr_html_()


def test_embed_gives_rows_of_unit_length() -> None:
    found = cd.embed("scenes-teacher", "scenes:val?size=6", device="cpu", progress=False)
    assert len(found.image) == 6
    assert found.image.norm(dim=1).allclose(found.image.new_ones(6), atol=1e-5)
    with pytest.raises(InputError, match="labelled"):
        cd.embed("scenes-teacher", "scenes:zeroshot", progress=False)


def test_cache_fills_a_store_and_says_how_much(tmp_path: Path) -> None:
    given = {"device": "cpu", "workers": 0, "quiet": True}
    filled = cd.cache("scenes-teacher", {"path": "scenes", "size": 12}, tmp_path / "store", batch_size=6, **given)
    assert filled.samples == 12
    assert "12 images embedded" in repr(filled)
    with pytest.raises(InputError, match="did you mean 'block'"):
        cd.cache("scenes-teacher", "scenes", tmp_path / "other", blok=3)


def test_bench_shows_speed_with_intervals() -> None:
    found = cd.bench("scenes-teacher", seconds=0.02, rounds=3, batch_sizes=(1,), towers=("image",), device="cpu")
    assert re.search(r"image +[\d,]+\.\d \([\d,]+\.\d to [\d,]+\.\d\)", repr(found))
    assert found["models"]["scenes-teacher"]["parameters"]["total"] > 0


def test_search_finds_photographs_by_words_and_by_picture(tmp_path: Path) -> None:
    source = open_scenes("val", 4, 0)
    for i in range(4):
        source.image(i).save(tmp_path / f"{i}.png")
    found = cd.search(tmp_path, source.captions(0)[0], model="scenes-teacher", top=2, device="cpu")
    assert len(found.answers[0].hits) == 2
    assert "student score" in repr(found)
    same = cd.search(tmp_path, tmp_path / "1.png", model="scenes-teacher", top=1, device="cpu")
    assert Path(same.answers[0].hits[0].path).name == "1.png"


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra export")
def test_export_writes_a_folder_and_shows_what_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = cd.export("scenes-teacher", "onnx", tmp_path / "onnx", data="scenes:val?size=8", quiet=True)
    assert (made.folder / "image.onnx").is_file()
    assert "before" in repr(made)
    assert "written" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra export")
def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = code.replace('"steps": 200', '"steps": 2, "batch_size": 16, "precision": "fp32", "warmup_steps": 1')
    code = code.replace('"data": "scenes"', '"data": {"path": "scenes", "size": 64}, "device": "cpu"')
    code = code.replace("scenes:val", "scenes:val?size=16").replace(
        '"scenes-teacher"])', '"scenes-teacher"], seconds=0.05)'
    )
    names: dict[str, Any] = {}
    exec(compile(code, "python.md", "exec"), names)
    assert "[" in repr(names["run"])
    assert len(names["embeddings"].image) == 16
