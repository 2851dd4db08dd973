"""Bytes of a picture: a reference of the catalogue in, checked bytes or a reason out.

A reference is a path below ``images.root`` or a URL of an allowed scheme. Files and object stores
are read through fsspec, http(s) by ``data_prep.web`` (catalogue -> images).
"""

import os
import posixpath
import stat
from typing import Any, Self
from urllib.parse import quote

import fsspec

from data_prep.addresses import SCHEMES, Policy, parse, shown, without_secrets
from data_prep.images import BadImage, ImageRules
from data_prep.quarantine import Reason
from data_prep.web import WebClient

_LOCAL = ("", "file", "local")
ABSENT = "absent"
FORBIDDEN = "forbidden"
UNKNOWN = "unknown"
# What the file systems of fsspec call a checksum or a time of change, the most telling first.
_STATE_KEYS = (
    "ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated",
    "created",
)  # fmt: skip


class Fetcher:
    """Reads pictures for one task; ``read`` may be called from many threads at once."""

    def __init__(self, rules: ImageRules) -> None:
        self._rules = rules
        self._web = WebClient(_policy(rules), rules.http, max_bytes=rules.max_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._web.close()

    def read(self, reference: str) -> bytes:
        """Return the bytes that a reference stands for.

        Raises:
            BadImage: outside of the allowed locations, missing, unreadable, empty or too large.
        """
        location = resolve(reference, self._rules)
        if _scheme(location) in SCHEMES:
            data = self._web.get(location)
        else:
            data = _read_file(location, self._rules.max_bytes)
        if not data:
            raise BadImage(Reason.IMAGE_EMPTY, shown(reference))
        if len(data) > self._rules.max_bytes:
            detail = f"{shown(reference)}: more than {self._rules.max_bytes} bytes"
            raise BadImage(Reason.IMAGE_TOO_LARGE, detail)
        return data


def source_state(reference: str, rules: ImageRules) -> str:
    """Return what tells that the picture behind a reference is still the same.

    Nothing is fetched: files are asked for size and time of change, object stores for ETag or the
    like. An http(s) address is taken to be immutable: its state is empty. ``absent``, ``forbidden``
    (by the recipe's schemes, hosts and root) and ``unknown`` (the store did not answer) are states.
    """
    try:
        location = resolve(reference, rules)
        if _scheme(location) in SCHEMES:
            parse(location, _policy(rules))
            return ""
    except BadImage:
        return FORBIDDEN
    try:
        if "://" not in location:
            status = os.stat(location)  # noqa: PTH116 - plain string paths, once per picture
            return f"{status.st_size}:{status.st_mtime_ns}"
        fs, name = fsspec.core.url_to_fs(location)
        return _state_of(fs.info(name))
    except FileNotFoundError:
        return ABSENT
    except Exception:  # a remote file system raises what it likes
        return UNKNOWN


def web_address(reference: str, rules: ImageRules) -> str | None:
    """Return the http(s) address of a reference; None without one or where it is forbidden."""
    try:
        location = resolve(reference, rules)
        if _scheme(location) not in SCHEMES:
            return None
        parse(location, _policy(rules))
    except BadImage:
        return None
    return location


def resolve(reference: str, rules: ImageRules) -> str:
    """Return the absolute path or URL of a reference.

    Raises:
        BadImage: its scheme is not allowed, or it leads out of the root, by a link too.
    """
    name = shown(reference)
    if "\x00" in reference:
        raise BadImage(Reason.IMAGE_FORBIDDEN, f"{name!r} holds a zero byte")
    scheme, colon, _ = reference.partition("://")
    web = scheme.lower() in SCHEMES
    # fsspec chains file systems with "::", which would lead around the list of schemes.
    chained = "::" in reference and not web
    if chained or (colon and scheme.lower() not in rules.allowed_schemes):
        raise BadImage(Reason.IMAGE_FORBIDDEN, f"{name}: scheme not in images.allowed_schemes")
    if colon:
        return reference
    root = rules.root.rstrip("/")
    base, _, start = root.rpartition("://")
    path = posixpath.normpath(posixpath.join(start, reference))
    if not path.startswith(start + "/"):
        raise BadImage(Reason.IMAGE_FORBIDDEN, f"{name} leads out of {shown(root)}")
    below = path[len(start) :]
    if base.lower() in _LOCAL and _links_out(start, below):
        raise BadImage(Reason.IMAGE_FORBIDDEN, f"{name} is a link that leads out of {shown(root)}")
    return root + (quote(below) if base.lower() in SCHEMES else below)


def _policy(rules: ImageRules) -> Policy:
    return Policy(rules.allowed_schemes, rules.allowed_hosts, rules.private_hosts)


def _links_out(root: str, below: str) -> bool:
    """Say whether a file or a folder above it, up to the root, is a link to what lies outside."""
    path = root
    for part in below.strip("/").split("/"):
        path = f"{path}/{part}"
        if os.path.islink(path):  # noqa: PTH114 - once per picture and folder
            inside = os.path.realpath(root or "/").rstrip("/") + "/"
            return not os.path.realpath(root + below).startswith(inside)
    return False


def _scheme(location: str) -> str:
    scheme, colon, _ = location.partition("://")
    return scheme.lower() if colon else ""


def _read_file(location: str, max_bytes: int) -> bytes:
    """Read up to one byte more than allowed from a path or through fsspec."""
    try:
        if "://" not in location:
            return _read_local(location, max_bytes)
        fs, name = fsspec.core.url_to_fs(location)
        if "file" in fs.protocol:
            return _read_local(name, max_bytes)
        with fs.open(name, "rb") as file:
            data: bytes = file.read(max_bytes + 1)
            return data
    except BadImage:
        raise
    except FileNotFoundError as error:
        raise BadImage(Reason.IMAGE_MISSING, shown(location)) from error
    except Exception as error:  # a remote file system raises what it likes; there is no picture
        said = without_secrets(str(error).replace(location, shown(location)))
        transient = isinstance(error, (TimeoutError, ConnectionError))
        raise BadImage(
            Reason.IMAGE_UNREADABLE,
            f"{shown(location)}: {type(error).__name__}: {said}",
            transient=transient,
        ) from error


def _read_local(path: str, max_bytes: int) -> bytes:
    # Opening a pipe would wait for its writer, reading a device for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", 0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(Reason.IMAGE_UNREADABLE, f"{path} is not a plain file")
        if status.st_size > max_bytes:
            raise BadImage(Reason.IMAGE_TOO_LARGE, f"{path}: {status.st_size} bytes")
        return file.read()


def _state_of(info: dict[str, Any]) -> str:
    mark = next((info[key] for key in _STATE_KEYS if info.get(key)), "")
    return f"{info.get('size')}:{mark}"
