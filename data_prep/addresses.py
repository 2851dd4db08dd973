"""Addresses of pictures: what may be asked, taken apart and checked (references -> web)."""

import base64
import dataclasses
import ipaddress
import re
import socket
from urllib.parse import quote, unquote, urljoin, urlsplit

from data_prep.images import BadImage
from data_prep.quarantine import Reason

SCHEMES = ("http", "https")
PORTS = {"http": 80, "https": 443}
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
        port = parts.port or PORTS.get(parts.scheme, 0)
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
    if "://" not in text:
        return text  # a question mark in a file's name is no query
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


def checked_addresses(target: Target, policy: Policy) -> list[tuple[str, int]]:
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


def joined(target: Target, location: str) -> str:
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
