"""Command line of the stage: ``python -m alignrec.graph --help``."""

import sys

from alignrec.graph import STAGE
from alignrec.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE))
