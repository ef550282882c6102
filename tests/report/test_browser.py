"""The page as a browser shows it: skipped where no Chromium is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clipdistill.report.report import ReportSummary, write_report
from tests.report.synthetic import write_evil

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

# runs inside each framed page and sends what it sees to the page around it
MEASURE = """<script>addEventListener("load", function () {
  var root = document.documentElement, wide = [], small = 99;
  document.querySelectorAll("body *").forEach(function (e) {
    var box = e.getBoundingClientRect();
    if (e.closest(".scroll, .strip, .store, svg") || box.width === 0) return;
    if (box.right > innerWidth + 1 || box.left < -1) wide.push(e.tagName + "." + e.className);
  });
  document.querySelectorAll(".chart text").forEach(function (t) {
    var svg = t.ownerSVGElement, scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    if (scale > 0) small = Math.min(small, parseFloat(getComputedStyle(t).fontSize) * scale);
  });
  var colours = ["light", "dark"].map(function (theme) {
    root.setAttribute("data-theme", theme);
    var body = getComputedStyle(document.body), tick = document.querySelector(".chart .ticks text");
    return [body.backgroundColor, body.color, getComputedStyle(tick).fill];
  });
  var point = document.querySelector("#trade .hover"), tip = document.getElementById("tip");
  point.dispatchEvent(new PointerEvent("pointerenter", {clientX: 50, clientY: 50}));
  var seen = Array.from(document.querySelectorAll(".thumb use")).filter(function (u) {
    return u.getBoundingClientRect().width > 0;
  });
  parent.postMessage({
    name: window.name, inner: innerWidth, scroll: root.scrollWidth, wide: wide, small: small, colours: colours,
    tip: tip.textContent, shown: getComputedStyle(tip).visibility, pictures: seen.length,
    titles: document.querySelectorAll("svg .hover > title").length, button: !document.getElementById("theme").hidden,
    scripts: document.querySelectorAll("script").length, alerts: window.alerts || 0
  }, "*");
});</script></body>"""

AROUND = """<!doctype html><body><pre id="measured"></pre><script>
var all = {};
addEventListener("message", function (event) {
  all[event.data.name] = event.data;
  document.getElementById("measured").textContent = JSON.stringify(all);
});
</script>%s</body>"""


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """(the page's document after its scripts ran, what the browser logged)."""
    assert CHROMIUM is not None
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"]
    command += [
        *quiet,
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        "--window-size=1200,1400",
        "--virtual-time-budget=20000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    """What the page itself wrote to the console, refusals of the content policy included."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


class Finder(HTMLParser):
    """The text of the element with id "measured"."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self._inside = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = ("id", "measured") in attributes

    def handle_data(self, data: str) -> None:
        self.found += data if self._inside else ""


def test_the_page_runs_under_its_own_policy_without_a_complaint(
    demo: tuple[list[Path], ReportSummary], tmp_path: Path
) -> None:
    document, log = browse(demo[1].html, tmp_path / "profile")
    assert console(log) == []
    assert 'id="tip"' in document  # the script ran
    assert "data-tip=" in document
    for anchor in ("scores", "comparisons", "trade", "curves", "gallery", "geometry", "claims", "cost", "reproduce"):
        assert f'<section id="{anchor}"' in document


def framed(html: str, path: Path) -> None:
    """The page without its policy (which would refuse the measuring script), counting every alert."""
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    hook = "<head><script>window.alert = function () { window.alerts = (window.alerts || 0) + 1; };</script>"
    path.write_text(open_page.replace("<head>", hook, 1).replace("</body>", MEASURE))


def test_it_fits_a_phone_and_a_desk_and_hostile_texts_do_nothing(
    demo: tuple[list[Path], ReportSummary], tmp_path: Path
) -> None:
    framed(demo[1].html.read_text(), tmp_path / "demo.html")
    framed(write_report([write_evil(tmp_path / "evil")], tmp_path / "e.html").html.read_text(), tmp_path / "evil.html")
    frames = [("phone", "demo.html", 390), ("desk", "demo.html", 1200), ("evil", "evil.html", 390)]
    tags = "".join(f'<iframe name="{n}" src="{f}" width="{w}" height="1400"></iframe>' for n, f, w in frames)
    around = tmp_path / "around.html"
    around.write_text(AROUND % tags)
    document, log = browse(around, tmp_path / "profile")
    assert console(log) == []
    results = json.loads(Finder(document).found)
    assert set(results) == {"phone", "desk", "evil"}
    for name, _, width in frames:
        result = results[name]
        assert result["inner"] == width
        assert result["scroll"] <= width
        assert result["wide"] == []
        assert result["small"] >= 9  # pixels, of the smallest text in a chart
        light, dark = result["colours"]
        assert all(a != b for a, b in zip(light, dark))
        assert result["shown"] == "visible"
        assert result["titles"] == 0  # all became tips
        assert result["button"]
        assert result["scripts"] == 3  # ours, and the two of this test
        assert result["alerts"] == 0
    assert "Text→image R@1" in results["phone"]["tip"]
    assert results["phone"]["pictures"] > 80
