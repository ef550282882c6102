"""The search page as a browser shows it: skipped where no Chromium is installed."""

from __future__ import annotations

import threading
from pathlib import Path

from clipdistill.search.collection import Collection
from clipdistill.search.server import SearchServer
from tests.browser import OVERFLOW, Browser, needs_chromium
from tests.search.conftest import HOSTILE

pytestmark = needs_chromium


def test_a_search_in_the_browser(collection: Collection, tmp_path: Path) -> None:
    with SearchServer(collection) as server, Browser(tmp_path / "profile") as browser:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        browser.open(server.url, width=390, height=800)
        assert browser.evaluate("document.querySelectorAll('.offered img').length") == 21
        assert browser.evaluate(OVERFLOW) == {"inner": 390, "scroll": 390, "wide": []}

        # typed and sent: student beside teacher, with times
        browser.evaluate("document.getElementById('q').value = 'a red circle'")
        browser.after(lambda: browser.evaluate("document.querySelector('form').requestSubmit()"))
        assert browser.evaluate("document.title").startswith("a red circle · ")
        assert browser.evaluate("[...document.querySelectorAll('.side h2')].map(e => e.textContent)") == [
            "Student",
            "Teacher",
        ]
        times = browser.evaluate("[...document.querySelectorAll('.time')].map(e => parseFloat(e.textContent))")
        assert len(times) == 2
        assert min(times) > 0
        said = browser.evaluate("document.getElementById('comparison').textContent")
        assert "as fast as" in said or "cannot be told" in said
        assert "found by both" in said
        browser.until("[...document.querySelectorAll('.hit img')].every(e => e.complete && e.naturalWidth > 0)")
        for width, dark in ((390, False), (390, True), (1200, True), (1200, False)):
            browser.open(f"{server.url}?q=a+red+circle", width=width, height=900, dark=dark)
            assert browser.evaluate(OVERFLOW) == {"inner": width, "scroll": width, "wide": []}
            lefts = browser.evaluate(
                "[...document.querySelectorAll('.side')].map(e => Math.round(e.getBoundingClientRect().left))"
            )
            assert lefts[0] < lefts[1]  # beside each other, on the phone too
            colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, colour[4:-1].split(","))) < 150) == dark

        # a large picture on a click, closed again
        browser.evaluate("document.querySelector('a.picture').click()")
        browser.until("document.querySelector('#large img').naturalWidth > 0")
        assert browser.evaluate("document.getElementById('large').open")
        browser.evaluate("document.querySelector('#large button').click()")
        browser.until("!document.getElementById('large').open")

        # a picture from the disk
        browser.after(lambda: browser.choose("#file", collection.folder / "scene-03.png"))
        first = browser.evaluate("document.querySelector('.teacher .picture').dataset.name")
        assert first == "scene-03.png"

        # a hostile name shows as text
        number = collection.paths.index(HOSTILE)
        browser.open(f"{server.url}?like={number}")
        assert HOSTILE in browser.evaluate("document.querySelector('.asked').textContent")
        browser.evaluate("document.getElementById('theme').click()")
        assert browser.evaluate("document.documentElement.dataset.theme") == "light"
        assert browser.console == []

        # what is no picture is said so (the refusal itself is logged by the browser)
        browser.choose("#file", collection.folder / "broken.jpg")
        browser.until("document.getElementById('problem').textContent.includes('cannot be read')")
        server.shutdown()
