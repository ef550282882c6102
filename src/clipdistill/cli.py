"""The command line: parse, hand over, report errors in one sentence. The sub-commands are listed in commands.py."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence

from clipdistill.commands import COMMANDS, command_parser
from clipdistill.errors import ClipdistillError, InputError, nearest, storage_error, worker_lost
from clipdistill.registry import load_plugin
from clipdistill.runtime.console import say
from clipdistill.version import __version__

__all__ = ["COMMANDS", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 unusable input, others in docs/reliability.md)."""
    arguments = [_at_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    _usable_streams()
    try:
        for argument in arguments:
            if "\0" in argument:
                raise InputError(f"{argument!r:.200}: an option with a NUL: no file or setting has one in it")
        _refuse_empty(arguments)
        return _dispatch(arguments)
    except ClipdistillError as error:
        told = error if error.exit_code > 2 else storage_error(error) or error
        say(f"clipdistill: {told}", sys.stderr)
        return told.exit_code
    except KeyboardInterrupt:
        print("clipdistill: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left (`clipdistill list students | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        known = storage_error(error) or worker_lost(error) or _place_error(error)
        if known is None:
            raise
        say(f"clipdistill: {known}", sys.stderr)
        return known.exit_code


def _usable_streams() -> None:
    """Output that is closed is dropped; what the terminal's encoding lacks (or a name that is not UTF-8) is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _at_home(argument: str) -> str:
    """`--out=~/x` and `key=~/x`, which shells leave as they are, mean the home folder."""
    found = re.match(r"((?:--)?[\w.-]+=)?(~/.*)", argument, re.DOTALL)
    return (found[1] or "") + os.path.expanduser(found[2]) if found else argument  # noqa: PTH111 - no home is no error


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise InputError for an empty value: as a path it would be the folder one is in (`--out "$UNSET"`)."""
    for before, argument in zip(["", *arguments], arguments):
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            name = argument.rstrip("=") or (before if before.startswith("--") else "an argument")
            raise InputError(f"{name}: the value is empty: leave it out, or say what is meant")


def _place_error(error: BaseException) -> ClipdistillError | None:
    """The last resort for a place that cannot be read or written and that nobody looked at before: one sentence.

    And for memory that the system does not give.
    """
    if isinstance(error, MemoryError) or "failed to map segment" in str(error):
        return ClipdistillError("there is no more memory for this process: see  free -m  and  ulimit -v")
    if isinstance(error, UnicodeEncodeError):
        return InputError(f"{error.object!a:.200}: a name that this locale cannot write: set PYTHONUTF8=1")
    if not isinstance(error, OSError) or isinstance(error, ConnectionError):
        return None
    if error.filename is None:
        try:
            os.getcwd()  # noqa: PTH109
        except FileNotFoundError:
            return InputError("the folder that this was started in is not there any more: go to another one")
        return None
    return InputError(f"{error.filename}: cannot be read or written ({error.strerror}): choose another place")


def _dispatch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="clipdistill",
        description="Distil large CLIP models into small, fast ones, prove what was kept, and ship them.",
        epilog="commands:\n" + "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="clipdistill COMMAND [options]   (clipdistill COMMAND --help explains one)",
    )
    parser.add_argument("--version", action="version", version=f"clipdistill {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=argparse.SUPPRESS)
    known, rest = parser.parse_known_args(arguments[:1])
    if known.command is None:
        parser.print_help()
        return 0 if not arguments else 2
    if known.command not in COMMANDS:
        print(f"clipdistill: unknown command '{known.command}'{nearest(known.command, COMMANDS)}", file=sys.stderr)
        return 2
    rest, (plugins, folder, size) = _without_shared(rest + arguments[1:])
    for path in plugins:
        load_plugin(path)
    if folder or size or any("pipe:" in argument for argument in rest):
        importlib.import_module("clipdistill.remote").typed(rest, folder, size)
    module, command = command_parser(known.command)
    parsed = command.parse_intermixed_args(rest)
    _tell_repeated(command, rest)
    parsed.plugins = plugins
    return int(module.run(parsed) or 0)


def _tell_repeated(command: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Say that of an option that takes one value, or of a setting, the last is taken where it is given again."""
    actions = [action for action in command._actions if type(action) is argparse._StoreAction]
    single = {option for action in actions if action.nargs is None for option in action.option_strings}
    settings = any(action.dest in ("settings", "plan") for action in actions)
    names = (word.partition("=")[0] for word in words if word.startswith("--") or (settings and "=" in word))
    for name, times in Counter(names).items():
        if times > 1 and (name in single or not name.startswith("--")):
            say(f"{name} is given {times} times: the last is taken", sys.stderr)


def _without_shared(arguments: list[str]) -> tuple[list[str], list[list[str]]]:
    """The arguments without the options of every command, and the values of those: what a plug-in registers can be
    named in the others."""
    rest, waiting = [], iter(arguments)
    shared: dict[str, list[str]] = {"--plugin": [], "--local-cache": [], "--local-cache-size": []}
    for argument in waiting:
        name, separator, value = argument.partition("=")
        if name in shared:
            shared[name].append(value if separator else next(waiting, ""))
            if not shared[name][-1] or shared[name][-1].startswith("--"):
                raise InputError(f"{name}: its value is missing")
        else:
            rest.append(argument)
    return rest, list(shared.values())


if __name__ == "__main__":
    sys.exit(main())
