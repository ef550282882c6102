"""The table of sub-commands, and the parser of each; a command's module is imported when it is asked for.

A command module has `add_arguments(parser)` and `run(arguments) -> int | None`. It imports torch and what needs it only
where something is computed: names, keys and files are looked at first, so that a mistake is told at once.
"""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import NoReturn

from clipdistill.errors import without_secrets

COMMANDS = {
    "demo": ("clipdistill.demo", "the whole way on built-in data: three students, measured and reported, in minutes"),
    "train": ("clipdistill.train.command", "distil a student from a teacher on your image-caption pairs"),
    "replay": ("clipdistill.train.replay_command", "run a captured non-finite step again and say where it begins"),
    "ablate": ("clipdistill.ablate.command", "variants of recipes times seeds, compared in pairs with intervals"),
    "regions": ("clipdistill.regions.command", "boxes and region teachers (DCLIP): detect, embed, measure, export"),
    "cache": ("clipdistill.cache.command", "compute a teacher's embeddings once, for any number of runs"),
    "embed": (
        "clipdistill.vectors.command",
        "embeddings of pictures or texts as .npy, Parquet, safetensors or LanceDB, with keys",
    ),
    "eval": (
        "clipdistill.evaluate.command",
        "measure retrieval, zero-shot classification and caption matching, under named protocols",
    ),
    "fetch": ("clipdistill.data.benchmarks.fetch", "bring published classification sets once, by name"),
    "probe": ("clipdistill.probe.command", "linear and few-shot probes of models on a labelled set"),
    "export": ("clipdistill.export.command", "write a model as ONNX, OpenVINO, int8, open_clip or Hugging Face files"),
    "compare": ("clipdistill.statistics.compare_command", "two models, or seeds of two methods, on the same queries"),
    "claims": ("clipdistill.statistics.claims_command", "claims judged: supported, contradicted or undecided"),
    "bench": ("clipdistill.bench.command", "measure throughput, latency and size"),
    "report": ("clipdistill.report.command", "one HTML page from any number of runs"),
    "search": ("clipdistill.search.command", "search a folder of photographs, student beside teacher"),
    "serve": ("clipdistill.serve.command", "a model as an HTTP service: embeddings and zero-shot classification"),
    "scenes": ("clipdistill.scenes.command", "write the built-in image-caption set to disk"),
    "list": ("clipdistill.listing", "recipes, students, towers, data sets and settings"),
    "completion": ("clipdistill.reference.completion", "completion of commands and options for bash and zsh"),
    "doctor": ("clipdistill.doctor", "check this machine and say what to do"),
}


class _Parser(argparse.ArgumentParser):
    """What it refuses is said without the passwords of URLs."""

    def error(self, message: str) -> NoReturn:
        super().error(without_secrets(message))


def command_parser(name: str) -> tuple[ModuleType, argparse.ArgumentParser]:
    """The module of a command and the parser of its arguments."""
    module_name, summary = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = _Parser(
        prog=f"clipdistill {name}", description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    parser.add_argument("--plugin", metavar="FILE.py", help="run a file first: it registers terms, formats, students")
    parser.add_argument("--local-cache", metavar="DIR", help="keep copies of remote shards here (docs/remote.md)")
    parser.add_argument("--local-cache-size", metavar="SIZE", help="of all copies together, for example 200GB")
    return module, parser
