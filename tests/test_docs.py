"""The book: every command is one that exists and is accepted, the tutorial's are run, links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipdistill.ablate import command as ablate_command
from clipdistill.cli import COMMANDS, _without_shared, main
from clipdistill.errors import InputError
from clipdistill.scenes.pairs import open_scenes
from clipdistill.train.command import settings_of
from clipdistill.train.config import resolve
from clipdistill.train.stages import resolve_stages
from tests.conftest import REPOSITORY
from tests.documents import Command, anchors, blocks, commands, links, pages

DOCS = REPOSITORY / "docs"
ALL = [command for page in pages() for command in commands(page)]
OURS = [command for command in ALL if command.clipdistill is not None]
SMALL = ["train.steps=2", "train.batch_size=16", "train.precision=fp32", "train.warmup_steps=1"]


def parsed(command: Command) -> argparse.Namespace:
    """The arguments of a command as its own parser reads them."""
    name, *rest = command.clipdistill or []
    assert name in COMMANDS, f"{command}: no such command"
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"clipdistill {name}")
    module.add_arguments(parser)
    try:
        return parser.parse_intermixed_args(_without_shared(rest)[0])
    except SystemExit as error:
        if error.code == 0:  # --help
            return argparse.Namespace(help=True)
        raise AssertionError(f"{command}: not accepted") from error


@pytest.mark.parametrize("command", OURS, ids=[f"{c.page}:{c.line}" for c in OURS])
def test_every_command_is_accepted_by_its_parser(command: Command) -> None:
    if command.clipdistill == ["--version"]:
        return
    arguments = parsed(command)
    assert command.clipdistill is not None
    if command.clipdistill[0] == "train" and "help" not in arguments:
        settings = settings_of(arguments)
        kinds = ("cache", "hf", "onnx", "timm", "towers", "inherit", "local-dir", "module")
        kind, colon, _ = (arguments.teacher or "").partition(":")
        assert not colon or kind in kinds, f"{command}: no such kind of model"
        arguments.recipe = re.sub(r"^\$\w+$", "clip-rd", arguments.recipe)  # the variable of a loop over recipes
        if Path(arguments.recipe).suffix in (".yaml", ".yml") and not Path(arguments.recipe).is_file():
            return  # the reader's own recipe
        named = (arguments.recipe, settings)
        try:
            stages = resolve_stages(*named, size=arguments.size, assignments=arguments.settings)
            if not stages:
                resolve(*named, size=arguments.size, assignments=arguments.settings)
        except InputError as error:
            raise AssertionError(f"{command}: {error}") from error
    elif command.clipdistill[0] == "ablate" and not any(w.endswith((".yaml", ".yml")) for w in arguments.plan):
        ablate_command.read_arguments(arguments)


def test_the_other_programs_exist() -> None:
    """make targets, our scripts with their options, and nothing else."""
    for command in ALL:
        words = command.words
        if words[0] == "make":
            done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPOSITORY, capture_output=True, check=False)
            assert done.returncode == 0, str(command)
        elif words[0] == "python" and words[1] != "-m":
            script = REPOSITORY / words[1]
            if words[1].startswith("benchmarks/"):
                text = script.read_text(encoding="utf-8")
                for word in words[2:]:
                    assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in text, str(command)
        elif words[0] == "pip":
            extras = re.findall(r"\[([\w,-]+)\]", command.text)
            known = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
            for extra in ",".join(extras).split(","):
                assert not extra or re.search(rf"^{extra} = \[", known, flags=re.MULTILINE), str(command)


def test_python_blocks_compile() -> None:
    for page in pages():
        for block in blocks(page):
            if block.language == "python":
                compile(block.text, f"{block.page}:{block.line}", "exec")


def test_the_warnings_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "src").rglob("*.py"))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(told) > 30
    for words in told:
        assert words in code, words


def test_links_and_anchors_lead_somewhere() -> None:
    for page in pages():
        for path, anchor in links(page):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {path}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target), f"{page.name}: {path}#{anchor}"


def book() -> list[str]:
    """The pages in the site's navigation."""
    text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["theme"]["font"] is False  # nothing is fetched from elsewhere
    return re.findall(r": ([\w/-]+\.md)$", text, flags=re.MULTILINE)


def test_the_book_lists_pages_that_exist() -> None:
    listed = book()
    assert len(listed) == len(set(listed)) > 10
    for page in listed:
        assert (DOCS / page).is_file(), page


def test_the_slurm_script_is_shell() -> None:
    [script] = [block for block in blocks(DOCS / "scaling.md") if block.language == "slurm"]
    subprocess.run(["bash", "-n"], input=script.text, text=True, check=True)
    assert script.text.count("#SBATCH --signal=TERM@120") == 1


def test_the_figures_of_scaling_are_those_of_the_script() -> None:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from scaling import DATA, disk, hours
    finally:
        sys.path.pop(0)
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    rows = {"shards, shorter": ("shards", 0), "cache, 512": ("cache", 0), "cache, five": ("cache", 5)}
    for start, (kind, views) in rows.items():
        [row] = re.findall(rf"^\| {start}.*$", page, flags=re.MULTILINE)
        for name, cell in zip(("CC3M", "CC12M", "CC3M+CC12M"), row.split("|")[3:]):
            images, captions = DATA[name]
            size = disk(images, captions, 512, views)[kind]
            assert abs(float(cell.split()[0]) - size) <= (0.05 if size < 10 else 0.5), (start, name, size)
    rates = {"live": 41.1e9, "cached": 0.0}
    for start, teacher in rates.items():
        [row] = re.findall(rf"^\| training, {start} teacher.*$", page, flags=re.MULTILINE)
        for name, cell in zip(("CC3M", "CC12M", "CC3M+CC12M"), row.split("|")[2:]):
            wanted = hours(DATA[name][0] * 32, 5.9e9, teacher, 8, 312, 0.3)
            assert abs(float(cell.split()[0]) - wanted) <= 0.06, (start, name, wanted)


def test_quick_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    for command in OURS:
        if command.clipdistill in (["list", "recipes"], ["list", "datasets"]):
            assert main(command.clipdistill) == 0, str(command)
    shown = capsys.readouterr().out
    assert "clip-rd" in shown
    assert "scenes" in shown


@pytest.mark.slow
def test_listing_students_and_the_doctor_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "students"]) == 0
    assert "ViT-T-16" in capsys.readouterr().out
    assert main(["doctor"]) in (0, 1)


def smaller(words: list[str]) -> list[str]:
    """A command of the tutorial with less of everything."""
    sizes = {"6000": "64", "1000": "48"}
    words = [sizes.get(word, word) if words[i - 1] == "--size" else word for i, word in enumerate(words)]
    if words[0] == "train" and "--explain" not in words:
        words += SMALL
    if words[0] == "bench":
        words += ["--seconds", "0.05", "--rounds", "3"]
    return words


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tutorial_runs_from_start_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "tutorial.md"
    for command in commands(page):
        if command.clipdistill is not None:
            assert main(smaller(command.clipdistill)) == 0, f"{command}\n{capsys.readouterr().err}"
    assert (tmp_path / "report.html").stat().st_size > 50_000
    assert '<section id="gallery"' in (tmp_path / "report.html").read_text()
    [code] = [block.text for block in blocks(page) if block.language == "python"]
    names: dict[str, object] = {}
    exec(compile(code, "tutorial.md", "exec"), names)
    assert names["similarity"].shape == (2,)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name: captions.json, photographs, holiday.jpg."""
    folder = tmp_path_factory.mktemp("book")
    images = []
    for split, count in (("train", 48), ("val", 24)):
        source = open_scenes(split, count, 0)
        for i in range(count):
            path = folder / "photographs" / f"{split}-{i}.png"
            path.parent.mkdir(exist_ok=True)
            source.image(i).save(path)
            sentences = [{"raw": caption} for caption in source.captions(i)]
            images.append({"filename": f"photographs/{path.name}", "split": split, "sentences": sentences})
    (folder / "captions.json").write_text(json.dumps({"dataset": "mine", "images": images}))
    source.image(0).save(folder / "holiday.jpg")
    return folder


def ours(text: str) -> str:
    """The models of the book replaced by the small ones that come with the package."""
    text = text.replace("ViT-B-16 ViT-T-16 RN50", "scenes-teacher runs/rd")
    return text.replace("ViT-B-16/laion400m_e32", "scenes-teacher").replace("ViT-T-16", "scenes-student")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_choosing_and_search_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    for page in ("choosing.md", "search.md"):
        for command in commands(DOCS / page):
            words = smaller(shlex.split(ours(command.text))[1:])
            if words[0] == "ablate":
                words += ["data.size=64", "validation.size=24", "--seeds", "2", *SMALL, "train.evaluate_every=2"]
                words = [word for word in words if word not in ("train.warmup_steps=1",)]
            if "--page" in words:  # tests/search runs it
                continue
            assert main(words) == 0, f"{command}\n{capsys.readouterr().err}"
    assert (workplace / "ablation.html").is_file()
    for page in ("report.html", "ablation.html"):  # what was trained is in the table
        assert '<section id="scores"' in (workplace / page).read_text()


STANDS_FOR = {
    r"ViT-B-16/(laion400m_e32|openai)": "scenes-teacher",
    r"ViT-L-14/datacomp_xl_s13b_b90k,ViT-L-14/openai": "scenes-teacher",
    r"'cc3m/\{00000\.\.00331\}\.tar'": "captions.json",
    r"\b(dataset_coco|dataset_flickr8k|flickr8k|flickr8k_half)\.json\b": "captions.json",
    r"coco_mini/annotations/captions_\w+\.json": "captions.json",
    r"(--data|--validation) (F|\.\.\.)(?= |$)": r"\1 captions.json",
    r"torchvision:fasterrcnn_resnet50_fpn_v2|coco_mini/annotations/instances_\w+\.json": "grid:1+2",
    r"torchvision:CIFAR10|cifar10_test_a\.npz": "scenes:zeroshot",
    r"bench runs/rd ViT-B-16": "bench runs/rd scenes-teacher",
    r"held_out\.data=captions\.json": "held_out.data=captions.json held_out.split=val",
    r"\bViT-[TB]-16\b": "scenes-student",
    r"--synthetic \S+": "",
    r"--recipe mobileclip --teacher cache:dr": "--recipe mobileclip --teacher cache:dr --validation captions.json",
    r"--backend \S*(onnx|openvino)\S*( --dtype \S+)?": "",
    r"--push \S+": "",
    r"benchmarks/(ablation_\w+\.yaml)": rf"{REPOSITORY}/benchmarks/\1",
    r"--size (20000|6000)": "--size 64",
    r"\bruns/(rd|kd)\.seed-\*": r"runs/\1-0 runs/\1-1",
}
"""What the pages name, and what stands for it where they are run."""

NEEDS = {  # runs that a page takes as given, by name and recipe
    "ablation.md": {
        "a": "clip",
        "b": "clip-kd",
        "rd-0": "clip-rd",
        "rd-1": "clip-rd",
        "kd-0": "clip-kd",
        "kd-1": "clip-kd",
    },
    "benchmarking.md": {"rd": "clip-rd"},
    "deployment.md": {"rd": "clip-rd"},
    "cache.md": {},
    "scenes.md": {},
    "dclip.md": {},
    "tinyclip.md": {},
    "diary.md": {},
    "results.md": {},
}
LEFT_OUT = {
    "mine.yaml": "the reader's own claims (tests/statistics)",
    "runs/ablation": "results of the page's own ablations (tests/ablate)",
    "--to openvino": "an optional package (tests/export)",
    "--to litert": "an optional package (tests/export/test_phone.py)",
    "onnx:": "an optional package (tests/export)",
    "--to onnx": "an optional package (tests/export)",
    "runs/dclip-coco": "the same training with boxes of a file (tests/regions)",
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", NEEDS)
def test_the_commands_of_the_other_pages_run(
    page: str, tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for entry in workplace.iterdir():
        if entry.name in ("captions.json", "photographs"):
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    for number, (name, recipe) in enumerate(NEEDS[page].items()):
        teacher = [] if recipe == "clip" else ["--teacher", "scenes-teacher"]
        given = ["--recipe", recipe, *teacher, "--student", "scenes-student", "--data", "captions.json"]
        given += [
            "--validation",
            "captions.json",
            "--out",
            f"runs/{name}",
            "--quiet",
            *SMALL,
            f"train.seed={number % 2}",
        ]
        assert main(["train", *given]) == 0, capsys.readouterr().err
    for command in commands(DOCS / page):
        if command.clipdistill is None or any(part in command.text for part in LEFT_OUT):
            continue
        for text in dict.fromkeys(command.text.replace("$R", recipe) for recipe in ("clip-kd", "clip-rd")):
            words = small_words(text)
            assert main(words) == 0, f"{command}\n{shlex.join(words)}\n{capsys.readouterr().err}"


def small_words(text: str) -> list[str]:
    """The arguments of a page's command at a small size, with what is there in place of what the page names."""
    for pattern, replacement in STANDS_FOR.items():
        text = re.sub(pattern, replacement, text)
    words = smaller([word for word in shlex.split(text, comments=True)[1:] if not word.startswith("train.")])
    if words[0] == "train" and "--student" not in words and "--size" not in words:
        words += ["--student", "scenes-student"]
    if words[0] == "train":  # the stages draw their own pairs
        staged = any(word.endswith("-stages") for word in words)
        words += ["data.size=64", "validation.size=48"] if staged else ["preflight.allow_weak_teacher=true"]
    if words[0] == "ablate":
        words += ["--seeds", "1", "data.size=64", "validation.size=24", *SMALL[:3], "train.evaluate_every=2"]
    return words


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torchrun_as_in_the_book(workplace: Path) -> None:
    """The first command of Scaling out with two processes on the CPU."""
    command = next(c for c in commands(DOCS / "scaling.md") if c.words[0] == "torchrun")
    text = (
        ours(command.text)
        .replace("cache:cache/cc12m", "scenes-teacher")
        .replace("--nproc-per-node 8", "--nproc-per-node 2")
        .replace("runs/rd", "runs/torchrun")  # other pages write to runs/rd
    )
    text = re.sub(r"'cc12m/[^']*'", "captions.json", text).replace("coco/dataset_coco.json", "captions.json")
    words = [*shlex.split(text)[1:], "--split", "train", *SMALL, "train.workers=0", "device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=workplace,
        check=True,
        env=environment,
        timeout=1000,
    )
    facts = json.loads((workplace / "runs/torchrun/run.json").read_text())
    assert (facts["status"], facts["ranks"]) == ("finished", 2)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_holds_every_page(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(REPOSITORY / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "tutorial" / "index.html").is_file()
    # `make docs` exports the demo's student there, behind a page of the navigation
    assert 'href="../try/"' in (tmp_path / "site" / "web" / "index.html").read_text(encoding="utf-8")
    assert " --out site/try\n" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert there == set(book()), "pages without a place in the navigation of mkdocs.yml"
