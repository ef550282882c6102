"""Passwords and signatures of URLs: they reach the machine that is named, and nothing that is printed or stored."""

from __future__ import annotations

import pytest

from clipdistill.cli import main
from clipdistill.config import as_dict
from clipdistill.data.pairs import DataConfig
from clipdistill.errors import InputError, without_secrets
from clipdistill.scenes.pairs import open_scenes
from tests.data.helpers import write_tar
from tests.remote.conftest import own_caches, web

__all__ = ["own_caches", "web"]

SHOWN = {
    "http://me:secret@host/a.tar": "http://host/a.tar",
    "HTTPS://me:se%20cret@host:81/a.tar": "HTTPS://host:81/a.tar",
    "s3://key:secret@bucket/x/{0..9}.tar": "s3://bucket/x/{0..9}.tar",
    "http://token@host": "http://host",
    "http://me:p@secret@host/a": "http://host/a",
    "http:/me:secret@host/a": "http://host/a",
    "https://host/a.tar?X-Amz-Date=1&X-Amz-Signature=secret&id=3": "https://host/a.tar",
    "https://host/a.tar?sv=2021&sig=secret": "https://host/a.tar",
    "https://host/a.tar?access_token=secret": "https://host/a.tar",
    "https://host/a.tar?id=3&part=2": "https://host/a.tar?id=3&part=2",
    "pipe:curl -u x http://me:secret@host/a.tar | cat": "pipe:curl -u x http://host/a.tar | cat",
    "no http://me:secret@a/b, no 'http://me:secret@c/d'": "no http://a/b, no 'http://c/d'",
    "http://host/user@a/b": "http://host/user@a/b",
    "scenes:val?size=40": "scenes:val?size=40",
    "imagenet-r@/data/x": "imagenet-r@/data/x",
    "ViT-B-16@/data/me@here.pt": "ViT-B-16@/data/me@here.pt",
    "onnx:/data/me@here": "onnx:/data/me@here",
    "mail me@host: a/b": "mail me@host: a/b",
}


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_secret_goes_and_all_else_stays(text):
    assert without_secrets(text) == SHOWN[text]
    assert str(InputError(text)) == SHOWN[text]
    assert as_dict(DataConfig(path=text, sets=[{"path": text}]))["sets"] == [{"path": SHOWN[text]}]


@pytest.fixture
def address(web, tmp_path):
    """Pairs on a server, named with a password and a signature."""
    source = open_scenes("train", 24)
    members = [(f"{i}.{end}", data) for i in range(24) for end, data in
               (("png", source.image_bytes(i)), ("txt", source.captions(i)[0].encode()))]  # fmt: skip
    web.objects["a.tar"] = write_tar(tmp_path / "pairs.tar", members).read_bytes()
    return web.url.replace("http://", "http://me:hunter2@") + "/{}?X-Amz-Signature=hunter3"


def test_no_command_prints_or_stores_them(address, web, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs, missing = address.format("a.tar"), address.format("b.tar")
    train = ["--recipe", "clip-kd", "--size", "debug", "--quiet", "train.batch_size=8"]
    both = ["--data", pairs, "--validation", pairs, *train]
    assert main(["train", *both, "train.steps=2", "--out", "run"]) == 0
    fresh = [word.replace("hunter3", "hunter4") for word in both]  # signed anew, the same data
    assert main(["train", *fresh, "train.steps=2", "--out", "run"]) == 0
    assert main(["train", *fresh, "train.steps=3", "--allow-changes", "--out", "run"]) == 0
    assert main(["cache", "--teacher", "scenes-teacher", "--data", pairs, "--out", "store", "--quiet"]) == 0
    assert main(["embed", "scenes-teacher", "--data", pairs, "--out", "rows.npy", "--quiet"]) == 0
    assert main(["eval", "run", "--data", pairs, "--json", "scores.json", "--quiet"]) == 0
    assert main(["report", "run", "--out", "report.html"]) == 0
    assert main(["train", "--data", missing, *train, "--out", "x"]) == 2
    assert main(["eval", "run", "--data", missing]) == 2
    assert main(["probe", "run", "--train", missing, "--test", missing]) == 2
    for word in ("--teacher", "--recipe"):
        assert main(["train", *train[2:], "--recipe", "clip-kd", "--data", "scenes", word, missing, "--out", "y"]) == 2
    assert "is a URL, and results are written to this machine" in said(capfd, main, "--out", missing, train)
    with pytest.raises(SystemExit):
        main(["eval", "run", missing, "--no-such-option", missing])
    out = capfd.readouterr()
    assert "hunter" not in out.out + out.err
    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(stored) > 20
    assert [path for path in stored if b"hunter" in path.read_bytes()] == []
    assert not list(tmp_path.glob("http*"))


def said(capfd, main, option, place, train):
    """The sentence with which a training into a place is refused."""
    assert main(["train", "--data", "scenes", *train, option, place]) == 2
    found = capfd.readouterr()
    assert "hunter" not in found.out + found.err
    return found.err
