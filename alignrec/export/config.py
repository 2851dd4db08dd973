"""Settings of the export stage (section ``export`` of a recipe)."""

import dataclasses
import re

from alignrec.configuration import option
from alignrec.errors import UserError


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What the bundle holds."""

    top_k: int = option(50, "recommended items of each user", minimum=1)
    block_users: int = option(
        1024, "users scored at a time; memory is this times items", minimum=1, affects_result=False
    )
    mmrec: bool = option(default=False, help="also write the files that MMRec reads")
    mmrec_name: str = option("alignrec", "name of the MMRec data set: <name>.inter")

    @property
    def uses_gpu(self) -> bool:
        """Whether a GPU would be of use."""
        return False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.mmrec_name):
            raise UserError(
                f"export.mmrec_name={self.mmrec_name!r} cannot be a file name everywhere. Use "
                f"letters, digits, dots, hyphens and underscores."
            )
