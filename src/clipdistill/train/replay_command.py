"""`clipdistill replay`: a captured step of a run once more; what can be refused is refused before torch is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.runs.folder import RECIPE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and which of its captured steps."""
    parser.add_argument("run", type=Path, help="folder of a run whose step was skipped")
    parser.add_argument("--step", type=int, help="which captured step (default: the newest)")
    parser.add_argument("--device", help="cpu, cuda (default: the run's)")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; exit code 0, whatever it is."""
    if not (arguments.run / RECIPE).is_file():
        raise InputError(f"{arguments.run}: holds no run (there is no {RECIPE} in it)")
    if arguments.step is not None and arguments.step < 0:
        raise InputError(f"--step must be at least 0, got {arguments.step}")
    from clipdistill.train.replay import replay

    replay(arguments.run, arguments.step, device=arguments.device, say=print)
    return 0
