"""Pictures from the web: whatever a host does, an answer or a reason in bounded time and memory."""

import datetime
import email.utils
import gzip
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler

import pytest
from web_pictures import (
    CONTENT,
    MAX_BYTES,
    Behaviour,
    Host,
    answer,
    drip,
    hang_up,
    in_turn,
    read,
    refused,
    rules,
)

from data_prep import hosts
from data_prep.config import HttpConfig
from data_prep.fetching import Fetcher
from data_prep.images import BadImage
from data_prep.quarantine import Reason

pytestmark = pytest.mark.usefixtures("nothing_known")


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
