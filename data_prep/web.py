"""Pictures over http(s): an address in, the bytes of the answer or a reason out (fetching).

The client connects to the very address that it has checked, so a name that resolves differently the
second time leads nowhere else, and every wait, that for headers too, ends with one time limit.
Proxies of the environment are not used: they would connect on their own account.
"""

import contextlib
import dataclasses
import email.utils
import http.client
import io
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

from data_prep.addresses import (
    PORTS,
    HostAway,
    Policy,
    Target,
    checked_addresses,
    joined,
    parse,
    without_secrets,
)
from data_prep.config import HttpConfig
from data_prep.hosts import known_hosts
from data_prep.images import BadImage
from data_prep.quarantine import Reason

_REDIRECTS = (301, 302, 303, 307, 308)
_GONE = (404, 410)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_SECONDS = 30.0
_DISCARDED_BYTES = 65_536
_MAX_IDLE = 64
# What an answer may have beside its body: headers, sizes of chunks.
_OVERHEAD_BYTES = 1 << 20


class _Passing(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, reason: Reason, detail: str, *, wait_seconds: float | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.wait_seconds = wait_seconds
        self.attempt = 0
        self.target: Target | None = None


@dataclasses.dataclass
class _Clock:
    """When the time for one picture is over."""

    end: float

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            TimeoutError: none.
        """
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("images.http.total_seconds are over")
        return seconds


class WebClient:
    """Fetches pictures, with connections that are used again; safe to use from many threads."""

    def __init__(self, policy: Policy, settings: HttpConfig, *, max_bytes: int) -> None:
        self._policy = policy
        self._settings = settings
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._slots: dict[str, threading.BoundedSemaphore] = {}
        self._hosts = known_hosts(policy, settings)
        self._idle: list[_Connection] = []  # the oldest first
        self._tls: ssl.SSLContext | None = None
        self._closed = threading.Event()

    def close(self) -> None:
        """Close all connections and end the waits between attempts."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def get(self, url: str) -> bytes:
        """Return the body of the answer, after redirects and retries.

        Raises:
            BadImage: not allowed, not there, too large, too slow or too often in vain.
        """
        target = parse(url, self._policy)
        try:
            return self._persist(target)
        except _Passing as failure:
            self._hosts.failed(failure.target or target, failure.reason)
            detail = f"{target.shown}: {failure.detail} (attempt {failure.attempt})"
            raise BadImage(failure.reason, detail, transient=True) from failure

    def _persist(self, target: Target) -> bytes:
        """Try until there is an answer, the attempts are used up or the time is over."""
        clock = _Clock(time.monotonic() + self._settings.total_seconds)
        self._hosts.check(target)
        hopeless = self._hosts.is_failing(target)
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._follow(target, clock)
            except _Passing as failure:
                failure.attempt = attempt
                wait = self._wait_seconds(target, attempt, failure)
                is_last = hopeless or attempt > self._settings.retries
                if is_last or time.monotonic() + wait >= clock.end or self._closed.wait(wait):
                    raise

    def _wait_seconds(self, target: Target, attempt: int, failure: _Passing) -> float:
        if failure.wait_seconds is not None:
            return failure.wait_seconds
        # Between half and all of it, by the address: workers do not come back all at once.
        share = 0.5 + zlib.crc32(f"{attempt}{target.url}".encode()) / 2**33
        longest = self._settings.backoff_seconds * 2.0 ** min(attempt - 1, 30)
        return min(_LONGEST_WAIT_SECONDS, longest) * share

    def _follow(self, target: Target, clock: _Clock) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            with self._slot(target.host, clock):
                try:
                    answer = self._ask(target, clock)
                except _Passing as failure:
                    failure.target = target
                    raise
            self._hosts.answered(target)
            if isinstance(answer, bytes):
                return answer
            asked, target = target, parse(joined(target, answer), self._policy)
            if target.origin != asked.origin:
                self._hosts.check(target)
        raise BadImage(
            Reason.IMAGE_HTTP_ERROR,
            f"{target.shown}: more than {self._settings.max_redirects} redirects",
        )

    @contextlib.contextmanager
    def _slot(self, host: str, clock: _Clock) -> Iterator[None]:
        """Hold one of the host's connections; the wait for it is not on the picture's clock."""
        with self._lock:
            slot = self._slots.setdefault(
                host, threading.BoundedSemaphore(self._settings.connections_per_host)
            )
        began = time.monotonic()
        with slot:
            clock.end += time.monotonic() - began
            yield

    def _ask(self, target: Target, clock: _Clock) -> bytes | str:
        """Send one request; return the body, or where a redirect leads."""
        try:
            return self._exchange(target, clock)
        except _Passing:
            raise
        except HostAway as away:
            self._hosts.failed(target, away.reason, is_absent=True)
            raise
        except BadImage:
            self._hosts.answered(target)  # a refusal is an answer
            raise
        except TimeoutError as error:
            raise _Passing(Reason.IMAGE_TIMED_OUT, str(error) or "timed out") from error
        except ssl.SSLCertVerificationError as error:
            raise BadImage(
                Reason.IMAGE_UNREACHABLE, f"{target.shown}: {error.verify_message}"
            ) from error
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
            # http.client takes what is no number, and too large or negative ones, from a host.
            detail = without_secrets(f"{type(error).__name__}: {error}")
            raise _Passing(Reason.IMAGE_UNREACHABLE, detail) from error

    def _exchange(self, target: Target, clock: _Clock) -> bytes | str:
        connection = self._take(target)
        try:
            response = self._request(connection, target, clock)
        except (ConnectionError, http.client.BadStatusLine):
            if not connection.used:
                raise
            # The host has closed a connection that it had kept open: no fault of the picture's.
            connection = self._connection(target)
            response = self._request(connection, target, clock)
        try:
            return self._answer(response, target)
        finally:
            self._put_back(connection, response)

    def _request(
        self, connection: "_Connection", target: Target, clock: _Clock
    ) -> http.client.HTTPResponse:
        connection.clock = clock
        connection.bytes_left = self._max_bytes + _OVERHEAD_BYTES
        headers = {"User-Agent": self._settings.user_agent, "Accept": "image/*,*/*;q=0.5"}
        if target.authorization:
            headers["Authorization"] = target.authorization
        try:
            connection.request("GET", target.path, headers=headers)
            return connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _answer(self, response: http.client.HTTPResponse, target: Target) -> bytes | str:
        status = response.status
        if status == 200:
            return self._body(response, target)
        response.read(_DISCARDED_BYTES)
        location = response.headers.get("Location")
        if status in _REDIRECTS and location:
            return str(location)
        if status in _PASSING:
            wait = _retry_after(response.headers.get("Retry-After"))
            raise _Passing(Reason.IMAGE_HTTP_ERROR, f"status {status}", wait_seconds=wait)
        reason = Reason.IMAGE_MISSING if status in _GONE else Reason.IMAGE_HTTP_ERROR
        raise BadImage(reason, f"{target.shown}: status {status}")

    def _body(self, response: http.client.HTTPResponse, target: Target) -> bytes:
        coding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            # It was not asked for, and what it unpacks to has no limit.
            raise BadImage(Reason.IMAGE_HTTP_ERROR, f"{target.shown}: Content-Encoding {coding}")
        announced = response.length
        if announced is not None and announced > self._max_bytes:
            raise BadImage(Reason.IMAGE_TOO_LARGE, f"{target.shown}: {announced} bytes")
        data = response.read(self._max_bytes + 1)
        if len(data) > self._max_bytes:
            raise BadImage(
                Reason.IMAGE_TOO_LARGE, f"{target.shown}: more than {self._max_bytes} bytes"
            )
        if announced is not None and len(data) < announced:
            raise _Passing(
                Reason.IMAGE_UNREACHABLE, f"cut off after {len(data)} of {announced} bytes"
            )
        return data

    def _take(self, target: Target) -> "_Connection":
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index].target.origin == target.origin:
                    return self._idle.pop(index)
        return self._connection(target)

    def _put_back(self, connection: "_Connection", response: http.client.HTTPResponse) -> None:
        """Keep a connection whose answer was read to its end, in place of the oldest one."""
        at_end = response.isclosed()
        response.close()
        connection.used = True
        unwanted = [connection]
        with self._lock:
            if at_end and not response.will_close and not self._closed.is_set():
                self._idle.append(connection)
                unwanted = self._idle[:-_MAX_IDLE]
                del self._idle[:-_MAX_IDLE]
        for old in unwanted:
            old.close()

    def _connection(self, target: Target) -> "_Connection":
        return _Connection(target, self._policy, self._settings, self._tls_of(target))

    def _tls_of(self, target: Target) -> ssl.SSLContext | None:
        if target.scheme != "https":
            return None
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()
            return self._tls


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, all of whose waits end with its clock."""

    def __init__(
        self, target: Target, policy: Policy, settings: HttpConfig, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(target.host, target.port, timeout=settings.timeout_seconds)
        self.default_port = PORTS[target.scheme]
        self.used = False
        self.clock = _Clock(0.0)
        self.bytes_left = 0
        self.target = target
        self._policy = policy
        self._tls = tls

    def connect(self) -> None:
        """Connect to the first checked address that answers."""
        refused: OSError | None = None
        for address in checked_addresses(self.target, self._policy):
            try:
                plain = socket.create_connection(address, timeout=self.seconds())
            except OSError as error:
                refused = error
                continue
            break
        else:
            raise refused or OSError("the name has no address")
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self._tls is None:
                self.sock = _TimedSocket(plain, self)
            else:
                secure = self._tls.wrap_socket(plain, server_hostname=self.target.host)
                self.sock = _TimedSocket(secure, self)
        except BaseException:
            plain.close()
            raise

    def seconds(self) -> float:
        """Return how long the next wait may take."""
        return min(float(self.timeout or 0.0), self.clock.left())

    def count(self, num_bytes: int) -> None:
        """Count what an answer has brought: http.client has no limit for some parts of it.

        Raises:
            BadImage: it is more than any answer may have.
        """
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise BadImage(Reason.IMAGE_TOO_LARGE, f"{self.target.shown}: the answer does not end")


class _TimedSocket:
    """As much of a socket as http.client uses, with a limit over all of its waits together."""

    def __init__(self, inner: socket.socket, connection: _Connection) -> None:
        self._inner = inner
        self._connection = connection

    def sendall(self, data: bytes) -> None:
        self._inner.settimeout(self._connection.seconds())
        self._inner.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._inner, self._connection), 65_536)

    def close(self) -> None:
        self._inner.close()


class _TimedReader(io.RawIOBase):
    """The receiving half of a connection; the socket stays open until this is closed too."""

    def __init__(self, inner: socket.socket, connection: _Connection) -> None:
        self._inner = inner
        self._connection = connection
        self._raw = inner.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - a writable buffer
        self._inner.settimeout(self._connection.seconds())
        num_bytes = self._raw.readinto(buffer)
        self._connection.count(num_bytes or 0)
        return num_bytes

    def close(self) -> None:
        self._raw.close()
        super().close()


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a host asks to wait: a number, or a date in its header."""
    if not value:
        return None
    try:
        if value.isascii() and value.strip().isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
