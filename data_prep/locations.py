"""Where raw files lie: paths, globs, folders and fsspec URLs in, one record per file out."""

import dataclasses
import os
import posixpath
from collections.abc import Iterable
from typing import IO, Any

import fsspec

from alignrec.configuration import nearest
from alignrec.errors import UserError

_TABLE_SUFFIXES = (".parquet", ".pq", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


@dataclasses.dataclass(frozen=True)
class RawFile:
    """One file of the raw data and the state that it is in.

    Attributes:
        url: absolute path or URL, as fsspec opens it.
        size: bytes; -1 where the server does not say.
        state: time of change or ETag, where there is one.
        format: name of an adapter's reader; empty: the suffix says the format.
        pictures: folder of the items' pictures, for adapters that look what is there.
    """

    url: str
    size: int
    state: str
    format: str = ""
    pictures: str = ""

    @property
    def suffix(self) -> str:
        """Suffix that says the format, without that of a compression."""
        stem, suffix = posixpath.splitext(self.url)
        return posixpath.splitext(stem)[1] if suffix in COMPRESSIONS else suffix

    @property
    def compression(self) -> str | None:
        """Name of the compression for pyarrow, by the last suffix."""
        return COMPRESSIONS.get(posixpath.splitext(self.url)[1])

    def open(self) -> IO[bytes]:
        """Open the raw bytes (still compressed)."""
        file: IO[bytes] = fsspec.open(self.url, "rb").open()
        return file


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a file that can be read by itself.

    Attributes:
        file: the file.
        row_groups: those of a parquet file; None: the whole file.
        first_row: rows of the file before this piece.
    """

    file: RawFile
    row_groups: tuple[int, ...] | None = None
    first_row: int = 0


def absolute(path: str) -> str:
    """Return an expanded path as an absolute path or a URL."""
    expanded = os.path.expanduser(path)  # noqa: PTH111 - may be a URL
    return expanded if "://" in expanded else os.path.abspath(expanded)  # noqa: PTH100


def find(paths: Iterable[str]) -> list[RawFile]:
    """Return the files that paths, globs, folders and URLs stand for, in a fixed order.

    Raises:
        UserError: nothing is there, or the file system cannot be reached.
    """
    return [file for path in paths for file in _find_one(path)]


def folder_of(path: str) -> str:
    """Return the folder that a path, glob or folder of tables lies in."""
    location = absolute(path)
    if _is_glob(location):
        while _is_glob(location):
            location = posixpath.dirname(location)
        return location
    fs, name = fsspec.core.url_to_fs(location)
    return location if fs.isdir(name) else posixpath.dirname(location)


def _find_one(path: str) -> list[RawFile]:
    location = absolute(path)
    try:
        fs, name = fsspec.core.url_to_fs(location)
        if _is_glob(name):
            names = [str(n) for n in fs.glob(name)]
        elif fs.isdir(name):
            names = [str(n) for n in fs.find(name)]
        else:
            return [_describe(fs, name)]
        chosen = sorted(n for n in names if _is_table(n))
        if not chosen:
            raise UserError(
                f"{path}: no parquet, CSV or JSON-lines file in it. Correct the path in the recipe."
            )
        return [_describe(fs, n) for n in chosen]
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(_missing(path, location)) from error
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{path} cannot be reached: {' '.join(str(error).split())}. Check the address, the "
            f"rights, and that fsspec's package for it is installed."
        ) from error


def _is_glob(name: str) -> bool:
    return any(c in name for c in "*?[")


def _is_table(name: str) -> bool:
    return RawFile(name, 0, "").suffix in _TABLE_SUFFIXES


def _describe(fs: Any, name: str) -> RawFile:  # noqa: ANN401 - an fsspec file system
    info = fs.info(name)
    keys = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "md5Hash")
    state = next((str(info[key]) for key in keys if info.get(key)), "")
    size = info.get("size")
    return RawFile(str(fs.unstrip_protocol(name)), -1 if size is None else int(size), state)


def _missing(path: str, location: str) -> str:
    folder, name = posixpath.split(location)
    close = []
    if "://" not in location and os.path.isdir(folder):  # noqa: PTH112
        close = nearest(name, os.listdir(folder))  # noqa: PTH208
    hint = f"Did you mean {' or '.join(close)}?" if close else "Correct the path in the recipe."
    where = "" if path == location else f" (looked at {location})"
    return f"{path}: no such file{where}. {hint}"
