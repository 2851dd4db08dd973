"""Settings of data preparation, the section ``data_prep`` of a recipe (recipe -> all modules)."""

import dataclasses
import re
from typing import Literal

from alignrec import __version__
from alignrec.configuration import digest, option
from alignrec.errors import UserError
from data_prep import locations
from data_prep.columns import InteractionColumns as InteractionColumns
from data_prep.columns import ItemColumns as ItemColumns
from data_prep.locations import RawFile
from data_prep.sources import PUBLIC_SOURCES

Source = Literal["table", "amazon2014", "amazon2023", "movielens", "hm", "mmrec", "synthetic"]
Strategy = Literal["user_random", "user_time", "user_last_out", "global_time"]
# A name, or an IPv4 or IPv6 address; only a whole first label may be left open.
_HOST = re.compile(r"(\*\.)?[\w-]+(\.[\w-]+)*\.?|[0-9a-fA-F:]*:[0-9a-fA-F:.]*")
_KEEP_VERSIONS = 5
_MAX_REMOVED = 0.1
TIME_STRATEGIES: tuple[Strategy, ...] = ("user_time", "user_last_out", "global_time")


@dataclasses.dataclass(frozen=True)
class ItemsConfig:
    """The item table."""

    path: str | tuple[str, ...] = option(
        "", "parquet, CSV or JSON-lines file(s): path, glob, folder or fsspec URL, or a list"
    )
    columns: ItemColumns = option(
        ItemColumns(), "column mapping (source: table; a public dataset's adapter sets it)"
    )
    keep: Literal["all", "interacted"] = option(
        "all", "all items, or only those with an interaction left after cleaning"
    )


@dataclasses.dataclass(frozen=True)
class InteractionsConfig:
    """The interaction log and how it is cleaned."""

    path: str | tuple[str, ...] = option(
        "", "parquet, CSV or JSON-lines file(s): path, glob, folder or fsspec URL, or a list"
    )
    columns: InteractionColumns = option(
        InteractionColumns(), "column mapping (source: table; a public dataset's adapter sets it)"
    )
    min_rating: float | None = option(None, "drop interactions rated lower; null: keep all")
    duplicates: Literal["last", "first"] = option(
        "last", "which of a pair's interactions stays, by time and then by row of the log"
    )
    unknown_items: Literal["quarantine", "drop"] = option(
        "quarantine",
        "rows of items that the item table lacks: bad rows, or left out and only counted",
    )
    min_user_interactions: int = option(
        1, "iterative k-core: least interactions of a user that stays", minimum=1
    )
    min_item_interactions: int = option(
        1, "iterative k-core: least interactions of an item in the log", minimum=1
    )
    rows_per_task: int = option(
        2_000_000,
        "rows of the log that one task holds in memory (about 150 bytes each)",
        minimum=1,
        affects_result=False,
    )


def _is_host(text: str) -> bool:
    try:
        text.encode("idna")
    except UnicodeError:  # a label that is too long
        return False
    return _HOST.fullmatch(text) is not None


@dataclasses.dataclass(frozen=True)
class HttpConfig:
    """How pictures are fetched from http(s) addresses."""

    timeout_seconds: float = option(
        10.0, "longest wait for a connection and between two parts of an answer", minimum=0.1
    )
    total_seconds: float = option(
        60.0, "longest time for one picture, with its redirects, retries and waits", minimum=0.1
    )
    retries: int = option(
        4, "further attempts after a passing failure: 429, 5xx, time-out, reset", minimum=0
    )
    backoff_seconds: float = option(
        0.5, "wait before the first further attempt; it doubles with each", minimum=0.0
    )
    max_redirects: int = option(5, "redirects that are followed for one picture", minimum=0)
    connections_per_host: int = option(
        8, "connections that one worker has to one host at once", minimum=1
    )
    user_agent: str = option(
        f"alignrec/{__version__}", "how the program introduces itself; a host may want a contact"
    )

    def __post_init__(self) -> None:
        """Refuse a name that would break the header that carries it.

        Raises:
            UserError: it is empty or has other than printable ASCII characters.
        """
        if not (self.user_agent.isascii() and self.user_agent.isprintable() and self.user_agent):
            raise UserError(
                f"data_prep.images.http.user_agent={self.user_agent!r} cannot stand in a request: "
                f"hosts would refuse it. Use printable ASCII characters."
            )


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """How pictures are found, checked and made small."""

    root: str | None = option(
        None, "folder that relative picture paths start from; null: the item table's folder"
    )
    allowed_schemes: tuple[str, ...] = option(
        (), "URL schemes that picture references may have, e.g. [https, s3]; none by default"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "hosts of http(s) pictures, exact or *.example.com; empty: all with a public address",
    )
    private_hosts: tuple[str, ...] = option(
        (),
        "further hosts, exact names or addresses, whose address may be private: who answers for "
        "such a name decides which machine of your network is asked",
    )
    max_side: int = option(256, "longest side in pixels; larger pictures shrink", minimum=8)
    min_side: int = option(4, "pictures with a shorter side, in pixels, are refused", minimum=1)
    jpeg_quality: int = option(90, "quality of pictures that are encoded again", minimum=1)
    max_bytes: int = option(20_000_000, "largest picture file in bytes", minimum=1)
    max_pixels: int = option(
        50_000_000, "largest picture in pixels: a decompression bomb is refused", minimum=1
    )
    revision: str = option(
        "", "change it when pictures changed under the same names, so that they are read again"
    )
    read_threads: int = option(
        8, "pictures that one worker reads at once", minimum=1, affects_result=False
    )
    http: HttpConfig = option(HttpConfig(), "pictures from http(s)", affects_result=False)

    def __post_init__(self) -> None:
        """Refuse hosts that would never match.

        Raises:
            UserError: an entry is an address of a page or a pattern of other form.
        """
        for setting in ("allowed_hosts", "private_hosts"):
            exact = setting == "private_hosts"
            for host in getattr(self, setting):
                if not _is_host(host) or (exact and host.startswith("*")):
                    raise UserError(
                        f"data_prep.images.{setting}: {host!r} is no host name, so no picture "
                        f"would match it. Write images.example.com"
                        f"{'' if exact else ', *.example.com'} or an address, without scheme, "
                        f"port and path."
                    )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How texts are cleaned."""

    separator: str = option(" | ", "what stands between the text columns")
    max_title_characters: int = option(300, "longer titles are cut", minimum=1)
    max_column_characters: int = option(2000, "longer texts of one column are cut", minimum=1)


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """How interactions are divided into train, valid and test."""

    strategy: Strategy = option(
        "user_random", "random per user, by time per user, last two per user, or by global time"
    )
    held_out: float = option(
        0.2, "share of interactions for valid and test together", minimum=0.0, maximum=0.9
    )
    seed: int = option(0, "seed of the random split", minimum=0)


@dataclasses.dataclass(frozen=True)
class ShardsConfig:
    """How samples are packed."""

    max_samples: int = option(1000, "samples in a shard", minimum=1)


@dataclasses.dataclass(frozen=True)
class VersionsConfig:
    """A dataset that grows from run to run."""

    root: str | None = option(
        None,
        "folder of the versions, on storage that all hosts share; the output becomes a link to "
        "one of them; null: no versions, numbering starts at 0",
    )
    keep: int = option(
        _KEEP_VERSIONS,
        "newest versions that stay; older ones are deleted",
        minimum=1,
        affects_result=False,
    )
    max_removed_fraction: float = option(
        _MAX_REMOVED,
        "largest share of the items of the version before that may be gone: more looks like an "
        "export that was cut off",
        minimum=0.0,
        maximum=1.0,
        affects_result=False,
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work or would have no effect.

        Raises:
            UserError: naming the setting.
        """
        for setting, unset in (("keep", _KEEP_VERSIONS), ("max_removed_fraction", _MAX_REMOVED)):
            if self.root is None and getattr(self, setting) != unset:
                raise UserError(
                    f"data_prep.versions.{setting}={getattr(self, setting)} has no effect without "
                    f"versions: none are made. Set data_prep.versions.root or remove it."
                )
        if self.root is not None and (not self.root or "://" in self.root):
            raise UserError(
                f"data_prep.versions.root={self.root!r} is no folder: versions share files by hard "
                f"links and are moved by rename. Name a folder of a mounted file system."
            )


@dataclasses.dataclass(frozen=True)
class MMRecConfig:
    """A dataset in the format of MMRec: interactions and ready features."""

    interactions: str = option("", "the .inter file: userID itemID rating timestamp x_label")
    features: tuple[str, ...] = option(
        (), ".npy feature files, one row per item: they say how many items there are"
    )
    item_keys: str | None = option(
        None, "CSV of itemID and the catalogue's key; null: the key is the itemID"
    )


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """The built-in catalogue with planted factors."""

    num_items: int = option(600, "items", minimum=1)
    num_users: int = option(900, "users", minimum=1)
    clicks_per_user: int = option(12, "mean clicks of a user", minimum=1)
    seed: int = option(0, "seed of the catalogue", minimum=0)
    image_size: int = option(96, "side of the drawn pictures in pixels", minimum=8)


@dataclasses.dataclass(frozen=True)
class DataPrepConfig:
    """Settings of data preparation."""

    source: Source = option(
        "table",
        "table (your files), amazon2014, amazon2023, movielens or hm (a public "
        "dataset's own files), mmrec or synthetic",
    )
    items: ItemsConfig = option(ItemsConfig(), "the item table")
    interactions: InteractionsConfig = option(InteractionsConfig(), "the log and its cleaning")
    images: ImagesConfig = option(ImagesConfig(), "pictures")
    text: TextConfig = option(TextConfig(), "texts")
    split: SplitConfig = option(SplitConfig(), "train, valid and test")
    shards: ShardsConfig = option(ShardsConfig(), "packing of samples")
    versions: VersionsConfig = option(VersionsConfig(), "a dataset that grows from run to run")
    mmrec: MMRecConfig = option(MMRecConfig(), "files of MMRec's format (source: mmrec)")
    synthetic: SyntheticConfig = option(SyntheticConfig(), "sizes (source: synthetic)")
    max_bad_fraction: float = option(
        0.01,
        "largest share of bad items, pictures or interactions (each by itself)",
        minimum=0.0,
        maximum=1.0,
        affects_result=False,
    )
    num_cpus: int | None = option(
        None, "CPUs to use at most; null: all of Ray's", minimum=1, affects_result=False
    )
    object_store_bytes: int = option(
        200_000_000,
        "Ray's shared memory, where this command starts Ray itself",
        minimum=80_000_000,
        affects_result=False,
    )

    def __post_init__(self) -> None:
        """Set a public dataset's columns; refuse what is missing or would have no effect.

        Raises:
            UserError: naming the setting.
        """
        if self.source in PUBLIC_SOURCES:
            self._set_columns()
        if self.source in ("mmrec", "synthetic"):
            if self.items.path or self.interactions.path:
                raise UserError(
                    f"data_prep.items.path and interactions.path have no effect with source: "
                    f"{self.source}. Remove them, or set data_prep.source to table."
                )
        else:
            _require(self.items.path, "items.path", "the item table")
            _require(self.interactions.path, "interactions.path", "the interaction log")
        if self.source == "mmrec":
            _require(self.mmrec.interactions, "mmrec.interactions", "the .inter file")
            _require(self.mmrec.features, "mmrec.features", "the feature files")
            if self.versions.root is not None:
                raise UserError(
                    "data_prep.versions has no effect with source: mmrec, whose files say the "
                    "numbers of items and users. Remove it."
                )
        _require_used(self, "mmrec", MMRecConfig())
        _require_used(self, "synthetic", SyntheticConfig())
        columns = self.interactions.columns
        if self.interactions.min_rating is not None and columns.rating is None:
            raise UserError(
                "data_prep.interactions.min_rating needs ratings, but "
                + (
                    f"the log of source {self.source} has none. Remove it."
                    if self.source in PUBLIC_SOURCES
                    else "no column is named as one. Set data_prep.interactions.columns.rating."
                )
            )
        if (
            self.source == "table"
            and self.split.strategy in TIME_STRATEGIES
            and not (columns.timestamp)
        ):
            raise UserError(
                f"data_prep.split.strategy={self.split.strategy} needs times, but no column is "
                f"named as one. Set data_prep.interactions.columns.timestamp or use user_random."
            )
        if self.images.jpeg_quality > 95:
            raise UserError(
                f"data_prep.images.jpeg_quality={self.images.jpeg_quality} is above 95: files grow "
                f"and pictures do not gain. Set 95 or less."
            )

    def source_identity(self) -> str:
        """Return a digest of the raw files' paths, sizes and times of change.

        Raises:
            UserError: a file is missing.
        """
        if self.source == "synthetic":
            return digest("synthetic")
        if self.source == "mmrec":
            paths = [self.mmrec.interactions, *self.mmrec.features]
            paths += [self.mmrec.item_keys] if self.mmrec.item_keys else []
        else:
            files = [*self.item_files(), *self.interaction_files()]
            return digest([dataclasses.asdict(file) for file in files])
        return digest([dataclasses.asdict(file) for file in locations.find(paths)])

    def item_files(self) -> list[RawFile]:
        """Return the files of the item table.

        Raises:
            UserError: nothing is there.
        """
        files = locations.find(paths_of(self.items.path))
        if self.source not in PUBLIC_SOURCES:
            return files
        pictures = locations.absolute(self.images.root) if self.images.root else ""
        reader = PUBLIC_SOURCES[self.source].item_format
        return [dataclasses.replace(file, format=reader, pictures=pictures) for file in files]

    def interaction_files(self) -> list[RawFile]:
        """Return the files of the interaction log.

        Raises:
            UserError: nothing is there.
        """
        files = locations.find(paths_of(self.interactions.path))
        if self.source not in PUBLIC_SOURCES:
            return files
        reader = PUBLIC_SOURCES[self.source].interaction_format
        return [dataclasses.replace(file, format=reader) for file in files]

    def _set_columns(self) -> None:
        public = PUBLIC_SOURCES[self.source]
        for name, columns in (("items", public.items), ("interactions", public.interactions)):
            section = getattr(self, name)
            if section.columns not in (type(columns)(), columns):
                raise UserError(
                    f"data_prep.{name}.columns has no effect with source: {self.source}, whose "
                    f"columns are known. Remove it, or set data_prep.source to table."
                )
            object.__setattr__(self, name, dataclasses.replace(section, columns=columns))


def paths_of(path: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return one path or several as a tuple."""
    return (path,) if isinstance(path, str) else path


def _require(value: object, name: str, what: str) -> None:
    if not value:
        raise UserError(f"data_prep.{name} is required: {what}. Add it to the recipe.")


def _require_used(config: DataPrepConfig, source: str, unset: object) -> None:
    if config.source != source and getattr(config, source) != unset:
        raise UserError(
            f"section data_prep.{source} has no effect with source: {config.source}. Remove it, or "
            f"set data_prep.source to {source}."
        )
