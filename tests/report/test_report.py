"""The written report: self-contained, escaped, complete, in three forms."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.report.command import add_arguments, run
from clipdistill.report.report import ReportSummary, write_report
from tests.report.synthetic import SVG_EVIL, write_bench, write_evil, write_run

Demo = tuple[list[Path], ReportSummary]


class Page(HTMLParser):
    """Elements with their attributes, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._hidden += tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data

    def with_tag(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def assert_self_contained(page: Page) -> None:
    """Nothing is loaded: every reference is a data URI of a picture or a place in the page itself."""
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/jpeg;base64,")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert "style" not in attributes  # the policy would refuse it
    assert len(page.with_tag("script")) == 1
    assert len(page.with_tag("style")) == 1


def test_the_demos_report_holds_every_section(demo: Demo) -> None:
    _, summary = demo
    html = summary.html.read_text()
    page = Page(html)
    assert_self_contained(page)
    anchors = {a.get("id") for a in page.with_tag("section")}
    assert anchors == {
        *("headline", "scores", "comparisons", "trade", "curves"),
        *("gallery", "geometry", "claims", "cost", "reproduce"),
    }
    for link in page.with_tag("a"):
        assert (link["href"] or "")[1:] in anchors
    assert "CLIP-RD does not beat CLIP-KD here" in page.text
    assert "[1] retrieval, standard: scenes/val, 1,000 images, 4,000 captions (all)" in page.text
    assert "clipdistill train --recipe clip-rd" in page.text
    assert "clip-rd-0-weights" in page.text  # the fingerprint of the weights
    assert "truncated image" in page.text
    assert summary.size == len(html.encode()) < 400_000
    assert "CLIP-RD does not beat CLIP-KD here" in summary.headline


def test_the_policy_names_exactly_our_style_and_script(demo: Demo) -> None:
    import base64
    import hashlib

    html = demo[1].html.read_text()
    [policy] = [m["content"] or "" for m in Page(html).with_tag("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert body
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


def test_what_users_write_stays_text(tmp_path: Path) -> None:
    folder = write_evil(tmp_path / "evil")
    summary = write_report([folder], tmp_path / "report.html", title="<script>alert('title')</script>")
    html = summary.html.read_text()
    page = Page(html)
    assert_self_contained(page)
    assert "<script>alert('title')</script>" in page.text
    assert "<script>alert('caption')</script>" in page.text
    assert not page.with_tag("img")
    assert SVG_EVIL not in html
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", summary.markdown.read_text())  # code is shown as it is
    assert "alert" in prose
    assert "<" not in prose


def test_csv_has_one_tidy_row_a_number(demo: Demo) -> None:
    rows = list(csv.DictReader(io.StringIO(demo[1].csv.read_text())))
    [found] = [r for r in rows if r["kind"] == "score" and r["model"] == "CLIP-RD" and r["measure"] == "t2i_R@1"]
    assert float(found["value"]) == 0.437
    assert float(found["retention"]) == pytest.approx(0.437 / 0.522)
    assert found["condition"] == "[1] retrieval, standard: scenes/val, 1,000 images, 4,000 captions (all)"
    assert {r["kind"] for r in rows} == {"score", "difference", "speed", "latency", "size", "cost"}
    differences = [r for r in rows if r["kind"] == "difference" and r["measure"] == "t2i_R@1 minus CLIP-KD"]
    assert [r["verdict"] for r in differences] == ["undecided"]


def test_csv_text_is_never_a_formula(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", "=cmd|' /C calc'!A0"), write_run(tmp_path / "b", "+1+1")]
    rows = list(csv.reader(io.StringIO(write_report(folders, tmp_path / "r.html").csv.read_text())))
    for row in rows[1:]:
        for cell in (row[1], row[3], row[4]):
            assert not cell.startswith(("=", "+", "-", "@"))


def test_markdown_tables_are_whole(demo: Demo) -> None:
    text = demo[1].markdown.read_text()
    for block in re.split(r"\n\n+", text):
        lines = block.splitlines()
        if lines and lines[0].startswith("|"):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
            assert len(widths) == 1, block
    assert "| CLIP-RD | 45.9 %, 42.8 to 49.0 (84 %) |" in text


def test_optional_parts_are_left_out_when_absent(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    for name in ("log.jsonl", "eval.jsonl", "bad_samples.jsonl"):
        (folder / name).unlink()
    page = Page(write_report([folder], tmp_path / "r.html").html.read_text())
    anchors = {a.get("id") for a in page.with_tag("section")}
    assert anchors == {"headline", "scores", "trade", "cost", "reproduce"}
    assert "No run recorded a sample that could not be used." in page.text


def test_several_runs_with_warnings_and_failures_of_the_benchmark(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    path = write_bench(folder / "bench.json", {"teacher": (10.0, 10.0), "rd": (30.0, 30.0)})
    bench = json.loads(path.read_text())
    bench["warnings"] = ["throttling: the machine itself became 20 % slower"]
    bench["failures"] = [{"model": "rd", "backend": "compile", "dtype": "float32", "reason": "no compiler"}]
    path.write_text(json.dumps(bench))
    text = Page(write_report([folder], tmp_path / "r.html").html.read_text()).text
    assert "Warning: throttling: the machine itself became 20 % slower" in text
    assert "Not measured: rd with compile (float32): no compiler" in text


def test_unknown_verdicts_of_claims_are_undecided(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    claims = [{"claim": "one", "verdict": "supported"}, {"claim": "two", "verdict": "proven!"}]
    (folder / "claims.json").write_text(json.dumps({"claims": claims}))
    page = Page(write_report([folder], tmp_path / "r.html").html.read_text())
    badges = [a["class"] for a in page.with_tag("span") if (a.get("class") or "").startswith("badge")]
    assert badges[-2:] == ["badge supported", "badge undecided"]


@pytest.mark.parametrize("name", ["bench.json", "gallery.json", "geometry.json", "claims.json"])
@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[]", b'{"claims": 3, "student": []}', b'{"a', b"\xff"])
def test_a_damaged_file_beside_a_run_is_told_and_the_report_is_made(
    tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "rd")
    (folder / name).write_bytes(content)
    assert main(["report", str(folder), "--out", str(tmp_path / "r.html")]) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ") and name in line]
    assert "left out" in told
    assert f"{folder / name}" in Page((tmp_path / "r.html").read_text()).text


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    (tmp_path / "r.html").mkdir()
    with pytest.raises(InputError, match="this is a folder; name a file"):
        write_report([folder], tmp_path / "r.html")
    with pytest.raises(InputError, match=r"a name that ends in \.html"):
        write_report([folder], tmp_path / "report.pdf")


@pytest.mark.parametrize("name", ["file/below/r.html", "dangling.html", "x" * 251 + ".html", "r.html"])
def test_a_place_that_cannot_be_written_is_refused_in_one_sentence(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "rd")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nowhere" / "deep")
    (tmp_path / "r.md").mkdir()
    assert main(["report", str(folder), "--out", str(tmp_path / name)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_of_stages_whose_list_is_damaged_is_shown_by_its_runs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "staged" / "one").parent
    (folder / "stages.json").write_bytes(b"\0" * 40)
    assert main(["report", str(folder), "--out", str(tmp_path / "r.html")]) == 0
    assert "stages.json: holds only NUL bytes" in Page((tmp_path / "r.html").read_text()).text


def test_a_killed_report_leaves_the_old_page_whole(tmp_path: Path) -> None:
    """Killed at any moment while it writes, the page, the Markdown and the CSV are each the old or the new one."""
    folder = write_run(tmp_path / "rd")
    out = tmp_path / "r.html"
    write_report([folder], out, title="old")
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("r.*")}
    code = (
        "import os, signal, sys, pathlib\n"
        "from clipdistill.report import report\n"
        "from clipdistill.runtime import files\n"
        "at, sync, seen = int(sys.argv[3]), files.sync, []\n"
        "def die(path):\n"
        "    seen.append(path)\n"
        "    if len(seen) == at: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    sync(path)\n"
        "files.sync = die\n"
        "report.write_report([sys.argv[1]], sys.argv[2], title='new')\n"
    )
    for moment in (1, 2, 4, 5, 6):  # each file is synced, then its folder
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(out), str(moment)], check=False)
        assert done.returncode == -9
        for name, content in whole.items():
            now = (tmp_path / name).read_bytes()
            assert now == content or (
                b"new" in now and now.rstrip().endswith((b"</html>", b"`", content[-20:].rstrip()))
            )
        assert out.read_text().rstrip().endswith("</html>")
    write_report([folder], out, title="new")
    assert "new" in out.read_text()


def test_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    before = write_report([folder], tmp_path / "report.html").html.read_text()
    (folder / "scores.json").write_text("broken")
    with pytest.raises(InputError):
        write_report([folder], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    folder = write_run(tmp_path / "rd", status="stopped")
    assert run(parser.parse_args([str(folder), "--out", str(tmp_path / "x.html")])) == 0
    printed = capsys.readouterr().out
    assert "CLIP-RD reaches text→image R@1 43.7 %" in printed
    assert "note: The run rd is not finished (status: stopped)" in printed
    assert "also x.md and x.csv" in printed
