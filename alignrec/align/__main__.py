"""Command line of the stage: ``python -m alignrec.align --help``."""

import sys

from alignrec.align import STAGE
from alignrec.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE))
