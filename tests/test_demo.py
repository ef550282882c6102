"""The demo from start to end, with a handful of steps."""

import json

from clipdistill import demo
from clipdistill.cli import main


def test_the_demo_trains_measures_and_reports(tmp_path, capsys):
    out = tmp_path / "demo"
    small = ["train.steps=4", "train.batch_size=32", "data.size=64", "validation.size=24", "train.evaluate_every=2"]
    small += ["--seconds", "0.05", "preflight.samples=8", "--recipes", "clip,clip-rd"]  # as CLIP-KD, with more terms
    assert demo.RECIPES == ("clip", "clip-kd", "clip-rd")
    assert main(["demo", "--out", str(out), *small]) == 0
    shown = capsys.readouterr().out
    assert "report.html" in shown
    for recipe in ("clip", "clip-rd"):
        folder = out / recipe
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert json.loads((folder / "bench.json").read_text())
        assert json.loads((folder / "gallery.json").read_text())
        assert "student" in json.loads((folder / "geometry.json").read_text())
    budgets = {
        (described["steps"], described["samples_seen"], described["seed"], described["student"])
        for described in (json.loads((out / r / "run.json").read_text()) for r in ("clip", "clip-rd"))
    }
    assert budgets == {(4, 128, 0, "scenes-student")}
    page = (out / "report.html").read_text()
    assert "<img" in page or "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    # a second call finds everything done
    assert main(["demo", "--out", str(out), *small]) == 0
