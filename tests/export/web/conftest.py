"""The page's own modules run by Node, without a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import clipdistill.export.web

PAGE = Path(clipdistill.export.web.__file__).parent / "page"


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """node(program, values): `program` sees the page's modules beside it and `values`; what it returns comes back."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs Node")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    (folder / "package.json").write_text('{"type": "module"}')

    def run(code: str, values: Any) -> Any:
        given, main = folder / "given.json", folder / "main.js"
        given.write_text(json.dumps(values))
        main.write_text(
            'import { readFileSync } from "node:fs";\nconst values = JSON.parse(readFileSync("given.json", "utf8"));\n'
            + code
            + "\nconsole.log(JSON.stringify(await main(values)));\n"
        )
        done = subprocess.run([program, "main.js"], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run
