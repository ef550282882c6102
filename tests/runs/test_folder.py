"""The reader of run folders: whatever is in a file, an answer or one sentence."""

import json
import sys

import pytest

from clipdistill.errors import InputError
from clipdistill.runs.folder import RunFolder, read_lines, run_folders, stale_scores


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return RunFolder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\0" * 40, "NUL bytes"),
        (b"[]", "expected a JSON object, found a list"),
        (b'{"status": "fin', "not readable as JSON"),
        (b"\xff\xfe", "not readable as UTF-8"),
        ({"format": 7}, "format 7, this version reads 1"),
        ({"steps": "six"}, "'steps' must be a whole number, found 'six'"),
        ({"steps": True}, "'steps' must be a whole number"),
        ({"name": 3}, "'name' must be a text"),
        ({"seconds": []}, "'seconds' must be a number"),
        ({"parameters": 3}, "'parameters' must be a mapping"),
    ],
)
def test_a_damaged_description_is_said_in_one_sentence(tmp_path, content, message):
    run = write(tmp_path, "run.json", content)
    with pytest.raises(InputError, match=message) as error:
        run.facts()
    assert "run.json" in str(error.value)


def test_a_missing_description_says_what_a_run_folder_is(tmp_path):
    assert RunFolder(tmp_path).status() is None
    with pytest.raises(InputError, match="no such file: a run folder has one"):
        RunFolder(tmp_path).facts()


def test_facts_of_a_run_are_read_as_written(tmp_path):
    run = RunFolder(tmp_path)
    run.write_facts({"status": "stopped", "steps": 3, "seed": None, "own": [1]})
    assert run.facts() == {"format": 1, "status": "stopped", "steps": 3, "seed": None, "own": [1]}
    assert run.status() == "stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_lines_that_are_no_objects_are_counted_and_the_others_read(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path).rows == []
    deep = b"[" * (sys.getrecursionlimit() * 50)
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[3]\n\n' + deep + b'\n{"step": 2}\n{"ste')
    found = read_lines(path)
    assert found.rows == [(1, {"step": 1}), (6, {"step": 2})]
    assert found.damaged == [2, 3, 5]
    assert found.cut
    path.write_bytes(b"\0" * 100 + b"\n")
    assert read_lines(path).damaged == [1]


def test_only_points_with_scores_are_points_of_the_curve(tmp_path):
    run = RunFolder(tmp_path)
    for line in ({"step": 2, "scores": {"t2i_R@1": 0.5}}, {"step": 3}, {"scores": {}}):
        run.append("eval.jsonl", line)
    assert run.curve() == [{"step": 2, "scores": {"t2i_R@1": 0.5}}]


def test_what_is_set_aside_is_kept_under_a_name_of_its_own(tmp_path):
    run = write(tmp_path, "run.json", b"")
    assert run.set_aside("run.json").name == "run.json.damaged-1"
    write(tmp_path, "run.json", b"")
    assert run.set_aside("run.json").name == "run.json.damaged-2"


@pytest.mark.parametrize(
    ("facts", "stale"),
    [
        ({"status": "finished"}, None),  # of an older version
        ({"status": "finished", "student_fingerprint": "aa"}, None),
        ({"status": "finished", "student_fingerprint": "bb"}, "other weights"),
        ({"status": "stopped", "student_fingerprint": None}, "the run is stopped"),
    ],
)
def test_scores_of_another_student_are_told(facts, stale):
    found = stale_scores(facts, "aa")
    assert found is None if stale is None else stale in str(found)


def test_folders_that_stand_for_several_runs(tmp_path):
    write(tmp_path / "stages" / "stage-1-a", "run.json", {})
    write(tmp_path / "stages", "stages.json", {"stages": [{"folder": "stage-1-a"}, {"folder": "../../stage-2-b"}]})
    assert run_folders(tmp_path / "stages") == [tmp_path / "stages" / "stage-1-a"]
    write(tmp_path / "grid", "ablation.json", {"variants": [{"runs": ["a.seed-0", "../b"]}]})
    assert run_folders(tmp_path / "grid") == [tmp_path / "grid" / "a.seed-0", tmp_path / "grid" / "b"]
    assert run_folders(tmp_path) == [tmp_path]
    assert run_folders(tmp_path / "stages" / "stages.json") == []


@pytest.mark.parametrize("name", ["stages.json", "ablation.json"])
@pytest.mark.parametrize("values", [{}, {"stages": 1, "variants": 1}, {"stages": [{}], "variants": [{}]}])
def test_a_list_of_runs_of_another_shape_is_refused(tmp_path, name, values):
    write(tmp_path, name, values)
    with pytest.raises(InputError, match="expected a list of"):
        run_folders(tmp_path)
