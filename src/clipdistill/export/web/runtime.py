"""onnxruntime-web, the files that run the towers in a browser: from a folder of npm, or fetched by npm once.

They come from the npm registry (40 MB), so they are no part of this package. What npm gives is compared with the
digest below before anything of it is used.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from clipdistill.errors import InputError, first_line
from clipdistill.runtime.console import say
from clipdistill.runtime.files import new_folder

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
"""Without and with WebGPU. The page loads three of them."""
_SECONDS = 600


def web_runtime(folder: Path | None = None) -> Path:
    """The folder with FILES: `folder` (or its dist/), else node_modules here or above, the user's cache, else by npm.

    Raises InputError where they are not to be had, with what to do.
    """
    if folder is not None:
        found = _in(folder)
        if found is None:
            raise InputError(f"{folder}: has not the files of {PACKAGE} ({', '.join(FILES)}): {_ADVICE}")
        return found
    for above in (Path.cwd(), *Path.cwd().parents):
        found = _in(above / "node_modules" / PACKAGE)
        if found is not None:
            return found
    cache = _cache()
    return _in(cache) or _fetch(cache)


_ADVICE = f"run  npm install {PACKAGE}@{VERSION}  in this folder, or name a folder that holds it with --web-runtime"


def copy_runtime(source: Path, target: Path) -> None:
    """Copy FILES into the new folder `target`, as .js: some hosts serve .mjs as something that browsers refuse."""
    target.mkdir()
    for name in FILES:
        shutil.copyfile(source / name, target / name.replace(".mjs", ".js"))
    shutil.copyfile(Path(__file__).with_name("onnxruntime-web.LICENSE"), target / "LICENSE")


def _in(folder: Path) -> Path | None:
    for place in (folder, folder / "dist", folder / "node_modules" / PACKAGE / "dist"):
        if all((place / name).is_file() for name in FILES):
            return place
    return None


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "clipdistill" / f"{PACKAGE}-{VERSION}"


def _fetch(cache: Path) -> Path:
    npm = shutil.which("npm")
    missing = f"the page needs {PACKAGE} {VERSION}, which is not on this machine"
    if npm is None:
        raise InputError(f"{missing}, and neither is npm to fetch it: install npm, then {_ADVICE}")
    say(f"{PACKAGE} {VERSION} is not on this machine: fetching it with npm (40 MB)")
    with tempfile.TemporaryDirectory(prefix="clipdistill-npm-") as temporary:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--silent"]
        try:
            done = subprocess.run(
                command,
                cwd=temporary,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"{missing}, and npm could not fetch it ({first_line(error)}): {_ADVICE}") from error
        packed = next(Path(temporary).glob("*.tgz"), None)
        if done.returncode != 0 or packed is None:
            reason = next((line for line in done.stderr.splitlines() if line.strip()), "it left no package")
            raise InputError(f"{missing}, and npm could not fetch it ({reason[:200]}): {_ADVICE}")
        if base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() != _SHA512:
            raise InputError(f"{missing}, and what npm fetched is something else (its digest does not fit)")
        cache.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(cache, lambda _: True, "copy of a package") as folder, tarfile.open(packed) as archive:
            for name in FILES:
                content = archive.extractfile(f"package/dist/{name}")
                assert content is not None
                (folder / name).write_bytes(content.read())
    return cache
