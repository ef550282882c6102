"""Hostile run folders: nothing in them becomes markup, script or a request in the report, as a browser shows it."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from clipdistill.report.report import write_report
from tests.browser import Browser, needs_chromium
from tests.report.synthetic import data_uri, picture, write_evil
from tests.security.conftest import Fence

SET_TITLE = "document.title='owned'"
PAYLOADS = [
    f"<script>{SET_TITLE}</script>",
    f"</script><script>{SET_TITLE}</script>",
    f"</title></style></textarea></template><svg onload={SET_TITLE}>",
    f"<img src=x onerror={SET_TITLE}>",
    f'"><img src=x onerror={SET_TITLE}>',
    f"' onmouseover={SET_TITLE} x='",
    f"javascript:{SET_TITLE}",
    f"data:text/html,<script>{SET_TITLE}</script>",
    "--></style><!--<script>",
    "{{ 4242*2 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    f"]]><![CDATA[<script>{SET_TITLE}</script>",
    "\u2028\u2029\u202e</ScRiPt\x00><ScRiPt>" + SET_TITLE + "</sCrIpT>",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<link rel=stylesheet href=//evil.example/x><base href=//evil.example/>",
    "<meta http-equiv=refresh content='0;url=//evil.example/'>",
]
SVG = f"<svg xmlns='http://www.w3.org/2000/svg' onload=\"{SET_TITLE}\"><script>{SET_TITLE}</script></svg>"
THUMBNAILS = {
    "svg": "data:image/svg+xml;base64," + base64.b64encode(SVG.encode()).decode(),
    "svg as png": "data:image/png;base64," + base64.b64encode(SVG.encode()).decode(),
    "script": f"javascript:{SET_TITLE}",
    "page": f"data:text/html,<script>{SET_TITLE}</script>",
    "elsewhere": "https://evil.example/pixel.png",
    "file": "file:///etc/passwd",
    "breaking out": f'data:image/png;base64,AAAA" onerror="{SET_TITLE}',
    "good": data_uri(picture(1)),
}


def spread(value: object, texts: list[str], path: str = "") -> object:
    """Every free text of a JSON value replaced by a payload, names and numbers that the reader needs kept."""
    if isinstance(value, dict):
        return {key: spread(item, texts, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [spread(item, texts, path) for item in value]
    free = ("text", "why", "selection", "claim", "evidence", "command", "data", "student", "key", "reason")
    if isinstance(value, str) and path.rpartition(".")[2] in free:
        texts.append(value)
        return PAYLOADS[len(texts) % len(PAYLOADS)] + f" {len(texts)}"
    return value


def hostile_run(folder: Path) -> Path:
    """The run of the report's own tests whose every text is an attack, with many more kinds of attack."""
    write_evil(folder)
    texts: list[str] = []
    for name in ("run.json", "gallery.json", "claims.json"):
        content = spread(json.loads((folder / name).read_text()), texts)
        assert isinstance(content, dict)
        if name == "gallery.json":
            content["thumbnails"] |= THUMBNAILS
            for key in THUMBNAILS:
                answers = {"teacher": [{"key": key, "score": 0.5, "hit": True}]}
                content["queries"].append({"kind": "t2i", "text": f"<b>{key}</b>", "truth": key, "models": answers})
        (folder / name).write_text(json.dumps(content))
    rows = [{"key": f"{text}.jpg", "reason": f"truncated image: {text}"} for text in PAYLOADS]
    (folder / "bad_samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text("objective: !!python/object/apply:os.system ['true']\n" + "\n".join(PAYLOADS))
    assert len(texts) > 30
    return folder


class Page(HTMLParser):
    """Scripts, event handlers and addresses that a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts, self.handlers, self.addresses, self.tags = 0, [], [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.scripts += tag == "script"
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        addresses = ("href", "src", "action", "formaction", "xlink:href", "srcdoc", "data", "poster", "background")
        self.addresses += [value or "" for name, value in attributes if name in addresses]


def test_nothing_of_a_run_folder_becomes_markup(fence: Fence) -> None:
    page = fence.inside / "report.html"
    write_report([hostile_run(fence.inside / "run")], page, title=PAYLOADS[0])
    text = page.read_text()
    found = Page(text)
    assert found.scripts == 1
    assert found.handlers == []
    assert not found.tags & {"iframe", "object", "embed", "base", "form", "foreignobject", "animate", "set"}
    for address in found.addresses:
        assert re.fullmatch(r"#[\w-]+|data:image/(jpeg|png);base64,[\w+/=]+", address), address[:80]
    assert len([a for a in found.addresses if a.startswith("data:")]) >= 1
    assert "owned" in text  # as text
    assert "evil.example/" in text
    assert "{{ 4242*2 }}" in text  # a template in a text is not run
    assert "8484" not in text
    assert {path.name.partition(".")[0] for path in fence.inside.iterdir()} == {"report", "run"}


@needs_chromium
def test_nothing_of_a_run_folder_runs_in_a_browser(fence: Fence) -> None:
    """Shown as it is, and without its content policy (so that escaping alone must hold)."""
    page, bare = fence.inside / "report.html", fence.inside / "bare.html"
    write_report([hostile_run(fence.inside / "run")], page)
    bare.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text()))
    assert len(bare.read_text()) < len(page.read_text())
    with Browser(fence.inside / "profile") as browser:
        for shown in (page, bare):
            browser.open(shown.as_uri())
            browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
            browser.evaluate(
                "document.querySelectorAll('body *').forEach(e => {"
                " for (const kind of ['mouseover', 'mouseenter', 'pointerenter', 'focus'])"
                " e.dispatchEvent(new Event(kind, {bubbles: true})); })"
            )
            browser.evaluate("new Promise(done => setTimeout(done, 200))")
            assert "owned" not in browser.evaluate("document.title").replace(SET_TITLE, "")
            assert browser.evaluate("document.scripts.length") == 1
            assert (
                browser.evaluate(
                    "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
                )
                == 0
            )
        assert not [line for line in browser.console if "CSP" in line or "Content Security" in line]
