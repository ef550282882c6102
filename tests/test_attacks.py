"""Commands given what nobody meant: a user's file as a result's place, options that cannot apply, odd consoles."""

import os
import shutil
import stat
import subprocess
import sys

import pytest

from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.runtime.files import require_place, write_json
from tests.conftest import REPOSITORY

RUN = str(REPOSITORY / "tests" / "kept" / "run")
PAIRS = ["eval", RUN, "--data", "scenes:val"]
LABELLED = ["eval", RUN, "--data", "scenes:zeroshot"]


def refused(capsys, *command):
    """The one sentence with which a command is refused."""
    assert main([str(part) for part in command]) == 2, command
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    return said


OVER = {
    "scores": [*PAIRS, "--json"],
    "geometry": [*PAIRS, "--geometry"],
    "comparisons": ["compare", RUN, RUN, "--json"],
    "verdicts": ["claims", "published", RUN, "--json"],
    "measurements": ["bench", RUN, "--json"],
}


@pytest.mark.parametrize("name", ["data.json", "run.json", "notes.txt", "photo.jpg"])
@pytest.mark.parametrize("what", OVER)
def test_a_file_of_the_user_is_never_replaced(what, name, tmp_path, capsys):
    path = tmp_path / name
    path.write_text('{"images": []}')
    assert f"{path}: exists and is no file of {what}" in refused(capsys, *OVER[what], path)
    assert path.read_text() == '{"images": []}'


def test_data_beside_the_scores_are_never_replaced(tmp_path, capsys):
    """`--json cifar10.json` writes cifar10.npz too, which may be the very data."""
    (tmp_path / "cifar10.npz").write_bytes(b"data")
    assert "cifar10.npz: exists" in refused(capsys, *PAIRS, "--json", tmp_path / "cifar10.json")
    assert (tmp_path / "cifar10.npz").read_bytes() == b"data"
    assert "name it .json" in refused(capsys, *PAIRS, "--json", tmp_path / "other.npz")
    same = tmp_path / "both.json"
    assert "each a file of its own" in refused(capsys, *PAIRS, "--json", same, "--geometry", same)


@pytest.mark.parametrize("ending", [".html", ".md", ".csv"])
def test_a_report_replaces_reports_only(ending, tmp_path, capsys):
    path = (tmp_path / "captions").with_suffix(ending)
    path.write_text("filepath,title")
    assert f"{path}: exists" in refused(capsys, "report", RUN, "--out", tmp_path / "captions.html")
    assert path.read_text() == "filepath,title"
    path.unlink()
    for _ in range(2):
        assert main(["report", RUN, "--out", str(tmp_path / "captions.html")]) == 0


def test_devices_and_pipes_are_not_replaced_by_files(tmp_path):
    """A rename over /dev/null, as root, would leave the machine without it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file"):
        require_place(tmp_path / "pipe", "scores")
    with pytest.raises(InputError, match="not a file"):
        write_json(tmp_path / "pipe", {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


EMPTY = [
    ["search", "photos", "--model", "m", "--index", "", "--query", "x"],
    ["search", "photos", "--model", "m", "--index=", "--query", "x"],
    ["search", "", "--model", "m", "--query", "x"],
    ["train", "--recipe", "clip", "--out", ""],
    ["eval", RUN, "--data", ""],
    ["report", RUN, "--out="],
]


@pytest.mark.parametrize("command", EMPTY, ids=range(len(EMPTY)))
def test_an_empty_value_is_not_the_folder_one_is_in(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "the value is empty" in refused(capsys, *command)
    assert not list(tmp_path.iterdir())


UNUSED = [
    ([*PAIRS, "--templates", "openai"], "--templates is for labelled sets"),
    ([*PAIRS, "--classes", "names.txt"], "--classes is for labelled sets"),
    ([*LABELLED, "--k", "3"], "--k is for image-caption pairs"),
    ([*LABELLED, "--protocol", "first-caption"], "--protocol is for image-caption pairs"),
    ([*LABELLED, "--geometry", "g.json"], "--geometry is for one set of image-caption pairs"),
    ([*PAIRS, "--data", "scenes:val"], "named twice"),
    ([*PAIRS, "--strict-counts"], "no published counts are known"),
    (["train", "--recipe", "clip", "--out", "o", "--split", "val"], "--split val: goes with --data"),
    (["train", "--recipe", "clip", "--out", "o", "--validation-split", "x"], "--validation-split x: goes with --valid"),
    (["train", "--recipe", "clip", "--out", "o", "--image-root", "p"], "--image-root p: goes with --data or"),
    (["train", "--recipe", "clip", "--out", "o", "recipe=clip-kd"], "recipe=clip-kd: is not set so, --recipe says it"),
    (["train", "--recipe", "tinyclip-auto-stages", "--out", "o", "recipe=clip"], "recipe=clip: is not set so"),
    (["ablate", "--recipe", "clip", "--out", "o", "--split", "val"], "--split val: goes with --data"),
    *(
        (["ablate", "--recipe", "clip", "--size", "debug", "--out", "o", setting], "is not set so")
        for setting in ("recipe=clip-kd", "out=p", "name=n", "method=m", "train.seed=3", "train={seed: 3}")
    ),
    (["search", ".", "--model", RUN, "--query", "x", "--port", "80"], "--port goes with --page"),
    (["search", ".", "--model", RUN, "--query", "x", "--host", "::1"], "--host goes with --page"),
    (["search", ".", "--model", RUN, "--query", "x", "--no-update", "--rehash"], "--rehash goes with an update"),
    (["search", ".", "--model", RUN, "--json"], "--json goes with --query or --image"),
    (["search", ".", "--model", RUN, "--query", "  "], "the query is empty"),
    (["report", RUN, "--images", "5"], "--images says what --look looks at"),
    (["report", RUN, "--device", "cpu"], "--device says what --look looks at"),
    (["report", RUN, RUN], "named twice"),
    (["claims", "published", RUN, RUN], "named twice"),
    (["compare", RUN, RUN, "--against", RUN], "named twice"),
    (["compare", RUN, RUN, "--metric", "t2i_R@1", "--metric", "t2i_R@1"], "named twice"),
    (["bench", RUN, RUN], "named twice"),
    (["bench", RUN, "--split", "val"], "give --data as well"),
    (["bench", RUN, "--data", "scenes:val", "--towers", "text"], "which --towers leaves out"),
    (["bench", RUN, "--rounds", "2"], "at least 3 rounds"),
    (["bench", RUN, "--dtype", "int3"], "unknown number format"),
    (["list", "recipes", "clip"], "takes no pattern"),
    (["demo", "--recipes", "clip,clip"], "named twice"),
    (["demo", "--seconds", "0"], "--seconds"),
    (["scenes", "--out", "s", "--workers", "0"], "workers must be at least 1"),
    (["cache", "info", "c", "--views", "3"], "--views is for filling a cache"),
    (["cache", "verify", "c", "--dtype", "int8"], "--dtype is for filling a cache"),
    (
        ["cache", "--teacher", "scenes-teacher", "--data", "scenes", "--out", "c", "view.flip=0.5"],
        "give --views as well",
    ),
    (["cache", "--teacher", "scenes-teacher", "--data", "scenes", "--out", "c", "--recipe", "clip-kd"], "give --views"),
    (["export", RUN, "--to", "onnx", "--out", "e", "--budget", "2"], "--budget means nothing without --int8"),
    (["export", RUN, "--to", "onnx", "--out", "e", "--calibration-size", "2"], "means nothing without --int8"),
    (["export", RUN, "--to", "hf", "--out", "e", "--tolerance", "0.5"], "--tolerance goes with --to onnx"),
]


@pytest.mark.parametrize(("command", "sentence"), UNUSED, ids=range(len(UNUSED)))
def test_an_option_that_cannot_apply_is_refused_before_the_work(command, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, *command)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["eval", RUN, "--data", "scenes:val?size=4", "--quiet", "--quiet"], ""),  # a switch
        (["compare", RUN, RUN, "--json", "a", "--json", "b"], "--json is given 2 times: the last is taken"),
        (["compare", RUN, RUN, "--json", "a", "--json=b"], "--json is given 2 times: the last is taken"),
        (["compare", RUN, RUN, "--metric", "t2i_R@1", "--metric", "i2t_R@1"], ""),  # takes several
        (["train", "--recipe", "clip", "--size", "debug", "--out", "o", "--explain", "train.steps=1", "train.steps=2"],
         "train.steps is given 2 times: the last is taken"),
        (["ablate", "--recipe", "clip", "--size", "debug", "--out", "o", "--list", "train.steps=1", "train.steps=2"],
         "train.steps is given 2 times: the last is taken"),
        (["eval", RUN, "--data", "scenes:val?size=4", "--split", "val", "--split", "val"], "--split is given 2 times"),
    ],
)  # fmt: skip
def test_of_an_option_given_again_the_last_is_taken_aloud(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(command)
    told = [line for line in capsys.readouterr().err.splitlines() if "times: the last is taken" in line]
    assert len(told) == bool(said)
    assert all(said in line for line in told)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3 GiB"),
        ImportError("libtorch_cuda.so: failed to map segment from shared object"),
    ],
    ids=["bare", "array", "library"],
)
def test_no_memory_is_one_sentence(error, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr("clipdistill.cli._dispatch", fail)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == (
        "clipdistill: there is no more memory for this process: see  free -m  and  ulimit -v\n"
    )


def run_as_user(*command, **options):
    code = "import sys; from clipdistill.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=False, **options)


def test_an_ascii_terminal_gets_escapes_not_a_traceback(tmp_path):
    where = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run_as_user("report", RUN, "--out", str(tmp_path / "r.html"), env=where)
    assert done.returncode == 0, done.stderr
    assert b"\\u2192" in done.stdout or done.stdout.isascii()


def test_an_ascii_locale_hides_no_file(tmp_path):
    shutil.copytree(RUN, tmp_path / "größe 日本")
    where = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-m", "clipdistill", "compare", RUN, str(tmp_path / "größe 日本")]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command[:-1], "fehlt é"], env=os.environ | where, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"fehlt \\xe9" in done.stderr.splitlines()[-1]


def test_a_closed_output_is_no_error():
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m clipdistill compare "{RUN}" "{RUN}" >&-'], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [["--out=~/x.npy"], ["--out", "~/x.npy"]])
def test_home_is_meant_where_the_shell_leaves_it(words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["embed", "scenes-teacher", "--data", "scenes:val?size=4", "--quiet", *words]) == 0
    assert (tmp_path / "x.npy").is_file()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--local-cache"], "--local-cache: its value is missing"),
        (["--local-cache", "--quiet"], "--local-cache: its value is missing"),
        (["--local-cache", "http://a/b"], "is a URL, and results are written to this machine"),
        (["--local-cache", "copies", "--local-cache-size", "0"], "--local-cache-size 0: write a size"),
        (["--plugin"], "--plugin: its value is missing"),
    ],
)
def test_options_of_every_command_need_a_value_that_fits(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPDISTILL_LOCAL_CACHE", raising=False)
    assert sentence in refused(capsys, "eval", RUN, "--data", "nothing", *words)
    assert not list(tmp_path.iterdir())


def test_an_ablation_is_not_written_into_a_run(tmp_path, capsys):
    shutil.copytree(RUN, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    command = ["ablate", "--recipe", "clip-kd", "--drop", "fd", "--size", "debug", "--out", tmp_path / "run"]
    assert "is a run: the runs of an ablation lie in a folder of their own" in refused(capsys, *command)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_among_other_files_is_refused_before_models_are_loaded(tmp_path, monkeypatch):
    from clipdistill.cache.config import CacheConfig
    from clipdistill.cache.fill import fill

    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr("clipdistill.cache.fill.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=r"holds other files \('thesis.txt'\) and no cache"):
        fill(CacheConfig(teacher="scenes-teacher", data={"path": "scenes"}, out=tmp_path))


ODD = {
    "a folder that is gone": ("cd $(mktemp -d); rmdir $PWD; exec", "started in is not there any more"),
}


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_surrounding_is_one_sentence(odd, tmp_path):
    before, sentence = ODD[odd]
    words = f"{sys.executable} -m clipdistill embed scenes-teacher --data 'scenes:val?size=4' --quiet --out"
    place = "x.npy"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    command = ["sh", "-c", f"{before} {words} {place}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1]


def test_control_characters_of_an_error_do_not_reach_the_terminal(capsys):
    assert "\x1b" not in refused(capsys, "eval", RUN, "--data", "no\x1b[31mthing")


def test_a_time_limit_that_is_none_is_called_so(monkeypatch, capsys):
    monkeypatch.setenv("CLIPDISTILL_REMOTE_TIMEOUT", "soon")
    said = refused(capsys, "eval", RUN, "--data", "http://127.0.0.1:1/a.tar")
    assert said.startswith("clipdistill: CLIPDISTILL_REMOTE_TIMEOUT=soon: must be a number")


@pytest.mark.parametrize("text", ["a,,b", ",a", "a,", ",", "a, ,b"])
def test_a_comma_with_nothing_beside_it_is_refused_in_every_list(text, capsys, tmp_path):
    run, out = str(REPOSITORY / "tests" / "kept" / "run"), f"--out={tmp_path / 'out'}"
    for command in (
        ["train", "--recipe", "clip-rd", "--size", "debug", f"--teacher={text}", out],
        ["train", "--recipe", "clip-rd", "--size", "debug", f"--student=inherit:{text}", out],
        [
            "train",
            "--recipe",
            "clip-rd",
            "--size",
            "debug",
            f"--student=towers:image=timm:resnet18,{text},text=hf:x",
            out,
        ],
        ["cache", f"--teacher={text}", "--data=scenes:val", out],
        *(["ablate", "--recipe=clip-rd", f"--{option}={text}", out] for option in ("drop", "add", "weight", "seeds")),
        ["demo", f"--recipes={text}", out],
        ["fetch", "wds/mnist", f"--split={text}"],
        ["probe", run, "--train=scenes-classes:train", "--test=scenes-classes:test", f"--shots={text}"],
        ["eval", run, "--data=scenes:val", f"--k={text}"],
        *(["bench", run, f"--{option}={text}"] for option in ("dtype", "towers", "backend", "batch")),
    ):
        assert main(command) == 2, command
        assert "," in capsys.readouterr().err, command
        assert list(tmp_path.iterdir()) == [], command
