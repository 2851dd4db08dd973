"""Command line of the stage: ``python -m alignrec.pretrain --help``."""

import sys

from alignrec.pretrain import STAGE
from alignrec.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE))
