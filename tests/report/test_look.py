"""Gallery and geometry computed for the report, and the commands it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from clipdistill.cli import main
from clipdistill.config import as_dict
from clipdistill.data.pairs import DataConfig
from clipdistill.errors import InputError
from clipdistill.models import build_student, load_model, save_model
from clipdistill.report.data import read_run
from clipdistill.report.look import look
from clipdistill.report.report import write_report
from clipdistill.report.reproduce import eval_commands, train_command
from clipdistill.runtime.files import read_json
from tests.report.synthetic import write_run


def with_student(folder: Path, method: str, seed: int, **facts: object) -> Path:
    """A run folder that really holds a (random) student, and the recipe that says what it was validated on."""
    run = write_run(folder, method, **facts)  # type: ignore[arg-type]
    teacher = load_model("scenes-teacher")
    save_model(build_student("scenes-student", seed=seed, tokenizer=teacher.tokenizer), run / "student")
    recipe = {
        "validation": as_dict(DataConfig(path="scenes:val", size=40)),
        "evaluation": {"protocol": "standard", "zero_shot": ["scenes:zeroshot"], "teacher": "scenes-teacher"},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("look")
    return [with_student(folder / "kd", "clip-kd", 0), with_student(folder / "rd", "clip-rd", 1)]


def test_look_fills_gallery_and_geometry(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    command = ["report", *map(str, runs), "--out", str(out), "--look", "--images", "24", "--claims", "published"]
    assert main([*command, "--quiet"]) == 0
    shape = read_json(runs[1] / "geometry.json")
    assert set(shape) == {"data", "student", "teacher", "alignment"}
    assert shape["data"] == "scenes/val[24 of 40]"
    # the trained teacher tells matched from unmatched pairs, a random student does not
    assert shape["teacher"]["gap"] > 0.2 > shape["student"]["gap"]
    gallery = json.loads((runs[0] / "gallery.json").read_text())
    assert set(gallery["queries"][0]["models"]) == {"teacher", "kd", "rd"}
    page = re.sub(r'<span class="nb">([^<]*)</span>', r"\1", out.read_text())
    for anchor in ("gallery", "geometry", "claims"):
        assert f'<section id="{anchor}"' in page
    assert "clip-rd &gt; clip-kd on scenes t2i_R@1" in page
    assert "claims (published) are about methods or data that these runs do not have" in page
    assert "--claims published --out report.html" in page


def test_runs_without_a_validation_set_need_data(runs: list[Path], tmp_path: Path) -> None:
    run = with_student(tmp_path / "x", "clip-rd", 0)
    (run / "recipe.yaml").unlink()
    with pytest.raises(InputError, match="without a validation set"):
        look([run], progress=False)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "teacher": "no/such/teacher"}))
    [note] = look([run], data="scenes:val?size=20", progress=False)
    assert "the teacher is missing" in note
    assert set(read_json(run / "geometry.json")) == {"data", "student"}
    with pytest.raises(InputError, match="at least 16 pictures"):
        look([run], images=3)
    assert main(["report", str(run), "--data", "scenes"]) == 2


def test_one_picture_is_a_note_and_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = with_student(tmp_path / "x", "clip-rd", 0)
    more = ["--look", "--data", "scenes:val?size=1", "--out", str(tmp_path / "r.html")]
    assert main(["report", str(run), *more]) == 0
    assert "has one picture, which tells nothing of retrieval and geometry" in capsys.readouterr().out
    assert (tmp_path / "r.html").is_file()
    assert not (run / "gallery.json").exists()


def test_each_number_has_its_command(runs: list[Path], tmp_path: Path) -> None:
    run = read_run(runs[1])
    assert eval_commands(run) == [
        f"clipdistill eval {run.folder} --data 'scenes:val?size=40' --protocol standard --teacher scenes-teacher",
        f"clipdistill eval {run.folder} --data scenes:zeroshot --teacher scenes-teacher",
    ]
    summary = write_report(runs, tmp_path / "r.html")
    assert "clipdistill eval" in summary.html.read_text()
    assert "--data 'scenes:val?size=40'" in summary.markdown.read_text()
    facts = json.loads((run.folder / "run.json").read_text())
    silent = with_student(tmp_path / "silent", "clip-rd", 0, command=None)
    assert facts["command"]
    assert train_command(read_run(silent)) == (f"clipdistill train --recipe {silent}/recipe.yaml --out {silent}-again")
    recipe = yaml.safe_load((silent / "recipe.yaml").read_text())
    for validation, wanted in (
        (DataConfig(path="captions.json"), ["--data captions.json --split val"]),
        (DataConfig(path="captions.json", split="test"), ["--data captions.json --split test"]),
        (DataConfig(path="table.csv", image_column="photo"), []),
        (None, []),
    ):
        recipe["validation"] = None if validation is None else as_dict(validation)
        (silent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        found = eval_commands(read_run(silent))
        assert [c for c in found if "zeroshot" not in c] == [
            f"clipdistill eval {silent} {w} --protocol standard --teacher scenes-teacher" for w in wanted
        ]
