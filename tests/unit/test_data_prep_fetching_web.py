"""Pictures from the web: whatever a host does, an answer or a reason in bounded time and memory."""

import base64
import datetime
import email.utils
import gzip
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from alignrec.errors import UserError
from data_prep import STAGE, addresses, fetching, hosts
from data_prep.addresses import Policy
from data_prep.config import HttpConfig
from data_prep.fetching import Fetcher
from data_prep.images import BadImage, ImageRules
from data_prep.quarantine import Reason

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


@pytest.fixture(autouse=True)
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


def test_a_picture_comes_as_it_is_and_connections_are_used_again(host: Host) -> None:
    with Fetcher(rules()) as fetcher:
        assert [fetcher.read(host.url + "/good.jpg") for _ in range(5)] == [CONTENT] * 5
    assert host.num_connections == 1
    headers = host.requests[0][1]
    assert headers["User-Agent"].startswith("alignrec/")
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == f"127.0.0.1:{host.server_port}"


def test_connections_to_a_host_are_limited(host: Host) -> None:
    together, most, lock = 0, 0, threading.Lock()
    pair = threading.Barrier(2, timeout=5)  # so two are let in at once, and others could follow

    def count(handler: BaseHTTPRequestHandler) -> None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        pair.wait()
        with lock:
            together -= 1
        answer(200, CONTENT)(handler)

    host.paths["/counted.jpg"] = count
    http = HttpConfig(connections_per_host=2)
    with Fetcher(rules(http=http)) as fetcher, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(fetcher.read, [host.url + "/counted.jpg"] * 40))
    assert found == [CONTENT] * 40
    assert most == 2
    assert host.num_connections <= 2


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/a b.jpg", "/a%20b.jpg"),
        ("/a%20b.jpg", "/a%20b.jpg"),
        ("/grün.jpg", "/gr%C3%BCn.jpg"),
        ("/x.jpg?size=1&name=a b", "/x.jpg?size=1&name=a%20b"),
        ("/x.jpg#part", "/x.jpg"),
        ("/x\r\nInjected: 1.jpg", "/xInjected:%201.jpg"),
        ("", "/"),
    ],
)
def test_addresses_are_spelled_as_http_wants_them(host: Host, path: str, sent: str) -> None:
    host.paths[sent.partition("?")[0]] = answer(200, CONTENT)
    assert read(host.url + path) == CONTENT
    assert host.requests[0][0] == sent
    assert "Injected" not in host.requests[0][1]


def test_a_relative_reference_below_a_web_root(host: Host) -> None:
    host.paths["/pictures/a%231.jpg"] = answer(200, CONTENT)
    assert read("a#1.jpg", root=host.url + "/pictures") == CONTENT
    assert refused("../other.jpg", root=host.url + "/pictures").reason == Reason.IMAGE_FORBIDDEN


def test_an_answer_in_pieces_or_until_the_end_of_the_connection(host: Host) -> None:
    def pieces(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(CONTENT), 1000):
            part = CONTENT[start : start + 1000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    def until_closed(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(CONTENT)
        handler.close_connection = True

    host.paths |= {"/pieces.jpg": pieces, "/closed.jpg": until_closed}
    with Fetcher(rules()) as fetcher:
        for name in ("pieces", "pieces", "closed", "closed", "good"):
            assert fetcher.read(f"{host.url}/{name}.jpg") == CONTENT
    assert host.num_connections == 3  # "pieces" keeps its connection, "closed" cannot


@pytest.mark.parametrize("passing", [429, 500, 502, 503, 504])
def test_passing_failures_are_tried_again(host: Host, passing: int) -> None:
    host.paths["/x.jpg"] = in_turn(answer(passing), answer(passing), answer(200, CONTENT))
    assert read(host.url + "/x.jpg") == CONTENT
    assert len(host.requests) == 3


def test_connections_that_break_are_tried_again(host: Host) -> None:
    short = answer(200, CONTENT[:100], Content_Length=str(len(CONTENT)), Connection="close")
    host.paths["/x.jpg"] = in_turn(hang_up, short, answer(200, CONTENT))
    assert read(host.url + "/x.jpg") == CONTENT


def test_a_kept_connection_that_the_host_closed_costs_no_attempt(host: Host) -> None:
    def silently(handler: BaseHTTPRequestHandler) -> None:
        answer(200, CONTENT)(handler)
        handler.close_connection = True  # without the header that would tell

    host.paths["/x.jpg"] = silently
    with Fetcher(rules(http=HttpConfig(retries=0))) as fetcher:
        assert [fetcher.read(host.url + "/x.jpg") for _ in range(3)] == [CONTENT] * 3


def test_failures_that_last_are_given_up_and_marked_as_passing(host: Host) -> None:
    host.paths["/busy.jpg"] = answer(503)
    verdict = refused(host.url + "/busy.jpg")
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_HTTP_ERROR, True)
    assert "status 503 (attempt 3)" in verdict.detail
    assert len(host.requests) == 3
    host.paths["/breaks.jpg"] = hang_up
    verdict = refused(host.url + "/breaks.jpg")
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_UNREACHABLE, True)


def test_a_host_that_never_answers_gets_one_attempt_a_picture(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "PROBE_SECONDS", 0.0)
    host.paths["/busy.jpg"] = in_turn(*[answer(503)] * 40, answer(200, CONTENT), answer(503))
    numbers = []
    with Fetcher(rules()) as fetcher:
        for _ in range(20):
            with pytest.raises(BadImage):
                fetcher.read(host.url + "/busy.jpg")
            numbers.append(len(host.requests))
        assert numbers == [*range(3, 31, 3), *range(31, 41)]
        assert fetcher.read(host.url + "/busy.jpg") == CONTENT
        with pytest.raises(BadImage):  # it answers again, so it is tried three times again
            fetcher.read(host.url + "/busy.jpg")
    assert len(host.requests) == 44


def test_a_host_that_never_answers_is_only_asked_now_and_then_by_later_chunks_too(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.paths["/busy.jpg"] = answer(503)
    for _ in range(30):
        verdict = refused(host.url + "/busy.jpg")  # each from a client of its own
        assert (verdict.reason, verdict.transient) == (Reason.IMAGE_HTTP_ERROR, True)
    assert len(host.requests) == 3 * hosts.MAX_IN_VAIN
    assert "not asked, the host has failed 10 times in a row" in verdict.detail
    assert read(host.url + "/good.jpg", http=HttpConfig(retries=0)) == CONTENT  # other rules
    monkeypatch.setattr(hosts, "PROBE_SECONDS", 0.0)
    assert read(host.url + "/good.jpg") == CONTENT  # the probe: it answers again
    monkeypatch.undo()
    refused(host.url + "/busy.jpg")
    assert len(host.requests) == 3 * hosts.MAX_IN_VAIN + 2 + 3


def test_a_host_that_redirects_to_a_dead_one_is_not_the_one_that_failed(host: Host) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        host.paths["/moved"] = answer(302, Location=f"http://127.0.0.1:{taken.getsockname()[1]}/")
        for _ in range(hosts.MAX_IN_VAIN + 1):
            verdict = refused(host.url + "/moved")
            assert verdict.transient
    assert "not asked" in verdict.detail
    assert read(host.url + "/good.jpg") == CONTENT


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, Reason.IMAGE_MISSING),
        (410, Reason.IMAGE_MISSING),
        (401, Reason.IMAGE_HTTP_ERROR),
        (403, Reason.IMAGE_HTTP_ERROR),
        (204, Reason.IMAGE_HTTP_ERROR),
        (304, Reason.IMAGE_HTTP_ERROR),
    ],
)
def test_lasting_failures_are_not_tried_again(host: Host, status: int, reason: Reason) -> None:
    host.paths["/x.jpg"] = answer(status)
    verdict = refused(host.url + "/x.jpg")
    assert (verdict.reason, verdict.transient) == (reason, False)
    assert len(host.requests) == 1


@pytest.mark.parametrize("as_date", [False, True])
def test_a_wait_that_the_host_asks_for_is_kept_but_bounded(host: Host, as_date: bool) -> None:
    host.paths["/x.jpg"] = in_turn(answer(429, Retry_After="0"), answer(200, CONTENT))
    assert read(host.url + "/x.jpg", http=HttpConfig(backoff_seconds=1000.0)) == CONTENT
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    after = email.utils.format_datetime(date, usegmt=True) if as_date else "3600"
    host.paths["/later.jpg"] = answer(429, Retry_After=after)
    began = time.monotonic()
    assert refused(host.url + "/later.jpg").transient
    assert time.monotonic() - began < 5
    assert host.requests[-2][0] == "/x.jpg"  # so it was asked once


@pytest.mark.parametrize(
    "after",
    [
        "\xb2",
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 2029 00:00:00 +99999999999999",
        "9" * 5000,
        "soon",
    ],
)
def test_a_wait_that_is_none_is_no_wait(host: Host, after: str) -> None:
    host.paths["/x.jpg"] = answer(503, Retry_After=after)
    verdict = refused(host.url + "/x.jpg")
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_HTTP_ERROR, True)


def test_too_much_is_not_read(host: Host, end: threading.Event) -> None:
    host.paths["/said.jpg"] = answer(200, b"", Content_Length="20000000000")
    verdict = refused(host.url + "/said.jpg")
    assert verdict.reason == Reason.IMAGE_TOO_LARGE
    assert "20000000000 bytes" in verdict.detail

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not end.is_set():
            handler.wfile.write(bytes(10_000))

    host.paths["/endless.jpg"] = endless
    assert refused(host.url + "/endless.jpg").reason == Reason.IMAGE_TOO_LARGE


def test_packed_answers_are_refused(host: Host) -> None:
    packed = gzip.compress(bytes(50_000_000), 1)
    host.paths["/x.jpg"] = answer(200, packed[:MAX_BYTES], Content_Encoding="gzip")
    verdict = refused(host.url + "/x.jpg")
    assert verdict.reason == Reason.IMAGE_HTTP_ERROR
    assert "Content-Encoding gzip" in verdict.detail


@pytest.mark.parametrize("part", [b"", b"H", b"HTTP/1.1 200 OK\r\nA: b\r\n"])
def test_slow_answers_end_with_the_time_limit(
    host: Host, end: threading.Event, part: bytes
) -> None:
    host.paths["/x.jpg"] = drip(part, end)
    began = time.monotonic()
    verdict = refused(host.url + "/x.jpg")
    assert time.monotonic() - began < 5  # total_seconds is 0.9
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_TIMED_OUT, True)


def endless(head: bytes, part: bytes, until: threading.Event) -> Behaviour:
    def behave(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        while not until.is_set():
            handler.wfile.write(part * 10_000)

    return behave


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x"),
        (b"HTTP/1.1 302 Found\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x"),
        (b"HTTP/1.1 404 Gone\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"Trailer: x\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_no_part_of_an_answer_is_without_a_limit(
    host: Host, end: threading.Event, head: bytes, part: bytes
) -> None:
    host.paths["/x.jpg"] = endless(head, part, end)
    patient = HttpConfig(timeout_seconds=60.0, total_seconds=60.0, retries=0)
    verdict = refused(host.url + "/x.jpg", http=patient)
    assert verdict.reason == Reason.IMAGE_TOO_LARGE
    assert "the answer does not end" in verdict.detail


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A" * 70_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n" + CONTENT,
        b"HTTP/1.1 302 Found\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n" + CONTENT,
    ],
)
def test_garbage_instead_of_an_answer(host: Host, garbage: bytes) -> None:
    def behave(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(garbage)
        handler.close_connection = True

    host.paths["/x.jpg"] = behave
    assert refused(host.url + "/x.jpg").reason == Reason.IMAGE_UNREACHABLE


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        verdict = refused(f"http://127.0.0.1:{taken.getsockname()[1]}/x.jpg")
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_UNREACHABLE, True)


def test_an_empty_answer(host: Host) -> None:
    host.paths["/x.jpg"] = answer(200)
    assert refused(host.url + "/x.jpg").reason == Reason.IMAGE_EMPTY


def test_redirects_are_followed_within_the_rules(host: Host) -> None:
    port = host.server_port
    host.paths |= {
        "/relative": answer(301, b"moved", Location="/good.jpg"),
        "/absolute": answer(307, Location=host.url + "/relative"),
        "/loop": answer(302, Location="/loop"),
        "/other": answer(302, Location=f"http://localhost:{port}/good.jpg"),
        "/file": answer(302, Location="file:///etc/passwd"),
        "/nowhere": answer(302, Location="http://[::1/"),
    }
    assert read(host.url + "/absolute") == CONTENT
    verdict = refused(host.url + "/loop")
    assert verdict.reason == Reason.IMAGE_HTTP_ERROR
    assert "more than 5 redirects" in verdict.detail
    for path in ("/other", "/file"):
        assert refused(host.url + path).reason == Reason.IMAGE_FORBIDDEN
    assert refused(host.url + "/nowhere").reason == Reason.IMAGE_BAD_URL
    assert all(path != "/good.jpg" for path, _ in host.requests[3:])


def test_a_redirect_to_a_private_address_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public host that sends to the inside: the name is allowed, the address is not."""
    monkeypatch.setattr(addresses, "is_public", lambda address: str(address) != "127.0.0.2")
    names = {"public.example": "127.0.0.1", "inside.example": "127.0.0.2"}
    true = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *r, **o: true(names.get(name, name), *r, **o)
    )
    port = host.server_port
    host.paths["/x.jpg"] = answer(302, Location=f"http://inside.example:{port}/good.jpg")
    verdict = refused(f"http://public.example:{port}/x.jpg", allowed_hosts=())
    assert verdict.reason == Reason.IMAGE_FORBIDDEN
    assert "127.0.0.2 is not a public address" in verdict.detail
    assert len(host.requests) == 1


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.9", "172.16.0.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe", "64:ff9b:1::7f00:1", "::ffff:0:127.0.0.1",
        "::a9fe:a9fe", "fec0::1", "192.88.99.1", "2002:808:808::", "::ffff:8.8.8.8", "2001:db8::1",
        "64:ff9b::c058:6301", "4000::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not addresses.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert addresses.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "spelling", ["127.0.0.1", "2130706433", "0x7f.1", "localhost", "[::1]", "[::ffff:7f00:1]"]
)
def test_no_spelling_of_this_machine_is_let_in(host: Host, spelling: str) -> None:
    verdict = refused(
        f"http://{spelling}:{host.server_port}/good.jpg", allowed_hosts=(), private_hosts=()
    )
    assert verdict.reason in (Reason.IMAGE_FORBIDDEN, Reason.IMAGE_UNREACHABLE)
    assert host.requests == []


def test_the_connection_goes_to_the_address_that_was_checked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolves to another address the second time gets no second time."""
    asked = resolve_to(monkeypatch, "127.0.0.1")
    monkeypatch.setattr(addresses, "is_public", lambda _: True)
    url = f"http://rebinding.example:{host.server_port}/good.jpg"
    assert read(url, allowed_hosts=()) == CONTENT
    assert asked == ["rebinding.example"]
    assert host.requests[0][1]["Host"] == f"rebinding.example:{host.server_port}"


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    verdict = refused("http://absent.example/x.jpg", allowed_hosts=())
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_UNREACHABLE, True)


def test_a_name_without_an_address_is_asked_for_now_and_then(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    true = socket.getaddrinfo

    def getaddrinfo(name: str, *rest: Any, **options: Any) -> list[Any]:
        asked.append(name)
        if name.endswith(".example"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return true(name, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    given = {"allowed_hosts": (), "http": HttpConfig(retries=0)}
    for _ in range(3):
        assert refused("http://absent.example/x.jpg", **given).transient
    assert asked == ["absent.example"]
    host.paths["/moved"] = answer(302, Location="http://absent.example/x.jpg")
    assert refused(host.url + "/moved", **given).transient
    assert asked.count("absent.example") == 1
    monkeypatch.setattr(hosts, "PROBE_SECONDS", 0.0)
    refused("http://absent.example/x.jpg", **given)
    assert asked.count("absent.example") == 2


def test_a_listed_host_may_only_be_private_where_the_recipe_says_so(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, "127.0.0.1")
    url = f"http://pictures.example:{host.server_port}/good.jpg"
    for listed in (("pictures.example",), ("*.example",)):
        verdict = refused(url, allowed_hosts=listed, private_hosts=())
        assert verdict.reason == Reason.IMAGE_FORBIDDEN
        assert "127.0.0.1 is not a public address" in verdict.detail
    assert host.requests == []
    assert read(url, allowed_hosts=(), private_hosts=("pictures.example",)) == CONTENT
    assert read(url, allowed_hosts=("x.example",), private_hosts=("pictures.example",)) == CONTENT


@pytest.mark.parametrize(
    ("host_name", "listed", "allowed"),
    [
        ("a.example", ("a.example",), True),
        ("b.a.example", ("a.example",), False),
        ("b.a.example", ("*.a.example",), True),
        ("c.b.a.example", ("*.a.example",), True),
        ("a.example", ("*.a.example",), False),
        ("evila.example", ("*.a.example",), False),
        ("a.example.evil", ("a.example", "*.a.example"), False),
    ],
)
def test_hosts_of_the_recipe(host_name: str, listed: tuple[str, ...], allowed: bool) -> None:
    assert Policy(("https",), listed).allows(host_name) is allowed
    assert Policy(("https",), ("x.example",), listed[:1]).allows(host_name) is (
        host_name == listed[0]
    )
    given = rules(allowed_schemes=("https",), allowed_hosts=listed)
    state = fetching.source_state(f"https://{host_name.upper()}./x.jpg", given)
    assert state == ("" if allowed else fetching.FORBIDDEN)


@pytest.mark.parametrize(
    "url",
    [
        "http://", "http:///x.jpg", "http://[::1/x.jpg", "http://h:99999/x", "http://h:port/x",
        "http://" + "a" * 300 + "/x", "http://a..b/x", "http://a b/x", "http://a%00b/x",
        "http://\udcff/x", "http://user:pa ss@h/x", "http://us er@h/x", "http://user:pa/ss@h/x",
        "http://user:pa?ss@h/x",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    assert refused(url, allowed_hosts=()).reason == Reason.IMAGE_BAD_URL


@pytest.mark.parametrize("url", ["ftp://h/x.jpg", "HTTPS://h/x", "gopher://h/x", "file:///etc/x"])
def test_schemes_that_the_recipe_does_not_name(url: str) -> None:
    assert refused(url, allowed_schemes=("http",)).reason == Reason.IMAGE_FORBIDDEN


def test_credentials_are_sent_and_never_shown(host: Host) -> None:
    host.paths |= {
        "/x.jpg": answer(200, CONTENT),
        "/moved": answer(302, Location=f"{host.url}/x.jpg"),
        "/large": answer(200, bytes(MAX_BYTES + 1)),
    }
    secret = host.url.replace("://", "://user:p%40ss@")
    assert read(secret + "/x.jpg?sig=TOKEN") == CONTENT
    assert read(secret + "/moved") == CONTENT
    sent = [headers.get("Authorization") for _, headers in host.requests]
    basic = "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert sent == [basic, basic, None]  # a redirect without credentials gets none
    for path in ("/absent", "/large", "/busy", "/moved"):
        host.paths["/busy"] = answer(503)
        host.paths["/moved"] = answer(302, Location=secret + "/absent?sig=TOKEN")
        detail = refused(f"{secret}{path}?sig=TOKEN").detail
        assert "127.0.0.1" in detail
        assert not [s for s in ("user", "p%40ss", "p@ss", "TOKEN") if s in detail]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x: failed", "s3://bucket/x: failed"),
        ("https://h/x.jpg?X-Amz-Signature=1 said no", "https://h/x.jpg?... said no"),
        ("what?is this.jpg", "what?is this.jpg"),
        ("http://u:p@h/x moved to http://v:q@g/y?z=1", "http://h/x moved to http://g/y?..."),
        ("http://u:p@w@h/x", "http://h/x"),
        ("http://u:p w@h/x?sig=a'SECRET", "http://h/x?..."),
    ],
)
def test_secrets_are_taken_out_of_messages(text: str, shown: str) -> None:
    assert addresses.without_secrets(text) == shown


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        ("http://user:pa ss@h:80/x.jpg?sig=a'SECRET#part", "http://h:80/x.jpg?..."),
        ("http://user:pa\tss@h/x", "http://h/x"),
        ("HTTP://user:p@ss@[::1]/x", "HTTP://[::1]/x"),
        ("s3://key:secret@Bucket/x", "s3://Bucket/x"),
        ("simplecache::http://user:pass@h/x", "simplecache::http://h/x"),
        ("http://user:pa/ss@h/x", "http://..."),
        ("http://user:pass@[h/x", "http://..."),
        ("what?is this.jpg", "what?is this.jpg"),
    ],
)
def test_addresses_are_shown_without_secrets(reference: str, shown: str) -> None:
    assert addresses.shown(reference) == shown
    verdict = refused(reference, allowed_schemes=("http",), allowed_hosts=("other.example",))
    assert not [s for s in ("user:", ":p", "ss@", "SECRET", "secret") if s in verdict.detail]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for pictures.example that signs itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pictures.example")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.example")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, form, plain) + built.public_bytes(pem))
    return path


def test_certificates_are_checked_for_the_name_not_the_address(
    host: Host, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    host.socket = context.wrap_socket(host.socket, server_side=True)
    resolve_to(monkeypatch, "127.0.0.1")
    rules_of_hosts = {
        "allowed_hosts": (), "private_hosts": ("pictures.example", "other.example"),
    }  # fmt: skip
    url = f"https://pictures.example:{host.server_port}/good.jpg"
    verdict = refused(url, **rules_of_hosts)
    assert (verdict.reason, verdict.transient) == (Reason.IMAGE_UNREACHABLE, False)
    assert "certificate" in verdict.detail
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert read(url, **rules_of_hosts) == CONTENT
    wrong = f"https://other.example:{host.server_port}/good.jpg"
    assert "certificate" in refused(wrong, **rules_of_hosts).detail


@pytest.mark.parametrize(
    "host_name", ["https://a.example", "a.example/x", "a.*.example", "*", "", "ü" * 70]
)
def test_hosts_that_would_match_nothing_are_the_users_mistake(host_name: str) -> None:
    for setting in ("allowed_hosts", "private_hosts"):
        section = {"source": "synthetic", "images": {setting: [host_name]}}
        with pytest.raises(UserError, match=f"{setting}.*is no host name"):
            STAGE.load_config(section)


def test_private_hosts_are_exact() -> None:
    section = {"source": "synthetic", "images": {"private_hosts": ["*.example.com"]}}
    with pytest.raises(UserError, match=r"private_hosts: .* is no host name"):
        STAGE.load_config(section)


def test_hosts_of_the_recipe_may_be_names_and_addresses() -> None:
    hosts = ["a.example", "*.B.example", "127.0.0.1", "::1", "my_host", "*.grün.example"]
    config = STAGE.load_config({"source": "synthetic", "images": {"allowed_hosts": hosts}})
    known = Policy(("https",), ImageRules.of(config.images, root="/").allowed_hosts)
    addresses.parse("https://x.b.Example/y", known)
    addresses.parse("https://x.grün.example/y", known)
    with pytest.raises(BadImage):
        addresses.parse("https://grün.example/y", known)


def test_a_user_agent_that_breaks_the_header_is_refused() -> None:
    section = {"source": "synthetic", "images": {"http": {"user_agent": "a\r\nb: c"}}}
    with pytest.raises(UserError, match="user_agent"):
        STAGE.load_config(section)
