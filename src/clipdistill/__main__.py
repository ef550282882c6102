"""`python -m clipdistill` is `clipdistill`."""

import sys


def main() -> int:
    """The command line; Ctrl-C is one line from the first import on."""
    try:
        from clipdistill.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("clipdistill: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
