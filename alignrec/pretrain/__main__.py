"""Command line of the stage: ``python -m alignrec.pretrain --help``, ``... plan --help``."""

import sys

from alignrec.pretrain import STAGE
from alignrec.stage import main

if __name__ == "__main__":
    if sys.argv[1:2] == ["plan"]:
        from alignrec.pretrain import planning

        sys.exit(planning.main(sys.argv[2:]))
    sys.exit(main(STAGE))
