"""`clipdistill train`: settings from the recipe, the options and `key=value` assignments, then `distill`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.recipes import load_recipe
from clipdistill.registry import TRIALS
from clipdistill.train.config import check_names, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options a run usually needs; everything else is a setting of the recipe, given as key=value."""
    add = parser.add_argument
    add("--recipe", required=True, help="a shipped recipe (clipdistill list recipes) or a YAML file")
    add_shared_arguments(parser)
    add("--teacher", help="a model name or path; several, separated by commas, for an ensemble")
    add("--student", help="an architecture (clipdistill list students), or inherit:...")
    add("--student-weights", help="a checkpoint to start the student from")
    add("--out", help="folder of the run; an interrupted run there is continued")
    add("--name", help="name in reports (default: the folder's)")
    add("--tensorboard", action="store_true", default=None, help="write TensorBoard scalars too")
    add("--wandb", metavar="PROJECT", help="log to this Weights & Biases project too")
    add("--mlflow", metavar="EXPERIMENT", help="log to this MLflow experiment too")
    add("--callback", action="append", default=None, metavar="NAME", help="a registered callback (repeatable)")
    add(
        "--explain",
        action="store_true",
        help="print the objective, its initial magnitudes and the worked-out settings; stop",
    )
    add("--dry-run", action="store_true", help="ten steps without a trace: pairs a second, memory, time of the whole")
    add("--gpus", type=int, metavar="N", help="train on N GPUs of this machine (as torchrun --nproc-per-node N)")
    add("--allow-changes", action="store_true", help="continue a run although its settings were changed")
    add("--quiet", action="store_true", help="no progress on the terminal")
    add("settings", nargs="*", metavar="key=value", help="any setting: train.batch_size=256 objective.weights.xrd=0")


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that `clipdistill ablate` has too: for all runs the same."""
    add = parser.add_argument
    add("--size", help="a named size of the recipe; every recipe has 'debug', which runs in seconds")
    add("--data", help="training pairs: a file, folder, pattern of tars, hf:owner/name or scenes")
    add("--split", help="split of the training data, where the format has splits")
    add("--image-root", help="folder of the images, where the data file does not say")
    add("--validation", help="pairs to measure retrieval on, during and after training")
    add("--validation-split", help="split of the validation data (default: val when the format has splits)")
    add("--zero-shot", action="append", default=None, help="a labelled set to classify at the end (repeatable)")
    add("--protocol", choices=("standard", "first-caption"), help="retrieval protocol (docs/protocols.md)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Resolve the configuration and train."""
    if arguments.gpus is not None and "WORLD_SIZE" not in os.environ:
        on_gpus(arguments.gpus)
    if arguments.explain and arguments.dry_run:
        raise InputError("--explain and --dry-run: the one takes no step, the other takes ten: leave one of them out")
    named = (arguments.recipe, settings_of(arguments))
    options = {key: getattr(arguments, key) for key in ("allow_changes", "explain", "quiet")}
    # everything that can be refused without torch is refused before it is imported
    if "stages" in load_recipe(arguments.recipe, arguments.size):
        from clipdistill.train.stages import distill_stages, resolve_stages

        if arguments.dry_run:
            raise InputError(f"--dry-run: recipe {arguments.recipe} has several stages: try one of them as a recipe")
        stages = resolve_stages(*named, size=arguments.size, assignments=arguments.settings)
        runs = distill_stages(stages, **options)
        if not runs:
            return 0
        finished = runs[-1]
    else:
        config = resolve(*named, size=arguments.size, assignments=arguments.settings)
        check_names(config)
        if arguments.dry_run:
            print(TRIALS.get("dry run")(config))
            return 0
        from clipdistill.train.run import distill

        finished = distill(config, **options)
    if finished.scores is not None and not arguments.quiet:
        finished.scores.print()
    if not arguments.explain and not arguments.quiet:
        print(f"student: {finished.student}")
    return 0


def on_gpus(count: int) -> None:
    """Become torchrun with `count` processes of this same command. Raises InputError when there are fewer GPUs."""
    if count < 1:
        raise InputError(f"--gpus must be at least 1, got {count}")
    from torch.cuda import device_count

    if count > device_count():
        raise InputError(f"--gpus {count}: this machine has {device_count()} that torch can use")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    os.execv(sys.executable, [*words, "-m", "clipdistill.cli", *sys.argv[1:]])


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as nested settings; options not given are left to the recipe."""
    settings: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("teacher", "student", "student_weights", "name", "device", "tensorboard", "wandb", "mlflow")
        if getattr(arguments, name, None) is not None  # other commands have some of these options
    }
    if arguments.out is not None:
        settings["out"] = str(Path(arguments.out))
    elif getattr(arguments, "explain", False) or getattr(
        arguments, "dry_run", False
    ):  # nothing is written there but the embeddings of regions
        settings["out"] = str(Path(tempfile.gettempdir()) / f"clipdistill-explain-{os.getpid()}")
    if getattr(arguments, "callback", None):
        settings["callbacks"] = arguments.callback
    plugins = getattr(arguments, "plugins", [])
    if plugins:
        settings["plugins"] = [str(Path(path).expanduser().resolve()) for path in plugins]
    for key, name, split in (
        ("data", arguments.data, arguments.split),
        ("validation", arguments.validation, arguments.validation_split),
    ):
        if name is not None:
            values = {"split": split, "image_root": arguments.image_root}
            settings[key] = {"path": name} | {k: v for k, v in values.items() if v is not None}
        elif split is not None:
            option = "--split" if key == "data" else "--validation-split"
            raise InputError(
                f"{option} {split}: goes with --{key}; a split of the recipe's own set is {key}.split={split}"
            )
    if arguments.image_root is not None and arguments.data is arguments.validation is None:
        raise InputError(f"--image-root {arguments.image_root}: goes with --data or --validation")
    evaluation = {"zero_shot": arguments.zero_shot, "protocol": arguments.protocol}
    evaluation = {k: v for k, v in evaluation.items() if v is not None}
    if evaluation:
        settings["evaluation"] = evaluation
    return settings
