"""What `pip install clipdistill` costs: seconds, and megabytes by package, in an environment made for it.

    python benchmarks/install.py                      # this working copy, from the configured index
    python benchmarks/install.py --extra export
    python benchmarks/install.py --index-url https://download.pytorch.org/whl/cpu   # torch without CUDA

The seconds are those of this machine and network (packages in pip's cache are not downloaded again).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = """
import importlib.metadata, json, os
found = {}
for each in importlib.metadata.distributions():
    paths = [str(each.locate_file(file)) for file in each.files or ()]
    found[each.metadata["Name"].lower()] = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
print(json.dumps(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", help="an extra of pyproject.toml, or several with commas")
    parser.add_argument("--index-url", help="index that torch and torchvision come from")
    parser.add_argument("--folder", type=Path, help="make the environment here and keep it (default: a temporary one)")
    parser.add_argument("--least", type=float, default=5.0, help="packages below so many MB are added up (default 5)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        began = time.perf_counter()
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        made = time.perf_counter()
        if options.index_url:
            subprocess.run([*pip, "torch", "torchvision", "--index-url", options.index_url], check=True)
        subprocess.run([*pip, f"{ROOT}[{options.extra}]" if options.extra else str(ROOT)], check=True)
        done = time.perf_counter()
        listed = subprocess.run([str(python), "-c", SIZES], check=True, capture_output=True, text=True).stdout
    sizes = {name: size / 1e6 for name, size in json.loads(listed).items() if name not in ("pip", "setuptools")}
    print(f"environment {made - began:.0f} s, packages {done - made:.0f} s; {len(sizes)} packages, MB on disk:")
    large = sorted((name for name in sizes if sizes[name] >= options.least), key=sizes.__getitem__, reverse=True)
    for name in large:
        print(f"{sizes[name]:8.0f}  {name}")
    print(f"{sum(sizes.values()) - sum(map(sizes.__getitem__, large)):8.0f}  {len(sizes) - len(large)} others")
    print(f"{sum(sizes.values()):8.0f}  together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
