"""`--dry-run` and `--gpus`."""

import sys
import tempfile

import pytest

from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.train import command


def test_a_dry_run_tells_speed_memory_and_time_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--recipe", "clip-rd", "--size", "debug", "--dry-run", "train.steps=1000"]) == 0
    shown = capsys.readouterr().out
    assert "dry run of 10 steps" in shown
    assert "pairs/s" in shown
    assert "GiB at the peak" in shown
    assert "all 1,000 steps: about" in shown
    assert [path for path in tmp_path.iterdir() if "inductor" not in path.name] == []


def test_the_length_of_a_run_in_epochs_follows_from_the_data(monkeypatch, capsys):
    epochs = ["train.steps=null", "train.epochs=50"]
    assert main(["train", "--recipe", "clip", "--size", "debug", "--dry-run", *epochs]) == 0
    assert "all 200 steps" in capsys.readouterr().out  # 50 epochs of 64 / 16


def test_a_recipe_in_stages_has_no_dry_run(capsys):
    assert main(["train", "--recipe", "tinyclip-manual-stages", "--size", "debug", "--dry-run"]) == 2
    assert "several stages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "sentence"),
    [(0, "--gpus must be at least 1, got 0"), (-1, "must be at least 1, got -1"), (64, "--gpus 64: this machine has")],
)
def test_gpus_that_are_not_there_are_refused(count, sentence):
    with pytest.raises(InputError, match=sentence):
        command.on_gpus(count)


def test_gpus_starts_torchrun_with_the_same_command(monkeypatch):
    ran = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.execv", lambda program, words: ran.append(words))
    monkeypatch.setattr(sys, "argv", ["clipdistill", "train", "--recipe", "clip", "--gpus", "2"])
    command.on_gpus(2)
    assert ran[0][1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          "-m", "clipdistill.cli", "train", "--recipe", "clip", "--gpus", "2"]  # fmt: skip
