"""Command line of the stage: ``python -m alignrec.features --help``."""

import sys

from alignrec.features import STAGE
from alignrec.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE))
