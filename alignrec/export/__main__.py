"""Command line of the stage: ``python -m alignrec.export --help``."""

import sys

from alignrec.export import STAGE
from alignrec.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE))
