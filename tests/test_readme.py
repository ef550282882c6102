"""Every command and the Python of the README run, on small models and data with the same names."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import torch
import yaml

from clipdistill.cli import COMMANDS, main
from clipdistill.recipes import recipe_names
from clipdistill.scenes.pairs import open_scenes
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TINY = "inherit:layers=1,heads=1,width=64,text_layers=1,text_width=64,text_heads=1,embed=32,from=scenes-teacher"
SMALL = "train.steps=2 train.batch_size=16 train.precision=fp32 train.warmup_steps=1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMAND_LINES = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with captions.json and its images, as the README's reader would have."""
    folder = tmp_path_factory.mktemp("readme")
    images = []
    for split, count in (("train", 48), ("val", 16)):
        source = open_scenes(split, count, 0)
        for i in range(count):
            name = f"{split}-{i}.png"
            source.image(i).save(folder / name)
            sentences = [{"raw": caption} for caption in source.captions(i)]
            images.append({"filename": name, "split": split, "sentences": sentences})
    (folder / "captions.json").write_text(json.dumps({"dataset": "mine", "images": images}))
    return folder


def smaller(text: str) -> str:
    text = text.replace("ViT-B-16/laion400m_e32", "scenes-teacher").replace("ViT-T-16", TINY)
    text = text.replace("--seeds 5", "--seeds 1")
    return text.replace("bench runs/rd", "bench runs/rd --seconds 0.05 --rounds 3 --batch 1")


def test_the_readme_names_only_known_commands():
    assert {"make", "pip", "clipdistill"} == {shlex.split(line)[0] for line in COMMAND_LINES}
    used = {shlex.split(line)[1] for line in COMMAND_LINES if line.startswith("clipdistill")}
    assert {"train", "eval", "report", "compare", "ablate", "export", "bench", "search"} <= used <= set(COMMANDS)


def test_the_readme_stays_short():
    assert README.count("\n") <= 130, "tables belong to the pages in docs/"


def test_make_targets_exist():
    for line in COMMAND_LINES:
        if line.startswith("make"):
            subprocess.run(
                ["make", "--dry-run", *shlex.split(line)[1:]], cwd=REPOSITORY, check=True, capture_output=True
            )


def test_workflows_name_targets_that_exist():
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    files = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
    if not files:
        pytest.skip("the source archive comes without them")
    for path in files:
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        lines = [line for job in jobs.values() for step in job["steps"] for line in step.get("run", "").splitlines()]
        assert {word for line in lines if line.startswith("make ") for word in line.split()[1:]} <= set(targets)
        known = {line.split("clipdistill ")[1].split()[0] for line in lines if "bin/clipdistill " in line}
        assert known <= set(COMMANDS)
        assert {needed for job in jobs.values() if (needed := job.get("needs"))} <= set(jobs)


def test_what_the_container_file_copies_is_there():
    lines = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    assert [word for word in copied if not (REPOSITORY / word).exists()] == []
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"/source\[([\w,]+)\]|EXTRAS=\"([\w,]+)\"", "\n".join(lines))
    assert {name for pair in named for name in "".join(pair).split(",")} <= extras["optional-dependencies"].keys()


def test_clipdistill_commands_run_in_order(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for line in COMMAND_LINES:
        if "onnx" in line and importlib.util.find_spec("onnxscript") is None:
            continue  # without the extra `export`, as in `make test-oldest`
        if line.startswith("clipdistill"):
            arguments = shlex.split(smaller(line))[1:]
            if arguments[0] in ("train", "ablate"):
                arguments += SMALL.split()
            assert main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (workplace / "report.html").stat().st_size > 10_000


def test_python_example_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    [code] = blocks("python")
    settings = '"train": {"steps": 2, "batch_size": 16, "precision": "fp32", "warmup_steps": 1}, "out"'
    code = smaller(code).replace('"out"', settings)
    torch.manual_seed(0)
    image, text = torch.randn(6, 512, requires_grad=True), torch.randn(6, 512, requires_grad=True)
    names = {
        "image": image,
        "text": text,
        "logit_scale": torch.tensor(14.3),
        "teacher_image": torch.randn(6, 768),
        "teacher_text": torch.randn(6, 768),
    }
    exec(compile(code, "README.md", "exec"), names)
    assert image.grad is not None
    assert set(names["output"].terms) == {"task", "crd", "icl", "fd", "vrd_kl", "vrd_ce", "xrd"}
    assert 0 <= names["scores"].value("t2i_R@1") <= 1


@pytest.mark.slow
def test_pip_install_builds_and_imports(tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(REPOSITORY)]
    subprocess.run(command, check=True)
    code = "import clipdistill, clipdistill.recipes as r; print(r.recipe_names(), clipdistill.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONPATH": str(target)}
    )
    assert str(target) in shown.stdout
    assert "clip-rd" in shown.stdout


def test_every_recipe_is_in_the_table_of_methods():
    table = README.split("## Methods")[1].split("## ")[0]
    listed = set(re.findall(r"`([a-z_-]+)`", table))
    families = {name.rsplit("-", 1)[0] for name in recipe_names() if name not in listed}
    assert set(recipe_names()) - listed == {f"{f}{s}" for f in families for s in listed if s[0] == "-"} & set(
        recipe_names()
    )
    assert families <= listed


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (REPOSITORY / target).exists(), target
