"""Pictures over http(s): an address in, the bytes of the answer or a reason out (fetching).

The client connects to the very address that it has checked, so a name that resolves differently the
second time leads nowhere else, and every wait, that for headers too, ends with one time limit.
Proxies of the environment are not used: they would connect on their own account.
"""

import base64
import contextlib
import dataclasses
import email.utils
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from data_prep.config import HttpConfig
from data_prep.images import BadImage
from data_prep.quarantine import Reason

SCHEMES = ("http", "https")
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_GONE = (404, 410)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_SECONDS = 30.0
_DISCARDED_BYTES = 65_536
_MAX_IDLE = 64
# Pictures in a row that a host may cost all attempts; a dead host of thousands would take hours.
_MAX_IN_VAIN = 10
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SECRETS = re.compile(r"(?<=://)[^/\s@]*(?:@[^/\s@]*)*@|\?[^\s'\"]+")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclasses.dataclass(frozen=True)
class Policy:
    """Where pictures may come from.

    Attributes:
        schemes: allowed schemes, in small letters.
        hosts: allowed hosts, exact or ``*.example.com``; empty: all with a public address.
    """

    schemes: tuple[str, ...]
    hosts: tuple[str, ...]

    def lists(self, host: str) -> bool:
        """Say whether the recipe names the host; only then its address need not be public."""
        return any(
            host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:]))
            for allowed in self.hosts
        )


@dataclasses.dataclass(frozen=True)
class Target:
    """An address that the policy allows, taken apart.

    Attributes:
        shown: the address without user, password and query, for messages.
        path: path and query as they stand in the request.
        authorization: value of the header for a user and password in the address, else None.
    """

    url: str
    shown: str
    scheme: str
    host: str
    port: int
    path: str
    authorization: str | None

    @property
    def origin(self) -> tuple[str, str, int]:
        """What a connection can be used again for."""
        return self.scheme, self.host, self.port


def parse(url: str, policy: Policy) -> Target:
    """Take an address apart and hold it against the policy; nobody is asked.

    Raises:
        BadImage: it is no address, or its scheme or host is not allowed.
    """
    shown = without_secrets(url)
    try:
        parts = urlsplit(url.strip())
        host = (parts.hostname or "").rstrip(".")
        if ":" not in host:
            host = host.encode("idna").decode()
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:  # UnicodeError is one
        raise BadImage(Reason.IMAGE_BAD_URL, f"{shown}: {error}") from error
    if parts.scheme not in SCHEMES or parts.scheme not in policy.schemes:
        raise BadImage(Reason.IMAGE_FORBIDDEN, f"{shown}: scheme not in images.allowed_schemes")
    if not host or re.search(r"[\s\x00-\x20%]", host):
        raise BadImage(Reason.IMAGE_BAD_URL, f"{shown}: no host in it")
    if policy.hosts and not policy.lists(host):
        raise BadImage(Reason.IMAGE_FORBIDDEN, f"{shown}: host not in images.allowed_hosts")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return Target(
        url=parts.geturl(),
        shown=shown,
        scheme=parts.scheme,
        host=host,
        port=port,
        path=path,
        authorization=_authorization(parts.username, parts.password),
    )


def without_secrets(text: str) -> str:
    """Return a text with the users, passwords and queries of all addresses in it taken out."""
    return _SECRETS.sub(lambda match: "" if match.group().endswith("@") else "?...", text)


def is_public(address: Address) -> bool:
    """Say whether an address is one of the public internet, also as a part of another one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.teredo:
            inner = address.teredo[1]
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


class _Passing(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, reason: Reason, detail: str, *, wait_seconds: float | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.wait_seconds = wait_seconds


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
        self._in_vain: Counter[str] = Counter()  # pictures of a host that failed in a row
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
        clock = _Clock(time.monotonic() + self._settings.total_seconds)
        hopeless = self._in_vain[target.host] >= _MAX_IN_VAIN
        retries = 0 if hopeless else self._settings.retries
        for attempt in range(retries + 1):
            try:
                data = self._follow(target, clock)
            except _Passing as failure:
                last = failure
            except BadImage:
                self._in_vain[target.host] = 0  # a refusal is an answer
                raise
            else:
                self._in_vain[target.host] = 0
                return data
            wait = self._wait_seconds(target, attempt, last)
            out_of_time = time.monotonic() + wait >= clock.end
            if attempt == retries or out_of_time or self._closed.wait(wait):
                break
        with self._lock:
            self._in_vain[target.host] += 1
        detail = f"{target.shown}: {last.detail} (attempt {attempt + 1})"
        raise BadImage(last.reason, detail, transient=True)

    def _wait_seconds(self, target: Target, attempt: int, failure: _Passing) -> float:
        if failure.wait_seconds is not None:
            return failure.wait_seconds
        # Between half and all of it, by the address: workers do not come back all at once.
        share = 0.5 + zlib.crc32(f"{attempt}{target.url}".encode()) / 2**33
        return min(_LONGEST_WAIT_SECONDS, self._settings.backoff_seconds * 2.0**attempt) * share

    def _follow(self, target: Target, clock: _Clock) -> bytes:
        for _ in range(self._settings.max_redirects + 1):
            with self._slot(target.host, clock):
                answer = self._ask(target, clock)
            if isinstance(answer, bytes):
                return answer
            target = parse(_joined(target, answer), self._policy)
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
        except BadImage:
            raise
        except TimeoutError as error:
            raise _Passing(Reason.IMAGE_TIMED_OUT, str(error) or "timed out") from error
        except ssl.SSLCertVerificationError as error:
            raise BadImage(
                Reason.IMAGE_UNREACHABLE, f"{target.shown}: {error.verify_message}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
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
        self.default_port = _PORTS[target.scheme]
        self.used = False
        self.clock = _Clock(0.0)
        self.target = target
        self._policy = policy
        self._tls = tls

    def connect(self) -> None:
        """Connect to the first checked address that answers."""
        refused: OSError | None = None
        for address in _checked_addresses(self.target, self._policy):
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
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _checked_addresses(target: Target, policy: Policy) -> list[tuple[str, int]]:
    """Resolve a name; return the addresses that it is allowed to have.

    Raises:
        BadImage: none of them is public, and the recipe does not name the host.
    """
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            raise
        detail = f"{target.shown}: no such host"  # asking again at once would cost minutes a chunk
        raise BadImage(Reason.IMAGE_UNREACHABLE, detail, transient=True) from error
    addresses = [str(entry[4][0]) for entry in found]
    if not policy.lists(target.host):
        public = [a for a in addresses if is_public(ipaddress.ip_address(a.partition("%")[0]))]
        if addresses and not public:
            raise BadImage(
                Reason.IMAGE_FORBIDDEN,
                f"{target.shown}: {addresses[0]} is not a public address, and the host is not in "
                f"images.allowed_hosts",
            )
        addresses = public
    return [(address, target.port) for address in dict.fromkeys(addresses)]


def _joined(target: Target, location: str) -> str:
    """Return where a redirect leads; its address may be relative to the one that was asked."""
    try:
        return urljoin(target.url, location)
    except ValueError as error:
        shown = without_secrets(location)
        raise BadImage(Reason.IMAGE_BAD_URL, f"{target.shown} leads to {shown}") from error


def _authorization(user: str | None, password: str | None) -> str | None:
    if user is None:
        return None
    pair = f"{unquote(user)}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a host asks to wait: a number, or a date in its header."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())
