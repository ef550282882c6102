"""Tars out of a command: the same pairs; run only where it was typed."""

from __future__ import annotations

import time

import pytest

from clipdistill.cli import main
from clipdistill.data.open import is_labelled_name, open_labelled, open_pairs
from clipdistill.data.pairs import DataConfig
from clipdistill.errors import InputError
from clipdistill.remote import RemoteError, allow_pipe
from clipdistill.remote.pipe import _typed


@pytest.fixture(autouse=True)
def nothing_typed():
    _typed.clear()


def test_the_same_pairs_as_from_a_disk(shards):
    near, far = open_pairs(f"{shards}/{{00000..00002}}.tar"), open_pairs(f"pipe:cat {shards}/{{00000..00002}}.tar")
    assert far.fingerprint() == near.fingerprint()
    assert [far.image_bytes(i) for i in range(24)] == [near.image_bytes(i) for i in range(24)]


def test_a_command_is_run_once(shards, tmp_path):
    far = open_pairs(f"pipe:echo run >> {tmp_path}/runs; cat {shards}/00000.tar")
    [far.image_bytes(i) for i in range(len(far))]
    assert (tmp_path / "runs").read_text() == "run\n"


def test_variables_of_the_shell_are_no_pattern(shards, monkeypatch):
    monkeypatch.setenv("SHARD", str(shards / "00000.tar"))
    assert len(open_pairs("pipe:cat ${SHARD}")) == 8


def test_labelled_tars(everything):
    name = f"pipe:cat {everything}/labelled/0.tar"
    allow_pipe(name)
    assert is_labelled_name(name)
    names = str(everything / "labelled" / "classes.txt")
    assert open_labelled(name, classes=names).fingerprint() == _near(everything, names).fingerprint()


def _near(everything, names):
    return open_labelled(everything / "labelled" / "0.tar", classes=names)


def test_a_command_out_of_a_file_is_never_run(tmp_path, capsys):
    command = f"pipe:touch {tmp_path}/ran"
    with pytest.raises(InputError, match="only one that is typed is run"):
        open_pairs(DataConfig(path=command))
    (tmp_path / "recipe.yaml").write_text(f"extends: clip-kd\ndata:\n  path: '{command}'\n")
    code = main(["train", "--recipe", str(tmp_path / "recipe.yaml"), "--size", "debug", "--out", str(tmp_path / "run")])
    assert code == 2
    assert not (tmp_path / "ran").exists()
    (tmp_path / "table.csv").write_text(f"filepath,title\n{command},a caption\n")
    with pytest.raises(InputError):
        open_pairs(str(tmp_path / "table.csv"))
    assert not (tmp_path / "ran").exists()


def test_a_command_on_the_command_line_is_run(shards, tmp_path, capsys):
    name = f"pipe:cat {shards}/{{00000..00002}}.tar"
    arguments = [
        "train",
        "--recipe",
        "clip-kd",
        "--size",
        "debug",
        "--data",
        name,
        "--explain",
        "preflight.allow_weak_teacher=true",
    ]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cat /nowhere/x.tar", "ended with code 1 .*No such file"),
        ("exit 7", "ended with code 7"),
        ("head -c 3000 SHARD; kill -9 $$", "ended with code"),
        ("sleep 60", "wrote nothing for"),
    ],
)
def test_a_command_that_fails_is_one_sentence(command, said, shards, monkeypatch):
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "0.02")
    monkeypatch.setattr("clipdistill.remote.pipe.time.sleep", lambda seconds: None)
    name = "pipe:" + command.replace("SHARD", str(shards / "00000.tar"))
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=said) as caught:
        open_pairs(name)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 20


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "x").write_text("hello,title\nthis,is no tar\n")
    with pytest.raises(InputError, match="no tar"):
        open_pairs(f"pipe:cat {tmp_path}/x")
