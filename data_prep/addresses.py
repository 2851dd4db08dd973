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
# IPv6 has no other addresses of the internet; in these of them lie IPv4 addresses (6to4, Teredo).
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_TUNNELS = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("2001::/32"))
_RELAYS = ipaddress.ip_network("192.88.99.0/24")
_SECRETS = re.compile(r"(?<=://)[^/\n]*@|\?\S+")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclasses.dataclass(frozen=True)
class Policy:
    """Where pictures may come from.

    Attributes:
        schemes: allowed schemes, in small letters.
        hosts: allowed hosts, exact or ``*.example.com``; empty: all with a public address.
        private_hosts: allowed hosts, exact, whose address need not be public.
    """

    schemes: tuple[str, ...]
    hosts: tuple[str, ...]
    private_hosts: tuple[str, ...] = ()

    def allows(self, host: str) -> bool:
        """Say whether the host may be asked, if its address is right."""
        return not self.hosts or host in self.private_hosts or self._lists(host)

    def _lists(self, host: str) -> bool:
        return any(
            host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:]))
            for allowed in self.hosts
        )


@dataclasses.dataclass(frozen=True)
class Target:
    """An address that the policy allows, taken apart.

    Attributes:
        shown: the address for messages (see ``shown``).
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


class HostAway(BadImage):
    """A host that does not exist or is not asked for the moment: nothing that it said."""


def parse(url: str, policy: Policy) -> Target:
    """Take an address apart and hold it against the policy; nobody is asked.

    Raises:
        BadImage: it is no address, or its scheme or host is not allowed.
    """
    name = shown(url)
    try:
        parts = urlsplit(url.strip())
        host = (parts.hostname or "").rstrip(".")
        if ":" not in host:
            host = host.encode("idna").decode()
        port = parts.port or PORTS.get(parts.scheme, 0)
    except ValueError as error:  # UnicodeError is one; it may quote a part of a password
        raise BadImage(Reason.IMAGE_BAD_URL, f"{name} is no address") from error
    if parts.scheme not in SCHEMES or parts.scheme not in policy.schemes:
        raise BadImage(Reason.IMAGE_FORBIDDEN, f"{name}: scheme not in images.allowed_schemes")
    if not host or re.search(r"[\s\x00-\x20%]", host):
        raise BadImage(Reason.IMAGE_BAD_URL, f"{name}: no host in it")
    if re.search(r"\s", f"{parts.username}{parts.password}"):
        raise BadImage(Reason.IMAGE_BAD_URL, f"{name}: a blank in its user or password")
    if not policy.allows(host):
        raise BadImage(Reason.IMAGE_FORBIDDEN, f"{name}: host not in images.allowed_hosts")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return Target(
        url=parts.geturl(),
        shown=name,
        scheme=parts.scheme,
        host=host,
        port=port,
        path=path,
        authorization=_authorization(parts.username, parts.password),
    )


def shown(reference: str) -> str:
    """Return a reference for messages: of an address neither user, password, query nor fragment."""
    scheme, colon, rest = reference.partition("://")
    if not colon:
        return reference  # a question mark in a file's name is no query
    try:
        parts = urlsplit(f"//{rest}")
        _ = parts.port  # no number, where a slash in a password has ended the host
    except ValueError:
        return f"{scheme}://..."
    host = parts.netloc.rpartition("@")[2]
    return f"{scheme}://{host}{parts.path}" + ("?..." if parts.query else "")


def without_secrets(text: str) -> str:
    """Return a text with the users, passwords and queries of all addresses in it taken out.

    Where an address ends in a text is a guess: what is one should go through ``shown``.
    """
    if "://" not in text:
        return text
    return _SECRETS.sub(lambda match: "" if match.group().endswith("@") else "?...", text)


def is_public(address: Address) -> bool:
    """Say whether an address is one of the public internet.

    Of the forms of IPv6 that hold an IPv4 address only that of NAT64 is one; networks that have
    nothing but IPv6 give it to every host that has nothing but IPv4.
    """
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if isinstance(address, ipaddress.IPv6Address):
        if address not in _GLOBAL_UNICAST or any(address in tunnel for tunnel in _TUNNELS):
            return False
    elif address in _RELAYS:
        return False
    return address.is_global and not address.is_multicast


def checked_addresses(target: Target, policy: Policy) -> list[tuple[str, int]]:
    """Resolve a name; return the addresses that it is allowed to have.

    Raises:
        HostAway: there is no such name.
        BadImage: none of them is public, and the recipe does not say that they need not be.
    """
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            raise
        detail = f"{target.shown}: no such host"
        raise HostAway(Reason.IMAGE_UNREACHABLE, detail, transient=True) from error
    addresses = [str(entry[4][0]) for entry in found]
    if target.host not in policy.private_hosts:
        public = [a for a in addresses if is_public(ipaddress.ip_address(a.partition("%")[0]))]
        if addresses and not public:
            raise BadImage(
                Reason.IMAGE_FORBIDDEN,
                f"{target.shown}: {addresses[0]} is not a public address, and the host is not in "
                f"images.private_hosts",
            )
        addresses = public
    return [(address, target.port) for address in dict.fromkeys(addresses)]


def joined(target: Target, location: str) -> str:
    """Return where a redirect leads; its address may be relative to the one that was asked."""
    try:
        return urljoin(target.url, location)
    except ValueError as error:
        detail = f"{target.shown} leads to {shown(location)}"
        raise BadImage(Reason.IMAGE_BAD_URL, detail) from error


def _authorization(user: str | None, password: str | None) -> str | None:
    if user is None:
        return None
    pair = f"{unquote(user)}:{unquote(password or '')}"
    return "Basic " + base64.b64encode(pair.encode()).decode()
