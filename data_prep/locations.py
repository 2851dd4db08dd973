"""Where raw files lie: paths, globs, folders and fsspec URLs in, one record per file out."""

import dataclasses
import os
import posixpath
import weakref
from collections.abc import Iterable
from typing import IO, Any

import fsspec

from alignrec.configuration import nearest
from alignrec.errors import UserError

_TABLE_SUFFIXES = (".parquet", ".pq", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_NOT_FOUND = 404
_OWN_MODULES = ("builtins", "alignrec", "data_prep", "numpy")
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
        stem, suffix = posixpath.splitext(self._path)
        return posixpath.splitext(stem)[1] if suffix in COMPRESSIONS else suffix

    @property
    def compression(self) -> str | None:
        """Name of the compression for pyarrow, by the last suffix."""
        return COMPRESSIONS.get(posixpath.splitext(self._path)[1])

    @property
    def _path(self) -> str:
        """The address without what follows the name: a query, or the archive around it."""
        return self.url.partition("::")[0].partition("?" if _is_web(self.url) else "\0")[0]

    def open(self) -> IO[bytes]:
        """Open the raw bytes (still compressed)."""
        fs, name = fsspec.core.url_to_fs(self.url)
        file: IO[bytes] = fs.open(name, "rb")
        if "::" in self.url:
            weakref.finalize(file, id, fs)  # an archive's file system must outlive its files
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


def is_foreign(error: BaseException) -> bool:
    """Say that an error comes from another library: file systems raise types of their own."""
    return type(error).__module__.partition(".")[0] not in _OWN_MODULES


def _find_one(path: str) -> list[RawFile]:
    location = absolute(path)
    try:
        fs, name = fsspec.core.url_to_fs(location)
        found = _listed(fs, name, location)
        if found is None:
            return [_describe(fs, name, location)]
        chosen = sorted(n for n in found if _is_table(n, name))
        if not chosen:
            raise UserError(
                f"{path}: no parquet, CSV or JSON-lines file in it. Correct the path in the recipe."
            )
        return [_describe(fs, n, str(fs.unstrip_protocol(n)), found[n]) for n in chosen]
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # of any failure on the web, fsspec says: not found
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == _NOT_FOUND:
            raise UserError(_missing(path, location)) from error
        if isinstance(cause, (OSError, ValueError, ImportError)) or is_foreign(cause):
            raise UserError(
                f"{path} cannot be reached: {' '.join(str(cause).split())}. Check the address, the "
                f"rights, and that fsspec's package for it is installed."
            ) from error
        raise


def _listed(fs: Any, name: str, location: str) -> dict[str, dict[str, Any]] | None:  # noqa: ANN401
    """Return path -> details of the files of a glob or a folder; None for one file."""
    if _is_glob(location) and not os.path.exists(location):  # noqa: PTH110 - may be a URL
        return {str(n): info for n, info in fs.glob(name, detail=True).items()}
    # Asking a web server whether a file is a folder would fetch the whole file.
    is_folder = name.endswith("/") if _is_web(location) else fs.info(name)["type"] == "directory"
    if not is_folder:
        return None
    return {str(n): info for n, info in fs.find(name, detail=True).items()}


def _is_web(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _is_glob(name: str) -> bool:
    if _is_web(name):  # there a question mark begins the query, as in a signed address
        return "*" in name.partition("?")[0]
    return any(c in name for c in "*?[")


def _is_table(name: str, root: str) -> bool:
    """Say whether a file in a folder is one of its tables, and no log or leftover of a writer."""
    below = name.removeprefix(root.rstrip("/")).split("/")
    hidden = any(part.startswith(("_", ".")) for part in below) and not _is_glob(root)
    return not hidden and RawFile(name, 0, "").suffix in _TABLE_SUFFIXES


def _describe(
    fs: Any,  # noqa: ANN401 - an fsspec file system
    name: str,
    url: str,
    info: dict[str, Any] | None = None,
) -> RawFile:
    if info is None or info.get("size") is None:
        info = fs.info(name)
    keys = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "md5Hash")
    state = next((str(info[key]) for key in keys if info.get(key)), "")
    size = info.get("size")
    # A chain such as zip://a.csv::b.zip is only known by its whole address.
    full = url if "::" in url or _is_web(url) else str(fs.unstrip_protocol(name))
    return RawFile(full, -1 if size is None else int(size), state)


def _missing(path: str, location: str) -> str:
    folder, name = posixpath.split(location)
    close = []
    if "://" not in location and os.path.isdir(folder):  # noqa: PTH112
        close = nearest(name, os.listdir(folder))  # noqa: PTH208
    hint = f"Did you mean {' or '.join(close)}?" if close else "Correct the path in the recipe."
    where = "" if path == location else f" (looked at {location})"
    return f"{path}: no such file{where}. {hint}"
