"""`clipdistill probe`: linear and few-shot probes of one or several models on a labelled set."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError, listed
from clipdistill.models.names import check_model_name
from clipdistill.runtime.console import say
from clipdistill.runtime.files import require_place, write_json

_USAGE = """
clipdistill probe runs/x ViT-B-16/laion400m_e32 --train cifar10_train.npz --test cifar10_test.npz
clipdistill probe runs/x --train folders/train --test folders/test --shots 1,4,16,all

A logistic regression on the pictures' embeddings; its strength is chosen on training pictures that are held out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, the two sets, shots."""
    parser.epilog = _USAGE
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="any name of a model; several for one table")
    add("--train", required=True, help="labelled set to train on (docs/data.md)")
    add("--test", required=True, help="labelled set of the same classes to measure on")
    add("--train-split", help="split of --train, where it has splits")
    add("--test-split", help="split of --test, where it has splits")
    add("--classes", help="file with the class names of both sets")
    add("--shots", default="all", help="pictures a class: numbers and 'all', separated by commas (default all)")
    add("--seeds", type=int, default=5, help="draws of the pictures for each number of shots (default 5)")
    add("--batch-size", type=int, default=256, help="pictures a forward pass (default 256)")
    add("--workers", type=int, help="processes that decode images (default: measured)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one)")
    add("--json", type=Path, help="write the results here")
    add("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    shots = _shots(arguments.shots)
    if arguments.seeds < 1 or arguments.batch_size < 1 or (arguments.workers or 0) < 0:
        raise InputError("probe: --seeds and --batch-size must be at least 1, --workers at least 0")
    for name in arguments.models:
        check_model_name(name)
    if arguments.json is not None:
        require_place(arguments.json, "probes", (b'"strengths"',))
    from clipdistill.data.open import open_labelled

    train = open_labelled(arguments.train, classes=arguments.classes, split=arguments.train_split)
    test = open_labelled(arguments.test, classes=arguments.classes, split=arguments.test_split)
    from clipdistill.probe.linear import ProbeResults, probe

    same = {name: getattr(arguments, name) for name in ("seeds", "batch_size", "workers", "device")}
    results: list[dict[str, Any]] = []
    table = ProbeResults().table()
    for name in arguments.models:
        found = probe(name, train, test, shots=shots, progress=not arguments.quiet, **same)
        found.model, table.title = name, found.table().title
        table.rows += found.table().rows
        results += ({"model": name, **asdict(result)} for result in found)
    table.print()
    for part in {train.name: train, test.name: test}.values():
        if part.problems:
            say(part.problems.sentence(part.name))
    if left_out := results[0]["left_out"]:
        key, reason = left_out[0]
        say(f"left out: {len(left_out)} pictures that cannot be read (the first, {key}: {reason})")
    if arguments.json is not None:
        write_json(arguments.json, {"train": train.name, "test": test.name, "results": results})
    return 0


def _shots(text: str) -> list[int | None]:
    found: list[int | None] = []
    for word in listed(text, "--shots"):
        if word != "all" and not (word.isdecimal() and int(word) > 0):
            raise InputError(f"--shots {text}: '{word}' is neither a number from 1 on nor 'all'")
        found.append(None if word == "all" else int(word))
    if len(set(found)) < len(found):
        raise InputError(f"--shots {text}: a number stands twice")
    return found
