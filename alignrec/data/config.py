"""Settings of where a dataset's shards are read from, for every stage that reads them."""

import dataclasses
import os
import re
from pathlib import Path

from alignrec.configuration import option
from alignrec.errors import UserError

_CACHE_BYTES = 20 * 2**30


@dataclasses.dataclass(frozen=True)
class ShardsConfig:
    """Shards beside the tables, or far away with a cache on this host."""

    root: str | None = option(
        None,
        "folder or URL (s3://, gs://, ...: what fsspec opens) that holds the dataset's shards/; "
        "without one they lie in the dataset's own folder and no cache is needed",
    )
    cache_folder: Path | None = option(
        None,
        "local folder for copies of shards, shared by the ranks and runs of a host; without one "
        "alignrec/shards in the user's cache",
    )
    cache_bytes: int = option(
        _CACHE_BYTES, "most that the copies take on a host; least recently used ones go", minimum=1
    )

    def __post_init__(self) -> None:
        """Refuse settings that have no effect, and credentials: manifests repeat the settings.

        Raises:
            UserError: a cache without a root, or a root with a user or password.
        """
        if re.search(r"://[^/]*@", self.root or ""):
            raise UserError(
                "shards.root has a user or password before the @, which would be written into "
                "manifests and logs. Leave it out of the URL and put it into fsspec's own "
                "configuration (~/.config/fsspec/*.json) or the store's environment variables."
            )
        if self.root is None and (self.cache_folder or self.cache_bytes != _CACHE_BYTES):
            raise UserError(
                "shards.cache_folder and shards.cache_bytes have no effect without shards.root: "
                "shards in the dataset's folder are read where they lie. Set shards.root or leave "
                "them out."
            )

    @property
    def folder(self) -> Path:
        """Where the copies go."""
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return (self.cache_folder or Path(base) / "alignrec" / "shards").expanduser()
