"""A host on this machine that behaves as a test says, and readers of its pictures."""

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data_prep import hosts
from data_prep.config import HttpConfig
from data_prep.fetching import Fetcher
from data_prep.images import BadImage, ImageRules

CONTENT = bytes(range(256)) * 40
MAX_BYTES = 20_000
QUICK = HttpConfig(timeout_seconds=0.3, total_seconds=0.9, retries=2, backoff_seconds=0.001)
Behaviour = Callable[[BaseHTTPRequestHandler], None]


class Host(ThreadingHTTPServer):
    """A web host on this machine whose paths behave as the test says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths: dict[str, Behaviour] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.num_connections = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Host

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        self.server.paths.get(self.path.partition("?")[0], answer(404))(self)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


def answer(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    def behave(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """One behaviour after the other, the last one for ever."""
    left = list(behaviours)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def drip(part: bytes, until: threading.Event) -> Behaviour:
    """Send a little from time to time: no single wait is long, all together never end."""

    def behave(handler: BaseHTTPRequestHandler) -> None:
        while not until.wait(0.05):
            handler.wfile.write(part)

    return behave


@pytest.fixture
def nothing_known() -> None:
    hosts.known_hosts.cache_clear()


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.paths["/good.jpg"] = answer(200, CONTENT)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def end() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def rules(**changes: Any) -> ImageRules:
    settings = {
        "root": "/", "allowed_schemes": ("http", "https"), "max_side": 64, "min_side": 4,
        "jpeg_quality": 90, "max_bytes": MAX_BYTES, "max_pixels": 1_000_000,
        "allowed_hosts": ("127.0.0.1",), "private_hosts": ("127.0.0.1",), "http": QUICK,
    }  # fmt: skip
    return ImageRules(**{**settings, **changes})


def read(url: str, **changes: Any) -> bytes:
    with Fetcher(rules(**changes)) as fetcher:
        return fetcher.read(url)


def refused(url: str, **changes: Any) -> BadImage:
    with pytest.raises(BadImage) as caught:
        read(url, **changes)
    return caught.value


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let every name have these addresses; return the list of the names asked for."""
    asked: list[str] = []
    true = socket.getaddrinfo

    def getaddrinfo(name: str, port: int, *rest: Any, **options: Any) -> list[Any]:
        if name[:1].isdigit() or ":" in name:  # socket.create_connection with a plain address
            return true(name, port, *rest, **options)
        asked.append(name)
        return [entry for a in addresses for entry in true(a, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked
