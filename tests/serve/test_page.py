"""The page of the service: its examples are run as they stand, on a service of the test's own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "serve.md").read_text(encoding="utf-8")


@pytest.fixture
def place(client, pictures, tmp_path):
    """A folder with photo.jpg, and the page with the address of the test's service."""
    (tmp_path / "photo.jpg").write_bytes(pictures[0])
    return tmp_path, PAGE.replace("127.0.0.1:8000", f"{client.host}:{client.port}").replace("a cat", "a blue square")


def test_the_python_example_runs(place, monkeypatch, capsys):
    folder, page = place
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code.replace("a dog", "a red circle"), "serve.md", "exec"), {})
    cosines, best = capsys.readouterr().out.splitlines()
    assert len(json.loads(cosines)) == 2
    assert re.match(r"a (red circle|blue square) 0\.\d+", best)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_examples_run(place):
    folder, page = place
    lines = [line.replace("a dog", "a red circle") for line in page.splitlines() if line.startswith("curl ")]
    assert len(lines) == 3
    answers = []
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", f"{line} -sS --fail-with-body"], cwd=folder, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answers.append(json.loads(done.stdout))
    assert answers[0]["rows"] == 2
    assert {one["label"] for one in answers[1]["classes"][0]} == {"a red circle", "a blue square"}
    assert answers[2]["rows"] == 1


def test_every_status_and_option_that_the_page_names_exists(client):
    from clipdistill.commands import command_parser

    known = {option for action in command_parser("serve")[1]._actions for option in action.option_strings}
    named = {f"--{name}" for name in re.findall(r"`--([a-z-]+)", PAGE)}
    assert named - {"--device"} <= known
    described = set(client.ask("GET", "/openapi.json")[2]["paths"])
    assert described == set(re.findall(r"^\| `(?:POST|GET) (/[a-z/]+)`", PAGE, re.MULTILINE))
