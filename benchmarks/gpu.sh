#!/bin/sh
# On a machine with a GPU, within 8 minutes: tests, recipes, speeds, the objective's table. In the Python that is there,
# or PYTHON=..., with  pip install '.[dev,benchmarks]'  (make test-gpu sees to it); further options are those of gpu.py
# (--device cpu --small shows that the calls run).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" benchmarks/gpu.py --json docs/performance/gpu.json "$@"
