"""From Python: everything public has a real signature and a complete docstring; results show numbers and intervals."""

from __future__ import annotations

import importlib.util
import inspect
import json
import pickle
import re
import subprocess
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipdistill as cd
from clipdistill.commands import COMMANDS, command_parser
from clipdistill.errors import InputError
from clipdistill.scenes.pairs import open_scenes
from clipdistill.statistics.bootstrap import bootstrap
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


def test_a_device_that_is_none_is_a_sentence() -> None:
    for device in ("", "gpu", "cuda:99"):
        with pytest.raises(InputError, match=f"device '{device}'"):
            cd.load_model("scenes-teacher", device=device)


SETTINGS = (
    "size", "data", "split", "image_root", "validation", "validation_split", "zero_shot", "protocol", "device"
)  # fmt: skip
OWN = ("recipe", "teacher", "student", "student_weights", "out", "name", "tensorboard", "wandb", "mlflow", "settings")
TOLD: dict[str, tuple[dict[str, str], set[str]]] = {
    "demo": (dict.fromkeys(("seed", "recipes", "settings"), "config"), set()),
    "train": (dict.fromkeys((*SETTINGS, *OWN, "dry_run"), "config") | {"callback": "callbacks"}, {"gpus"}),
    "ablate": (
        dict.fromkeys(SETTINGS, "settings")
        | {"weight": "weights", "student": "students", "teacher": "teachers", "shard": "shard_of", "size": "size",
           "batch_size": "batch_sizes", "recipe": "plan"},
        {"list"},
    ),
    "replay": ({"run": "folder"}, set()),
    "regions": ({"models": "teacher", "image_root": "data", "zero_shot": "data"}, {"action"}),
    "cache": ({"image_root": "data", "allow_versions": "settings"}, {"words"}),
    "embed": ({}, set()),
    "eval": ({"models": "model", "k": "ks", "no_intervals": "intervals", "geometry": "embeddings"}, set()),
    "fetch": ({"names": "name", "split": "splits", "to": "root"}, set()),
    "probe": ({"models": "model"}, set()),
    "export": ({}, set()),
    "compare": ({"runs": "a", "against": "b", "metric": "metrics"}, set()),
    "claims": ({}, {"all"}),
    "bench": ({"backend": "backends", "batch": "batch_sizes", "json": "out"}, set()),
    "report": ({}, set()),
    "search": ({"image": "query", "vectors": "path"}, {"page"}),
    "serve": ({"allow_host": "allow_hosts"}, set()),
    "scenes": ({}, set()),
    "list": ({}, {"what"}),
    "completion": ({}, set()),
    "doctor": ({}, set()),
}  # fmt: skip
"""Command -> options that have another name in its functions, and what only says which function, or is the shell's."""


@pytest.fixture(scope="module")
def reference() -> Any:
    """The script of docs/python.md: what does in Python what a command does, and what it gives back."""
    spec = importlib.util.spec_from_file_location("reference_of_functions", REPOSITORY / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_table_of_functions_names_what_there_is_for_every_command(reference: Any) -> None:
    assert reference.FUNCTIONS.keys() == COMMANDS.keys() == TOLD.keys()
    for name in {name for names in reference.FUNCTIONS.values() for name in names}:
        assert callable(named(name))


def named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module or "clipdistill"), attribute)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_can_be_told_its_functions_can_be_told(command: str, reference: Any) -> None:
    renamed, of_the_terminal = TOLD[command]
    parameters = {
        name for function in reference.FUNCTIONS[command] for name in inspect.signature(named(function)).parameters
    }
    actions = {action.dest for action in command_parser(command)[1]._actions}
    options = actions - {"help", "plugin", "local_cache", "local_cache_size", "quiet", "json", "markdown"}
    assert {name for name in options - of_the_terminal if renamed.get(name, name) not in parameters} == set()
    assert renamed.keys() | of_the_terminal <= options | {"json"}
    if "quiet" in actions:
        assert parameters & {"quiet", "progress"}


def test_what_functions_return_is_described_and_shows_itself(reference: Any) -> None:
    results = {name.rpartition(".")[2]: named(name) for name in reference.RESULTS}
    returned = {str(inspect.signature(documented(name)).return_annotation) for name in FUNCTIONS}
    plain = {"None", "ClipModel", "Term", "Callable[..., Any]"}  # a model, and what was registered
    for name in {told for told in returned if not told.startswith("tuple[")} - plain:
        shown = getattr(cd, name, None) or results[name]
        assert shown.__repr__ not in (object.__repr__, dict.__repr__, list.__repr__), name
        assert hasattr(shown, "_repr_html_"), name


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


def test_retrieval_is_a_dict_that_shows_itself_with_intervals_where_it_can() -> None:
    draws = np.random.default_rng(0)
    image = draws.normal(size=(40, 8))
    owner = np.arange(80) // 2
    text = image[owner] + 0.8 * draws.normal(size=(80, 8))
    plain, whole = cd.retrieval(image, text, owner), cd.retrieval(image, text, owner, per_query=True)
    assert plain == {name: value for name, value in whole.items() if name != "per_query"}
    assert json.loads(json.dumps(plain)) == dict(plain)
    assert re.search(rf"R@1 +{100 * plain['i2t_R@1']:.1f} +{100 * plain['t2i_R@1']:.1f}\n", repr(plain))
    assert "per_query=True" in repr(plain)
    found = re.search(r"R@1 +(\S+) \[(\S+), (\S+)\] +(\S+) \[(\S+), (\S+)\]\n", repr(whole))
    assert found is not None
    for first, direction, clusters in ((1, "i2t", None), (4, "t2i", owner)):
        value, low, high = (float(found[first + k]) for k in range(3))
        interval = bootstrap(whole["per_query"][f"{direction}_R@1"], clusters)
        assert (value, low, high) == tuple(round(100 * x, 1) for x in (interval.value, interval.low, interval.high))
    assert re.search(r"median_rank +\d+\.\d \[", repr(whole))
    assert whole._repr_html_().count("<table>") == 1
    assert pickle.loads(pickle.dumps(whole))._repr_html_() == whole._repr_html_()


RUN = {"recipe": "clip-kd", "size": "debug", "device": "cpu", "train": {"steps": 2, "workers": 0}}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    plan = {"variants": {"clip": {"recipe": "clip"}, "kd": {"recipe": "clip-kd"}}, "size": "debug", "seeds": 2,
            "claims": ["kd > clip on scenes t2i_R@1"]}  # fmt: skip
    settings = {"device": "cpu", "train": {"steps": 2, "workers": 0}}
    return cd.ablate(plan, tmp_path_factory.mktemp("ablation") / "grid", settings=settings, quiet=True)


def test_ablate_trains_and_shows_differences_with_intervals(ablation: Any) -> None:
    assert "4 runs trained, 0 were finished" in repr(ablation)
    assert re.search(r"kd .*\[[-−+\d.]+ to [-−+\d.]+\]", repr(ablation))
    assert ablation._repr_html_().count("<table>") == 2
    assert (ablation.folder / "ablation.md").is_file()


def test_ablate_of_recipes_makes_the_variants_of_its_switches(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="drop nothing: fits none of the recipes"):
        cd.ablate(["clip-kd"], tmp_path / "grid", drop=["nothing"], size="debug")
    with pytest.raises(InputError, match="--drop makes variants of recipes"):
        cd.ablate({"variants": {"a": {"recipe": "clip"}}}, tmp_path / "grid", drop=["fd"])
    with pytest.raises(InputError, match="name one file of variants, or recipes"):
        cd.ablate([], tmp_path / "grid")


def test_claims_are_judged_and_shown_with_their_evidence(ablation: Any) -> None:
    found = cd.claims(["kd > clip on scenes t2i_R@1"], ablation.folder)
    assert found[0].seeds == 2
    assert found[0].outcome in ("supported", "contradicted", "undecided")
    assert re.search(r"points \([-+\d.]+ to [-+\d.]+\), 2 seeds", repr(found))
    assert "<table>" in found._repr_html_()
    with pytest.raises(InputError, match="confidence level"):
        cd.claims("published", ablation.folder, level=2)


def test_report_writes_a_page_and_says_what_it_says(ablation: Any, tmp_path: Path) -> None:
    made = cd.report(ablation.folder, tmp_path / "page.html")
    assert made.html.stat().st_size == made.size > 10_000
    assert str(tmp_path / "page.html") in repr(made)
    assert made.headline.splitlines()[0] in repr(made)
    with pytest.raises(InputError, match="give --look as well"):
        cd.report(ablation.folder, tmp_path / "page.html", data="scenes:val")
    with pytest.raises(InputError, match="no-such-run"):
        cd.report(tmp_path / "no-such-run", tmp_path / "page.html")


def test_a_dry_run_tells_speed_and_memory_and_leaves_nothing() -> None:
    found = cd.dry_run(RUN, quiet=True)
    assert found.pairs_per_second > 0
    assert found.peak_bytes > 1e8
    assert found.total_seconds == pytest.approx(2 * found.step_seconds)
    assert "pairs/s" in repr(found)


def test_a_recipe_in_stages_is_distilled_stage_by_stage(tmp_path: Path) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text("from: clip-kd\nstages:\n  one: {}\n  two: {teacher: previous}\n")
    weak = {"preflight": {"allow_weak_teacher": True}}
    run = cd.distill({**RUN, **weak, "recipe": str(recipe), "out": tmp_path / "run"}, quiet=True)
    assert (run.folder.name, run.status) == ("stage-2-two", "finished")
    assert (tmp_path / "run" / "student").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()


def test_explain_needs_no_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert cd.distill(RUN, explain=True, quiet=True).status == "explained"


def test_probe_shows_scores_with_intervals() -> None:
    given = {"device": "cpu", "progress": False, "shots": [1, 2], "seeds": 2}
    found = cd.probe(
        "scenes-teacher", "scenes:zeroshot/shapes?size=48", "scenes:zeroshot/shapes?size=24&seed=1", **given
    )
    assert [result.shots for result in found] == [1, 2]
    assert re.search(r"2 +\d+\.\d +\d+\.\d to \d+\.\d +2 draws", repr(found))
    assert "<table>" in found._repr_html_()


def test_serve_answers_until_it_is_stopped() -> None:
    for package in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
        pytest.importorskip(package)
    with cd.serve("scenes-teacher", batch_size=2, device="cpu") as service:
        assert service.url in repr(service)
        with urllib.request.urlopen(f"{service.url}health", timeout=10) as answer:
            assert answer.status == 200
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{service.url}health", timeout=10)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs the extra export")
@pytest.mark.slow
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


@pytest.mark.parametrize("package", ["clipdistill", "clipdistill.models", "clipdistill.objective"])
def test_names_are_completed_before_they_are_imported(package: str) -> None:
    asked = f"import {package} as p, sys; print(set(dir(p)) == set(p.__all__), 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["True", "False"]


def test_every_name_of_a_package_is_completed() -> None:
    import clipdistill.remote

    assert {"RemotePath", "RemoteError", "remote_path"} <= set(dir(clipdistill.remote))
