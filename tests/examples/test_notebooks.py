"""The notebooks of examples/notebooks: without outputs in the repository, run from their first cell to their last."""

from __future__ import annotations

import json
import shutil

import pytest

from clipdistill.errors import InputError
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "examples" / "notebooks"
NAMES = ("first_student", "ablation", "deployment")


def test_there_are_these_and_they_hold_no_outputs() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    for path in FOLDER.glob("*.ipynb"):
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert path.stat().st_size < 20_000
        for cell in stored["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None
        assert stored["metadata"].keys() == {"kernelspec", "language_info"}


def test_the_book_leads_to_each() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs").glob("*.md"))
    for name in NAMES:
        assert f"examples/notebooks/{name}.ipynb" in pages


def test_a_notebook_shows_a_mistake_as_one_sentence() -> None:
    core = pytest.importorskip("IPython.core.ultratb")
    error = InputError("the folder 'x' does not exist")
    assert hasattr(core, "ListTB")
    assert error._render_traceback_() == ["InputError: the folder 'x' does not exist"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebooks_run(tmp_path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    pytest.importorskip("onnxruntime")
    shown = {}
    for name in NAMES:
        shutil.copy(FOLDER / f"{name}.ipynb", tmp_path)
        notebook = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert not [output for output in outputs if output["output_type"] == "error"]
        shown[name] = json.dumps(outputs)
    assert "text/html" in shown["first_student"]
    assert "image/png" in shown["first_student"]
    assert "undecided" in shown["ablation"]
    assert "image.onnx" in shown["deployment"]
