"""`python -m clipdistill` is `clipdistill`."""

import sys

from clipdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
