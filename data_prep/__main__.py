"""Command line of the stage: ``python -m data_prep --help``."""

import sys

from alignrec.stage import main
from data_prep import STAGE

if __name__ == "__main__":
    sys.exit(main(STAGE))
