"""examples/own_callback.py in a folder of its own: from the shell, from Python, with mistakes."""

import csv
import json
import shutil

import pytest

import clipdistill
from clipdistill import cli, registry
from clipdistill.errors import InputError
from clipdistill.registry import CALLBACKS, load_plugin
from tests.conftest import REPOSITORY

SETTINGS = {"recipe": "clip", "size": "debug", "train": {"steps": 4, "evaluate_every": 2, "checkpoint_every": 2}}


@pytest.fixture
def plugin(tmp_path):
    return shutil.copy(REPOSITORY / "examples" / "own_callback.py", tmp_path)


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing a test registers is known to the next one."""
    yield
    for name in set(CALLBACKS._values) - set(CALLBACKS._builtin):
        CALLBACKS._values.pop(name)
        CALLBACKS._origins.pop(name)


def run_folder(tmp_path, name="run"):
    return {**SETTINGS, "out": str(tmp_path / name)}


def test_by_name_from_the_shell(plugin, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--plugin", str(plugin), "--callback", "csv", "--recipe", "clip", "--size", "debug"]
    command += ["--out", str(out), "--quiet", "train.steps=4", "train.evaluate_every=2"]
    assert cli.main(command) == 0
    rows = list(csv.reader((out / "losses.csv").open()))
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    totals = [float(value) for _, name, value in rows if name == "total"]
    assert totals == [line["total"] for line in logged]  # a line for each step: the mean is the value
    assert "finished after 4 steps" in capsys.readouterr().out
    # the run remembers its plug-in: going on and evaluating load it again
    assert str(plugin) in (out / "recipe.yaml").read_text()
    registry._loaded.clear()
    CALLBACKS._values.pop("csv")
    assert cli.main(["eval", str(out), "--data", "scenes:val?size=8", "--quiet", "--device", "cpu"]) == 0
    assert "csv" in CALLBACKS


class Noted:
    """Any object with some of the methods; it need not know the package."""

    def __init__(self):
        self.seen = []

    def on_start(self, run):
        self.seen.append(("start", run.step, run.total_steps))

    def on_evaluation(self, run):
        self.seen.append(("evaluation", run.step, run.scores["t2i_R@1"] >= 0))

    def on_checkpoint(self, run):
        assert (run.checkpoint / "state.json").exists()
        self.seen.append(("checkpoint", run.step))

    def on_end(self, run):
        assert any(name.endswith("t2i_R@1") for name in run.final_scores)
        with pytest.raises(AttributeError):
            run.step = 7
        with pytest.raises(TypeError):
            run.losses["total"] = 0
        self.seen.append((run.status, run.step))


def test_an_object_from_python_gets_every_event(tmp_path):
    noted = Noted()
    clipdistill.distill(run_folder(tmp_path), callbacks=[noted], quiet=True)
    assert noted.seen == [
        ("start", 0, 4),
        ("evaluation", 2, True),
        ("checkpoint", 2),
        ("evaluation", 4, True),
        ("checkpoint", 4),
        ("finished", 4),
    ]


class Failing:
    def __init__(self, event):
        setattr(self, event, self.fail)

    def fail(self, run):
        raise KeyError("no such thing")


@pytest.mark.parametrize("event", ["on_step", "on_evaluation", "on_checkpoint", "on_end"])
@pytest.mark.sampled(2)
def test_one_that_raises_is_named_and_the_run_goes_on(tmp_path, capsys, event):
    run = clipdistill.distill(run_folder(tmp_path), callbacks=[Failing(event)])
    assert run.status == "finished"
    said = capsys.readouterr().err
    assert said.count("callback 'Failing' failed in") == 1
    assert "KeyError: 'no such thing' (test_own_callback.py, line" in said
    [recorded] = json.loads((run.folder / "run.json").read_text())["callbacks_failed"]
    assert f"failed in {event} at step" in recorded


def test_one_that_cannot_start_stops_the_run_before_its_first_step(tmp_path):
    with pytest.raises(InputError, match="callback 'Failing' failed in on_start"):
        clipdistill.distill(run_folder(tmp_path), callbacks=[Failing("on_start")], quiet=True)
    assert not (tmp_path / "run" / "log.jsonl").exists()


class Odd:
    def on_steps(self, run):
        """Never called: there is no such event."""


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Noted, r"is no callback: give an object with methods on_start, .* such as Noted\(\)"),
        (3, "3 is no callback"),
        ("csvv", "unknown callback 'csvv'"),
        (Odd(), r"there is no event 'on_steps' \(did you mean 'on_step'"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_run(tmp_path, callback, message):
    with pytest.raises(InputError, match=message):
        clipdistill.distill(run_folder(tmp_path), callbacks=[callback], quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_plug_in_of_a_run_is_loaded_again_when_it_goes_on(plugin, tmp_path):
    from clipdistill.runs.folder import RunFolder

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps({"plugins": [str(plugin)]}))
    assert RunFolder(tmp_path / "run").load_plugins() == [str(plugin)]
    load_plugin(plugin)
    for bad in ("own_callback.py", str(tmp_path / "run" / "evil.py"), 3):
        (tmp_path / "run" / "recipe.yaml").write_text(json.dumps({"plugins": [bad]}))
        with pytest.raises(InputError, match="is not a whole path outside the run's folder"):
            RunFolder(tmp_path / "run").load_plugins()


def test_a_recipe_alone_runs_no_code(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"from: clip\nplugins: [{tmp_path / 'evil.py'}]\n")
    assert cli.main(["train", "--recipe", str(recipe), "--size", "debug", "--out", str(tmp_path / "run")]) == 2
