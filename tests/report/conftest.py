"""One made-up demo, written and reported once for all tests that only look at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipdistill.report.report import ReportSummary, write_report
from tests.report.synthetic import write_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], ReportSummary]:
    """The demo's run folders and the report on them. Do not change them."""
    folder = tmp_path_factory.mktemp("demo")
    runs = write_demo(folder)
    return runs, write_report(runs, folder / "report.html", title="A test report")
