"""Command line of the stage: ``python -m alignrec.evaluation --help``."""

import sys

from alignrec.evaluation import STAGE
from alignrec.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE))
