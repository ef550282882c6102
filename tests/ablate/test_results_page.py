"""The generator of docs/results.md."""

import importlib.util
from pathlib import Path

import pytest

from clipdistill.ablate.summary import summarise
from clipdistill.errors import InputError
from tests.ablate.synthetic import plan_of, write_grid

SCRIPT = Path(__file__).parents[2] / "docs" / "results.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("results_page", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_holds_tables_pictures_and_published_claims(script, tmp_path):
    folder = tmp_path / "runs" / "ablation-made-up"
    plan = plan_of({"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}}, seeds=3, title="Made up")
    grid = write_grid(plan, folder, {"clip-kd": 0.3, "clip-rd": 0.4})
    command = "clipdistill ablate s4/benchmarks/plan.yaml --data /data/some/where/set.json --out runs/x train.steps=5"
    summarise(plan, grid, folder, command=command)
    out = tmp_path / "docs" / "results.md"
    script.write_results([folder], out)
    text = out.read_text()
    assert "\n## Made up\n" in text
    assert "clipdistill ablate benchmarks/plan.yaml --data set.json --out runs/x train.steps=5" in text
    assert "(images/ablation-made-up.svg)" in text
    assert (tmp_path / "docs" / "images" / "ablation-made-up.svg").is_file()
    assert "python docs/results.py runs/ablation-made-up" in text
    claims = text.split("## The published claims")[1]
    assert "| **supported** | `clip-rd > clip-kd on * t2i_R@1 [flickr8k]` |" in claims
    assert "clip-kd 24.1, clip-rd 25.1" in claims
    assert str(tmp_path) not in text


def test_a_folder_without_an_ablation_is_refused(script, tmp_path):
    with pytest.raises(InputError, match=r"no ablation\.md there"):
        script.write_results([tmp_path], tmp_path / "results.md")
    assert script.main([str(tmp_path), "--out", str(tmp_path / "results.md")]) == 2


def test_sections_of_other_ablations_are_kept_where_asked(script, tmp_path):
    out, made = tmp_path / "results.md", []
    for title in ("First", "Second"):
        folder = tmp_path / title
        plan = plan_of({"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}}, seeds=3, title=title)
        summarise(
            plan, write_grid(plan, folder, {"clip-kd": 0.3, "clip-rd": 0.4}), folder, command="clipdistill ablate"
        )
        made.append(folder)
    script.write_results(made[:1], out)
    first = out.read_text()
    script.write_results(made[1:], out, keep=True)
    both = out.read_text()
    assert both.count("\n## First\n") == both.count("\n## Second\n") == both.count("## The published claims") == 1
    assert both.count("`clip-rd > clip-kd on * t2i_R@1 [flickr8k]`") == 1
    script.write_results(made[:1], out, keep=True)
    assert out.read_text() == both
    script.write_results(made[1:], out)
    assert "## First" not in out.read_text() != first


def test_a_published_claim_keeps_the_verdict_that_rests_on_more_seeds(script, tmp_path):
    out, made = tmp_path / "results.md", {}
    for seeds in (2, 3, 4):
        folder = tmp_path / f"of-{seeds}"
        plan = plan_of(
            {"clip-kd": {"recipe": "clip-kd"}, "clip-rd": {"recipe": "clip-rd"}}, seeds=seeds, title=f"{seeds}"
        )
        summarise(
            plan, write_grid(plan, folder, {"clip-kd": 0.3, "clip-rd": 0.4}), folder, command="clipdistill ablate"
        )
        made[seeds] = folder

    def judged_by() -> str:
        (line,) = [row for row in out.read_text().splitlines() if "`clip-rd > clip-kd on * t2i_R@1 [flickr8k]`" in row]
        assert out.read_text().split("## The published claims")[1].splitlines()[4].startswith("| verdict |")
        return line

    script.write_results([made[3]], out)
    script.write_results([made[2]], out, keep=True)
    assert ", 3 seeds," in judged_by()
    script.write_results([made[4]], out, keep=True)
    assert ", 4 seeds," in judged_by()
