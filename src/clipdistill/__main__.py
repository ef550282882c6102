"""`python -m clipdistill` is `clipdistill`."""

import os
import sys


def main() -> int:
    """The command line; Ctrl-C is one line from the first import on."""
    try:
        if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
            _in_utf8()
        from clipdistill.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("clipdistill: stopped", file=sys.stderr)
        return 130


def _in_utf8() -> None:
    """Begin again where Python was told that names of files are ASCII (LC_ALL=C, PYTHONUTF8=0): others could not be
    opened. What is printed keeps the terminal's encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    environment = {"PYTHONIOENCODING": encoding, **os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    sys.exit(main())
