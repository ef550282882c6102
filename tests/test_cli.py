"""The command line: every bad input is one sentence and exit code 2."""

import subprocess
import sys

import pytest

from clipdistill import __version__
from clipdistill.cli import COMMANDS, main
from tests.conftest import REPOSITORY


def test_help_lists_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert f"clipdistill {name}" in capsys.readouterr().out


def test_version_and_help_are_quick_to_import():
    """Neither may import torch: that is seconds on a cold machine."""
    code = "import sys, clipdistill.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert __version__.count(".") == 2


@pytest.mark.parametrize("what", ["recipes", "students", "datasets"])
def test_lists(what, capsys):
    assert main(["list", what]) == 0
    shown = capsys.readouterr().out
    assert {"recipes": "clip-rd", "students": "ViT-T-16", "datasets": "scenes"}[what] in shown


BAD = {
    "unknown command": (["trian"], "did you mean 'train'"),
    "unknown recipe": (["train", "--recipe", "clip-dr"], "unknown recipe 'clip-dr'"),
    "unknown key": (["train", "--recipe", "clip", "--size", "debug", "--out", "{out}", "train.stesp=3"], "'steps'"),
    "unknown term": (
        ["train", "--recipe", "clip", "--size", "debug", "--out", "{out}", "objective.weights.vrdkl=1"],
        "vrd_kl",
    ),
    "unknown student": (
        ["train", "--recipe", "clip", "--size", "debug", "--out", "{out}", "--student", "ViT-T16"],
        "ViT-T-16",
    ),
    "unknown teacher": (
        ["train", "--recipe", "clip-rd", "--size", "debug", "--out", "{out}", "--teacher", "ViT-B16/laion400m_e32"],
        "ViT-B-16",
    ),
    "missing data": (
        ["train", "--recipe", "clip", "--size", "debug", "--out", "{out}", "--data", "absent.json"],
        "absent.json",
    ),
    "not a setting": (["train", "--recipe", "clip", "--size", "debug", "--out", "{out}", "steps"], "key=value"),
    "no student": (["train", "--recipe", "clip", "--data", "scenes", "--out", "{out}"], "no student"),
    "missing model": (["eval", "absent-run", "--data", "scenes:val"], "absent-run"),
    "missing run": (["report", "absent-run", "--out", "{out}.html"], "absent-run"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_sentence_and_exit_code_2(case, tmp_path, capsys):
    arguments, fragment = BAD[case]
    assert main([a.replace("{out}", str(tmp_path / "run")) for a in arguments]) == 2
    shown = capsys.readouterr().err.strip()
    assert fragment in shown
    assert len(shown.splitlines()) == 1
    assert "Traceback" not in shown


def test_it_runs_as_a_module():
    shown = subprocess.run(
        [sys.executable, "-m", "clipdistill", "--version"], check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip() == f"clipdistill {__version__}"


def test_a_place_that_nobody_looked_at_is_one_sentence(monkeypatch, capsys):
    def refuse(_):
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr("clipdistill.listing.run", refuse)
    assert main(["list", "recipes"]) == 2
    assert capsys.readouterr().err == (
        "clipdistill: /some/where: cannot be read or written (Permission denied): choose another place\n"
    )


def test_an_option_with_a_nul_is_one_sentence(capsys):
    assert main(["eval", "run\0", "--data", "scenes"]) == 2
    assert "NUL" in capsys.readouterr().err


def test_places_of_results_are_looked_at_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    run = str(REPOSITORY / "tests" / "kept" / "run")
    commands = (
        ["compare", run, run, "--json"], ["claims", "published", run, "--json"], ["bench", run, "--json"],
        ["eval", run, "--data", "scenes", "--json"], ["eval", run, "--data", "scenes", "--geometry"],
    )  # fmt: skip
    for command in commands:
        for place in (tmp_path, tmp_path / "file" / "x", tmp_path / "link", tmp_path / ("n" * 300)):
            assert main([*command, str(place)]) == 2, command
            said = capsys.readouterr().err
            assert said.startswith(f"clipdistill: {place if place.name != 'x' else place.parent}"), said
            assert len(said.splitlines()) == 1
    assert (tmp_path / "link").is_symlink()


CONTENT = {
    "empty.json": ("", "empty.json"),
    "list.json": ("[1, 2, 3]", "list.json"),
    "broken.json": ('{"images": [', "broken.json"),
    "html.json": ("<html><body>not found</body></html>", "html.json"),
    "wrong_columns.csv": ("a,b\n1,2\n", "filepath"),
    "empty.csv": ("filepath,title\n", "empty.csv"),
    "not_a_tar.tar": ("plainly not a tar archive" * 100, "not_a_tar.tar"),
}


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_files_that_are_not_what_they_say(name, tmp_path, capsys):
    content, fragment = CONTENT[name]
    path = tmp_path / name
    path.write_text(content)
    arguments = ["train", "--recipe", "clip", "--size", "debug", "--out", str(tmp_path / "run"), "--data", str(path)]
    assert main(arguments) == 2
    shown = capsys.readouterr().err.strip()
    assert fragment in shown
    assert len(shown.splitlines()) == 1


def test_doctor_examines_this_machine(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("Python", "torch", "device", "disk", "extra"):
        assert word in shown


@pytest.mark.parametrize(
    ("torch", "asked", "matches"),
    [
        ("2.6.0", "torch==2.7.1", False),  # up to 0.28 a torchvision names its one torch
        ("2.7.1+cu126", "torch==2.7.1", True),
        ("2.13.0", "torch>=2.14.0", False),  # since 0.29 the first one
        ("2.15.0+cu132", "torch>=2.14.0", True),
        ("2.16.0.dev20261101", "torch>=2.14.0", True),
    ],
)
def test_doctor_names_a_mismatched_pair(monkeypatch, torch, asked, matches):
    from clipdistill import doctor

    monkeypatch.setattr(doctor, "_version", {"torch": torch, "torchvision": "0.22.1"}.get)
    monkeypatch.setattr(doctor, "_requirements", lambda package: ["numpy", asked, 'gdown; extra == "gdown"'])
    [finding] = doctor._torch()
    assert (finding.state == "ok") == matches
    if not matches:
        assert "needs torch" in finding.what
        assert "pip install" in finding.advice
