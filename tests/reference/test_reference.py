"""What can be set and typed is listed completely, each with its meaning; the pages are what the code says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from clipdistill.cli import COMMANDS, main
from clipdistill.commands import command_parser
from clipdistill.reference.completion import completion_script
from clipdistill.reference.settings import settings
from clipdistill.registry import TERMS
from clipdistill.train.config import RunConfig, TrainConfig
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", REPOSITORY / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_has_a_meaning() -> None:
    without = [f"{row.commands}: {row.key}" for row in settings() if not row.meaning.strip()]
    assert without == [], "write a docstring under the field"


def test_every_setting_of_a_run_is_listed() -> None:
    listed = {row.key for row in settings() if "train" in row.commands}
    assert {f"train.{name}" for name in TrainConfig.model_fields} <= listed
    assert set(RunConfig.model_fields) <= listed
    options = {option.name for name in TERMS.names() for option in TERMS.get(name).options}
    assert {f"objective.{name}" for name in options} <= listed


def test_every_option_has_a_help_text() -> None:
    without = [
        f"{name} {action.option_strings or action.dest}"
        for name in COMMANDS
        for action in command_parser(name)[1]._actions
        if not action.help and not action.choices
    ]
    assert without == []


def test_types_ranges_and_defaults_are_said_in_words() -> None:
    rows = {row.key: row for row in settings() if "train" in row.commands}
    assert (rows["train.batch_size"].kind, rows["train.batch_size"].range) == ("whole number", "at least 1")
    assert rows["train.betas"].range == "each at least 0, below 1"
    assert rows["train.epsilon"].default == "1e-6"
    assert (rows["train.schedule"].kind, rows["train.schedule"].default) == ("choice", "cosine")
    assert rows["objective.reinforced_lambda"].range == "at least 0, at most 1"
    assert rows["held_out.data"].default == "needed"


def test_the_pages_are_what_the_code_says(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_that_is_not_up_to_date_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(script.PAGES, "settings.md", lambda: "# Settings\n\nsomething else")
    assert script.main(["--check"]) == 1
    assert "settings.md; run  python docs/reference.py" in capsys.readouterr().out


def test_list_settings_finds_by_name_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "settings", "Warm"]) == 0
    shown = capsys.readouterr().out
    assert "train.warmup_steps" in shown
    assert "train.learning_rate" in shown  # "reached after the warm-up"
    assert "train.seed" not in shown
    assert main(["list", "settings", "no such thing"]) == 1


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("clipdistill tr", {"train"}),
        ("clipdistill train --recipe clip-r", {"clip-rd"}),
        ("clipdistill train --vali", {"--validation", "--validation-split"}),
        ("clipdistill list s", {"students", "settings"}),
        ("clipdistill train --student TinyCLIP-R", {"TinyCLIP-ResNet-19M-Text-19M", "TinyCLIP-ResNet-30M-Text-29M"}),
        ("clipdistill train --data ''", set()),  # then bash offers files
        ("clipdistill train --quiet --tensor", {"--tensorboard"}),
        ("clipdistill train train.lock", {"train.lock_image=", "train.lock_text="}),
        ("clipdistill ablate objective.weights.vrd", {"objective.weights.vrd_kl=", "objective.weights.vrd_ce="}),
        ("clipdistill train train.schedule =", {"cosine", "constant", "wsd"}),
        ("clipdistill train train.schedule = co", {"cosine", "constant"}),
        ("clipdistill train train.schedule=co", {"train.schedule=cosine", "train.schedule=constant"}),  # zsh's word
        ("clipdistill train train.compile = ''", {"auto", "true", "false"}),
        ("clipdistill train train.batch_size = ''", set()),
        ("clipdistill cache dty", {"dtype="}),
        ("clipdistill export --to = web", {"web"}),
    ],
)
def test_bash_completes(line: str, wanted: set[str]) -> None:
    words = line.split()
    code = f"""{completion_script("bash")}
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _clipdistill; echo "${{COMPREPLY[@]}}" """
    shown = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(shown.stdout.split()) == wanted


def test_zsh_gets_the_same_completions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", "zsh"]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("compdef _clipdistill_zsh clipdistill")
    assert "compopt" not in shown  # which zsh does not have
    same = shown.partition("_clipdistill() {")[2].partition("}\n_clipdistill_zsh")[0]
    assert same in completion_script("bash")
    if zsh := shutil.which("zsh"):
        (tmp_path / "script").write_text(shown, encoding="utf-8")
        subprocess.run([zsh, "-n", tmp_path / "script"], check=True)
