"""A process that has imported everything and forks a child for each command: a run starts in milliseconds.

Reads one JSON object a line: {"start": [arguments], "environment", "folder", "log", "fault", "settings"} answers
{"pid"}; arguments that begin with a file .py run that program in the place of `clipdistill`;
{"wait": pid, "seconds"} answers {"code"} (null when it still runs, negative for the signal that ended it);
{"warm": [arguments]} runs a command in this process.
No gradient is computed before a fork: the threads of autograd and OpenMP do not survive one.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import traceback
from typing import Any


def _preload() -> None:
    import torch

    torch.set_num_threads(1)
    import clipdistill.cache.command
    import clipdistill.cli
    import clipdistill.demo
    import clipdistill.train.command
    import clipdistill.train.replay
    import clipdistill.train.stages  # noqa: F401


def _child(request: dict[str, Any]) -> int:
    from clipdistill import cli
    from tests.reliability import faults

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request.get("folder") or ".")
    os.environ.update({"COLUMNS": "1000", **request.get("environment", {})})  # nothing said is folded
    if request.get("fault"):
        getattr(faults, request["fault"])(**request.get("settings", {}))
    if request["start"][0].endswith(".py"):
        sys.argv = request["start"]
        sys.path.insert(0, request["folder"])
        runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    return cli.main(request["start"])


def _start(request: dict[str, Any]) -> dict[str, Any]:
    process = os.fork()
    if process:
        return {"pid": process}
    code = 1
    try:
        code = _child(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(process: int, seconds: float) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return {"code": os.waitstatus_to_exitcode(status)}
        if time.monotonic() >= end:
            return {"code": None}
        time.sleep(0.002)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _preload()
    answers.write('{"ready": true}\n')
    answers.flush()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "warm" in request:
            from clipdistill import cli

            answer = {"code": cli.main(request["warm"])}
        elif "start" in request:
            answer = _start(request)
        else:
            answer = _wait(request["wait"], request["seconds"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
