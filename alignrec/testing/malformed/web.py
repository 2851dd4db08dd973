"""Hostile addresses, and a loopback host that answers wrongly (-> tests of data_prep)."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import quote, unquote

from alignrec.testing.malformed import GOOD, one_of
from alignrec.testing.malformed.pictures import MAX_BYTES, good_picture, png

HOST = "127.0.0.1"  # the only host that the recipe allows
# Addresses of this machine and of networks that are not public, in the spellings that hide them.
PRIVATE_HOSTS = (
    "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0",
    "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.0.1",
    "192.0.2.1", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:10.0.0.1]", "[fc00::1]", "[fe80::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
    "[64:ff9b:1::7f00:1]", "[::ffff:0:127.0.0.1]", "[::a9fe:a9fe]", "[fec0::1]", "192.88.99.1",
)  # fmt: skip
_WAIT_SECONDS = 60.0
_HTTP_ERROR = one_of("image_http_error")
_FORBIDDEN = one_of("image_forbidden_location")
_UNREACHABLE = one_of("image_host_unreachable")
_TIMED_OUT = one_of("image_timed_out")
_TOO_LARGE = one_of("image_file_too_large")
_CUT = one_of("image_truncated", "image_corrupt")


@dataclasses.dataclass(frozen=True)
class WebCase:
    """One reference of a catalogue.

    Attributes:
        name: unique.
        reference: what stands in the catalogue.
        verdicts: any of them is right.
    """

    name: str
    reference: str
    verdicts: frozenset[str]


def web_cases(host: "HostileHost") -> list[WebCase]:
    """Return every case, for a recipe that allows http and HOST alone."""
    return [*_answers(host), *_statuses(host), *_redirects(host), *_addresses(host), *_paths()]


class HostileHost:
    """A server on the loopback interface; each path has its own way of answering wrongly."""

    def __init__(self) -> None:
        self._server = _Server((HOST, 0), _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Address of its root, without a slash at the end."""
        return f"http://{HOST}:{self.port}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.closing = threading.Event()
        self.asked: Counter[str] = Counter()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: that clients hang up is what they are here for."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        """Answer as the path says."""
        self.close_connection = True
        self.server.asked[self.path] += 1
        _, kind, *rest = self.path.split("/", 3)
        if kind == "status":
            self._status(int(rest[0]), unquote(rest[1]) if len(rest) > 1 else "")
        elif kind == "redirect":
            self._status(302, "", {"Location": self.server_redirect("/".join(rest))})
        elif kind in _WAYS:
            _WAYS[kind](self)
        else:
            self._status(404, "")

    def server_redirect(self, rest: str) -> str:
        """Return where a path that says so leads; a number counts down to itself without end."""
        if rest.isdigit():
            return f"/redirect/{int(rest) - 1}" if int(rest) > 1 else "/picture"
        return REDIRECTS[rest]

    def _status(self, code: int, retry_after: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def raw(self, *parts: bytes) -> None:
        """Send bytes as they are."""
        for part in parts:
            self.wfile.write(part)

    def body(self, data: bytes, length: str | None = None, more: bytes = b"") -> None:
        """Send an answer with status 200."""
        announced = str(len(data)) if length is None else length
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\nConnection: close\r\n"
        self.raw(head.encode(), more, b"\r\n", data)

    def for_ever(self, head: bytes, part: bytes, *, pause_seconds: float = 0.0) -> None:
        """Send one part again and again until the client hangs up or the server ends."""
        self.wfile.write(head)
        while not self.server.closing.wait(pause_seconds):
            self.wfile.write(part)

    def first_time(self) -> bool:
        """Say whether this path was not asked for before."""
        return self.server.asked[self.path] == 1

    def log_message(self, *_: object) -> None:
        """Say nothing."""


_OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
_CHUNKED = _OK + b"Transfer-Encoding: chunked\r\n\r\n"
_PICTURE = good_picture()
_HALF = _PICTURE[: len(_PICTURE) // 2]


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)


def _busy_once(handler: _Handler) -> None:
    if handler.first_time():
        handler.raw(b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n")
    else:
        handler.body(_PICTURE)


def _stops_halfway(handler: _Handler) -> None:
    handler.body(_HALF, str(len(_PICTURE)))
    handler.server.closing.wait(_WAIT_SECONDS)


# Name of a path -> how it answers.
_WAYS: dict[str, Callable[[_Handler], object]] = {
    "picture": lambda h: h.body(_PICTURE),
    "picture-as-html": lambda h: h.body(_PICTURE, more=b"Content-Type: text/html\r\n"),
    "without-length": lambda h: h.raw(_OK, b"\r\n", _PICTURE),
    "chunked": lambda h: h.raw(_CHUNKED, _chunked(_PICTURE)),
    "length-of-words": lambda h: h.body(_PICTURE, "many"),
    "negative-length": lambda h: h.body(_PICTURE, "-5"),
    "busy-once": _busy_once,
    "empty": lambda h: h.body(b""),
    "html": lambda h: h.body(b"<!doctype html><title>Welcome</title>"),
    "cut-picture": lambda h: h.body(_HALF),
    "bomb": lambda h: h.body(png(60_000, 60_000)),
    "length-too-short": lambda h: h.body(_PICTURE, str(len(_HALF))),
    "length-too-long": lambda h: h.body(_HALF, str(len(_PICTURE))),
    "announced-10-GB": lambda h: h.body(_PICTURE, str(10 << 30)),
    "above-the-limit": lambda h: h.raw(_OK, b"\r\n", bytes(MAX_BYTES + 1)),
    "endless-body": lambda h: h.for_ever(_OK + b"\r\n", bytes(65_536)),
    "endless-chunks": lambda h: h.for_ever(_CHUNKED, b"10000\r\n%b\r\n" % bytes(65_536)),
    "endless-headers": lambda h: h.for_ever(_OK, b"X-More: x\r\n"),
    "endless-header": lambda h: h.for_ever(_OK + b"X-Long: ", b"x" * 65_536),
    "endless-continues": lambda h: h.for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "slow-body": lambda h: h.for_ever(_OK + b"\r\n", b"x", pause_seconds=0.2),
    "slow-headers": lambda h: h.for_ever(b"", b"H", pause_seconds=0.2),
    "no-answer": lambda h: h.server.closing.wait(_WAIT_SECONDS),
    "stops-halfway": _stops_halfway,
    "hangs-up": lambda _: None,
    "other-protocol": lambda h: h.raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "noise": lambda h: h.raw(bytes(range(256)) * 20),
    "status-of-words": lambda h: h.raw(b"HTTP/1.1 fine OK\r\n\r\n", _PICTURE),
    "chunk-of-words": lambda h: h.raw(_CHUNKED, b"many\r\n", _PICTURE),
    "chunk-of-minus-one": lambda h: h.for_ever(_CHUNKED + b"-1\r\n", bytes(65_536)),
    "negative-chunk": lambda h: h.raw(_CHUNKED, b"-5\r\n", _PICTURE),
    "chunk-cut": lambda h: h.raw(_CHUNKED, b"fffff\r\n", _PICTURE),
    "chunk-of-exabytes": lambda h: h.raw(_CHUNKED, b"fffffffffffffff\r\n", _PICTURE),
    "gzip-coding": lambda h: h.body(b"\x1f\x8b" + bytes(99), more=b"Content-Encoding: gzip\r\n"),
    "unknown-coding": lambda h: h.body(_PICTURE, more=b"Content-Encoding: zebra\r\n"),
}  # fmt: skip
REDIRECTS = {
    "file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/a.jpg", "gopher": "gopher://127.0.0.1/1",
    "data": "data:image/png;base64,AAAA", "local": "http://localhost/a.jpg",
    "private": "http://10.0.0.1/a.jpg", "metadata": "http://169.254.169.254/latest/meta-data/",
    "ipv6": "http://[::1]/a.jpg", "number": "http://2130706433/a.jpg",
    "name": "http://pictures.example/a.jpg", "no-host": "http:///a.jpg",
    "bracket": "http://[::1/a.jpg", "port": "http://127.0.0.1:99999/a.jpg",
    "itself": "/redirect/itself",
    "chain": "filecache::file:///etc/passwd",
}  # fmt: skip


def _answers(host: HostileHost) -> Iterator[WebCase]:
    verdicts = {
        one_of(GOOD): ("picture", "picture-as-html", "without-length", "chunked", "busy-once",
                       "length-of-words", "negative-length"),
        one_of("image_empty"): ("empty",),
        one_of("image_unknown_format"): ("html",),
        _CUT: ("cut-picture", "length-too-short"),
        one_of("image_too_many_pixels"): ("bomb",),
        _TOO_LARGE: ("announced-10-GB", "above-the-limit", "endless-body", "endless-chunks"),
        _TIMED_OUT: ("slow-body", "slow-headers", "no-answer", "stops-halfway"),
        _TIMED_OUT | _TOO_LARGE: ("endless-continues", "chunk-of-minus-one"),
        _UNREACHABLE: ("length-too-long", "endless-headers", "endless-header", "hangs-up",
                       "other-protocol", "noise", "status-of-words", "chunk-of-words", "chunk-cut",
                       "negative-chunk"),
        _UNREACHABLE | _TOO_LARGE: ("chunk-of-exabytes",),
        _HTTP_ERROR: ("gzip-coding", "unknown-coding"),
    }  # fmt: skip
    for verdict, names in verdicts.items():
        for name in names:
            yield WebCase(f"web-{name}", f"{host.url}/{name}", verdict)


def _statuses(host: HostileHost) -> Iterator[WebCase]:
    for code in (404, 410):
        yield WebCase(f"web-{code}", f"{host.url}/status/{code}", one_of("image_missing"))
    for code in (201, 204, 206, 300, 301, 304, 400, 401, 402, 403, 405, 406, 418, 451, 501, 505):
        yield WebCase(f"web-{code}", f"{host.url}/status/{code}", _HTTP_ERROR)
    for code in (429, 500, 502, 503, 504):
        yield WebCase(f"web-{code}", f"{host.url}/status/{code}/0", _HTTP_ERROR)
    for name, wait in {
        "days": "999999",
        "words": "soon",
        "negative": "-1",
        "digit": "\xb2",
        "far": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
    }.items():
        yield WebCase(f"web-wait-{name}", f"{host.url}/status/503/{quote(wait)}", _HTTP_ERROR)


def _redirects(host: HostileHost) -> Iterator[WebCase]:
    start = f"{host.url}/redirect"
    yield WebCase("web-two-redirects", f"{start}/2", one_of(GOOD))
    yield WebCase("web-thirty-redirects", f"{start}/30", _HTTP_ERROR)
    bad = _FORBIDDEN | {"image_bad_url"}
    for name in REDIRECTS:
        verdict = {"itself": _HTTP_ERROR, "no-host": one_of("image_missing")}.get(name, bad)
        yield WebCase(f"web-redirect-{name}", f"{start}/{name}", verdict)


def _addresses(host: HostileHost) -> Iterator[WebCase]:
    for number, name in enumerate(PRIVATE_HOSTS[1:]):
        yield WebCase(f"web-host-{number}", f"http://{name}:{host.port}/picture", _FORBIDDEN)
    url, port = host.url, host.port
    yield WebCase("web-user-in-address", f"http://evil.example@{HOST}:{port}/picture", one_of(GOOD))
    forbidden = {
        "host-as-user": f"http://{HOST}:{port}@evil.example/a.jpg",
        "host-as-part": f"http://{HOST}.evil.example/a.jpg", "ftp": "ftp://127.0.0.1/a.jpg",
        "file": "file:///etc/passwd", "file-in-capitals": "FILE:///etc/passwd",
        "local": "local:///etc/passwd", "memory": "memory://a.jpg", "s3": "s3://bucket/a.jpg",
        "gopher": "gopher://127.0.0.1/a", "jar": "jar:http://127.0.0.1!/a.jpg", "ssh": "ssh://a/b",
        "cached": f"simplecache::{url}/picture", "cached-file": "filecache::file:///etc/passwd",
        "zipped": "zip://a.jpg::file:///tmp/a.zip", "dir": "dir://x::file:///etc/passwd",
        "github": "github://a:b@/c.jpg", "empty-scheme": "://a.jpg",
    }  # fmt: skip
    for name, reference in forbidden.items():
        yield WebCase(f"web-{name}", reference, _FORBIDDEN)
    any_refusal = _FORBIDDEN | {"image_bad_url", "image_missing", "image_http_error"}
    for name, reference in {
        "no-host": "http:///a.jpg", "bracket": "http://[::1/a.jpg",
        "port-99999": f"http://{HOST}:99999/",
        "port-of-words": f"http://{HOST}:many/", "blank-in-host": "http://127.0.0 .1/a.jpg",
        "line-end": f"{url}/a\r\nHost: evil.example\r\n\r\n",
        "backslash": f"http://{HOST}\\@evil.example/",
        "unicode": f"{url}/\u6f22\u5b57.jpg", "percent": f"{url}/%ZZ%",
        "fragment": f"{url}/#picture",
        "up": f"{url}/../../etc/passwd", "no-path": url, "only-scheme": "http://",
    }.items():  # fmt: skip
        yield WebCase(f"web-{name}", reference, any_refusal)
    yield WebCase("web-nobody-listens", f"http://{HOST}:1/a.jpg", _UNREACHABLE)
    yield WebCase("web-long", f"{url}/{'a' * 100_000}", _HTTP_ERROR | _UNREACHABLE)


def _paths() -> Iterator[WebCase]:
    for name, reference in {
        "above": "../../etc/passwd", "absolute": "/etc/passwd", "above-inside": "a/../../b.jpg",
        "two-slashes": "//127.0.0.1/a.jpg", "root": "/", "here": ".",
    }.items():  # fmt: skip
        yield WebCase(f"path-{name}", reference, _FORBIDDEN)
    for name, reference in {
        "percent": "%2e%2e/%2e%2e/etc/passwd", "home": "~/a.jpg", "variable": "$HOME/a.jpg",
        "backslashes": "..\\..\\a.jpg", "script": "javascript:alert(1)", "pipe": "|id",
        "data": "data:image/png;base64,AAAA", "star": "*.jpg", "drive": "C:\\a.jpg",
    }.items():  # fmt: skip
        yield WebCase(f"path-{name}", reference, one_of("image_missing"))
